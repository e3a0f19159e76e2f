//! What changes around the keeper without waking it: servers that others start, and the watchdog's device.

use std::io;

use rustix::process::Pid;

use crate::clock::Boottime;
use crate::keeper::{Keeper, TURN_MAX};
use crate::protocol::{Malformed, Refusal, Report, WatchdogState, pid};
use crate::requests::system;
use crate::wire::{Reader, Writer};

/// What the agent has been told of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Surroundings {
    /// Not handed to the keeper after an upgrade, which looks at once.
    look_at: Option<Boottime>,
    /// A postmaster that is neither a child of ours nor adopted.
    pub(crate) stranger: Option<Pid>,
    pub(crate) watchdog: WatchdogState,
    /// The agent was told that something is left of an instance whose end is not under way: whoever waits for that end is to
    /// hear of it.
    pub(crate) left_told: bool,
}

impl Surroundings {
    pub(crate) fn encode(&self, writer: &mut Writer<'_>) {
        writer.option(self.stranger, |writer, pid| writer.i32(pid.as_raw_nonzero().get()));
        writer.u8(self.watchdog as u8);
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            look_at: None,
            stranger: reader.option(pid)?,
            watchdog: WatchdogState::decode(reader.u8()?)?,
            left_told: false,
        })
    }
}

impl Keeper {
    /// Looks about once a second, and says what has changed.
    pub(crate) fn look_around(&mut self, now: Boottime) {
        if self.surroundings.look_at.is_some_and(|look_at| now < look_at) {
            return;
        }
        self.surroundings.look_at = Some(now.plus(TURN_MAX));
        self.list_adopted();
        self.look_for_stranger();
        self.look_for_what_is_left();
        let watchdog = self.watchdog.state(now);
        if watchdog != self.surroundings.watchdog {
            self.report_watchdog(watchdog);
        }
    }

    pub(crate) fn report_watchdog(&mut self, state: WatchdogState) {
        self.surroundings.watchdog = state;
        self.agent.report(&Report::Watchdog { state });
    }

    /// The postmaster that runs in the data directory although it is none of ours, if there is one.
    pub(crate) fn stranger(&mut self) -> Option<Pid> {
        // While ours runs, or its end is under way, there can be no other.
        if self.postmaster.is_some() || self.ending.is_some() {
            return None;
        }
        self.instance.living_postmaster()
    }

    /// Looks for one, and tells the agent what is new.
    pub(crate) fn look_for_stranger(&mut self) -> Option<Pid> {
        let stranger = self.stranger();
        if stranger != self.surroundings.stranger {
            self.surroundings.stranger = stranger;
            match stranger {
                Some(pid) => self.log.line(format_args!("postmaster {pid} is not ours")),
                None => self.log.line(format_args!("the postmaster that was not ours is gone")),
            }
            self.agent.report(&Report::Stranger { pid: stranger });
            // It has left by itself. What it may have left behind is ended when the agent asks for that.
            self.surroundings.left_told |= stranger.is_none();
            self.look_for_what_is_left();
        }
        stranger
    }

    /// Processes that lost their postmaster in a pause, before this keeper began, end by themselves.
    fn look_for_what_is_left(&mut self) {
        if !self.surroundings.left_told {
            return;
        }
        let looked_after = self.postmaster.is_some() || self.ending.is_some() || self.surroundings.stranger.is_some();
        if looked_after {
            self.surroundings.left_told = false;
        } else if !self.instance_left() {
            self.surroundings.left_told = false;
            self.agent.report(&Report::Ended);
        }
    }

    /// Notes who belongs to an adopted postmaster: when it is dead, nobody else can tell.
    pub(crate) fn list_adopted(&mut self) {
        if !self
            .postmaster
            .as_ref()
            .is_some_and(|postmaster| postmaster.is_adopted())
        {
            return;
        }
        let household = self.household();
        if let Err(error) = self.instance.list(&household) {
            self.log.line(format_args!("listing PostgreSQL's processes: {error}"));
        }
    }

    /// Takes the stranger for our own.
    pub(crate) fn adopt(&mut self, writable: bool) -> Result<Pid, Refusal> {
        if self.postmaster.is_some() || self.ending.is_some() {
            return Err(Refusal::InstanceLeft);
        }
        let Some(pid) = self.instance.living_postmaster() else {
            // It has ended since the agent was told of it: who asks again and again is told that now.
            self.look_for_stranger();
            return Err(Refusal::NoPostmaster);
        };
        let postmaster = self.instance.adopt(pid).map_err(|error: io::Error| system(&error))?;
        self.log.line(format_args!("postmaster {pid} is adopted"));
        self.postmaster = Some(postmaster);
        self.fence.instance_adopted(writable);
        self.surroundings.stranger = None;
        self.list_adopted();
        Ok(pid)
    }
}
