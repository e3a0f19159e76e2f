//! `/metrics` in Prometheus' text format. Built anew for each scrape from what was counted anyway.

mod compat;
mod text;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use pgherd_cluster::clock::Boottime;
use prometheus::{GaugeVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder};

use self::text::Page;
use super::state::State;
use crate::panics;
use crate::shared::Shared;

/// A registry that lives for one scrape.
struct Scrape(Registry);

impl Scrape {
    fn gauge(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntGaugeVec> {
        let metric = IntGaugeVec::new(Opts::new(name, help), labels)?;
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn seconds(&self, name: &str, help: &str, value: f64) -> prometheus::Result<()> {
        let metric = GaugeVec::new(Opts::new(name, help), &[])?;
        self.0.register(Box::new(metric.clone()))?;
        metric.with_label_values::<&str>(&[]).set(value);
        Ok(())
    }

    fn single(&self, name: &str, help: &str, value: i64) -> prometheus::Result<()> {
        self.gauge(name, help, &[])?.with_label_values::<&str>(&[]).set(value);
        Ok(())
    }

    fn counter(&self, name: &str, help: &str, labels: &[&str]) -> prometheus::Result<IntCounterVec> {
        let metric = IntCounterVec::new(Opts::new(name, help), labels)?;
        self.0.register(Box::new(metric.clone()))?;
        Ok(metric)
    }

    fn total(&self, name: &str, help: &str, value: u64) -> prometheus::Result<()> {
        self.counter(name, help, &[])?
            .with_label_values::<&str>(&[])
            .inc_by(value);
        Ok(())
    }
}

fn whole(number: impl TryInto<i64>) -> i64 {
    number.try_into().unwrap_or(i64::MAX)
}

/// The text of one scrape.
pub(crate) fn render(shared: &Shared) -> prometheus::Result<String> {
    let scrape = Scrape(Registry::new());
    let state = State::of(shared);
    process(&scrape, shared, &state)?;
    listeners(&scrape, &state)?;
    routes(&scrape, shared)?;
    queues(&scrape, shared)?;
    outcomes(&scrape, shared)?;
    cluster(&scrape, &state)?;
    members(&scrape, &state)?;
    doors(&scrape, shared, &state)?;
    let text = TextEncoder::new().encode_to_string(&scrape.0.gather())?;
    Ok(text + &times(shared, &state))
}

/// How long things took, and the names of other programs for whoever wants them.
fn times(shared: &Shared, state: &State) -> String {
    let mut page = Page::default();
    let listeners = shared.listeners();
    let startups = listeners
        .iter()
        .map(|listener| (listener.name.as_str(), listener.startup_time.buckets()));
    page.histogram(
        "pgherd_startup_seconds",
        "From a client's startup message until its server had answered it, waiting included.",
        "listener",
        startups,
    );
    let holds = listeners
        .iter()
        .map(|listener| (listener.name.as_str(), listener.hold_time.buckets()));
    page.histogram(
        "pgherd_hold_seconds",
        "How long clients were held, whether they got a session in the end or not.",
        "listener",
        holds,
    );
    let connects = shared.connect_times.buckets();
    page.histogram(
        "pgherd_backend_connect_seconds",
        "From the dial to a member until its first word.",
        "node",
        connects
            .iter()
            .map(|(member, buckets)| (member.as_str(), buckets.clone())),
    );
    let compat = shared.config.load().compat_metrics;
    if compat.haproxy {
        compat::haproxy(&mut page, shared, state);
    }
    if compat.pgbouncer {
        compat::pgbouncer(&mut page, shared);
    }
    page.into_text()
}

/// Who is in, who waits, and who came to the console.
fn doors(scrape: &Scrape, shared: &Shared, state: &State) -> prometheus::Result<()> {
    let connections = shared.admitted.get();
    scrape.single(
        "pgherd_connections",
        "Client connections, over all listeners.",
        whole(connections),
    )?;
    scrape.single(
        "pgherd_connections_max",
        "Client connections that there may be.",
        whole(shared.config.load().limits.connections),
    )?;
    let takes = scrape.gauge(
        "pgherd_node_takes",
        "1 for what a member takes from this proxy: write, read, or nothing.",
        &["node", "what"],
    )?;
    for member in &state.members {
        takes
            .with_label_values(&[member.name.as_str(), member.takes.unwrap_or("nothing")])
            .set(1);
    }
    let (now, listeners) = (Boottime::now(), shared.listeners());
    let oldest = GaugeVec::new(
        Opts::new(
            "pgherd_queue_oldest_seconds",
            "How long the client has waited that has waited longest for a session.",
        ),
        &["listener"],
    )?;
    scrape.0.register(Box::new(oldest.clone()))?;
    let mut waited: BTreeMap<usize, f64> = BTreeMap::new();
    for waiter in shared.waiting.list() {
        let longest = waited.entry(waiter.about.listener).or_default();
        *longest = longest.max(now.since(waiter.since).as_secs_f64());
    }
    for (index, listener) in listeners.iter().enumerate() {
        let seconds = waited.get(&index).copied().unwrap_or_default();
        oldest.with_label_values(&[&listener.name]).set(seconds);
    }
    let sessions = shared.console.sessions.get();
    scrape.single("pgherd_console_sessions", "Sessions on the console.", whole(sessions))?;
    let logins = scrape.counter(
        "pgherd_console_logins_total",
        "Logins on the console, by what came of them.",
        &["result"],
    )?;
    for ((result, _), count) in shared.console.logins.counts() {
        logins.with_label_values(&[result]).inc_by(count);
    }
    Ok(())
}

fn process(scrape: &Scrape, shared: &Shared, state: &State) -> prometheus::Result<()> {
    scrape.single("pgherd_up", "1 while the proxy serves.", 1)?;
    let build = scrape.gauge("pgherd_build_info", "The running build.", &["version"])?;
    build.with_label_values(&[state.version]).set(1);
    scrape.seconds(
        "pgherd_uptime_seconds",
        "Since the proxy started.",
        state.uptime_seconds,
    )?;
    let reloads = scrape.counter(
        "pgherd_config_reloads_total",
        "New configurations, by whether they were applied.",
        &["result"],
    )?;
    for (result, count) in [
        ("applied", &shared.reloads.applied),
        ("refused", &shared.reloads.refused),
    ] {
        reloads
            .with_label_values(&[result])
            .inc_by(count.load(Ordering::Relaxed));
    }
    let panics = panics::total(&shared.panics);
    scrape.total(
        "pgherd_panics_total",
        "Defects of the proxy, each of which ended what it was about.",
        panics,
    )
}

fn listeners(scrape: &Scrape, state: &State) -> prometheus::Result<()> {
    let connections = scrape.gauge(
        "pgherd_listener_connections",
        "Client connections.",
        &["listener", "role", "state"],
    )?;
    let total = scrape.counter(
        "pgherd_listener_connections_total",
        "Client connections since the start, by what became of them first.",
        &["listener", "role", "result"],
    )?;
    let held = scrape.gauge("pgherd_hold_clients", "Clients held now.", &["listener"])?;
    let expired = scrape.counter(
        "pgherd_hold_expired_total",
        "Clients refused at the end of their hold.",
        &["listener"],
    )?;
    let startups = scrape.gauge(
        "pgherd_listener_startups",
        "Client connections that have not said yet what they come for.",
        &["listener"],
    )?;
    for row in &state.listeners {
        startups.with_label_values(&[&row.name]).set(whole(row.startups));
        let active = row.connections.saturating_sub(row.held);
        connections
            .with_label_values(&[&row.name, row.role, "active"])
            .set(whole(active));
        connections
            .with_label_values(&[&row.name, row.role, "held"])
            .set(whole(row.held));
        total
            .with_label_values(&[&row.name, row.role, "accepted"])
            .inc_by(row.accepted_total);
        total
            .with_label_values(&[&row.name, row.role, "refused"])
            .inc_by(row.refused_total);
        held.with_label_values(&[&row.name]).set(whole(row.held));
        expired.with_label_values(&[&row.name]).inc_by(row.hold_expired_total);
    }
    Ok(())
}

fn routes(scrape: &Scrape, shared: &Shared) -> prometheus::Result<()> {
    let labels = ["listener", "node"];
    let open = scrape.gauge("pgherd_route_sessions", "Sessions open.", &labels)?;
    let total = scrape.counter("pgherd_route_sessions_total", "Sessions since the start.", &labels)?;
    let bytes = scrape.counter(
        "pgherd_route_bytes_total",
        "Bytes relayed.",
        &["listener", "node", "direction"],
    )?;
    let listeners = shared.listeners();
    for route in shared.routes.counts() {
        let Some(listener) = listeners.get(route.listener) else {
            continue;
        };
        let (listener, node) = (listener.name.as_str(), route.member.as_str());
        open.with_label_values(&[listener, node]).set(whole(route.open));
        total.with_label_values(&[listener, node]).inc_by(route.total);
        bytes
            .with_label_values(&[listener, node, "to_server"])
            .inc_by(route.bytes_to_server);
        bytes
            .with_label_values(&[listener, node, "to_client"])
            .inc_by(route.bytes_to_client);
    }
    Ok(())
}

fn queues(scrape: &Scrape, shared: &Shared) -> prometheus::Result<()> {
    let places = scrape.gauge(
        "pgherd_node_places",
        "Sessions on a member, those that are being opened included.",
        &["node"],
    )?;
    let queued = scrape.gauge(
        "pgherd_node_queue_clients",
        "Clients that wait for a place at a member that has as many sessions as it may have.",
        &["node"],
    )?;
    for (member, crowd) in shared.places.crowds() {
        places.with_label_values(&[member.as_str()]).set(whole(crowd.inside));
        queued.with_label_values(&[member.as_str()]).set(whole(crowd.waiting));
    }
    let starting = scrape.gauge(
        "pgherd_node_startups",
        "Sessions that a member has not yet said a word to.",
        &["node"],
    )?;
    let waiting = scrape.gauge(
        "pgherd_node_startup_queue_clients",
        "Clients that wait for their turn to start at a member.",
        &["node"],
    )?;
    for (member, crowd) in shared.startups.crowds() {
        starting.with_label_values(&[member.as_str()]).set(whole(crowd.inside));
        waiting.with_label_values(&[member.as_str()]).set(whole(crowd.waiting));
    }
    let reserved = shared.reserved.get();
    scrape.single(
        "pgherd_reserved_places",
        "Places of operators that are taken.",
        whole(reserved),
    )
}

fn outcomes(scrape: &Scrape, shared: &Shared) -> prometheus::Result<()> {
    let ended = scrape.counter(
        "pgherd_sessions_ended_total",
        "Sessions that have ended.",
        &["reason", "sqlstate"],
    )?;
    for ((reason, sqlstate), count) in shared.ended.counts() {
        ended.with_label_values(&[reason, sqlstate]).inc_by(count);
    }
    let cancels = scrape.counter("pgherd_cancel_total", "Cancel requests passed on.", &["outcome", "key"])?;
    for ((outcome, key), count) in shared.cancels.counts() {
        cancels.with_label_values(&[outcome, key]).inc_by(count);
    }
    let limited = scrape.counter(
        "pgherd_limits_rejected_total",
        "Turned away by a limit, or by what a listener takes.",
        &["limit"],
    )?;
    for ((limit, _), count) in shared.limited.counts() {
        limited.with_label_values(&[limit]).inc_by(count);
    }
    Ok(())
}

fn cluster(scrape: &Scrape, state: &State) -> prometheus::Result<()> {
    scrape.single(
        "pgherd_writable",
        "Whether writes have a route now.",
        i64::from(state.writable),
    )?;
    scrape.single(
        "pgherd_paused",
        "Whether the cluster is in maintenance.",
        i64::from(state.paused),
    )?;
    scrape.single("pgherd_view_revision", "The revision of the view.", state.view.revision)?;
    scrape.total(
        "pgherd_dcs_relists_total",
        "Full reads of the cluster's keys.",
        state.view.relists,
    )?;
    let follows = state.view.store == "following";
    scrape.single(
        "pgherd_dcs_up",
        "Whether the cluster's store answers.",
        i64::from(follows),
    )?;
    let left = state.view.warrant_left_seconds;
    scrape.seconds(
        "pgherd_warrant_remaining_seconds",
        "How long writes may still be routed on the last proof.",
        left,
    )?;
    if let Some(age) = state.view.age_seconds {
        scrape.seconds(
            "pgherd_view_age_seconds",
            "The age of the last proof that the leader leads.",
            age,
        )?;
    }
    Ok(())
}

fn members(scrape: &Scrape, state: &State) -> prometheus::Result<()> {
    let leader = scrape.gauge(
        "pgherd_leader",
        "1 for the member that holds the leader key.",
        &["node"],
    )?;
    let role = scrape.gauge(
        "pgherd_node_role",
        "1 for the role that a member has.",
        &["node", "role"],
    )?;
    let timeline = scrape.gauge("pgherd_node_timeline", "The timeline that a member is on.", &["node"])?;
    let lag = scrape.gauge(
        "pgherd_replication_lag_bytes",
        "How far a member is behind the leader's last known position.",
        &["node", "kind"],
    )?;
    let lag_time = GaugeVec::new(
        Opts::new(
            "pgherd_replication_lag_seconds",
            "How long the leader is known to be past a member.",
        ),
        &["node"],
    )?;
    scrape.0.register(Box::new(lag_time.clone()))?;
    let connect = GaugeVec::new(
        Opts::new(
            "pgherd_node_connect_seconds",
            "How long readers took to connect lately.",
        ),
        &["node"],
    )?;
    scrape.0.register(Box::new(connect.clone()))?;
    let weight = GaugeVec::new(
        Opts::new(
            "pgherd_node_weight",
            "The share of readers that a member gets: 1 is full, 0 none because it failed.",
        ),
        &["node"],
    )?;
    scrape.0.register(Box::new(weight.clone()))?;
    if let Some(held_by) = &state.leader {
        scrape.single(
            "pgherd_leader_epoch",
            "The revision that created the leader key.",
            held_by.epoch,
        )?;
    }
    for member in &state.members {
        let leads = state.leader.as_ref().is_some_and(|held_by| held_by.name == member.name);
        leader.with_label_values(&[&member.name]).set(i64::from(leads));
        role.with_label_values(&[member.name.as_str(), member.role]).set(1);
        if let Some(on) = member.timeline {
            timeline.with_label_values(&[&member.name]).set(i64::from(on));
        }
        if let Some(bytes) = member.lag_bytes.filter(|_| !leads) {
            lag.with_label_values(&[member.name.as_str(), "replay"])
                .set(whole(bytes));
        }
        weight.with_label_values(&[&member.name]).set(member.weight);
        if let Some(seconds) = member.connect_seconds {
            connect.with_label_values(&[&member.name]).set(seconds);
        }
        if let Some(seconds) = member.lag_seconds.filter(|_| !leads) {
            lag_time.with_label_values(&[&member.name]).set(seconds);
        }
    }
    Ok(())
}
