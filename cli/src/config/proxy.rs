//! The `proxy` section: what DESIGN calls the proxy's part of the file, with defaults for all of it.

mod tls;

use std::time::Duration;

use pgherd_cluster::record::Address;
use pgherd_proxy::tls::{ClientTlsConfig, ListenerTls, ServerTlsConfig};
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
    pub(crate) client_tls: Option<ClientTlsConfig>,
    pub(crate) server_tls: ServerTlsConfig,
}

/// One port for clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listener {
    pub(crate) address: Address,
    pub(crate) role: Role,
    pub(crate) max_lag_bytes: Option<u64>,
    pub(crate) fallback_to_leader: bool,
    pub(crate) tls: ListenerTls,
}

/// Where a listener's clients are led.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// To the leader.
    Write,
    /// To replicas.
    Read,
}

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
    let client_tls = tls::clients(&section);
    let server_tls = tls::servers(&section);
    tls::check_listeners(
        &section,
        listeners.as_deref().unwrap_or_default(),
        &client_tls,
        &server_tls,
    );
    // All of them are read, for their findings, before one that is missing ends this.
    let hold_timeout = hold.duration("timeout").unwrap_or(Duration::from_secs(10));
    let workers = workers(&section);
    let drain = section.duration("drain").unwrap_or(Duration::from_secs(30));
    Some(ProxySection {
        listeners: listeners?,
        hold_timeout,
        hold_clients,
        connections,
        stats: stats?,
        workers,
        drain,
        client_tls,
        server_tls,
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
                role: Role::Write,
                max_lag_bytes: None,
                fallback_to_leader: false,
                tls: ListenerTls::Off,
            },
            Listener {
                address: everywhere(READ_PORT),
                role: Role::Read,
                max_lag_bytes: None,
                fallback_to_leader: true,
                tls: ListenerTls::Off,
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
        section.missing("role", "write or read");
    }
    let role = match one_of(
        section,
        "role",
        &["write", "read"],
        &["sync", "async", "any", "standby_leader"],
    ) {
        Some("write") => Some(Role::Write),
        Some("read") => Some(Role::Read),
        _ => None,
    };
    let tls = tls::of_listener(section);
    let max_lag_bytes = section.size("max_lag");
    let fallback = one_of(section, "fallback", &["leader", "none", "off"], &[]);
    if role == Some(Role::Write) {
        for key in ["max_lag", "fallback"].into_iter().filter(|key| section.has(key)) {
            section.error(key, "has a meaning for role: read only; remove it here");
        }
    }
    Some(Listener {
        address: address?,
        role: role?,
        max_lag_bytes,
        fallback_to_leader: fallback == Some("leader"),
        tls,
    })
}

/// A word out of a few. YAML takes some of them for yes or no.
fn one_of<'w>(section: &Section<'_>, key: &str, words: &[&'w str], not_yet: &[&str]) -> Option<&'w str> {
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
    use pgherd_proxy::tls::{ClientCertificates, MinVersion, ServerTlsMode};
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
                {"address": "*:6432", "role": "write", "tls": "passthrough"},
                {"address": "127.0.0.1:6433", "role": "read", "max_lag": "16MB", "fallback": "leader", "tls": false},
            ],
            "server_tls": "prefer",
            "hold": {"timeout": "500ms", "clients": 5},
            "limits": {"connections": 7, "per_client_address": 0},
            "stats": {"address": "127.0.0.1:9000"},
            "workers": 2,
            "drain": "3s",
        }));
        assert_eq!(errors, Vec::<String>::new());
        let config = config.expect("no errors");
        assert_eq!(config.listeners[0].address.to_string(), "0.0.0.0:6432");
        assert_eq!(
            (
                config.listeners[1].max_lag_bytes,
                config.listeners[1].fallback_to_leader
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
    }

    #[test]
    fn the_keys_of_tls_are_read() {
        // YAML takes 1.3 for a number, and off for no.
        let (config, errors) = read_from(json!({
            "listeners": [{"address": "a:1", "role": "write", "tls": "require"}, {"address": "a:2", "role": "read", "tls": false}],
            "tls": {"certificate": "c", "private_key": "k", "client_ca": "ca", "map_users": true, "min_version": 1.3},
            "server_tls": "prefer",
            "server_certificate": "sc",
            "server_key": "sk",
        }));
        assert_eq!(errors, Vec::<String>::new());
        let config = config.expect("no errors");
        let tls: Vec<ListenerTls> = config.listeners.iter().map(|listener| listener.tls).collect();
        assert_eq!(tls, [ListenerTls::Require, ListenerTls::Off]);
        let clients = config.client_tls.expect("a section");
        assert_eq!(
            (clients.min_version, clients.client_certificates, clients.map_users),
            (MinVersion::Tls13, ClientCertificates::Optional, true)
        );
        assert_eq!(config.server_tls.mode, ServerTlsMode::Prefer);
        assert_eq!(config.server_tls.identity, Some(("sc".into(), "sk".into())));
        let (absent, _) = read_from(json!({}));
        assert_eq!(absent.expect("defaults").server_tls.mode, ServerTlsMode::Disable);
    }

    fn expect_told(cases: impl IntoIterator<Item = (Value, &'static str)>) {
        for (section, expected) in cases {
            let found = read_from(section.clone()).1;
            assert_eq!(found.first().map(String::as_str), Some(expected), "{section}");
        }
    }

    #[test]
    fn mistakes_are_told_with_key_value_and_fix() {
        expect_told([
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
                json!({"listeners": [{"address": "a:1", "role": "sync"}]}),
                "proxy.listeners[0].role: \"sync\" is not in this version; write write or read",
            ),
            (
                json!({"listeners": [{"role": "write"}]}),
                "proxy.listeners[0].address: missing; write HOST:PORT, such as 0.0.0.0:5432",
            ),
            (
                json!({"listeners": [{"address": "a:1", "role": "write", "max_lag": 1}]}),
                "proxy.listeners[0].max_lag: has a meaning for role: read only; remove it here",
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
                json!({"workers": 0}),
                "proxy.workers: 0 is not such a number; write a whole number from 1 up",
            ),
        ]);
    }

    #[test]
    fn mistakes_with_tls_are_told() {
        expect_told([
            (
                json!({"listeners": [{"address": "a:1", "role": "write", "tls": "require"}]}),
                "proxy.tls: missing; write {certificate: FILE, private_key: FILE}: the listener a:1 ends TLS and needs something to show",
            ),
            (
                json!({"listeners": [{"address": "a:1", "role": "write", "tls": "verify-full"}]}),
                "proxy.listeners[0].tls: \"verify-full\" is not known here; write off or allow or require or passthrough",
            ),
            (
                json!({
                    "listeners": [{"address": "a:1", "role": "write", "tls": "allow"}],
                    "tls": {"certificate": "c", "private_key": "k"},
                    "server_tls": "require",
                }),
                "proxy.server_tls: require together with a listener that ends TLS (a:1) lets nobody log in by SCRAM: the client binds its password exchange to the proxy's certificate, and the member to its own. Write tls: passthrough on the listener, or server_tls: prefer or disable, or tls: off on the listener",
            ),
            (
                json!({"server_tls": "verify-full"}),
                "proxy.server_ca: missing; write the file of the CAs that members' certificates lead to",
            ),
            (
                json!({"tls": {"certificate": "c", "private_key": "k", "map_users": true}}),
                "proxy.tls.map_users: no client is asked for a certificate; write client_certificate: required, or remove this",
            ),
            (
                json!({"tls": {"private_key": "k"}}),
                "proxy.tls.certificate: missing; write the file of the proxy's certificate, in PEM",
            ),
            (
                json!({"server_tls": "prefer", "server_certificate": "c"}),
                "proxy.server_key: missing; write the file of the key of server_certificate",
            ),
            (
                json!({"tls": {"certificate": "c", "private_key": "k", "client_certificate": "required"}}),
                "proxy.tls.client_ca: missing; write the file of the CAs that clients' certificates lead to",
            ),
        ]);
    }
}
