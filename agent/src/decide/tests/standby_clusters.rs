//! The cluster follows another one.

use pgherd_cluster::record::StandbyCluster;

use super::*;
use crate::memory::{Handover, Restart, RestartStage, Stage, Why};

fn section() -> StandbyCluster {
    let section = json!({"host": "10.0.0.9", "port": 5432});
    StandbyCluster::read(section.as_object().expect("a map")).expect("a source")
}

/// The same in a cluster that follows another one, whose lease gives no deadlines.
pub(super) fn following(seen: Observation) -> Observation {
    let config = json!({"standby_cluster": {"host": "10.0.0.9", "port": 5432}});
    let seen = with_view(seen, |view| {
        view.config.value = Some(DynamicConfig::new(config.as_object().cloned().expect("a map")));
        if let Some(leader) = view.leader.as_ref().map(|leader| leader.epoch.holder.clone())
            && let Some(member) = view.members.get_mut(&leader)
        {
            member.record.role = Role::StandbyLeader;
        }
    });
    let lease_paused = Some(!is_writable(&seen));
    Observation {
        standby_cluster: Some(section()),
        lease_paused,
        ..seen
    }
}

fn leads() -> Observation {
    let upstream = Some(Upstream::Remote(section()));
    following(Observation {
        upstream,
        ..seen(LeaseSeen::Mine(epoch("n1")))
    })
}

fn silent() -> Observation {
    let wal = WalStatus::Standby {
        received: Lsn(100),
        replayed: Lsn(100),
        replayed_at: None,
        paused: false,
        latest_end: None,
    };
    Observation {
        postgres: server(wal, None),
        ..leads()
    }
}

#[test]
fn whoever_wins_streams_from_the_other_cluster_and_is_not_promoted() {
    let won = following(seen(LeaseSeen::Mine(epoch("n1"))));
    assert_eq!(step(&won, &Memory::default()), Some(Step::FollowRemote));
    assert_eq!(published_role(&won, &Memory::default()), Role::StandbyLeader);
    assert_eq!(step(&leads(), &Memory::default()), None);
    let elsewhere = Observation {
        upstream: Some(Upstream::Remote(StandbyCluster {
            port: Some("5433".to_owned()),
            ..section()
        })),
        ..leads()
    };
    assert_eq!(step(&elsewhere, &Memory::default()), Some(Step::FollowRemote));
}

#[test]
fn a_lease_gives_no_deadline_where_nothing_can_take_writes() {
    let told = |lease_paused, seen: Observation| step(&Observation { lease_paused, ..seen }, &Memory::default());
    assert_eq!(told(Some(false), leads()), Some(Step::ResumeFence));
    assert_eq!(told(Some(true), leads()), None);
    // The section is gone: it is to be promoted, and only under a deadline.
    let ordinary = || seen(LeaseSeen::Mine(epoch("n1")));
    assert_eq!(told(Some(true), ordinary()), Some(Step::ResumeFence));
    assert_eq!(told(Some(false), ordinary()), Some(Step::Promote(epoch("n1"))));
    // What still takes writes is watched until it has ended.
    let primary = following(Observation {
        postgres: primary(),
        armed: true,
        ..seen(LeaseSeen::Mine(epoch("n1")))
    });
    assert_eq!(primary.lease_paused, Some(false));
    assert_eq!(step(&primary, &Memory::default()), Some(Step::Stop));
}

#[test]
fn a_primary_is_stopped_in_order_and_comes_back_under_another_holding() {
    let down = following(Observation {
        postgres: Postgres::Down,
        data: data(ControlState::ShutDown, false),
        ..seen(LeaseSeen::Mine(epoch("n1")))
    });
    let abandoned = Some(Step::Abandon {
        epoch: epoch("n1"),
        lease: 5,
    });
    assert_eq!(step(&down, &Memory::default()), abandoned);
    let free = following(Observation {
        postgres: Postgres::Down,
        data: data(ControlState::ShutDown, false),
        ..seen(LeaseSeen::Free)
    });
    assert_eq!(
        step(&free, &Memory::default()),
        Some(Step::StartStandby { upstream: None })
    );
    // A restart that was asked for before does not make a primary of it.
    let restarting = Memory {
        restart: Some(Restart {
            asked_at: NOW,
            stage: RestartStage::Start,
        }),
        ..Memory::default()
    };
    assert_eq!(step(&down, &restarting), abandoned);
    let paused = with_view(
        following(Observation {
            postgres: primary(),
            fence_paused: true,
            ..seen(LeaseSeen::Mine(epoch("n1")))
        }),
        |view| view.config.value = Some(DynamicConfig::parse(r#"{"pause":true,"standby_cluster":{"host":"h"}}"#)),
    );
    let paused = Observation {
        lease_paused: Some(true),
        ..paused
    };
    let proven = Memory {
        proven: Some(epoch("n1")),
        ..Memory::default()
    };
    assert_eq!(step(&paused, &proven), None, "in maintenance it stays what it is");
}

#[test]
fn an_election_among_standbys_knows_no_old_timeline() {
    let free = with_view(following(seen(LeaseSeen::Free)), |view| {
        view.history = Some(pgherd_cluster::record::History::parse(r#"[[1,90,"x"]]"#));
        let config = json!({"check_timeline": true, "standby_cluster": {"host": "10.0.0.9", "port": 5432}});
        view.config.value = Some(DynamicConfig::new(config.as_object().cloned().expect("a map")));
    });
    assert_eq!(reason(&free, &polled(vec![])), Reason::Bidding);
    let ahead = polled(vec![peer("n2", Some(101))]);
    assert_eq!(
        reason(&free, &ahead),
        Reason::Behind {
            of: name("n2"),
            bytes: 1
        }
    );
}

#[test]
fn a_standby_leader_that_does_not_stream_asks_whether_it_can_and_is_copied_when_it_cannot() {
    let check = Some(Step::CheckRemote { epoch: epoch("n1") });
    assert_eq!(step(&silent(), &Memory::default()), check);
    let told = |verdict| Memory {
        rejoin: Some((epoch("n1"), verdict)),
        rejoin_asked_at: Some(NOW),
        ..Memory::default()
    };
    assert_eq!(step(&silent(), &told(Rejoin::Follows)), None);
    assert_eq!(step(&silent(), &told(Rejoin::Diverged)), Some(Step::CloneRemote));
    let copied = Memory {
        cloned_under: Some(epoch("n1")),
        ..told(Rejoin::Diverged)
    };
    assert_eq!(step(&silent(), &copied), None);
    let old = Memory {
        rejoin_asked_at: Some(NOW - Duration::from_secs(6)),
        ..told(Rejoin::Waits)
    };
    assert_eq!(step(&silent(), &old), check);
    let failed = Memory {
        backoff_until: Some(NOW + Duration::from_secs(1)),
        ..told(Rejoin::Diverged)
    };
    assert_eq!(step(&silent(), &failed), None);
}

#[test]
fn the_others_follow_and_are_cloned_from_the_standby_leader() {
    let following_n2 = following(seen(LeaseSeen::Theirs(epoch("n2"))));
    assert_eq!(reason(&following_n2, &Memory::default()), Reason::Following(name("n2")));
    let empty = following(Observation {
        data: DataDir::Empty,
        postgres: Postgres::Down,
        ..seen(LeaseSeen::Theirs(epoch("n2")))
    });
    assert_eq!(step(&empty, &Memory::default()), Some(Step::Clone { from: name("n2") }));
    let former = following(Observation {
        data: data(ControlState::InProduction, false),
        postgres: Postgres::Down,
        ..seen(LeaseSeen::Theirs(epoch("n2")))
    });
    let start = Step::StartStandby {
        upstream: Some(name("n2")),
    };
    assert_eq!(step(&former, &Memory::default()), Some(start));
}

#[test]
fn a_new_copy_is_made_from_the_standby_leader() {
    let asked = Memory {
        reinitialize_asked_at: Some(NOW),
        ..Memory::default()
    };
    let replica = following(seen(LeaseSeen::Theirs(epoch("n2"))));
    assert_eq!(step(&replica, &asked), Some(Step::Clone { from: name("n2") }));
}

#[test]
fn a_standby_leader_hands_over_while_it_serves() {
    let asked = with_view(leads(), |view| view.failover = request(Some("n1"), Some("n2")));
    assert!(matches!(
        step(&asked, &Memory::default()),
        Some(Step::BeginHandover { .. })
    ));
    let under_way = Memory {
        handover: Some(Handover {
            epoch: epoch("n1"),
            why: Why::Requested {
                candidate: Some(name("n2")),
            },
            began_at: NOW,
            stage: Stage::Choose,
        }),
        ..polled(vec![peer("n2", Some(100))])
    };
    let handed = Step::HandTo {
        epoch: epoch("n1"),
        successor: Some(name("n2")),
        last: None,
    };
    assert_eq!(step(&asked, &under_way), Some(handed));
}

#[test]
fn a_record_of_who_has_what_was_acknowledged_holds_until_the_other_cluster_is_followed() {
    let recorded = |seen: Observation, standbys: &str| {
        with_view(seen, |view| {
            let record = json!({"leader": "n3", "quorum": 0, "sync_standby": standbys});
            view.sync.value = serde_json::from_value(record).expect("a record");
            view.sync.mod_revision = 26;
        })
    };
    let free = || following(seen(LeaseSeen::Free));
    assert_eq!(reason(&recorded(free(), "n2"), &polled(vec![])), Reason::NotSynchronous);
    assert_eq!(reason(&recorded(free(), "n1"), &polled(vec![])), Reason::Bidding);
    let forgotten = Some(Step::Sync(SyncStep::DeleteSync { revision: 26 }));
    assert_eq!(step(&recorded(leads(), "n1"), &Memory::default()), forgotten);
}

#[test]
fn who_makes_a_standby_cluster_names_it_after_the_copy() {
    let made = |lease_paused| {
        let seen = following(Observation {
            postgres: Postgres::Down,
            lease_paused,
            ..seen(LeaseSeen::Free)
        });
        with_view(seen, |view| view.initialize = Some(Initialize::Pending))
    };
    assert_eq!(step(&made(Some(true)), &Memory::default()), Some(Step::Initialize));
    let copying = Observation {
        data: DataDir::Empty,
        ..made(Some(true))
    };
    assert_eq!(
        step(&copying, &Memory::default()),
        Some(Step::Withdraw),
        "after a copy that failed"
    );
    let looked = Memory {
        withdrawn: true,
        ..Memory::default()
    };
    assert_eq!(step(&copying, &looked), None, "another makes it");
}
