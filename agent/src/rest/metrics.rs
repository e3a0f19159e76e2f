//! `GET /metrics`, under Patroni's names: dashboards and alerts go on working. Ours follow. Pure.

mod events;

use std::fmt::Write;

use jiff::Timestamp;
use pgherd_cluster::record::{PgState, Role};
use pgherd_cluster::{PATRONI_VERSION, VERSION};

use super::body::is_unlocked;
use super::facts::{Facts, SyncStanding};
use crate::journal::Counts;
use crate::status::WalStatus;

/// States in the order of their numbers in `patroni_postgres_state`.
const STATES: [(PgState, &str); 15] = [
    (PgState::Initializing, "initdb"),
    (PgState::InitdbFailed, "initdb_failed"),
    (PgState::CustomBootstrap, "custom_bootstrap"),
    (PgState::CustomBootstrapFailed, "custom_bootstrap_failed"),
    (PgState::CreatingReplica, "creating_replica"),
    (PgState::Running, "running"),
    (PgState::Starting, "starting"),
    (PgState::StartingAfterCustomBootstrap, "bootstrap_starting"),
    (PgState::StartFailed, "start_failed"),
    (PgState::Restarting, "restarting"),
    (PgState::RestartFailed, "restart_failed"),
    (PgState::Stopping, "stopping"),
    (PgState::Stopped, "stopped"),
    (PgState::StopFailed, "stop_failed"),
    (PgState::Crashed, "crashed"),
];

struct Page {
    labels: String,
    text: String,
}

impl Page {
    fn add(&mut self, name: &str, kind: &str, help: &str, value: &str) {
        self.add_with_note(name, kind, help, "", value);
    }

    fn add_with_note(&mut self, name: &str, kind: &str, help: &str, note: &str, value: &str) {
        let labels = &self.labels;
        // Writing to a text cannot fail.
        let _ = write!(
            self.text,
            "# HELP {name} {help}\n{note}# TYPE {name} {kind}\n{name}{labels} {value}\n"
        );
    }

    fn add_labelled(&mut self, name: &str, kind: &str, help: &str, (label, text): (&str, &str), value: &str) {
        let own = self.labels.trim_end_matches('}');
        // Writing to a text cannot fail.
        let _ = write!(
            self.text,
            "# HELP {name} {help}\n# TYPE {name} {kind}\n{name}{own},{label}=\"{text}\"}} {value}\n"
        );
    }

    fn flag(&mut self, name: &str, help: &str, set: bool) {
        let help = format!("Value is 1 if {help}, 0 otherwise.");
        self.add(name, "gauge", &help, if set { "1" } else { "0" });
    }
}

/// The whole page.
pub(super) fn page(facts: &Facts, counts: &Counts) -> String {
    let label = |text: &str| text.replace('\\', r"\\").replace('"', "\\\"");
    let (scope, name) = (&facts.status.scope, &facts.status.name);
    let labels = format!(
        r#"{{scope="{}",name="{}"}}"#,
        label(scope.as_str()),
        label(name.as_str())
    );
    let mut page = Page {
        labels,
        text: String::with_capacity(4096),
    };
    add_roles(&mut page, facts);
    add_positions(&mut page, facts);
    add_server(&mut page, facts);
    add_ours(&mut page, facts);
    events::add(&mut page, counts);
    page.text
}

/// What Patroni has no name for.
fn add_ours(page: &mut Page, facts: &Facts) {
    page.add("pgherd_up", "gauge", "1 while the agent serves.", "1");
    page.add_labelled(
        "pgherd_build_info",
        "gauge",
        "The running build.",
        ("version", VERSION),
        "1",
    );
    let runs = facts.state() == PgState::Running;
    page.flag("pgherd_postgres_up", "PostgreSQL runs and answers", runs);
    page.flag("pgherd_leads", "this member holds the leader key", facts.leads());
    let deadline = facts.status.holding.as_ref().map(|holding| holding.deadline);
    let left = deadline.map_or(0.0, |deadline| deadline.since(facts.now).as_secs_f64());
    let help = "How long this member may be writable on its last proof, 0 if it holds no lease.";
    page.add("pgherd_lease_remaining_seconds", "gauge", help, &format!("{left:.3}"));
    page.flag(
        "pgherd_failsafe_active",
        "the lease rests on the word of the other members",
        facts.is_failsafe_active(),
    );
    page.flag(
        "pgherd_dcs_up",
        "the cluster's store answers",
        facts.failing_since.is_none(),
    );
    page.flag("pgherd_paused", "the cluster is in maintenance", facts.is_paused());
    page.flag(
        "pgherd_watchdog_failed",
        "a watchdog is required and cannot be used",
        facts.status.watchdog_failed,
    );
    let waiting = facts.status.pending_restart.len();
    let help = "Parameters whose values wait for a restart.";
    page.add("pgherd_pending_restart_parameters", "gauge", help, &waiting.to_string());
    if let Some(server) = facts.server() {
        let clients = server.replication.len();
        let help = "Who streams from this member.";
        page.add("pgherd_replication_clients", "gauge", help, &clients.to_string());
        if let WalStatus::Standby { received, replayed, .. } = &server.wal {
            let leader = facts.leader_position();
            let behind = |reached: u64| leader.saturating_sub(reached).to_string();
            let help = "How far this member has not received what the leader is known to have written, in bytes.";
            page.add("pgherd_receive_lag_bytes", "gauge", help, &behind(received.0));
            let help = "How far this member has not replayed what the leader is known to have written, in bytes.";
            page.add("pgherd_replay_lag_bytes", "gauge", help, &behind(replayed.0));
        }
    }
}

fn add_roles(page: &mut Page, facts: &Facts) {
    let version = PATRONI_VERSION
        .split('.')
        .map(|part| format!("{part:0>2}"))
        .collect::<String>();
    page.add("patroni_version", "gauge", "Patroni semver without periods.", &version);
    let running = facts.state() == PgState::Running;
    page.flag("patroni_postgres_running", "Postgres is running", running);
    let started = facts.server().map(|server| server.postmaster_start_time.as_str());
    let help = "Epoch seconds since Postgres started.";
    page.add("patroni_postmaster_start_time", "gauge", help, &epoch_seconds(started));
    page.flag(
        "patroni_primary",
        "this node is the leader",
        facts.role() == Role::Primary,
    );
    let location = match facts.server().map(|server| &server.wal) {
        Some(WalStatus::Primary { location }) => location.0,
        _ => 0,
    };
    let help = "Current location of the Postgres transaction log, 0 if this node is not the leader.";
    page.add("patroni_xlog_location", "counter", help, &location.to_string());
    let leads_standbys = facts.role() == Role::StandbyLeader;
    page.flag(
        "patroni_standby_leader",
        "this node is the standby_leader",
        leads_standbys,
    );
    page.flag(
        "patroni_replica",
        "this node is a replica",
        facts.role() == Role::Replica,
    );
    let standing = facts.sync_standing();
    let (sync, quorum) = (Some(SyncStanding::Sync), Some(SyncStanding::Quorum));
    page.flag("patroni_sync_standby", "this node is a sync standby", standing == sync);
    page.flag(
        "patroni_quorum_standby",
        "this node is a quorum standby",
        standing == quorum,
    );
}

fn add_positions(page: &mut Page, facts: &Facts) {
    let (received, replayed, replayed_at, paused) = match facts.server().map(|server| &server.wal) {
        Some(WalStatus::Standby {
            received,
            replayed,
            replayed_at,
            paused,
            latest_end: _,
        }) => (received.0, replayed.0, replayed_at.as_deref(), *paused),
        _ => (0, 0, None, false),
    };
    let help = "Current location of the received Postgres transaction log, 0 if this node is not a replica.";
    page.add("patroni_xlog_received_location", "counter", help, &received.to_string());
    let help = "Current location of the replayed Postgres transaction log, 0 if this node is not a replica.";
    page.add("patroni_xlog_replayed_location", "counter", help, &replayed.to_string());
    let help = "Current timestamp of the replayed Postgres transaction log, 0 if null.";
    page.add(
        "patroni_xlog_replayed_timestamp",
        "gauge",
        help,
        &epoch_seconds(replayed_at),
    );
    page.flag("patroni_xlog_paused", "the Postgres xlog is paused", paused);
    if let Some(server) = facts.server() {
        let state = server.replication_state.as_deref();
        page.flag(
            "patroni_postgres_streaming",
            "Postgres is streaming",
            state == Some("streaming"),
        );
        let archive = state == Some("in archive recovery");
        page.flag(
            "patroni_postgres_in_archive_recovery",
            "Postgres is replicating from archive",
            archive,
        );
    }
}

fn add_server(page: &mut Page, facts: &Facts) {
    let server = facts.server();
    let version = server.map_or(0, |server| server.server_version).to_string();
    let help = "Version of Postgres (if running), 0 otherwise.";
    page.add("patroni_postgres_server_version", "gauge", help, &version);
    page.flag(
        "patroni_cluster_unlocked",
        "the cluster is unlocked",
        is_unlocked(facts),
    );
    page.flag(
        "patroni_failsafe_mode_is_active",
        "the failsafe mode is active",
        facts.is_failsafe_active(),
    );
    let timeline = server
        .and_then(|server| server.timeline)
        .map_or(0, |timeline| timeline.0);
    let help = "Postgres timeline of this node (if running), 0 otherwise.";
    page.add("patroni_postgres_timeline", "gauge", help, &timeline.to_string());
    let help = "Epoch timestamp when DCS was last contacted successfully.";
    page.add(
        "patroni_dcs_last_seen",
        "gauge",
        help,
        &facts.status.dcs_last_seen.to_string(),
    );
    page.flag(
        "patroni_pending_restart",
        "the node needs a restart",
        !facts.status.pending_restart.is_empty(),
    );
    page.flag("patroni_is_paused", "auto failover is disabled", facts.is_paused());
    let number = STATES.iter().position(|(state, _)| *state == facts.state());
    let number = number.map_or_else(|| "-1".to_owned(), |number| number.to_string());
    let values: Vec<String> = STATES
        .iter()
        .enumerate()
        .map(|(at, (_, word))| format!("{at}={word}"))
        .collect();
    let note = format!("# Values: {}\n", values.join(", "));
    let help = "Numeric representation of Postgres state.";
    page.add_with_note("patroni_postgres_state", "gauge", help, &note, &number);
}

/// Seconds since 1970 with microseconds; 0 for what is absent or not a time.
fn epoch_seconds(text: Option<&str>) -> String {
    match text.and_then(|text| text.parse::<Timestamp>().ok()) {
        Some(at) if at.as_microsecond() >= 0 => {
            let micros = at.as_microsecond();
            format!("{}.{:06}", micros / 1_000_000, micros % 1_000_000)
        }
        _ => "0".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixtures::{facts, replica, stopped};
    use super::*;

    fn sample<'a>(page: &'a str, name: &str) -> Option<&'a str> {
        let start = format!("{name}{{");
        let line = page.lines().find(|line| line.starts_with(&start))?;
        line.rsplit_once(' ').map(|(_, value)| value)
    }

    #[test]
    fn a_leader_shows_patronis_names_and_values() {
        let page = page(&facts(), &Counts::default());
        assert!(page.contains("patroni_postmaster_start_time{scope=\"batman\",name=\"node1\"} 1795218269.498882\n"));
        assert_eq!(sample(&page, "patroni_version"), Some("040104"));
        assert_eq!(sample(&page, "patroni_primary"), Some("1"));
        assert_eq!(sample(&page, "patroni_replica"), Some("0"));
        assert_eq!(sample(&page, "patroni_xlog_location"), Some("67108960"));
        assert_eq!(sample(&page, "patroni_postgres_state"), Some("5"));
        assert_eq!(sample(&page, "patroni_cluster_unlocked"), Some("0"));
    }

    #[test]
    fn our_own_names_follow_patronis() {
        let counts = Counts::default();
        let (leader, replica) = (page(&facts(), &counts), page(&replica(), &counts));
        let left = sample(&leader, "pgherd_lease_remaining_seconds").and_then(|left| left.parse::<f64>().ok());
        assert!(left.is_some_and(|left| left > 0.0), "{left:?}");
        for (name, of_leader, of_replica) in [
            ("pgherd_leads", Some("1"), Some("0")),
            ("pgherd_postgres_up", Some("1"), Some("1")),
            ("pgherd_dcs_up", Some("1"), Some("1")),
            ("pgherd_replication_clients", Some("2"), Some("0")),
            ("pgherd_replay_lag_bytes", None, Some("0")),
        ] {
            assert_eq!(
                (sample(&leader, name), sample(&replica, name)),
                (of_leader, of_replica),
                "{name}"
            );
        }
        let build = format!("pgherd_build_info{{scope=\"batman\",name=\"node1\",version=\"{VERSION}\"}} 1\n");
        assert!(leader.contains(&build));
        let ours = leader.find("pgherd_").expect("ours");
        assert!(
            !leader[ours..].contains("\npatroni_"),
            "Patroni's come first, in its order"
        );
    }

    #[test]
    fn a_replica_shows_its_positions() {
        let page = page(&replica(), &Counts::default());
        assert_eq!(sample(&page, "patroni_xlog_replayed_location"), Some("67108960"));
        assert_eq!(sample(&page, "patroni_xlog_replayed_timestamp"), Some("0"));
        assert_eq!(sample(&page, "patroni_postgres_streaming"), Some("1"));
    }

    #[test]
    fn a_server_that_does_not_answer_has_no_streaming_samples() {
        let mut facts = stopped();
        std::sync::Arc::make_mut(&mut facts.status).state = PgState::Running;
        let page = page(&facts, &Counts::default());
        assert_eq!(sample(&page, "patroni_postgres_state"), Some("-1"));
        assert_eq!(sample(&page, "patroni_postgres_streaming"), None);
        assert_eq!(sample(&page, "patroni_postgres_in_archive_recovery"), None);
        assert_eq!(sample(&page, "patroni_replica"), Some("1"));
    }
}
