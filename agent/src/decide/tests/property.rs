//! What no decision does, whatever is seen.

use proptest::prelude::*;

use super::*;

fn any_lease() -> impl Strategy<Value = LeaseSeen> {
    prop_oneof![
        Just(LeaseSeen::Mine(epoch("n1"))),
        Just(LeaseSeen::MineUnproven(epoch("n1"))),
        Just(LeaseSeen::Stale {
            epoch: epoch("n1"),
            lease: 5
        }),
        Just(LeaseSeen::Theirs(epoch("n2"))),
        Just(LeaseSeen::Free),
        Just(LeaseSeen::Unknown),
    ]
}

fn any_postgres() -> impl Strategy<Value = Postgres> {
    prop_oneof![
        Just(Postgres::Down),
        Just(Postgres::Ending),
        any::<bool>().prop_map(|writable| Postgres::Silent { writable }),
        Just(primary()),
        Just(standby_at(100)),
    ]
}

fn any_job() -> impl Strategy<Value = Option<JobKind>> {
    prop_oneof![4 => Just(None), 1 => Just(Some(JobKind::Promote)), 1 => Just(Some(JobKind::Clone)), 1 => Just(Some(JobKind::Poll))]
}

fn any_data() -> impl Strategy<Value = DataDir> {
    let states = prop_oneof![
        Just(ControlState::ShutDown),
        Just(ControlState::InProduction),
        Just(ControlState::InArchiveRecovery)
    ];
    prop_oneof![
        1 => Just(DataDir::Empty),
        1 => Just(DataDir::Foreign(vec!["x".to_owned()])),
        6 => (states, any::<bool>()).prop_map(|(state, standby)| data(state, standby)),
    ]
}

proptest! {
    /// Whatever is seen and remembered: PostgreSQL is made writable only under a proven lease, a primary whose lease is
    /// known to be another's is ended, and data is replaced only while another leads and takes writes.
    #[test]
    fn no_decision_breaks_the_rules(
        lease in any_lease(),
        postgres in any_postgres(),
        job in any_job(),
        data in any_data(),
        (stopping, nofailover, unfinished, failed, diverged, armed) in any::<(bool, bool, bool, bool, bool, bool)>(),
        (follows, restarts, rewinds) in any::<(bool, bool, bool)>(),
    ) {
        let base = seen(lease.clone());
        let seen = Observation { postgres: postgres.clone(), job, data: data.clone(), stopping, nofailover, bootstrap_unfinished: unfinished, armed, rewinds, ..base };
        let seen = if follows { super::standby_clusters::following(seen) } else { seen };
        let verdict = if diverged { Rejoin::Diverged } else { Rejoin::Follows };
        let memory = Memory {
            start_failures: if failed { 2 } else { 0 },
            rejoin: Some((epoch(if follows { "n1" } else { "n2" }), verdict)),
            restart: restarts.then_some(crate::memory::Restart { asked_at: NOW, stage: crate::memory::RestartStage::Stop }),
            ..polled(vec![])
        };
        let decision = decide(&seen, &memory, NOW);
        match &decision.step {
            Some(Step::StartPrimary) => {
                prop_assert!(!follows, "a standby cluster has no primary");
                prop_assert_eq!(&lease, &LeaseSeen::Mine(epoch("n1")));
                let primary_data = matches!(&data, DataDir::Cluster { control, standby: false }
                    if !matches!(control.state, ControlState::InArchiveRecovery | ControlState::ShutDownInRecovery));
                // A backup of a standby may become a cluster too.
                prop_assert!(primary_data || unfinished);
            }
            Some(Step::BeginHandover { .. }) => {
                let held = matches!(lease, LeaseSeen::Mine(_) | LeaseSeen::MineUnproven(_));
                prop_assert!(held);
            }
            Some(Step::Promote(_)) => {
                prop_assert!(!follows, "a standby cluster has no primary");
                prop_assert_eq!(&lease, &LeaseSeen::Mine(epoch("n1")));
            }
            Some(Step::Clone { .. }) => {
                prop_assert_eq!(&lease, &LeaseSeen::Theirs(epoch("n2")));
                prop_assert!(diverged || data == DataDir::Empty);
            }
            Some(Step::Rewind { .. }) => {
                prop_assert!(rewinds && diverged && !follows && lease == LeaseSeen::Theirs(epoch("n2")));
            }
            Some(Step::CloneRemote) => prop_assert!(follows && diverged && lease == LeaseSeen::Mine(epoch("n1"))),
            Some(Step::Bid(_)) => prop_assert!(lease == LeaseSeen::Free && !nofailover || unfinished),
            Some(Step::Release { .. } | Step::WinAnew { .. }) => prop_assert_eq!(&postgres, &Postgres::Down),
            Some(Step::Leave { .. }) => prop_assert_eq!(&postgres, &Postgres::Down),
            _ => {}
        }
        let lost = matches!(lease, LeaseSeen::Theirs(_) | LeaseSeen::Free | LeaseSeen::Stale { .. });
        let usable = matches!(data, DataDir::Cluster { .. });
        if lost && usable && !stopping && job.is_none() && postgres == primary() {
            // One that no deadline was given to was started by somebody else, and may be its own leader.
            match (&lease, armed) {
                (LeaseSeen::Stale { .. }, false) => {
                    let rebinds = matches!(decision.step, Some(Step::Rebind { .. }));
                    prop_assert!(rebinds, "{:?}", decision);
                }
                (LeaseSeen::Free, false) => {
                    let takes = matches!(decision.step, Some(Step::Bid(_) | Step::End));
                    prop_assert!(takes, "{:?}", decision);
                }
                _ => prop_assert_eq!(&decision.step, &Some(Step::End)),
            }
        }
    }
}
