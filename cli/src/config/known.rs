//! Which keys exist. An unknown one is a warning with the nearest known name in Patroni's sections, and an error in ours,
//! where nothing but a mistake can explain it.

use serde_json::Value;

use super::section::Section;

/// Patroni's sections and their keys. A section that is not listed takes any key.
const PATRONI: &[(&str, &str)] = &[
    (
        "",
        "scope name namespace thread_pool_size thread_stack_size log restapi ctl etcd etcd3 consul zookeeper exhibitor \
         kubernetes raft bootstrap postgresql watchdog tags citus proxy pgherd",
    ),
    (
        "log",
        "type level traceback_level format dateformat static_fields max_queue_size dir mode file_num file_size loggers \
         deduplicate_heartbeat_logs",
    ),
    (
        "restapi",
        "listen connect_address authentication certfile keyfile keyfile_password cafile ciphers verify_client allowlist \
         allowlist_include_members http_extra_headers https_extra_headers request_queue_size thread_pool_size server_tokens",
    ),
    ("restapi.authentication", "username password password_file"),
    (
        "ctl",
        "authentication insecure cacert certfile keyfile keyfile_password",
    ),
    ("ctl.authentication", "username password password_file"),
    ("etcd", ETCD),
    ("etcd3", ETCD),
    ("watchdog", "mode device safety_margin driver"),
    (
        "postgresql",
        "listen connect_address proxy_address data_dir config_dir config_base_name custom_conf bin_dir bin_name database \
         pgpass use_unix_socket use_unix_socket_repl authentication parameters pg_hba pg_ident recovery_conf callbacks \
         create_replica_methods create_replica_method basebackup pg_ctl_timeout use_pg_rewind use_slots \
         remove_data_directory_on_rewind_failure remove_data_directory_on_diverged_timelines pre_promote before_stop \
         krbsrvname",
    ),
    (
        "postgresql.bin_name",
        "pg_ctl initdb pg_controldata pg_basebackup postgres pg_isready pg_rewind",
    ),
    ("postgresql.authentication", "superuser replication rewind"),
    ("postgresql.authentication.superuser", LOGIN),
    ("postgresql.authentication.replication", LOGIN),
    ("postgresql.authentication.rewind", LOGIN),
    (
        "postgresql.callbacks",
        "on_start on_stop on_restart on_reload on_role_change",
    ),
    ("bootstrap", "dcs initdb method pg_hba post_bootstrap post_init users"),
    (
        "bootstrap.dcs",
        "ttl loop_wait retry_timeout maximum_lag_on_failover maximum_lag_on_syncnode check_timeline max_timelines_history \
         primary_start_timeout master_start_timeout primary_stop_timeout master_stop_timeout synchronous_mode \
         synchronous_mode_strict synchronous_node_count failsafe_mode pause member_slots_ttl slots permanent_slots \
         permanent_replication_slots ignore_slots standby_cluster postgresql pgherd",
    ),
    (
        "bootstrap.dcs.standby_cluster",
        "host port primary_slot_name create_replica_methods restore_command archive_cleanup_command \
         recovery_min_apply_delay",
    ),
];

const ETCD: &str = "host hosts url proxy srv srv_suffix discovery_srv srv_domain protocol use_proxies username password \
                    password_file cacert cert key port";
const LOGIN: &str = "username password password_file sslmode sslcert sslkey sslpassword sslrootcert sslcrl sslcrldir gssencmode \
                     channel_binding sslnegotiation";

/// Our own sections and their keys, `[]` standing for the elements of a list.
const OURS: &[(&str, &str)] = &[
    (
        "proxy",
        "source urls hosts probe listeners tls server_tls server_ca server_certificate server_key hold limits stats console workers drain takeover \
         application_name log_sessions zone slow_start",
    ),
    (
        "proxy.listeners[]",
        "address mode role tls tags max_lag max_lag_time fallback fallback_max on_promoted on_stale rebalance max_session_age \
         allow proxy_protocol",
    ),
    (
        "proxy.tls",
        "certificate private_key client_ca client_certificate map_users min_version",
    ),
    ("proxy.hold", "timeout clients"),
    (
        "proxy.limits",
        "connections per_user per_database per_client_address per_member queue startups startups_per_client_address startups_per_member \
         reserved operators",
    ),
    ("proxy.limits.queue", "clients timeout"),
    (
        "proxy.stats",
        "address username password password_file tls compat_metrics",
    ),
    (
        "proxy.stats.tls",
        "certificate private_key client_ca client_certificate min_version",
    ),
    ("proxy.console", "database users peers"),
    ("proxy.console.users[]", "username password password_file admin"),
    ("proxy.probe", "username database password_file passfile"),
    ("pgherd", "runtime_dir initdb_d parameters"),
    ("pgherd.parameters", "primary replica"),
    ("bootstrap.dcs.pgherd", "failover_slots parameters"),
    ("bootstrap.dcs.pgherd.parameters", "primary replica"),
];

/// Reports every key that nobody reads.
pub(crate) fn report_unknown_keys(root: &Section<'_>) {
    for (path, keys) in PATRONI {
        let section = walk(root, path);
        let named = methods(&section, path);
        for (key, _) in section.entries() {
            if !is_listed(keys, key) && !named.contains(key) {
                section.warn(key, unknown(key, keys));
            }
        }
    }
    for (path, keys) in OURS {
        for section in walk_ours(root, path) {
            for (key, _) in section.entries() {
                if !is_listed(keys, key) {
                    section.error(key, unknown(key, keys));
                }
            }
        }
    }
}

fn is_listed(keys: &str, key: &str) -> bool {
    keys.split_whitespace().any(|known| known == key)
}

fn unknown(key: &str, keys: &str) -> String {
    match nearest(key, keys.split_whitespace()) {
        Some(near) => format!("unknown key; did you mean {near}?"),
        None => "unknown key; remove it, or look for its place".to_owned(),
    }
}

fn walk<'a>(root: &Section<'a>, path: &str) -> Section<'a> {
    let parts = path.split('.').filter(|part| !part.is_empty());
    // A section that is not one is told by whoever reads it; one that nobody reads is no trouble.
    parts.fold(root.clone(), |section, part| section.quiet_section(part))
}

fn walk_ours<'a>(root: &Section<'a>, path: &str) -> Vec<Section<'a>> {
    let Some(list) = path.strip_suffix("[]") else {
        return vec![walk(root, path)];
    };
    let (parent, key) = list.rsplit_once('.').unwrap_or(("", list));
    let parent = walk(root, parent);
    let elements = parent
        .get(key)
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .enumerate();
    elements
        .filter(|(_, element)| element.is_object())
        .map(|(index, element)| parent.element(key, index, element))
        .collect()
}

/// Custom methods bring sections of their own name.
fn methods(section: &Section<'_>, path: &str) -> Vec<String> {
    let listed = match path {
        "postgresql" => ["create_replica_methods", "create_replica_method"]
            .iter()
            .find_map(|key| section.get(key)),
        "bootstrap" => section.get("method"),
        _ => None,
    };
    listed.and_then(super::value::texts).unwrap_or_default()
}

/// The known name that `name` was probably meant to be: few edits away, for its length.
pub(crate) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let name = name.to_lowercase();
    let closest = known
        .map(|candidate| (edits(&name, &candidate.to_lowercase()), candidate))
        .min_by_key(|(edits, _)| *edits);
    let edits_max = (name.len() / 3).clamp(1, 3);
    closest
        .filter(|(edits, _)| *edits <= edits_max)
        .map(|(_, candidate)| candidate)
}

/// Insertions, deletions, replacements and swaps of neighbours that turn one text into the other.
fn edits(from: &str, to: &str) -> usize {
    let from: Vec<char> = from.chars().collect();
    let to: Vec<char> = to.chars().collect();
    let mut rows = vec![(0..=to.len()).collect::<Vec<usize>>()];
    for (i, a) in from.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, b) in to.iter().enumerate() {
            let mut least = (rows[i][j] + usize::from(a != b))
                .min(rows[i][j + 1] + 1)
                .min(row[j] + 1);
            if i > 0 && j > 0 && *a == to[j - 1] && from[i - 1] == *b {
                least = least.min(rows[i - 1][j - 1] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[from.len()][to.len()]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::section::Findings;

    #[test]
    fn edits_are_counted() {
        for (a, b, expected) in [
            ("", "abc", 3),
            ("abc", "abc", 0),
            ("data_dri", "data_dir", 1),
            ("lisen", "listen", 1),
            ("ab", "cd", 2),
        ] {
            assert_eq!(edits(a, b), expected, "{a} {b}");
        }
    }

    #[test]
    fn a_far_name_suggests_nothing() {
        assert_eq!(
            nearest("listn", ["listen", "connect_address"].into_iter()),
            Some("listen")
        );
        assert_eq!(nearest("zebra", ["listen", "connect_address"].into_iter()), None);
    }

    /// Every key of Patroni's documentation that is not of another store, by section.
    const DOCUMENTED: &[(&str, &str)] = &[
        (
            "",
            "scope name namespace thread_pool_size thread_stack_size log restapi ctl etcd etcd3 bootstrap postgresql watchdog tags",
        ),
        (
            "etcd3",
            "host hosts url proxy srv srv_suffix discovery_srv srv_domain protocol use_proxies username password cacert cert key",
        ),
        (
            "restapi",
            "listen connect_address authentication certfile keyfile keyfile_password cafile ciphers verify_client allowlist \
             allowlist_include_members http_extra_headers https_extra_headers request_queue_size thread_pool_size server_tokens",
        ),
        (
            "ctl",
            "authentication insecure cacert certfile keyfile keyfile_password",
        ),
        (
            "log",
            "type level traceback_level format dateformat static_fields max_queue_size dir mode file_num file_size loggers \
             deduplicate_heartbeat_logs",
        ),
        ("watchdog", "mode device safety_margin driver"),
        (
            "postgresql",
            "listen connect_address proxy_address data_dir config_dir config_base_name custom_conf bin_dir bin_name database pgpass \
             use_unix_socket use_unix_socket_repl authentication parameters pg_hba pg_ident recovery_conf callbacks \
             create_replica_methods create_replica_method pg_ctl_timeout use_pg_rewind remove_data_directory_on_rewind_failure \
             remove_data_directory_on_diverged_timelines pre_promote before_stop krbsrvname",
        ),
        (
            "postgresql.authentication.rewind",
            "username password sslmode sslcert sslkey sslpassword sslrootcert sslcrl sslcrldir gssencmode channel_binding \
             sslnegotiation",
        ),
        ("bootstrap", "dcs initdb method pg_hba post_bootstrap post_init users"),
        (
            "bootstrap.dcs",
            "ttl loop_wait retry_timeout maximum_lag_on_failover maximum_lag_on_syncnode check_timeline max_timelines_history \
             primary_start_timeout master_start_timeout primary_stop_timeout master_stop_timeout synchronous_mode \
             synchronous_mode_strict synchronous_node_count failsafe_mode pause member_slots_ttl slots permanent_slots \
             permanent_replication_slots ignore_slots standby_cluster postgresql",
        ),
        (
            "bootstrap.dcs.standby_cluster",
            "host port primary_slot_name create_replica_methods restore_command archive_cleanup_command recovery_min_apply_delay",
        ),
    ];

    #[test]
    fn every_documented_key_is_known() {
        for (path, keys) in DOCUMENTED {
            let mut tree = json!({});
            let pointed = path.split('.').filter(|part| !part.is_empty());
            let section = pointed.fold(&mut tree, |section, part| {
                section[part] = json!({});
                &mut section[part]
            });
            for key in keys.split_whitespace() {
                section[key] = json!("set");
            }
            let findings = Findings::default();
            report_unknown_keys(&Section::root(tree.as_object().expect("a map"), &findings));
            assert_eq!((findings.warnings(), findings.errors()), (vec![], vec![]), "{path}");
        }
    }

    #[test]
    fn patronis_sections_warn_and_ours_refuse() {
        let tree = json!({
            "scop": "x",
            "postgresql": {"data_dri": "/d", "create_replica_methods": ["wal_g", "basebackup"], "wal_g": {"command": "x"}, "wal_e": {}},
            "bootstrap": {"method": "restore", "restore": {"command": "x"}, "dcs": {"tll": 1}},
            "tags": {"anything": "goes"},
            "log": "not a section",
            "proxy": {"lisseners": [], "listeners": [{"adress": "x"}], "hold": {"timeut": 1}},
            "pgherd": {"run_dir": "/x"},
        });
        let findings = Findings::default();
        report_unknown_keys(&Section::root(tree.as_object().expect("a map"), &findings));
        assert_eq!(
            findings.warnings(),
            [
                "scop: unknown key; did you mean scope?",
                "postgresql.data_dri: unknown key; did you mean data_dir?",
                "postgresql.wal_e: unknown key; remove it, or look for its place",
                "bootstrap.dcs.tll: unknown key; did you mean ttl?",
            ]
        );
        assert_eq!(
            findings.errors(),
            [
                "proxy.lisseners: unknown key; did you mean listeners?",
                "proxy.listeners[0].adress: unknown key; did you mean address?",
                "proxy.hold.timeut: unknown key; did you mean timeout?",
                "pgherd.run_dir: unknown key; remove it, or look for its place",
            ]
        );
    }
}
