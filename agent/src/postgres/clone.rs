//! A new copy of the cluster's data, by the methods that are configured, one after another until one works.
//!
//! A base backup is made beside, is verified, and takes the place only when it is whole. What an operator's own program
//! makes it makes in place, since it may know that place by other ways than by its arguments; a mark keeps what it has half
//! made from being taken for a data directory.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgherd_cluster::record::Address;
use rustix::fs::statvfs;
use tokio::time::sleep;

use super::bootstrap::UNFINISHED_MARKER;
use super::files;
use super::linked::{is_note, linked_dir, note};
use super::place::{Mark, Place, close, is_foreign, mark, stamp, unmark};
use super::programs::{Programs, ToolError, file_error};
use super::settings::quote;
use super::sql::{Target, ask_once};
use super::upstream::Upstream;
use crate::config::{AgentConfig, ConnectionOptions, Credentials, PostgresConfig};
use crate::scripts::{CustomMethod, ReplicaMethod, Run, Scripts, ToolOption};

/// A copy of a large database takes hours; this only keeps a stuck one from waiting for ever.
const CLONE_MAX: Duration = Duration::from_secs(24 * 3600);
/// A base backup that failed is tried once more, as Patroni does: a source may have been restarting.
const BASEBACKUP_AGAIN: Duration = Duration::from_secs(5);
const ASK_MAX: Duration = Duration::from_secs(10);

/// What a replica is made from.
#[derive(Clone, Copy, Debug)]
pub struct Making<'a> {
    /// PostgreSQL's programs.
    pub programs: &'a Programs,
    /// This member.
    pub config: &'a AgentConfig,
    /// The methods.
    pub scripts: &'a Scripts,
    /// Whom to copy from; nothing while nobody leads.
    pub source: Option<&'a Upstream>,
}

/// Makes a replica's data directory. Says where a former one was moved.
///
/// # Errors
/// When no method works. What was in place before is untouched then, unless a method was told to work on it.
pub async fn make_replica(making: Making<'_>) -> Result<Option<PathBuf>, ToolError> {
    let place = Place::of(&making.config.postgresql.data_dir)?;
    if let Some(source) = making.source {
        write_pgpass(&making.config.postgresql, source)?;
    }
    let mut failed = ToolError::NoMethod;
    for method in &making.scripts.replica_methods {
        let (name, made) = match (method, making.source) {
            (ReplicaMethod::BaseBackup, Some(source)) => ("basebackup", base_backup(making, &place, source).await),
            (ReplicaMethod::Custom(custom), source) if custom.no_leader || source.is_some() => {
                (custom.name.as_str(), by_program(making, &place, custom).await)
            }
            (ReplicaMethod::BaseBackup | ReplicaMethod::Custom(_), _) => continue,
        };
        match made {
            Ok(aside) => {
                tracing::info!("the data directory was made by {name}");
                return Ok(aside);
            }
            Err(error) => {
                tracing::warn!("making a replica by {name}: {}", error.chain());
                failed = error;
            }
        }
    }
    Err(failed)
}

async fn base_backup(making: Making<'_>, place: &Place, source: &Upstream) -> Result<Option<PathBuf>, ToolError> {
    let new = match try_base_backup(making, place, source).await {
        Err(ToolError::Run(error)) => {
            tracing::warn!("{error}; trying once more");
            sleep(BASEBACKUP_AGAIN).await;
            try_base_backup(making, place, source).await?
        }
        tried => tried?,
    };
    verify(making, &new).await?;
    become_standby(&new)?;
    place.install(&new, &stamp())
}

async fn try_base_backup(making: Making<'_>, place: &Place, source: &Upstream) -> Result<PathBuf, ToolError> {
    let Some(conninfo) = conninfo(making.config, source) else {
        return Err(ToolError::Unexpected {
            program: "standby_cluster".to_owned(),
            what: "it names no host, and pg_basebackup copies from none; name one, at least until the first member is made"
                .to_owned(),
        });
    };
    let new = place.prepare("clone").await?;
    let seen = Seen::of(making.config, source).await;
    require_room(place, &new, seen.size)?;
    let stamp = stamp();
    let mut run = Run::program("pg_basebackup", making.programs.path("pg_basebackup"))
        .env("LC_ALL", "C")
        .env("PGPASSFILE", making.config.postgresql.pgpass.as_os_str())
        .arg("--pgdata")
        .arg(new.as_os_str())
        .args(["--wal-method=stream", "--no-password", "--dbname", &conninfo]);
    let options = &making.scripts.basebackup;
    if !options.iter().any(|option| option.name == "checkpoint") {
        run = run.arg("--checkpoint=fast");
    }
    for option in options.iter().filter(|option| option.name != "waldir") {
        run = run.arg(option.argument());
    }
    let mut neighbours = Vec::new();
    if let Some(wal) = wal_dir(place, options) {
        let own = linked_dir(&wal, &stamp);
        run = run.arg(format!("--waldir={}", own.display()));
        neighbours.extend((own != wal).then_some(own));
    }
    let mapped = |old: &str| {
        options.iter().any(|option| {
            let mapping = option.value.as_deref().filter(|_| option.name == "tablespace-mapping");
            mapping.is_some_and(|mapping| mapping.starts_with(&format!("{old}=")))
        })
    };
    for old in seen.tablespaces.iter().filter(|old| !mapped(old)) {
        let own = linked_dir(Path::new(old), &stamp);
        if own != Path::new(old) {
            let escaped = |text: &str| text.replace('=', "\\=");
            run = run.arg(format!(
                "--tablespace-mapping={}={}",
                escaped(old),
                escaped(&own.display().to_string())
            ));
            neighbours.push(own);
        }
    }
    note(&new, &neighbours)?;
    run.run(CLONE_MAX).await?;
    Ok(new)
}

/// Where the WAL goes, if not into the data directory: where it is told to, or where that of the old one is.
fn wal_dir(place: &Place, options: &[ToolOption]) -> Option<PathBuf> {
    let told = options.iter().find(|option| option.name == "waldir");
    let told = told.and_then(|option| option.value.as_deref()).map(PathBuf::from);
    told.or_else(|| {
        std::fs::read_link(place.data_dir().join("pg_wal"))
            .ok()
            .filter(|target| target.is_absolute())
    })
}

/// What is known of a source before it is copied; nothing where it does not answer a superuser.
#[derive(Default)]
struct Seen {
    size: u64,
    tablespaces: Vec<String>,
}

impl Seen {
    async fn of(config: &AgentConfig, source: &Upstream) -> Self {
        let Some(source) = source.addresses().into_iter().next() else {
            return Self::default();
        };
        let postgresql = &config.postgresql;
        let target = |(user, options): (&Credentials, &ConnectionOptions)| {
            Target::new(&source, &postgresql.database, user).with_options(&options.preferring_tls())
        };
        let superuser = (&postgresql.superuser, &postgresql.connections.superuser);
        let sql = "SELECT (SELECT sum(pg_database_size(oid))::bigint FROM pg_database)::text \
                   UNION ALL (SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE pg_tablespace_location(oid) <> '')";
        let what = "asking for the size of what is to be copied";
        let asked = match ask_once(&target(superuser), what, sql, ASK_MAX).await {
            // The superuser may be let in on its own machine only.
            Err(_) if postgresql.rewind.is_some() => {
                ask_once(&target(postgresql.rewinds_as()), what, sql, ASK_MAX).await
            }
            asked => asked,
        };
        let rows = match asked {
            Ok(rows) => rows,
            Err(error) => {
                tracing::debug!("{}", error.chain());
                return Self::default();
            }
        };
        let mut texts = rows.into_iter().filter_map(|row| row.into_iter().next().flatten());
        Self {
            size: texts.next().and_then(|size| size.parse().ok()).unwrap_or_default(),
            tablespaces: texts.collect(),
        }
    }
}

/// A copy beside what is there needs room for both. Where nothing is there it is simply tried: a filesystem that compresses
/// has room for more than it says.
fn require_room(place: &Place, new: &Path, needed: u64) -> Result<(), ToolError> {
    let occupied = std::fs::read_dir(place.data_dir()).is_ok_and(|entries| {
        entries
            .flatten()
            .any(|entry| !is_foreign(&entry.file_name().to_string_lossy()))
    });
    let path = new.parent().unwrap_or(Path::new("/"));
    let Ok(stat) = statvfs(path) else { return Ok(()) };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    if !occupied || free >= needed {
        return Ok(());
    }
    let path = path.to_owned();
    Err(ToolError::NoRoom { needed, free, path })
}

/// Compares the copy with the manifest that came with it.
async fn verify(making: Making<'_>, new: &Path) -> Result<(), ToolError> {
    if !new.join("backup_manifest").exists() {
        tracing::info!("the copy came without a manifest, and is not verified");
        return Ok(());
    }
    let verified = Run::program("pg_verifybackup", making.programs.path("pg_verifybackup"))
        .env("LC_ALL", "C")
        .arg("--quiet")
        .arg(new.as_os_str())
        .run(CLONE_MAX)
        .await;
    match verified {
        Err(crate::scripts::RunError::Spawn { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            tracing::warn!("pg_verifybackup is not among PostgreSQL's programs: the copy is not verified");
            Ok(())
        }
        other => Ok(other?),
    }
}

/// Has an operator's program make the data directory, in its place.
async fn by_program(making: Making<'_>, place: &Place, custom: &CustomMethod) -> Result<Option<PathBuf>, ToolError> {
    let data_dir = place.data_dir();
    let aside = if custom.keep_data {
        mark(data_dir, Mark::HalfChanged)?;
        None
    } else {
        let aside = place.move_aside(&stamp())?;
        mark(data_dir, Mark::HalfMade)?;
        aside
    };
    let connstring = making
        .source
        .and_then(|source| connstring(making.config, source))
        .unwrap_or_default();
    let told = [
        ("scope", making.config.scope.to_string()),
        ("role", "replica".to_owned()),
        ("datadir", making.config.postgresql.data_dir.display().to_string()),
        ("connstring", connstring),
    ];
    let run = Run::words(&custom.command)
        .env("PGPASSFILE", making.config.postgresql.pgpass.as_os_str())
        .args(custom.arguments(&told));
    let made = run.run(CLONE_MAX).await.map_err(ToolError::from);
    let made = made.and_then(|()| match data_dir.join("PG_VERSION").exists() {
        true => Ok(()),
        false => Err(ToolError::NothingMade {
            method: custom.name.clone(),
            path: data_dir.to_owned(),
        }),
    });
    if made.is_err() && !custom.keep_data {
        place.clear()?;
        unmark(data_dir)?;
    }
    made?;
    close(data_dir)?;
    become_standby(data_dir)?;
    forget_recovery(data_dir)?;
    unmark(data_dir)?;
    place.bound_asides();
    Ok(aside)
}

/// What comes up from this copy comes up as a standby, whatever it was a copy of and whatever happens next.
fn become_standby(new: &Path) -> Result<(), ToolError> {
    for name in ["standby.signal", "recovery.signal", "promote", UNFINISHED_MARKER] {
        files::remove_if_there(&new.join(name))?;
    }
    // What a source keeps within its own data directory.
    let entries = std::fs::read_dir(new).map_err(file_error("reading", new))?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        let of_source = name
            .to_str()
            .is_some_and(|name| name.starts_with("pgherd-") && is_foreign(name));
        if of_source && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let path = entry.path();
            std::fs::remove_dir_all(&path).map_err(file_error("removing a source's own copy", &path))?;
        } else if of_source && is_note(&name) {
            files::remove_if_there(&entry.path())?;
        }
    }
    files::write_whole(&new.join("standby.signal"), "", 0o600).map(|_| ())
}

/// Takes settings of recovery out of `postgresql.auto.conf`, where a restore leaves them, and where they would go over what
/// is configured.
///
/// # Errors
/// When the file cannot be written.
pub fn forget_recovery(data_dir: &Path) -> Result<(), ToolError> {
    let path = data_dir.join("postgresql.auto.conf");
    let Ok(text) = std::fs::read_to_string(&path) else {
        return Ok(());
    };
    let kept: String = text
        .lines()
        .filter(|line| !sets_recovery(line))
        .flat_map(|line| [line, "\n"])
        .collect();
    files::write_whole(&path, &kept, 0o600).map(|_| ())
}

fn sets_recovery(line: &str) -> bool {
    let name = line
        .trim_start()
        .split(['=', ' ', '\t'])
        .next()
        .unwrap_or_default()
        .to_ascii_lowercase();
    name.starts_with("recovery_target")
        || [
            "primary_conninfo",
            "primary_slot_name",
            "restore_command",
            "archive_cleanup_command",
            "recovery_end_command",
            "recovery_min_apply_delay",
            "promote_trigger_file",
        ]
        .contains(&name.as_str())
}

fn conninfo(config: &AgentConfig, source: &Upstream) -> Option<String> {
    let reached = connstring(config, source)?;
    Some(format!(
        "{reached} connect_timeout=5 keepalives_idle=5 keepalives_interval=2 keepalives_count=3 tcp_user_timeout=10000"
    ))
}

/// How a source is reached; without a password, which is in the password file. Nothing where only an archive is read.
fn connstring(config: &AgentConfig, source: &Upstream) -> Option<String> {
    let mut text = format!(
        "dbname={} user={} {} application_name={}",
        quote(&config.postgresql.database),
        quote(&config.postgresql.replication.username),
        source.place()?,
        quote(config.name.as_str()),
    );
    for (name, value) in &config.postgresql.connections.replication.preferring_tls().0 {
        text.push_str(&format!(" {name}={}", quote(value)));
    }
    Some(text)
}

/// Writes the password file for streaming from `source`.
///
/// # Errors
/// When it cannot be written.
pub fn write_pgpass(postgresql: &PostgresConfig, source: &Upstream) -> Result<(), ToolError> {
    let replication = &postgresql.replication;
    let Some(password) = &replication.password else {
        return Ok(());
    };
    let line = |at: &Address| files::pgpass_line(&at.host, at.port, &replication.username, password);
    let lines: String = source.addresses().iter().map(line).collect();
    files::write_whole(&postgresql.pgpass, &lines, 0o600).map(|_| ())
}

/// The name of a file without what is before it, for the log.
pub(super) fn file_name(path: &Path) -> String {
    path.file_name()
        .map(OsStr::to_string_lossy)
        .unwrap_or_default()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_of_recovery_are_taken_out_of_what_a_restore_leaves() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("postgresql.auto.conf");
        let text =
            "# kept\nwork_mem = '1MB'\nrestore_command = 'cp'\n  recovery_target_time='x'\nPRIMARY_CONNINFO = ''\n";
        std::fs::write(&path, text).expect("written");
        forget_recovery(dir.path()).expect("rewritten");
        assert_eq!(
            std::fs::read_to_string(&path).expect("there"),
            "# kept\nwork_mem = '1MB'\n"
        );
    }

    #[test]
    fn a_copy_comes_up_as_a_standby_and_without_what_its_source_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(dir.path().join("pgherd-aside-1")).expect("made");
        for name in ["recovery.signal", "promote", UNFINISHED_MARKER, "pgherd-clone.links"] {
            std::fs::write(dir.path().join(name), "").expect("written");
        }
        become_standby(dir.path()).expect("done");
        let left: Vec<_> = std::fs::read_dir(dir.path())
            .expect("there")
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        assert_eq!(left, ["standby.signal"]);
    }
}
