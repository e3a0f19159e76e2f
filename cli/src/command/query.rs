//! `pgherd query`: SQL on a member, by libpq's environment and password file.

use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use pgherd_cluster::record::Address;
use pgherd_cluster::source::reach_postgres;
use pgherd_cluster::tls::{KeyFile, ServerTlsConfig, ServerTlsMode};
use pgherd_cluster::view::Member;
use serde_json::Value;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_postgres::config::SslMode;
use tokio_postgres::{Config, NoTls, SimpleQueryMessage};

use super::dsn::one;
use super::output::Rows;
use super::site::{Scene, Site};
use super::utc_now;
use crate::args::{Format, QueryArgs, RoleArg};
use crate::config::proxy::source::password_of;
use crate::failure::Failure;
use crate::terminal::{print, read_secret, say};

const CONNECT_MAX: Duration = Duration::from_secs(5);
/// A statement may take its time; a server that has gone is found by the kernel much sooner.
const ANSWER_MAX: Duration = Duration::from_secs(24 * 3600);

/// Runs the command.
///
/// # Errors
/// When there is no such member, or it refuses.
pub(crate) async fn run(scene: &Scene, args: &QueryArgs) -> Result<(), Failure> {
    let sql = sql_of(args)?;
    let site = scene.site(args.cluster.cluster.as_deref(), args.cluster.group)?;
    let password = if args.password {
        Some(read_secret("Password: ")?)
    } else {
        None
    };
    let Some(period) = args.again.period() else {
        return once(&site, args, &sql, password.as_deref()).await;
    };
    let mut tick = interval(period);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        say("\x1b[2J\x1b[H");
        match once(&site, args, &sql, password.as_deref()).await {
            Ok(()) | Err(Failure::Ended(_)) => {} // It may be another time.
            Err(failure) => return Err(failure),
        }
    }
}

fn sql_of(args: &QueryArgs) -> Result<String, Failure> {
    match (&args.command, &args.file) {
        (Some(sql), _) => Ok(sql.clone()),
        (None, Some(file)) => std::fs::read_to_string(file)
            .map_err(|error| Failure::configuration(format!("{}: cannot be read: {error}", file.display()))),
        (None, None) => {
            let mut sql = String::new();
            let read = std::io::stdin().read_to_string(&mut sql);
            read.map_err(|error| Failure::configuration(format!("standard input: {error}")))?;
            if sql.trim().is_empty() {
                return Err(Failure::configuration("nothing to run; say -c SQL or -f FILE"));
            }
            Ok(sql)
        }
    }
}

async fn once(site: &Site, args: &QueryArgs, sql: &str, password: Option<&str>) -> Result<(), Failure> {
    let view = site.view().await?;
    let member = one(&view, args.member.as_deref(), args.role)?;
    let answer = ask(member, args, sql, password).await;
    let (rows, failed) = match answer {
        Ok(rows) => (rows, false),
        Err(why) => (trouble(&why), true),
    };
    let pretty = args.format == Format::Pretty;
    if pretty || !rows.rows.is_empty() || !rows.headings.is_empty() {
        print(&rows.render(args.format, &args.delimiter));
    }
    if failed { Err(Failure::Ended(1)) } else { Ok(()) }
}

/// A failure as patronictl shows it: a row like any other.
fn trouble(why: &str) -> Rows {
    Rows {
        rows: vec![vec![
            utc_now("%Y-%m-%d %H:%M:%S").into(),
            format!("ERROR, SQLSTATE: {why}").into(),
        ]],
        ..Rows::default()
    }
}

async fn ask(member: &Member, args: &QueryArgs, sql: &str, password: Option<&str>) -> Result<Rows, String> {
    let address = member.record.postgres_address();
    let address = address.ok_or_else(|| format!("{} publishes no address", member.name))?;
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let config = config(&address, args, password, &variable);
    let tls = tls(&variable)?;
    let connecting = timeout(CONNECT_MAX, async {
        let wire = reach_postgres(&address, &tls).await?;
        config.connect_raw(wire, NoTls).await.map_err(|error| told(&error))
    });
    let (client, connection) = connecting
        .await
        .map_err(|_| format!("{address} does not answer within {} s", CONNECT_MAX.as_secs()))??;
    let mut driver = JoinSet::new();
    driver.spawn(async move {
        // An error here is seen by who waits for the answer.
        let _ = connection.await;
    });
    if let Some(role) = args.role {
        check_role(&client, role, member).await?;
    }
    let messages = timeout(ANSWER_MAX, client.simple_query(sql)).await;
    let messages = messages
        .map_err(|_| "no answer".to_owned())?
        .map_err(|error| told(&error))?;
    Ok(rows(&messages))
}

/// A role may have changed since etcd was read.
async fn check_role(client: &tokio_postgres::Client, role: RoleArg, member: &Member) -> Result<(), String> {
    let wanted = match role {
        RoleArg::Primary => "f",
        RoleArg::Replica | RoleArg::Standby | RoleArg::StandbyLeader => "t",
        RoleArg::Leader | RoleArg::Any => return Ok(()),
    };
    let asked = timeout(CONNECT_MAX, client.simple_query("SELECT pg_is_in_recovery()")).await;
    let messages = asked
        .map_err(|_| "no answer".to_owned())?
        .map_err(|error| told(&error))?;
    let recovering = rows(&messages).rows.into_iter().flatten().next();
    if recovering == Some(Value::from(wanted)) {
        Ok(())
    } else {
        Err(format!("{} is in another role now", member.name))
    }
}

/// As libpq would connect: what was said, then the environment, then the password file.
fn config(
    address: &Address,
    args: &QueryArgs,
    password: Option<&str>,
    variable: &dyn Fn(&str) -> Option<String>,
) -> Config {
    let user = args.username.clone().or_else(|| variable("PGUSER"));
    let user = user
        .or_else(|| variable("USER"))
        .unwrap_or_else(|| "postgres".to_owned());
    let database = args.dbname.clone().or_else(|| variable("PGDATABASE"));
    let database = database.unwrap_or_else(|| user.clone());
    let password = password.map(str::to_owned).or_else(|| variable("PGPASSWORD"));
    let password = password.or_else(|| {
        let file = variable("PGPASSFILE").map(PathBuf::from);
        let file = file.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".pgpass")))?;
        let lines = std::fs::read_to_string(file).ok()?;
        password_of(&lines, address, &database, &user)
    });
    let mut config = Config::new();
    config
        .host(&address.host)
        .port(address.port)
        .user(user)
        .dbname(database)
        .application_name("pgherd ctl")
        // If there is to be TLS, it is there before.
        .ssl_mode(SslMode::Disable);
    if let Some(password) = password {
        config.password(password);
    }
    config
}

/// TLS as libpq's environment asks for it, which by default takes it where it is offered.
fn tls(variable: &dyn Fn(&str) -> Option<String>) -> Result<ServerTlsConfig, String> {
    let mode = match variable("PGSSLMODE").as_deref() {
        Some("disable" | "allow") => ServerTlsMode::Disable,
        None | Some("prefer") => ServerTlsMode::Prefer,
        Some("require") => ServerTlsMode::Require,
        Some("verify-ca") => ServerTlsMode::VerifyCa,
        Some("verify-full") => ServerTlsMode::VerifyFull,
        Some(other) => {
            return Err(format!(
                "PGSSLMODE is {other:?}: disable, allow, prefer, require, verify-ca or verify-full is accepted"
            ));
        }
    };
    let home = variable("HOME").map(|home| PathBuf::from(home).join(".postgresql"));
    let file = |name: &str, usual: &str| match variable(name) {
        Some(path) => Some(PathBuf::from(path)),
        None => home.as_ref().map(|home| home.join(usual)).filter(|path| path.exists()),
    };
    Ok(ServerTlsConfig {
        mode,
        ca: file("PGSSLROOTCERT", "root.crt"),
        identity: file("PGSSLCERT", "postgresql.crt").zip(file("PGSSLKEY", "postgresql.key").map(KeyFile::from)),
    })
}

/// The code of what a server says, the words of anything else.
fn told(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(error) => format!("{} {}", error.code().code(), error.message()),
        None => {
            let source = std::error::Error::source(error).map(|source| format!(": {source}"));
            format!("{error}{}", source.unwrap_or_default())
        }
    }
}

/// What the last statement with columns has given.
fn rows(messages: &[SimpleQueryMessage]) -> Rows {
    let mut rows = Rows::default();
    for message in messages {
        match message {
            SimpleQueryMessage::RowDescription(columns) => {
                rows = Rows {
                    headings: columns.iter().map(|column| column.name().to_owned()).collect(),
                    ..Rows::default()
                };
            }
            SimpleQueryMessage::Row(row) => {
                let cell = |index| row.get(index).map_or(Value::Null, Value::from);
                rows.rows.push((0..row.len()).map(cell).collect());
            }
            _ => {}
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::args::{Again, ClusterArgs, Group};

    fn args() -> QueryArgs {
        QueryArgs {
            cluster: ClusterArgs {
                cluster: None,
                group: Group::default(),
            },
            format: Format::Tsv,
            file: None,
            password: false,
            username: None,
            again: Again::default(),
            role: None,
            member: None,
            delimiter: "\t".to_owned(),
            command: Some("SELECT 1".to_owned()),
            dbname: None,
        }
    }

    #[test]
    fn the_connection_is_libpqs() {
        let mut passfile = tempfile::NamedTempFile::new().expect("a file");
        writeln!(passfile, "*:*:*:ann:from-file").expect("written");
        let path = passfile.path().display().to_string();
        let address = Address {
            host: "h".to_owned(),
            port: 5432,
        };
        let environment = |name: &str| match name {
            "PGUSER" => Some("ann".to_owned()),
            "PGPASSFILE" => Some(path.clone()),
            _ => None,
        };
        let config = config(&address, &args(), None, &environment);
        assert_eq!((config.get_user(), config.get_dbname()), (Some("ann"), Some("ann")));
        assert_eq!(config.get_password(), Some(b"from-file".as_slice()));
        let said = QueryArgs {
            username: Some("bob".to_owned()),
            dbname: Some("db".to_owned()),
            ..args()
        };
        let config = super::config(&address, &said, Some("typed"), &environment);
        assert_eq!((config.get_user(), config.get_dbname()), (Some("bob"), Some("db")));
        assert_eq!(config.get_password(), Some(b"typed".as_slice()));
    }

    #[test]
    fn tls_is_what_libpqs_environment_asks_for() {
        let home = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(home.path().join(".postgresql")).expect("made");
        let root = home.path().join(".postgresql/root.crt");
        std::fs::write(&root, "").expect("written");
        let asked = |mode: Option<&str>, ca: Option<&str>| {
            tls(&|name: &str| match name {
                "PGSSLMODE" => mode.map(str::to_owned),
                "PGSSLROOTCERT" => ca.map(str::to_owned),
                "HOME" => Some(home.path().display().to_string()),
                _ => None,
            })
        };
        let usual = asked(None, None).expect("good");
        assert_eq!((usual.mode, usual.ca), (ServerTlsMode::Prefer, Some(root)));
        assert_eq!(usual.identity, None);
        let full = asked(Some("verify-full"), Some("/ca.pem")).expect("good");
        assert_eq!(
            (full.mode, full.ca),
            (ServerTlsMode::VerifyFull, Some(PathBuf::from("/ca.pem")))
        );
        let refused = asked(Some("verify"), None).expect_err("no such word");
        assert!(refused.contains("PGSSLMODE is \"verify\""), "{refused}");
    }

    #[test]
    fn a_failure_is_a_row() {
        let text = trouble("42601 syntax error").render(Format::Tsv, "\t");
        assert!(text.ends_with("\tERROR, SQLSTATE: 42601 syntax error\n"), "{text}");
    }
}
