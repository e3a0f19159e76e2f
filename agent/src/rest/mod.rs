//! The REST interface: Patroni's paths, codes and bodies, and ours beside them.
//!
//! What is answered is pure and lives in `evaluate`, `body`, `metrics`, `route` and the checks of `switchover`, over
//! `facts`; `server` owns the sockets. Only the write endpoints and `/failsafe` talk to the store. `/primary` keeps
//! Patroni's meaning, the leader key alone; who needs to know whether a member takes writes asks `/api/v1/warrant`.

mod access;
mod answer;
mod body;
mod doors;
mod evaluate;
mod events;
mod facts;
mod failsafe;
#[cfg(test)]
pub(crate) mod fixtures;
mod journal;
mod json;
mod metrics;
mod operations;
mod query;
mod restart;
mod route;
mod schedule;
mod server;
mod settings;
mod stall;
mod switchover;
#[cfg(test)]
mod tests;
mod ui;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::Request;
use hyper::body::Body;
use hyper::header::{CONTENT_LENGTH, TRANSFER_ENCODING};
use pgherd_cluster::clock::Boottime;
use pgherd_cluster::etcd::{Budget, Etcd, StoreError};
use pgherd_cluster::key::{Key, Keys};
use pgherd_cluster::record::PgState;
use pgherd_cluster::source::{SourceHealth, ViewHandle};
use pgherd_cluster::view::Entry;
use serde_json::{Map, Value};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

pub use self::access::authorization;
use self::answer::{Answer, code_only, document, error_page, plain, sentence};
use self::doors::Client;
pub use self::doors::Doors;
use self::events::EventStream;
use self::facts::Facts;
use self::query::Query;
use self::route::Route;
pub use self::server::serve;
use self::switchover::Action;
use crate::journal::Journal;
use crate::lease::Vouches;
use crate::peers::Peers;
use crate::postgres::sql::Target;
use crate::restart::Order;
use crate::slots::Board;
use crate::status::MemberStatus;
use crate::vigil::Vigil;

/// How long an answer waits for a fresh observation before it speaks from the last one.
const FRESH_MAX: Duration = Duration::from_millis(150);
/// The longest body that is read.
const BODY_BYTES_MAX: usize = 64 << 10;
/// How long a body may take to arrive.
const BODY_MAX: Duration = Duration::from_secs(10);
/// How many may follow the view at once; each holds a connection, and checks must find some left.
const SUBSCRIBERS_MAX: usize = 256;

const OUT_OF_TOUCH: &str = "the cluster's state is not known: etcd does not answer";
const NOT_IN_THIS_VERSION: &str = "not in this version";

/// Where fresh observations are asked for.
pub type RefreshSender = mpsc::Sender<oneshot::Sender<Arc<MemberStatus>>>;

/// What the interface is made of.
pub struct ApiParts {
    /// The newest status of this member.
    pub status: watch::Receiver<Arc<MemberStatus>>,
    /// The view.
    pub view: ViewHandle,
    /// For the write endpoints.
    pub etcd: Etcd,
    /// This cluster's keys.
    pub keys: Keys,
    /// Who gets in.
    pub doors: Arc<ArcSwap<Doors>>,
    /// How other members are asked.
    pub peers: Peers,
    /// This member's own PostgreSQL, for what only an operator asks.
    pub postgres: Arc<ArcSwap<Target>>,
    /// Asks the agent for a fresh observation.
    pub refresh: RefreshSender,
    /// Where an operator's orders are taken.
    pub orders: mpsc::Sender<Order>,
    /// Answers members that ask this one to vouch for them.
    pub vouches: Vouches,
    /// What tells whether the loop hangs.
    pub vigil: Vigil,
    /// What a leader without etcd says of its slots goes here.
    pub slots: Arc<Board>,
    /// What happened.
    pub journal: Journal,
}

/// The interface of one member.
pub struct Api {
    status: watch::Receiver<Arc<MemberStatus>>,
    view: ViewHandle,
    etcd: Etcd,
    keys: Keys,
    doors: Arc<ArcSwap<Doors>>,
    peers: Peers,
    postgres: Arc<ArcSwap<Target>>,
    refresh: RefreshSender,
    orders: mpsc::Sender<Order>,
    vouches: Vouches,
    vigil: Vigil,
    slots: Arc<Board>,
    journal: Journal,
    subscribers: Arc<Semaphore>,
    /// What the page remembers.
    board: ui::Board,
    /// Nanoseconds of the [`Boottime`] since when the source of the view fails; 0 while it does not.
    failing_since: AtomicU64,
}

impl Api {
    /// An interface that [`serve`] can serve.
    #[must_use]
    pub fn new(parts: ApiParts) -> Self {
        Self {
            status: parts.status,
            view: parts.view,
            etcd: parts.etcd,
            keys: parts.keys,
            doors: parts.doors,
            peers: parts.peers,
            postgres: parts.postgres,
            refresh: parts.refresh,
            orders: parts.orders,
            vouches: parts.vouches,
            vigil: parts.vigil,
            slots: parts.slots,
            journal: parts.journal,
            subscribers: Arc::new(Semaphore::new(SUBSCRIBERS_MAX)),
            board: ui::Board::default(),
            failing_since: AtomicU64::new(0),
        }
    }

    /// Keeps note of since when the source of the view fails.
    async fn note_outages(&self) -> Infallible {
        let mut health = self.view.health();
        loop {
            let fails = matches!(*health.borrow_and_update(), SourceHealth::Failing(_));
            self.note_outage(fails);
            if health.changed().await.is_err() {
                self.note_outage(true); // Without a source the view only ages.
                return std::future::pending().await;
            }
        }
    }

    fn note_outage(&self, fails: bool) {
        if !fails {
            return self.failing_since.store(0, Ordering::Release);
        }
        let now = Boottime::now().as_nanos();
        // One failure after another is one outage, and keeps its beginning.
        let _ = self
            .failing_since
            .compare_exchange(0, now, Ordering::AcqRel, Ordering::Acquire);
    }

    fn facts(&self) -> Facts {
        self.facts_with(Arc::clone(&self.status.borrow()))
    }

    async fn fresh_facts(&self) -> Facts {
        let (reply, answer) = oneshot::channel();
        let asking = async {
            self.refresh.send(reply).await.ok()?;
            answer.await.ok()
        };
        match timeout(FRESH_MAX, asking).await {
            Ok(Some(status)) => self.facts_with(status),
            Ok(None) | Err(_) => self.facts(),
        }
    }

    fn facts_with(&self, status: Arc<MemberStatus>) -> Facts {
        let failing_since = self.failing_since.load(Ordering::Acquire);
        let view = self.view.load_full();
        // What was true before the disk hung says nothing any more.
        let status = if self.vigil.loop_hangs(view.timing(), Boottime::now()) {
            let reason = "the disk of the data directory does not answer".to_owned();
            Arc::new(MemberStatus {
                state: PgState::Unknown,
                server: None,
                reason,
                ..(*status).clone()
            })
        } else {
            status
        };
        Facts {
            status,
            view,
            failing_since: (failing_since > 0).then(|| Boottime::from_nanos(failing_since)),
            now: Boottime::now(), // Last, so that no deadline is measured from before it was read.
        }
    }

    async fn answer<B>(&self, request: Request<B>, client: Client, stop: &CancellationToken) -> Answer
    where
        B: Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let route = Route::of(request.method(), request.uri().path());
        if !route.is_guarded() {
            return self.serve(route, request, "", stop).await;
        }
        let doors = self.doors.load_full();
        let (view, among_members) = (self.view.load_full(), matches!(route, Route::Vouch | Route::Release));
        let checked = doors.check(client, request.headers(), &view, among_members).await;
        if let Err(refusal) = checked {
            return refusal;
        }
        let actor = doors.actor(client);
        let answer = self.serve(route, request, &actor, stop).await;
        journal::note(self, route, actor, &answer);
        answer
    }

    /// Serves a request that may pass; `actor` is who asks, where that was looked at.
    async fn serve<B>(&self, route: Route, request: Request<B>, actor: &str, stop: &CancellationToken) -> Answer
    where
        B: Body,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let path = request.uri().path();
        let query = Query::parse(request.uri().query().unwrap_or_default());
        match route {
            Route::Health { with_body } => {
                let facts = self.fresh_facts().await;
                let code = evaluate::evaluate(path, &query, &facts);
                if with_body {
                    document(code, &body::status(&facts))
                } else {
                    code_only(code)
                }
            }
            Route::Status => document(200, &body::status(&self.fresh_facts().await)),
            Route::Metrics => plain(200, metrics::page(&self.fresh_facts().await, &self.journal.counts())),
            Route::Role => plain(200, format!("{}\n", self.fresh_facts().await.role().as_str())),
            // A question about the loop must not wait for the loop.
            Route::Liveness => code_only(evaluate::liveness(&self.facts())),
            Route::Readiness => code_only(evaluate::readiness(&query, &self.fresh_facts().await)),
            Route::Cluster => self.cluster(),
            Route::History => document(200, &body::history(&self.view.load())),
            Route::Config => self.config(),
            Route::Failsafe => self.failsafe().await,
            Route::Warrant => {
                let (code, warrant) = body::warrant(&self.facts());
                document(code, &warrant)
            }
            Route::Events => self.events(&query, stop),
            Route::View => document(200, &events::document(&self.view)),
            Route::Journal => journal::serve(self, &query, stop),
            Route::Page => {
                let slot = Arc::clone(&self.subscribers).try_acquire_owned();
                ui::serve(self, path, slot.ok())
            }
            Route::DropSwitchover => switchover::unschedule(self).await,
            Route::DropRestart => restart::unschedule(self).await,
            Route::Restart => match read_object_if_any(request).await {
                Ok(body) => restart::serve(self, &body).await,
                Err(refusal) => refusal,
            },
            Route::Reinitialize => match read_object_if_any(request).await {
                Ok(body) => operations::reinitialize(self, &body).await,
                Err(refusal) => refusal,
            },
            Route::Reload => operations::reload(self).await,
            Route::Sigterm => sentence(202, "shutdown scheduled"),
            Route::Forecast => operations::forecast(self).await,
            Route::Backups => operations::backups(self).await,
            Route::Switchover
            | Route::Failover
            | Route::PatchConfig
            | Route::PutConfig
            | Route::Vouch
            | Route::Release => match read_object(request).await {
                Ok(body) => self.change(route, body, actor).await,
                Err(refusal) => refusal,
            },
            Route::NotInThisVersion { .. } => error_page(501, NOT_IN_THIS_VERSION),
            Route::Unsupported => error_page(501, &format!("Unsupported method ('{}')", request.method())),
        }
    }

    async fn change(&self, route: Route, body: Map<String, Value>, actor: &str) -> Answer {
        match route {
            Route::Switchover => switchover::serve(self, Action::Switchover, &body, actor).await,
            Route::Failover => switchover::serve(self, Action::Failover, &body, actor).await,
            Route::Vouch => failsafe::vouch(self, &body).await,
            Route::Release => failsafe::release(self, &body).await,
            Route::PatchConfig => settings::patch(self, &body).await,
            _ => settings::replace(self, body).await,
        }
    }

    fn cluster(&self) -> Answer {
        match self.facts().known_view() {
            Some(view) => document(200, &body::cluster(view)),
            None => sentence(503, OUT_OF_TOUCH),
        }
    }

    fn config(&self) -> Answer {
        match &self.view.load().config.value {
            Some(config) => document(200, &Value::Object(config.document().clone())),
            None => error_page(502, "Bad Gateway"),
        }
    }

    /// The view keeps only the revision of this key, so its value is read when somebody asks.
    async fn failsafe(&self) -> Answer {
        let absent = || error_page(502, "Bad Gateway");
        if self.view.load().failsafe_revision == 0 {
            return absent();
        }
        let Ok(stored) = self.read(&self.keys.of(&Key::Failsafe)).await else {
            return sentence(503, OUT_OF_TOUCH);
        };
        let members = stored.and_then(|entry| serde_json::from_str::<Value>(&entry.value).ok());
        let members = members.filter(Value::is_object);
        members.map_or_else(absent, |members| document(200, &members))
    }

    /// One key as the store has it now.
    async fn read(&self, key: &str) -> Result<Option<Entry>, StoreError> {
        let snapshot = self.etcd.read(key, self.budget()).await?;
        Ok(snapshot.entries.into_iter().next())
    }

    fn budget(&self) -> Budget {
        let timing = self.view.load().timing();
        Budget::new(timing.retry_timeout(), self.etcd.endpoint_count())
    }

    fn events(&self, query: &Query, stop: &CancellationToken) -> Answer {
        match Arc::clone(&self.subscribers).try_acquire_owned() {
            Ok(slot) => answer::events(EventStream::of_views(self.view.clone(), query, slot, stop.clone())),
            Err(_) => sentence(503, "too many subscribers"),
        }
    }
}

/// As [`read_object`], where a request without a body says nothing more.
async fn read_object_if_any<B>(request: Request<B>) -> Result<Map<String, Value>, Answer>
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let length = request.headers().get(CONTENT_LENGTH);
    let chunked = request.headers().contains_key(TRANSFER_ENCODING);
    if !chunked && length.is_none_or(|length| length == "0") {
        return Ok(Map::new());
    }
    match read_json(request).await? {
        Value::Object(object) => Ok(object),
        Value::Null => Ok(Map::new()),
        _ => Err(error_page(400, "Bad Request")),
    }
}

/// The JSON object that a request carries, or why there is none.
async fn read_object<B>(request: Request<B>) -> Result<Map<String, Value>, Answer>
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    match read_json(request).await? {
        Value::Object(object) if !object.is_empty() => Ok(object),
        _ => Err(error_page(400, "Bad Request")),
    }
}

async fn read_json<B>(request: Request<B>) -> Result<Value, Answer>
where
    B: Body,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let announced = [CONTENT_LENGTH, TRANSFER_ENCODING]
        .iter()
        .any(|name| request.headers().contains_key(name));
    if !announced {
        return Err(error_page(411, "Length Required"));
    }
    let body = timeout(BODY_MAX, Limited::new(request.into_body(), BODY_BYTES_MAX).collect());
    let bytes = match body.await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(error_page(413, "Content Too Large")),
        Ok(Err(_)) => return Err(error_page(400, "Bad Request")),
        Err(_) => return Err(error_page(408, "Request Timeout")),
    };
    serde_json::from_slice(&bytes).map_err(|_| error_page(400, "Bad Request"))
}
