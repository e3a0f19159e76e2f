//! A data directory: records with the timelines that they are on, and what the control file says.

use pgherd_agent::postgres::ControlState;
use pgherd_cluster::name::{Lsn, Timeline};

/// Where the log begins, and how long each record is.
const ORIGIN: u64 = 0x300_0000;
const RECORD_BYTES: u64 = 120;

/// One record. No two records of a run have the same number, so that loss can be judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    pub(crate) id: u64,
    pub(crate) timeline: u32,
}

/// The position before the `index`th record.
pub(crate) fn lsn(index: usize) -> Lsn {
    Lsn(ORIGIN + RECORD_BYTES * u64::try_from(index).unwrap_or(u64::MAX / RECORD_BYTES / 2))
}

/// A data directory.
#[derive(Clone, Debug)]
pub(crate) struct Data {
    pub(crate) system_id: u64,
    pub(crate) log: Vec<Record>,
    /// The timeline that it is on.
    pub(crate) timeline: u32,
    /// Timelines before that, and with how many records each ended.
    pub(crate) ended: Vec<(u32, usize)>,
    pub(crate) state: ControlState,
    /// Which record is the latest checkpoint, and its timeline.
    pub(crate) checkpoint: (usize, u32),
    pub(crate) standby_signal: bool,
    /// Whether initdb has run and the roles were not made yet.
    pub(crate) unfinished: bool,
}

impl Data {
    /// What initdb leaves.
    pub(crate) fn made(system_id: u64, first_record: u64) -> Self {
        let first = Record {
            id: first_record,
            timeline: 1,
        };
        Self {
            system_id,
            log: vec![first],
            timeline: 1,
            ended: Vec::new(),
            state: ControlState::ShutDown,
            checkpoint: (0, 1),
            standby_signal: false,
            unfinished: true,
        }
    }

    /// A base backup of it.
    pub(crate) fn copied(&self) -> Self {
        Self {
            state: ControlState::InArchiveRecovery,
            standby_signal: true,
            unfinished: false,
            ..self.clone()
        }
    }

    /// Adds a record on the present timeline; gives its place.
    pub(crate) fn append(&mut self, id: u64) -> usize {
        let timeline = self.timeline;
        self.log.push(Record { id, timeline });
        self.log.len() - 1
    }

    /// A checkpoint.
    pub(crate) fn write_checkpoint(&mut self, id: u64) {
        self.checkpoint = (self.append(id), self.timeline);
    }

    /// The end of the log.
    pub(crate) fn end(&self) -> Lsn {
        lsn(self.log.len())
    }

    pub(crate) fn holds(&self, record: u64) -> bool {
        self.log.iter().rev().any(|held| held.id == record)
    }

    /// Begins a new timeline, as a promotion does. Nobody else's timelines are known here, only those in its history.
    pub(crate) fn fork(&mut self, id: u64) {
        self.ended.push((self.timeline, self.log.len()));
        self.timeline += 1;
        self.append(id);
        self.standby_signal = false;
        self.state = ControlState::InProduction;
    }

    /// Where a timeline ended here, as the history file tells.
    pub(crate) fn end_of(&self, timeline: u32) -> Option<usize> {
        self.ended
            .iter()
            .find(|(ended, _)| *ended == timeline)
            .map(|(_, end)| *end)
    }

    /// The ended timelines as positions.
    pub(crate) fn history(&self) -> Vec<(Timeline, Lsn)> {
        self.ended
            .iter()
            .map(|(timeline, end)| (Timeline(*timeline), lsn(*end)))
            .collect()
    }

    /// Whether what is here is the beginning of what is there, as far as a stream could go on from it.
    pub(crate) fn may_follow(&self, upstream: &Self) -> bool {
        if self.system_id != upstream.system_id || self.log.len() > upstream.log.len() {
            return false;
        }
        let within = match upstream.end_of(self.timeline) {
            _ if self.timeline == upstream.timeline => true,
            Some(end) => self.log.len() <= end,
            None => false,
        };
        // Two that took one number for different timelines: the next record does not fit to the last.
        let last = self.log.len().checked_sub(1);
        within && last.is_none_or(|last| self.log.get(last) == upstream.log.get(last))
    }

    /// Takes over what the upstream has more, up to `limit` records in all.
    pub(crate) fn receive(&mut self, upstream: &Self, limit: usize) {
        let from = self.log.len();
        let until = limit.min(upstream.log.len());
        let Some(new) = upstream.log.get(from..until) else {
            return;
        };
        self.log.extend_from_slice(new);
        let Some(last) = self.log.last().copied() else { return };
        if last.timeline != self.timeline {
            self.timeline = last.timeline;
            self.ended = upstream
                .ended
                .iter()
                .copied()
                .filter(|(ended, _)| *ended < last.timeline)
                .collect();
        }
        // A restartpoint follows the primary's checkpoints.
        if upstream.checkpoint.0 < self.log.len() {
            self.checkpoint = self.checkpoint.max(upstream.checkpoint);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn primary() -> Data {
        let mut data = Data::made(7, 1);
        data.append(2);
        data.append(3);
        data
    }

    #[test]
    fn a_copy_follows_and_catches_up_across_a_fork() {
        let mut leader = primary();
        let mut standby = leader.copied();
        leader.append(4);
        leader.fork(5);
        assert!(standby.may_follow(&leader));
        standby.receive(&leader, 4);
        assert_eq!((standby.timeline, standby.log.len()), (1, 4));
        standby.receive(&leader, 99);
        assert_eq!((standby.timeline, standby.ended.clone()), (2, vec![(1, 4)]));
        assert_eq!(standby.log, leader.log);
    }

    #[test]
    fn what_went_past_the_fork_does_not_follow() {
        let mut leader = primary();
        let mut other = leader.copied();
        other.fork(10);
        leader.append(4);
        assert!(
            !leader.may_follow(&other),
            "longer, on a timeline that ended there earlier"
        );
        other.append(11);
        assert!(!leader.may_follow(&other));
        assert!(other.holds(11) && !other.holds(4));
    }

    #[test]
    fn one_number_for_two_timelines_is_told_apart_by_the_records() {
        let (mut one, mut two) = (primary(), primary());
        one.fork(10);
        two.fork(20);
        two.append(21);
        assert_eq!(one.timeline, two.timeline);
        assert!(!one.may_follow(&two));
    }

    #[test]
    fn another_cluster_is_never_followed() {
        let mut stranger = primary();
        stranger.system_id = 8;
        assert!(!primary().may_follow(&stranger));
    }

    #[test]
    fn positions_are_those_before_a_record() {
        let mut data = primary();
        data.write_checkpoint(9);
        assert!(lsn(data.checkpoint.0) < data.end());
        assert_eq!(data.history(), vec![]);
    }
}
