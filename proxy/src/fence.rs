//! Ends the sessions that may not go on, and keeps the record of who led since when.
//!
//! Woken by every change of the view, of the leader's own word and of who answers, and by a timer at the warrant's end. Sessions are told before anything else is done.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use pgherd_cluster::clock::{Boottime, wall_now};
use pgherd_cluster::event::EventId;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::source::{Proof, SourceHealth};
use pgherd_cluster::view::{Epoch, View};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::events::EventKind;
use crate::route::{self, Footing};
use crate::sessions::{Ending, Verdict};
use crate::shared::{Leadership, Seen, Shared};
use crate::timer::BoottimeTimer;

/// How soon a new proof is seen while the warrant has lapsed: no change of the view tells it.
const LAPSED_POLL: Duration = Duration::from_millis(50);

/// The same where nothing else than a word of the leader's could be one.
const HEARSAY_POLL: Duration = Duration::from_secs(1);

/// Whose sessions may go on.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Standing {
    epoch: Option<Epoch>,
    warranted: bool,
    admits: bool,
    silent: Arc<BTreeSet<MemberName>>,
}

impl Standing {
    fn of(seen: &Seen) -> Self {
        Self {
            epoch: seen.view.epoch().cloned(),
            warranted: seen.warrant.holds(seen.now),
            admits: seen.warrant.admits(),
            silent: Arc::clone(&seen.silent),
        }
    }
}

/// Runs until `stop`.
///
/// # Errors
/// When the timer fails: without it nothing would end a session of a lapsed warrant.
pub(crate) async fn run(shared: &Shared, stop: CancellationToken) -> std::io::Result<()> {
    let timer = BoottimeTimer::new()?;
    let mut changes = shared.view.subscribe();
    let mut rechecks = shared.rechecks();
    let mut health = shared.view.health();
    let (mut view_lives, mut health_lives) = (true, true);
    let mut standing = Standing {
        epoch: None,
        warranted: false,
        admits: false,
        silent: Arc::default(),
    };
    let mut known: Option<Arc<View>> = None;
    let mut store_was_lost = false;
    loop {
        changes.mark_unchanged();
        rechecks.mark_unchanged();
        let seen = shared.seen();
        shared.note_position(&seen);
        shared.note_up(&seen);
        let now = Standing::of(&seen);
        // Also while it has lapsed: a session may have begun in a moment of warrant that this did not see.
        if now == standing && !now.warranted && shared.sessions.any_with_epoch() {
            end_sessions(shared, &seen);
        }
        if now != standing {
            let event = if now.epoch == standing.epoch && now.warranted == standing.warranted {
                shared.events.next_id()
            } else {
                shared.name_change(standing.epoch.as_ref())
            };
            end_sessions(shared, &seen);
            let looked_before = known.as_deref().is_some_and(|view: &View| view.revision > 0);
            note_standing(shared, (&standing, &now), &event, seen.now, looked_before);
            standing = now;
        }
        note_view(shared, known.as_deref(), &seen);
        known = Some(seen.view);

        let wake_at = match seen.warrant.end() {
            Some(end) if standing.warranted => end,
            // Every word of the leader's is told.
            _ if shared.view.proof() == Proof::Hearsay => seen.now + HEARSAY_POLL,
            Some(_) | None => seen.now + LAPSED_POLL,
        };
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            // A source that has ended changes nothing any more; the warrant lapses by itself.
            changed = changes.changed(), if view_lives => view_lives = changed.is_ok(),
            // Its sender is in what is shared.
            _ = rechecks.changed() => {}
            changed = health.changed(), if health_lives => {
                health_lives = changed.is_ok();
                note_health(shared, &health.borrow_and_update(), &mut store_was_lost);
            }
            fired = timer.until(wake_at) => fired?,
        }
    }
}

/// Tells every session to end that rests on what is no longer so.
fn end_sessions(shared: &Shared, seen: &Seen) {
    let evidence = seen.evidence();
    let judge = |footing: &mut Footing, _| match route::may_go_on(footing, evidence) {
        Ok(epoch) => {
            let leaves = route::should_leave(footing, epoch.as_ref());
            footing.epoch = epoch;
            leaves.map(|why| Verdict::Leave(Ending::Outlived(why)))
        }
        Err(why) => Some(Verdict::End(Ending::Outlived(why))),
    };
    let told = shared.sessions.tell_where(judge);
    if told > 0 {
        warn!(sessions = told, "sessions are ended that may not go on");
    }
}

/// `event` is the name under which clients have heard of it.
fn note_standing(
    shared: &Shared,
    (before, now): (&Standing, &Standing),
    event: &EventId,
    at: Boottime,
    looked_before: bool,
) {
    shared.opened.send_modify(|times| *times += 1);
    // Where the leader's own word is all there is, it comes with the first client and goes with the last.
    let told = shared.view.proof() != Proof::Hearsay;
    if now.warranted && !before.warranted && told {
        // The first proof of all is no news.
        if before.epoch.is_some() {
            info!("it is certain again who leads");
            shared.events.record(EventKind::WarrantBack);
        }
    }
    if before.warranted && !now.warranted && (told || !shared.is_idle()) {
        let id = if now.epoch == before.epoch {
            event.clone()
        } else {
            shared.events.next_id()
        };
        warn!(event = %id, "it is no longer certain who leads: writes are held");
        shared.events.record_named(id, EventKind::WarrantLapsed);
    }
    if now.epoch != before.epoch {
        let mut leadership = shared.leadership.lock().unwrap_or_else(PoisonError::into_inner);
        *leadership = Leadership {
            epoch: now.epoch.clone(),
            since: at,
            since_wall: wall_now(),
            from_the_start: !looked_before,
            stopped: None,
            writable: false,
        };
        drop(leadership);
        let (from, to) = (before.epoch.clone(), now.epoch.clone());
        let kind = EventKind::LeaderChanged { from, to };
        info!(%event, "{kind}");
        shared.events.record_named(event.clone(), kind);
    }
}

/// Records who came, who went, and when the leader became writable.
fn note_view(shared: &Shared, before: Option<&View>, seen: &Seen) {
    let view = &seen.view;
    note_writable(shared, seen);
    // What is there at the first look did not just join.
    let Some(before) = before.filter(|before| before.revision > 0) else {
        return;
    };
    for name in view.members.keys().filter(|name| !before.members.contains_key(name)) {
        shared.events.record(EventKind::MemberJoined(name.clone()));
    }
    for name in before.members.keys().filter(|name| !view.members.contains_key(name)) {
        shared.events.record(EventKind::MemberLeft(name.clone()));
    }
}

fn note_writable(shared: &Shared, seen: &Seen) {
    let writable = seen.view.writable_leader();
    let mut leadership = shared.leadership.lock().unwrap_or_else(PoisonError::into_inner);
    let became = writable.filter(|_| !leadership.writable);
    if leadership.writable && writable.is_none() {
        leadership.stopped = Some(seen.now);
    }
    leadership.writable = writable.is_some();
    let (since, from_the_start) = (leadership.since, leadership.from_the_start);
    let stopped = if became.is_some() {
        leadership.stopped.take()
    } else {
        None
    };
    drop(leadership);
    let Some(leader) = became.map(|member| member.name.clone()) else {
        return;
    };
    let kind = match stopped {
        // It restarted in place: how long it has led is no outage.
        Some(stopped) => EventKind::LeaderWritableAgain {
            leader,
            after: seen.now.since(stopped),
        },
        None if from_the_start => return,
        None => EventKind::LeaderWritable {
            leader,
            after: seen.now.since(since),
        },
    };
    info!("{kind}");
    shared.events.record(kind);
}

fn note_health(shared: &Shared, health: &SourceHealth, was_lost: &mut bool) {
    match health {
        SourceHealth::Starting => {}
        SourceHealth::Following => {
            if std::mem::replace(was_lost, false) {
                info!("the cluster is known again");
                shared.events.record(EventKind::StoreBack);
            }
        }
        SourceHealth::Failing(error) => {
            if !std::mem::replace(was_lost, true) {
                if shared.view.proof() == Proof::Store {
                    warn!(%error, "the cluster's store does not answer");
                } else {
                    warn!(%error, "nobody tells of the cluster");
                }
                shared.events.record(EventKind::StoreLost(error.to_string()));
            }
        }
    }
}
