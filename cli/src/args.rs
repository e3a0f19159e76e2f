//! The command line: what was typed, not yet what it means.

mod operator;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

pub(crate) use self::operator::*;

/// High availability for PostgreSQL in one binary: a proxy that always knows the leader, and an agent that keeps one.
#[derive(Debug, Parser)]
#[command(
    name = "pgherd",
    version,
    after_help = "Start with `pgherd demo`: a whole cluster on this machine, gone again with Ctrl-C.\n\
                  Without --config, the file is searched for: $PGHERD_CONFIG, /etc/pgherd/pgherd.yml, /etc/pgherd.yml,\n\
                  /etc/patroni/patroni.yml, /etc/patroni.yml, ./pgherd.yml, ./patroni.yml. A patroni.yml is read as it is.\n\
                  Variables go over the file: PATRONI_NAME and so on, and PGHERD_NAME over these; ..._PASSWORD_FILE names a file.\n\
                  PGHERD_LOG sets the log level: error, warn, info (default), debug, trace.\n\
                  Called `patronictl`, it takes patronictl's command line.\n\
                  Exit codes: 0 done, 1 refused, 64 bad configuration or arguments, 69 something needed is unavailable,\n\
                  70 a defect of pgherd, 75 try again."
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Arguments {
    /// Reads the command line.
    ///
    /// # Errors
    /// Help and version are asked for by an error, too.
    pub(crate) fn read<T: Into<OsString> + Clone>(words: impl IntoIterator<Item = T>) -> Result<Self, clap::Error> {
        Self::from_arg_matches(&Self::definition().try_get_matches_from(words)?)
    }

    /// `query` takes patronictl's -c and -d for itself.
    fn definition() -> clap::Command {
        Self::command().mut_subcommand("query", |query| {
            let query = query.mut_arg("config", |arg| arg.short(None));
            query.mut_arg("dcs_url", |arg| arg.short(None))
        })
    }
}

#[derive(Debug, Subcommand)]
#[expect(clippy::large_enum_variant, reason = "there is one in a process")]
pub(crate) enum Command {
    /// Run one member: PostgreSQL, under an agent that takes part in elections, under a keeper that holds the fence
    Agent(ConfigArgs),
    /// Run the proxy: a write port that leads to the leader, a read port that spreads over replicas, a status page
    Proxy(ProxyArgs),
    /// Run a member and a proxy together: everything that a database host needs
    Node(ConfigArgs),
    /// Try it: etcd, PostgreSQL members and a proxy on this machine, for a first look and never for production
    Demo(DemoArgs),
    #[command(flatten)]
    Operate(Operate<Reach>),
    /// Check a configuration file and this machine, and say what would run
    Check(CheckArgs),
    /// What a keeper starts beside itself
    #[command(hide = true)]
    Sentinel(SentinelArgs),
}

#[derive(Args, Debug)]
pub(crate) struct SentinelArgs {
    /// The data directory whose PostgreSQL is ended when the keeper does not. Not the configuration: a file that was spoiled
    /// while the keeper ran must not disarm its fence.
    pub(crate) data_dir: PathBuf,
}

#[derive(Args, Debug)]
pub(crate) struct ConfigArgs {
    /// The configuration file, or a directory of .yml files that are merged in order of name
    #[arg(short, long, value_name = "FILE", conflicts_with = "file")]
    pub(crate) config: Option<PathBuf>,
    /// The same, without the option's name
    #[arg(value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
}

impl ConfigArgs {
    /// The file that was named, if one was.
    pub(crate) fn path(&self) -> Option<PathBuf> {
        self.config.clone().or_else(|| self.file.clone())
    }
}

#[derive(Args, Debug)]
pub(crate) struct ProxyArgs {
    #[command(flatten)]
    pub(crate) config: ConfigArgs,
    /// Take the ports of the proxy that runs by the same configuration over; it ends once its sessions have. Where none
    /// runs, this is an ordinary start
    #[arg(long)]
    pub(crate) takeover: bool,
}

#[derive(Args, Debug)]
pub(crate) struct DemoArgs {
    /// How many members
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=9))]
    pub(crate) members: u16,
    /// Work in DIR, which must be new or empty, and leave it there at the end
    #[arg(long, value_name = "DIR")]
    pub(crate) keep: Option<PathBuf>,
}

#[derive(Args, Debug)]
pub(crate) struct CheckArgs {
    /// The configuration file, or a directory of .yml files
    pub(crate) file: Option<PathBuf>,
    /// Check the file alone, not this machine's ports, directories and programs
    #[arg(long)]
    pub(crate) file_only: bool,
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "write a number of seconds, such as 2".to_owned())?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if duration >= Duration::from_millis(100) => Ok(duration),
        _ => Err("write a number of seconds from 0.1 up".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Arguments, clap::Error> {
        Arguments::read(std::iter::once(&"pgherd").chain(words))
    }

    fn operate(words: &[&str]) -> Operate<Reach> {
        match parse(words).map(|arguments| arguments.command) {
            Ok(Command::Operate(command)) => command,
            other => panic!("{words:?}: {other:?}"),
        }
    }

    #[test]
    fn the_definitions_hold_together() {
        Arguments::definition().debug_assert();
        Patronictl::command().debug_assert();
    }

    #[test]
    fn a_bare_file_is_taken_as_the_configuration_but_not_beside_the_option() {
        for words in [
            ["agent", "a.yml"].as_slice(),
            &["agent", "--config", "a.yml"],
            &["agent", "-c", "a.yml"],
        ] {
            let Ok(Arguments {
                command: Command::Agent(args),
            }) = parse(words)
            else {
                panic!("{words:?} is not understood")
            };
            assert_eq!(args.path(), Some(PathBuf::from("a.yml")), "{words:?}");
        }
        assert!(parse(&["agent", "--config", "a.yml", "b.yml"]).is_err());
    }

    #[test]
    fn a_switchover_takes_patronis_words() {
        for word in ["--leader", "--primary"] {
            let words = ["switchover", word, "n1", "--candidate", "n2", "--force", "c"];
            let Operate::Switchover(with) = operate(&words) else {
                panic!("{word} is not understood")
            };
            let args = with.args;
            assert_eq!(
                (args.leader.as_deref(), args.candidate.as_deref()),
                (Some("n1"), Some("n2"))
            );
            assert_eq!((args.force, args.cluster.as_deref()), (true, Some("c")));
        }
    }

    #[test]
    fn where_the_cluster_is_comes_after_the_command_or_before_it() {
        let Operate::List(with) = operate(&["list", "-c", "f", "-d", "etcd3://h:1", "-k", "a", "b"]) else {
            panic!("a list")
        };
        assert_eq!(with.args.clusters, ["a", "b"]);
        assert_eq!(with.reach.config, Some(PathBuf::from("f")));
        assert_eq!(
            (with.reach.dcs_url.as_deref(), with.reach.insecure),
            (Some("etcd3://h:1"), true)
        );
        let words = [
            "patronictl",
            "--config-file",
            "f",
            "--dcs",
            "h:1",
            "-k",
            "query",
            "-c",
            "SELECT 1",
            "-d",
            "db",
        ];
        let patronictl = Patronictl::try_parse_from(words).expect("patronictl's words");
        let Operate::Query(with) = &patronictl.command else {
            panic!("a query")
        };
        assert_eq!(with.reach.or(&patronictl.reach).config, Some(PathBuf::from("f")));
        assert_eq!(with.args.command.as_deref(), Some("SELECT 1"));
        assert_eq!(with.args.dbname.as_deref(), Some("db"));
        let Operate::Query(with) = operate(&["query", "--config", "f", "-c", "SELECT 1", "-d", "db"]) else {
            panic!("a query")
        };
        assert_eq!((with.args.dbname.as_deref(), with.reach.dcs_url), (Some("db"), None));
    }

    #[test]
    fn patronictls_options_are_understood() {
        for words in [
            "list -e -t -f yml -W c",
            "list -w 5 --group 0",
            "topology -W a b",
            "history -f json",
            "failover --candidate n2 --force c",
            "restart c n1 n2 -r replica --pending --timeout 2min --pg-version 16.1 --scheduled 2040-01-01T00:00 --force",
            "restart c --any",
            "reload c n1 -r standby-leader --force",
            "reinit c n1 --force --from-leader --wait",
            "pause --wait c",
            "edit-config c -q -s ttl=30 -s loop_wait=5 -p max_connections=60 --force",
            "edit-config --apply - --replace f",
            "show-config c",
            "query c --format json -f x -U me -W -r any --delimiter ; --password",
            "dsn -m n1",
            "remove c -f json",
            "flush c n1 restart -r replica --force",
            "version c n1",
            "demote-cluster c --host h --port 5432 --primary-slot-name s --restore-command x --force",
            "promote-cluster --force",
        ] {
            let words: Vec<&str> = words.split(' ').collect();
            operate(&words);
            let called: Vec<&str> = std::iter::once("patronictl").chain(words).collect();
            assert!(Patronictl::try_parse_from(&called).is_ok(), "{called:?}");
        }
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        assert!(parse(&["list", "-w", "0"]).is_err());
        assert!(parse(&["list", "-w", "-1"]).is_err());
        assert!(parse(&["list", "-w", "0.5"]).is_ok());
        assert!(parse(&["demo", "--members", "0"]).is_err());
    }
}
