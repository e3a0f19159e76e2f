//! Giving the lease up in order, turn by turn.

use super::*;
use crate::jobs::Outcome;
use crate::sync::{Sender, StandbyName, SyncRank, SyncSettings};

/// A leader with a request to hand over to n2, and what it remembers.
struct Leader {
    seen: Observation,
    memory: Memory,
}

impl Leader {
    fn asked() -> Self {
        let seen = Observation {
            postgres: primary(),
            ..seen(LeaseSeen::Mine(epoch("n1")))
        };
        Self {
            seen: with_view(seen, |view| view.failover = request(Some("n1"), Some("n2"))),
            memory: Memory {
                proven: Some(epoch("n1")),
                ..Memory::default()
            },
        }
    }

    fn told_to_stop() -> Self {
        let mut leader = Self::asked();
        Arc::make_mut(&mut leader.seen.view).failover = request(None, None);
        leader.seen.stopping = true;
        leader
    }

    /// One turn: notes, decides, and begins the step.
    fn turn(&mut self) -> Option<Step> {
        self.memory.note(&mut self.seen, NOW);
        let step = decide(&self.seen, &self.memory, NOW).step;
        if let Some(step) = &step {
            self.memory.stepped(step, NOW);
            self.memory.performed(step);
        }
        step
    }

    fn ended(&mut self, kind: JobKind, outcome: Result<Outcome, &str>) {
        self.memory.job_ended(kind, outcome.map_err(str::to_owned), NOW);
    }

    fn polled(&mut self, peers: Vec<Peer>) {
        let poll = Poll {
            asked_at: NOW,
            answered_at: NOW,
            own_position: Lsn(100),
            own_timeline: Some(Timeline(1)),
            peers,
            silent: 0,
        };
        self.ended(JobKind::Poll, Ok(Outcome::Polled(poll)));
    }

    fn stopped(&mut self, state: ControlState) {
        self.seen.postgres = Postgres::Down;
        self.seen.data = data(state, false);
        self.ended(JobKind::Stop, Ok(Outcome::Done));
    }

    /// Up to the question who has the shutdown checkpoint.
    fn confirming() -> Self {
        let mut leader = Self::asked();
        assert!(matches!(leader.turn(), Some(Step::BeginHandover { .. })));
        assert_eq!(leader.turn(), Some(Step::Poll));
        leader.polled(vec![peer("n2", Some(100))]);
        assert_eq!(leader.turn(), Some(Step::Checkpoint { to: name("n2") }));
        leader.ended(JobKind::Checkpoint, Ok(Outcome::Done));
        assert_eq!(leader.turn(), Some(Step::Stop));
        leader.stopped(ControlState::ShutDown);
        let confirm = Step::Confirm {
            members: vec![name("n2")],
            checkpoint: Lsn(50),
            timeline: Timeline(1),
        };
        assert_eq!(leader.turn(), Some(confirm));
        leader
    }
}

#[test]
fn the_key_is_given_up_only_when_the_candidate_has_everything() {
    let mut leader = Leader::confirming();
    leader.ended(JobKind::Confirm, Ok(Outcome::Confirmed(Some(name("n2")))));
    let hand_to = Step::HandTo {
        epoch: epoch("n1"),
        successor: Some(name("n2")),
        last: Some(Lsn(50)),
    };
    assert_eq!(leader.turn(), Some(hand_to));
    assert!(leader.memory.handed_over && leader.memory.handover.is_none());
}

#[test]
fn a_candidate_that_does_not_confirm_leaves_the_leader_leading() {
    let mut leader = Leader::confirming();
    leader.ended(JobKind::Confirm, Ok(Outcome::Confirmed(None)));
    assert_eq!(leader.turn(), Some(Step::StartPrimary), "clients wait for it");
    leader.seen.postgres = primary();
    leader.ended(JobKind::StartPrimary, Ok(Outcome::Done));
    assert_eq!(leader.turn(), Some(Step::ClearRequest));
    assert_eq!(leader.memory.handover, None);
}

#[test]
fn nothing_is_stopped_for_a_candidate_that_cannot_take_over() {
    for peers in [
        vec![],
        vec![Peer {
            nofailover: true,
            ..peer("n2", Some(100))
        }],
        vec![Peer {
            timeline: Some(Timeline(2)),
            ..peer("n2", Some(100))
        }],
        vec![peer("n2", None)],
        vec![peer("n3", Some(100))],
    ] {
        let mut leader = Leader::asked();
        leader.turn();
        leader.turn();
        leader.polled(peers);
        assert!(matches!(leader.turn(), Some(Step::FailHandover(_))));
        assert_eq!(leader.turn(), Some(Step::ClearRequest));
    }
}

#[test]
fn a_leader_that_is_told_to_stop_gives_the_key_up_whoever_confirms() {
    let mut leader = Leader::told_to_stop();
    assert!(matches!(leader.turn(), Some(Step::BeginHandover { .. })));
    assert_eq!(leader.turn(), Some(Step::Stop));
    leader.stopped(ControlState::ShutDown);
    let Some(Step::Confirm { members, .. }) = leader.turn() else {
        panic!("the others are asked")
    };
    assert_eq!(members, ["n2", "n3"].map(name));
    leader.ended(JobKind::Confirm, Ok(Outcome::Confirmed(None)));
    assert!(matches!(leader.turn(), Some(Step::HandTo { successor: None, .. })));
    leader.seen.lease = LeaseSeen::Free;
    assert!(matches!(leader.turn(), Some(Step::Leave { code: 0, .. })));
}

fn sender(standby: &str) -> Sender {
    let position = Some(Lsn(100));
    Sender {
        application_name: StandbyName::from(&name(standby)),
        pid: 1,
        state: "streaming".to_owned(),
        sync_state: SyncRank::Sync,
        sent: position,
        write: position,
        flush: position,
        replay: position,
        stale: false,
    }
}

#[test]
fn the_successor_of_a_synchronous_leader_is_of_its_set() {
    let mut leader = Leader::told_to_stop();
    let config = DynamicConfig::parse(r#"{"synchronous_mode":true}"#);
    leader.seen.sync.settings = SyncSettings::of(&config);
    let view = Arc::make_mut(&mut leader.seen.view);
    view.config.value = Some(config);
    view.sync.value = serde_json::from_str(r#"{"leader":"n1","quorum":0,"sync_standby":"n3"}"#).expect("JSON");
    leader.seen.sync.senders = vec![sender("n3")];
    leader.turn();
    assert_eq!(leader.turn(), Some(Step::Stop));
    leader.stopped(ControlState::ShutDown);
    let Some(Step::Confirm { members, .. }) = leader.turn() else {
        panic!("the others are asked")
    };
    assert_eq!(members, [name("n3")]);
}

/// In the moment after its promotion the record names nobody beside it: whoever is left could not lead.
#[test]
fn a_synchronous_leader_that_stops_serves_until_somebody_may_follow_or_two_periods_are_over() {
    for mode in [r#"{"synchronous_mode":true}"#, r#"{"synchronous_mode":"quorum"}"#] {
        let mut leader = Leader::told_to_stop();
        let config = DynamicConfig::parse(mode);
        leader.seen.sync.settings = SyncSettings::of(&config);
        let view = Arc::make_mut(&mut leader.seen.view);
        view.config.value = Some(config);
        view.sync.value = serde_json::from_str(r#"{"leader":"n1","quorum":0,"sync_standby":""}"#).expect("JSON");
        leader.memory.stopping_since = Some(NOW);
        let decide_after = |leader: &Leader, periods: u32| {
            let wait = periods * leader.seen.view.timing().loop_wait();
            decide(&leader.seen, &leader.memory, NOW + wait)
        };
        assert_eq!(decide_after(&leader, 1).reason, Reason::NobodyMayFollowYet, "{mode}");
        let over = decide_after(&leader, 2).step;
        assert!(matches!(over, Some(Step::BeginHandover { .. })), "{mode}: {over:?}");
        leader.seen.sync.senders = vec![sender("n2")];
        let found = decide_after(&leader, 1).step;
        assert!(
            matches!(found, Some(Step::Sync(_))),
            "{mode}: it is to be listed: {found:?}"
        );
        leader.seen.sync.senders.clear();
        let view = Arc::make_mut(&mut leader.seen.view);
        view.members.retain(|name, _| name.as_str() == "n1");
        let alone = decide_after(&leader, 1).step;
        assert!(matches!(alone, Some(Step::BeginHandover { .. })), "{mode}: {alone:?}");
    }
}

#[test]
fn a_lease_that_is_lost_on_the_way_ends_the_hand_over() {
    let mut leader = Leader::asked();
    leader.turn();
    leader.seen.lease = LeaseSeen::Theirs(epoch("n2"));
    leader.seen.armed = true;
    assert_eq!(leader.turn(), Some(Step::End));
    assert_eq!(leader.memory.handover, None);
}
