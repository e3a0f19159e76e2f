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
fn a_session_lives_as_long_as_its_epoch_and_the_warrant() {
    let epoch = |revision| Epoch {
        holder: name("n1"),
        create_revision: revision,
    };
    let judge = |cluster: &Cluster, now: Boottime| {
        let view = cluster.view();
        let warrant = Warrant::new(&view, Some(ASKED));
        may_go_on(
            &epoch(10),
            Evidence {
                view: &view,
                warrant,
                now,
            },
        )
    };
    let same = Cluster::new().leader("n1", 10);
    assert_eq!(judge(&same, ASKED), Ok(()));
    assert_eq!(
        judge(&same, ASKED + Duration::from_secs(60)),
        Err(Outlived::WarrantLapsed)
    );
    let again = Cluster::new().leader("n1", 20);
    assert_eq!(judge(&again, ASKED), Err(Outlived::EpochOver { now: Some(epoch(20)) }));
    assert_eq!(judge(&Cluster::new(), ASKED), Err(Outlived::EpochOver { now: None }));
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
                prop_assert!(confirmed.is_some_and(|age| age < 30));
                let member = &view.members[&target.member];
                prop_assert!(member.mod_revision > created && member.record.role == Role::Primary);
            }
        }
    }
}
