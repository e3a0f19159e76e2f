//! What is known of a cluster by whoever serves the page: the page, `/api/v1/state` and metrics all speak from it.
//!
//! As JSON it is format 1: fields may be added within a format, and are never renamed or taken away. Times are in seconds,
//! sizes in bytes, moments as `2026-01-02T03:04:05.678Z`. What is not known is `null`, never 0.

use serde::Serialize;

/// The format of the JSON; another number means that a field was renamed or has gone.
pub const FORMAT: u32 = 1;

/// One picture of a cluster, taken at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct State {
    /// [`FORMAT`].
    pub format: u32,
    /// The cluster's name.
    pub scope: String,
    /// The release that speaks.
    pub version: &'static str,
    /// Who speaks.
    pub teller: Teller,
    /// Since it started.
    pub uptime_seconds: f64,
    /// Whether a client that comes now can write.
    pub writable: bool,
    /// Whether the cluster is in maintenance.
    pub paused: bool,
    /// The same in words.
    pub verdict: Verdict,
    /// What would be lost if the leader were.
    pub safety: Safety,
    /// Where the knowledge comes from, and how old it is.
    pub view: ViewState,
    /// Who holds the leader key.
    pub leader: Option<LeaderState>,
    /// A hand-over that was asked for and has not happened.
    pub asked: Option<AskedFor>,
    /// Clients that wait now, over all listeners.
    pub held_clients: usize,
    /// Defects of the teller itself.
    pub panics: u64,
    /// All members with a key, by name.
    pub members: Vec<MemberState>,
    /// Listeners of the proxy; none of an agent.
    pub listeners: Vec<ListenerRow>,
    /// Sessions of each listener with each member; none of an agent.
    pub routes: Vec<RouteRow>,
    /// Why sessions were ended and connections refused, since the start.
    pub outcomes: Vec<Outcome>,
    /// The last changes of leader, newest first.
    pub changes: Vec<LeaderChange>,
    /// What happened lately, newest first.
    pub events: Vec<EventRow>,
    /// Ended timelines, newest first, as the cluster keeps them.
    pub history: Vec<Timeline>,
}

/// Who serves the page.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Teller {
    /// A proxy: it knows clients.
    Proxy,
    /// A member's agent: it knows its PostgreSQL.
    Agent {
        /// The member.
        name: String,
        /// Why the member is as it is.
        reason: String,
    },
}

/// The answer to the first question of all: can one write?
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// Such as `WRITABLE`.
    pub word: &'static str,
    /// How good that is.
    pub mood: Mood,
    /// What there is to say about it.
    pub sentence: String,
}

/// How good something is. Always said in words too: a colour alone tells some people nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Mood {
    /// As it should be.
    Good,
    /// It will pass, or somebody wanted it.
    Wait,
    /// Somebody should look.
    Bad,
}

/// What would be lost if the leader's host were lost now.
#[derive(Clone, Debug, Serialize)]
pub struct Safety {
    /// `asynchronous`, `synchronous` or `quorum`.
    pub mode: &'static str,
    /// Acknowledged bytes of the log that no replica had when it last said how far it was; `null` where commits wait for
    /// a replica, or no replica is known.
    pub at_risk_bytes: Option<u64>,
    /// Members that may take the lead without losing an acknowledged commit, or with the least loss.
    pub successors: usize,
}

/// Where the knowledge comes from.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ViewState {
    /// The store's revision that it was built from.
    pub revision: i64,
    /// Of the last proof that the leader leads.
    pub age_seconds: Option<f64>,
    /// For how long it is certain that the leader leads.
    pub warrant_left_seconds: f64,
    /// For how long it is when it was just proven.
    pub warrant_seconds: f64,
    /// `starting`, `following` or `failing`.
    pub store: &'static str,
    /// Why it fails.
    pub store_error: Option<String>,
    /// How often all of it was read anew.
    pub relists: u64,
    /// `ttl`, as in force.
    pub ttl_seconds: f64,
}

/// Who holds the leader key.
#[derive(Clone, Debug, Serialize)]
pub struct LeaderState {
    /// The member.
    pub name: String,
    /// The revision that created the key.
    pub epoch: i64,
    /// Nothing when it led before the teller looked.
    pub since: Option<String>,
    /// For how long the teller has seen it lead.
    pub since_seconds: f64,
    /// The timeline that it writes.
    pub timeline: Option<u32>,
}

/// A switchover or failover that was asked for.
#[derive(Clone, Debug, Serialize)]
pub struct AskedFor {
    /// Who is to give the lease up.
    pub from: Option<String>,
    /// Who is to take it; anybody when absent.
    pub to: Option<String>,
    /// When; at once when absent.
    pub at: Option<String>,
}

/// One member.
#[derive(Clone, Debug, Default, Serialize)]
pub struct MemberState {
    /// Its name.
    pub name: String,
    /// As the leader key and the record of synchronous replication say.
    pub role: &'static str,
    /// The state of its PostgreSQL; `streaming` for a replica that does.
    pub state: String,
    /// The timeline that it is on.
    pub timeline: Option<u32>,
    /// How far it is: replayed by a replica, written by the leader.
    pub lsn: Option<String>,
    /// How far a replica has received.
    pub received_lsn: Option<String>,
    /// How far it is behind the leader.
    pub lag_bytes: Option<u64>,
    /// Since when the leader is past it; nothing when that is not known.
    pub lag_seconds: Option<f64>,
    /// Where clients reach its PostgreSQL.
    pub address: Option<String>,
    /// Whom it is told to stream from; nothing for the leader.
    pub upstream: Option<String>,
    /// Its availability zone.
    pub zone: Option<String>,
    /// Its tags, as `name: value`.
    pub tags: Vec<String>,
    /// `pgherd 0.1.0` or `Patroni 4.1.0`.
    pub agent: Option<String>,
    /// The parameters that wait for a restart; empty when none does.
    pub pending_restart: Vec<String>,
    /// How long readers took to connect lately.
    pub connect_seconds: Option<f64>,
    /// Its share of readers in relation to one that is quick and has been there for long; 0 while it gets none because it
    /// failed.
    pub weight: f64,
    /// Sessions of writers.
    pub sessions_write: usize,
    /// Sessions of readers.
    pub sessions_read: usize,
    /// Bytes that went either way between clients and it, since the teller's start.
    pub bytes_total: u64,
    /// `write`, `read`, or nothing.
    pub takes: Option<&'static str>,
    /// Why it gets nobody.
    pub left_out: Option<String>,
}

/// One listener of the proxy.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ListenerRow {
    /// Its address.
    pub name: String,
    /// What its clients come for.
    pub role: &'static str,
    /// Client connections, held ones included.
    pub connections: usize,
    /// Connections that have not said yet what they come for.
    pub startups: usize,
    /// Clients that wait.
    pub held: usize,
    /// Sessions.
    pub sessions: usize,
    /// Sessions since the start.
    pub sessions_total: u64,
    /// Connections since the start.
    pub accepted_total: u64,
    /// Clients that were refused.
    pub refused_total: u64,
    /// Clients that were refused at the end of their wait.
    pub hold_expired_total: u64,
    /// Sessions that the proxy ended.
    pub ended_total: u64,
}

/// One listener's sessions with one member.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RouteRow {
    /// The listener's address.
    pub listener: String,
    /// The member.
    pub member: String,
    /// Sessions now.
    pub open: usize,
    /// Sessions since the start.
    pub total: u64,
    /// Bytes from clients.
    pub bytes_to_server: u64,
    /// Bytes to clients.
    pub bytes_to_client: u64,
}

/// Something that happened to clients, counted since the start.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// `ended` or `refused`.
    pub what: &'static str,
    /// A word for the reason.
    pub reason: &'static str,
    /// The SQLSTATE that the client was told, where it was told one.
    pub sqlstate: Option<&'static str>,
    /// How often.
    pub count: u64,
}

/// A change of leader, from its cause to the first write.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LeaderChange {
    /// When it began.
    pub at: String,
    /// Ago.
    pub age_seconds: f64,
    /// Who led; nothing when nobody is known to have.
    pub from: Option<String>,
    /// Who leads; nothing while nobody does.
    pub to: Option<String>,
    /// Why, as far as the teller knows.
    pub cause: Option<String>,
    /// What took how long, in order.
    pub phases: Vec<Phase>,
    /// Whether it is still going on.
    pub going_on: bool,
}

impl LeaderChange {
    /// From the beginning to the end of the last phase.
    #[must_use]
    pub fn seconds(&self) -> f64 {
        self.phases
            .iter()
            .map(|phase| phase.begins_seconds + phase.seconds)
            .fold(0.0, f64::max)
    }
}

/// One part of a change of leader.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Phase {
    /// Such as `election`.
    pub name: String,
    /// After the change began.
    pub begins_seconds: f64,
    /// How long it took, or has taken so far.
    pub seconds: f64,
    /// Who measured it, such as `n2` or `this proxy`.
    pub by: String,
}

/// Something that happened.
#[derive(Clone, Debug, Default, Serialize)]
pub struct EventRow {
    /// By which others refer to it; nothing for what only the teller knows.
    pub id: Option<String>,
    /// When.
    pub at: String,
    /// Ago.
    pub age_seconds: f64,
    /// One word.
    pub kind: &'static str,
    /// A sentence.
    pub text: String,
    /// How often within a short while.
    pub count: usize,
}

/// An ended timeline.
#[derive(Clone, Debug, Serialize)]
pub struct Timeline {
    /// Its number.
    pub timeline: u32,
    /// Where it ended.
    pub lsn: String,
    /// Why, in PostgreSQL's words.
    pub reason: String,
    /// When.
    pub at: Option<String>,
    /// Who led next.
    pub new_leader: Option<String>,
}

impl State {
    /// A cluster of which nothing is known yet.
    #[must_use]
    pub fn unknown(scope: &str, teller: Teller) -> Self {
        Self {
            format: FORMAT,
            scope: scope.to_owned(),
            version: pgherd_cluster::VERSION,
            teller,
            uptime_seconds: 0.0,
            writable: false,
            paused: false,
            verdict: Verdict {
                word: "STARTING",
                mood: Mood::Wait,
                sentence: "nothing is known of the cluster yet".to_owned(),
            },
            safety: Safety {
                mode: "asynchronous",
                at_risk_bytes: None,
                successors: 0,
            },
            view: ViewState {
                store: "starting",
                ..ViewState::default()
            },
            leader: None,
            asked: None,
            held_clients: 0,
            panics: 0,
            members: Vec::new(),
            listeners: Vec::new(),
            routes: Vec::new(),
            outcomes: Vec::new(),
            changes: Vec::new(),
            events: Vec::new(),
            history: Vec::new(),
        }
    }

    /// What must not have changed between the moment when somebody read the page and the moment when they act on it: who
    /// leads by which holding, the configuration and what has been asked for. Positions and sessions may change.
    #[must_use]
    pub fn decides(&self) -> String {
        let leader = self.leader.as_ref();
        let holding = leader.map_or_else(
            || "nobody".to_owned(),
            |leader| format!("{}@{}", leader.name, leader.epoch),
        );
        let asked = self
            .asked
            .as_ref()
            .map_or("-", |asked| asked.to.as_deref().unwrap_or("*"));
        let paused = if self.paused { "paused" } else { "watching" };
        format!("{holding} {paused} {asked}")
    }

    /// Whether this is the leader.
    #[must_use]
    pub fn leads(&self, member: &str) -> bool {
        self.leader.as_ref().is_some_and(|leader| leader.name == member)
    }
}
