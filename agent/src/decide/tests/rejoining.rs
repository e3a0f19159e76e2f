//! Whose data a member has, whom it may follow, and when it is cloned.

use super::*;

#[test]
fn a_former_leader_asks_before_it_joins_another() {
    let down = Observation {
        postgres: Postgres::Down,
        data: data(ControlState::ShutDown, false),
        ..seen(LeaseSeen::Theirs(epoch("n2")))
    };
    assert_eq!(
        step(&down, &Memory::default()),
        Some(Step::CheckRejoin { leader: epoch("n2") })
    );
    let answered = |verdict| Memory {
        rejoin: Some((epoch("n2"), verdict)),
        ..Memory::default()
    };
    assert_eq!(
        step(&down, &answered(Rejoin::Follows)),
        Some(Step::StartStandby {
            upstream: Some(name("n2"))
        })
    );
    assert_eq!(
        step(&down, &answered(Rejoin::Diverged)),
        Some(Step::Clone { from: name("n2") })
    );
    let about_another = Memory {
        rejoin: Some((epoch("n3"), Rejoin::Diverged)),
        ..Memory::default()
    };
    assert_eq!(
        step(&down, &about_another),
        Some(Step::CheckRejoin { leader: epoch("n2") })
    );
}

#[test]
fn data_that_diverged_is_rewound_once_after_the_leaders_first_checkpoint_and_then_copied() {
    let diverged = |memory: Memory| Memory {
        rejoin: Some((epoch("n2"), Rejoin::Diverged)),
        ..memory
    };
    let down = Observation {
        postgres: Postgres::Down,
        data: data(ControlState::InProduction, false),
        rewinds: true,
        ..seen(LeaseSeen::Theirs(epoch("n2")))
    };
    let wal = WalStatus::Standby {
        received: Lsn(100),
        replayed: Lsn(100),
        replayed_at: None,
        paused: false,
        latest_end: None,
    };
    let standby = Observation {
        postgres: server(wal, None),
        rewinds: true,
        ..seen(LeaseSeen::Theirs(epoch("n2")))
    };
    for seen in [down, standby] {
        let rewind = Some(Step::Rewind { leader: epoch("n2") });
        assert_eq!(step(&seen, &diverged(Memory::default())), rewind);
        let clone = Some(Step::Clone { from: name("n2") });
        let rewound = |under| {
            diverged(Memory {
                rewound_under: Some(epoch(under)),
                ..Memory::default()
            })
        };
        assert_eq!(step(&seen, &rewound("n2")), clone);
        assert_eq!(step(&seen, &rewound("n3")), rewind, "that was another leader");
        let young = with_view(seen.clone(), |view| {
            if let Some(member) = view.members.get_mut(&name("n2")) {
                member.record.checkpoint_after_promote = Some(false);
            }
        });
        assert_eq!(
            reason(&young, &diverged(Memory::default())),
            Reason::WaitingForCheckpoint(name("n2"))
        );
        let unwanted = Observation { rewinds: false, ..seen };
        assert_eq!(step(&unwanted, &diverged(Memory::default())), clone);
    }
}

#[test]
fn nothing_is_cloned_from_a_leader_that_does_not_take_writes() {
    let promoting = |seen: Observation| {
        with_view(seen, |view| {
            if let Some(member) = view.members.get_mut(&name("n2")) {
                member.record.role = Role::Promoted;
            }
        })
    };
    let theirs = || seen(LeaseSeen::Theirs(epoch("n2")));
    let empty = promoting(Observation {
        data: DataDir::Empty,
        postgres: Postgres::Down,
        ..theirs()
    });
    assert_eq!(step(&empty, &Memory::default()), None);
    let diverged = Memory {
        rejoin: Some((epoch("n2"), Rejoin::Diverged)),
        ..Memory::default()
    };
    let down = Observation {
        postgres: Postgres::Down,
        data: data(ControlState::InProduction, false),
        ..theirs()
    };
    assert_eq!(step(&promoting(down), &diverged), None);
}

#[test]
fn another_clusters_data_ends_the_process_and_touches_nothing() {
    let mut foreign = Observation {
        postgres: Postgres::Down,
        ..seen(LeaseSeen::Free)
    };
    foreign.view = Arc::new(View {
        initialize: Some(Initialize::Done(SystemId(8))),
        ..view(None)
    });
    assert_eq!(
        step(&foreign, &Memory::default()),
        Some(Step::Leave {
            code: 64,
            keep_postgres: false
        })
    );
    let Reason::Fatal(why) = reason(&foreign, &Memory::default()) else {
        panic!("it is fatal")
    };
    assert!(
        why.contains("/data ") && why.contains(" 7,") && why.contains(" 8;"),
        "{why}"
    );
}

#[test]
fn an_empty_member_makes_the_cluster_only_when_nobody_has() {
    let empty = |initialize| {
        let seen = Observation {
            data: DataDir::Empty,
            postgres: Postgres::Down,
            ..seen(LeaseSeen::Free)
        };
        with_view(seen, |view| view.initialize = initialize)
    };
    assert_eq!(step(&empty(None), &Memory::default()), Some(Step::ClaimBootstrap));
    let looked = Memory {
        withdrawn: true,
        ..Memory::default()
    };
    assert_eq!(step(&empty(Some(Initialize::Pending)), &looked), None);
    assert_eq!(step(&empty(Some(Initialize::Done(SystemId(7)))), &looked), None);
    let files = DataDir::Foreign(vec!["photo.jpg".to_owned()]);
    let foreign = Observation {
        data: files.clone(),
        ..empty(None)
    };
    assert_eq!(
        reason(&foreign, &Memory::default()),
        Reason::ForeignFiles(vec!["photo.jpg".to_owned()])
    );
    assert_eq!(step(&foreign, &Memory::default()), None);
}

#[test]
fn a_standby_follows_the_leader_and_is_cloned_only_when_it_cannot() {
    let theirs = || seen(LeaseSeen::Theirs(epoch("n2")));
    let memory = Memory::default();
    assert_eq!(reason(&theirs(), &memory), Reason::Following(name("n2")));
    let elsewhere = Observation {
        upstream: None,
        ..theirs()
    };
    assert_eq!(
        step(&elsewhere, &memory),
        Some(Step::Follow {
            upstream: Some(name("n2"))
        })
    );
    let Postgres::Running(mut server) = standby_at(100) else {
        panic!("it runs")
    };
    server.replication_state = None;
    let idle = Observation {
        postgres: Postgres::Running(server),
        ..theirs()
    };
    assert_eq!(step(&idle, &memory), Some(Step::CheckRejoin { leader: epoch("n2") }));
    let answered = |verdict| Memory {
        rejoin: Some((epoch("n2"), verdict)),
        ..Memory::default()
    };
    let lately = |seconds| Memory {
        rejoin_asked_at: Some(NOW - Duration::from_secs(seconds)),
        ..answered(Rejoin::Follows)
    };
    assert_eq!(step(&idle, &lately(1)), None);
    let again = Some(Step::CheckRejoin { leader: epoch("n2") });
    assert_eq!(step(&idle, &lately(6)), again, "it should stream by now");
    assert_eq!(
        step(&idle, &answered(Rejoin::Diverged)),
        Some(Step::Clone { from: name("n2") })
    );
    let backing_off = Memory {
        backoff_until: Some(NOW + Duration::from_secs(1)),
        ..answered(Rejoin::Diverged)
    };
    assert_eq!(step(&idle, &backing_off), None);
}
