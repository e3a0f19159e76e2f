//! The answers of the console: which columns each has, and its rows.
//!
//! Where PgBouncer has the same command, the columns are its own. What a proxy that relays sessions untouched cannot know, as
//! how many queries there were, is 0.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use pgherd_cluster::clock::{Boottime, wall_now};

use super::columns::{
    CONFIG, DATABASES, DNS_HOSTS, DNS_ZONES, LISTS, MEM, PEER_POOLS, PEERS, POOLS, SOCKETS, STATE, USERS, VERSION,
};
use super::ours;
use super::totals::{self, Totals};
use crate::client::About;
use crate::sessions::OpenSession;
use crate::shared::Shared;
use crate::waiting::Waiter;
use crate::wire::console::{Cell, Column};

/// What can be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Show {
    Clients,
    Config,
    Databases,
    DnsHosts,
    DnsZones,
    Events,
    Held,
    Lists,
    Mem,
    Nodes,
    PeerPools,
    Peers,
    Pools,
    Routes,
    Servers,
    State,
    Stats,
    StatsAverages,
    StatsTotals,
    Totals,
    Users,
    Version,
}

impl Show {
    /// By its word, and in the order in which help tells them.
    pub(super) const ALL: [(&'static str, Self); 22] = [
        ("pools", Self::Pools),
        ("clients", Self::Clients),
        ("servers", Self::Servers),
        ("databases", Self::Databases),
        ("users", Self::Users),
        ("stats", Self::Stats),
        ("stats_totals", Self::StatsTotals),
        ("stats_averages", Self::StatsAverages),
        ("totals", Self::Totals),
        ("lists", Self::Lists),
        ("state", Self::State),
        ("config", Self::Config),
        ("version", Self::Version),
        ("peers", Self::Peers),
        ("peer_pools", Self::PeerPools),
        ("dns_hosts", Self::DnsHosts),
        ("dns_zones", Self::DnsZones),
        ("mem", Self::Mem),
        ("nodes", Self::Nodes),
        ("routes", Self::Routes),
        ("events", Self::Events),
        ("held", Self::Held),
    ];

    pub(super) fn named(word: &str) -> Option<Self> {
        let found = Self::ALL.iter().find(|(name, _)| *name == word);
        found.map(|(_, show)| *show)
    }

    /// Its columns.
    pub(super) const fn columns(self) -> &'static [Column] {
        match self {
            Self::Clients | Self::Servers => SOCKETS,
            Self::Config => CONFIG,
            Self::Databases => DATABASES,
            Self::DnsHosts => DNS_HOSTS,
            Self::DnsZones => DNS_ZONES,
            Self::Events => ours::EVENTS,
            Self::Held => ours::HELD,
            Self::Lists => LISTS,
            Self::Mem => MEM,
            Self::Nodes => ours::NODES,
            Self::PeerPools => PEER_POOLS,
            Self::Peers => PEERS,
            Self::Pools => POOLS,
            Self::Routes => ours::ROUTES,
            Self::State => STATE,
            Self::Stats => totals::STATS,
            Self::StatsAverages | Self::StatsTotals => totals::STATS_TOTALS,
            Self::Totals => totals::TOTALS,
            Self::Users => USERS,
            Self::Version => VERSION,
        }
    }

    /// Its rows as of now. They are made one by one, since there may be very many.
    pub(super) fn rows(self, shared: &Arc<Shared>) -> Rows {
        match self {
            Self::Clients => clients(shared),
            Self::Servers => servers(shared),
            Self::Config => whole(config(shared)),
            Self::Databases => whole(databases(shared)),
            Self::Events => whole(ours::events(shared)),
            Self::Held => whole(ours::held(shared)),
            Self::Lists => whole(lists(shared)),
            Self::Nodes => whole(ours::nodes(shared)),
            Self::Pools => whole(pools(shared)),
            Self::Routes => whole(ours::routes(shared)),
            Self::State => whole(state()),
            Self::Stats => whole(Totals::of(shared).stats()),
            Self::StatsAverages => whole(Totals::of(shared).averages()),
            Self::StatsTotals => whole(Totals::of(shared).totals()),
            Self::Totals => whole(Totals::of(shared).sums()),
            Self::Users => whole(users(shared)),
            Self::Version => whole(vec![vec![Cell::Text(version())]]),
            // There are none of these here.
            Self::DnsHosts | Self::DnsZones | Self::Mem | Self::PeerPools | Self::Peers => whole(Vec::new()),
        }
    }
}

pub(super) type Row = Vec<Cell>;
pub(super) type Rows = Box<dyn Iterator<Item = Row> + Send>;

fn whole(rows: Vec<Row>) -> Rows {
    Box::new(rows.into_iter())
}

/// Which of PgBouncer's releases has these columns: scrapers choose their queries by it, the first number that they find.
pub(super) const AS_PGBOUNCER: &str = "1.24.0";

fn version() -> String {
    format!(
        "PgBouncer {AS_PGBOUNCER}. Served by pgherd {}.",
        pgherd_cluster::VERSION
    )
}

pub(super) fn text(text: impl Into<String>) -> Cell {
    Cell::Text(text.into())
}

pub(super) fn number(number: impl TryInto<i64>) -> Cell {
    Cell::Number(number.try_into().unwrap_or(i64::MAX))
}

/// As PgBouncer calls what it was not told.
fn user_of(about: &About) -> &str {
    about.who.user.as_deref().unwrap_or("(nouser)")
}

fn database_of(about: &About) -> &str {
    about.who.database.as_deref().unwrap_or("(nodb)")
}

/// What there is of one database and user.
#[derive(Default)]
struct Pool {
    active: usize,
    waiting: usize,
    /// Sessions whose server has not let the client in yet, as far as that can be seen.
    login: usize,
    longest: Option<Boottime>,
}

fn by_pool(sessions: &[OpenSession], waiters: &[Waiter]) -> BTreeMap<(String, String), Pool> {
    let mut pools: BTreeMap<(String, String), Pool> = BTreeMap::new();
    let key = |about: &About| (database_of(about).to_owned(), user_of(about).to_owned());
    for session in sessions {
        let pool = pools.entry(key(&session.about)).or_default();
        pool.active += 1;
        pool.login += usize::from(session.server_pid.is_none() && session.about.who.user.is_some());
    }
    for waiter in waiters {
        let pool = pools.entry(key(&waiter.about)).or_default();
        pool.waiting += 1;
        pool.longest = pool.longest.min(Some(waiter.since)).or(Some(waiter.since));
    }
    pools
}

fn pools(shared: &Shared) -> Vec<Row> {
    let now = Boottime::now();
    let row = |database: &str, user: &str, pool: &Pool, mode: &str| {
        let waited = pool.longest.map(|since| now.since(since)).unwrap_or_default();
        let zero = || number(0);
        vec![
            text(database),
            text(user),
            number(pool.active),
            number(pool.waiting),
            zero(),
            zero(),
            number(pool.active - pool.login),
            zero(),
            zero(),
            zero(),
            zero(),
            zero(),
            number(pool.login),
            number(waited.as_secs()),
            number(waited.subsec_micros()),
            text(mode),
            Cell::Null,
        ]
    };
    let found = by_pool(&shared.sessions.list(), &shared.waiting.list());
    let mut rows: Vec<Row> = found
        .iter()
        .map(|((database, user), pool)| row(database, user, pool, "session"))
        .collect();
    // Its own, as PgBouncer's has one.
    let console = Pool {
        active: shared.console.sessions.get(),
        ..Pool::default()
    };
    let config = shared.config.load();
    let name = config
        .console
        .as_ref()
        .map_or("pgherd", |console| console.database.as_str());
    let mut own = row(name, name, &console, "statement");
    if let Some(active) = own.get_mut(6) {
        *active = number(0);
    }
    rows.push(own);
    rows
}

/// As PgBouncer writes times.
pub(super) fn moment(at: Boottime, now: Boottime) -> Cell {
    let wall = wall_now() - now.since(at);
    match jiff::Timestamp::try_from(wall) {
        Ok(time) => text(time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string()),
        Err(_) => Cell::Null, // A clock set to a year that no calendar has.
    }
}

/// Who a row of clients or servers is about, and what both have in common.
struct Socket<'a> {
    kind: &'static str,
    about: &'a About,
    state: &'static str,
    address: (String, u16),
    since: Boottime,
    waits_since: Option<Boottime>,
    close_needed: bool,
    own: String,
    other: String,
    pid: i32,
    by_tls: bool,
    id: u64,
}

fn socket(socket: &Socket<'_>, now: Boottime) -> Row {
    let about = socket.about;
    // Physical replication is of no database.
    let is_physical = about.who.user.is_some() && about.who.database.is_none();
    let waited = socket.waits_since.map(|since| now.since(since)).unwrap_or_default();
    vec![
        text(socket.kind),
        text(user_of(about)),
        text(database_of(about)),
        text(if is_physical { "physical" } else { "none" }),
        text(socket.state),
        text(socket.address.0.clone()),
        number(socket.address.1),
        text(""),
        number(0),
        moment(socket.since, now),
        moment(socket.since, now),
        number(waited.as_secs()),
        number(waited.subsec_micros()),
        number(i64::from(socket.close_needed)),
        text(socket.own.clone()),
        text(socket.other.clone()),
        number(socket.pid),
        text(if socket.by_tls { "TLS" } else { "" }),
        text(about.application_name.as_deref().unwrap_or_default()),
        number(0),
        number(socket.id),
    ]
}

fn address_of(about: &About) -> (String, u16) {
    match about.peer {
        crate::peer::Peer::Ip(address) => (address.ip().to_canonical().to_string(), address.port()),
        crate::peer::Peer::Unix => ("unix".to_owned(), 0),
    }
}

fn clients(shared: &Shared) -> Rows {
    let now = Boottime::now();
    let active = shared.sessions.list().into_iter().map(move |session| {
        let about = &session.about;
        let row = Socket {
            kind: "C",
            about,
            state: "active",
            address: address_of(about),
            since: about.since,
            waits_since: None,
            close_needed: session.leaves,
            own: format!("C{}", session.number),
            other: format!("S{}", session.number),
            pid: 0,
            by_tls: about.by_tls,
            id: session.number,
        };
        socket(&row, now)
    });
    let waiting = shared.waiting.list().into_iter().map(move |waiter| {
        let about = &waiter.about;
        let row = Socket {
            kind: "C",
            about,
            state: "waiting",
            address: address_of(about),
            since: about.since,
            waits_since: Some(waiter.since),
            close_needed: false,
            own: "W".to_owned(),
            other: String::new(),
            pid: 0,
            by_tls: about.by_tls,
            id: 0,
        };
        socket(&row, now)
    });
    Box::new(active.chain(waiting))
}

fn servers(shared: &Shared) -> Rows {
    let now = Boottime::now();
    let rows = shared.sessions.list().into_iter().map(move |session| {
        let hidden = session.about.who.user.is_none();
        let row = Socket {
            kind: "S",
            about: &session.about,
            state: if session.server_pid.is_some() || hidden {
                "active"
            } else {
                "new"
            },
            address: (session.server.ip().to_string(), session.server.port()),
            since: session.since,
            waits_since: None,
            close_needed: session.leaves,
            own: format!("S{}", session.number),
            other: format!("C{}", session.number),
            pid: session.server_pid.unwrap_or_default(),
            by_tls: hidden,
            id: session.number,
        };
        socket(&row, now)
    });
    Box::new(rows)
}

/// A limit as PgBouncer tells it: 0 is none.
fn limit(limit: Option<usize>) -> Cell {
    number(limit.unwrap_or_default())
}

fn databases(shared: &Shared) -> Vec<Row> {
    let seen = shared.seen();
    let leader = seen
        .view
        .leader_member()
        .and_then(|member| member.record.postgres_address());
    let config = shared.config.load();
    let mut counts: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for session in shared.sessions.list() {
        let count = counts.entry(database_of(&session.about).to_owned()).or_default();
        count.0 += 1;
        count.1 += 1;
    }
    for waiter in shared.waiting.list() {
        counts.entry(database_of(&waiter.about).to_owned()).or_default().1 += 1;
    }
    let row = |(name, (servers, clients)): (&String, &(usize, usize))| {
        vec![
            text(name.clone()),
            leader.as_ref().map_or(Cell::Null, |address| text(address.host.clone())),
            leader.as_ref().map_or(Cell::Null, |address| number(address.port)),
            text(name.clone()),
            Cell::Null,
            limit(config.limits.per_database),
            number(0),
            number(0),
            number(0),
            text("session"),
            Cell::Null,
            limit(config.limits.per_database),
            number(*servers),
            limit(config.limits.per_database),
            number(*clients),
            number(0),
            number(0),
        ]
    };
    counts.iter().map(row).collect()
}

fn users(shared: &Shared) -> Vec<Row> {
    let config = shared.config.load();
    let mut counts: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for session in shared.sessions.list() {
        let count = counts.entry(user_of(&session.about).to_owned()).or_default();
        count.0 += 1;
        count.1 += 1;
    }
    for waiter in shared.waiting.list() {
        counts.entry(user_of(&waiter.about).to_owned()).or_default().1 += 1;
    }
    let row = |(name, (servers, clients)): (&String, &(usize, usize))| {
        vec![
            text(name.clone()),
            text(""),
            text(""),
            text("session"),
            limit(config.limits.per_user),
            number(*servers),
            limit(config.limits.per_user),
            number(*clients),
        ]
    };
    counts.iter().map(row).collect()
}

fn lists(shared: &Shared) -> Vec<Row> {
    let (sessions, waiters) = (shared.sessions.list(), shared.waiting.list());
    let about = || {
        let sessions = sessions.iter().map(|session| &*session.about);
        sessions.chain(waiters.iter().map(|waiter| &*waiter.about))
    };
    let databases: BTreeSet<&str> = about().map(database_of).collect();
    let users: BTreeSet<&str> = about().map(user_of).collect();
    let config = shared.config.load();
    let connections = shared.admitted.get();
    let login: usize = shared
        .listeners()
        .iter()
        .map(|listener| listener.startups.crowd().inside)
        .sum();
    let counts = [
        ("databases", databases.len()),
        ("users", users.len()),
        ("peers", 0),
        ("pools", by_pool(&sessions, &waiters).len() + 1),
        ("peer_pools", 0),
        ("free_clients", config.limits.connections.saturating_sub(connections)),
        ("used_clients", connections),
        ("login_clients", login),
        ("free_servers", 0),
        ("used_servers", sessions.len()),
        ("dns_names", 0),
        ("dns_zones", 0),
        ("dns_queries", 0),
        ("dns_pending", 0),
    ];
    counts
        .into_iter()
        .map(|(list, items)| vec![text(list), number(items)])
        .collect()
}

fn state() -> Vec<Row> {
    let row = |(key, value)| vec![text(key), text(value)];
    [("active", "yes"), ("paused", "no"), ("suspended", "no")]
        .map(row)
        .to_vec()
}

/// PgBouncer's keys for what both have, and then ours. None of a secret.
fn config(shared: &Shared) -> Vec<Row> {
    let config = shared.config.load();
    let zero = |limit: Option<usize>| limit.unwrap_or_default().to_string();
    let seconds = |duration: std::time::Duration| duration.as_secs_f64().to_string();
    let listeners = shared.listeners();
    let open = listeners.iter().filter(|listener| listener.is_open());
    let open: Vec<String> = open
        .map(|listener| format!("{} {}", listener.name, listener.config.load().role.as_str()))
        .collect();
    let rows = [
        ("max_client_conn", config.limits.connections.to_string(), "10000", true),
        ("max_db_connections", zero(config.limits.per_database), "0", true),
        ("max_user_connections", zero(config.limits.per_user), "0", true),
        ("pool_mode", "session".to_owned(), "session", false),
        ("query_wait_timeout", seconds(config.hold.timeout), "10", true),
        ("hold.clients", config.hold.clients.to_string(), "1000", true),
        ("limits.per_member", zero(config.limits.per_member), "0", true),
        ("limits.reserved", config.limits.reserved.to_string(), "0", true),
        ("drain", seconds(config.drain), "30", true),
        ("listeners", open.join(", "), "", true),
        (
            "server_tls",
            config.server_tls.mode.as_str().to_owned(),
            "disable",
            true,
        ),
        ("workers", shared.workers.to_string(), "auto", false),
        ("zone", config.zone.clone().unwrap_or_default(), "", true),
    ];
    let row = |(key, value, default, changeable): (&str, String, &str, bool)| {
        let changeable = if changeable { "yes" } else { "no" };
        vec![text(key), text(value), text(default), text(changeable)]
    };
    rows.into_iter().map(row).collect()
}
