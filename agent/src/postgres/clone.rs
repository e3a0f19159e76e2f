//! A new copy of another member's data: made in a directory beside, and put into place only when it is whole.

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;

use pgherd_cluster::clock::wall_now;
use pgherd_cluster::record::Address;

use super::files;
use super::programs::{Programs, ToolError, file_error};
use crate::config::{AgentConfig, PostgresConfig};

/// A base backup of a large database takes hours; this only keeps a stuck one from waiting for ever.
const CLONE_MAX: Duration = Duration::from_secs(24 * 3600);

/// Clones from `source` into the data directory's place. Says where a former data directory was moved.
///
/// # Errors
/// When `pg_basebackup` fails or the directories cannot change places. What was in place before is untouched then.
pub async fn clone_from(
    programs: &Programs,
    config: &AgentConfig,
    source: &Address,
) -> Result<Option<PathBuf>, ToolError> {
    let postgresql = &config.postgresql;
    let new = files::beside(&postgresql.data_dir, "pgherd-clone");
    clear_leftover(&new).await?;
    write_pgpass(postgresql, source)?;
    let replication = &postgresql.replication;
    let mut conninfo = format!(
        "dbname={} user={} host={} port={} application_name={} connect_timeout=5 \
         keepalives_idle=5 keepalives_interval=2 keepalives_count=3 tcp_user_timeout=10000",
        super::settings::quote(&postgresql.database),
        super::settings::quote(&replication.username),
        super::settings::quote(&source.host),
        source.port,
        super::settings::quote(config.name.as_str()),
    );
    for (name, value) in &postgresql.connections.replication.preferring_tls().0 {
        conninfo.push_str(&format!(" {name}={}", super::settings::quote(value)));
    }
    let pgdata = new.display().to_string();
    let args = [
        "--pgdata",
        &pgdata,
        "--wal-method=stream",
        "--checkpoint=fast",
        "--no-password",
        "--dbname",
        &conninfo,
    ];
    let env: [(&str, &OsStr); 1] = [("PGPASSFILE", postgresql.pgpass.as_os_str())];
    programs.run("pg_basebackup", &args, &env, CLONE_MAX).await?;
    // A leader that is being cloned has none of these; a copy that had one would be taken for something else.
    for name in ["standby.signal", "recovery.signal", "promote"] {
        files::remove_if_there(&new.join(name))?;
    }
    // What comes up from this copy comes up as a standby, whatever happens next.
    files::write_whole(&new.join("standby.signal"), "", 0o600)?;
    files::install(&new, &postgresql.data_dir, &stamp())
}

/// Refuses, before anything is ended or copied, a place where the copy could not take over: it is put there by a rename.
///
/// # Errors
/// When the data directory is a link or a mount point.
pub fn refuse_unmovable(data_dir: &std::path::Path) -> Result<(), ToolError> {
    let refuse = |what: &'static str| {
        let source = std::io::Error::from(std::io::ErrorKind::Unsupported);
        Err(ToolError::File {
            what,
            path: data_dir.to_owned(),
            source,
        })
    };
    let Ok(here) = std::fs::symlink_metadata(data_dir) else {
        return Ok(());
    };
    if here.is_symlink() {
        return refuse(
            "the data directory is a symbolic link, and a clone takes its place by a rename: name its target",
        );
    }
    let parent = data_dir.parent().and_then(|parent| std::fs::metadata(parent).ok());
    if parent.is_some_and(|parent| parent.dev() != here.dev()) {
        return refuse(
            "the data directory is a mount point, and a clone takes its place by a rename: use a directory below it",
        );
    }
    Ok(())
}

/// A stamp for names of directories that were moved aside; sorts by time.
#[must_use]
pub fn stamp() -> String {
    let now = wall_now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("{:0digits$}", now.as_millis() / 100, digits = files::STAMP_DIGITS)
}

/// Writes the password file for streaming from `source`.
///
/// # Errors
/// When it cannot be written.
pub fn write_pgpass(postgresql: &PostgresConfig, source: &Address) -> Result<(), ToolError> {
    let replication = &postgresql.replication;
    let Some(password) = &replication.password else {
        return Ok(());
    };
    let line = files::pgpass_line(&source.host, source.port, &replication.username, password);
    files::write_whole(&postgresql.pgpass, &line, 0o600).map(|_| ())
}

/// Removes what an earlier try of ours left half done: by its name it can be nothing else.
pub(super) async fn clear_leftover(new: &std::path::Path) -> Result<(), ToolError> {
    match tokio::fs::remove_dir_all(new).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(file_error("removing a half-made copy", new)(error))
        }
        _ => Ok(()),
    }
}
