//! `pgherd list` and `pgherd topology`: the members of a cluster, in patronictl's form to the byte, so that scripts go on working.

use std::io::Write;

use pgherd_cluster::view::{Initialize, View};
use serde_json::{Map, Value};
use tokio::time::{MissedTickBehavior, interval};

use super::output::spaced_json;
use super::rows::{Position, Row, mebibytes, rows};
use super::site::{Scene, Site};
use super::table::{self, Column};
use super::{utc_now, yaml_text};
use crate::args::{Again, Format, Group, ListArgs, TopologyArgs};
use crate::failure::Failure;

/// Longer reasons for a restart are not shown in the table.
const REASON_CHARS_MAX: usize = 50;

/// Runs `list`.
///
/// # Errors
/// Bad configuration; etcd that does not answer.
pub(crate) async fn run(scene: &Scene, args: &ListArgs) -> Result<(), Failure> {
    let sites = sites(scene, &args.clusters, args.group)?;
    let time = || {
        if args.timestamp {
            utc_now("%Y-%m-%d %H:%M:%S\n")
        } else {
            String::new()
        }
    };
    let print = |view: &View| time() + &render(view, args.format, args.extended);
    repeat(&sites, args.again, print).await
}

/// Runs `topology`.
///
/// # Errors
/// As for [`run`].
pub(crate) async fn topology(scene: &Scene, args: &TopologyArgs) -> Result<(), Failure> {
    let sites = sites(scene, &args.clusters, args.group)?;
    repeat(&sites, args.again, tree).await
}

fn sites(scene: &Scene, clusters: &[String], group: Group) -> Result<Vec<Site>, Failure> {
    let document = scene.document()?;
    if clusters.is_empty() {
        return Ok(vec![Site::new(&document, None, group)?]);
    }
    let sites = clusters.iter().map(|name| Site::new(&document, Some(name), group));
    sites.collect()
}

/// Once, or again and again until it is interrupted.
async fn repeat(sites: &[Site], again: Again, render: impl Fn(&View) -> String) -> Result<(), Failure> {
    let print = async || {
        let mut text = String::new();
        for site in sites {
            text.push_str(&render(&site.view().await?));
        }
        Ok::<_, Failure>(text)
    };
    let Some(period) = again.period() else {
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
        Format::Json => format!("{}\n", spaced_json(&objects(view, &columns, &rows))),
        // Patroni's ends with an empty line.
        Format::Yaml => format!("{}\n", yaml_text::document(&objects(view, &columns, &rows))),
        Format::Tsv => tsv(view, &columns, &rows),
        Format::Pretty => pretty(view, &columns, &rows, tags_block),
    }
}

/// The same as a tree: the leader, and below it who streams from whom.
fn tree(view: &View) -> String {
    let rows = as_tree(view, rows(view));
    let columns = columns(&rows, Format::Pretty, false);
    pretty(view, &columns, &rows, tags_flow)
}

/// Members below those whose logs they replay, indented. One that names an upstream that is no replica is the leader's.
fn as_tree(view: &View, rows: Vec<Row>) -> Vec<Row> {
    let upstream = |row: &Row| {
        let named = row.tags.get("replicatefrom").and_then(Value::as_str)?;
        let is_replica =
            |other: &Row| other.name == named && other.received != Position::Leads && other.name != row.name;
        rows.iter()
            .find(|other| is_replica(other))
            .map(|other| other.name.clone())
    };
    let upstreams: Vec<Option<String>> = rows.iter().map(upstream).collect();
    let leader = view.epoch().map(|epoch| epoch.holder.as_str());
    let mut tree = Vec::with_capacity(rows.len());
    tree.extend(rows.iter().filter(|row| Some(row.name.as_str()) == leader).cloned());
    let mut add = |row: &Row, level: usize| {
        let name = format!("{}+ {}", "  ".repeat(level), row.name);
        tree.push(Row { name, ..row.clone() });
    };
    let mut open: Vec<(usize, usize)> = Vec::new(); // Rows whose turn comes, and how deep they are.
    let below = |parent: Option<&str>, level: usize| {
        let of_parent = |(index, row): (usize, &Row)| {
            let hit = upstreams.get(index).is_some_and(|of| of.as_deref() == parent);
            (hit && Some(row.name.as_str()) != leader).then_some((index, level))
        };
        let found: Vec<_> = rows.iter().enumerate().filter_map(of_parent).collect();
        found.into_iter().rev()
    };
    open.extend(below(None, 0));
    let mut seen = vec![false; rows.len()];
    while let Some((index, level)) = open.pop() {
        let (Some(row), Some(seen)) = (rows.get(index), seen.get_mut(index)) else {
            continue;
        };
        if std::mem::replace(seen, true) {
            continue;
        }
        add(row, level);
        open.extend(below(Some(&row.name), level + 1));
    }
    // Two that name each other hang on nobody.
    for (row, _) in rows
        .iter()
        .zip(&seen)
        .filter(|(row, seen)| !**seen && Some(row.name.as_str()) != leader)
    {
        add(row, 0);
    }
    tree
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
            return tags_flow(&row.tags);
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

fn objects(view: &View, columns: &[Field], rows: &[Row]) -> Value {
    let object = |row: &Row| {
        let fields = columns.iter().map(|field| {
            (
                field.heading(Format::Json).to_owned(),
                field.value(view.scope.as_str(), row),
            )
        });
        Value::Object(fields.filter(|(_, value)| value.as_str() != Some("")).collect())
    };
    Value::Array(rows.iter().map(object).collect())
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

fn pretty(view: &View, fields: &[Field], rows: &[Row], tags: fn(&Map<String, Value>) -> String) -> String {
    let columns: Vec<Column<'_>> = fields
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
                .map(|field| match field {
                    Field::Tags => tags(&row.tags),
                    field => field.text(view.scope.as_str(), row, Format::Pretty),
                })
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
    if tags.is_empty() {
        return String::new();
    }
    yaml_text::document(&Value::Object(tags.clone())).trim_end().to_owned()
}

fn tags_flow(tags: &Map<String, Value>) -> String {
    if tags.is_empty() {
        return String::new();
    }
    yaml_text::scalar(&Value::Object(tags.clone()))
}

#[cfg(test)]
#[path = "list_tests.rs"]
mod tests;
