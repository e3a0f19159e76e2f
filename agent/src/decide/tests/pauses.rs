//! Maintenance.

use super::*;

/// In a paused cluster, with the fence paused as it should be.
fn paused(seen: Observation) -> Observation {
    let paused = with_view(seen, |view| {
        let config = json!({"pause": true}).as_object().cloned().unwrap_or_default();
        view.config.value = Some(DynamicConfig::new(config));
    });
    Observation {
        fence_paused: true,
        lease_paused: Some(true),
        ..paused
    }
}

#[test]
fn the_fence_is_paused_with_the_cluster_and_resumed_with_it() {
    let memory = Memory::default();
    let begins = Observation {
        fence_paused: false,
        lease_paused: Some(false),
        ..paused(seen(LeaseSeen::Theirs(epoch("n2"))))
    };
    assert_eq!(step(&begins, &memory), Some(Step::PauseFence));
    let unsure = Observation {
        lease: LeaseSeen::Unknown,
        ..begins
    };
    assert_eq!(step(&unsure, &memory), None, "the configuration may be old");
    let ends = Observation {
        fence_paused: true,
        lease_paused: Some(true),
        ..seen(LeaseSeen::Theirs(epoch("n2")))
    };
    assert_eq!(step(&ends, &memory), Some(Step::ResumeFence));
    let primary = Observation {
        fence_paused: true,
        postgres: primary(),
        ..seen(LeaseSeen::Mine(epoch("n1")))
    };
    let proven = Memory {
        proven: Some(epoch("n1")),
        ..Memory::default()
    };
    assert_eq!(step(&primary, &proven), None, "its next deadline ends the pause");
}

#[test]
fn a_primary_without_the_lease_runs_on_and_takes_a_free_key() {
    let runs = |lease| {
        paused(Observation {
            postgres: primary(),
            ..seen(lease)
        })
    };
    let memory = Memory::default();
    assert_eq!(step(&runs(LeaseSeen::Theirs(epoch("n2"))), &memory), None);
    assert_eq!(step(&runs(LeaseSeen::Unknown), &memory), None);
    assert!(matches!(step(&runs(LeaseSeen::Free), &memory), Some(Step::Bid(_))));
    let stale = LeaseSeen::Stale {
        epoch: epoch("n1"),
        lease: 5,
    };
    let rebind = Step::Rebind {
        epoch: epoch("n1"),
        lease: 5,
    };
    assert_eq!(step(&runs(stale), &memory), Some(rebind));
}

#[test]
fn a_stop_in_pause_leaves_postgres_and_the_key_alone() {
    for lease in [LeaseSeen::Mine(epoch("n1")), LeaseSeen::Theirs(epoch("n2"))] {
        let stopping = paused(Observation {
            stopping: true,
            postgres: primary(),
            ..seen(lease)
        });
        let leave = Step::Leave {
            code: 0,
            keep_postgres: true,
        };
        assert_eq!(step(&stopping, &Memory::default()), Some(leave));
    }
}

#[test]
fn a_postgres_that_somebody_else_started_is_taken_over_first() {
    let stranger = Observation {
        stranger: true,
        postgres: Postgres::Down,
        ..seen(LeaseSeen::Unknown)
    };
    assert_eq!(step(&stranger, &Memory::default()), Some(Step::Adopt));
}

#[test]
fn in_pause_nothing_is_started_promoted_or_elected_unasked() {
    let memory = polled(vec![]);
    assert_eq!(step(&paused(seen(LeaseSeen::Free)), &memory), None);
    let down = |lease| Observation {
        postgres: Postgres::Down,
        ..seen(lease)
    };
    assert_eq!(step(&paused(down(LeaseSeen::Free)), &memory), None);
    assert_eq!(step(&paused(down(LeaseSeen::Theirs(epoch("n2")))), &memory), None);
    let dead_leader = paused(down(LeaseSeen::Mine(epoch("n1"))));
    assert_eq!(step(&dead_leader, &memory), Some(Step::Release { epoch: epoch("n1") }));

    // It follows a new leader, and is not cloned for it.
    let elsewhere = Observation {
        upstream: None,
        ..seen(LeaseSeen::Theirs(epoch("n2")))
    };
    assert!(matches!(step(&paused(elsewhere), &memory), Some(Step::Follow { .. })));
    let Postgres::Running(mut server) = standby_at(100) else {
        panic!("it runs")
    };
    server.replication_state = None;
    let idle = Observation {
        postgres: Postgres::Running(server),
        ..seen(LeaseSeen::Theirs(epoch("n2")))
    };
    let diverged = Memory {
        rejoin: Some((epoch("n2"), Rejoin::Diverged)),
        ..Memory::default()
    };
    assert_eq!(step(&paused(idle), &diverged), None);

    // What an operator asks for by name is carried out to its end.
    let asked = with_view(paused(seen(LeaseSeen::Free)), |view| {
        view.failover = request(Some("n2"), Some("n1"));
    });
    assert!(matches!(step(&asked, &memory), Some(Step::Bid(_))));
    let won = paused(seen(LeaseSeen::Mine(epoch("n1"))));
    assert_eq!(step(&won, &memory), Some(Step::Promote(epoch("n1"))));
    let handed_over = Memory {
        handed_over: true,
        ..Memory::default()
    };
    let former = paused(down(LeaseSeen::Theirs(epoch("n2"))));
    assert!(matches!(step(&former, &handed_over), Some(Step::StartStandby { .. })));
}
