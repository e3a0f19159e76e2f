//! HAProxy's and PgBouncer's names, for dashboards that were made for these: what HAProxy's own `/metrics` calls things, and
//! prometheus-community/pgbouncer_exporter.

use std::collections::BTreeMap;

use pgherd_cluster::clock::Boottime;

use super::text::Page;
use crate::config::ListenerRole;
use crate::shared::Shared;
use crate::stats::state::State;

/// Databases and users are clients' own words, so only so many are told apart; the rest is one row.
const POOLS_MAX: usize = 100;
const OTHERS: &str = "(others)";

/// As HAProxy's configurations for Patroni call what we call a listener.
fn proxy_of(role: ListenerRole) -> &'static str {
    match role {
        ListenerRole::Write => "primary",
        ListenerRole::Read => "replicas",
        other => other.as_str(),
    }
}

#[derive(Default)]
struct Server {
    open: usize,
    total: u64,
    bytes_in: u64,
    bytes_out: u64,
}

#[derive(Default)]
struct Frontend {
    connections: usize,
    accepted: u64,
    held: usize,
}

/// HAProxy's names.
pub(super) fn haproxy(page: &mut Page, shared: &Shared, state: &State) {
    let listeners = shared.listeners();
    let mut servers: Servers<'_> = BTreeMap::new();
    let mut frontends: BTreeMap<&str, Frontend> = BTreeMap::new();
    for listener in listeners.iter() {
        let proxy = proxy_of(listener.config.load().role);
        let frontend = frontends.entry(proxy).or_default();
        frontend.connections += listener.connections.get();
        frontend.accepted += listener.accepted.load(std::sync::atomic::Ordering::Relaxed);
        frontend.held += listener.held.get();
        for member in &state.members {
            servers.entry((proxy, member.name.clone())).or_default();
        }
    }
    for route in shared.routes.counts() {
        let Some(listener) = listeners.get(route.listener) else {
            continue;
        };
        let proxy = proxy_of(listener.config.load().role);
        let server = servers.entry((proxy, route.member.to_string())).or_default();
        server.open += route.open;
        server.total += route.total;
        server.bytes_in += route.bytes_to_server;
        server.bytes_out += route.bytes_to_client;
    }
    add_status(page, state, &servers, &frontends);
    add_numbers(page, &servers, &frontends);
}

/// What a proxy has by member.
type Servers<'a> = BTreeMap<(&'a str, String), Server>;

/// Who is up: whoever takes from this proxy what the listener is for.
fn add_status(page: &mut Page, state: &State, servers: &Servers<'_>, frontends: &BTreeMap<&str, Frontend>) {
    let is_up = |proxy: &str, name: &str| {
        let wanted = if proxy == "primary" { "write" } else { "read" };
        state
            .members
            .iter()
            .any(|member| member.name == name && member.takes == Some(wanted))
    };
    page.metric(
        "haproxy_server_status",
        "gauge",
        "Current status of the service, per state label value.",
    );
    for (proxy, name) in servers.keys() {
        let up = is_up(proxy, name);
        for (word, value) in [("UP", up), ("DOWN", !up)] {
            let labels = [("proxy", *proxy), ("server", name.as_str()), ("state", word)];
            page.sample("haproxy_server_status", &labels, u8::from(value));
        }
    }
    page.metric(
        "haproxy_backend_status",
        "gauge",
        "Current status of the service, per state label value.",
    );
    for proxy in frontends.keys() {
        let up = servers.keys().any(|(of, name)| of == proxy && is_up(proxy, name));
        for (word, value) in [("UP", up), ("DOWN", !up)] {
            page.sample(
                "haproxy_backend_status",
                &[("proxy", proxy), ("state", word)],
                u8::from(value),
            );
        }
    }
    page.metric(
        "haproxy_backend_active_servers",
        "gauge",
        "Total number of active UP servers with a non-zero weight",
    );
    for proxy in frontends.keys() {
        let up = servers
            .keys()
            .filter(|(of, name)| of == proxy && is_up(proxy, name))
            .count();
        page.sample("haproxy_backend_active_servers", &[("proxy", proxy)], up);
    }
}

fn add_numbers(page: &mut Page, servers: &Servers<'_>, frontends: &BTreeMap<&str, Frontend>) {
    type OfServer = fn(&Server) -> u64;
    let of_server: [(&str, &str, &str, OfServer); 4] = [
        (
            "haproxy_server_current_sessions",
            "gauge",
            "Current number of active sessions",
            |server| server.open as u64,
        ),
        (
            "haproxy_server_sessions_total",
            "counter",
            "Total number of sessions",
            |server| server.total,
        ),
        (
            "haproxy_server_bytes_in_total",
            "counter",
            "Total number of request bytes",
            |server| server.bytes_in,
        ),
        (
            "haproxy_server_bytes_out_total",
            "counter",
            "Total number of response bytes",
            |server| server.bytes_out,
        ),
    ];
    for (metric, kind, help, value) in of_server {
        page.metric(metric, kind, help);
        for ((proxy, name), server) in servers {
            page.sample(metric, &[("proxy", proxy), ("server", name)], value(server));
        }
    }
    type OfFrontend = fn(&Frontend) -> u64;
    let of_frontend: [(&str, &str, &str, OfFrontend); 3] = [
        (
            "haproxy_frontend_current_sessions",
            "gauge",
            "Current number of active sessions",
            |front| front.connections as u64,
        ),
        (
            "haproxy_frontend_connections_total",
            "counter",
            "Total number of new connections",
            |front| front.accepted,
        ),
        (
            "haproxy_backend_current_queue",
            "gauge",
            "Current number of queued requests",
            |front| front.held as u64,
        ),
    ];
    for (metric, kind, help, value) in of_frontend {
        page.metric(metric, kind, help);
        for (proxy, frontend) in frontends {
            page.sample(metric, &[("proxy", proxy)], value(frontend));
        }
    }
}

#[derive(Default)]
struct Pool {
    active: usize,
    waiting: usize,
    longest: f64,
}

/// PgBouncer's exporter's names.
pub(super) fn pgbouncer(page: &mut Page, shared: &Shared) {
    let now = Boottime::now();
    let mut pools: BTreeMap<(String, String), Pool> = BTreeMap::new();
    let key = |about: &crate::client::About| {
        let name = |name: &Option<String>, none: &str| name.clone().unwrap_or_else(|| none.to_owned());
        (name(&about.who.database, "(nodb)"), name(&about.who.user, "(nouser)"))
    };
    for session in shared.sessions.list() {
        pool_of(&mut pools, key(&session.about)).active += 1;
    }
    for waiter in shared.waiting.list() {
        let pool = pool_of(&mut pools, key(&waiter.about));
        pool.waiting += 1;
        pool.longest = pool.longest.max(now.since(waiter.since).as_secs_f64());
    }
    page.metric("pgbouncer_up", "gauge", "The pgbouncer scrape succeeded");
    page.sample("pgbouncer_up", &[], 1);
    type OfPool = fn(&Pool) -> f64;
    #[expect(clippy::cast_precision_loss, reason = "there are no so many")]
    let of_pool: [(&str, &str, OfPool); 4] = [
        (
            "pgbouncer_pools_client_active_connections",
            "Client connections linked to server connection and able to process queries, shown as connection",
            |pool| pool.active as f64,
        ),
        (
            "pgbouncer_pools_client_waiting_connections",
            "Client connections waiting on a server connection, shown as connection",
            |pool| pool.waiting as f64,
        ),
        (
            "pgbouncer_pools_server_active_connections",
            "Server connections linked to a client connection, shown as connection",
            |pool| pool.active as f64,
        ),
        (
            "pgbouncer_pools_client_maxwait_seconds",
            "Age of oldest unserved client connection, shown as second",
            |pool| pool.longest,
        ),
    ];
    for (metric, help, value) in of_pool {
        page.metric(metric, "gauge", help);
        for ((database, user), pool) in &pools {
            page.sample(metric, &[("database", database), ("user", user)], value(pool));
        }
    }
    let config = shared.config.load();
    let connections = shared.admitted.get();
    for (metric, help, value) in [
        ("pgbouncer_used_clients", "Count of used clients", connections),
        (
            "pgbouncer_free_clients",
            "Count of free clients",
            config.limits.connections.saturating_sub(connections),
        ),
        ("pgbouncer_pools", "Count of pools", pools.len()),
        (
            "pgbouncer_config_max_client_connections",
            "Config maximum number of client connections",
            config.limits.connections,
        ),
    ] {
        page.metric(metric, "gauge", help);
        page.sample(metric, &[], value);
    }
}

fn pool_of(pools: &mut BTreeMap<(String, String), Pool>, key: (String, String)) -> &mut Pool {
    let key = match pools.contains_key(&key) || pools.len() < POOLS_MAX {
        true => key,
        false => (OTHERS.to_owned(), OTHERS.to_owned()),
    };
    pools.entry(key).or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_clients_make_up_do_not_become_ever_more_labels() {
        let mut pools = BTreeMap::new();
        for number in 0..1000 {
            pool_of(&mut pools, (format!("d{number}"), "u".to_owned())).active += 1;
        }
        assert_eq!(pools.len(), POOLS_MAX + 1);
        assert_eq!(pools[&(OTHERS.to_owned(), OTHERS.to_owned())].active, 900);
    }
}
