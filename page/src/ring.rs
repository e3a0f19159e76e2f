//! The last hour in memory: a point each ten seconds, and no more than that.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use pgherd_cluster::clock::Boottime;

use crate::model::State;

/// From one point to the next.
pub const EVERY: Duration = Duration::from_secs(10);
/// An hour of points.
const POINTS_MAX: usize = 360;
/// Members beyond these are not drawn: their lines could not be told from each other.
const MEMBERS_MAX: usize = 8;

/// What was so of one member at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Reading {
    /// How far it was behind; nothing where that was not known, and for the leader.
    pub(crate) lag_bytes: Option<u64>,
    /// Bytes between clients and it, since the teller's start.
    pub(crate) bytes_total: u64,
}

/// One moment.
#[derive(Clone, Debug)]
pub(crate) struct Point {
    pub(crate) at: Boottime,
    pub(crate) members: BTreeMap<String, Reading>,
    pub(crate) leader: Option<String>,
    pub(crate) refused_total: u64,
    pub(crate) ended_total: u64,
}

/// The last hour.
#[derive(Clone, Debug, Default)]
pub struct Ring {
    points: VecDeque<Point>,
}

impl Ring {
    /// Whether it is time for another point.
    #[must_use]
    pub fn is_due(&self, now: Boottime) -> bool {
        self.points.back().is_none_or(|last| now.since(last.at) >= EVERY)
    }

    /// Adds a point, and forgets one that is older than an hour.
    pub fn sample(&mut self, state: &State, now: Boottime) {
        let reading = |member: &crate::model::MemberState| {
            let reading = Reading {
                lag_bytes: member.lag_bytes.filter(|_| !state.leads(&member.name)),
                bytes_total: member.bytes_total,
            };
            (member.name.clone(), reading)
        };
        self.points.push_back(Point {
            at: now,
            members: state.members.iter().take(MEMBERS_MAX).map(reading).collect(),
            leader: state.leader.as_ref().map(|leader| leader.name.clone()),
            refused_total: state.listeners.iter().map(|listener| listener.refused_total).sum(),
            ended_total: state.listeners.iter().map(|listener| listener.ended_total).sum(),
        });
        while self.points.len() > POINTS_MAX {
            self.points.pop_front();
        }
    }

    /// The members that lines are drawn for, in a fixed order: whoever is gone for a moment keeps its colour.
    pub(crate) fn names(&self, state: &State) -> Vec<String> {
        let known = self.points.iter().flat_map(|point| point.members.keys());
        let now = state.members.iter().map(|member| &member.name);
        let names: BTreeSet<&String> = known.chain(now).collect();
        names.into_iter().take(MEMBERS_MAX).cloned().collect()
    }

    pub(crate) fn points(&self) -> &VecDeque<Point> {
        &self.points
    }

    /// How many clients were refused and how many sessions ended by the teller, within the last `span`.
    pub(crate) fn lately(&self, state: &State, span: Duration, now: Boottime) -> (u64, u64) {
        let Some(then) = self.points.iter().find(|point| now.since(point.at) <= span) else {
            return (0, 0);
        };
        let total = |of: fn(&crate::model::ListenerRow) -> u64| state.listeners.iter().map(of).sum::<u64>();
        (
            total(|listener| listener.refused_total).saturating_sub(then.refused_total),
            total(|listener| listener.ended_total).saturating_sub(then.ended_total),
        )
    }
}
