//! Who asked for what, and who was hit.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tokio::time::{MissedTickBehavior, interval};

use super::session::Way;

/// Statements of a session before there is another one in its place.
const STATEMENTS_MAX: u64 = 150;
/// One cancel in so many goes to the session that was there before, whose key is nobody's any more.
const STALE_ONE_IN: u64 = 12;

/// A statement from its sending to its answer.
struct Asked {
    number: u64,
    began: Instant,
    ended: Instant,
    cancelled: bool,
}

/// A cancel from before its sending until it was let go.
struct Sent {
    began: Instant,
    ended: Instant,
}

/// A session's number in the ledger, and its key.
type Known = (usize, Vec<u8>);

/// A place for one session after the other.
#[derive(Default)]
struct Slot {
    port: usize,
    now: Option<Known>,
    before: Option<Known>,
}

#[derive(Default)]
struct Book {
    slots: Vec<Slot>,
    /// By session.
    asked: BTreeMap<usize, Vec<Asked>>,
    sent: BTreeMap<usize, Vec<Sent>>,
}

/// Sessions and cancels until all cancels have been sent.
pub(super) struct Race {
    book: Mutex<Book>,
    to_send: AtomicUsize,
    sessions: AtomicUsize,
    cancellers: AtomicUsize,
}

/// What became of a race.
#[derive(Debug)]
#[expect(dead_code, reason = "shown")]
pub(super) struct Judged {
    sessions: usize,
    statements: usize,
    cancels: usize,
    /// Statements that were cancelled.
    pub(super) hit: usize,
    /// Of them, those whose cancel was on its way before they began, and let go after that.
    hit_from_before: usize,
    /// Statements that could have been hit without being astray: the smaller a part of all, the more a race says.
    explainable: usize,
}

impl Race {
    pub(super) fn new(cancels: usize) -> Self {
        Self {
            book: Mutex::default(),
            to_send: AtomicUsize::new(cancels),
            sessions: AtomicUsize::new(0),
            cancellers: AtomicUsize::new(super::CANCELLERS),
        }
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add_slot(&self, port: usize) {
        self.book().slots.push(Slot {
            port,
            ..Slot::default()
        });
    }

    pub(super) fn all_have_keys(&self) -> bool {
        self.book().slots.iter().all(|slot| slot.now.is_some())
    }

    /// A new session in a place; the one before is remembered.
    fn seat(&self, slot: usize, key: &[u8]) -> usize {
        let number = self.sessions.fetch_add(1, Ordering::Relaxed);
        if let Some(slot) = self.book().slots.get_mut(slot) {
            slot.before = slot.now.replace((number, key.to_vec()));
        }
        number
    }

    fn goes_on(&self) -> bool {
        self.cancellers.load(Ordering::Relaxed) > 0
    }

    /// The next to be cancelled: port, session and key.
    fn draw(&self, draw: &mut Draw) -> Option<(usize, usize, Vec<u8>)> {
        let left = self
            .to_send
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        left.ok()?;
        let book = self.book();
        let slot = &book.slots[draw.below(book.slots.len())];
        let stale = slot
            .before
            .as_ref()
            .filter(|_| draw.next().is_multiple_of(STALE_ONE_IN));
        let (session, key) = stale.or(slot.now.as_ref())?;
        Some((slot.port, *session, key.clone()))
    }

    /// Holds every statement that was cancelled against the cancels of its own session.
    pub(super) fn judge(&self) -> Result<Judged> {
        let book = self.book();
        let mut judged = Judged {
            sessions: book.asked.len(),
            statements: book.asked.values().map(Vec::len).sum(),
            cancels: book.sent.values().map(Vec::len).sum(),
            hit: 0,
            hit_from_before: 0,
            explainable: 0,
        };
        for (session, asked) in &book.asked {
            let sent = book.sent.get(session).map(Vec::as_slice).unwrap_or_default();
            let mut since = None;
            for statement in asked {
                let from = since.replace(statement.began).unwrap_or(statement.began);
                let mut own = sent
                    .iter()
                    .filter(|cancel| cancel.began <= statement.ended && cancel.ended >= from);
                let is_explained = own.next().is_some();
                judged.explainable += usize::from(is_explained);
                if statement.cancelled {
                    ensure!(
                        is_explained,
                        "statement {} of session {session} was cancelled, and nobody had asked for it",
                        statement.number
                    );
                    judged.hit += 1;
                    let during = |cancel: &Sent| cancel.began <= statement.ended && cancel.ended >= statement.began;
                    judged.hit_from_before += usize::from(!sent.iter().any(during));
                }
            }
        }
        Ok(judged)
    }
}

/// Runs numbered statements of a few milliseconds, in one session after the other, until no cancel comes any more.
pub(super) async fn ask_on(way: Way, slot: usize, race: Arc<Race>) -> Result<()> {
    let mut draw = Draw::new(slot);
    while race.goes_on() {
        let mut session = way.connect().await?;
        let number = race.seat(slot, session.key());
        for statement in 0..STATEMENTS_MAX {
            let text = format!("SELECT pg_sleep(0.00{}), {statement}", 1 + draw.below(9));
            let began = Instant::now();
            let answered = session
                .ask(&text, &statement.to_string())
                .await
                .with_context(|| format!("session {number}"))?;
            race.book().asked.entry(number).or_default().push(Asked {
                number: statement,
                began,
                ended: Instant::now(),
                cancelled: !answered,
            });
            if !race.goes_on() {
                break;
            }
        }
    }
    Ok(())
}

/// Cancels whoever comes up, until enough has been sent.
pub(super) async fn cancel_at_random(
    ways: [Way; 2],
    number: usize,
    pace: Option<Duration>,
    race: Arc<Race>,
) -> Result<()> {
    let mut draw = Draw::new(1000 + number);
    let mut pace = pace.map(interval);
    if let Some(pace) = &mut pace {
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    }
    while let Some((port, session, key)) = race.draw(&mut draw) {
        if let Some(pace) = &mut pace {
            pace.tick().await;
        }
        let began = Instant::now();
        ways[port].cancel(&key).await?;
        let ended = Instant::now();
        race.book().sent.entry(session).or_default().push(Sent { began, ended });
    }
    race.cancellers.fetch_sub(1, Ordering::Relaxed);
    Ok(())
}

/// Numbers without a pattern, the same ones each time.
struct Draw(u64);

impl Draw {
    fn new(seed: usize) -> Self {
        Self(
            0x9e37_79b9_7f4a_7c15
                ^ u64::try_from(seed)
                    .unwrap_or_default()
                    .wrapping_mul(0xbf58_476d_1ce4_e5b9),
        )
    }

    /// xorshift64.
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        let limit = u64::try_from(limit).unwrap_or(1).max(1);
        usize::try_from(self.next() % limit).unwrap_or_default()
    }
}
