//! `pgherd list`: the members of a cluster, in patronictl's form to the byte, so that scripts go on working.

use std::io::Write;

use pgherd_cluster::etcd::Etcd;
use pgherd_cluster::view::{Initialize, View};
use serde_json::{Map, Value};
use tokio::time::{MissedTickBehavior, interval};

use super::rows::{Position, Row, mebibytes, rows};
use super::table::{self, Column};
use super::{read_view, utc_now};
use crate::args::{Format, ListArgs};
use crate::config::Document;
use crate::failure::Failure;

/// Longer reasons for a restart are not shown in the table.
const REASON_CHARS_MAX: usize = 50;

/// Runs the command.
///
/// # Errors
/// Bad configuration; etcd that does not answer.
pub(crate) async fn run(args: &ListArgs) -> Result<(), Failure> {
    let document = Document::load(args.config.clone())?;
    let cluster = document.finish(document.cluster(args.cluster.as_deref()))?;
    let etcd = Etcd::new(cluster.etcd.clone());
    let print = async || {
        let view = read_view(&etcd, &cluster).await?;
        let mut text = String::new();
        if args.timestamp {
            text.push_str(&utc_now("%Y-%m-%d %H:%M:%S\n"));
        }
        text.push_str(&render(&view, args.format, args.extended));
        Ok::<_, Failure>(text)
    };
    let Some(period) = args.watch else {
        return write(&print().await?);
    };
    let mut tick = interval(period);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let text = print().await?;
        write(&format!("\x1b[2J\x1b[H{text}"))?; // Clear, and begin at the top.
    }
}

fn write(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|error| Failure::Unavailable(format!("standard output: {error}")))
}

/// The whole output, with its last newline.
pub(crate) fn render(view: &View, format: Format, extended: bool) -> String {
    let rows = rows(view);
    let columns = columns(&rows, format, extended);
    match format {
        Format::Json => json(view, &columns, &rows),
        Format::Tsv => tsv(view, &columns, &rows),
        Format::Pretty => pretty(view, &columns, &rows),
    }
}

/// What a column shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Cluster,
    Member,
    Host,
    Role,
    State,
    Timeline,
    ReceiveLsn,
    ReceiveLag,
    ReplayLsn,
    ReplayLag,
    PendingRestart,
    PendingRestartReason,
    ScheduledRestart,
    Tags,
}

fn columns(rows: &[Row], format: Format, extended: bool) -> Vec<Field> {
    use Field::{
        Cluster, Host, Member, PendingRestart, PendingRestartReason, ReceiveLag, ReceiveLsn, ReplayLag, ReplayLsn,
        Role, ScheduledRestart, State, Tags, Timeline,
    };
    let mut columns = vec![
        Member, Host, Role, State, Timeline, ReceiveLsn, ReceiveLag, ReplayLsn, ReplayLag,
    ];
    if format != Format::Pretty {
        columns.insert(0, Cluster);
    }
    let any = |has: fn(&Row) -> bool| extended || rows.iter().any(has);
    let optional = [
        (PendingRestart, any(|row| row.pending_restart)),
        (PendingRestartReason, any(|row| !row.pending_restart_reason.is_empty())),
        (ScheduledRestart, any(|row| row.scheduled_restart.is_some())),
        (Tags, any(|row| !row.tags.is_empty())),
    ];
    columns.extend(optional.into_iter().filter(|(_, shown)| *shown).map(|(field, _)| field));
    columns
}

impl Field {
    fn heading(self, format: Format) -> &'static str {
        match self {
            Self::Cluster => "Cluster",
            Self::Member => "Member",
            Self::Host => "Host",
            Self::Role => "Role",
            Self::State => "State",
            Self::Timeline => "TL",
            Self::ReceiveLsn => "Receive LSN",
            Self::ReplayLsn => "Replay LSN",
            Self::ReceiveLag | Self::ReplayLag if format == Format::Pretty => "Lag",
            Self::ReceiveLag => "Receive Lag",
            Self::ReplayLag => "Replay Lag",
            Self::PendingRestart => "Pending restart",
            Self::PendingRestartReason => "Pending restart reason",
            Self::ScheduledRestart => "Scheduled restart",
            Self::Tags => "Tags",
        }
    }

    fn is_right_aligned(self) -> bool {
        matches!(
            self,
            Self::Timeline | Self::ReceiveLsn | Self::ReceiveLag | Self::ReplayLsn | Self::ReplayLag
        )
    }

    /// The value, an empty text for nothing.
    fn value(self, scope: &str, row: &Row) -> Value {
        match self {
            Self::Cluster => scope.into(),
            Self::Member => row.name.as_str().into(),
            Self::Host => row.host.as_str().into(),
            Self::Role => row.role.into(),
            Self::State => row.state.as_str().into(),
            Self::Timeline => row.timeline.map_or_else(|| "".into(), Value::from),
            Self::ReceiveLsn => lsn(row.received),
            Self::ReceiveLag => lag(row.received),
            Self::ReplayLsn => lsn(row.replayed),
            Self::ReplayLag => lag(row.replayed),
            Self::PendingRestart => if row.pending_restart { "*" } else { "" }.into(),
            Self::PendingRestartReason => {
                let lines: Vec<String> = row
                    .pending_restart_reason
                    .iter()
                    .map(|(name, change)| format!("{name}: {change}"))
                    .collect();
                lines.join("\n").into()
            }
            Self::ScheduledRestart => row.scheduled_restart.as_deref().unwrap_or_default().into(),
            Self::Tags if row.tags.is_empty() => "".into(),
            Self::Tags => Value::Object(row.tags.clone()),
        }
    }

    fn text(self, scope: &str, row: &Row, format: Format) -> String {
        if self == Self::Tags {
            return if format == Format::Pretty {
                tags_block(&row.tags)
            } else {
                tags_flow(&row.tags)
            };
        }
        if self == Self::PendingRestartReason && format == Format::Pretty {
            let shown = |(name, change): &(String, String)| {
                let change = if change.chars().count() > REASON_CHARS_MAX {
                    "[hidden - too long]"
                } else {
                    change
                };
                format!("{name}: {change}")
            };
            return row
                .pending_restart_reason
                .iter()
                .map(shown)
                .collect::<Vec<_>>()
                .join("\n");
        }
        match self.value(scope, row) {
            Value::String(text) => text,
            other => other.to_string(),
        }
    }
}

fn lsn(position: Position) -> Value {
    match position {
        Position::Leads => "".into(),
        Position::Unknown => "unknown".into(),
        Position::At { lsn, .. } => lsn.to_string().into(),
    }
}

fn lag(position: Position) -> Value {
    match position {
        Position::At {
            lag_bytes: Some(bytes), ..
        } => mebibytes(bytes).into(),
        Position::Leads | Position::Unknown | Position::At { lag_bytes: None, .. } => "".into(),
    }
}

fn json(view: &View, columns: &[Field], rows: &[Row]) -> String {
    let object = |row: &Row| {
        let fields = columns.iter().map(|field| {
            (
                field.heading(Format::Json).to_owned(),
                field.value(view.scope.as_str(), row),
            )
        });
        Value::Object(fields.filter(|(_, value)| value.as_str() != Some("")).collect())
    };
    format!("{}\n", spaced_json(&Value::Array(rows.iter().map(object).collect())))
}

/// JSON with a space after each comma and colon, as Python writes it.
fn spaced_json(value: &Value) -> String {
    match value {
        Value::Array(items) => format!("[{}]", items.iter().map(spaced_json).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let fields = map
                .iter()
                .map(|(key, value)| format!("{}: {}", Value::from(key.as_str()), spaced_json(value)));
            format!("{{{}}}", fields.collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

fn tsv(view: &View, columns: &[Field], rows: &[Row]) -> String {
    let headings = columns
        .iter()
        .map(|field| field.heading(Format::Tsv).to_owned())
        .collect();
    let row = |row: &Row| {
        columns
            .iter()
            .map(|field| field.text(view.scope.as_str(), row, Format::Tsv))
            .collect()
    };
    let lines: Vec<Vec<String>> = std::iter::once(headings).chain(rows.iter().map(row)).collect();
    lines.iter().map(|line| line.join("\t") + "\n").collect()
}

fn pretty(view: &View, fields: &[Field], rows: &[Row]) -> String {
    let columns: Vec<Column> = fields
        .iter()
        .map(|field| Column {
            heading: field.heading(Format::Pretty),
            right: field.is_right_aligned(),
        })
        .collect();
    let cells: Vec<Vec<String>> = rows
        .iter()
        .map(|row| {
            fields
                .iter()
                .map(|field| field.text(view.scope.as_str(), row, Format::Pretty))
                .collect()
        })
        .collect();
    let mut text = table::draw(&title(view), &columns, &cells);
    text.push('\n');
    if view
        .config
        .value
        .as_ref()
        .is_some_and(pgherd_cluster::record::DynamicConfig::is_paused)
    {
        text.push_str(" Maintenance mode: on\n");
    }
    if let Some(request) = &view.failover.value
        && let Some(at) = &request.scheduled_at
    {
        text.push_str(&format!(" Switchover scheduled at: {at}\n"));
        for (word, name) in [("from", &request.leader), ("to", &request.member)] {
            if let Some(name) = name {
                text.push_str(&format!("{word:>24}: {name}\n"));
            }
        }
    }
    text
}

fn title(view: &View) -> String {
    let state = match view.initialize {
        None => "uninitialized".to_owned(),
        Some(Initialize::Pending) => "initializing".to_owned(),
        Some(Initialize::Done(id)) => id.to_string(),
    };
    format!(" Cluster: {} ({state}) ", view.scope)
}

fn tags_block(tags: &Map<String, Value>) -> String {
    sorted(tags)
        .iter()
        .map(|(key, value)| format!("{key}: {}", yaml_scalar(value)))
        .collect::<Vec<_>>()
        .join("\n")
}

fn tags_flow(tags: &Map<String, Value>) -> String {
    if tags.is_empty() {
        return String::new();
    }
    format!(
        "{{{}}}",
        sorted(tags)
            .iter()
            .map(|(key, value)| format!("{key}: {}", yaml_scalar(value)))
            .collect::<Vec<_>>()
            .join(", ")
    )
}

fn sorted(tags: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let mut tags: Vec<_> = tags.iter().collect();
    tags.sort_by_key(|(key, _)| *key);
    tags
}

/// A value as YAML writes it: a text that YAML would take for something else is quoted.
fn yaml_scalar(value: &Value) -> String {
    let Value::String(text) = value else {
        return spaced_json(value);
    };
    let reserved = ["true", "false", "yes", "no", "on", "off", "null", "~", ""];
    let taken = reserved.contains(&text.to_lowercase().as_str()) || text.parse::<f64>().is_ok();
    let risky = text.contains(": ") || text.contains(" #") || text.ends_with(':') || text.trim() != text;
    let opens = text.starts_with(|c: char| "!&*-?|>@`\"'%{}[],#:".contains(c)) && text.len() > 1 || text == "-";
    if taken || risky || opens {
        format!("'{}'", text.replace('\'', "''"))
    } else {
        text.clone()
    }
}

#[cfg(test)]
#[path = "list_tests.rs"]
mod tests;
