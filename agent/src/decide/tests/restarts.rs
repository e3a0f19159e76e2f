//! Restarts and new copies as an operator asks for them, starts that take too long, and standbys that stand still.

use super::*;
use crate::jobs::Outcome;
use crate::memory::{Restart, RestartStage};
use crate::sync::SyncSettings;

const LATER: Boottime = Boottime::from_nanos(100_000_000_000 + 400_000_000_000);

fn asked() -> Memory {
    Memory {
        proven: Some(epoch("n1")),
        restart: Some(Restart {
            asked_at: NOW,
            stage: RestartStage::Checkpoint,
        }),
        ..Memory::default()
    }
}

/// Lets a job end well.
fn ended(memory: &mut Memory, kind: JobKind) {
    memory.job_ended(kind, Ok(Outcome::Done), NOW);
}

fn leads() -> Observation {
    Observation {
        postgres: primary(),
        ..seen(LeaseSeen::Mine(epoch("n1")))
    }
}

fn pause(seen: &mut Observation) {
    let config = json!({"pause": true}).as_object().cloned().unwrap_or_default();
    Arc::make_mut(&mut seen.view).config.value = Some(DynamicConfig::new(config));
    (seen.fence_paused, seen.lease_paused) = (true, Some(true));
}

#[test]
fn a_leader_is_restarted_after_a_checkpoint_and_keeps_the_key() {
    for paused in [false, true] {
        let mut memory = asked();
        let mut seen = leads();
        if paused {
            pause(&mut seen);
        }
        assert_eq!(step(&seen, &memory), Some(Step::Checkpoint { to: name("n1") }));
        ended(&mut memory, JobKind::Checkpoint);
        assert_eq!(step(&seen, &memory), Some(Step::Stop));
        ended(&mut memory, JobKind::Stop);
        seen.postgres = Postgres::Down;
        seen.data = data(ControlState::ShutDown, false);
        assert_eq!(step(&seen, &memory), Some(Step::StartPrimary));
        ended(&mut memory, JobKind::StartPrimary);
        assert_eq!(memory.restart, None);
    }
}

#[test]
fn what_commits_wait_for_comes_before_the_checkpoint_of_a_restart() {
    let mut seen = leads();
    let config = DynamicConfig::parse(r#"{"synchronous_mode":true}"#);
    seen.sync.settings = SyncSettings::of(&config);
    Arc::make_mut(&mut seen.view).config.value = Some(config);
    let first = step(&seen, &asked());
    assert!(matches!(first, Some(Step::Sync(_))), "{first:?}");
}

#[test]
fn a_replica_is_restarted_and_follows_again() {
    let mut memory = asked();
    let mut replica = seen(LeaseSeen::Theirs(epoch("n2")));
    assert_eq!(step(&replica, &memory), Some(Step::Checkpoint { to: name("n1") }));
    memory.job_ended(JobKind::Checkpoint, Err("it has failed".to_owned()), NOW);
    assert_eq!(step(&replica, &memory), Some(Step::Stop), "only the stop takes longer");
    ended(&mut memory, JobKind::Stop);
    replica.postgres = Postgres::Down;
    let upstream = Some(name("n2"));
    assert_eq!(step(&replica, &memory), Some(Step::StartStandby { upstream }));
}

#[test]
fn a_replica_that_streams_from_nobody_is_started_again_as_a_replica() {
    let mut memory = asked();
    for job in [JobKind::Checkpoint, JobKind::Stop] {
        ended(&mut memory, job);
    }
    let mut replica = seen(LeaseSeen::Theirs(epoch("n2")));
    let tags = json!({"nostream": true}).as_object().cloned().unwrap_or_default();
    let record = MemberRecord {
        tags,
        ..MemberRecord::new(String::new(), String::new())
    };
    replica.place = Place::of(&record);
    replica.postgres = Postgres::Down;
    let upstream = None;
    assert_eq!(step(&replica, &memory), Some(Step::StartStandby { upstream }));
}

#[test]
fn an_election_comes_before_a_restart() {
    let mut free = seen(LeaseSeen::Free);
    assert_eq!(step(&free, &asked()), Some(Step::Poll));
    let mut memory = asked();
    memory.note(&mut free, LATER);
    assert_eq!(memory.restart, None, "after a minute nobody expects it any more");
}

#[test]
fn the_checkpoint_before_a_restart_gives_way_to_an_election_and_the_restart_to_who_wins_it() {
    let mut memory = asked();
    let at_checkpoint = |lease| Observation {
        job: Some(JobKind::Checkpoint),
        ..seen(lease)
    };
    assert_eq!(step(&at_checkpoint(LeaseSeen::Theirs(epoch("n2"))), &memory), None);
    assert_eq!(step(&at_checkpoint(LeaseSeen::Free), &memory), Some(Step::DropJob));
    // It had ended a moment before.
    ended(&mut memory, JobKind::Checkpoint);
    for step in [Step::Bid(guards(&view(None))), Step::Promote(epoch("n1"))] {
        let mut memory = memory.clone();
        memory.stepped(&step, NOW);
        assert_eq!(memory.restart, None, "{step:?}");
    }
    ended(&mut memory, JobKind::Stop);
    memory.stepped(&Step::Bid(guards(&view(None))), NOW);
    assert!(
        memory.restart.is_some(),
        "in a pause nothing else starts what it has stopped"
    );
}

#[test]
fn a_leader_that_may_not_take_time_to_start_gives_way_to_one_that_can_lead() {
    let down = |config: &str| {
        let mut seen = seen(LeaseSeen::Mine(epoch("n1")));
        seen.postgres = Postgres::Down;
        seen.data = data(ControlState::InProduction, false);
        with_view(seen, |view| {
            view.config.value = Some(DynamicConfig::parse(config));
            view.status.optime = Some(Lsn(100));
        })
    };
    let at_once = down(r#"{"primary_start_timeout": 0}"#);
    let release = Some(Step::Release { epoch: epoch("n1") });
    assert_eq!(step(&at_once, &Memory::default()), Some(Step::Poll));
    assert_eq!(step(&at_once, &polled(vec![peer("n2", Some(100))])), release);
    for nobody in [
        vec![],
        vec![peer("n2", None)],
        vec![Peer {
            nofailover: true,
            ..peer("n2", Some(100))
        }],
        vec![Peer {
            primary: true,
            ..peer("n2", Some(100))
        }],
    ] {
        assert_eq!(step(&at_once, &polled(nobody)), Some(Step::StartPrimary));
    }
    let patient = down("{}");
    let able = polled(vec![peer("n2", Some(100))]);
    assert_eq!(step(&patient, &able), Some(Step::StartPrimary));
    let old_name = down(r#"{"master_start_timeout": 0}"#);
    assert_eq!(step(&old_name, &able), release);
}

#[test]
fn who_has_given_way_bids_last() {
    let mut memory = polled(vec![peer("n2", Some(100))]);
    assert!(matches!(step(&seen(LeaseSeen::Free), &memory), Some(Step::Bid(_))));
    memory.stepped(&Step::Release { epoch: epoch("n1") }, NOW);
    assert_eq!(step(&seen(LeaseSeen::Free), &memory), None);
    memory.poll = polled(vec![]).poll;
    assert!(matches!(step(&seen(LeaseSeen::Free), &memory), Some(Step::Bid(_))));
}

#[test]
fn a_start_that_takes_too_long_is_given_up_only_for_somebody_else() {
    let silent = Observation {
        postgres: Postgres::Silent { writable: true },
        ..seen(LeaseSeen::Mine(epoch("n1")))
    };
    let starting = |peers, since| Memory {
        starting_since: Some(since),
        ..polled(peers)
    };
    let at = |memory: &Memory, now| decide(&silent, memory, now).step;
    let able = || vec![peer("n2", Some(100))];
    assert_eq!(at(&starting(able(), NOW), NOW), None, "it has five minutes");
    let long_ago = Boottime::default();
    let fresh = |peers| {
        let mut memory = starting(peers, long_ago);
        memory.poll = memory.poll.map(|poll| Poll {
            answered_at: LATER,
            ..poll
        });
        memory
    };
    assert_eq!(at(&fresh(able()), LATER), Some(Step::End));
    assert_eq!(at(&fresh(vec![]), LATER), None, "a late start is better than none");

    // What was ended for another is not won anew.
    let mut memory = fresh(able());
    let mut seen = silent;
    memory.note(&mut seen, LATER);
    memory.stepped(&Step::End, LATER);
    let (epoch, lease) = (epoch("n1"), 5);
    seen.postgres = Postgres::Down;
    seen.data = data(ControlState::InProduction, false);
    seen.lease = LeaseSeen::Stale {
        epoch: epoch.clone(),
        lease,
    };
    assert_eq!(
        decide(&seen, &memory, LATER).step,
        Some(Step::Abandon {
            epoch: epoch.clone(),
            lease
        })
    );
    let long_after = LATER + seen.view.timing().ttl() + Duration::from_secs(1);
    assert_eq!(decide(&seen, &memory, long_after).step, Some(Step::Poll));
}

#[test]
fn a_request_whose_candidate_had_its_time_is_cleared_by_who_won_instead() {
    let seen = with_view(leads(), |view| view.failover = request(None, Some("n2")));
    let mut memory = Memory {
        proven: Some(epoch("n1")),
        ..Memory::default()
    };
    assert!(matches!(step(&seen, &memory), Some(Step::BeginHandover { .. })));
    let mut free = Observation {
        lease: LeaseSeen::Free,
        ..seen.clone()
    };
    memory.note(&mut free, NOW);
    memory.stepped(&Step::Bid(guards(&seen.view)), NOW);
    assert_eq!(step(&seen, &memory), Some(Step::ClearRequest));

    free.request_due = false;
    memory.note(&mut free, NOW);
    memory.stepped(&Step::Bid(guards(&seen.view)), NOW);
    assert!(
        matches!(step(&seen, &memory), Some(Step::BeginHandover { .. })),
        "its time had not come"
    );
}

#[test]
fn a_standby_that_fits_and_neither_streams_nor_moves_is_cloned_in_the_end() {
    let mut seen = with_view(seen(LeaseSeen::Theirs(epoch("n2"))), |view| {
        let leader = view.members.get_mut(&name("n2")).expect("n2 is a member");
        leader.record.xlog_location = Some(Lsn(200));
    });
    let set = |seen: &mut Observation, position: u64, state: Option<&str>| {
        let Postgres::Running(server) = &mut seen.postgres else {
            panic!("it runs")
        };
        server.replication_state = state.map(str::to_owned);
        if let WalStatus::Standby { received, replayed, .. } = &mut server.wal {
            (*received, *replayed) = (Lsn(position), Lsn(position));
        }
    };
    let mut memory = Memory::default();
    let mut now = NOW;
    let mut turns = |seen: &mut Observation, memory: &mut Memory, verdict| {
        for _ in 0..40 {
            now = now + Duration::from_secs(3);
            memory.note(seen, now);
            match decide(seen, memory, now).step {
                Some(check @ Step::CheckRejoin { .. }) => {
                    memory.stepped(&check, now);
                    let answer = Outcome::Rejoin(epoch("n2"), verdict);
                    memory.job_ended(JobKind::CheckRejoin, Ok(answer), now);
                }
                Some(step) => return Some(step),
                None => {}
            }
        }
        None
    };
    set(&mut seen, 100, None);
    let clone = Some(Step::Clone { from: name("n2") });
    assert_eq!(turns(&mut seen, &mut memory, Rejoin::Waits), clone);
    memory.stepped(&Step::Clone { from: name("n2") }, LATER);
    set(&mut seen, 105, None);
    let again = turns(&mut seen, &mut memory, Rejoin::Waits);
    assert_eq!(again, None, "what a clone has not cured, another does not");
    set(&mut seen, 110, None);
    memory.note(&mut seen, LATER);
    assert_eq!(memory.stands_still, Some((Lsn(110), 0)), "it replays");
    set(&mut seen, 110, Some("in archive recovery"));
    assert_eq!(
        turns(&mut seen, &mut Memory::default(), Rejoin::Waits),
        None,
        "an archive may be slow"
    );
    set(&mut seen, 110, None);
    let held_up = turns(&mut seen, &mut Memory::default(), Rejoin::Follows);
    assert_eq!(held_up, None, "it has something to replay and is kept from it");
    set(&mut seen, 200, None);
    assert_eq!(
        turns(&mut seen, &mut Memory::default(), Rejoin::Waits),
        None,
        "it lacks nothing"
    );
}

#[test]
fn members_whose_keys_have_ended_are_asked_too() {
    let mut all = seen(LeaseSeen::Free);
    let mut memory = Memory::default();
    memory.note(&mut all, NOW);
    let mut alone = with_view(all, |view| view.members.retain(|name, _| name.as_str() == "n1"));
    memory.note(&mut alone, NOW);
    assert_eq!(
        memory.addresses.keys().cloned().collect::<Vec<_>>(),
        ["n2", "n3"].map(name)
    );
}

/// A standby whose leader takes writes, asked for a new copy.
fn reinitialized() -> (Observation, Memory) {
    let memory = Memory {
        reinitialize_asked_at: Some(NOW),
        ..Memory::default()
    };
    (seen(LeaseSeen::Theirs(epoch("n2"))), memory)
}

#[test]
fn who_follows_is_cloned_anew_when_asked_and_is_started_after_it_in_a_pause_too() {
    for fails in [false, true] {
        let (mut seen, mut memory) = reinitialized();
        pause(&mut seen);
        assert_eq!(step(&seen, &memory), Some(Step::Clone { from: name("n2") }));
        let outcome = if fails {
            Err("no room".to_owned())
        } else {
            Ok(Outcome::Done)
        };
        memory.job_ended(JobKind::Clone, outcome, NOW);
        assert_eq!(memory.reinitialize_asked_at, None, "it is tried once");
        seen.postgres = Postgres::Down;
        let upstream = Some(name("n2"));
        memory.backoff_until = None;
        assert_eq!(step(&seen, &memory), Some(Step::StartStandby { upstream }));
    }
}

#[test]
fn who_leads_or_could_lead_is_not_cloned_whatever_was_asked() {
    let clones = |seen: &Observation, memory: &Memory| matches!(step(seen, memory), Some(Step::Clone { .. }));
    let (following, mut memory) = reinitialized();
    assert!(clones(&following, &memory));
    for lease in [LeaseSeen::Mine(epoch("n1")), LeaseSeen::Free, LeaseSeen::Unknown] {
        let seen = Observation {
            lease: lease.clone(),
            ..following.clone()
        };
        assert!(!clones(&seen, &memory), "{lease:?}");
    }
    let foreign = Observation {
        data: DataDir::Foreign(vec!["notes.txt".to_owned()]),
        ..following.clone()
    };
    assert!(!clones(&foreign, &memory), "files that are nobody's data");
    memory.note(&mut following.clone(), LATER);
    assert_eq!(
        memory.reinitialize_asked_at, None,
        "after a minute nobody expects it any more"
    );
}
