//! A small cluster: logs that are lists of who wrote each entry, a PostgreSQL that acknowledges by its setting, and a leader
//! that performs steps, each decided on what it saw some time before.

use std::collections::VecDeque;

use super::super::quorum::agree;
use super::*;

pub(super) const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// In which order a leader performs what it is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Performer {
    /// As it is told.
    Faithful,
    /// It asks what would come next, and does that first.
    Swapped,
}

#[derive(Clone, Debug)]
pub(super) struct World {
    pub(super) logs: Vec<Vec<u8>>,
    /// The timelines that each member's log has reached, with the length at which they begin. A log that follows a leader
    /// is on that leader's timeline only once it has got so far.
    timelines: Vec<Vec<(u8, usize)>>,
    pub(super) streaming: Vec<bool>,
    pub(super) nosync: Vec<bool>,
    pub(super) leader: usize,
    pub(super) settings: SyncSettings,
    pub(super) state: SyncState,
    pub(super) setting: SyncNames,
    pub(super) waited: bool,
    performer: Performer,
    primary: bool,
    epoch: u8,
    revision: i64,
    changed_at: Option<Lsn>,
    acknowledged: Vec<u8>,
    pending: VecDeque<SyncStep>,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Act {
    Commit,
    Receive(usize),
    Disconnect(usize),
    Connect(usize),
    Decide,
    Perform,
    AgentRestarts,
    Patience(bool),
    Elect(usize),
    Finish,
    Nosync(usize, bool),
    Settings(SyncMode, u32, bool),
}

impl World {
    /// `members` members, the first leads; it has just begun with synchronous mode.
    pub(super) fn new(members: usize, settings: SyncSettings, performer: Performer) -> Self {
        Self {
            logs: vec![vec![]; members],
            timelines: vec![vec![(0, 0)]; members],
            streaming: vec![false; members],
            nosync: vec![false; members],
            leader: 0,
            settings,
            state: state(NAMES[0], 0, &[]),
            setting: SyncNames::Off,
            waited: false,
            performer,
            primary: true,
            epoch: 0,
            revision: 1,
            changed_at: Some(Lsn(0)),
            acknowledged: vec![],
            pending: VecDeque::new(),
        }
    }

    pub(super) fn size(&self) -> usize {
        self.logs.len()
    }

    fn length(&self, member: usize) -> Lsn {
        Lsn(u64::try_from(self.logs[member].len()).expect("logs are short"))
    }

    pub(super) fn act(&mut self, act: Act) {
        match act {
            Act::Commit if self.primary => self.logs[self.leader].push(self.epoch),
            Act::Receive(member) if self.primary && self.streaming[member] => {
                let next = self.logs[self.leader].get(self.logs[member].len()).copied();
                self.logs[member].extend(next);
                self.follow(member);
            }
            Act::Disconnect(member) => self.streaming[member] = false,
            Act::Connect(member) if self.primary && member != self.leader => self.connect(member),
            Act::Decide if self.pending.is_empty() => self.decide(),
            Act::Perform => self.perform(),
            Act::AgentRestarts => {
                self.pending.clear();
                self.changed_at = self.primary.then(|| self.length(self.leader));
                if !self.primary {
                    self.prepare_promotion();
                }
            }
            Act::Patience(over) => self.waited = over,
            Act::Elect(member) if member != self.leader && self.may_win(member) => self.elect(member),
            Act::Finish if !self.primary && self.pending.is_empty() => {
                self.primary = true;
                let begins = self.logs[self.leader].len();
                self.timelines[self.leader].push((self.epoch, begins));
                self.changed_at = Some(self.length(self.leader));
            }
            Act::Nosync(member, nosync) => self.nosync[member] = nosync,
            Act::Settings(mode, node_count, strict) => {
                self.settings = SyncSettings {
                    mode,
                    strict,
                    node_count,
                    lag_max: None,
                };
            }
            _ => {}
        }
        self.acknowledge();
    }

    /// What the leader has not, the standby gives up before it streams.
    fn connect(&mut self, member: usize) {
        let common = self.logs[member].iter().zip(&self.logs[self.leader]);
        let common = common.take_while(|(theirs, ours)| theirs == ours).count();
        self.logs[member].truncate(common);
        self.follow(member);
        self.streaming[member] = true;
    }

    fn follow(&mut self, member: usize) {
        let reached = self.logs[member].len();
        let leaders = self.timelines[self.leader].iter().copied();
        self.timelines[member] = leaders.filter(|(_, begins)| *begins <= reached).collect();
    }

    fn decide(&mut self) {
        if !self.primary {
            return;
        }
        let Some(first) = next_step(&self.inputs()) else { return };
        if self.performer == Performer::Swapped {
            let mut ahead = self.clone();
            ahead.apply(first.step.clone());
            self.pending
                .extend(next_step(&ahead.inputs()).map(|second| second.step));
        }
        self.pending.push_back(first.step);
    }

    fn perform(&mut self) {
        if let Some(step) = self.pending.pop_front() {
            self.apply(step);
        }
    }

    fn apply(&mut self, step: SyncStep) {
        match step {
            SyncStep::WriteSync { state, revision } => {
                let current = revision == self.revision || self.performer == Performer::Swapped;
                if current {
                    self.state = state;
                    self.revision += 1;
                }
            }
            SyncStep::SetNames(names) => {
                self.setting = names;
                self.changed_at = Some(self.length(self.leader));
            }
            SyncStep::DeleteSync { .. } => unreachable!("the model does not turn the mode off"),
        }
    }

    /// Whether the rules let `member` win: whoever would stand in its way happens to be out of reach.
    pub(super) fn may_win(&self, member: usize) -> bool {
        let me = name(NAMES[member]);
        // An older timeline is no reason to overlook a longer log: it may have been acknowledged since, where the voter
        // follows a leader whose own timeline it has not reached yet.
        let ahead = |voter: usize| {
            self.timelines[voter].last() > self.timelines[member].last()
                || self.logs[voter].len() > self.logs[member].len()
        };
        let votes: NameSet = (0..self.size())
            .filter(|voter| *voter != member && !ahead(*voter))
            .map(|voter| StandbyName::from(NAMES[voter]))
            .collect();
        may_run(self.settings.mode, &self.state, &me) && quorum_reached(&self.state, &me, &votes)
    }

    fn elect(&mut self, member: usize) {
        self.leader = member;
        self.primary = false;
        self.epoch += 1;
        self.setting = SyncNames::Off;
        self.changed_at = None;
        self.streaming.fill(false);
        self.prepare_promotion();
    }

    fn prepare_promotion(&mut self) {
        let before = before_promotion(&self.inputs());
        let revision = self.revision;
        self.pending = before
            .write_sync
            .map(|state| SyncStep::WriteSync { state, revision })
            .into_iter()
            .chain([SyncStep::SetNames(before.names)])
            .collect();
    }

    /// As PostgreSQL does: the setting is looked at with the standbys that stream now.
    fn acknowledge(&mut self) {
        if !self.primary {
            return;
        }
        let log = &self.logs[self.leader];
        let enough = |length: usize| {
            let has = |member: &usize| self.logs[*member].len() >= length;
            match &self.setting {
                SyncNames::Off => true,
                SyncNames::First { count, .. } => {
                    let first = self.waited_for();
                    first.len() == *count as usize && first.iter().all(has)
                }
                SyncNames::Any { count, .. } => self.waited_for().iter().filter(|m| has(m)).count() >= *count as usize,
            }
        };
        let longest = (0..=log.len()).rev().find(|length| enough(*length)).unwrap_or(0);
        if longest > self.acknowledged.len() {
            self.acknowledged = log[..longest].to_vec();
        }
    }

    /// Those that stream and are named: all in quorum mode, else the first so many by their places in the list.
    fn waited_for(&self) -> Vec<usize> {
        let streams = |member: &usize| self.streaming[*member];
        let place = |member: &usize, names: &[StandbyName]| {
            let own = StandbyName::from(NAMES[*member]);
            names.iter().position(|name| name.is_star() || *name == own)
        };
        let named = |names: &[StandbyName]| {
            let mut named: Vec<(usize, usize)> = (0..self.size())
                .filter(streams)
                .filter_map(|member| Some((place(&member, names)?, member)))
                .collect();
            named.sort_unstable();
            named.into_iter().map(|(_, member)| member).collect::<Vec<_>>()
        };
        match &self.setting {
            SyncNames::Off => vec![],
            SyncNames::Any { names, .. } => named(names),
            SyncNames::First { count, names } => named(names).into_iter().take(*count as usize).collect(),
        }
    }

    pub(super) fn inputs(&self) -> SyncInputs {
        let waited_for = self.waited_for();
        let rank = |member: usize| match (&self.setting, waited_for.contains(&member)) {
            (SyncNames::Any { .. }, true) => SyncRank::Quorum,
            (_, true) => SyncRank::Sync,
            (names, false) if names.covers(&NAMES[member].into()) => SyncRank::Potential,
            (_, false) => SyncRank::Async,
        };
        SyncInputs {
            me: name(NAMES[self.leader]),
            settings: self.settings,
            state: self.state.clone(),
            sync_revision: self.revision,
            configured: self.setting.clone(),
            user_names: SyncNames::Off,
            senders: (0..self.size())
                .filter(|member| self.streaming[*member])
                .map(|member| sender(NAMES[member], self.length(member).0, rank(member)))
                .collect(),
            members: (0..self.size())
                .map(|member| Standby {
                    nosync: self.nosync[member],
                    ..standby(NAMES[member])
                })
                .collect(),
            running: self.primary,
            flush_lsn: self.length(self.leader),
            guc_changed_at: self.changed_at,
            waited: self.waited,
            commit_level: CommitLevel::Flush,
        }
    }

    /// Everybody who may win has everything that was acknowledged.
    pub(super) fn loses_nothing(&self) -> Result<(), String> {
        let lacks = |member: &usize| self.may_win(*member) && !self.logs[*member].starts_with(&self.acknowledged);
        match (0..self.size()).find(lacks) {
            Some(member) => Err(format!(
                "{} may win and lacks acknowledged entries: {self:?}",
                NAMES[member]
            )),
            None => Ok(()),
        }
    }

    /// Record and setting agree, one set within the other.
    pub(super) fn agrees(&self) -> Result<(), String> {
        let (n, names) = self.setting.guarantee();
        let q = usize::try_from(self.state.quorum).expect("small");
        if !self.primary || agree(q, &listed(&self.state), n, &names) {
            return Ok(());
        }
        Err(format!("record and setting disagree: {self:?}"))
    }

    /// What makes two moments the same for the search. A revision counts only against that of a step that is under way.
    pub(super) fn key(&self) -> String {
        let mut same = self.clone();
        same.revision = 0;
        for step in &mut same.pending {
            if let SyncStep::WriteSync { revision, .. } = step {
                *revision -= self.revision;
            }
        }
        format!("{same:?}")
    }
}
