//! What the keeper does with the agent's requests.

use std::io;
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::process::{Pid, Signal};

use crate::child::Child;
use crate::clock::Boottime;
use crate::ending::GRACE_MAX;
use crate::error::KeeperError;
use crate::fence::Armed;
use crate::keeper::Keeper;
use crate::postmaster::Postmaster;
use crate::protocol::{PostmasterSignal, Refusal, Report, Request, RequestKind, Start};
use crate::seat::{Farewell, Received};
use crate::watchdog::Unusable;

/// How many requests are handled before the loop looks at everything else again.
const REQUESTS_MAX: usize = 64;
/// How many times that number a dead agent's socket may hold.
const LAST_ROUNDS_MAX: usize = 16;

impl Keeper {
    /// Handles what the agent has sent, or its first part. Returns whether there may be more.
    pub(crate) fn heed_agent(&mut self) -> Result<bool, KeeperError> {
        for _ in 0..REQUESTS_MAX {
            match self.agent.receive() {
                Received::Request(request) => self.handle(request)?,
                Received::Nothing => return Ok(false),
                Received::Closed => {
                    self.agent.dismiss();
                    return Ok(false);
                }
                Received::Malformed(malformed) => {
                    self.log.line(format_args!("killing the agent: {malformed}"));
                    self.agent.dismiss();
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Handles what a dead agent has sent before its end.
    pub(crate) fn heed_last_words(&mut self) -> Result<(), KeeperError> {
        for _ in 0..LAST_ROUNDS_MAX {
            if !self.heed_agent()? {
                break;
            }
        }
        Ok(())
    }

    fn handle(&mut self, request: Request) -> Result<(), KeeperError> {
        let now = Boottime::now();
        // No request may come before a fence that is due.
        self.enforce_fence(now);
        match request {
            Request::Arm { term, deadline, margin } => return self.arm(Armed { term, deadline, margin }, now),
            Request::Disarm => return self.disarm(),
            Request::Pause => return self.pause(now),
            Request::Start(start) => match self.start(&start) {
                Ok(pid) => self.agent.report(&Report::Started { pid }),
                Err(why) => self.refuse(RequestKind::Start, why),
            },
            Request::Signal(signal) => {
                if let Err(why) = self.signal_postmaster(signal, now) {
                    self.refuse(RequestKind::Signal, why);
                }
            }
            Request::End => self.begin_ending(now, GRACE_MAX),
            Request::Remember { memo } => {
                if let Err(error) = self.memo.set(memo) {
                    self.log.line(format_args!("the memo is kept in memory only: {error}"));
                }
            }
            Request::Leave { keep_postgres, .. } if keep_postgres && !self.fence.is_paused() => {
                self.refuse(RequestKind::Leave, Refusal::NotPaused);
            }
            Request::Watchdog(settings) => {
                self.watchdog.set(settings, &self.log);
                self.report_watchdog(self.watchdog.state(now));
            }
            Request::Adopt { writable } => match self.adopt(writable) {
                Ok(pid) => self.agent.report(&Report::Adopted { pid }),
                Err(why) => self.refuse(RequestKind::Adopt, why),
            },
            Request::Leave { code, keep_postgres } => self.agent_leaves(Farewell { code, keep_postgres }, now),
        }
        Ok(())
    }

    fn arm(&mut self, asked: Armed, now: Boottime) -> Result<(), KeeperError> {
        match self.try_to_arm(asked, now) {
            Ok(armed) => {
                self.publish_notice()?;
                self.agent.report(&Report::Armed {
                    term: armed.term,
                    deadline: armed.deadline,
                });
            }
            Err(why) => self.refuse(RequestKind::Arm, why),
        }
        Ok(())
    }

    fn try_to_arm(&mut self, asked: Armed, now: Boottime) -> Result<Armed, Refusal> {
        if self.look_for_stranger().is_some() {
            return Err(Refusal::Stranger);
        }
        let household = self.household();
        let ending = self.ending.is_some();
        // The watchdog is pinged for what the fence accepts, and the fence accepts nothing that the watchdog cannot guard.
        let mut accepted = self.fence.clone();
        let armed = accepted.arm(asked, now, || ending || self.instance.is_left(Some(&household)))?;
        if self.fence.armed() == Some(armed) {
            // No proof but an older one: nothing has been renewed.
            return Ok(armed);
        }
        let renewed = self.watchdog.renew(now, &self.log);
        let fires_at = renewed.map_err(|Unusable| Refusal::WatchdogUnusable)?;
        // Whether anything is left was asked a moment ago.
        self.fence.arm(asked.over_by(fires_at), now, || false)
    }

    fn disarm(&mut self) -> Result<(), KeeperError> {
        let household = self.household();
        let ending = self.ending.is_some();
        match self.fence.disarm(|| ending || self.instance.is_left(Some(&household))) {
            Ok(()) => {
                self.publish_notice()?;
                self.watchdog.stop(&self.log);
                self.agent.report(&Report::Disarmed);
            }
            Err(why) => self.refuse(RequestKind::Disarm, why),
        }
        Ok(())
    }

    fn pause(&mut self, now: Boottime) -> Result<(), KeeperError> {
        match self.fence.pause(now) {
            Ok(()) => {
                self.publish_notice()?;
                self.watchdog.stop(&self.log);
                self.agent.report(&Report::Paused);
            }
            Err(why) => self.refuse(RequestKind::Pause, why),
        }
        Ok(())
    }

    fn start(&mut self, start: &Start) -> Result<Pid, Refusal> {
        if self.instance_left() {
            return Err(Refusal::InstanceLeft);
        }
        // Looking for the instance has taken a moment.
        if start.writable && !self.fence.may_become_writable(Boottime::now()) {
            return Err(Refusal::NotArmed);
        }
        let mut command = Command::new(&start.program);
        keep_to_ourselves(&mut command);
        command
            .args(&start.args)
            .envs(start.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
        let postmaster = Child::spawn(&mut command).map_err(|error| system(&error))?;
        let pid = postmaster.pid();
        self.postmaster = Some(Postmaster::started(postmaster));
        if start.writable {
            self.fence.becomes_writable();
        }
        Ok(pid)
    }

    fn signal_postmaster(&mut self, signal: PostmasterSignal, now: Boottime) -> Result<(), Refusal> {
        let postmaster = self.postmaster.as_ref().ok_or(Refusal::NoPostmaster)?;
        let signal = match signal {
            PostmasterSignal::Reload => Signal::HUP,
            PostmasterSignal::Promote if !self.fence.may_become_writable(now) => return Err(Refusal::NotArmed),
            PostmasterSignal::Promote => {
                self.fence.becomes_writable();
                Signal::USR1
            }
            PostmasterSignal::StopFast => Signal::INT,
            PostmasterSignal::StopImmediate => Signal::QUIT,
        };
        postmaster.signal(signal).map_err(|error| system(&error))
    }

    fn refuse(&mut self, what: RequestKind, why: Refusal) {
        self.log.line(format_args!("{what:?} refused: {why}"));
        self.agent.report(&Report::Refused { what, why });
    }
}

pub(crate) fn system(error: &io::Error) -> Refusal {
    // An error without a number is the standard library's own, about an argument.
    Refusal::System(error.raw_os_error().unwrap_or(Errno::INVAL.raw_os_error()))
}

/// What is meant for us is not PostgreSQL's, nor that of the programs that it runs: passwords are among it.
fn keep_to_ourselves(command: &mut Command) {
    for (name, value) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text == "PG_MALLOC_ARENA_MAX" {
            command.env("MALLOC_ARENA_MAX", value);
        }
        if text == "NOTIFY_SOCKET" || ["PATRONI_", "PGHERD_"].iter().any(|prefix| text.starts_with(prefix)) {
            command.env_remove(name);
        }
    }
}
