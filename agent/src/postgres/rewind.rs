//! pg_rewind, and what has to come before it.
//!
//! While pg_rewind works, what it works on is half one thing and half another, and its control file does not say so. It is
//! therefore not in the data directory's place meanwhile: whatever ends it, nothing is there that could be started.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgherd_cluster::record::Address;
use tokio::process::Command;
use tokio::time::timeout;

use super::control::{ControlState, DataDir, inspect};
use super::place::{Place, stamp};
use super::programs::{Programs, ToolError, file_error};
use super::{files, locks};
use crate::config::{AgentConfig, PostgresConfig};
use crate::scripts::keep_to_ourselves;

/// A recovery of much log, and a rewind over much data, take hours; this only keeps a stuck one from waiting for ever.
const WORK_MAX: Duration = Duration::from_secs(24 * 3600);
/// The archive may be slow, and a segment that it does not take is no reason to wait.
const ARCHIVE_MAX: Duration = Duration::from_secs(300);

/// Where the data lies while pg_rewind works on it.
#[must_use]
pub fn workplace(data_dir: &Path) -> PathBuf {
    files::beside(data_dir, "pgherd-rewind")
}

/// Where pg_rewind finds the source's password, for as long as it runs.
#[must_use]
pub fn source_pgpass(config: &AgentConfig) -> PathBuf {
    config.runtime_dir.join("pgpass.rewind")
}

/// Brings data that was not stopped in order to its end, by a server for one session: pg_rewind takes no other.
///
/// # Errors
/// When it does not get there; what was to be recovered is still as much to be recovered then.
pub async fn recover(programs: &Programs, postgresql: &PostgresConfig) -> Result<(), ToolError> {
    let data_dir = &postgresql.data_dir;
    let DataDir::Cluster { control, .. } = inspect(programs, data_dir).await? else {
        return Ok(());
    };
    if matches!(control.state, ControlState::ShutDown | ControlState::ShutDownInRecovery) {
        return Ok(());
    }
    if data_dir.join("backup_label").exists() {
        return Err(ToolError::Unexpected {
            program: "recovery".to_owned(),
            what: "the data is a copy that was never brought to its end".to_owned(),
        });
    }
    // Such a server knows no standby mode.
    files::remove_if_there(&data_dir.join("standby.signal"))?;
    files::remove_if_there(&data_dir.join("recovery.signal"))?;
    let dir = data_dir.display().to_string();
    // What it writes itself is on no timeline that anybody follows, and must not get into the archive.
    let mut args = vec!["--single", "-D", &dir];
    let conf = format!("config_file={}", postgresql.conf_file().display());
    if postgresql.is_configured_elsewhere() {
        args.extend(["-c", &conf]);
    }
    args.extend(["-c", "archive_mode=on", "-c", "archive_command=false", "template1"]);
    tracing::info!("recovering what was not stopped in order, before it is rewound");
    let environment = locks::clear_data(data_dir)?;
    let environment: Vec<_> = environment
        .iter()
        .filter_map(|(name, value)| Some((name.to_str()?, value.as_os_str())))
        .collect();
    programs
        .run("postgres", &args, &environment, WORK_MAX)
        .await
        .map(|_| ())
}

/// Archives what was ready to be when the server ended, in its order: pg_rewind removes it, and whoever restores a backup may
/// need it. The first failure ends it, and is not worth more than a warning.
pub async fn archive_ready(data_dir: &Path, command: &str) {
    let status_dir = data_dir.join("pg_wal").join("archive_status");
    let Ok(entries) = std::fs::read_dir(&status_dir) else {
        return;
    };
    let ready = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        name.strip_suffix(".ready").map(str::to_owned)
    };
    let mut segments: Vec<String> = entries.flatten().filter_map(ready).collect();
    segments.sort();
    for segment in segments {
        let archived = archive(data_dir, command, &segment).await;
        let done = |()| {
            let (before, after) = (format!("{segment}.ready"), format!("{segment}.done"));
            std::fs::rename(status_dir.join(before), status_dir.join(after)).map_err(file_error("marking", &status_dir))
        };
        if let Err(error) = archived.and_then(done) {
            tracing::warn!(segment, "archiving before the rewind: {}", error.chain());
            return;
        }
        tracing::info!(segment, "archived before the rewind");
    }
}

async fn archive(data_dir: &Path, command: &str, segment: &str) -> Result<(), ToolError> {
    let program = || "archive_command".to_owned();
    let path = format!("pg_wal/{segment}");
    let mut child = Command::new("sh");
    keep_to_ourselves(&mut child); // As when PostgreSQL runs it.
    let child = child
        .arg("-c")
        .arg(archive_text(command, &path, segment))
        .current_dir(data_dir)
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .status();
    let limit = ARCHIVE_MAX;
    let status = timeout(limit, child).await.map_err(|_| ToolError::Timeout {
        program: program(),
        limit,
    })?;
    let status = status.map_err(|source| ToolError::Spawn {
        program: program(),
        source,
    })?;
    if status.success() {
        return Ok(());
    }
    Err(ToolError::Failed {
        program: program(),
        said: status.to_string(),
    })
}

/// An archive command with its placeholders filled in, as PostgreSQL does it.
fn archive_text(command: &str, path: &str, segment: &str) -> String {
    let mut text = String::new();
    let mut rest = command.chars();
    while let Some(next) = rest.next() {
        if next != '%' {
            text.push(next);
            continue;
        }
        match rest.next() {
            Some('p') => text.push_str(path),
            Some('f') => text.push_str(segment),
            Some('%') => text.push('%'),
            Some(other) => text.extend(['%', other]),
            None => text.push('%'),
        }
    }
    text
}

/// Rewinds what lies in the data directory to where it fits `source`, a primary. The server is stopped and its data recovered.
/// Says whether there was anything to rewind.
///
/// # Errors
/// When pg_rewind says that it cannot be done, nothing has changed. When it fails half-way, the data is moved aside, and none
/// is left in its place.
pub async fn rewind(
    programs: &Programs,
    config: &AgentConfig,
    source: &Address,
    from_archive: bool,
) -> Result<bool, ToolError> {
    // A symbolic link stays where it is: what it leads to is moved, on its own filesystem.
    let real = Place::of(&config.postgresql.data_dir)?;
    let data_dir = real.data_dir();
    let place = workplace(data_dir);
    retire(data_dir)?;
    let tried = run(programs, config, source, (data_dir, from_archive), true).await?;
    if tried.contains("no rewind required") {
        files::write_whole(&data_dir.join("standby.signal"), "", 0o600)?;
        return Ok(false);
    }
    std::fs::rename(data_dir, &place).map_err(file_error("moving the data directory to be rewound", data_dir))?;
    files::sync_dir(data_dir.parent().unwrap_or(Path::new("/")))?;
    if let Err(error) = run(programs, config, source, (&place, from_archive), false).await {
        retire(data_dir)?;
        return Err(error);
    }
    files::remove_if_there(&place.join("promote"))?;
    files::write_whole(&place.join("standby.signal"), "", 0o600)?;
    std::fs::set_permissions(&place, std::fs::Permissions::from_mode(0o700)).map_err(file_error("closing", &place))?;
    std::fs::rename(&place, data_dir).map_err(file_error("moving the rewound data into place", data_dir))?;
    files::sync_dir(data_dir.parent().unwrap_or(Path::new("/")))?;
    Ok(true)
}

/// Moves aside what a rewind that was cut off has left.
///
/// # Errors
/// When it cannot be moved.
pub fn retire(data_dir: &Path) -> Result<(), ToolError> {
    let real = Place::of(data_dir)?;
    let place = workplace(real.data_dir());
    if !place.exists() {
        return Ok(());
    }
    let aside = real.set_aside(&place, &stamp())?;
    tracing::warn!(aside = %aside.display(), "what a rewind has left half done was moved aside");
    Ok(())
}

async fn run(
    programs: &Programs,
    config: &AgentConfig,
    source: &Address,
    (target, from_archive): (&Path, bool),
    dry: bool,
) -> Result<String, ToolError> {
    let postgresql = &config.postgresql;
    let (user, options) = postgresql.rewinds_as();
    let quote = super::settings::quote;
    let mut server = format!(
        "dbname={} user={} host={} port={} application_name={} connect_timeout=5 keepalives_idle=5 \
         keepalives_interval=2 keepalives_count=3 tcp_user_timeout=10000",
        quote(&postgresql.database),
        quote(&user.username),
        quote(&source.host),
        source.port,
        quote(config.name.as_str()),
    );
    for (name, value) in &options.preferring_tls().0 {
        server.push_str(&format!(" {name}={}", quote(value)));
    }
    let mut args = vec![
        format!("--target-pgdata={}", target.display()),
        format!("--source-server={server}"),
    ];
    if from_archive {
        args.push("--restore-target-wal".to_owned());
        if postgresql.is_configured_elsewhere() {
            args.push(format!("--config-file={}", postgresql.conf_file().display()));
        }
    }
    args.extend(dry.then(|| "--dry-run".to_owned()));
    // Its environment is that of restore_command, which need not see a password; an empty one gives way to the file's.
    let pgpass = source_pgpass(config);
    let mut env: Vec<(&str, &OsStr)> = vec![("PGPASSWORD", OsStr::new(""))];
    if let Some(password) = &user.password {
        let line = files::pgpass_line(&source.host, source.port, &user.username, password);
        files::write_whole(&pgpass, &line, 0o600)?;
        env.push(("PGPASSFILE", pgpass.as_os_str()));
    }
    let ran = programs.run("pg_rewind", &args, &env, WORK_MAX).await;
    files::remove_if_there(&pgpass)?;
    let output = ran?;
    let said = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&said).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{agent, with_password};

    #[test]
    fn placeholders_of_an_archive_command_are_postgresqls() {
        let text = archive_text("cp %p /archive/%f; echo 100%% %x %", "pg_wal/0001", "0001");
        assert_eq!(text, "cp pg_wal/0001 /archive/0001; echo 100% %x %");
    }

    /// Programs of which pg_rewind is a script.
    fn with_pg_rewind(dir: &Path, script: &str) -> Programs {
        let program = dir.join("pg_rewind");
        std::fs::write(&program, format!("#!/bin/sh\n{script}")).expect("written");
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).expect("made a program");
        Programs::new(Some(dir.to_owned()))
    }

    #[tokio::test]
    async fn a_link_stays_one_whether_its_data_is_rewound_or_moved_aside() {
        for (ends, kept) in [
            ("exit 0", true),
            ("case \"$*\" in *--dry-run*) exit 0;; esac; exit 1", false),
        ] {
            let dir = tempfile::tempdir().expect("a directory");
            let disk = dir.path().join("disk");
            std::fs::create_dir_all(disk.join("real")).expect("made");
            let link = dir.path().join("data");
            std::os::unix::fs::symlink(disk.join("real"), &link).expect("linked");
            let mut config = agent();
            (config.postgresql.data_dir, config.runtime_dir) = (link.clone(), dir.path().to_owned());
            let source = config.postgresql.connect_address.clone();
            let programs = with_pg_rewind(dir.path(), ends);
            let rewound = rewind(&programs, &config, &source, false).await;
            assert_eq!(rewound.ok(), kept.then_some(true));
            assert_eq!(std::fs::read_link(&link).expect("still a link"), disk.join("real"));
            assert_eq!(link.join("standby.signal").exists(), kept);
            let beside = std::fs::read_dir(&disk).expect("there").flatten();
            let aside = beside.filter(|entry| entry.file_name().to_string_lossy().starts_with("real.aside-"));
            assert_eq!(aside.count(), usize::from(!kept), "on the same filesystem");
        }
    }

    #[tokio::test]
    async fn pg_rewind_finds_the_password_in_a_file_and_restore_command_in_no_variable() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut config = with_password("it's:secret");
        config.runtime_dir = dir.path().to_owned();
        let script = "env | grep ^PGPASSWORD\nls -l \"$PGPASSFILE\" | cut -c 1-10\ncat \"$PGPASSFILE\"\n";
        let programs = with_pg_rewind(dir.path(), script);
        let source = config.postgresql.connect_address.clone();
        let said = run(&programs, &config, &source, (dir.path(), true), true).await;
        let line = files::pgpass_line(&source.host, source.port, "postgres", "it's:secret");
        assert_eq!(said.expect("it runs"), format!("PGPASSWORD=\n-rw-------\n{line}"));
        assert!(!source_pgpass(&config).exists(), "for as long as it runs");
    }

    #[tokio::test]
    async fn what_was_ready_is_archived_in_order_until_one_fails() {
        let dir = tempfile::tempdir().expect("a directory");
        let status = dir.path().join("pg_wal/archive_status");
        std::fs::create_dir_all(&status).expect("made");
        for segment in ["03", "01", "02"] {
            std::fs::write(status.join(format!("{segment}.ready")), "").expect("written");
        }
        archive_ready(dir.path(), "test %f != 03 && echo %p >> archived").await;
        let archived = std::fs::read_to_string(dir.path().join("archived")).expect("readable");
        assert_eq!(archived, "pg_wal/01\npg_wal/02\n");
        let left = |name: &str| status.join(name).exists();
        assert!(left("01.done") && left("02.done") && left("03.ready") && !left("01.ready"));
    }
}
