//! The cluster that a standby cluster follows.

use serde_json::{Map, Value};

use super::Address;

const PORT: u16 = 5432;

/// The section `standby_cluster` of the dynamic configuration, once it names a source: texts as PostgreSQL takes them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StandbyCluster {
    /// Where to stream from: one host, or several with commas between them.
    pub host: Option<String>,
    /// One port for all hosts, or as many as there are hosts.
    pub port: Option<String>,
    /// The slot there; none is used without it.
    pub primary_slot_name: Option<String>,
    /// How its archive is read.
    pub restore_command: Option<String>,
    /// How what is not needed any more leaves its archive.
    pub archive_cleanup_command: Option<String>,
    /// How long replay waits.
    pub recovery_min_apply_delay: Option<String>,
    /// How the first member is made; a base backup unless set.
    pub create_replica_methods: Vec<String>,
}

impl StandbyCluster {
    /// Reads the section; nothing when it names no source, and the cluster is an ordinary one.
    #[must_use]
    pub fn read(section: &Map<String, Value>) -> Option<Self> {
        let text = |name: &str| text(section.get(name)?);
        let methods = match section.get("create_replica_methods") {
            Some(Value::Array(methods)) => methods.iter().filter_map(text_of).collect(),
            Some(Value::String(methods)) => methods.split(',').map(|name| name.trim().to_owned()).collect(),
            _ => Vec::new(),
        };
        let read = Self {
            host: text("host"),
            port: text("port"),
            primary_slot_name: text("primary_slot_name"),
            restore_command: text("restore_command"),
            archive_cleanup_command: text("archive_cleanup_command"),
            recovery_min_apply_delay: text("recovery_min_apply_delay"),
            create_replica_methods: methods,
        };
        (read.streams() || read.restore_command.is_some()).then_some(read)
    }

    /// Whether there is somebody to stream from; the archive alone is read otherwise.
    #[must_use]
    pub const fn streams(&self) -> bool {
        self.host.is_some() || self.port.is_some()
    }

    /// Everybody to stream from, as libpq pairs hosts and ports.
    #[must_use]
    pub fn addresses(&self) -> Vec<Address> {
        if !self.streams() {
            return Vec::new();
        }
        let hosts: Vec<&str> = self.host.as_deref().unwrap_or("localhost").split(',').collect();
        let ports: Vec<u16> = self.port.as_deref().unwrap_or_default().split(',').map(port).collect();
        let port_of = |index: usize| ports.get(index).or(ports.last()).copied().unwrap_or(PORT);
        let address = |(index, host): (usize, &&str)| Address {
            host: host.trim().to_owned(),
            port: port_of(index),
        };
        hosts.iter().enumerate().map(address).collect()
    }
}

fn port(text: &str) -> u16 {
    text.trim().parse().unwrap_or(PORT)
}

fn text_of(value: &Value) -> Option<String> {
    text(value)
}

/// What is said; an empty text, a null and a no say nothing.
fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.trim().to_owned()).filter(|text| !text.is_empty()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(section: Value) -> Option<StandbyCluster> {
        StandbyCluster::read(section.as_object().expect("a map"))
    }

    #[test]
    fn a_section_that_names_no_source_is_none() {
        for section in [
            json!({}),
            json!({"primary_slot_name": "s"}),
            json!({"host": "", "port": null}),
            json!({"create_replica_methods": ["basebackup"]}),
        ] {
            assert_eq!(read(section.clone()), None, "{section}");
        }
        assert!(read(json!({"port": 5433})).is_some_and(|section| section.streams()));
        let archive = read(json!({"restore_command": "cp /archive/%f %p"})).expect("a source");
        assert!(!archive.streams() && archive.addresses().is_empty());
    }

    #[test]
    fn hosts_and_ports_are_paired_as_libpq_does() {
        let addresses = |section: Value| -> Vec<String> {
            let read = read(section).expect("a source");
            read.addresses().iter().map(ToString::to_string).collect()
        };
        assert_eq!(addresses(json!({"host": "a"})), ["a:5432"]);
        assert_eq!(addresses(json!({"host": "a,b", "port": 6000})), ["a:6000", "b:6000"]);
        assert_eq!(addresses(json!({"host": "a, b", "port": "1,2"})), ["a:1", "b:2"]);
        assert_eq!(addresses(json!({"port": "7"})), ["localhost:7"]);
    }
}
