//! A view from members' agents, without access to the store: any of them will do, and others are learnt from what it says.
//!
//! Our agents push: the view comes by a stream of events, with a sign of life in between. Patroni's are polled. Who is silent is
//! left for another. Nothing here proves that the leader leads: it opens no route, but what is heard closes one at once.

mod ours;
mod patronis;
#[cfg(test)]
mod tests;

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::debug;

pub use self::ours::view_document;
use self::patronis::Polled;
use super::{Proof, SourceHealth, ViewHandle, ViewPublisher, brief, channel_with};
use crate::clock::Boottime;
use crate::etcd::StoreError;
use crate::http::{Access, Ask, Endpoint, Event, Opened, ask_at, events};
use crate::name::Scope;

/// For an agent to answer.
const ANSWER_MAX: Duration = Duration::from_secs(1);
/// For the others, once one has answered well.
const OTHERS_MAX: Duration = Duration::from_millis(100);
/// How often our agents are asked to say that they live.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// How long one that has lost the store is heard before another one is looked for that has not.
const OUT_OF_TOUCH_MAX: Duration = SILENCE_MAX;
/// Two of them missing.
const SILENCE_MAX: Duration = Duration::from_secs(5);
/// From one question to the next, of those that push nothing: while somebody needs to know, while something changes, and else.
const POLL: Duration = Duration::from_secs(1);
const POLL_IN_CHANGE: Duration = Duration::from_millis(100);
const POLL_QUIET: Duration = Duration::from_secs(10);
/// How long after a change polls are quick, while somebody needs to know.
const CHANGE_MAX: Duration = Duration::from_secs(30);
/// Whoever doubts is heard no more often than this.
const DOUBT_EVERY: Duration = Duration::from_secs(1);
const BACKOFF_MIN: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// More members than any cluster has.
const ENDPOINTS_MAX: usize = 64;

/// Keeps a view of one cluster from its members' agents.
pub struct AgentsSource {
    urls: Vec<Endpoint>,
    scope: Scope,
    publisher: ViewPublisher,
    handle: ViewHandle,
    polled: Polled,
    /// What the agent was that was left last.
    left: Option<Kind>,
}

/// Why an agent is left for another.
type Left = String;

/// What an agent has answered to the first question.
struct Found {
    endpoint: Endpoint,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// One of ours that follows the store.
    Ours,
    /// One of ours that has lost the store, and tells what it knew.
    OutOfTouch,
    Patronis,
}

impl Kind {
    /// The least is asked. Neither of the latter two is better in itself: one of Patroni's that has lost the store tells nothing, which is
    /// seen only when it is asked, and one of ours tells what it knew. So one of the other kind than was `left` last is tried.
    fn rank(self, left: Option<Self>) -> (bool, bool, Self) {
        (self != Self::Ours, left == Some(self), self)
    }
}

/// Whether a view that an agent tells is to be believed: not what one knew that has lost the store, where more is known already.
fn is_news(in_touch: bool, as_of: Boottime, known: Option<Boottime>) -> bool {
    in_touch || known.is_none_or(|known| as_of > known)
}

impl AgentsSource {
    /// A source that begins with `urls`, and the handle that reads from it.
    #[must_use]
    pub fn new(urls: Vec<Endpoint>, scope: Scope, access: Access) -> (Self, ViewHandle) {
        let (publisher, handle) = channel_with(scope.clone(), Proof::Hearsay, access);
        let source = Self {
            urls,
            scope,
            publisher,
            handle: handle.clone(),
            polled: Polled::default(),
            left: None,
        };
        (source, handle)
    }

    /// Runs until `stop`. Errors are reported through the handle's health and tried again for ever.
    pub async fn run(mut self, stop: CancellationToken) {
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.follow_for_ever() => {}
        }
    }

    async fn follow_for_ever(&mut self) {
        let mut backoff = BACKOFF_MIN;
        loop {
            let began = Instant::now();
            let left = match self.find().await {
                Ok(found) => {
                    debug!(agent = %found.endpoint, kind = ?found.kind, "an agent tells of the cluster");
                    let left = match found.kind {
                        Kind::Ours | Kind::OutOfTouch => self.listen(&found).await,
                        Kind::Patronis => self.poll(&found.endpoint).await,
                    };
                    self.left = Some(found.kind);
                    format!("{}: {}", found.endpoint, brief(left))
                }
                Err(left) => left,
            };
            debug!("looking for an agent that tells of the cluster: {left}");
            self.publisher
                .report(SourceHealth::Failing(StoreError::Protocol { what: left }));
            if began.elapsed() > 2 * BACKOFF_MAX {
                backoff = BACKOFF_MIN; // It worked for a while: this is a new trouble.
            }
            sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// All that are known: those that were told first, and those of the last view.
    fn endpoints(&self) -> Vec<Endpoint> {
        let view = self.handle.load_full();
        let learnt = view.members.values().filter_map(|member| member.record.api_endpoint());
        let mut all = Vec::new();
        for endpoint in self.urls.iter().cloned().chain(learnt) {
            if !all.contains(&endpoint) && all.len() < ENDPOINTS_MAX {
                all.push(endpoint);
            }
        }
        all
    }

    /// Asks all of them, and takes one of the best: not all proxies the same one.
    async fn find(&self) -> Result<Found, Left> {
        let mut asking = JoinSet::new();
        for endpoint in self.endpoints() {
            let (scope, access) = (self.scope.clone(), self.handle.access().clone());
            asking.spawn(async move {
                let kind = kind_of(&endpoint, &scope, &access).await;
                (endpoint, kind)
            });
        }
        let (mut found, mut refused) = (Vec::new(), Vec::new());
        let mut until = Instant::now() + ANSWER_MAX + OTHERS_MAX;
        while let Ok(Some(answer)) = timeout_at(until, asking.join_next()).await {
            match answer {
                Ok((endpoint, Ok(kind))) => {
                    if kind == Kind::Ours {
                        until = until.min(Instant::now() + OTHERS_MAX);
                    }
                    found.push(Found { endpoint, kind });
                }
                Ok((endpoint, Err(why))) => refused.push(format!("{endpoint}: {}", brief(why))),
                Err(_) => {}
            }
        }
        let random = RandomState::new();
        let best = found
            .into_iter()
            .min_by_key(|found| (found.kind.rank(self.left), random.hash_one(&found.endpoint)));
        refused.sort();
        best.ok_or_else(|| format!("no agent answers ({})", refused.join("; ")))
    }

    /// Follows one of ours until it should be left.
    async fn listen(&mut self, found: &Found) -> Left {
        let path = format!("/api/v1/events?heartbeat={}", HEARTBEAT.as_secs());
        let asked_at = Boottime::now();
        let access = self.handle.access().clone();
        let mut stream = match events(&found.endpoint, &path, ANSWER_MAX, &access).await {
            Ok(Opened::Events(stream)) => stream,
            // It has too many subscribers: it is asked instead, and less often.
            Ok(Opened::Refused(503)) => return self.ask_for_views(&found.endpoint, &access).await,
            Ok(Opened::Refused(status)) => return format!("it refuses with {status}"),
            Err(error) => return error.to_string(),
        };
        let (began, mut doubted) = (Instant::now(), Instant::now());
        let (mut as_of, mut in_touch) = (asked_at, found.kind == Kind::Ours);
        // Until it has told a view, its signs of life would speak for one that another agent told.
        let mut has_told = false;
        loop {
            let event = tokio::select! {
                event = stream.next(SILENCE_MAX) => event,
                () = self.publisher.shared.relist.notified(), if doubted.elapsed() > DOUBT_EVERY => {
                    if self.is_news_needed().await {
                        return "a reader doubted what it says".to_owned();
                    }
                    doubted = Instant::now();
                    continue;
                }
            };
            match event {
                Err(error) => return error.to_string(),
                Ok(Event::Alive) if has_told => {}
                Ok(Event::Alive) if began.elapsed() < SILENCE_MAX => continue,
                Ok(Event::Alive) => return "it lives and tells no view".to_owned(),
                Ok(Event::Data(text)) => match ours::read(&text, &self.scope) {
                    Err(why) => return why,
                    Ok(told) => {
                        (as_of, in_touch, has_told) = (as_of - told.age, told.in_touch, true);
                        if is_news(in_touch, as_of, self.handle.current_as_of()) {
                            self.publisher.publish(told.view);
                        }
                    }
                },
            }
            self.publisher.confirm(as_of);
            if in_touch {
                self.publisher.report(SourceHealth::Following);
                // What is heard next is sent after this was.
                as_of = Boottime::now() - HEARTBEAT;
            } else if found.kind == Kind::Ours || began.elapsed() > OUT_OF_TOUCH_MAX {
                return "it has lost the store".to_owned();
            }
        }
    }

    /// Whether another agent is to be looked for: there is one that knows better than who is followed.
    async fn is_news_needed(&self) -> bool {
        let epoch = self.handle.load().epoch().cloned();
        let mut asking = JoinSet::new();
        for endpoint in self.endpoints() {
            let (scope, access) = (self.scope.clone(), self.handle.access().clone());
            asking.spawn(async move { view_of(&endpoint, &scope, &access).await.ok() });
        }
        let differs = async {
            while let Some(answer) = asking.join_next().await {
                if let Ok(Some(told)) = answer
                    && told.in_touch
                    && told.view.epoch() != epoch.as_ref()
                {
                    return true;
                }
            }
            false
        };
        timeout(ANSWER_MAX, differs).await.unwrap_or_default()
    }

    /// Asks one of ours again and again, as one that takes no more subscribers is.
    async fn ask_for_views(&mut self, endpoint: &Endpoint, access: &Access) -> Left {
        loop {
            let asked_at = Boottime::now();
            match view_of(endpoint, &self.scope, access).await {
                Ok(told) if told.in_touch => {
                    self.publisher.publish(told.view);
                    self.publisher.confirm(asked_at - told.age);
                    self.publisher.report(SourceHealth::Following);
                }
                Ok(_) => return "it has lost the store".to_owned(),
                Err(why) => return why,
            }
            self.rest(POLL).await;
        }
    }

    /// Asks one of Patroni's again and again until it should be left.
    async fn poll(&mut self, endpoint: &Endpoint) -> Left {
        let access = self.handle.access().clone();
        let mut changed_at = None;
        loop {
            let asked_at = Boottime::now();
            let before = self.handle.load_full();
            let view = match self.polled.ask(endpoint, &self.scope, &access, &before).await {
                Ok(view) => view,
                Err(why) => return why,
            };
            let settled = view.writable_leader().is_some() && view.epoch() == before.epoch();
            if settled {
                changed_at = None;
            } else {
                changed_at.get_or_insert_with(Instant::now);
            }
            self.publisher.publish(view);
            self.publisher.confirm(asked_at);
            self.publisher.report(SourceHealth::Following);
            let in_change = changed_at.is_some_and(|at| at.elapsed() < CHANGE_MAX);
            self.rest(if in_change { POLL_IN_CHANGE } else { POLL }).await;
        }
    }

    /// Until the next question: `pace` from now while somebody needs to know. A doubt ends it, but not at once again.
    async fn rest(&self, pace: Duration) {
        let shared = &self.publisher.shared;
        let is_needed = || shared.needed.load(std::sync::atomic::Ordering::Relaxed);
        let least = pace.min(DOUBT_EVERY / 5);
        sleep(least).await;
        let whole = if is_needed() { pace } else { POLL_QUIET };
        tokio::select! {
            () = sleep(whole.saturating_sub(least)) => {}
            () = shared.relist.notified() => {}
        }
    }
}

/// Asks an agent what it is.
async fn kind_of(endpoint: &Endpoint, scope: &Scope, access: &Access) -> Result<Kind, Left> {
    let answer = ask_at(endpoint, Ask::get("/api/v1/view"), ANSWER_MAX, access).await;
    let answer = answer.map_err(told)?;
    if let Ok(told) = ours::read(&answer.text(), scope) {
        return Ok(if told.in_touch { Kind::Ours } else { Kind::OutOfTouch });
    }
    // Patroni answers any other path as if it were asked for its role.
    patronis::is_one(&answer, scope).map(|()| Kind::Patronis)
}

async fn view_of(endpoint: &Endpoint, scope: &Scope, access: &Access) -> Result<ours::Told, Left> {
    let answer = ask_at(endpoint, Ask::get("/api/v1/view"), ANSWER_MAX, access).await;
    ours::read(&answer.map_err(told)?.text(), scope)
}

/// An error with its cause.
fn told(error: crate::http::HttpError) -> String {
    use std::error::Error;
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}
