//! The `proxy` section: what DESIGN calls the proxy's part of the file, with defaults for all of it.

mod reading;

use std::time::Duration;

use pgherd_cluster::record::Address;
use pgherd_proxy::{ListenerRole, ReadRules, SLOW_START};
use serde_json::Value;

use super::section::Section;
use super::value;

/// The proxy's part of the configuration, read and checked; [`crate::run`] hands it on in the proxy's own types.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProxySection {
    pub(crate) listeners: Vec<Listener>,
    pub(crate) hold_timeout: Duration,
    pub(crate) hold_clients: usize,
    pub(crate) connections: usize,
    pub(crate) stats: Address,
    /// As many as there are processors when absent.
    pub(crate) workers: Option<usize>,
    pub(crate) drain: Duration,
    pub(crate) zone: Option<String>,
    pub(crate) slow_start: Duration,
}

/// One port for clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listener {
    pub(crate) address: Address,
    pub(crate) role: ListenerRole,
    pub(crate) reads: ReadRules,
}

const ROLES: [ListenerRole; 6] = [
    ListenerRole::Write,
    ListenerRole::Read,
    ListenerRole::Sync,
    ListenerRole::Async,
    ListenerRole::Any,
    ListenerRole::StandbyLeader,
];
const WRITE_PORT: u16 = 5432;
const READ_PORT: u16 = 5433;
const STATS_PORT: u16 = 8080;

fn everywhere(port: u16) -> Address {
    Address {
        host: "0.0.0.0".to_owned(),
        port,
    }
}

/// Reads the section; an absent one gives the defaults.
pub(crate) fn read(root: &Section<'_>) -> Option<ProxySection> {
    let section = root.section("proxy");
    one_of(&section, "source", &["etcd"], &["agents", "static"]);
    one_of(
        &section,
        "server_tls",
        &["prefer", "allow", "disable"],
        &["require", "verify-ca", "verify-full"],
    );
    let hold = section.section("hold");
    let limits = section.section("limits");
    if limits.integer("per_client_address", 0).is_some_and(|limit| limit > 0) {
        limits.error(
            "per_client_address",
            "a limit per client is not in this version; write 0, or remove it",
        );
    }
    let connections = count(&limits, "connections", 1).unwrap_or(10_000);
    let hold_clients = count(&hold, "clients", 0).unwrap_or(1000.min(connections));
    if hold_clients > connections {
        hold.error(
            "clients",
            format!("{hold_clients} is more than proxy.limits.connections, which is {connections}; write less"),
        );
    }
    let listeners = listeners(&section);
    let stats = stats(&section.section("stats"));
    // All of them are read, for their findings, before one that is missing ends this.
    let hold_timeout = hold.duration("timeout").unwrap_or(Duration::from_secs(10));
    let workers = workers(&section);
    let zone = section.text("zone");
    let slow_start = section.duration("slow_start").unwrap_or(SLOW_START);
    let drain = section.duration("drain").unwrap_or(Duration::from_secs(30));
    Some(ProxySection {
        listeners: listeners?,
        hold_timeout,
        hold_clients,
        connections,
        stats: stats?,
        workers,
        drain,
        zone,
        slow_start,
    })
}

fn count(section: &Section<'_>, key: &str, min: i64) -> Option<usize> {
    section.integer(key, min).and_then(|count| usize::try_from(count).ok())
}

fn workers(section: &Section<'_>) -> Option<usize> {
    if section.get("workers").and_then(Value::as_str) == Some("auto") {
        return None;
    }
    count(section, "workers", 1)
}

fn stats(section: &Section<'_>) -> Option<Address> {
    for key in ["username", "password", "password_file"]
        .into_iter()
        .filter(|key| section.has(key))
    {
        section.error(
            key,
            "the page cannot be guarded in this version; remove it, and let the page listen on 127.0.0.1",
        );
    }
    if section.has("address") {
        section.address("address", STATS_PORT).map(bindable)
    } else {
        Some(everywhere(STATS_PORT))
    }
}

fn listeners(section: &Section<'_>) -> Option<Vec<Listener>> {
    let Some(found) = section.get("listeners") else {
        return Some(vec![
            Listener {
                address: everywhere(WRITE_PORT),
                role: ListenerRole::Write,
                reads: ReadRules::none(),
            },
            Listener {
                address: everywhere(READ_PORT),
                role: ListenerRole::Read,
                reads: ReadRules {
                    fallback_to_leader: true,
                    ..ReadRules::none()
                },
            },
        ]);
    };
    let Some(elements) = found.as_array().filter(|elements| !elements.is_empty()) else {
        section.unusable(
            "listeners",
            found,
            "a list of listeners",
            "one `- {address: \"0.0.0.0:5432\", role: write}` per line",
        );
        return None;
    };
    let read = elements
        .iter()
        .enumerate()
        .map(|(index, element)| listener(&section.element("listeners", index, element)));
    let read: Vec<Option<Listener>> = read.collect(); // All of them, for their findings.
    let listeners: Vec<Listener> = read.into_iter().collect::<Option<_>>()?;
    for (index, listener) in listeners.iter().enumerate() {
        if listeners
            .iter()
            .take(index)
            .any(|earlier| earlier.address == listener.address)
        {
            section.error(
                "listeners",
                format!("\"{}\" is listed twice; give each its own port", listener.address),
            );
        }
    }
    Some(listeners)
}

fn listener(section: &Section<'_>) -> Option<Listener> {
    if !section.has("address") {
        section.missing("address", "HOST:PORT, such as 0.0.0.0:5432");
    }
    let address = section.address("address", WRITE_PORT).map(bindable);
    if !section.has("role") {
        section.missing("role", &ROLES.map(ListenerRole::as_str).join(" or "));
    }
    let words = ROLES.map(ListenerRole::as_str);
    let role = one_of(section, "role", &words, &[]);
    let role = role.and_then(|word| ROLES.into_iter().find(|role| role.as_str() == word));
    one_of(
        section,
        "tls",
        &["off", "allow"],
        &["require", "on", "verify-ca", "verify-full"],
    );
    let reads = reading::read(section, role);
    Some(Listener {
        address: address?,
        role: role?,
        reads: reads?,
    })
}

/// A word out of a few. YAML takes some of them for yes or no.
pub(super) fn one_of<'w>(section: &Section<'_>, key: &str, words: &[&'w str], not_yet: &[&str]) -> Option<&'w str> {
    let found = section.get(key)?;
    let text = match found {
        Value::Bool(true) => "on".to_owned(),
        Value::Bool(false) => "off".to_owned(),
        other => value::text(other).unwrap_or_default(),
    };
    if not_yet.contains(&text.as_str()) {
        section.error(
            key,
            format!("{text:?} is not in this version; write {}", words.join(" or ")),
        );
        return None;
    }
    let word = words.iter().find(|word| **word == text).copied();
    if word.is_none() {
        section.unusable(key, found, "known here", &words.join(" or "));
    }
    word
}

fn bindable(address: Address) -> Address {
    if address.host == "*" {
        everywhere(address.port)
    } else {
        address
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::section::Findings;

    fn read_from(section: Value) -> (Option<ProxySection>, Vec<String>) {
        let tree = json!({ "proxy": section });
        let findings = Findings::default();
        let config = read(&Section::root(tree.as_object().expect("a map"), &findings));
        (config, findings.errors())
    }

    #[test]
    fn nothing_at_all_gives_the_usual_ports() {
        let (config, errors) = read_from(Value::Null);
        assert_eq!(errors, Vec::<String>::new());
        let config = config.expect("no errors");
        let ports: Vec<u16> = config.listeners.iter().map(|listener| listener.address.port).collect();
        assert_eq!(
            (ports, config.stats.port, config.workers),
            (vec![5432, 5433], 8080, None)
        );
    }

    #[test]
    fn a_whole_section_is_read() {
        let (config, errors) = read_from(json!({
            "source": "etcd",
            "listeners": [
                {"address": "*:6432", "role": "write", "tls": "allow"},
                {"address": "127.0.0.1:6433", "role": "read", "max_lag": "16MB", "fallback": "leader", "tls": false},
            ],
            "server_tls": "prefer",
            "hold": {"timeout": "500ms", "clients": 5},
            "limits": {"connections": 7, "per_client_address": 0},
            "stats": {"address": "127.0.0.1:9000"},
            "workers": 2,
            "drain": "3s",
            "zone": "a",
            "slow_start": "1min",
        }));
        assert_eq!(errors, Vec::<String>::new());
        let config = config.expect("no errors");
        assert_eq!(config.listeners[0].address.to_string(), "0.0.0.0:6432");
        assert_eq!(
            (
                config.listeners[1].reads.max_lag_bytes,
                config.listeners[1].reads.fallback_to_leader
            ),
            (Some(16 << 20), true)
        );
        assert_eq!(
            (config.hold_timeout, config.hold_clients),
            (Duration::from_millis(500), 5)
        );
        assert_eq!(
            (config.connections, config.workers, config.drain),
            (7, Some(2), Duration::from_secs(3))
        );
        assert_eq!(
            (config.zone.as_deref(), config.slow_start),
            (Some("a"), Duration::from_secs(60))
        );
    }

    #[test]
    fn mistakes_are_told_with_key_value_and_fix() {
        for (section, expected) in [
            (
                json!({"source": "agents"}),
                "proxy.source: \"agents\" is not in this version; write etcd",
            ),
            (
                json!({"source": "magic"}),
                "proxy.source: \"magic\" is not known here; write etcd",
            ),
            (
                json!({"listeners": []}),
                "proxy.listeners: an empty list is not a list of listeners; write one `- {address: \"0.0.0.0:5432\", role: write}` per line",
            ),
            (
                json!({"listeners": [5]}),
                "proxy.listeners[0]: 5 is not a section; write { key: value, ... }",
            ),
            (
                json!({"listeners": [{"address": "a:1", "role": "reed"}]}),
                "proxy.listeners[0].role: \"reed\" is not known here; write write or read or sync or async or any or standby_leader",
            ),
            (
                json!({"listeners": [{"role": "write"}]}),
                "proxy.listeners[0].address: missing; write HOST:PORT, such as 0.0.0.0:5432",
            ),
            (
                json!({"listeners": [{"address": "a:1", "role": "write", "tls": "require"}]}),
                "proxy.listeners[0].tls: \"require\" is not in this version; write off or allow",
            ),
            (
                json!({"listeners": [{"address": "a:1", "role": "write", "max_lag": 1}]}),
                "proxy.listeners[0].max_lag: has no meaning for role: write; remove it here",
            ),
            (
                json!({"listeners": [{"address": "a:1", "role": "write"}, {"address": "a:1", "role": "read"}]}),
                "proxy.listeners: \"a:1\" is listed twice; give each its own port",
            ),
            (
                json!({"limits": {"per_client_address": 5}}),
                "proxy.limits.per_client_address: a limit per client is not in this version; write 0, or remove it",
            ),
            (
                json!({"stats": {"password_file": "/x"}}),
                "proxy.stats.password_file: the page cannot be guarded in this version; remove it, and let the page listen on 127.0.0.1",
            ),
            (
                json!({"zone": ["a"]}),
                "proxy.zone: a list is not a text; write a text, in quotes if YAML takes it for something else",
            ),
            (
                json!({"slow_start": "slowly"}),
                "proxy.slow_start: \"slowly\" is not a duration; write one such as 10s, 500ms or 2min",
            ),
            (
                json!({"workers": 0}),
                "proxy.workers: 0 is not such a number; write a whole number from 1 up",
            ),
        ] {
            let found = read_from(section.clone()).1;
            assert_eq!(found.first().map(String::as_str), Some(expected), "{section}");
        }
    }
}
