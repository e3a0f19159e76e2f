//! Whom a standby streams from: another than the leader, or nobody.

use super::*;

fn tagged(place: Place) -> Observation {
    Observation {
        place,
        ..seen(LeaseSeen::Theirs(epoch("n2")))
    }
}

fn from(source: &str) -> Place {
    Place {
        replicatefrom: Some(source.to_owned()),
        ..Place::default()
    }
}

fn from_the_archive() -> Place {
    Place {
        nostream: true,
        ..Place::default()
    }
}

#[test]
fn a_standby_streams_from_whom_its_tag_names() {
    let follow = |source: &str| {
        let upstream = Some(name(source));
        Some(Step::Follow { upstream })
    };
    let mut cascades = tagged(from("n3"));
    assert_eq!(step(&cascades, &Memory::default()), follow("n3"));
    cascades.upstream = upstream_address(&cascades.view, &name("n3")).map(Upstream::Member);
    assert_eq!(step(&cascades, &Memory::default()), None);
    let gone = with_view(cascades, |view| {
        view.members.remove(&name("n3"));
    });
    assert_eq!(
        step(&gone, &Memory::default()),
        follow("n2"),
        "its leader, while that one is not there"
    );
    let down = Observation {
        postgres: Postgres::Down,
        ..tagged(from("n3"))
    };
    let upstream = Some(name("n3"));
    assert_eq!(step(&down, &Memory::default()), Some(Step::StartStandby { upstream }));
}

#[test]
fn a_standby_whose_source_has_no_more_is_not_cloned_for_that() {
    let stuck = Memory {
        stands_still: Some((Lsn(100), 9)),
        rejoin: Some((epoch("n2"), Rejoin::Waits)),
        rejoin_asked_at: Some(NOW),
        ..Memory::default()
    };
    let at = |source: u64, leader: u64| {
        let mut seen = tagged(from("n3"));
        let address = upstream_address(&seen.view, &name("n3")).map(Upstream::Member);
        (seen.upstream, seen.postgres) = (address, server(standby_wal(100), None));
        with_view(seen, |view| {
            for (member, lsn) in [("n3", source), ("n2", leader)] {
                if let Some(member) = view.members.get_mut(&name(member)) {
                    member.record.xlog_location = Some(Lsn(lsn));
                }
            }
        })
    };
    assert_eq!(step(&at(100, 500), &stuck), None);
    assert_eq!(step(&at(101, 500), &stuck), Some(Step::Clone { from: name("n2") }));
}

#[test]
fn one_that_takes_its_log_from_the_archive_streams_from_nobody_and_may_stand_still() {
    let first = tagged(from_the_archive());
    assert_eq!(step(&first, &Memory::default()), Some(Step::Follow { upstream: None }));
    let archive = Observation {
        upstream: None,
        postgres: server(standby_wal(100), Some("in archive recovery")),
        ..first
    };
    let check = Some(Step::CheckRejoin { leader: epoch("n2") });
    assert_eq!(step(&archive, &Memory::default()), check);
    let told = |verdict| Memory {
        rejoin: Some((epoch("n2"), verdict)),
        stands_still: Some((Lsn(100), 99)),
        ..Memory::default()
    };
    assert_eq!(step(&archive, &told(Rejoin::Waits)), None, "asked once, and not again");
    assert_eq!(reason(&archive, &told(Rejoin::Follows)), Reason::FollowingArchive);
    assert_eq!(
        step(&archive, &told(Rejoin::Diverged)),
        Some(Step::Clone { from: name("n2") })
    );
}

#[test]
fn a_candidate_without_the_failover_slots_does_not_bid_where_they_are_required() {
    let free = seen(LeaseSeen::Free);
    assert_eq!(step(&free, &Memory::default()), Some(Step::Poll));
    let lacks = Observation {
        lacks_slots: vec!["app".to_owned()],
        ..free
    };
    assert_eq!(step(&lacks, &Memory::default()), None);
    assert_eq!(
        reason(&lacks, &Memory::default()),
        Reason::LacksSlots(vec!["app".to_owned()])
    );
    let asked_for = with_view(lacks, |view| view.failover = request(None, Some("n1")));
    assert_eq!(step(&asked_for, &Memory::default()), None);
}
