//! The `proxy` section: what DESIGN calls the proxy's part of the file, with defaults for all of it.

mod console;
mod page;
mod reading;
pub(crate) mod source;
mod tls;
pub(crate) mod unix;

use std::path::PathBuf;
use std::time::Duration;

use pgherd_cluster::record::Address;
use pgherd_proxy::tls::{ClientTlsConfig, ListenerTls, ServerTlsConfig};
use pgherd_proxy::{ApplicationName, LimitsConfig, ListenerRole, Network, ReadRules, SLOW_START, SOCKET_MODE};
use serde_json::Value;

use self::console::ConsoleSection;
use self::page::PageSection;
use self::source::SourceSection;
use super::limits::{self, count};
use super::section::Section;
use super::value;

/// The proxy's part of the configuration, read and checked; [`crate::run`] hands it on in the proxy's own types.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProxySection {
    pub(crate) source: SourceSection,
    pub(crate) listeners: Vec<Listener>,
    pub(crate) hold_timeout: Duration,
    pub(crate) hold_clients: usize,
    pub(crate) limits: LimitsConfig,
    pub(crate) stats: Address,
    /// Who may see the page, and the file that says so.
    pub(crate) page: PageSection,
    /// The pseudo-database, and the files that say who may see it; nothing when it is absent.
    pub(crate) console: Option<ConsoleSection>,
    /// As many as there are processors when absent.
    pub(crate) workers: Option<usize>,
    pub(crate) drain: Duration,
    pub(crate) application_name: Option<ApplicationName>,
    pub(crate) log_sessions: bool,
    /// The socket through which a new proxy takes this one over; a default place when absent.
    pub(crate) takeover: Option<PathBuf>,
    pub(crate) client_tls: Option<ClientTlsConfig>,
    pub(crate) server_tls: ServerTlsConfig,
    pub(crate) zone: Option<String>,
    pub(crate) slow_start: Duration,
}

/// One port for clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listener {
    pub(crate) address: Address,
    pub(crate) role: ListenerRole,
    pub(crate) reads: ReadRules,
    pub(crate) tls: ListenerTls,
    /// Of the file of a unix socket.
    pub(crate) mode: u32,
    pub(crate) allow: Vec<Network>,
    pub(crate) proxy_protocol: Vec<Network>,
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
    let server_tls = tls::servers(&section);
    let source = source::read(root, &section, &server_tls);
    let hold = section.section("hold");
    let limits = limits::read(&section.section("limits"));
    let connections = limits.connections;
    let hold_clients = count(&hold, "clients", 0).unwrap_or(1000.min(connections));
    if hold_clients > connections {
        hold.error(
            "clients",
            format!("{hold_clients} is more than proxy.limits.connections, which is {connections}; write less"),
        );
    }
    let listeners = listeners(&section);
    let stats = stats(&section.section("stats"));
    let page = page::read(&section.section("stats"));
    let console = section
        .has("console")
        .then(|| console::read(&section.section("console")));
    let client_tls = tls::clients(&section);
    tls::check_listeners(
        &section,
        listeners.as_deref().unwrap_or_default(),
        &client_tls,
        &server_tls,
    );
    // All of them are read, for their findings, before one that is missing ends this.
    let hold_timeout = hold.duration("timeout").unwrap_or(Duration::from_secs(10));
    let workers = workers(&section);
    let zone = section.text("zone");
    let slow_start = section.duration("slow_start").unwrap_or(SLOW_START);
    let drain = section.duration("drain").unwrap_or(Duration::from_secs(30));
    let application_name = application_name(&section);
    Some(ProxySection {
        source: source?,
        page,
        console,
        listeners: listeners?,
        hold_timeout,
        hold_clients,
        limits,
        stats: stats?,
        workers,
        drain,
        application_name,
        log_sessions: section.boolean("log_sessions").unwrap_or(false),
        takeover: section.text("takeover").map(PathBuf::from),
        client_tls,
        server_tls,
        zone,
        slow_start,
    })
}

fn application_name(section: &Section<'_>) -> Option<ApplicationName> {
    let text = section.text("application_name")?;
    let read = text.parse::<ApplicationName>();
    read.map_err(|error| section.error("application_name", format!("{text:?} {error}")))
        .ok()
}

fn workers(section: &Section<'_>) -> Option<usize> {
    if section.get("workers").and_then(Value::as_str) == Some("auto") {
        return None;
    }
    count(section, "workers", 1)
}

fn stats(section: &Section<'_>) -> Option<Address> {
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
                tls: ListenerTls::Off,
                mode: SOCKET_MODE,
                allow: Vec::new(),
                proxy_protocol: Vec::new(),
            },
            Listener {
                address: everywhere(READ_PORT),
                role: ListenerRole::Read,
                reads: ReadRules {
                    fallback_to_leader: true,
                    ..ReadRules::none()
                },
                tls: ListenerTls::Off,
                mode: SOCKET_MODE,
                allow: Vec::new(),
                proxy_protocol: Vec::new(),
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
        section.missing("address", "HOST:PORT, such as 0.0.0.0:5432, or /DIRECTORY:PORT");
    }
    let address = unix::address(section);
    if !section.has("role") {
        section.missing("role", &ROLES.map(ListenerRole::as_str).join(" or "));
    }
    let words = ROLES.map(ListenerRole::as_str);
    let role = one_of(section, "role", &words, &[]);
    let role = role.and_then(|word| ROLES.into_iter().find(|role| role.as_str() == word));
    let tls = tls::of_listener(section);
    let reads = reading::read(section, role);
    if let Some(reads) = &reads {
        tls::check_passthrough(section, tls, reads);
    }
    let listener = Listener {
        address: address?,
        role: role?,
        reads: reads?,
        tls,
        mode: unix::mode(section),
        allow: limits::networks(section, "allow"),
        proxy_protocol: limits::networks(section, "proxy_protocol"),
    };
    unix::check(section, &listener);
    Some(listener)
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
pub(crate) mod tests {
    use pgherd_proxy::tls::{ClientCertificates, MinVersion, ServerTlsMode};
    use serde_json::json;

    use super::*;
    use crate::config::section::Findings;

    pub(crate) fn read_from(section: Value) -> (Option<ProxySection>, Vec<String>) {
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
                {"address": "*:6432", "role": "write", "tls": "passthrough", "allow": ["10.0.0.0/8", "::1"], "proxy_protocol": "192.0.2.7"},
                {"address": "127.0.0.1:6433", "role": "read", "max_lag": "16MB", "fallback": "leader", "tls": false},
            ],
            "server_tls": "prefer",
            "hold": {"timeout": "500ms", "clients": 5},
            "limits": {"connections": 7, "per_client_address": 0},
            "stats": {"address": "127.0.0.1:9000"},
            "workers": 2,
            "drain": "3s",
            "application_name": "{name} via {address}",
            "log_sessions": true,
            "zone": "a",
            "slow_start": "1min",
        }));
        assert_eq!(errors, Vec::<String>::new());
        let config = config.expect("no errors");
        assert!(config.application_name.is_some() && config.log_sessions);
        assert_eq!(config.listeners[0].address.to_string(), "0.0.0.0:6432");
        assert_eq!(
            (
                config.listeners[0].allow.len(),
                config.listeners[0].proxy_protocol.len()
            ),
            (2, 1)
        );
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
            (config.limits.connections, config.workers, config.drain),
            (7, Some(2), Duration::from_secs(3))
        );
        assert_eq!(
            (config.zone.as_deref(), config.slow_start),
            (Some("a"), Duration::from_secs(60))
        );
    }

    #[test]
    fn mistakes_outside_listeners_and_limits_are_told_too() {
        for (section, expected) in [
            (
                json!({"application_name": "{name} via {adress}"}),
                "proxy.application_name: \"{name} via {adress}\" has \"{adress}\", which is none of {name}, {address}, {port} and {listener}",
            ),
            (
                json!({"zone": ["a"]}),
                "proxy.zone: a list is not a text; write a text, in quotes if YAML takes it for something else",
            ),
            (
                json!({"slow_start": "slowly"}),
                "proxy.slow_start: \"slowly\" is not a duration; write one such as 10s, 500ms or 2min",
            ),
        ] {
            let found = read_from(section.clone()).1;
            assert_eq!(found.first().map(String::as_str), Some(expected), "{section}");
        }
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
        assert_eq!(
            config.server_tls.identity,
            Some(("sc".into(), PathBuf::from("sk").into()))
        );
        let (absent, _) = read_from(json!({}));
        assert_eq!(absent.expect("defaults").server_tls.mode, ServerTlsMode::Disable);
    }

    #[test]
    fn mistakes_are_told_with_key_value_and_fix() {
        for (section, expected) in [
            (
                json!({"source": "magic"}),
                "proxy.source: \"magic\" is not known here; write etcd or agents or static",
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
                "proxy.listeners[0].address: missing; write HOST:PORT, such as 0.0.0.0:5432, or /DIRECTORY:PORT",
            ),
            (
                json!({"listeners": [{"address": "a:1", "role": "write", "tls": "require"}]}),
                "proxy.tls: missing; write {certificate: FILE, private_key: FILE}: the listener a:1 ends TLS and needs something to show",
            ),
            (
                json!({"listeners": [{"address": "a:1", "role": "write", "tls": "verify-full"}]}),
                "proxy.listeners[0].tls: \"verify-full\" is not known here; write off or allow or require or passthrough",
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
                json!({"listeners": [{"address": "a:1", "role": "write", "allow": ["10.0.0.1/8"]}]}),
                "proxy.listeners[0].allow: \"10.0.0.1/8\" has address bits beyond its prefix; write 10.0.0.0/8, or 10.0.0.1 for that one address",
            ),
            (
                json!({"listeners": [{"address": "a:1", "role": "write", "allow": []}]}),
                "proxy.listeners[0].allow: an empty list; write addresses or networks such as 10.0.0.0/8, or remove it",
            ),
            (
                json!({"listeners": [{"address": "a:1", "role": "write", "proxy_protocol": "lb.example.com"}]}),
                "proxy.listeners[0].proxy_protocol: \"lb.example.com\" is not an address or a network; write one such as 10.0.0.0/8, 192.0.2.7 or fd00::/8",
            ),
            (
                json!({"stats": {"password": "secret"}}),
                "proxy.stats.username: missing; write the name that goes with the password",
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
