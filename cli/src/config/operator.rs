//! What operators' commands read of a configuration: where etcd is and what members' REST interfaces are shown. A
//! `patronictl.yaml` will do, and so will a URL alone.

use std::path::PathBuf;

use pgherd_agent::config::Credentials;
use pgherd_cluster::http::{AccessConfig, Endpoint};
use serde_json::{Map, Value, json};

use super::{Document, Source, agent};
use crate::failure::Failure;

/// Keys of an etcd section that say where it is; the others say how it is spoken to.
const PLACES: [&str; 8] = [
    "host",
    "hosts",
    "port",
    "url",
    "proxy",
    "srv",
    "discovery_srv",
    "srv_domain",
];

/// What an operator said about where the cluster is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Said<'a> {
    /// The file that was named.
    pub(crate) file: Option<&'a PathBuf>,
    /// The URL of etcd.
    pub(crate) dcs_url: Option<&'a str>,
    /// Whether any certificate is believed.
    pub(crate) insecure: bool,
    /// Whether patronictl's own file comes before the others.
    pub(crate) as_patronictl: bool,
}

impl Document {
    /// Reads what an operator's command needs.
    ///
    /// # Errors
    /// When a named file cannot be read, or nothing says where etcd is.
    pub(crate) fn for_operator(said: Said<'_>) -> Result<Self, Failure> {
        let own = patronictl_file(|name| std::env::var_os(name).map(PathBuf::from)).filter(|file| file.is_file());
        let first = own.clone().filter(|_| said.as_patronictl);
        let mut document = match (said.file, first) {
            (Some(file), _) => Self::load(Some(file.clone()))?,
            (None, Some(own)) => Self::load(Some(own))?,
            (None, None) => match (Self::load(None), own) {
                (Ok(document), _) => document,
                (Err(_), Some(own)) => Self::load(Some(own))?,
                (Err(_), None) if said.dcs_url.is_some() => Self::of_source(Source::Environment)?,
                (Err(error), None) => return Err(error),
            },
        };
        if let Some(url) = said.dcs_url {
            put_dcs_url(&mut document.tree, url).map_err(Failure::configuration)?;
        }
        if said.insecure {
            section_of(&mut document.tree, "ctl").insert("insecure".to_owned(), true.into());
        }
        Ok(document)
    }

    /// How members' REST interfaces are reached.
    pub(crate) fn operator_access(&self) -> AccessConfig {
        // Whether a certificate is missing is told by who needs one.
        super::rest::peers(&self.root(), false)
    }

    /// Where the REST interface of the member is whose configuration this is.
    pub(crate) fn own_agent(&self) -> Option<Endpoint> {
        let root = self.root();
        let section = root.section("restapi");
        let address = section.text("connect_address").or_else(|| section.text("listen"))?;
        let scheme = if section.has("certfile") { "https" } else { "http" };
        Endpoint::of(&format!("{scheme}://{address}"))
    }

    /// Who owns the cluster, where the configuration is a member's.
    pub(crate) fn superuser(&self) -> Option<Credentials> {
        let authentication = self.root().section("postgresql").section("authentication");
        agent::credentials(&authentication.section("superuser"))
    }
}

/// Where patronictl looks by itself.
fn patronictl_file(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    let set = |name: &str| variable(name).filter(|value| !value.as_os_str().is_empty());
    let base = set("XDG_CONFIG_HOME").or_else(|| Some(set("HOME")?.join(".config")));
    Some(base?.join("patroni").join("patronictl.yaml"))
}

/// Puts `[etcd3://]HOST:PORT[/NAMESPACE]` in the place of what the configuration says. How etcd is spoken to stays.
fn put_dcs_url(tree: &mut Map<String, Value>, url: &str) -> Result<(), String> {
    let (scheme, rest) = url.split_once("://").unwrap_or(("etcd3", url));
    if !["etcd", "etcd3"].contains(&scheme) {
        return Err(format!(
            "--dcs-url: {scheme:?} is another store, and pgherd keeps its state in etcd only; write etcd3://HOST:2379"
        ));
    }
    let (host, namespace) = rest.split_once('/').unwrap_or((rest, ""));
    if host.is_empty() {
        return Err("--dcs-url: names no host; write etcd3://HOST:2379".to_owned());
    }
    if !tree.contains_key("etcd3")
        && let Some(section) = tree.shift_remove("etcd")
    {
        tree.insert("etcd3".to_owned(), section);
    }
    let section = section_of(tree, "etcd3");
    for key in PLACES {
        section.shift_remove(key);
    }
    section.insert("hosts".to_owned(), json!([host]));
    if !namespace.trim_matches('/').is_empty() {
        tree.insert(
            "namespace".to_owned(),
            format!("/{}/", namespace.trim_matches('/')).into(),
        );
    }
    Ok(())
}

/// The section under `name`, made where there is none.
fn section_of<'a>(tree: &'a mut Map<String, Value>, name: &str) -> &'a mut Map<String, Value> {
    let entry = tree.entry(name.to_owned()).or_insert_with(|| Value::Object(Map::new()));
    if !entry.is_object() {
        *entry = Value::Object(Map::new());
    }
    match entry {
        Value::Object(section) => section,
        _ => unreachable!("it was just made a section"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_url(tree: Value, url: &str) -> Result<Value, String> {
        let Value::Object(mut tree) = tree else { panic!("a map") };
        put_dcs_url(&mut tree, url).map(|()| Value::Object(tree))
    }

    #[test]
    fn a_url_says_where_etcd_is_and_leaves_how_it_is_spoken_to() {
        for (tree, url, expected) in [
            (json!({}), "h:2379", json!({"etcd3": {"hosts": ["h:2379"]}})),
            (json!({}), "etcd://h", json!({"etcd3": {"hosts": ["h"]}})),
            (
                json!({"etcd": {"url": "x", "username": "u"}, "scope": "c"}),
                "etcd3://h:1/db/",
                json!({"scope": "c", "etcd3": {"username": "u", "hosts": ["h:1"]}, "namespace": "/db/"}),
            ),
        ] {
            assert_eq!(with_url(tree, url), Ok(expected), "{url}");
        }
        for url in ["zookeeper://h:2181", "consul://h", "etcd3://", ""] {
            assert!(
                with_url(json!({}), url).is_err_and(|error| error.starts_with("--dcs-url: ")),
                "{url}"
            );
        }
    }

    #[test]
    fn patronictls_own_file_lies_under_the_users_configuration() {
        let file = |xdg: Option<&str>, home: Option<&str>| {
            patronictl_file(|name| {
                let value = if name == "HOME" { home } else { xdg };
                value.map(PathBuf::from)
            })
        };
        assert_eq!(
            file(None, Some("/home/a")),
            Some("/home/a/.config/patroni/patronictl.yaml".into())
        );
        assert_eq!(
            file(Some("/x"), Some("/home/a")),
            Some("/x/patroni/patronictl.yaml".into())
        );
        assert_eq!(file(Some(""), None), None);
    }
}
