//! PostgreSQL: a server on a data directory. It starts, takes writes, streams, is promoted, stops, and dies in pieces: a
//! backend may go on for a while when its postmaster is dead.

mod data;
mod sync;

use std::collections::BTreeMap;
use std::time::Duration;

use pgherd_agent::postgres::ControlState;

pub(crate) use self::data::{Data, lsn};
pub(crate) use self::sync::{Confirmed, SyncNames};
use crate::time::Time;

/// What a postmaster is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Recovers, and answers nobody.
    Starting {
        /// Whether it comes up as a standby.
        standby: bool,
    },
    /// Answers and replays.
    Standby,
    /// As a standby, with the order to become primary.
    Promoting,
    /// Takes writes.
    Primary,
    /// Has ended its sessions and writes its last.
    Stopping,
}

/// What a primary knows of one that streams from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sender {
    /// How many records the other said that it has flushed.
    pub(crate) flushed: usize,
}

/// A postmaster and its children.
#[derive(Clone, Debug)]
pub(crate) struct Run {
    /// No two postmasters of a run have the same.
    pub(crate) id: u64,
    pub(crate) mode: Mode,
    /// Since when it answers.
    pub(crate) up_since: Option<Time>,
    /// Accepts connections and answers none.
    pub(crate) hung: bool,
    /// Which member it is to stream from.
    pub(crate) upstream: Option<usize>,
    /// Whether it does.
    pub(crate) streaming: bool,
    /// How many records it has replayed.
    pub(crate) replayed: usize,
    pub(crate) sync: SyncNames,
    /// Whether backends wait at all: the checkpointer says so to them, later than the walsenders take the setting over.
    pub(crate) waits: bool,
    /// The setting that says so.
    pub(crate) sync_text: String,
    /// Who streams from it.
    pub(crate) senders: BTreeMap<usize, Sender>,
}

/// Backends whose postmaster is dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Orphans {
    /// Whose they were.
    pub(crate) run: u64,
    /// When they notice by themselves.
    pub(crate) until: Time,
    /// Whether sessions among them could write.
    pub(crate) writable: bool,
    /// Whether their commits would have to wait for somebody: nobody tells them any more.
    pub(crate) waits: bool,
}

/// PostgreSQL on one member.
#[derive(Clone, Debug, Default)]
pub(crate) struct Server {
    /// The data directory; nothing while it is empty.
    pub(crate) data: Option<Data>,
    pub(crate) run: Option<Run>,
    pub(crate) orphans: Option<Orphans>,
    /// Until then the kernel lets no process of it die.
    pub(crate) stuck_until: Time,
    /// Whether its last postmaster was killed.
    pub(crate) killed: bool,
    /// Settings as last written to the file: what commits wait for, and whom a standby streams from.
    pub(crate) sync_setting: String,
    pub(crate) upstream_setting: Option<usize>,
    /// What was in the way and has been moved aside.
    pub(crate) aside: Vec<Data>,
}

impl Run {
    /// Whether every process goes by the setting that the server shows.
    pub(crate) fn has_taken_over(&self) -> bool {
        self.waits == (self.sync != SyncNames::Off)
    }
}

impl Server {
    /// Whether any process is left.
    pub(crate) const fn is_left(&self) -> bool {
        self.run.is_some() || self.orphans.is_some()
    }

    pub(crate) fn mode(&self) -> Option<Mode> {
        self.run.as_ref().map(|run| run.mode)
    }

    /// A postmaster is started on the data.
    pub(crate) fn start(&mut self, id: u64) -> bool {
        let Some(data) = &self.data else { return false };
        if self.is_left() {
            return false;
        }
        self.run = Some(Run {
            id,
            mode: Mode::Starting {
                standby: data.standby_signal,
            },
            up_since: None,
            hung: false,
            upstream: self.upstream_setting.filter(|_| data.standby_signal),
            streaming: false,
            replayed: data.log.len(),
            sync: SyncNames::parse(&self.sync_setting),
            waits: SyncNames::parse(&self.sync_setting) != SyncNames::Off,
            sync_text: self.sync_setting.clone(),
            senders: BTreeMap::new(),
        });
        true
    }

    /// Recovery is over, or consistent. Says whether it takes writes now.
    pub(crate) fn come_up(&mut self, id: u64, record: u64) -> bool {
        let (Some(run), Some(data)) = (&mut self.run, &mut self.data) else {
            return false;
        };
        if run.id != id {
            return false;
        }
        match run.mode {
            Mode::Starting { standby: true } => {
                run.mode = Mode::Standby;
                data.state = ControlState::InArchiveRecovery;
            }
            Mode::Starting { standby: false } => {
                // What follows a crash is a checkpoint on the same timeline, and so is what follows a stop in order.
                data.write_checkpoint(record);
                run.mode = Mode::Primary;
                run.replayed = data.log.len();
                data.state = ControlState::InProduction;
                return true;
            }
            Mode::Standby | Mode::Promoting | Mode::Primary | Mode::Stopping => {}
        }
        false
    }

    /// A promotion that was asked for is through.
    pub(crate) fn become_primary(&mut self, id: u64, record: u64) -> bool {
        let (Some(run), Some(data)) = (&mut self.run, &mut self.data) else {
            return false;
        };
        if run.id != id || run.mode != Mode::Promoting {
            return false;
        }
        run.mode = Mode::Primary;
        run.streaming = false;
        run.upstream = None;
        data.fork(record);
        run.replayed = data.log.len();
        true
    }

    /// The last record of a stop in order. Its sessions have ended before.
    pub(crate) fn write_shutdown(&mut self, id: u64, record: u64, was_primary: bool) {
        let (Some(run), Some(data)) = (&self.run, &mut self.data) else {
            return;
        };
        if run.id != id {
            return;
        }
        if was_primary {
            data.write_checkpoint(record);
            data.state = ControlState::ShutDown;
        } else {
            data.state = ControlState::ShutDownInRecovery;
        }
    }

    /// Every process has ended by itself.
    pub(crate) fn gone(&mut self) {
        self.killed = false;
        self.run = None;
        self.orphans = None;
    }

    /// SIGKILL to every process. Says whether any was found; it may be left for as long as the kernel holds it.
    pub(crate) fn kill_all(&mut self, now: Time) -> bool {
        let found = self.is_left();
        if now >= self.stuck_until {
            self.killed |= self.run.is_some();
            self.run = None;
            self.orphans = None;
        }
        found
    }

    /// The postmaster alone is killed.
    pub(crate) fn lose_postmaster(&mut self, orphans_until: Time) -> bool {
        let Some(run) = self.run.take() else { return false };
        self.killed = true;
        let writable = run.mode == Mode::Primary && !run.hung;
        self.orphans = Some(Orphans {
            run: run.id,
            until: orphans_until,
            writable,
            waits: run.waits,
        });
        true
    }

    /// Whether a session of that postmaster may still write.
    pub(crate) fn session_lives(&self, run: u64) -> bool {
        self.run
            .as_ref()
            .is_some_and(|here| here.id == run && here.mode == Mode::Primary)
            || self
                .orphans
                .is_some_and(|orphans| orphans.run == run && orphans.writable)
    }

    /// The postmaster that a new session could write through.
    pub(crate) fn writable_run(&self) -> Option<u64> {
        let run = self.run.as_ref()?;
        (run.mode == Mode::Primary && !run.hung).then_some(run.id)
    }

    /// The standbys that stream, as the primary knows them.
    pub(crate) fn confirmed<'a>(&self, names: &'a [String]) -> Vec<Confirmed<'a>> {
        let Some(run) = &self.run else { return Vec::new() };
        let of = |(member, sender): (&usize, &Sender)| {
            Some(Confirmed {
                name: names.get(*member)?.as_str(),
                flushed: sender.flushed,
            })
        };
        run.senders.iter().filter_map(of).collect()
    }

    /// Whether the commit in the `position`th record may be acknowledged. Without a postmaster nobody confirms any more,
    /// but a session that need not wait goes on.
    pub(crate) fn commit_may_return(&self, position: usize, names: &[String]) -> bool {
        match &self.run {
            Some(run) => !run.waits || run.sync.satisfied(position, &self.confirmed(names)),
            None => self.orphans.is_some_and(|orphans| !orphans.waits),
        }
    }

    /// The files are read again, by all but the checkpointer. Says whether it matters when that does: without names those
    /// who wait are let go, which is no matter.
    pub(crate) fn reload(&mut self) -> bool {
        let Some(run) = &mut self.run else { return false };
        run.sync = SyncNames::parse(&self.sync_setting);
        run.sync_text.clone_from(&self.sync_setting);
        run.waits &= run.sync != SyncNames::Off;
        !run.has_taken_over()
    }

    /// The checkpointer has read them too.
    pub(crate) fn reload_checkpointer(&mut self, id: u64) {
        if let Some(run) = self.run.as_mut().filter(|run| run.id == id) {
            run.waits = run.sync != SyncNames::Off;
        }
    }

    /// Puts a whole copy in the place of what was there, which is kept.
    pub(crate) fn replace_data(&mut self, copy: Data) {
        if let Some(old) = self.data.replace(copy) {
            self.aside.push(old);
        }
    }
}

/// How long things take.
pub(crate) mod pace {
    use super::Duration;
    use crate::random::Random;

    pub(crate) fn start(random: &mut Random) -> Duration {
        random.millis(40, 400)
    }

    pub(crate) fn promote(random: &mut Random) -> Duration {
        random.millis(50, 200)
    }

    pub(crate) fn initdb(random: &mut Random) -> Duration {
        random.millis(800, 2000)
    }

    pub(crate) fn clone(random: &mut Random) -> Duration {
        random.millis(1000, 4000)
    }

    pub(crate) fn checkpoint(random: &mut Random) -> Duration {
        random.millis(10, 300)
    }

    /// Until the checkpointer looks at its settings: now, or when it has synced its files.
    pub(crate) fn checkpointer(random: &mut Random) -> Duration {
        let most = if random.chance(150) { 3000 } else { 20 };
        random.millis(0, most)
    }

    pub(crate) fn orphans(random: &mut Random) -> Duration {
        random.millis(0, 4000)
    }
}

#[cfg(test)]
mod tests;
