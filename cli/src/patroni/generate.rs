//! A configuration to begin with, in the shape of Patroni's own sample.

use std::net::{IpAddr, UdpSocket};

use serde_json::{Map, Value, json};

const FIXME: &str = "#FIXME";

/// The address that others most likely reach this machine by; nothing is sent to find out.
pub(super) fn local_address() -> String {
    let found = UdpSocket::bind("0.0.0.0:0").and_then(|socket| {
        socket.connect("192.0.2.1:9")?; // A documentation address: connecting only chooses the way there.
        socket.local_addr()
    });
    found.map_or_else(|_| FIXME.to_owned(), |address| IpAddr::to_string(&address.ip()))
}

/// The name of this machine.
pub(super) fn host_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if name.is_empty() { FIXME.to_owned() } else { name }
}

/// The sample. What only its reader can know is marked.
pub(super) fn sample(address: &str) -> Map<String, Value> {
    let parameters = json!({
        "hot_standby": "on", "max_connections": 100, "max_locks_per_transaction": 64, "max_prepared_transactions": 0,
        "max_replication_slots": 10, "max_wal_senders": 10, "max_worker_processes": 8, "track_commit_timestamp": "off",
        "wal_keep_size": "128MB", "wal_level": "replica", "wal_log_hints": "on",
    });
    let user = |name: &str| json!({"username": name, "password": FIXME});
    let sample = json!({
        "scope": FIXME,
        "name": host_name(),
        "etcd3": {"hosts": [format!("{address}:2379")]},
        "log": {"type": "plain", "level": "INFO", "format": "%(asctime)s %(levelname)s: %(message)s", "max_queue_size": 1000},
        "restapi": {"listen": format!("{address}:8008"), "connect_address": format!("{address}:8008")},
        "bootstrap": {"dcs": {
            "ttl": 30, "loop_wait": 10, "retry_timeout": 10,
            "postgresql": {"use_pg_rewind": true, "use_slots": true, "parameters": parameters},
        }},
        "postgresql": {
            "listen": format!("{address}:5432"),
            "connect_address": format!("{address}:5432"),
            "data_dir": FIXME,
            "bin_dir": FIXME,
            "authentication": {"superuser": user("postgres"), "replication": user("replicator"), "rewind": user("rewind_user")},
            "pg_hba": ["host all all all scram-sha-256", "host replication replicator all scram-sha-256"],
        },
        "tags": {
            "clonefrom": true, "failover_priority": 1, "noloadbalance": false, "nostream": false, "nosync": false,
            "sync_priority": 1,
        },
    });
    sample.as_object().cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sample_has_patronis_sections() {
        let sample = sample("10.0.0.1");
        let sections: Vec<&str> = sample.keys().map(String::as_str).collect();
        assert_eq!(
            sections,
            [
                "scope",
                "name",
                "etcd3",
                "log",
                "restapi",
                "bootstrap",
                "postgresql",
                "tags"
            ]
        );
        assert_eq!(sample["postgresql"]["listen"], "10.0.0.1:5432");
        assert_eq!(
            sample["bootstrap"]["dcs"]["postgresql"]["parameters"]["wal_level"],
            "replica"
        );
    }
}
