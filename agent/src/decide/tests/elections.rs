//! Who bids, who waits for whom.

use super::*;

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
    let follows_another = refused(|view| {
        view.config.value = Some(DynamicConfig::parse(r#"{"standby_cluster":{"host":"h"}}"#));
    });
    assert_eq!(follows_another, Reason::StandbyCluster);
    let synchronous = refused(|view| {
        view.sync.value = serde_json::from_str(r#"{"leader":"n2","quorum":0,"sync_standby":"n3"}"#).expect("JSON");
    });
    assert_eq!(synchronous, Reason::NotSynchronous);
    let listed = refused(|view| {
        view.sync.value = serde_json::from_str(r#"{"leader":"n2","quorum":0,"sync_standby":"N1"}"#).expect("JSON");
    });
    assert_eq!(listed, Reason::Bidding);
    let failsafe = refused(|view| {
        view.config.value = Some(DynamicConfig::parse(r#"{"failsafe_mode":true}"#));
        view.failsafe_members = vec!["n2".to_owned(), "n3".to_owned()];
    });
    assert_eq!(failsafe, Reason::NotInFailsafe);
}

#[test]
fn a_request_by_name_does_not_promote_a_standby_cluster() {
    let asked = with_view(seen(LeaseSeen::Free), |view| {
        view.failover = request(Some("n2"), Some("n1"));
        view.config.value = Some(DynamicConfig::parse(r#"{"standby_cluster":{"host":"h"}}"#));
    });
    assert_eq!(reason(&asked, &polled(vec![])), Reason::StandbyCluster);
}
