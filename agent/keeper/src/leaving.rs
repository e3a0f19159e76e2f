//! How the keeper's own life ends: told by a signal, or by the agent.

use std::time::Duration;

use rustix::process::Signal;

use crate::child::Service;
use crate::clock::Boottime;
use crate::ending::GRACE_MAX;
use crate::keeper::{Keeper, KeeperOutcome};
use crate::protocol::Report;

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
                self.begin_ending(now, GRACE_MAX);
            }
            Life::Leaving { outcome, .. } => self.life = Life::Leaving { until: now, outcome },
        }
    }

    /// The agent is about to exit, and gets as much time for it as if it had been told to.
    pub(crate) fn agent_leaves(&mut self, code: u8, now: Boottime) {
        self.agent.leaving = Some(code);
        self.begin_stopping(now);
    }

    /// The agent has been reaped. Whether another one is started is settled here.
    pub(crate) fn agent_gone(&mut self, now: Boottime) {
        let Life::Stopping { until, .. } = self.life else {
            return;
        };
        let outcome = self
            .agent
            .leaving
            .map_or(KeeperOutcome::Stopped, |code| KeeperOutcome::AgentLeft { code });
        self.life = Life::Leaving { until, outcome };
        if self.instance_left() {
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
        let Life::Leaving { until, outcome } = self.life else {
            return None;
        };
        let proxy = self.proxy.as_ref().filter(|proxy| proxy.child().is_some());
        if let Some(proxy) = proxy
            && until <= now
        {
            proxy.kill();
        }
        (proxy.is_none() && self.ending.is_none() && self.postmaster.is_none()).then_some(outcome)
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
