//! A new cluster: initdb in a directory beside, then the roles once the server runs.

use std::time::Duration;

use super::clone::{clear_leftover, stamp};
use super::files;
use super::programs::{Programs, ToolError, file_error};
use super::sql::{Target, identifier, literal, tell_in_order};
use crate::config::{AgentConfig, Credentials};

const INITDB_MAX: Duration = Duration::from_secs(600);
const ROLES_MAX: Duration = Duration::from_secs(30);

/// In the data directory until the roles exist, so that a member that dies in between finishes the work.
pub const UNFINISHED_MARKER: &str = "pgherd.bootstrap";

/// Runs initdb and puts the new data directory into place.
///
/// # Errors
/// When initdb fails, or a file cannot be written; the data directory's place is untouched then.
pub async fn initdb(programs: &Programs, config: &AgentConfig) -> Result<(), ToolError> {
    let postgresql = &config.postgresql;
    let new = files::beside(&postgresql.data_dir, "pgherd-initdb");
    clear_leftover(&new).await?;
    if let Some(parent) = postgresql.data_dir.parent() {
        tokio::fs::create_dir_all(parent)
            .await
            .map_err(file_error("making", parent))?;
    }
    let mut args = vec![
        format!("--pgdata={}", new.display()),
        format!("--username={}", postgresql.superuser.username),
    ];
    for option in &config.bootstrap.initdb {
        args.push(match &option.value {
            Some(value) => format!("--{}={value}", option.name),
            None => format!("--{}", option.name),
        });
    }
    // A file of mode 0600 that is gone before anything runs: a password on a command line is there for all to see.
    let password_file = password_file(config);
    if let Some(password) = &postgresql.superuser.password {
        files::write_whole(&password_file, &format!("{password}\n"), 0o600)?;
        args.push(format!("--pwfile={}", password_file.display()));
    }
    let made = programs.run("initdb", &args, &[], INITDB_MAX).await;
    files::remove_if_there(&password_file)?;
    made?;
    write_hba(config, &new)?;
    files::write_whole(&new.join(UNFINISHED_MARKER), "", 0o600)?;
    files::install(&new, &postgresql.data_dir, &stamp()).map(|_| ())
}

/// Where initdb finds the superuser's password, for as long as it runs.
#[must_use]
pub fn password_file(config: &AgentConfig) -> std::path::PathBuf {
    config.runtime_dir.join("initdb.password")
}

/// The client authentication of a new cluster: the configured lines after initdb's own; when nothing at all is
/// configured, what members need to reach each other.
fn write_hba(config: &AgentConfig, data_dir: &std::path::Path) -> Result<(), ToolError> {
    if config.postgresql.pg_hba.is_some() {
        return Ok(()); // Written whole at every start.
    }
    let path = data_dir.join("pg_hba.conf");
    let mut text = std::fs::read_to_string(&path).map_err(file_error("reading", &path))?;
    let user = identifier(&config.postgresql.replication.username);
    let default = vec![
        format!("host replication {user} all scram-sha-256"),
        "host all all all scram-sha-256".to_owned(),
    ];
    let lines = if config.bootstrap.pg_hba.is_empty() {
        &default
    } else {
        &config.bootstrap.pg_hba
    };
    text.push('\n');
    for line in lines {
        text.push_str(line);
        text.push('\n');
    }
    files::write_whole(&path, &text, 0o600).map(|_| ())
}

/// Sent before statements that hold passwords, which must not reach the server's log. PostgreSQL decides on logging a message
/// before it runs any of it, so what switches logging off is a message of its own; the connection ends with it off.
pub(super) const QUIET: &str = "SET log_statement = none; SET log_min_duration_statement = -1; \
    SET log_min_duration_sample = -1; SET log_transaction_sample_rate = 0; SET log_min_error_statement = panic; \
    SET log_duration = off; SET password_encryption = 'scram-sha-256'";

/// Makes the roles that members use. May be repeated.
///
/// # Errors
/// When a statement fails.
pub async fn make_roles(target: &Target, config: &AgentConfig) -> Result<(), ToolError> {
    let postgresql = &config.postgresql;
    let mut roles = Vec::new();
    if postgresql.replication.username != postgresql.superuser.username {
        roles.push(role(&postgresql.replication, "LOGIN REPLICATION"));
    }
    let separate_rewind = postgresql
        .rewind
        .as_ref()
        .filter(|rewind| rewind.username != postgresql.superuser.username);
    if let Some(rewind) = separate_rewind {
        roles.push(role(rewind, "LOGIN"));
        // What pg_rewind reads, <https://www.postgresql.org/docs/current/app-pgrewind.html>.
        for function in [
            "pg_ls_dir(text, boolean, boolean)",
            "pg_stat_file(text, boolean)",
            "pg_read_binary_file(text)",
            "pg_read_binary_file(text, bigint, bigint, boolean)",
        ] {
            let user = identifier(&rewind.username);
            roles.push(format!("GRANT EXECUTE ON FUNCTION pg_catalog.{function} TO {user}"));
        }
    }
    let statements: Vec<&str> = std::iter::once(QUIET).chain(roles.iter().map(String::as_str)).collect();
    tell_in_order(target, "making the replication role", &statements, ROLES_MAX).await
}

fn role(user: &Credentials, attributes: &str) -> String {
    let name = identifier(&user.username);
    let password = user
        .password
        .as_deref()
        .map(|password| format!(" PASSWORD {}", literal(password)))
        .unwrap_or_default();
    let exists = format!("SELECT 1 FROM pg_authid WHERE rolname = {}", literal(&user.username));
    let body = format!(
        "BEGIN IF EXISTS ({exists}) THEN ALTER ROLE {name} {attributes}{password}; \
         ELSE CREATE ROLE {name} {attributes}{password}; END IF; END"
    );
    format!("DO {}", literal(&body))
}
