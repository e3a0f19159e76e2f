//! PostgreSQL's configuration: what goes on the command line, what into `postgresql.conf`. Pure.
//!
//! As with Patroni, the parameters on which members must agree are taken from the dynamic configuration only, and are
//! passed on the command line, where ALTER SYSTEM cannot override them.

use std::collections::BTreeMap;
use std::path::Path;

use pgherd_cluster::name::{MemberName, Scope};
use pgherd_cluster::record::DynamicConfig;
use serde_json::{Map, Value};

use super::control::Control;
use super::upstream::Upstream;
use crate::config::{PostgresConfig, RoleParameters};
use crate::sync::SyncNames;

/// What the configuration is rendered from.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// The cluster's name.
    pub scope: &'a Scope,
    /// This member's name.
    pub name: &'a MemberName,
    /// The local part.
    pub postgresql: &'a PostgresConfig,
    /// The dynamic part.
    pub dynamic: &'a DynamicConfig,
    /// Whom is streamed from; nothing for a primary, or while nobody leads.
    pub upstream: Option<&'a Upstream>,
    /// Parameters that hold in one role only, of this member's own configuration.
    pub by_role: &'a RoleParameters,
    /// For a standby: what it may not undercut. Nothing for a primary.
    pub floors: Option<&'a Control>,
    /// What commits wait for, while that is ours to say.
    pub sync_names: Option<&'a SyncNames>,
    /// Whether the standby must say which rows it still needs, for a logical slot here or below.
    pub feedback: bool,
}

/// A rendered configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Arguments of `postgres`, after `-D` and `--config-file`.
    pub controlled: Vec<(String, String)>,
    /// The text of `postgresql.conf`.
    pub conf: String,
    /// All parameters that are configured, without regard to what a standby may not undercut: where a running server has
    /// another value, that waits for a restart.
    pub wanted: BTreeMap<String, String>,
}

/// A parameter that only the dynamic configuration may set: name, default, and what a value must be.
struct Controlled {
    name: &'static str,
    default: &'static str,
    accepts: Accepts,
}

enum Accepts {
    AtLeast(u32),
    OneOf(&'static [&'static str]),
    Switch,
}

/// Reference: Patroni's table of controlled parameters, same defaults and minimums.
const CONTROLLED: [Controlled; 10] = [
    Controlled {
        name: "wal_level",
        default: "replica",
        accepts: Accepts::OneOf(&["replica", "hot_standby", "logical"]),
    },
    Controlled {
        name: "hot_standby",
        default: "on",
        accepts: Accepts::OneOf(&["on"]),
    },
    Controlled {
        name: "max_connections",
        default: "100",
        accepts: Accepts::AtLeast(25),
    },
    Controlled {
        name: "max_wal_senders",
        default: "10",
        accepts: Accepts::AtLeast(3),
    },
    Controlled {
        name: "max_prepared_transactions",
        default: "0",
        accepts: Accepts::AtLeast(0),
    },
    Controlled {
        name: "max_locks_per_transaction",
        default: "64",
        accepts: Accepts::AtLeast(32),
    },
    Controlled {
        name: "track_commit_timestamp",
        default: "off",
        accepts: Accepts::Switch,
    },
    Controlled {
        name: "max_replication_slots",
        default: "10",
        accepts: Accepts::AtLeast(4),
    },
    Controlled {
        name: "max_worker_processes",
        default: "8",
        accepts: Accepts::AtLeast(2),
    },
    Controlled {
        name: "wal_log_hints",
        default: "on",
        accepts: Accepts::Switch,
    },
];

/// Parameters that are ours alone, wherever they are set.
const NEVER: [&str; 4] = ["listen_addresses", "port", "cluster_name", "config_file"];

/// Recovery settings that follow from the cluster's state, wherever they are set.
const RECOVERY: [&str; 9] = [
    "primary_conninfo",
    "primary_slot_name",
    "recovery_target",
    "recovery_target_lsn",
    "recovery_target_name",
    "recovery_target_time",
    "recovery_target_timeline",
    "recovery_target_xid",
    "promote_trigger_file",
];

impl Settings {
    /// Renders the configuration, and the warnings about values that were replaced.
    #[must_use]
    pub fn render(inputs: Inputs<'_>) -> (Self, Vec<String>) {
        let dynamic = inputs.dynamic.parameters();
        let (mut warnings, mut wanted) = (Vec::new(), BTreeMap::new());
        let mut controlled = vec![
            (
                "listen_addresses".to_owned(),
                inputs.postgresql.listen_addresses.join(","),
            ),
            ("port".to_owned(), inputs.postgresql.port.to_string()),
            ("cluster_name".to_owned(), inputs.scope.to_string()),
        ];
        for parameter in CONTROLLED {
            let value = parameter.value(dynamic.get(parameter.name), &mut warnings);
            wanted.insert(parameter.name.to_owned(), value.clone());
            controlled.push((
                parameter.name.to_owned(),
                inputs.at_least_the_floor(parameter.name, value),
            ));
        }
        let mut parameters = all_parameters(inputs, &controlled);
        let conf = render_conf(inputs, &parameters);
        parameters.append(&mut wanted);
        let settings = Self {
            controlled,
            conf,
            wanted: parameters,
        };
        (settings, warnings)
    }

    /// All arguments of `postgres` for a data directory.
    #[must_use]
    pub fn arguments(&self, data_dir: &Path, conf_file: &Path) -> Vec<String> {
        let mut arguments = vec![
            "-D".to_owned(),
            data_dir.display().to_string(),
            format!("--config-file={}", conf_file.display()),
        ];
        arguments.extend(self.controlled.iter().map(|(name, value)| format!("--{name}={value}")));
        arguments
    }
}

impl Inputs<'_> {
    fn at_least_the_floor(&self, name: &str, value: String) -> String {
        let floor = self
            .floors
            .and_then(|control| control.floors.iter().find(|(floor, _)| *floor == name));
        match (floor, value.parse::<u32>()) {
            (Some((_, floor)), Ok(wanted)) if *floor > wanted => floor.to_string(),
            _ => value,
        }
    }
}

impl Controlled {
    fn value(&self, configured: Option<&Value>, warnings: &mut Vec<String>) -> String {
        let Some(configured) = configured else {
            return self.default.to_owned();
        };
        let text = value_text(configured);
        let accepted = match self.accepts {
            Accepts::AtLeast(minimum) => text.parse::<u32>().is_ok_and(|number| number >= minimum),
            Accepts::OneOf(words) => words.contains(&text.as_str()),
            Accepts::Switch => matches!(
                text.to_lowercase().as_str(),
                "on" | "off" | "true" | "false" | "yes" | "no" | "1" | "0"
            ),
        };
        if accepted {
            return if text == "hot_standby" {
                "replica".to_owned()
            } else {
                text
            };
        }
        warnings.push(format!(
            "postgresql.parameters.{}: {text:?} is not allowed, {} is used",
            self.name, self.default
        ));
        self.default.to_owned()
    }
}

const SYNC_NAMES: &str = "synchronous_standby_names";

/// What the user's own parameters make commits wait for; what cannot be read counts as nobody.
#[must_use]
pub fn user_names(dynamic: &DynamicConfig, local: &serde_json::Map<String, Value>) -> SyncNames {
    let dynamic = dynamic.parameters();
    let value = local.get(SYNC_NAMES).or_else(|| dynamic.get(SYNC_NAMES));
    value
        .and_then(|value| SyncNames::parse(&value_text(value)).ok())
        .unwrap_or_default()
}

/// What an earlier agent of this member has written: as long as nobody decides otherwise, commits go on to wait for it.
#[must_use]
pub fn written_names(conf_file: &Path) -> Option<SyncNames> {
    let conf = std::fs::read_to_string(conf_file).ok()?;
    let line = conf.lines().rev().find_map(|line| line.strip_prefix(SYNC_NAMES))?;
    let value = line.trim_start_matches([' ', '=']).trim();
    let value = value.strip_prefix('\'')?.strip_suffix('\'')?.replace("''", "'");
    SyncNames::parse(&value).ok()
}

/// What makes a leader useless where it is left from the time before.
pub const READ_ONLY: &str = "default_transaction_read_only";

fn all_parameters(inputs: Inputs<'_>, controlled: &[(String, String)]) -> BTreeMap<String, String> {
    let mut parameters = parameters(inputs, controlled);
    if let Some(names) = inputs.sync_names {
        parameters.insert(SYNC_NAMES.to_owned(), names.to_string());
    }
    parameters.extend(controlled.iter().cloned());
    for (name, file) in [("hba_file", "pg_hba.conf"), ("ident_file", "pg_ident.conf")] {
        parameters
            .entry(name.to_owned())
            .or_insert_with(|| inputs.postgresql.config_dir.join(file).display().to_string());
    }
    parameters
}

fn render_conf(inputs: Inputs<'_>, parameters: &BTreeMap<String, String>) -> String {
    let custom = inputs.postgresql.custom_conf.as_ref();
    let included = custom.map_or_else(|| inputs.postgresql.base_conf_name(), |path| path.display().to_string());
    let mut conf = format!(
        "# Written by pgherd. Do not edit: it is overwritten. Use the dynamic configuration or the member's YAML.\n\
         include '{}'\n\n",
        included.replace('\\', "\\\\").replace('\'', "''")
    );
    for (name, value) in parameters {
        push_setting(&mut conf, name, value);
    }
    conf.push_str("\n# Recovery: in force while standby.signal is there.\n");
    for (name, value) in recovery(inputs) {
        push_setting(&mut conf, &name, &value);
    }
    conf
}

/// The parameters of the user's own that hold in the role of the moment, in the order of who wins: the defaults of ours,
/// the dynamic ones, the member's, the dynamic ones of the role, the member's of the role.
fn parameters(inputs: Inputs<'_>, controlled: &[(String, String)]) -> BTreeMap<String, String> {
    let writable = inputs.floors.is_none();
    let dynamic = inputs.dynamic.parameters();
    let of_role = dynamic_of_role(inputs.dynamic, writable);
    let local_of_role = inputs.by_role.of(writable);
    let mut parameters: BTreeMap<String, String> = BTreeMap::new();
    // A standby that lost its upstream asks again this soon. PostgreSQL's own 5 s would be slept through in full by a
    // promotion that arrives while the walreceiver is ending.
    parameters.insert("wal_retrieve_retry_interval".to_owned(), "200ms".to_owned());
    parameters.insert("wal_keep_size".to_owned(), "128MB".to_owned());
    let layers = [&dynamic, &inputs.postgresql.parameters, &of_role, local_of_role];
    for (name, value) in layers.into_iter().flatten() {
        let ours = NEVER.contains(&name.as_str()) || RECOVERY.contains(&name.as_str());
        if ours || controlled.iter().any(|(controlled, _)| controlled == name) {
            continue;
        }
        match (name.as_str(), value_text(value).parse::<u64>()) {
            // Gone since PostgreSQL 13; a segment is 16 MB.
            ("wal_keep_segments", Ok(segments)) => {
                parameters.insert("wal_keep_size".to_owned(), format!("{}MB", segments * 16));
            }
            _ => {
                parameters.insert(name.clone(), value_text(value));
            }
        }
    }
    // A member's own file may say so for the time in which it follows. For a leader only what is said of leaders counts,
    // or of the whole cluster.
    let meant = [local_of_role, &of_role, &dynamic]
        .into_iter()
        .find_map(|layer| layer.get(READ_ONLY));
    if writable {
        parameters.insert(READ_ONLY.to_owned(), meant.map_or_else(|| "off".to_owned(), value_text));
    }
    if inputs.feedback {
        parameters.insert("hot_standby_feedback".to_owned(), "on".to_owned());
    }
    parameters
}

/// The dynamic parameters of a role: `pgherd.parameters.primary` and `pgherd.parameters.replica`, which Patroni ignores.
fn dynamic_of_role(dynamic: &DynamicConfig, writable: bool) -> Map<String, Value> {
    let role = if writable { "primary" } else { "replica" };
    let ours = dynamic.document().get("pgherd");
    let found = ours.and_then(|ours| ours.get("parameters")?.get(role)?.as_object());
    found.cloned().unwrap_or_default()
}

/// Whether a promotion changes parameters, so that they have to be written before the route opens.
#[must_use]
pub fn differs_by_role(dynamic: &DynamicConfig, by_role: &RoleParameters) -> bool {
    let is_set = |writable| !dynamic_of_role(dynamic, writable).is_empty();
    !by_role.is_empty() || is_set(true) || is_set(false)
}

/// What is in force while the server is in recovery, by name.
fn recovery(inputs: Inputs<'_>) -> Vec<(String, String)> {
    let mut settings = Vec::new();
    for (name, value) in recovery_conf(inputs.postgresql, inputs.dynamic) {
        if !RECOVERY.contains(&name.as_str()) {
            settings.push((name, value_text(&value)));
        }
    }
    let place = inputs.upstream.and_then(Upstream::place);
    let conninfo = place.as_deref().map(|place| conninfo(inputs, place));
    let slot = if place.is_some() && inputs.dynamic.use_slots() {
        slot_name(inputs)
    } else {
        String::new()
    };
    settings.push(("primary_conninfo".to_owned(), conninfo.unwrap_or_default()));
    settings.push(("primary_slot_name".to_owned(), slot));
    settings.push(("recovery_target_timeline".to_owned(), "latest".to_owned()));
    if let Some(remote) = inputs.upstream.and_then(Upstream::remote) {
        // The other cluster's archive and delay are its standby leader's alone, and win over parameters of the same name.
        let theirs = [
            ("restore_command", &remote.restore_command),
            ("archive_cleanup_command", &remote.archive_cleanup_command),
            ("recovery_min_apply_delay", &remote.recovery_min_apply_delay),
        ];
        let set = theirs
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), value.clone()?)));
        settings.extend(set);
    }
    settings
}

/// `postgresql.recovery_conf`: the member's own whole, else the dynamic one.
#[must_use]
pub fn recovery_conf(local: &PostgresConfig, dynamic: &DynamicConfig) -> Map<String, Value> {
    let own = local.recovery_conf.clone();
    own.or_else(|| Some(dynamic.postgresql().get("recovery_conf")?.as_object()?.clone()))
        .unwrap_or_default()
}

/// The lines of `pg_hba` or `pg_ident`: the member's own whole, else the dynamic ones; nothing when neither says any, or
/// when the parameter that names the file names another.
#[must_use]
pub fn lines_of(inputs: Inputs<'_>, key: &str) -> Option<Vec<String>> {
    let (own, parameter) = match key {
        "pg_hba" => (&inputs.postgresql.pg_hba, "hba_file"),
        _ => (&inputs.postgresql.pg_ident, "ident_file"),
    };
    let elsewhere = [
        inputs.dynamic.parameters().get(parameter),
        inputs.postgresql.parameters.get(parameter),
    ]
    .into_iter()
    .flatten()
    .any(|path| Path::new(&value_text(path)) != inputs.postgresql.config_dir.join(format!("{key}.conf")));
    if elsewhere {
        return None;
    }
    let dynamic = || {
        let section = inputs.dynamic.postgresql();
        let lines = section.get(key)?.as_array()?.iter();
        Some(lines.map(value_text).collect())
    };
    own.clone().or_else(dynamic)
}

/// The slot that is streamed by: with a member the one of our own name, in another cluster the one that was named.
fn slot_name(inputs: Inputs<'_>) -> String {
    match inputs.upstream {
        Some(Upstream::Member(_)) => inputs.name.slot_name(),
        Some(Upstream::Remote(remote)) => remote.primary_slot_name.as_deref().map(slot_text).unwrap_or_default(),
        None => String::new(),
    }
}

/// A name as Patroni makes a slot's name of it.
fn slot_text(name: &str) -> String {
    MemberName::new(name).map_or_else(|_| name.to_lowercase(), |name| name.slot_name())
}

/// libpq's connection parameters that are written where nobody has set them.
const CONNECTION_DEFAULTS: [(&str, &str); 3] = [
    ("sslmode", "prefer"),
    ("gssencmode", "prefer"),
    ("channel_binding", "prefer"),
];

fn conninfo(inputs: Inputs<'_>, place: &str) -> String {
    let replication = &inputs.postgresql.replication;
    let mut text = format!(
        "dbname={} user={}",
        quote(&inputs.postgresql.database),
        quote(&replication.username)
    );
    if replication.password.is_some() {
        text.push_str(&format!(
            " passfile={}",
            quote(&inputs.postgresql.pgpass.display().to_string())
        ));
    }
    let options = &inputs.postgresql.connections.replication;
    let value = |name, default| quote(options.get(name).unwrap_or(default));
    let [sslmode, gssencmode, channel_binding] = CONNECTION_DEFAULTS.map(|(name, default)| value(name, default));
    text.push_str(&format!(
        " {place} sslmode={sslmode} application_name={} gssencmode={gssencmode} channel_binding={channel_binding}",
        quote(inputs.name.as_str()),
    ));
    for (name, value) in &options.0 {
        if CONNECTION_DEFAULTS.iter().all(|(known, _)| known != name) {
            text.push_str(&format!(" {name}={}", quote(value)));
        }
    }
    text
}

/// A value of a connection string, quoted where libpq's grammar needs it.
#[must_use]
pub fn quote(value: &str) -> String {
    let plain = !value.is_empty() && value.chars().all(|c| !c.is_whitespace() && c != '\'' && c != '\\');
    if plain {
        value.to_owned()
    } else {
        format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
    }
}

pub(crate) fn push_setting(conf: &mut String, name: &str, value: &str) {
    // In postgresql.conf a backslash in quotes begins an escape, and a quote is doubled.
    let value = value.replace('\\', "\\\\").replace('\'', "''");
    conf.push_str(&format!("{name} = '{value}'\n"));
}

/// A parameter's value as PostgreSQL reads it.
#[must_use]
pub fn value_text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Bool(true) => "on".to_owned(),
        Value::Bool(false) => "off".to_owned(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

#[cfg(test)]
#[path = "settings_tests.rs"]
mod tests;
