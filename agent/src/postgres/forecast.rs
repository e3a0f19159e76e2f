//! What a stop of a server would meet, and what is being copied from it: one question each, answered as JSON, so that the
//! agent's REST and an operator's command read the same.

use std::time::Duration;

use serde_json::Value;

use super::programs::ToolError;
use super::sql::{Target, ask_once};

const ANSWER_MAX: Duration = Duration::from_secs(5);

/// `wal_since_checkpoint`: bytes that the next checkpoint has to account for. `ready_files`: segments that the archiver has
/// before it, all of which a stop waits for. `oldest`: the transactions that have been open for longest. A lag in seconds
/// is that of the last commit that a standby has acknowledged.
const OF_A_STOP: &str = "\
WITH here AS (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END AS lsn), \
clients AS (SELECT pid, usename, application_name, client_addr, state, \
  round(extract(epoch FROM clock_timestamp() - xact_start)::numeric, 3) AS seconds \
  FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()) \
SELECT json_build_object(\
'wal_since_checkpoint', (SELECT pg_wal_lsn_diff(here.lsn, redo_lsn)::bigint FROM pg_control_checkpoint(), here), \
'checkpoint_age_seconds', (SELECT extract(epoch FROM clock_timestamp() - checkpoint_time)::bigint FROM pg_control_checkpoint()), \
'sessions', (SELECT count(*) FROM clients), \
'transactions', (SELECT count(*) FROM clients WHERE seconds IS NOT NULL), \
'oldest', (SELECT coalesce(json_agg(row_to_json(o)), '[]') FROM \
  (SELECT * FROM clients WHERE seconds IS NOT NULL ORDER BY seconds DESC LIMIT 5) o), \
'archive_mode', current_setting('archive_mode'), \
'ready_files', (SELECT count(*) FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready'), \
'archiver_fails', (SELECT coalesce(last_failed_time > coalesce(last_archived_time, '-infinity'), false) FROM pg_stat_archiver), \
'replicas', (SELECT coalesce(json_agg(json_build_object('name', application_name, 'state', state, 'sync_state', sync_state, \
  'receive_lag', pg_wal_lsn_diff(here.lsn, flush_lsn)::bigint, 'replay_lag', pg_wal_lsn_diff(here.lsn, replay_lsn)::bigint, \
  'replay_lag_seconds', round(extract(epoch FROM replay_lag)::numeric, 3)) ORDER BY application_name), '[]') \
  FROM pg_stat_replication, here WHERE state = 'streaming')\
)::text";

const BACKUPS: &str = "\
SELECT coalesce(json_agg(json_build_object('name', application_name, 'phase', phase, 'total', backup_total, \
'streamed', backup_streamed)), '[]')::text FROM pg_stat_progress_basebackup JOIN pg_stat_replication USING (pid)";

/// What a stop of this server would meet. Asked as a superuser.
///
/// # Errors
/// When it does not answer.
pub async fn of_a_stop(target: &Target) -> Result<Value, ToolError> {
    one_document(target, "looking at what a stop would meet", OF_A_STOP).await
}

/// The base backups that are being taken from this server: who takes one, its phase, and bytes of bytes.
///
/// # Errors
/// When it does not answer.
pub async fn backups(target: &Target) -> Result<Value, ToolError> {
    one_document(target, "looking at running base backups", BACKUPS).await
}

async fn one_document(target: &Target, what: &'static str, sql: &str) -> Result<Value, ToolError> {
    let rows = ask_once(target, what, sql, ANSWER_MAX).await?;
    let text = rows.into_iter().next().and_then(|row| row.into_iter().next().flatten());
    // PostgreSQL has made the document itself.
    Ok(text
        .and_then(|text| serde_json::from_str(&text).ok())
        .unwrap_or_default())
}
