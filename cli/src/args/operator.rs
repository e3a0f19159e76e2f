//! The operator's commands: patronictl's words and options, the same under `pgherd` and under the name `patronictl`.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::PossibleValue;
use clap::{Args, Parser, Subcommand, ValueEnum};
use pgherd_cluster::event::Kind;

use super::seconds;

/// The command line of the binary when it is called `patronictl`.
#[derive(Debug, Parser)]
#[command(
    name = "patronictl",
    version,
    about = "Commands for clusters of pgherd's and Patroni's members",
    after_help = "This is pgherd under patronictl's name: the same commands, options and texts. A failure ends with 1, a mistake in\n\
                  the arguments with 2; what patronictl ends with 0 although it failed ends with 1 here. Answers may be piped in."
)]
pub(crate) struct Patronictl {
    #[command(flatten)]
    pub(crate) reach: Reach,
    #[command(subcommand)]
    pub(crate) command: Operate<Before>,
}

/// How the cluster is found.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct Reach {
    /// The configuration file that says where etcd is
    #[arg(
        short,
        long,
        visible_alias = "config-file",
        value_name = "FILE",
        env = "PATRONICTL_CONFIG_FILE"
    )]
    pub(crate) config: Option<PathBuf>,
    /// Where etcd is, instead of what the configuration says: [etcd3://]HOST:PORT[/NAMESPACE]
    #[arg(short, long, visible_alias = "dcs", value_name = "URL", env = "DCS_URL")]
    pub(crate) dcs_url: Option<String>,
    /// Believe any certificate of members' REST interfaces
    #[arg(short = 'k', long)]
    pub(crate) insecure: bool,
}

/// Nothing: how the cluster is found was said before the command, as patronictl has it.
#[derive(Args, Clone, Debug)]
pub(crate) struct Before {}

/// Where the options of [`Reach`] are written.
pub(crate) trait Reaching: Args + std::fmt::Debug {
    /// These options, or those before the command.
    fn or<'a>(&'a self, before: &'a Reach) -> &'a Reach;
}

impl Reaching for Reach {
    fn or<'a>(&'a self, _: &'a Reach) -> &'a Reach {
        self
    }
}

impl Reaching for Before {
    fn or<'a>(&'a self, before: &'a Reach) -> &'a Reach {
        before
    }
}

/// A command's own options, and where the cluster is.
#[derive(Args, Debug)]
pub(crate) struct With<R: Reaching, A: Args + std::fmt::Debug> {
    #[command(flatten)]
    pub(crate) reach: R,
    #[command(flatten)]
    pub(crate) args: A,
}

/// What an operator does.
#[derive(Debug, Subcommand)]
pub(crate) enum Operate<R: Reaching> {
    /// Show the members of a cluster: who leads, who follows, how far behind
    List(With<R, ListArgs>),
    /// The same as a tree: who streams from whom
    Topology(With<R, TopologyArgs>),
    /// Show the timelines of a cluster: when each ended, and who led next
    History(With<R, HistoryArgs>),
    /// Show what happened: changes of the leader, of roles, of the configuration, fences, refusals, operators' actions
    Events(With<R, EventsArgs>),
    /// Hand the lead over to another member, in good order
    Switchover(With<R, SwitchoverArgs>),
    /// Make a member the leader while there is none, or one that cannot hand over
    Failover(With<R, FailoverArgs>),
    /// Restart PostgreSQL of members, at once, at a time, or one after another without a long stall
    Restart(With<R, RestartArgs>),
    /// Have members read their configuration again
    Reload(With<R, ReloadArgs>),
    /// Replace a member's data by a new copy of the leader's
    Reinit(With<R, ReinitArgs>),
    /// Leave PostgreSQL alone from now on: nothing is started, stopped or promoted unasked
    Pause(With<R, PauseArgs>),
    /// End a pause
    Resume(With<R, PauseArgs>),
    /// Change the dynamic configuration, with an editor or by values
    EditConfig(With<R, EditConfigArgs>),
    /// Show the dynamic configuration
    ShowConfig(With<R, ClusterArgs>),
    /// Run SQL on a member
    Query(With<R, QueryArgs>),
    /// Print host and port of a member, as libpq takes them
    Dsn(With<R, DsnArgs>),
    /// Remove a cluster's keys from etcd, not its data
    Remove(With<R, RemoveArgs>),
    /// Take back what was scheduled
    Flush(With<R, FlushArgs>),
    /// Show the versions of this program and of a cluster's members
    Version(With<R, VersionArgs>),
    /// Make a cluster follow another one
    DemoteCluster(With<R, DemoteClusterArgs>),
    /// Make a cluster that follows another one independent
    PromoteCluster(With<R, PromoteClusterArgs>),
}

/// How to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A table
    Pretty,
    /// Columns separated by tabs
    Tsv,
    /// One line of JSON
    Json,
    /// YAML
    #[value(alias = "yml")]
    Yaml,
}

/// Which members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RoleArg {
    /// Who holds the leader key
    Leader,
    /// Who holds the leader key, unless the cluster follows another one
    Primary,
    /// Who holds the leader key of a cluster that follows another one
    StandbyLeader,
    /// Everybody else
    Replica,
    /// Everybody else
    Standby,
    /// Everybody
    Any,
}

#[derive(Args, Debug)]
pub(crate) struct ClusterArgs {
    /// The cluster's name [default: the scope in the configuration]
    pub(crate) cluster: Option<String>,
    #[command(flatten)]
    pub(crate) group: Group,
}

/// Patronictl's `--group`, which belongs to Citus.
#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct Group {
    /// A Citus group; pgherd does not run Citus clusters
    #[arg(long, value_name = "N", hide = true)]
    pub(crate) group: Option<u32>,
}

#[derive(Args, Debug)]
pub(crate) struct ListArgs {
    /// Clusters' names [default: the scope in the configuration]
    pub(crate) clusters: Vec<String>,
    #[command(flatten)]
    pub(crate) group: Group,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Format::Pretty)]
    pub(crate) format: Format,
    /// Show all columns, empty ones too
    #[arg(short, long)]
    pub(crate) extended: bool,
    /// Print the time first
    #[arg(short, long)]
    pub(crate) timestamp: bool,
    #[command(flatten)]
    pub(crate) again: Again,
}

#[derive(Args, Debug)]
pub(crate) struct TopologyArgs {
    /// Clusters' names [default: the scope in the configuration]
    pub(crate) clusters: Vec<String>,
    #[command(flatten)]
    pub(crate) group: Group,
    #[command(flatten)]
    pub(crate) again: Again,
}

#[derive(Args, Clone, Copy, Debug, Default)]
pub(crate) struct Again {
    /// Print again every SEC seconds, until interrupted
    #[arg(short, long, value_name = "SEC", value_parser = seconds)]
    pub(crate) watch: Option<Duration>,
    /// Print again every 2 seconds, until interrupted
    #[arg(short = 'W', conflicts_with = "watch")]
    pub(crate) watch2: bool,
}

impl Again {
    /// How often, when not once.
    pub(crate) fn period(self) -> Option<Duration> {
        self.watch.or_else(|| self.watch2.then_some(Duration::from_secs(2)))
    }
}

#[derive(Args, Debug)]
pub(crate) struct HistoryArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// How long each phase of each change of the leader took, and for how long writes stood still
    #[arg(long)]
    pub(crate) timings: bool,
    /// With --timings: ask the member whose REST interface is here, not etcd
    #[arg(long, value_name = "URL", requires = "timings")]
    pub(crate) url: Option<String>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Format::Pretty)]
    pub(crate) format: Format,
}

#[derive(Args, Debug)]
pub(crate) struct EventsArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Go on, and print what happens
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Only since then: a time, or how long ago, such as 10m
    #[arg(long, value_name = "TIME")]
    pub(crate) since: Option<String>,
    /// Only events about this
    #[arg(long, value_enum)]
    pub(crate) kind: Option<KindArg>,
    /// How to print
    #[arg(short, long, value_enum, default_value_t = Format::Pretty)]
    pub(crate) output: Format,
    /// Ask the member whose REST interface is here, not etcd [default: this host's member, while etcd does not answer]
    #[arg(long, value_name = "URL")]
    pub(crate) url: Option<String>,
}

/// What an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KindArg(Kind);

impl KindArg {
    /// Whether it is this kind.
    pub(crate) fn is(self, kind: Kind) -> bool {
        self.0 == kind
    }
}

impl ValueEnum for KindArg {
    fn value_variants<'a>() -> &'a [Self] {
        const ALL: [KindArg; Kind::ALL.len()] = {
            let mut all = [KindArg(Kind::Other); Kind::ALL.len()];
            let mut at = 0;
            while at < all.len() {
                all[at] = KindArg(Kind::ALL[at]);
                at += 1;
            }
            all
        };
        &ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.0.as_str()))
    }
}

#[derive(Args, Debug, Default)]
pub(crate) struct SwitchoverArgs {
    /// The member that leads now; refused if another does
    #[arg(long, visible_alias = "primary", value_name = "NAME")]
    pub(crate) leader: Option<String>,
    /// The member that shall lead; the best one if not given
    #[arg(long, value_name = "NAME")]
    pub(crate) candidate: Option<String>,
    /// When, such as 2026-11-21T01:00; without an offset, by the clock of this machine
    #[arg(long, value_name = "TIME")]
    pub(crate) scheduled: Option<String>,
    /// Do not ask
    #[arg(long)]
    pub(crate) force: bool,
    /// Change nothing; say what a switchover would meet now, and how long writes would stand still
    #[arg(long, conflicts_with_all = ["scheduled", "force"])]
    pub(crate) dry_run: bool,
    /// The cluster's name [default: the scope in the configuration]
    pub(crate) cluster: Option<String>,
    #[command(flatten)]
    pub(crate) group: Group,
}

#[derive(Args, Debug)]
pub(crate) struct FailoverArgs {
    /// The member that shall lead
    #[arg(long, value_name = "NAME")]
    pub(crate) candidate: Option<String>,
    /// Do not ask
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
}

/// Members by name and role.
#[derive(Args, Debug)]
pub(crate) struct MembersArgs {
    /// The cluster's name
    pub(crate) cluster: String,
    /// Members' names [default: all]
    pub(crate) members: Vec<String>,
    #[command(flatten)]
    pub(crate) group: Group,
    /// Do not ask
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Args, Debug)]
pub(crate) struct RestartArgs {
    #[command(flatten)]
    pub(crate) members: MembersArgs,
    /// Only members in this role
    #[arg(short, long, value_enum, default_value_t = RoleArg::Any)]
    pub(crate) role: RoleArg,
    /// Only one of them, whichever
    #[arg(long, conflicts_with = "rolling")]
    pub(crate) any: bool,
    /// When, such as 2026-11-21T01:00; without an offset, by the clock of this machine
    #[arg(long, value_name = "TIME", conflicts_with = "rolling")]
    pub(crate) scheduled: Option<String>,
    /// Only where PostgreSQL is older than this
    #[arg(long, value_name = "VERSION")]
    pub(crate) pg_version: Option<String>,
    /// Only where a changed parameter waits for it
    #[arg(long)]
    pub(crate) pending: bool,
    /// How long PostgreSQL may take to start, such as 30 or 2min
    #[arg(long, value_name = "SEC")]
    pub(crate) timeout: Option<String>,
    /// The replicas one after another, each until it streams again; then a switchover; then the former leader
    #[arg(long)]
    pub(crate) rolling: bool,
}

#[derive(Args, Debug)]
pub(crate) struct ReloadArgs {
    #[command(flatten)]
    pub(crate) members: MembersArgs,
    /// Only members in this role
    #[arg(short, long, value_enum, default_value_t = RoleArg::Any)]
    pub(crate) role: RoleArg,
}

#[derive(Args, Debug)]
pub(crate) struct ReinitArgs {
    #[command(flatten)]
    pub(crate) members: MembersArgs,
    /// Copy from the leader, not from a replica
    #[arg(long)]
    pub(crate) from_leader: bool,
    /// Wait until it is done, and show how far it is
    #[arg(long)]
    pub(crate) wait: bool,
}

#[derive(Args, Debug)]
pub(crate) struct PauseArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Wait until every member has seen it
    #[arg(long)]
    pub(crate) wait: bool,
}

#[derive(Args, Debug)]
pub(crate) struct EditConfigArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Do not show what changes
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Set a value, its path with dots; `null` deletes it
    #[arg(short, long = "set", value_name = "KEY=VALUE")]
    pub(crate) set: Vec<String>,
    /// Set a parameter of PostgreSQL: short for -s postgresql.parameters.KEY=VALUE
    #[arg(short, long = "pg", value_name = "KEY=VALUE")]
    pub(crate) pg: Vec<String>,
    /// Merge a file of YAML into it; - is standard input
    #[arg(long, value_name = "FILE")]
    pub(crate) apply: Option<PathBuf>,
    /// Put a file of YAML in its place; - is standard input
    #[arg(long, value_name = "FILE")]
    pub(crate) replace: Option<PathBuf>,
    /// Do not ask
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Args, Debug)]
pub(crate) struct DsnArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// A member in this role [default: leader]
    #[arg(short, long, value_enum, conflicts_with = "member")]
    pub(crate) role: Option<RoleArg>,
    /// This member
    #[arg(short, long, value_name = "NAME")]
    pub(crate) member: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct QueryArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// How to print
    #[arg(long, value_enum, default_value_t = Format::Tsv)]
    pub(crate) format: Format,
    /// Run what this file says
    #[arg(short, long, value_name = "FILE", conflicts_with = "command")]
    pub(crate) file: Option<PathBuf>,
    /// Ask for a password
    #[arg(long)]
    pub(crate) password: bool,
    /// Connect as this user
    #[arg(short = 'U', long, value_name = "NAME")]
    pub(crate) username: Option<String>,
    #[command(flatten)]
    pub(crate) again: Again,
    /// On a member in this role [default: leader]
    #[arg(short, long, value_enum, conflicts_with = "member")]
    pub(crate) role: Option<RoleArg>,
    /// On this member
    #[arg(short, long, value_name = "NAME")]
    pub(crate) member: Option<String>,
    /// Between the columns of tsv
    #[arg(long, default_value = "\t", hide_default_value = true)]
    pub(crate) delimiter: String,
    /// Run this
    #[arg(short, long, value_name = "SQL")]
    pub(crate) command: Option<String>,
    /// Connect to this database
    #[arg(short, long, value_name = "NAME")]
    pub(crate) dbname: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct RemoveArgs {
    /// The cluster's name
    pub(crate) cluster: String,
    #[command(flatten)]
    pub(crate) group: Group,
    /// How to print what there is
    #[arg(short, long, value_enum, default_value_t = Format::Pretty)]
    pub(crate) format: Format,
    /// Instead of the questions: the cluster's name once more
    #[arg(long, value_name = "NAME")]
    pub(crate) confirm: Option<String>,
    /// Instead of the last question: the member that leads now
    #[arg(long, value_name = "NAME", requires = "confirm")]
    pub(crate) leader: Option<String>,
}

#[derive(Args, Debug)]
pub(crate) struct FlushArgs {
    /// The cluster's name
    pub(crate) cluster: String,
    /// Members' names [default: all], then what to take back: restart or switchover
    #[arg(required = true, value_name = "MEMBER... restart|switchover")]
    pub(crate) words: Vec<String>,
    #[command(flatten)]
    pub(crate) group: Group,
    /// Only members in this role
    #[arg(short, long, value_enum, default_value_t = RoleArg::Any)]
    pub(crate) role: RoleArg,
    /// Do not ask
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Args, Debug)]
pub(crate) struct VersionArgs {
    /// A cluster, to show its members' versions too
    pub(crate) cluster: Option<String>,
    /// Members' names [default: all]
    pub(crate) members: Vec<String>,
    #[command(flatten)]
    pub(crate) group: Group,
}

#[derive(Args, Debug)]
pub(crate) struct DemoteClusterArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// The host to stream from
    #[arg(long, value_name = "HOST")]
    pub(crate) host: Option<String>,
    /// Its port
    #[arg(long, value_name = "PORT")]
    pub(crate) port: Option<u16>,
    /// The command that fetches from an archive
    #[arg(long, value_name = "COMMAND")]
    pub(crate) restore_command: Option<String>,
    /// The replication slot there
    #[arg(long, value_name = "NAME")]
    pub(crate) primary_slot_name: Option<String>,
    /// Do not ask
    #[arg(long)]
    pub(crate) force: bool,
}

#[derive(Args, Debug)]
pub(crate) struct PromoteClusterArgs {
    #[command(flatten)]
    pub(crate) cluster: ClusterArgs,
    /// Do not ask
    #[arg(long)]
    pub(crate) force: bool,
}
