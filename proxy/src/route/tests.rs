use proptest::prelude::*;

use super::*;
use crate::testing::{Cluster, name};

const SECOND: u64 = 1_000_000_000;
const ASKED: Boottime = Boottime::from_nanos(100 * SECOND);

fn policy(role: ListenerRole) -> Policy {
    Policy {
        role,
        max_lag_bytes: None,
        fallback_to_leader: false,
        hold_until: Boottime::from_nanos(u64::MAX),
    }
}

fn decide(policy: Policy, cluster: &Cluster, now: Boottime) -> Decision {
    let view = cluster.view();
    let warrant = Warrant::new(&view, Some(ASKED));
    let evidence = Evidence {
        view: &view,
        warrant,
        now,
    };
    let load = Load {
        open: &|_| 0,
        draws: [0, 0],
        avoid: &[],
    };
    route(policy, evidence, load)
}

fn write(cluster: &Cluster) -> Decision {
    decide(policy(ListenerRole::Write), cluster, ASKED + Duration::from_secs(1))
}

fn target(decision: Decision) -> Option<(String, Option<i64>)> {
    match decision {
        Decision::To(target) => Some((
            target.member.to_string(),
            target.epoch.map(|epoch| epoch.create_revision),
        )),
        Decision::Hold(_) | Decision::Refuse(_) => None,
    }
}

#[test]
fn writers_go_to_a_leader_that_says_it_is_primary() {
    let cluster = Cluster::new().leader("n1", 10).primary("n1", 11).replica("n2");
    assert_eq!(target(write(&cluster)), Some(("n1".to_owned(), Some(10))));
}

#[test]
fn writers_wait_while_the_leader_is_not_writable_yet() {
    let cases = [
        (Cluster::new().replica("n1"), Why::NoLeader),
        (Cluster::new().leader("n1", 10), Why::NoRecord { leader: name("n1") }),
        (
            Cluster::new().leader("n1", 10).with_role("n1", "promoted", 11),
            Why::NotWritable {
                leader: name("n1"),
                role: Role::Promoted,
                state: PgState::Running,
                from_before: false,
            },
        ),
        (
            Cluster::new().leader("n1", 10).primary("n1", 9),
            Why::NotWritable {
                leader: name("n1"),
                role: Role::Primary,
                state: PgState::Running,
                from_before: true,
            },
        ),
    ];
    for (cluster, why) in cases {
        assert_eq!(write(&cluster), Decision::Hold(why));
    }
}

#[test]
fn a_standby_cluster_refuses_writers_at_once() {
    let cluster = Cluster::new().leader("n1", 10).with_role("n1", "standby_leader", 11);
    assert_eq!(
        write(&cluster),
        Decision::Refuse(Why::StandbyCluster { leader: name("n1") })
    );
    let being_promoted = Cluster::new().leader("n1", 10).with_role("n1", "standby_leader", 9);
    assert!(matches!(
        write(&being_promoted),
        Decision::Hold(Why::NotWritable { .. })
    ));
}

#[test]
fn a_lapsed_warrant_closes_the_route_and_patience_ends() {
    let cluster = Cluster::new().leader("n1", 10).primary("n1", 11);
    let late = ASKED + Duration::from_secs(29);
    let age = Duration::from_secs(29);
    let patient = policy(ListenerRole::Write);
    assert_eq!(
        decide(patient, &cluster, late),
        Decision::Hold(Why::WarrantLapsed { age })
    );
    let impatient = Policy {
        hold_until: late,
        ..patient
    };
    assert_eq!(
        decide(impatient, &cluster, late),
        Decision::Refuse(Why::WarrantLapsed { age })
    );
}

#[test]
fn readers_go_to_replicas_and_to_the_leader_only_as_a_last_resort() {
    let read = policy(ListenerRole::Read);
    let fallback = Policy {
        fallback_to_leader: true,
        ..read
    };
    let now = ASKED + Duration::from_secs(1);
    let with_replica = Cluster::new().leader("n1", 10).primary("n1", 11).replica("n2");
    assert_eq!(
        target(decide(fallback, &with_replica, now)),
        Some(("n2".to_owned(), None))
    );
    let alone = Cluster::new().leader("n1", 10).primary("n1", 11);
    assert!(matches!(
        decide(read, &alone, now),
        Decision::Hold(Why::NoReplica { .. })
    ));
    // A session with the leader rests on its epoch, whichever port it came by.
    assert_eq!(target(decide(fallback, &alone, now)), Some(("n1".to_owned(), Some(10))));
    let late = ASKED + Duration::from_secs(29);
    assert!(matches!(
        decide(fallback, &alone, late),
        Decision::Hold(Why::NoReplica { .. })
    ));
}

#[test]
fn readers_go_to_a_standby_that_does_not_stream_only_while_there_is_nobody_to_stream_from() {
    let archive = r#""replication_state":"in archive recovery""#;
    let stranded = Cluster::new().member("n2", "replica", "running", archive);
    let led = || stranded.clone().leader("n1", 10).primary("n1", 11);
    let to = |member: &str, epoch: Option<i64>| Some((member.to_owned(), epoch));
    let n1 = [name("n1")];
    let cases = [
        (stranded.clone(), false, &[][..], to("n2", None)),
        (led(), false, &[], None),
        (led(), true, &[], to("n1", Some(10))),
        // The leader has been tried and did not answer.
        (led(), false, &n1, to("n2", None)),
        (led(), true, &n1, to("n2", None)),
        // One that streams is the first choice, with a leader or without.
        (led().replica("n3"), true, &[], to("n3", None)),
        (stranded.clone().replica("n3"), false, &[], to("n3", None)),
        (stranded.replica("n3"), false, &[name("n3")], to("n2", None)),
    ];
    for (cluster, fallback_to_leader, avoid, expected) in cases {
        let policy = Policy {
            fallback_to_leader,
            ..policy(ListenerRole::Read)
        };
        let view = cluster.view();
        let warrant = Warrant::new(&view, Some(ASKED));
        let evidence = Evidence {
            view: &view,
            warrant,
            now: ASKED,
        };
        let load = Load {
            open: &|_| 0,
            draws: [0, 0],
            avoid,
        };
        let decision = route(policy, evidence, load);
        if let Decision::To(chosen) = &decision {
            assert!(still_leads_to(chosen, policy, evidence, avoid));
        }
        assert_eq!(target(decision), expected, "{avoid:?}");
    }
}

#[test]
fn a_leader_is_asked_only_for_a_reader_whom_its_silence_would_help() {
    let read = policy(ListenerRole::Read);
    let led = Cluster::new().leader("n1", 10).primary("n1", 11);
    let archive = r#""replication_state":"in archive recovery""#;
    let stranded = led.clone().member("n2", "replica", "running", archive);
    let asks = |policy: Policy, cluster: &Cluster, avoid: &[MemberName]| {
        worth_asking(policy, &cluster.view(), avoid).map(|leader| leader.name.to_string())
    };
    assert_eq!(asks(read, &stranded, &[]), Some("n1".to_owned()));
    assert_eq!(asks(read, &led, &[]), None);
    assert_eq!(asks(read, &stranded, &[name("n1")]), None);
    assert_eq!(asks(read, &stranded, &[name("n2")]), None);
    assert_eq!(asks(policy(ListenerRole::Write), &stranded, &[]), None);
    assert_eq!(asks(read, &Cluster::new().replica("n2"), &[]), None);
}

#[test]
fn a_session_lives_as_long_as_its_epoch_and_the_warrant() {
    let epoch = |revision| Epoch {
        holder: name("n1"),
        create_revision: revision,
    };
    let judge = |cluster: &Cluster, now: Boottime| {
        let view = cluster.view();
        let warrant = Warrant::new(&view, Some(ASKED));
        let footing = Footing {
            member: name("n1"),
            epoch: Some(epoch(10)),
            may_be_led: false,
        };
        may_go_on(
            &footing,
            Evidence {
                view: &view,
                warrant,
                now,
            },
        )
    };
    let same = Cluster::new().leader("n1", 10);
    assert_eq!(judge(&same, ASKED), Ok(Some(epoch(10))));
    assert_eq!(
        judge(&same, ASKED + Duration::from_secs(60)),
        Err(Outlived::WarrantLapsed)
    );
    let again = Cluster::new().leader("n1", 20);
    assert_eq!(judge(&again, ASKED), Err(Outlived::EpochOver { now: Some(epoch(20)) }));
    assert_eq!(judge(&Cluster::new(), ASKED), Err(Outlived::EpochOver { now: None }));
}

#[test]
fn a_session_with_a_replica_needs_a_warrant_from_its_promotion_on_or_ends() {
    let judge = |leader: Option<&str>, may_be_led: bool, now: Boottime| {
        let cluster = leader.map_or_else(Cluster::new, |leader| Cluster::new().leader(leader, 10));
        let view = cluster.view();
        let warrant = Warrant::new(&view, Some(ASKED));
        let footing = Footing {
            member: name("n2"),
            epoch: None,
            may_be_led,
        };
        let evidence = Evidence {
            view: &view,
            warrant,
            now,
        };
        may_go_on(&footing, evidence)
    };
    let late = ASKED + Duration::from_secs(60);
    let epoch = Epoch {
        holder: name("n2"),
        create_revision: 10,
    };
    for may_be_led in [false, true] {
        assert_eq!(judge(None, may_be_led, late), Ok(None));
        assert_eq!(judge(Some("n1"), may_be_led, late), Ok(None));
    }
    let promoted = Outlived::Promoted { member: name("n2") };
    assert_eq!(judge(Some("n2"), false, ASKED), Err(promoted));
    assert_eq!(judge(Some("n2"), true, ASKED), Ok(Some(epoch)));
    assert_eq!(judge(Some("n2"), true, late), Err(Outlived::WarrantLapsed));
}

proptest! {
    /// The rule, told without the implementation's words: whoever gets a writer holds the key, has said that it is a
    /// running primary since it got the key, and was confirmed less than a ttl ago.
    #[test]
    fn no_write_is_routed_without_a_warrant(
        leader in proptest::option::of((0_usize..3, 1_i64..20)),
        records in proptest::collection::vec((0_usize..3, 0_usize..4, 1_i64..20), 0..4),
        confirmed in proptest::option::of(0_u64..60),
        read: bool,
        draws: [u64; 2],
    ) {
        let roles = ["primary", "promoted", "replica", "standby_leader"];
        let mut cluster = Cluster::new();
        if let Some((holder, revision)) = leader {
            cluster = cluster.leader(&format!("n{holder}"), revision);
        }
        for (member, role, revision) in &records {
            cluster = cluster.with_role(&format!("n{member}"), roles[*role], *revision);
        }
        let view = cluster.view();
        let now = Boottime::from_nanos(1000 * SECOND);
        let as_of = confirmed.map(|age| now - Duration::from_secs(age));
        let role = if read { ListenerRole::Read } else { ListenerRole::Write };
        let policy = Policy { fallback_to_leader: read, ..policy(role) };
        let evidence = Evidence { view: &view, warrant: Warrant::new(&view, as_of), now };
        let load = Load { open: &|_| 0, draws, avoid: &[] };
        if let Decision::To(target) = route(policy, evidence, load) {
            let holds_the_key = leader.is_some_and(|(holder, _)| target.member.as_str() == format!("n{holder}"));
            prop_assert_eq!(target.epoch.is_some(), holds_the_key);
            if !read {
                let (_, created) = leader.expect("a writer has a target");
                prop_assert!(holds_the_key);
                prop_assert!(confirmed.is_some_and(|age| age < 5));
                let member = &view.members[&target.member];
                prop_assert!(member.mod_revision > created && member.record.role == Role::Primary);
            }
        }
    }
}
