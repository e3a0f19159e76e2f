//! When the phases of a change of the leader began, as this member measures them. Pure: time is an argument.

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::event::{Phase, phase};
use pgherd_cluster::view::Epoch;
use serde_json::{Map, Value};

use crate::memory::Memory;
use crate::observation::{LeaseSeen, Observation, Poll, Postgres};
use crate::status::WalStatus;

/// A last commit that is older than this when nobody leads any more was the last for want of clients, and tells nothing.
const COMMIT_AGE_MAX_MS: u64 = 60_000;

/// See the module.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stopwatch {
    marks: Vec<(&'static str, Boottime)>,
    /// The last commit that a standby has replayed, by the leader's clock.
    last_commit_ms: Option<u64>,
    streamed: bool,
    /// The holding that was last seen to be another's, or ours before this.
    former: Option<Epoch>,
    evidence: Map<String, Value>,
}

/// What was measured of one change.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// The holding that ended.
    pub former: Option<Epoch>,
    /// The phases, oldest first.
    pub phases: Vec<Phase>,
    /// What the bid rested on.
    pub evidence: Map<String, Value>,
    /// Whether the server was started in place, not promoted.
    pub in_place: bool,
}

impl Stopwatch {
    /// A phase begins; what has begun already goes on.
    pub fn mark(&mut self, name: &'static str, now: Boottime) {
        if !self.has(name) {
            self.marks.push((name, now));
        }
    }

    /// Whether a phase has begun.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.marks.iter().any(|(mark, _)| *mark == name)
    }

    /// What a bid rests on.
    pub fn note_bid(&mut self, poll: Option<&Poll>) {
        let Some(poll) = poll else { return };
        self.evidence
            .insert("lsn".to_owned(), poll.own_position.to_string().into());
        self.evidence.insert("answered".to_owned(), poll.peers.len().into());
        self.evidence.insert("silent".to_owned(), poll.silent.into());
        let best = poll.peers.iter().filter_map(|peer| peer.position).max();
        if let Some(best) = best {
            self.evidence
                .insert("best_other_lsn".to_owned(), best.to_string().into());
        }
    }

    /// Folds in what is seen.
    pub fn note(&mut self, seen: &Observation, memory: &Memory, now: Boottime) {
        let wal = match &seen.postgres {
            Postgres::Running(server) => Some((&server.wal, server.replication_state.as_deref() == Some("streaming"))),
            Postgres::Down | Postgres::Ending | Postgres::Silent { .. } => None,
        };
        if let Some((WalStatus::Standby { replayed_at, .. }, _)) = wal {
            let at = replayed_at
                .as_deref()
                .and_then(|text| text.parse::<jiff::Timestamp>().ok());
            self.last_commit_ms = at.and_then(|at| u64::try_from(at.as_millisecond()).ok());
        }
        match &seen.lease {
            LeaseSeen::Theirs(epoch) => {
                let streams = wal.is_some_and(|(_, streams)| streams);
                let is_new = self.former.as_ref() != Some(epoch);
                if is_new || streams {
                    self.marks.clear();
                }
                if self.streamed && !streams && !is_new {
                    self.mark(phase::STREAM_LOST, now);
                }
                self.streamed = streams;
                self.former = Some(epoch.clone());
            }
            LeaseSeen::Free => self.mark(phase::LEASE_FREE, now),
            LeaseSeen::Mine(epoch) => {
                let is_down = matches!(seen.postgres, Postgres::Down | Postgres::Ending);
                let ordered = memory.handover.is_some() || memory.restart.is_some();
                let proven = memory.proven.as_ref() == Some(epoch);
                if is_down && proven && !ordered && seen.job.is_none() {
                    self.mark(phase::DIED, now);
                }
                let serves = matches!(wal, Some((WalStatus::Primary { .. }, _)));
                if proven && serves && !ordered && seen.job.is_none() && !self.has(phase::WRITABLE) {
                    self.marks.clear(); // What was begun came to nothing.
                }
                // Until the change that made it leader is told, that is from the one before.
                if proven && !self.has(phase::WRITABLE) {
                    self.former = Some(epoch.clone());
                }
            }
            LeaseSeen::MineUnproven(_) | LeaseSeen::Stale { .. } | LeaseSeen::Unknown => {}
        }
    }

    /// Takes what was measured, and begins anew. `now` and `now_ms` are the same moment on both clocks.
    pub fn take(&mut self, now: Boottime, now_ms: u64) -> Measured {
        let wall = |at: Boottime| {
            let ago = u64::try_from(now.since(at).as_millis()).unwrap_or(u64::MAX);
            now_ms.saturating_sub(ago)
        };
        let mut marks = std::mem::take(&mut self.marks);
        marks.sort_by_key(|(_, at)| *at);
        let in_place = marks.iter().any(|(name, _)| *name == phase::START);
        let promoted = marks.iter().any(|(name, _)| *name == phase::PROMOTE);
        let mut phases: Vec<Phase> = marks
            .into_iter()
            .map(|(name, at)| Phase {
                name: name.to_owned(),
                at_ms: wall(at),
            })
            .collect();
        let first_ms = phases.first().map(|first| first.at_ms);
        let last_commit = self.last_commit_ms.filter(|_| promoted);
        if let (Some(commit), Some(first)) = (last_commit, first_ms)
            && first.saturating_sub(commit) < COMMIT_AGE_MAX_MS
        {
            phases.push(Phase {
                name: phase::LAST_COMMIT.to_owned(),
                at_ms: commit,
            });
            phases.sort_by_key(|phase| phase.at_ms);
        }
        Measured {
            former: self.former.clone(),
            phases,
            evidence: std::mem::take(&mut self.evidence),
            in_place: in_place && !promoted,
        }
    }
}
