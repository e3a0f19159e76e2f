//! SQL on PostgreSQL: one kept connection to our own server, short ones to others. Every question has a deadline, also
//! against a backend that is stopped and will never answer.

use std::ffi::OsString;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use pgherd_cluster::name::{Lsn, SystemId, Timeline};
use pgherd_cluster::record::Address;
use tokio::sync::Mutex;
use tokio::time::timeout;
use tokio_postgres::{Client, SimpleQueryMessage, SimpleQueryRow};

use super::programs::{Programs, ToolError};
use super::settings::quote;
use super::target::Kept;
pub use super::target::Target;
use crate::config::{ConnectionOptions, Credentials};
use crate::status::{CommitWaiting, ServerStatus, WalSender, WalStatus};

const STATUS_MAX: Duration = Duration::from_secs(2);

/// A row of a simple query: texts and nulls.
pub type Row = Vec<Option<String>>;

/// Our own server. Connects when first asked, and again after an error.
pub struct Sql {
    target: Arc<ArcSwap<Target>>,
    kept: Mutex<Option<Kept>>,
    replication: ArcSwap<Replication>,
    /// What is known of a running standby's timeline. SQL tells it only while WAL is being received, and the control file
    /// lags behind.
    standby_timeline: std::sync::Mutex<Option<NotedTimeline>>,
}

/// How our own server is asked by the replication protocol.
pub struct Replication {
    /// Where psql is.
    pub programs: Programs,
    /// Where our server listens for other members.
    pub address: Address,
    /// As whom.
    pub user: Credentials,
    /// And with what.
    pub options: ConnectionOptions,
}

/// A timeline that a standby was seen on.
struct NotedTimeline {
    /// The start of its postmaster.
    start: String,
    timeline: Timeline,
    /// How far it had come then. When it has come further unseen, it may be on a later one.
    position: Lsn,
}

async fn ask(client: &Client, what: &'static str, sql: &str, limit: Duration) -> Result<Vec<Row>, ToolError> {
    let messages = timeout(limit, client.simple_query(sql))
        .await
        .map_err(|_| ToolError::Timeout {
            program: what.to_owned(),
            limit,
        })?
        .map_err(|source| ToolError::Sql { what, source })?;
    Ok(messages
        .iter()
        .filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row_texts(row)),
            _ => None,
        })
        .collect())
}

fn row_texts(row: &SimpleQueryRow) -> Row {
    (0..row.len()).map(|index| row.get(index).map(str::to_owned)).collect()
}

/// One question on a connection of its own.
///
/// # Errors
/// When connecting or asking fails or takes too long.
pub async fn ask_once(target: &Target, what: &'static str, sql: &str, limit: Duration) -> Result<Vec<Row>, ToolError> {
    let kept = target.connect().await?;
    ask(&kept.client, what, sql, limit).await
}

/// Several statements, one after another, on a connection of their own: what one of them sets is in force for the next.
///
/// # Errors
/// When connecting or one of them fails or takes too long; the rest is not sent then.
pub async fn tell_in_order(
    target: &Target,
    what: &'static str,
    statements: &[&str],
    limit: Duration,
) -> Result<(), ToolError> {
    ask_in_order(target, what, statements, limit).await.map(|_| ())
}

/// The same, with what they answer, one after another.
///
/// # Errors
/// As for [`tell_in_order`].
pub async fn ask_in_order<S: AsRef<str>>(
    target: &Target,
    what: &'static str,
    statements: &[S],
    limit: Duration,
) -> Result<Vec<Row>, ToolError> {
    let kept = target.connect().await?;
    let mut rows = Vec::new();
    for sql in statements {
        rows.extend(ask(&kept.client, what, sql.as_ref(), limit).await?);
    }
    Ok(rows)
}

impl Sql {
    /// A connection to be made when first needed.
    #[must_use]
    pub fn new(target: Target, replication: Replication) -> Self {
        Self {
            target: Arc::new(ArcSwap::from_pointee(target)),
            replication: ArcSwap::from_pointee(replication),
            kept: Mutex::new(None),
            standby_timeline: std::sync::Mutex::new(None),
        }
    }

    /// Asks, on the kept connection. `what` says what for, in an error.
    ///
    /// # Errors
    /// When connecting or asking fails or takes too long; the connection is given up then.
    pub async fn ask(&self, what: &'static str, sql: &str, limit: Duration) -> Result<Vec<Row>, ToolError> {
        // Held across the question on purpose: one connection, one question at a time, each with its deadline.
        let mut kept = self.kept.lock().await;
        let current = match kept.take() {
            Some(current) if !current.client.is_closed() => current,
            _ => {
                let target = self.target.load_full();
                target.connect().await?
            }
        };
        let answer = ask(&current.client, what, sql, limit).await;
        let usable = match &answer {
            Ok(_) => true,
            // The server said no; the connection is fine.
            Err(ToolError::Sql { source, .. }) => source.as_db_error().is_some() && !current.client.is_closed(),
            Err(_) => false,
        };
        if usable {
            *kept = Some(current);
        }
        answer
    }

    /// Reaches the server in this way from the next connection on.
    pub fn reach_by(&self, target: Target, replication: Replication) {
        self.target.store(Arc::new(target));
        self.replication.store(Arc::new(replication));
    }

    /// How the server is reached now, for a connection of one's own.
    #[must_use]
    pub fn target(&self) -> Target {
        (**self.target.load()).clone()
    }

    /// The same for whoever asks later, and by what counts then.
    #[must_use]
    pub fn shared_target(&self) -> Arc<ArcSwap<Target>> {
        Arc::clone(&self.target)
    }

    /// Forgets the connection: before a stop, so that it is not what a shutdown waits for.
    pub async fn disconnect(&self) {
        self.kept.lock().await.take();
    }

    /// What the server tells of itself.
    ///
    /// # Errors
    /// As for [`Self::ask`].
    pub async fn status(&self) -> Result<ServerStatus, ToolError> {
        let rows = self.ask("asking PostgreSQL for its status", STATUS, STATUS_MAX).await?;
        let row = rows.first().ok_or_else(|| unexpected("no status row"))?;
        let mut server = parse_status(row)?;
        if let WalStatus::Standby { .. } = server.wal {
            let receives = row.get(RECEIVED_TIMELINE).is_some_and(Option::is_some);
            server.timeline = self.standby_timeline(&server, receives).await;
        }
        Ok(server)
    }

    /// The timeline of a standby: what it receives, else what it was seen on if it has not moved since, else what it says
    /// by the replication protocol. Only when that cannot be had, what the control file says, which is the least.
    async fn standby_timeline(&self, server: &ServerStatus, receives: bool) -> Option<Timeline> {
        let position = server.wal.position();
        if receives {
            self.note_timeline(server, position, server.timeline?);
            return server.timeline;
        }
        if let Some(noted) = self.noted_timeline(server, position) {
            return server.timeline.max(Some(noted));
        }
        let replication = self.replication.load_full();
        match replication.identify().await {
            Ok(Identity { timeline, .. }) => {
                self.note_timeline(server, position, timeline);
                server.timeline.max(Some(timeline))
            }
            Err(error) => {
                tracing::debug!(
                    error = error.chain(),
                    "the standby's timeline is not known beyond its last checkpoint"
                );
                server.timeline
            }
        }
    }

    fn noted_timeline(&self, server: &ServerStatus, position: Lsn) -> Option<Timeline> {
        let noted = self.standby_timeline.lock().unwrap_or_else(PoisonError::into_inner);
        let noted = noted.as_ref()?;
        (noted.start == server.postmaster_start_time && noted.position >= position).then_some(noted.timeline)
    }

    fn note_timeline(&self, server: &ServerStatus, position: Lsn, timeline: Timeline) {
        let mut noted = self.standby_timeline.lock().unwrap_or_else(PoisonError::into_inner);
        *noted = Some(NotedTimeline {
            start: server.postmaster_start_time.clone(),
            timeline,
            position,
        });
    }

    /// Proves that the server takes writes, by one: a transactional message in the log, which touches no table.
    ///
    /// # Errors
    /// As for [`Self::ask`]; a server in recovery refuses it.
    pub async fn prove_writable(&self) -> Result<(), ToolError> {
        let sql = "SELECT pg_logical_emit_message(true, 'pgherd', 'writable')";
        self.ask("proving that PostgreSQL takes writes", sql, STATUS_MAX)
            .await
            .map(|_| ())
    }
}

/// What IDENTIFY_SYSTEM tells of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its system identifier.
    pub system_id: SystemId,
    /// Its timeline: of a standby the one that it replays.
    pub timeline: Timeline,
    /// How far it has flushed.
    pub position: Lsn,
}

/// Who is asked by the replication protocol, which the SQL client does not speak; psql does. A standby answers as a primary
/// does.
#[derive(Clone, Copy)]
pub struct Walsender<'a> {
    /// Where psql is.
    pub programs: &'a Programs,
    /// Where to, in libpq's words.
    pub place: &'a str,
    /// As whom.
    pub user: &'a Credentials,
    /// And with what.
    pub options: &'a ConnectionOptions,
}

impl Walsender<'_> {
    /// What it is, and how far.
    ///
    /// # Errors
    /// When psql fails or takes too long.
    pub async fn identify(self) -> Result<Identity, ToolError> {
        let text = self.tell("IDENTIFY_SYSTEM").await?;
        let mut columns = text.trim().split('|');
        let mut next = || columns.next().unwrap_or_default();
        match (next().parse(), next().parse(), next().parse()) {
            (Ok(system_id), Ok(timeline), Ok(position)) => Ok(Identity {
                system_id,
                timeline: Timeline(timeline),
                position,
            }),
            _ => Err(unexpected("no identity from IDENTIFY_SYSTEM")),
        }
    }

    /// Whether it is a primary. One whose sessions are read-only by default is taken for none.
    ///
    /// # Errors
    /// When psql fails or takes too long.
    pub async fn takes_writes(self) -> Result<bool, ToolError> {
        // A word that every release knows, and that is `on` in recovery whatever is configured.
        let read_only = self.tell("SHOW transaction_read_only").await?;
        Ok(read_only.trim() == "off")
    }

    /// The history file of its timeline; empty for the first, which has none.
    ///
    /// # Errors
    /// When psql fails or takes too long, or the server has no such file.
    pub async fn history_file(self, timeline: Timeline) -> Result<String, ToolError> {
        if timeline.0 <= 1 {
            return Ok(String::new());
        }
        let text = self.tell(&format!("TIMELINE_HISTORY {}", timeline.0)).await?;
        let content = text.split_once('|').map(|(_, content)| content.to_owned());
        content.ok_or_else(|| unexpected("no history from TIMELINE_HISTORY"))
    }

    async fn tell(self, command: &str) -> Result<String, ToolError> {
        let mut conninfo = format!(
            "{} user={} dbname=postgres replication=1 connect_timeout=2 application_name=pgherd",
            self.place,
            quote(&self.user.username),
        );
        for (name, value) in &self.options.0 {
            conninfo.push_str(&format!(" {name}={}", quote(value)));
        }
        let password = OsString::from(self.user.password.clone().unwrap_or_default());
        let env = [("PGPASSWORD", password.as_os_str())];
        let args = ["-XAtw", "-d", &conninfo, "-c", command];
        let output = self.programs.run("psql", &args, &env, STATUS_MAX).await?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

impl Replication {
    async fn identify(&self) -> Result<Identity, ToolError> {
        let place = format!("host={} port={}", quote(&self.address.host), self.address.port);
        let asked = Walsender {
            programs: &self.programs,
            place: &place,
            user: &self.user,
            options: &self.options,
        };
        asked.identify().await
    }
}

fn unexpected(what: &str) -> ToolError {
    ToolError::Unexpected {
        program: "PostgreSQL".to_owned(),
        what: what.to_owned(),
    }
}

/// One row: role, start, version, positions in bytes, timeline, receiver, and the walsenders as JSON.
const STATUS: &str = "SELECT pg_is_in_recovery(), \
    to_char(pg_postmaster_start_time() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US\"+00:00\"'), \
    current_setting('server_version_num'), \
    CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_wal_lsn_diff(pg_current_wal_flush_lsn(), '0/0')::bigint END, \
    CASE WHEN pg_is_in_recovery() THEN NULL ELSE substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END, \
    pg_wal_lsn_diff(greatest(pg_last_wal_receive_lsn(), r.written_lsn), '0/0')::bigint, \
    pg_wal_lsn_diff(pg_last_wal_replay_lsn(), '0/0')::bigint, \
    CASE WHEN pg_is_in_recovery() THEN pg_last_xact_replay_timestamp() END, \
    CASE WHEN pg_is_in_recovery() THEN pg_is_wal_replay_paused() END, \
    r.status, r.received_tli, pg_wal_lsn_diff(r.latest_end_lsn, '0/0')::bigint, \
    greatest((pg_control_checkpoint()).timeline_id, (pg_control_recovery()).min_recovery_end_timeline), \
    current_setting('restore_command') <> '', \
    (SELECT json_agg(json_build_array(usename, application_name, client_addr, state, sync_state, sync_priority, pid, \
       pg_wal_lsn_diff(sent_lsn, '0/0')::bigint, pg_wal_lsn_diff(write_lsn, '0/0')::bigint, \
       pg_wal_lsn_diff(flush_lsn, '0/0')::bigint, pg_wal_lsn_diff(replay_lsn, '0/0')::bigint)) \
       FROM pg_stat_replication), \
    current_setting('synchronous_standby_names'), \
    coalesce((SELECT wait_event IN ('CheckpointerMain', 'CheckpointWriteDelay') FROM pg_stat_activity \
       WHERE backend_type = 'checkpointer'), false) \
    FROM (SELECT 1) AS one LEFT JOIN pg_stat_get_wal_receiver() AS r ON r.pid IS NOT NULL";

/// The column of [`STATUS`] that is there only while WAL is being received.
const RECEIVED_TIMELINE: usize = 10;

fn parse_status(row: &Row) -> Result<ServerStatus, ToolError> {
    let text = |index: usize| row.get(index).and_then(Option::as_deref);
    let number = |index: usize| text(index).and_then(|text| text.parse::<u64>().ok());
    let lsn = |index: usize| number(index).map(Lsn);
    let switched_on = |index: usize| text(index) == Some("t");
    let standby = switched_on(0);
    let streaming = text(9) == Some("streaming");
    let control_timeline = number(12).and_then(|number| u32::try_from(number).ok());
    let timeline = if standby {
        number(10)
            .and_then(|number| u32::try_from(number).ok())
            .or(control_timeline)
    } else {
        text(4).and_then(|hex| u32::from_str_radix(hex, 16).ok())
    };
    let wal = if standby {
        let replayed = lsn(6).unwrap_or_default();
        WalStatus::Standby {
            received: lsn(5).unwrap_or(replayed),
            replayed,
            replayed_at: text(7).map(str::to_owned),
            paused: switched_on(8),
            latest_end: lsn(11),
        }
    } else {
        WalStatus::Primary {
            location: lsn(3).ok_or_else(|| unexpected("a primary without a position"))?,
        }
    };
    let replication_state = match (standby, streaming, switched_on(13)) {
        (true, true, _) => Some("streaming".to_owned()),
        (true, false, true) => Some("in archive recovery".to_owned()),
        _ => None,
    };
    Ok(ServerStatus {
        postmaster_start_time: text(1).unwrap_or_default().to_owned(),
        server_version: number(2)
            .and_then(|number| u32::try_from(number).ok())
            .unwrap_or_default(),
        wal,
        timeline: timeline.map(Timeline),
        replication_state,
        replication: text(14).map(parse_wal_senders).unwrap_or_default(),
        waiting: CommitWaiting {
            names: text(15).unwrap_or_default().to_owned(),
            taken_over: switched_on(16),
        },
    })
}

fn parse_wal_senders(json: &str) -> Vec<WalSender> {
    let rows: Vec<Vec<serde_json::Value>> = serde_json::from_str(json).unwrap_or_default();
    let text =
        |value: Option<&serde_json::Value>| value.and_then(|value| value.as_str()).unwrap_or_default().to_owned();
    let lsn = |value: Option<&serde_json::Value>| value.and_then(serde_json::Value::as_u64).map(Lsn);
    rows.iter()
        .map(|row| WalSender {
            pid: row
                .get(6)
                .and_then(serde_json::Value::as_i64)
                .and_then(|pid| i32::try_from(pid).ok())
                .unwrap_or_default(),
            sent: lsn(row.get(7)),
            written: lsn(row.get(8)),
            flushed: lsn(row.get(9)),
            replayed: lsn(row.get(10)),
            usename: text(row.first()),
            application_name: text(row.get(1)),
            client_addr: text(row.get(2)),
            state: text(row.get(3)),
            sync_state: text(row.get(4)),
            sync_priority: row
                .get(5)
                .and_then(serde_json::Value::as_i64)
                .and_then(|number| i32::try_from(number).ok())
                .unwrap_or_default(),
        })
        .collect()
}

/// A string as an SQL literal, whatever `standard_conforming_strings` says.
#[must_use]
pub fn literal(text: &str) -> String {
    let quoted = text.replace('\'', "''");
    if quoted.contains('\\') {
        format!(" E'{}'", quoted.replace('\\', "\\\\"))
    } else {
        format!("'{quoted}'")
    }
}

/// A name as a quoted SQL identifier.
#[must_use]
pub fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(values: &[Option<&str>]) -> Row {
        values.iter().map(|value| value.map(str::to_owned)).collect()
    }

    #[test]
    fn a_primarys_row_is_read() {
        let senders = r#"[["replicator","n2","127.0.0.1","streaming","async",0]]"#;
        let values = [
            Some("f"),
            Some("2026-11-20 23:44:29.498882+00:00"),
            Some("150018"),
            Some("67108960"),
            Some("0000000A"),
            None,
            None,
            None,
            None,
            None,
            None,
            None,
            Some("10"),
            Some("f"),
            Some(senders),
        ];
        let status = parse_status(&row(&values)).expect("a whole row");
        assert_eq!(
            status.wal,
            WalStatus::Primary {
                location: Lsn(67_108_960)
            }
        );
        assert_eq!(status.timeline, Some(Timeline(10)));
        assert_eq!(
            status
                .replication
                .first()
                .map(|sender| sender.application_name.as_str()),
            Some("n2")
        );
        assert_eq!(status.replication_state, None);
    }

    #[test]
    fn a_standby_is_as_far_as_it_received_or_replayed() {
        let values = [
            Some("t"),
            Some("x"),
            Some("150018"),
            None,
            None,
            Some("100"),
            Some("200"),
            None,
            Some("f"),
            Some("streaming"),
            Some("2"),
            Some("300"),
            Some("1"),
            Some("f"),
            None,
        ];
        let status = parse_status(&row(&values)).expect("a whole row");
        assert_eq!(status.wal.position(), Lsn(200));
        assert_eq!(status.timeline, Some(Timeline(2)));
        assert_eq!(status.replication_state.as_deref(), Some("streaming"));
    }

    #[test]
    fn literals_and_identifiers_are_quoted() {
        assert_eq!(literal("it's"), "'it''s'");
        assert_eq!(literal(r"a\b'"), r" E'a\\b'''");
        assert_eq!(identifier("a\"b"), "\"a\"\"b\"");
    }
}
