//! A new cluster: made by initdb in a directory beside, or by an operator's own program in its place; then, once the server
//! runs, the roles and the operator's first scripts.

use std::ffi::OsStr;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pgherd_cluster::record::{Address, DynamicConfig};

use super::clone::{file_name, forget_recovery};
use super::files;
use super::linked::linked_dir;
use super::place::{Mark, Place, close, mark, stamp, unmark};
use super::programs::{Programs, ToolError, file_error};
use super::settings::{push_setting, quote, value_text};
use super::sql::{Target, identifier, literal, tell_in_order};
use crate::config::{AgentConfig, Credentials};
use crate::context::local_address;
use crate::scripts::{BootstrapMethod, Run};

const INITDB_MAX: Duration = Duration::from_secs(600);
/// Of a program of the operator's, which may restore a large backup.
const CUSTOM_MAX: Duration = Duration::from_secs(24 * 3600);
const ROLES_MAX: Duration = Duration::from_secs(30);

/// In the data directory until the cluster is finished, so that a member that dies in between finishes the work.
pub const UNFINISHED_MARKER: &str = "pgherd.bootstrap";

/// How far a cluster that is being made has come, as the marker tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The data directory is there.
    Made,
    /// The operator's scripts have begun: whether they have ended is not known.
    ScriptsBegun,
    /// They have ended well.
    ScriptsDone,
}

impl Progress {
    const fn text(self) -> &'static str {
        match self {
            Self::Made => "",
            Self::ScriptsBegun => "scripts begun\n",
            Self::ScriptsDone => "scripts done\n",
        }
    }

    /// Reads the marker; nothing when the cluster is finished.
    #[must_use]
    pub fn read(data_dir: &Path) -> Option<Self> {
        let text = std::fs::read_to_string(data_dir.join(UNFINISHED_MARKER)).ok()?;
        let all = [Self::ScriptsBegun, Self::ScriptsDone];
        Some(
            all.into_iter()
                .find(|progress| progress.text() == text)
                .unwrap_or(Self::Made),
        )
    }

    /// Writes the marker.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(self, data_dir: &Path) -> Result<(), ToolError> {
        files::write_whole(&data_dir.join(UNFINISHED_MARKER), self.text(), 0o600).map(|_| ())
    }
}

/// Runs initdb and puts the new data directory into place.
///
/// # Errors
/// When initdb fails, or a file cannot be written; the data directory's place is untouched then.
pub async fn initdb(programs: &Programs, config: &AgentConfig) -> Result<(), ToolError> {
    let postgresql = &config.postgresql;
    let place = Place::of(&postgresql.data_dir)?;
    let new = place.prepare("initdb").await?;
    let mut args = vec![format!("--pgdata={}", new.display())];
    for option in &config.bootstrap.initdb {
        args.push(match (option.name.as_str(), &option.value) {
            // What an earlier cluster left there stays with it.
            ("waldir", Some(dir)) => format!("--waldir={}", linked_dir(Path::new(dir), &stamp()).display()),
            _ => option.argument(),
        });
    }
    args.push(format!("--username={}", postgresql.superuser.username));
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
    Progress::Made.write(&new)?;
    place.install(&new, &stamp()).map(|_| ())
}

/// Has an operator's program make the data directory of a new cluster. What was there before is moved aside.
///
/// # Errors
/// When the program fails, or makes nothing.
pub async fn by_program(config: &AgentConfig, method: &BootstrapMethod) -> Result<(), ToolError> {
    let place = Place::of(&config.postgresql.data_dir)?;
    let data_dir = place.data_dir();
    place.move_aside(&stamp())?;
    mark(data_dir, Mark::HalfMade)?;
    let told = [
        ("scope", config.scope.to_string()),
        ("datadir", config.postgresql.data_dir.display().to_string()),
    ];
    let run = Run::words(&method.program.command).args(method.program.arguments(&told));
    run.run(CUSTOM_MAX).await?;
    if !data_dir.join("PG_VERSION").exists() {
        return Err(ToolError::NothingMade {
            method: method.program.name.clone(),
            path: data_dir.to_owned(),
        });
    }
    close(data_dir)?;
    if !method.keep_existing_recovery_conf {
        for signal in ["standby.signal", "recovery.signal"] {
            files::remove_if_there(&data_dir.join(signal))?;
        }
        forget_recovery(data_dir)?;
    }
    if !method.recovery_conf.is_empty() {
        files::write_whole(&data_dir.join("recovery.signal"), "", 0o600)?;
    }
    complete(data_dir)?;
    write_hba(config, data_dir)?;
    Progress::Made.write(data_dir)?;
    unmark(data_dir)
}

/// A backup may come without the files that a distribution keeps elsewhere.
fn complete(data_dir: &Path) -> Result<(), ToolError> {
    for name in ["postgresql.conf", "pg_hba.conf", "pg_ident.conf"] {
        let path = data_dir.join(name);
        let kept_as_base = name == "postgresql.conf" && data_dir.join("postgresql.base.conf").exists();
        if !path.exists() && !kept_as_base {
            files::write_whole(&path, "# The backup had none.\n", 0o600)?;
        }
    }
    Ok(())
}

/// What `postgresql.conf` says beside everything else while a restored cluster recovers for the first time.
#[must_use]
pub fn recovery_settings(config: &AgentConfig) -> String {
    let method = config.bootstrap.method.as_ref();
    let unfinished = Progress::read(&config.postgresql.data_dir).is_some();
    let mut text = String::new();
    for (name, value) in method
        .iter()
        .filter(|_| unfinished)
        .flat_map(|method| &method.recovery_conf)
    {
        push_setting(&mut text, name, &value_text(value));
    }
    text
}

/// Where initdb finds the superuser's password, for as long as it runs.
#[must_use]
pub fn password_file(config: &AgentConfig) -> PathBuf {
    config.runtime_dir.join("initdb.password")
}

/// Where the first scripts find it, for as long as they run.
#[must_use]
pub fn scripts_pgpass(config: &AgentConfig) -> PathBuf {
    config.runtime_dir.join("pgpass.bootstrap")
}

/// Around what is opened for a while in `pg_hba.conf`.
const OPENED: [&str; 2] = [
    "# pgherd: until the restored cluster is finished.\n",
    "# pgherd: end of that.\n",
];

/// The text of `pg_hba.conf`, out of what is configured or there. While this member makes a cluster out of a backup it lets
/// itself in as the superuser, whose password in there is not known; only its connections to itself have such an address.
#[must_use]
pub fn hba_text(config: &AgentConfig, text: &str) -> String {
    let own = match text.split_once(OPENED[0]) {
        Some((before, rest)) => format!("{before}{}", rest.split_once(OPENED[1]).map_or("", |(_, after)| after)),
        None => text.to_owned(),
    };
    match opening_lines(config) {
        Some(lines) => format!("{}{lines}{}{own}", OPENED[0], OPENED[1]),
        None => own,
    }
}

fn opening_lines(config: &AgentConfig) -> Option<String> {
    config.bootstrap.method.as_ref()?;
    Progress::read(&config.postgresql.data_dir)?;
    let user = identifier(&config.postgresql.superuser.username);
    let Ok(address) = own_address(config).host.parse::<IpAddr>() else {
        return Some(format!("local all {user} trust\n")); // By its unix socket.
    };
    // Whoever connects to another loopback address does so from the first.
    let from = if address.is_loopback() && address.is_ipv4() {
        IpAddr::V4(Ipv4Addr::LOCALHOST)
    } else {
        address
    };
    let bits = if from.is_ipv4() { 32 } else { 128 };
    Some(format!("local all {user} trust\nhost all {user} {from}/{bits} trust\n"))
}

/// The client authentication of a new cluster: the configured lines after those that are there; when nothing at all is
/// configured, what members need to reach each other.
fn write_hba(config: &AgentConfig, data_dir: &Path) -> Result<(), ToolError> {
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

/// Runs what an operator has for a new cluster: the scripts of `initdb.d` where initdb made it, then `post_bootstrap`. They
/// are run once; see [`Progress`].
///
/// # Errors
/// When one fails; the cluster is undone then.
pub async fn first_scripts(programs: &Programs, config: &AgentConfig) -> Result<(), ToolError> {
    let (postgresql, pgpass) = (&config.postgresql, scripts_pgpass(config));
    let address = own_address(config);
    if let Some(password) = &postgresql.superuser.password {
        // libpq looks for a unix socket under `localhost` where that is its default one.
        let hosts = ["localhost"].into_iter().filter(|_| address.host.starts_with('/'));
        let line = |host: &str| files::pgpass_line(host, address.port, &postgresql.superuser.username, password);
        let lines: String = hosts.chain([address.host.as_str()]).map(line).collect();
        files::write_whole(&pgpass, &lines, 0o600)?;
    }
    let ran = run_first_scripts(programs, config, &pgpass).await;
    files::remove_if_there(&pgpass)?;
    ran
}

/// Where the new server is reached, of which the first dynamic configuration holds.
fn own_address(config: &AgentConfig) -> Address {
    local_address(config, &DynamicConfig::new(config.bootstrap.dcs.clone()))
}

async fn run_first_scripts(programs: &Programs, config: &AgentConfig, pgpass: &Path) -> Result<(), ToolError> {
    let (address, postgresql) = (own_address(config), &config.postgresql);
    let connstring = format!(
        "dbname={} user={} host={} port={}",
        quote(&postgresql.database),
        quote(&postgresql.superuser.username),
        quote(&address.host),
        address.port
    );
    let surroundings = |run: Run| {
        run.env("PGPASSFILE", pgpass.as_os_str())
            // Nobody streams yet, and a dump takes its time.
            .env("PGOPTIONS", "-c synchronous_commit=local -c statement_timeout=0")
    };
    for script in initdb_scripts(config)? {
        tracing::info!("running {}", script.display());
        let run = match script.extension().and_then(OsStr::to_str) {
            Some("sql") => Run::program(&file_name(&script), programs.path("psql"))
                .args(["-X", "-w", "-q", "-v", "ON_ERROR_STOP=1", "-d", &connstring, "-f"])
                .arg(script.as_os_str()),
            _ => Run::program(&file_name(&script), PathBuf::from("/bin/sh"))
                .arg(script.as_os_str())
                .env("PGHOST", &address.host)
                .env("PGPORT", address.port.to_string())
                .env("PGUSER", &postgresql.superuser.username)
                .env("PGDATABASE", &postgresql.database)
                // As the official image calls them.
                .env("POSTGRES_USER", &postgresql.superuser.username)
                .env("POSTGRES_DB", &postgresql.database)
                .env("PGDATA", postgresql.data_dir.as_os_str()),
        };
        surroundings(run).run(CUSTOM_MAX).await?;
    }
    if let Some(words) = &config.bootstrap.post_bootstrap {
        tracing::info!("running {}, as bootstrap.post_bootstrap says", words.name());
        surroundings(Run::words(words).arg(&connstring)).run(CUSTOM_MAX).await?;
    }
    Ok(())
}

/// The files of `initdb.d` that are run, in the order of their names. A restored backup has had them already.
fn initdb_scripts(config: &AgentConfig) -> Result<Vec<PathBuf>, ToolError> {
    let dir = config
        .bootstrap
        .initdb_d
        .as_ref()
        .filter(|_| config.bootstrap.method.is_none());
    let Some(dir) = dir else { return Ok(Vec::new()) };
    let entries = std::fs::read_dir(dir).map_err(file_error("reading pgherd.initdb_d", dir))?;
    let paths = entries.flatten().map(|entry| entry.path());
    let mut scripts: Vec<PathBuf> = paths
        .filter(|path| {
            let kind = path.extension().and_then(OsStr::to_str);
            let runs = matches!(kind, Some("sql" | "sh")) && path.is_file();
            if !runs {
                tracing::info!("{} is neither a .sql nor a .sh file, and is left alone", path.display());
            }
            runs
        })
        .collect();
    scripts.sort();
    Ok(scripts)
}

/// Sent before statements that hold passwords, which must not reach the server's log. PostgreSQL decides on logging a message
/// before it runs any of it, so what switches logging off is a message of its own; the connection ends with it off. Extensions
/// that keep or log statements are told too; where one is not loaded its setting is a word that nobody reads.
pub(super) const QUIET: &str = "SET log_statement = none; SET log_min_duration_statement = -1; \
    SET log_min_duration_sample = -1; SET log_transaction_sample_rate = 0; SET log_min_error_statement = panic; \
    SET log_duration = off; SET pg_stat_statements.track = none; SET pgaudit.log = none; \
    SET password_encryption = 'scram-sha-256'";

/// Makes the roles that members use. May be repeated.
///
/// # Errors
/// When a statement fails.
pub async fn make_roles(target: &Target, config: &AgentConfig) -> Result<(), ToolError> {
    let postgresql = &config.postgresql;
    let mut roles = Vec::new();
    if config.bootstrap.method.is_some() && postgresql.superuser.password.is_some() {
        roles.push(role(&postgresql.superuser, "LOGIN SUPERUSER"));
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_marker_tells_how_far_a_new_cluster_has_come() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(Progress::read(dir.path()), None);
        for progress in [Progress::Made, Progress::ScriptsBegun, Progress::ScriptsDone] {
            progress.write(dir.path()).expect("written");
            assert_eq!(Progress::read(dir.path()), Some(progress));
        }
    }
}
