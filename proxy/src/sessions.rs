//! The sessions that are open, so that others can find and end them: the fence, the drain, cancel requests.
//!
//! A shard per worker. Its lock is taken when a session opens, learns its cancel key or closes, never while bytes move.

use std::collections::{BTreeSet, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pgherd_cluster::clock::Boottime;
use tokio::sync::oneshot;

use crate::client::{About, SessionLine};
use crate::route::{Footing, Outlived};
use crate::wire::startup::CancelKey;

/// Why a session is ended from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    /// It may not outlive its leader.
    Outlived(Outlived),
    /// The proxy stops, and its grace period is over.
    Stopping,
}

impl Ending {
    /// The label in metrics.
    pub(crate) const fn label(&self) -> &'static str {
        match self {
            Self::Outlived(Outlived::EpochOver { .. }) => "epoch_over",
            Self::Outlived(Outlived::WarrantLapsed) => "warrant_lapsed",
            Self::Outlived(Outlived::Promoted { .. }) => "promoted",
            Self::Outlived(Outlived::Silent { .. }) => "silent",
            Self::Outlived(Outlived::Strayed { .. }) => "strayed",
            Self::Outlived(Outlived::Moved { .. }) => "moved",
            Self::Stopping => "stopping",
        }
    }
}

/// What becomes of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It ends, wherever it is.
    End(Ending),
    /// It ends when it is between two transactions.
    Leave(Ending),
}

/// What a session is told.
#[derive(Debug)]
pub(crate) enum Word {
    /// End now.
    End(Ending),
    /// End between two transactions, for this reason. What else there is to say comes by the new receiver: a session that
    /// is never idle may still have to end.
    Leave(Ending, Told),
}

/// Where a session hears of it. In a box, since hardly any is told anything, and each keeps room for it.
pub(crate) type Told = oneshot::Receiver<Box<Word>>;

struct Entry {
    about: Arc<About>,
    footing: Footing,
    server: Server,
    key: Option<CancelKey>,
    /// Gone once the session has been told to end.
    end: Option<oneshot::Sender<Box<Word>>>,
    /// It has been asked to leave.
    leaves: bool,
}

impl Entry {
    /// Tells the session, and says whether that was news to it.
    fn tell(&mut self, verdict: Verdict) -> bool {
        let Some(end) = self.end.take() else { return false };
        match verdict {
            Verdict::End(ending) => end.send(Box::new(Word::End(ending))).is_ok(),
            Verdict::Leave(_) if self.leaves => {
                self.end = Some(end);
                false
            }
            Verdict::Leave(ending) => {
                let (again, more) = oneshot::channel();
                self.leaves = true;
                self.end = Some(again);
                end.send(Box::new(Word::Leave(ending, more))).is_ok()
            }
        }
    }
}

#[derive(Default)]
struct Shard {
    next: u64,
    /// In boxes: a table has room to spare, and grows under the lock.
    entries: HashMap<u64, Box<Entry>>,
    /// The process id of each server that is known, and the session. Process ids repeat between servers.
    by_process_id: BTreeSet<([u8; 4], u64)>,
}

/// All open sessions.
pub(crate) struct Sessions {
    shards: Box<[Mutex<Shard>]>,
}

/// One session as it is told to people.
#[derive(Clone, Debug)]
pub(crate) struct OpenSession {
    /// From 1 up; no other session of this process has had it.
    pub(crate) number: u64,
    pub(crate) about: Arc<About>,
    /// When its server was connected to.
    pub(crate) since: Boottime,
    /// The server's address.
    pub(crate) server: SocketAddr,
    /// The server's process; nothing until it has told it, and where its bytes are not ours to read.
    pub(crate) server_pid: Option<i32>,
    /// It has been asked to leave.
    pub(crate) leaves: bool,
}

/// A session's place in the table; dropping it takes the session out.
pub(crate) struct Registration {
    sessions: Arc<Sessions>,
    shard: usize,
    id: u64,
    /// What the log says of it.
    line: Option<Arc<SessionLine>>,
}

/// Where a session has its server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Server {
    /// Of the addresses that its name stands for, the one that was connected to.
    pub(crate) at: SocketAddr,
    /// The name, for its certificate.
    pub(crate) host: String,
}

impl Sessions {
    pub(crate) fn new(shards: usize) -> Arc<Self> {
        let shards = (0..shards).map(|_| Mutex::default()).collect();
        Arc::new(Self { shards })
    }

    /// A panic while the lock was held left a whole entry or none, so the table is good.
    fn lock(&self, shard: usize) -> Option<MutexGuard<'_, Shard>> {
        let shard = self.shards.get(shard)?;
        Some(shard.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Enters a session. The caller looks at the evidence again *after* this: a change before it was nobody's to tell.
    pub(crate) fn enter(
        self: &Arc<Self>,
        shard: usize,
        about: &Arc<About>,
        footing: Footing,
        server: Server,
    ) -> (Registration, Told) {
        let (end, ended) = oneshot::channel();
        let mut id = 0;
        if let Some(mut shard) = self.lock(shard) {
            id = shard.next;
            shard.next += 1;
            let entry = Entry {
                about: Arc::clone(about),
                footing,
                server,
                key: None,
                end: Some(end),
                leaves: false,
            };
            shard.entries.insert(id, Box::new(entry));
        }
        let registration = Registration {
            sessions: Arc::clone(self),
            shard,
            id,
            line: None,
        };
        (registration, ended)
    }

    /// Tells every session for which `judge` gives a verdict, and leaves the others on the footing that it gave them. It also
    /// hears who has been asked to leave. Answers how many were told.
    pub(crate) fn tell_where(&self, mut judge: impl FnMut(&mut Footing, bool) -> Option<Verdict>) -> usize {
        let mut told = 0;
        for index in 0..self.shards.len() {
            let Some(mut shard) = self.lock(index) else { continue };
            for entry in shard.entries.values_mut() {
                if let Some(verdict) = judge(&mut entry.footing, entry.leaves) {
                    told += usize::from(entry.tell(verdict));
                }
            }
        }
        told
    }

    /// Looks at every session, and at whether it has been asked to leave.
    pub(crate) fn for_each(&self, mut look: impl FnMut(&Footing, bool)) {
        for shard in (0..self.shards.len()).filter_map(|index| self.lock(index)) {
            shard
                .entries
                .values()
                .for_each(|entry| look(&entry.footing, entry.leaves));
        }
    }

    /// Every session, shard by shard, for people who ask: no lock is held for longer than one shard takes.
    pub(crate) fn list(&self) -> Vec<OpenSession> {
        let mut found = Vec::new();
        for (index, shard) in (0..self.shards.len()).filter_map(|index| Some((index, self.lock(index)?))) {
            found.extend(shard.entries.iter().map(|(id, entry)| OpenSession {
                number: id * self.shards.len() as u64 + index as u64 + 1,
                about: Arc::clone(&entry.about),
                since: entry.footing.since,
                server: entry.server.at,
                server_pid: entry.key.as_ref().map(|key| i32::from_be_bytes(key.process_id())),
                leaves: entry.leaves,
            }));
        }
        found.sort_by_key(|session| session.number);
        found
    }

    /// Whether any session rests on a holding of the leader key.
    pub(crate) fn any_with_epoch(&self) -> bool {
        (0..self.shards.len()).any(|index| {
            let shard = self.lock(index);
            shard.is_some_and(|shard| shard.entries.values().any(|entry| entry.footing.epoch.is_some()))
        })
    }

    /// The server of the session that `key` was given to.
    pub(crate) fn find(&self, key: &CancelKey) -> Option<Server> {
        (0..self.shards.len()).find_map(|index| {
            let shard = self.lock(index)?;
            let process_id = key.process_id();
            let mut with_it = shard.by_process_id.range((process_id, 0)..=(process_id, u64::MAX));
            with_it.find_map(|(_, id)| {
                let entry = shard.entries.get(id)?;
                entry.key.as_ref()?.matches(key).then(|| entry.server.clone())
            })
        })
    }
}

impl Registration {
    /// Has the log told of the session once its server's process is known.
    pub(crate) fn describe(&mut self, line: Option<Arc<SessionLine>>) {
        self.line = line;
    }

    /// What the log says of the session.
    pub(crate) fn line(&self) -> Option<Arc<SessionLine>> {
        self.line.clone()
    }

    /// Notes the key that cancels this session's queries.
    pub(crate) fn learn_key(&self, key: CancelKey) {
        let Some(mut guard) = self.sessions.lock(self.shard) else {
            return;
        };
        let shard = &mut *guard;
        let Some(entry) = shard.entries.get_mut(&self.id) else {
            return;
        };
        if entry.key.is_some() {
            return;
        }
        let process_id = key.process_id();
        shard.by_process_id.insert((process_id, self.id));
        entry.key = Some(key);
        drop(guard);
        if let Some(line) = &self.line {
            line.begins(i32::from_be_bytes(process_id));
        }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        let Some(mut guard) = self.sessions.lock(self.shard) else {
            return;
        };
        let shard = &mut *guard;
        let Some(key) = shard.entries.remove(&self.id).and_then(|entry| entry.key) else {
            return;
        };
        shard.by_process_id.remove(&(key.process_id(), self.id));
    }
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::view::Epoch;

    use super::*;
    use crate::admission::Who;
    use crate::config::OnChange;
    use crate::peer::Peer;
    use crate::testing::name;

    fn server(port: u16) -> Server {
        Server {
            at: SocketAddr::from(([127, 0, 0, 1], port)),
            host: "localhost".to_owned(),
        }
    }

    fn about() -> Arc<About> {
        Arc::new(About {
            peer: Peer::Unix,
            who: Who::default(),
            application_name: None,
            listener: 0,
            by_tls: false,
            since: Boottime::from_nanos(0),
        })
    }

    fn footing(epoch: Option<Epoch>) -> Footing {
        Footing {
            member: name("n1"),
            epoch,
            on_promoted: OnChange::End,
            listener: 0,
            in_clear: true,
            since: Boottime::from_nanos(0),
        }
    }

    fn key(bytes: &'static [u8]) -> CancelKey {
        CancelKey::new(bytes).expect("a valid key")
    }

    #[test]
    fn a_key_leads_to_its_session_among_others_with_the_same_process_id() {
        let sessions = Sessions::new(2);
        let (first, _first_end) = sessions.enter(0, &about(), footing(None), server(1));
        let (second, _second_end) = sessions.enter(1, &about(), footing(None), server(2));
        let (third, _third_end) = sessions.enter(1, &about(), footing(None), server(3));
        first.learn_key(key(b"pid.secret-1"));
        second.learn_key(key(b"pid.secret-2"));
        third.learn_key(key(b"pid.secret-3"));
        assert_eq!(sessions.find(&key(b"pid.secret-3")), Some(server(3)));
        assert_eq!(sessions.find(&key(b"pid.secret-4")), None);
        drop(third);
        assert_eq!(sessions.find(&key(b"pid.secret-3")), None);
        assert_eq!(sessions.find(&key(b"pid.secret-2")), Some(server(2)));
        drop((first, second));
        assert!(sessions.shards.iter().all(|shard| {
            let shard = shard.lock().expect("nobody panicked");
            shard.entries.is_empty() && shard.by_process_id.is_empty()
        }));
    }

    #[test]
    fn only_those_judged_are_told_and_only_once() {
        let sessions = Sessions::new(1);
        let epoch = Epoch {
            holder: name("n1"),
            create_revision: 1,
        };
        let (_writer, mut writer_end) = sessions.enter(0, &about(), footing(Some(epoch)), server(1));
        let (_reader, mut reader_end) = sessions.enter(0, &about(), footing(None), server(2));
        let judge = |footing: &mut Footing, _| {
            let lapsed = Verdict::End(Ending::Outlived(Outlived::WarrantLapsed));
            footing.epoch.is_some().then_some(lapsed)
        };
        assert_eq!(sessions.tell_where(judge), 1);
        assert_eq!(sessions.tell_where(judge), 0);
        assert!(matches!(
            writer_end.try_recv().map(|word| *word),
            Ok(Word::End(Ending::Outlived(Outlived::WarrantLapsed)))
        ));
        assert!(reader_end.try_recv().is_err());
    }

    #[test]
    fn one_that_was_asked_to_leave_can_still_be_ended_and_is_asked_once() {
        let sessions = Sessions::new(1);
        let (_reader, mut told) = sessions.enter(0, &about(), footing(None), server(1));
        let moved = || Ending::Outlived(Outlived::Moved { member: name("n1") });
        assert_eq!(sessions.tell_where(|_, _| Some(Verdict::Leave(moved()))), 1);
        assert_eq!(sessions.tell_where(|_, _| Some(Verdict::Leave(moved()))), 0);
        let mut leaving = 0;
        sessions.for_each(|_, leaves| leaving += usize::from(leaves));
        assert_eq!(leaving, 1);
        let Ok(Word::Leave(why, mut more)) = told.try_recv().map(|word| *word) else {
            panic!("it was asked");
        };
        assert_eq!(why, moved());
        assert_eq!(sessions.tell_where(|_, _| Some(Verdict::End(Ending::Stopping))), 1);
        assert!(matches!(
            more.try_recv().map(|word| *word),
            Ok(Word::End(Ending::Stopping))
        ));
        // There is nobody left to ask.
        assert_eq!(sessions.tell_where(|_, _| Some(Verdict::Leave(moved()))), 0);
    }
}
