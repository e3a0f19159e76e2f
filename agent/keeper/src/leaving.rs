//! How the keeper's own life ends: told by a signal, or by the agent.

use std::time::Duration;

use rustix::process::Signal;

use crate::child::Service;
use crate::clock::Boottime;
use crate::ending::GRACE_MAX;
use crate::keeper::{Keeper, KeeperOutcome};
use crate::protocol::Report;
use crate::seat::Farewell;

/// From when on being told to stop again means impatience. Before, it is the same order twice: some supervisors signal
/// the process and then its group.
const SECOND_STOP_MIN: Duration = Duration::from_millis(500);

/// How far a stop has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    Running,
    /// The agent hands over, and leaves.
    Stopping {
        since: Boottime,
        until: Boottime,
    },
    /// The agent has gone and is not started again; what is left is ended.
    Leaving {
        until: Boottime,
        outcome: KeeperOutcome,
        /// PostgreSQL is left alone, for the fence is paused.
        keeps_postgres: bool,
    },
}

impl Keeper {
    /// Told by SIGTERM or SIGINT. The second time everything ends at once.
    pub(crate) fn told_to_stop(&mut self, now: Boottime) {
        match self.life {
            Life::Running => {
                self.begin_stopping(now);
                self.agent.report(&Report::Stop);
            }
            Life::Stopping { since, .. } if now < since.plus(SECOND_STOP_MIN) => {}
            Life::Stopping { since, .. } => {
                self.log
                    .line(format_args!("told to stop again, ending everything at once"));
                self.life = Life::Stopping { since, until: now };
                if !self.fence.is_paused() {
                    self.begin_ending(now, GRACE_MAX);
                }
            }
            Life::Leaving { ref mut until, .. } => *until = now,
        }
    }

    /// The agent is about to exit, and gets as much time for it as if it had been told to.
    pub(crate) fn agent_leaves(&mut self, farewell: Farewell, now: Boottime) {
        self.agent.leaving = Some(farewell);
        self.begin_stopping(now);
    }

    /// The agent has been reaped. Whether another one is started is settled here.
    pub(crate) fn agent_gone(&mut self, now: Boottime) {
        let Life::Stopping { until, .. } = self.life else {
            return;
        };
        let farewell = self.agent.leaving;
        let outcome = farewell.map_or(KeeperOutcome::Stopped, |farewell| KeeperOutcome::AgentLeft {
            code: farewell.code,
        });
        // An agent that dies without a word leaves as much in pause as a keeper that does.
        let keeps_postgres = self.fence.is_paused() && farewell.is_none_or(|farewell| farewell.keep_postgres);
        self.life = Life::Leaving {
            until,
            outcome,
            keeps_postgres,
        };
        if !keeps_postgres && self.instance_left() {
            self.begin_ending(now, GRACE_MAX);
        }
    }

    /// Ends what does not end by itself in time, and says when nothing is left.
    pub(crate) fn go_on_leaving(&mut self, now: Boottime) -> Option<KeeperOutcome> {
        if let Life::Stopping { until, .. } = self.life {
            if self.agent.service.child().is_none() {
                // The order to stop found it between two lives.
                self.agent_gone(now);
            } else if until <= now {
                self.agent.service.kill();
            }
        }
        let Life::Leaving {
            until,
            outcome,
            keeps_postgres,
        } = self.life
        else {
            return None;
        };
        // Where PostgreSQL is ended, what the agent has left behind is ended with it.
        let postgres_settled = if keeps_postgres {
            self.agent_swept(now)
        } else {
            self.postmaster.is_none()
        };
        let proxy = self.proxy.as_ref().filter(|proxy| proxy.child().is_some());
        if let Some(proxy) = proxy
            && until <= now
        {
            proxy.kill();
        }
        (proxy.is_none() && self.ending.is_none() && postgres_settled).then_some(outcome)
    }

    pub(crate) fn signal_proxy(&self, signal: Signal) {
        if let Some(proxy) = self.proxy.as_ref().and_then(Service::child) {
            // It may just have ended.
            let _ = proxy.signal(signal);
        }
    }

    fn begin_stopping(&mut self, now: Boottime) {
        if self.life == Life::Running {
            self.life = Life::Stopping {
                since: now,
                until: now.plus(self.config.stop_timeout),
            };
            self.signal_proxy(Signal::TERM);
        }
    }
}
