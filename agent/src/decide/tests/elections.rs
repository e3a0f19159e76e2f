//! Who bids, who waits for whom.

use super::*;
use crate::sync::SyncSettings;

#[test]
fn an_election_asks_the_others_and_goes_to_the_one_that_is_furthest() {
    let free = seen(LeaseSeen::Free);
    assert_eq!(
        step(
            &free,
            &Memory {
                free_since: Some(NOW),
                ..Memory::default()
            }
        ),
        Some(Step::Poll)
    );
    let bid = Some(Step::Bid(guards(&free.view)));
    assert_eq!(
        step(&free, &polled(vec![peer("n2", Some(99)), peer("n3", Some(100))])),
        bid
    );
    assert_eq!(step(&free, &polled(vec![])), bid, "silent members do not matter");
    assert_eq!(
        step(&free, &polled(vec![peer("n2", None)])),
        bid,
        "nor does one whose PostgreSQL is down"
    );
    let ahead = polled(vec![peer("n2", Some(140))]);
    assert_eq!(
        reason(&free, &ahead),
        Reason::Behind {
            of: name("n2"),
            bytes: 40
        }
    );
    let excluded = polled(vec![Peer {
        nofailover: true,
        ..peer("n2", Some(140))
    }]);
    assert_eq!(step(&free, &excluded), bid);
    let alive = polled(vec![Peer {
        primary: true,
        ..peer("n2", Some(1))
    }]);
    assert_eq!(reason(&free, &alive), Reason::PrimaryAlive(name("n2")));
    let ranked = polled(vec![Peer {
        failover_priority: 2,
        ..peer("n2", Some(100))
    }]);
    assert_eq!(reason(&free, &ranked), Reason::Outranked(name("n2")));
}

#[test]
fn at_the_start_of_a_whole_cluster_who_comes_up_is_waited_for_as_long_as_a_lease() {
    let free = seen(LeaseSeen::Free);
    let starting = Memory {
        last_leader: None,
        ..polled(vec![peer("n2", None)])
    };
    assert_eq!(reason(&free, &starting), Reason::ComingUp(name("n2")));
    let long_ago = NOW - free.view.timing().ttl() - Duration::from_secs(1);
    let patient = Memory {
        free_since: Some(long_ago),
        ..starting
    };
    assert_eq!(step(&free, &patient), Some(Step::Bid(guards(&free.view))));
}

#[test]
fn a_poll_from_before_the_vacancy_or_too_old_is_asked_again() {
    let free = seen(LeaseSeen::Free);
    let mut old = polled(vec![]);
    if let Some(poll) = &mut old.poll {
        poll.answered_at = NOW - Duration::from_millis(1100);
    }
    old.free_since = Some(NOW - Duration::from_secs(5));
    assert_eq!(step(&free, &old), Some(Step::Poll));
    let mut before = polled(vec![]);
    before.free_since = Some(NOW + Duration::from_millis(1));
    assert_eq!(step(&free, &before), Some(Step::Poll));
}

#[test]
fn who_lags_too_far_or_may_not_lead_does_not_bid() {
    let far = with_view(seen(LeaseSeen::Free), |view| {
        view.status = Status {
            optime: Some(Lsn(100 + 1_048_577)),
            ..Status::default()
        };
    });
    assert_eq!(
        reason(&far, &polled(vec![])),
        Reason::LagTooGreat {
            bytes: 1_048_577,
            bytes_max: 1_048_576
        }
    );
    let excluded = Observation {
        nofailover: true,
        ..seen(LeaseSeen::Free)
    };
    assert_eq!(reason(&excluded, &polled(vec![])), Reason::MayNotLead);
}

#[test]
fn a_switchovers_candidate_bids_at_once_and_the_others_wait_for_it() {
    let asked = |member| {
        with_view(seen(LeaseSeen::Free), |view| {
            view.failover = request(Some("n2"), Some(member))
        })
    };
    let memory = Memory {
        free_since: Some(NOW),
        ..Memory::default()
    };
    let candidate = asked("n1");
    assert_eq!(step(&candidate, &memory), Some(Step::Bid(guards(&candidate.view))));
    let other = asked("n3");
    assert_eq!(
        reason(&other, &polled(vec![peer("n3", Some(90))])),
        Reason::LeavesItTo(name("n3"))
    );
    assert_eq!(
        reason(&other, &polled(vec![peer("n3", None)])),
        Reason::Bidding,
        "a candidate that cannot does not bind"
    );
    let mut late = polled(vec![peer("n3", Some(90))]);
    late.free_since = Some(NOW - Duration::from_secs(31));
    assert_eq!(reason(&other, &late), Reason::Bidding, "nor one that does not come");
}

#[test]
fn the_leader_that_handed_over_comes_last() {
    let former = with_view(seen(LeaseSeen::Free), |view| view.failover = request(Some("n1"), None));
    assert_eq!(
        reason(&former, &polled(vec![peer("n2", Some(90))])),
        Reason::FormerLeaderWaits
    );
    assert_eq!(reason(&former, &polled(vec![])), Reason::Bidding);
}

#[test]
fn a_later_timeline_goes_before_a_longer_log() {
    let free = seen(LeaseSeen::Free);
    let on = |timeline, position| Peer {
        timeline: Some(Timeline(timeline)),
        ..peer("n2", Some(position))
    };
    assert_eq!(
        reason(&free, &polled(vec![on(2, 90)])),
        Reason::OnLaterTimeline(name("n2")),
        "it has what was acknowledged last, though its log is shorter"
    );
    let mut later = polled(vec![on(1, 140)]);
    if let Some(poll) = &mut later.poll {
        poll.own_timeline = Some(Timeline(2));
    }
    assert_eq!(
        reason(&free, &later),
        Reason::Bidding,
        "what is longer on an old timeline is not ahead"
    );
}

#[test]
fn a_member_on_an_old_timeline_leads_only_when_nobody_better_comes() {
    let old = with_view(seen(LeaseSeen::Free), |view| {
        view.history = Some(pgherd_cluster::record::History::parse(r#"[[1,90,"x"]]"#));
    });
    assert_eq!(reason(&old, &polled(vec![])), Reason::OldTimeline);
    let mut patient = polled(vec![]);
    patient.free_since = Some(NOW - Duration::from_secs(31));
    assert_eq!(reason(&old, &patient), Reason::Bidding);
}

#[test]
fn nobody_bids_against_what_this_version_does_not_maintain() {
    let refused = |change: fn(&mut View)| reason(&with_view(seen(LeaseSeen::Free), change), &polled(vec![]));
    let failsafe = refused(|view| {
        view.config.value = Some(DynamicConfig::parse(r#"{"failsafe_mode":true}"#));
        view.failsafe = ["n2", "n3"].map(|name| (name.to_owned(), String::new())).into();
    });
    assert_eq!(failsafe, Reason::NotInFailsafe);
}

/// n1 while nobody leads, in this mode, with this record and these answers.
fn synchronous(mode: &str, record: &str, peers: Vec<Peer>) -> Reason {
    let config = DynamicConfig::parse(&format!(r#"{{"synchronous_mode":{mode}}}"#));
    let mut seen = with_view(seen(LeaseSeen::Free), |view| {
        view.sync.value = serde_json::from_str(record).expect("JSON");
        view.config.value = Some(config.clone());
    });
    seen.sync.settings = SyncSettings::of(&config);
    reason(&seen, &polled(peers))
}

#[test]
fn in_synchronous_mode_only_the_listed_and_the_former_leader_bid() {
    let listed = |names: &str| {
        synchronous(
            "true",
            &format!(r#"{{"leader":"n2","quorum":0,"sync_standby":"{names}"}}"#),
            vec![],
        )
    };
    assert_eq!(listed("n3"), Reason::NotSynchronous);
    assert_eq!(listed("N1"), Reason::Bidding);
    let former = synchronous("true", r#"{"leader":"n1","quorum":0,"sync_standby":"n3"}"#, vec![]);
    assert_eq!(former, Reason::Bidding);
    let not_begun = synchronous("true", r#"{"leader":null}"#, vec![]);
    assert_eq!(not_begun, Reason::Bidding);
}

#[test]
fn in_quorum_mode_a_candidate_needs_votes() {
    let record = r#"{"leader":"n2","quorum":1,"sync_standby":"n1,n3"}"#;
    let few = Reason::TooFewVotes { votes: 0, needed: 1 };
    assert_eq!(synchronous("\"quorum\"", record, vec![]), few);
    assert_eq!(
        synchronous("\"quorum\"", record, vec![peer("n3", Some(100))]),
        Reason::Bidding
    );
    let ahead = synchronous("\"quorum\"", record, vec![peer("n3", Some(101))]);
    assert!(matches!(ahead, Reason::Behind { .. }), "{ahead:?}");
    assert_eq!(
        synchronous("false", record, vec![]),
        Reason::Bidding,
        "the mode was turned off"
    );
}

#[test]
fn what_holds_a_bid_back_is_said() {
    let with = |change: fn(&mut Observation)| {
        let mut seen = seen(LeaseSeen::Free);
        change(&mut seen);
        reason(&seen, &polled(vec![]))
    };
    assert_eq!(with(|_| {}), Reason::Bidding);
    assert_eq!(
        with(|seen| seen.watchdog = WatchdogSeen::Unusable),
        Reason::WatchdogUnusable
    );
    assert_eq!(
        with(|seen| seen.vouched_for = Some(name("n2"))),
        Reason::VouchedFor(name("n2"))
    );
}

#[test]
fn after_a_pause_the_last_leader_has_one_ttl_unless_it_stopped() {
    let memory = Memory {
        resumed_at: Some(NOW),
        ..polled(vec![])
    };
    let free = seen(LeaseSeen::Free);
    assert_eq!(reason(&free, &memory), Reason::JustResumed(Some(name("n2"))));
    let stopped = with_view(free, |view| {
        let leader = view.members.get_mut(&name("n2")).expect("n2 is a member");
        leader.record.state = PgState::Stopped;
    });
    assert_eq!(reason(&stopped, &memory), Reason::Bidding);
}

#[test]
fn after_a_pause_a_leader_that_nobody_here_has_seen_has_one_ttl_too() {
    let memory = Memory {
        last_leader: None,
        resumed_at: Some(NOW),
        ..polled(vec![])
    };
    assert_eq!(reason(&seen(LeaseSeen::Free), &memory), Reason::JustResumed(None));
    let own = Memory {
        last_leader: Some(name("n1")),
        ..memory
    };
    assert_eq!(
        reason(&seen(LeaseSeen::Free), &own),
        Reason::Bidding,
        "it is this member itself"
    );
}

#[test]
fn a_vouch_for_a_holding_that_ended_in_order_is_not_waited_for() {
    let memory = Memory {
        began_at: Some(NOW),
        last_epoch: Some(epoch("n2")),
        ..polled(vec![])
    };
    let just_begun = Observation {
        last_held: None,
        ..seen(LeaseSeen::Free)
    };
    let free = with_view(just_begun, |view| {
        let config = json!({"failsafe_mode": true}).as_object().cloned().unwrap_or_default();
        view.config.value = Some(DynamicConfig::new(config));
        view.failsafe = ["n1", "n2", "n3"].map(|name| (name.to_owned(), String::new())).into();
    });
    let says = |role, state, mod_revision| {
        with_view(free.clone(), |view| {
            let leader = view.members.get_mut(&name("n2")).expect("n2 is a member");
            (leader.record.role, leader.record.state) = (role, state);
            leader.mod_revision = mod_revision;
        })
    };
    let held = epoch("n2").create_revision;
    for (said, expected) in [
        (says(Role::Primary, PgState::Running, held + 1), Reason::MayHaveVouched),
        (says(Role::Demoted, PgState::Running, held + 1), Reason::MayHaveVouched),
        (says(Role::Demoted, PgState::Crashed, held + 1), Reason::MayHaveVouched),
        (says(Role::Demoted, PgState::Stopped, held + 1), Reason::Bidding),
        (says(Role::Replica, PgState::Running, held + 1), Reason::Bidding),
        // It said so before it led.
        (says(Role::Replica, PgState::Running, held - 1), Reason::MayHaveVouched),
        (says(Role::Replica, PgState::Stopped, held - 1), Reason::MayHaveVouched),
    ] {
        assert_eq!(reason(&said, &memory), expected);
    }
    let gone = with_view(free, |view| {
        view.members.remove(&name("n2"));
    });
    assert_eq!(reason(&gone, &memory), Reason::MayHaveVouched);
}

#[test]
fn a_member_without_a_key_is_waited_for_only_so_long() {
    let alone = with_view(seen(LeaseSeen::Free), |view| {
        view.members.retain(|name, _| name.as_str() == "n1");
    });
    let ahead = polled(vec![peer("n2", Some(140))]);
    assert!(matches!(reason(&alone, &ahead), Reason::Behind { .. }));
    let later = NOW + alone.view.timing().ttl() + Duration::from_secs(1);
    let mut memory = polled(vec![peer("n2", Some(140))]);
    memory.poll = memory.poll.map(|poll| Poll {
        asked_at: later,
        answered_at: later,
        ..poll
    });
    assert_eq!(decide(&alone, &memory, later).reason, Reason::Bidding);
    let mut alive = memory.clone();
    let primary = Peer {
        primary: true,
        ..peer("n2", Some(40))
    };
    alive.poll = alive.poll.map(|poll| Poll {
        peers: vec![primary],
        ..poll
    });
    assert_eq!(decide(&alone, &alive, later).reason, Reason::PrimaryAlive(name("n2")));
    let with_key = seen(LeaseSeen::Free);
    assert!(matches!(
        decide(&with_key, &memory, later).reason,
        Reason::Behind { .. }
    ));
}

#[test]
fn an_operators_failover_overrules_the_synchronous_set_and_a_switchover_does_not() {
    for (leader, expected) in [(None, Reason::Bidding), (Some("n2"), Reason::NotSynchronous)] {
        let mut seen = with_view(seen(LeaseSeen::Free), |view| {
            view.sync.value = serde_json::from_str(r#"{"leader":"n2","quorum":0,"sync_standby":"n3"}"#).expect("JSON");
            view.failover = request(leader, Some("n1"));
        });
        seen.sync.settings = SyncSettings::of(&DynamicConfig::parse(r#"{"synchronous_mode":true}"#));
        assert_eq!(reason(&seen, &polled(vec![])), expected);
        let left_out = with_view(seen, |view| {
            view.failsafe = [("n2".to_owned(), String::new())].into();
            view.config.value = Some(DynamicConfig::parse(r#"{"failsafe_mode":true}"#));
        });
        assert_eq!(reason(&left_out, &polled(vec![])), Reason::NotInFailsafe);
    }
}

#[test]
fn at_the_start_of_a_whole_cluster_the_last_leaders_log_is_waited_for() {
    let behind = with_view(seen(LeaseSeen::Free), |view| view.status.optime = Some(Lsn(150)));
    assert_eq!(
        reason(&behind, &polled(vec![])),
        Reason::Bidding,
        "the leader is gone, and has been asked for"
    );
    let starting = Memory {
        last_leader: None,
        ..polled(vec![])
    };
    assert_eq!(reason(&behind, &starting), Reason::WaitingForLastLeader { bytes: 50 });
}
