//! The `patroni.yml` of a test's members and proxies, as JSON values that a test may alter before they are written.

use std::net::Ipv4Addr;
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::address::{POSTGRES_PORT, READ_PORT, REST_PORT, STATS_PORT, WRITE_PORT, at};
use crate::sql::{SUPERUSER, SUPERUSER_PASSWORD};

/// The scope of every test cluster; each has an etcd of its own.
pub const SCOPE: &str = "testkit";
/// The password of the user that replicas stream as.
pub const REPLICATION_PASSWORD: &str = "replication-secret-of-tests";
/// The prefix of its keys.
pub const PREFIX: &str = "/service/testkit/";

/// What the configuration of one member says of its surroundings.
#[derive(Clone, Copy, Debug)]
pub struct MemberPlace<'a> {
    /// The member's name.
    pub name: &'a str,
    /// Its address.
    pub ip: Ipv4Addr,
    /// A directory of its own; the data directory is `data` in it.
    pub dir: &'a Path,
    /// PostgreSQL's programs.
    pub bin_dir: &'a Path,
}

/// The `etcd3` section.
#[must_use]
pub fn etcd3(hosts: &[String], credentials: Option<(&str, &str)>) -> Value {
    match credentials {
        Some((user, password)) => json!({"hosts": hosts, "username": user, "password": password}),
        None => json!({"hosts": hosts}),
    }
}

/// The dynamic configuration that test clusters begin with: pgherd's own timing, and a small PostgreSQL.
#[must_use]
pub fn dcs() -> Value {
    json!({
        "ttl": 5,
        "loop_wait": 1,
        "retry_timeout": 2,
        "failsafe_mode": true,
        "postgresql": {
            "use_pg_rewind": true,
            "parameters": {"max_connections": 50, "max_worker_processes": 4, "wal_keep_size": "64MB"},
        },
    })
}

/// One member's configuration.
#[must_use]
pub fn member(place: &MemberPlace<'_>, etcd3: Value, dcs: Value) -> Value {
    let superuser = json!({"username": SUPERUSER, "password": SUPERUSER_PASSWORD});
    let replication = json!({"username": "replicator", "password": REPLICATION_PASSWORD});
    json!({
        "scope": SCOPE,
        "name": place.name,
        "etcd3": etcd3,
        "restapi": {"listen": at(place.ip, REST_PORT).to_string()},
        "bootstrap": {"dcs": dcs, "initdb": [{"encoding": "UTF8"}, {"locale": "C.UTF-8"}, "data-checksums"]},
        "postgresql": {
            "listen": at(place.ip, POSTGRES_PORT).to_string(),
            "data_dir": place.dir.join("data"),
            "bin_dir": place.bin_dir,
            "pgpass": place.dir.join("pgpass"),
            "authentication": {"superuser": superuser, "replication": replication},
            "pg_hba": [
                "local all all trust",
                "host replication replicator 127.0.0.0/8 scram-sha-256",
                "host all all 127.0.0.0/8 scram-sha-256",
            ],
            "parameters": {
                "shared_buffers": "16MB",
                // Its files lie in the data directory and go with it, also after a SIGKILL.
                "dynamic_shared_memory_type": "mmap",
                "max_wal_size": "128MB",
                "password_encryption": "scram-sha-256",
                "unix_socket_directories": place.dir,
            },
        },
        "pgherd": {"runtime_dir": place.dir.join("run")},
    })
}

/// What a member's configuration says instead, where clients and members have the addresses of `cidr`.
#[must_use]
pub fn access_from(cidr: &str) -> Value {
    json!({"postgresql": {"pg_hba": [
        "local all all trust",
        format!("host replication replicator {cidr} scram-sha-256"),
        format!("host all all {cidr} scram-sha-256"),
    ]}})
}

/// A proxy's configuration.
#[must_use]
pub fn proxy(ip: Ipv4Addr, etcd3: Value) -> Value {
    json!({
        "scope": SCOPE,
        "etcd3": etcd3,
        "proxy": {
            "listeners": [
                {"address": at(ip, WRITE_PORT).to_string(), "role": "write"},
                {"address": at(ip, READ_PORT).to_string(), "role": "read", "fallback": "leader"},
            ],
            "stats": {"address": at(ip, STATS_PORT).to_string()},
        },
    })
}

/// Puts what `over` says over `base`, map by map; a null takes a key away.
pub fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                if value.is_null() {
                    base.remove(&key);
                } else {
                    merge(base.entry(key).or_insert(Value::Object(Map::new())), value);
                }
            }
        }
        (base, over) => *base = over,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_goes_deep_and_null_takes_away() {
        let mut base = json!({"a": {"b": 1, "c": 2}, "d": [1]});
        merge(&mut base, json!({"a": {"b": null, "e": {"f": 3}}, "d": [2]}));
        assert_eq!(base, json!({"a": {"c": 2, "e": {"f": 3}}, "d": [2]}));
    }
}
