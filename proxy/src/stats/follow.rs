//! Keeps the page: looks once a second and whenever something happens, remembers the last hour, and renders once for
//! everybody who watches.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_page::acting::{Desk, may_act};
use pgherd_page::live::Live;
use pgherd_page::render::{Acting, Page};
use pgherd_page::ring::Ring;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::PATHS;
use super::csv::{self, Watched};
use super::state::State;
use crate::shared::Shared;

/// Numbers move without events.
const REFRESH: Duration = Duration::from_secs(1);
/// However much happens.
const REFRESH_MIN: Duration = Duration::from_millis(200);

/// What the page remembers.
#[derive(Default)]
pub(crate) struct Board {
    pub(super) live: Live,
    pub(super) desk: Desk,
    past: Mutex<Past>,
}

#[derive(Default)]
struct Past {
    ring: Ring,
    watched: Watched,
}

impl Board {
    fn past(&self) -> MutexGuard<'_, Past> {
        self.past.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks until `stop`.
pub(crate) async fn follow(shared: &Shared, stop: CancellationToken) -> io::Result<()> {
    let mut recorded = shared.events.subscribe();
    let mut views = shared.view.subscribe();
    let mut rechecks = shared.rechecks();
    loop {
        look(shared);
        let news = async {
            sleep(REFRESH_MIN).await;
            let news = async {
                tokio::select! {
                    () = told(&mut recorded) => {}
                    () = told(&mut views) => {}
                    () = told(&mut rechecks) => {}
                    () = shared.board.live.somebody_came() => {}
                }
            };
            // Without news the time alone is reason enough.
            let _ = timeout(REFRESH - REFRESH_MIN, news).await;
        };
        tokio::select! {
            () = stop.cancelled() => return Ok(()),
            () = news => {}
        }
    }
}

/// A source that has ended tells nothing any more.
async fn told<T>(changes: &mut watch::Receiver<T>) {
    if changes.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn look(shared: &Shared) {
    let now = Boottime::now();
    let state = State::of(shared);
    let mut past = shared.board.past();
    past.watched.look(&state, now);
    if past.ring.is_due(now) {
        past.ring.sample(&state, now);
    }
    if shared.board.live.is_watched() {
        let acting = acting(shared);
        shared.board.live.publish(&made_of(&state, &past.ring, now, &acting));
    }
}

fn made_of<'a>(state: &'a State, ring: &'a Ring, now: Boottime, acting: &'a Acting) -> Page<'a> {
    Page {
        state,
        ring,
        now,
        acting,
        paths: PATHS,
    }
}

fn acting(shared: &Shared) -> Acting {
    match may_act(shared.config.load().page_login.as_ref()) {
        Ok(_) => Acting::Allowed,
        Err(refusal) => Acting::Refused(format!("Look, and act with pgherd's commands: {refusal}.")),
    }
}

/// The whole page as it is now.
pub(crate) fn page(shared: &Shared) -> String {
    let (state, now, acting) = (State::of(shared), Boottime::now(), acting(shared));
    let past = shared.board.past();
    made_of(&state, &past.ring, now, &acting).whole()
}

/// The same for HAProxy's scrapers.
pub(crate) fn csv(shared: &Shared) -> String {
    let state = State::of(shared);
    let connections_max = shared.config.load().limits.connections;
    csv::csv(&state, &shared.board.past().watched, connections_max)
}
