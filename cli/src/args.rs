//! The command line: what was typed, not yet what it means.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

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
                  Exit codes: 0 done, 1 refused, 64 bad configuration or arguments, 69 something needed is unavailable,\n\
                  70 a defect of pgherd, 75 try again."
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run one member: PostgreSQL, under an agent that takes part in elections, under a keeper that holds the fence
    Agent(ConfigArgs),
    /// Run the proxy: a write port that leads to the leader, a read port that spreads over replicas, a status page
    Proxy(ProxyArgs),
    /// Run a member and a proxy together: everything that a database host needs
    Node(ConfigArgs),
    /// Try it: etcd, PostgreSQL members and a proxy on this machine, for a first look and never for production
    Demo(DemoArgs),
    /// Show the members of a cluster: who leads, who follows, how far behind
    List(ListArgs),
    /// Hand the lead over to another member, in good order
    Switchover(SwitchoverArgs),
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
pub(crate) struct ListArgs {
    /// The configuration file that says where etcd is
    #[arg(short, long, value_name = "FILE", env = "PATRONICTL_CONFIG_FILE")]
    pub(crate) config: Option<PathBuf>,
    /// The cluster's name [default: the scope in the configuration]
    pub(crate) cluster: Option<String>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Format::Pretty)]
    pub(crate) format: Format,
    /// Show all columns, empty ones too
    #[arg(short, long)]
    pub(crate) extended: bool,
    /// Print the time first
    #[arg(short, long)]
    pub(crate) timestamp: bool,
    /// Print again every SEC seconds, until interrupted
    #[arg(short, long, value_name = "SEC", value_parser = seconds)]
    pub(crate) watch: Option<Duration>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A table
    Pretty,
    /// One line of JSON
    Json,
    /// Columns separated by tabs
    Tsv,
}

#[derive(Args, Debug)]
pub(crate) struct SwitchoverArgs {
    /// The configuration file that says where etcd is
    #[arg(short, long, value_name = "FILE", env = "PATRONICTL_CONFIG_FILE")]
    pub(crate) config: Option<PathBuf>,
    /// The member that leads now; refused if another does
    #[arg(long, visible_alias = "primary", value_name = "NAME")]
    pub(crate) leader: Option<String>,
    /// The member that shall lead; the best one if not given
    #[arg(long, value_name = "NAME")]
    pub(crate) candidate: Option<String>,
    /// Do not ask
    #[arg(long)]
    pub(crate) force: bool,
    /// The cluster's name [default: the scope in the configuration]
    pub(crate) cluster: Option<String>,
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
    use clap::CommandFactory;

    use super::*;

    fn parse(words: &[&str]) -> Result<Arguments, clap::Error> {
        Arguments::try_parse_from(std::iter::once(&"pgherd").chain(words))
    }

    #[test]
    fn the_definition_holds_together() {
        Arguments::command().debug_assert();
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
            let Ok(Arguments {
                command: Command::Switchover(args),
            }) = parse(&["switchover", word, "n1", "--candidate", "n2", "--force", "c"])
            else {
                panic!("{word} is not understood")
            };
            assert_eq!(
                (args.leader.as_deref(), args.candidate.as_deref()),
                (Some("n1"), Some("n2"))
            );
            assert_eq!((args.force, args.cluster.as_deref()), (true, Some("c")));
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
