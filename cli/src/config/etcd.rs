//! The `etcd3` or `etcd` section: both mean the v3 interface.

use pgherd_cluster::etcd::{Discovery, EtcdConfig, EtcdTls};
use pgherd_cluster::record::Address;
use serde_json::Value;

use super::section::Section;
use super::value;

/// etcd's port for clients.
const CLIENT_PORT: u16 = 2379;
/// etcd's port for its own members, which clients are often pointed at by mistake.
const PEER_PORT: u16 = 2380;
/// Stores that Patroni knows beside etcd.
const OTHER_STORES: [&str; 5] = ["consul", "zookeeper", "kubernetes", "exhibitor", "raft"];

/// The section's name, for messages about what etcd said.
pub(crate) fn section_name(root: &Section<'_>) -> &'static str {
    if root.has("etcd3") || !root.has("etcd") {
        "etcd3"
    } else {
        "etcd"
    }
}

/// Reads how to reach etcd.
pub(crate) fn read(root: &Section<'_>) -> Option<EtcdConfig> {
    if !root.has("etcd3") && !root.has("etcd") {
        match OTHER_STORES.iter().find(|store| root.has(store)) {
            Some(store) => root.error(
                store,
                "pgherd keeps its state in etcd only; set up etcd and write etcd3: {hosts: [...]}",
            ),
            None => root.missing("etcd3", "{hosts: [HOST:2379, ...]}"),
        }
        return None;
    }
    let name = section_name(root);
    if name == "etcd" {
        root.warn(
            "etcd",
            "read as etcd's v3 interface, as etcd3: is; keys that Patroni wrote through v2 are not seen",
        );
    } else if root.has("etcd") {
        root.warn("etcd", "ignored, since there is an etcd3: section");
    }
    let section = root.section(name);
    let discovery = discovery(&section);
    let endpoints = match discovery {
        Some(_) => Vec::new(),
        None => endpoints(&section)?,
    };
    let credentials = credentials(&section);
    let path = |key: &str| section.text(key).map(Into::into);
    let (cert, key) = (section.text("cert"), section.text("key"));
    if cert.is_none() && key.is_some() {
        section.missing("cert", "the path of the certificate that belongs to the key");
    }
    let tls = EtcdTls {
        cacert: path("cacert"),
        // One file may hold both.
        key: key.or_else(|| cert.clone()).map(Into::into),
        cert: cert.map(Into::into),
    };
    let in_the_clear = endpoints.iter().all(|endpoint| endpoint.starts_with("http://"));
    if discovery.is_none() && in_the_clear && (tls.cacert.is_some() || tls.cert.is_some()) {
        section.warn(
            "protocol",
            "http, so that cacert, cert and key are not used; write protocol: https to use them",
        );
    }
    Some(EtcdConfig {
        endpoints,
        discovery,
        credentials,
        tls,
    })
}

fn credentials(section: &Section<'_>) -> Option<(String, String)> {
    let (username, password) = (section.text("username"), section.secret("password"));
    match (&username, &password) {
        (Some(_), None) => section.missing("password", "the password of that etcd user"),
        (None, Some(_)) => section.missing("username", "the etcd user that the password belongs to"),
        _ => {}
    }
    username.zip(password)
}

/// Where endpoints are looked up in DNS. Endpoints that are named win, as with Patroni.
fn discovery(section: &Section<'_>) -> Option<Discovery> {
    let suffix = section.text("srv_suffix");
    let key = ["srv", "discovery_srv", "srv_domain"]
        .into_iter()
        .find(|key| section.has(key));
    let named = NAMED.into_iter().find(|key| section.has(key));
    match (key, named) {
        (None, _) if suffix.is_some() => section.missing("srv", "the domain whose services the suffix is of"),
        (Some(key), Some(named)) => {
            section.warn(key, format!("has no effect beside {named}, which says where etcd is"))
        }
        _ => {}
    }
    let key = key.filter(|_| named.is_none())?;
    section.boolean("use_proxies"); // For its finding.
    Some(Discovery {
        domain: section.text(key)?.trim_end_matches('.').to_owned(),
        suffix,
    })
}

/// The keys that name endpoints, in the order of who wins.
const NAMED: [&str; 4] = ["hosts", "host", "url", "proxy"];

fn endpoints(section: &Section<'_>) -> Option<Vec<String>> {
    let protocol = protocol(section)?;
    // A proxy is asked as it is named, and so is every endpoint: there is no list of members to be kept from.
    section.boolean("use_proxies");
    let (key, texts) = match NAMED.into_iter().find(|key| section.has(key)) {
        Some("hosts") => ("hosts", section.texts("hosts")?),
        Some(key) => (key, vec![section.text(key)?]),
        None => {
            section.missing("hosts", "[HOST:2379, ...]");
            return None;
        }
    };
    if texts.is_empty() {
        section.error(key, "names no host; write [HOST:2379, ...]");
    }
    let port = section
        .integer("port", 1)
        .and_then(|port| u16::try_from(port).ok())
        .unwrap_or(CLIENT_PORT);
    let endpoints: Vec<String> = texts
        .iter()
        .filter_map(|text| endpoint(section, key, text, protocol, port))
        .collect();
    (!endpoints.is_empty() && endpoints.len() == texts.len()).then_some(endpoints)
}

fn protocol(section: &Section<'_>) -> Option<&'static str> {
    match section.text("protocol").as_deref() {
        None | Some("http") => Some("http"),
        Some("https") => Some("https"),
        Some(other) => {
            section.unusable("protocol", &Value::from(other), "a protocol of etcd's", "http or https");
            None
        }
    }
}

fn endpoint(section: &Section<'_>, key: &str, text: &str, protocol: &str, port_default: u16) -> Option<String> {
    let (scheme, rest) = text.split_once("://").unwrap_or((protocol, text));
    let address = value::address(rest.trim_end_matches('/'), port_default);
    let address = address.filter(|address| !value::is_wildcard(&address.host));
    let (Some(address), true) = (address, ["http", "https"].contains(&scheme)) else {
        // A URL may carry a user and a password, so it is not shown when it has any.
        let shown = text.rsplit_once('@').map_or(text, |(_, host)| host);
        section.error(key, format!("{shown:?} is not an endpoint; write HOST:2379"));
        return None;
    };
    let Address { host: _, port } = address;
    if port == PEER_PORT {
        section.warn(
            key,
            format!("{text:?}: {PEER_PORT} is etcd's port for its own members; clients use {CLIENT_PORT}"),
        );
    }
    Some(format!("{scheme}://{address}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::section::Findings;

    fn read_from(tree: &Value) -> (Option<EtcdConfig>, Vec<String>, Vec<String>) {
        let findings = Findings::default();
        let config = read(&Section::root(tree.as_object().expect("a map"), &findings));
        (config, findings.errors(), findings.warnings())
    }

    #[test]
    fn every_way_to_name_endpoints_works() {
        for (section, expected) in [
            (json!({"host": "a:1"}), vec!["http://a:1"]),
            (json!({"host": "a"}), vec!["http://a:2379"]),
            (json!({"hosts": ["a:1", "b"]}), vec!["http://a:1", "http://b:2379"]),
            (json!({"hosts": "a:1, 'b:2'"}), vec!["http://a:1", "http://b:2"]),
            (json!({"hosts": ["a"], "protocol": "https"}), vec!["https://a:2379"]),
            (json!({"url": "https://a:1"}), vec!["https://a:1"]),
            (json!({"host": "[::1]:2379"}), vec!["http://[::1]:2379"]),
            (json!({"host": "a", "port": "4001"}), vec!["http://a:4001"]),
        ] {
            for name in ["etcd", "etcd3"] {
                let (config, errors, _) = read_from(&json!({ name: section }));
                assert_eq!(errors, Vec::<String>::new(), "{section}");
                assert_eq!(
                    config.map(|config| config.endpoints),
                    Some(expected.iter().map(|s| (*s).to_owned()).collect())
                );
            }
        }
    }

    #[test]
    fn mistakes_are_told_with_key_value_and_fix() {
        for (tree, expected) in [
            (json!({}), "etcd3: missing; write {hosts: [HOST:2379, ...]}"),
            (
                json!({"consul": {}}),
                "consul: pgherd keeps its state in etcd only; set up etcd and write etcd3: {hosts: [...]}",
            ),
            (json!({"etcd3": {}}), "etcd3.hosts: missing; write [HOST:2379, ...]"),
            (
                json!({"etcd3": {"host": "a:x"}}),
                "etcd3.host: \"a:x\" is not an endpoint; write HOST:2379",
            ),
            (
                json!({"etcd3": {"url": "ftp://u:secret@a:1"}}),
                "etcd3.url: \"a:1\" is not an endpoint; write HOST:2379",
            ),
            (
                json!({"etcd3": {"hosts": []}}),
                "etcd3.hosts: names no host; write [HOST:2379, ...]",
            ),
            (
                json!({"etcd3": {"host": "a", "protocol": "grpc"}}),
                "etcd3.protocol: \"grpc\" is not a protocol of etcd's; write http or https",
            ),
            (
                json!({"etcd3": {"host": "a", "username": "u"}}),
                "etcd3.password: missing; write the password of that etcd user",
            ),
            (
                json!({"etcd": {"host": "a", "password": "p"}}),
                "etcd.username: missing; write the etcd user that the password belongs to",
            ),
            (
                json!({"etcd3": {"host": "a", "srv_suffix": "x"}}),
                "etcd3.srv: missing; write the domain whose services the suffix is of",
            ),
            (
                json!({"etcd3": {"proxy": "http://a:1", "use_proxies": "maybe"}}),
                "etcd3.use_proxies: \"maybe\" is not a yes or no; write true or false",
            ),
        ] {
            assert_eq!(read_from(&tree).1, [expected], "{tree}");
        }
    }

    #[test]
    fn a_domain_is_looked_up_where_no_endpoint_is_named() {
        for key in ["srv", "discovery_srv", "srv_domain"] {
            let (config, errors, warnings) =
                read_from(&json!({"etcd3": {key: "example.com.", "srv_suffix": "db", "cacert": "/ca.pem"}}));
            assert_eq!((errors, warnings), (vec![], vec![]));
            let expected = Discovery {
                domain: "example.com".to_owned(),
                suffix: Some("db".to_owned()),
            };
            assert_eq!(config.and_then(|config| config.discovery), Some(expected));
        }
        let (config, _, warnings) = read_from(&json!({"etcd3": {"srv": "example.com", "host": "a"}}));
        assert_eq!(config.and_then(|config| config.discovery), None);
        assert_eq!(
            warnings,
            ["etcd3.srv: has no effect beside host, which says where etcd is"]
        );
    }

    #[test]
    fn the_peer_port_and_v2_are_warned_of_and_a_certificate_may_hold_its_key() {
        let (config, errors, warnings) =
            read_from(&json!({"etcd": {"host": "a:2380", "protocol": "https", "cert": "/c.pem"}}));
        assert_eq!(errors, Vec::<String>::new());
        assert!(
            warnings[0].contains("v3 interface") && warnings[1].contains("clients use 2379"),
            "{warnings:?}"
        );
        assert_eq!(config.and_then(|config| config.tls.key), Some("/c.pem".into()));
    }
}
