//! Long work, one piece at a time: each is a future that the loop owns and may drop.

mod handover;
mod make;
mod poll;
mod rejoin;
mod serve;
mod slot;

use std::collections::BTreeMap;
use std::sync::Arc;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::http::Endpoint;
use pgherd_cluster::name::{Lsn, MemberName, SystemId, Timeline};
use pgherd_cluster::record::StandbyCluster;
use pgherd_cluster::view::Epoch;

use crate::context::Context;
use crate::keeper::OrderError;
use crate::observation::{JobKind, Poll, Rejoin};
use crate::postgres::{ToolError, Upstream};
use pgherd_cluster::etcd::StoreError;

pub(crate) use self::handover::{clear_request, hand_to, release_key};
pub(crate) use self::make::withdraw;
pub use self::serve::{configure, reload_if_changed};

/// What to do.
#[derive(Clone, Debug)]
pub enum Job {
    /// Run initdb.
    Initdb,
    /// Run the operator's own program that makes a cluster.
    CustomBootstrap,
    /// Make a replica.
    Clone {
        /// From which member's data; from a backup alone when from none.
        from: Option<MemberName>,
        /// Whether what is there is removed first, and not moved aside.
        remove: bool,
    },
    /// Rewind to where our data fits a member's.
    Rewind(MemberName),
    /// Copy the data of another cluster.
    CloneRemote(StandbyCluster),
    /// Start as standby of another cluster.
    StartStandbyLeader(StandbyCluster),
    /// Ask another cluster whether our data can follow it.
    CheckRemote(Epoch, StandbyCluster),
    /// Start as primary and prove that it takes writes.
    StartPrimary(Epoch),
    /// Start as standby.
    StartStandby(Option<MemberName>),
    /// Run the operator's `pre_promote`.
    PrePromote(Epoch),
    /// Promote and prove that it takes writes.
    Promote(Epoch),
    /// Write a checkpoint while still serving.
    Checkpoint,
    /// Stop in order.
    Stop,
    /// Ask who has received the shutdown checkpoint.
    Confirm {
        /// Whom to ask.
        members: Vec<MemberName>,
        /// Where it begins.
        checkpoint: Lsn,
        /// On which timeline.
        timeline: Timeline,
    },
    /// Ask the other members, at these addresses.
    Poll(BTreeMap<MemberName, Endpoint>),
    /// Ask the leader whether our data can follow it.
    CheckRejoin(Epoch),
}

/// What came of it.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// It is done.
    Done,
    /// The server takes writes under this holding.
    Proven(Epoch),
    /// Whether the operator's program lets this member be promoted under this holding.
    PrePromoted(Epoch, bool),
    /// A new cluster could not be finished.
    BootstrapFailed {
        /// Why.
        why: String,
        /// Whether another try would fail alike.
        for_good: bool,
    },
    /// The others' answers.
    Polled(Poll),
    /// Whether our data can follow the leader.
    Rejoin(Epoch, Rejoin),
    /// pg_rewind has said that it cannot be done, of a source that answers.
    RewindRefused,
    /// The source did not answer, which says nothing of our data.
    RewindPutOff,
    /// Who has received the shutdown checkpoint; nothing when nobody said so in time.
    Confirmed(Option<MemberName>),
}

/// Why it failed.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// A program, a file or a query.
    #[error("{}", .0.chain())]
    Tool(#[from] ToolError),
    /// The keeper.
    #[error(transparent)]
    Keeper(#[from] OrderError),
    /// etcd.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The server ended while it was being started or promoted.
    #[error("PostgreSQL ended while it was starting; its log says why")]
    ServerEnded,
    /// The server did not get there in time.
    #[error("PostgreSQL {what} within {} s", .limit.as_secs())]
    TooSlow {
        /// What it did not do.
        what: &'static str,
        /// How long it had.
        limit: std::time::Duration,
    },
    /// The member has no key, or says nothing usable in it.
    #[error("member {0} has no usable key")]
    NoSuchMember(MemberName),
    /// Who is to be followed is another database.
    #[error(
        "the server at {place} is another database: its system identifier is {theirs}, ours is {ours}; nothing of it is taken"
    )]
    AnotherSystem {
        /// Where it was asked.
        place: String,
        /// Its system identifier.
        theirs: SystemId,
        /// Ours.
        ours: SystemId,
    },
    /// Libraries that PostgreSQL is to preload are not on this machine.
    #[error(
        "PostgreSQL cannot start: it is to preload {0} (shared_preload_libraries), which this machine does not have; install \
         that, or take it out of the configuration"
    )]
    MissingLibraries(String),
    /// What was asked cannot be answered yet.
    #[error("{0}")]
    Unclear(&'static str),
}

impl Job {
    /// Its kind.
    #[must_use]
    pub const fn kind(&self) -> JobKind {
        match self {
            Self::Initdb => JobKind::Initdb,
            Self::CustomBootstrap => JobKind::CustomBootstrap,
            Self::Clone { .. } | Self::CloneRemote(_) => JobKind::Clone,
            Self::Rewind(_) => JobKind::Rewind,
            Self::StartPrimary(_) => JobKind::StartPrimary,
            Self::StartStandby(_) | Self::StartStandbyLeader(_) => JobKind::StartStandby,
            Self::PrePromote(_) => JobKind::PrePromote,
            Self::Promote(_) => JobKind::Promote,
            Self::Checkpoint => JobKind::Checkpoint,
            Self::Stop => JobKind::Stop,
            Self::Confirm { .. } => JobKind::Confirm,
            Self::Poll(_) => JobKind::Poll,
            Self::CheckRejoin(_) | Self::CheckRemote(..) => JobKind::CheckRejoin,
        }
    }

    /// Does it.
    ///
    /// # Errors
    /// See [`JobError`].
    pub async fn run(self, context: Arc<Context>) -> Result<Outcome, JobError> {
        let context = &*context;
        match self {
            Self::Initdb => make::initdb(context).await,
            Self::CustomBootstrap => make::custom_bootstrap(context).await,
            Self::Clone { from, remove } => make::clone(context, from.as_ref(), remove).await,
            Self::Rewind(leader) => rejoin::rewind(context, &leader).await,
            Self::CloneRemote(section) => make::clone_remote(context, section).await,
            Self::StartStandbyLeader(section) => serve::start_standby(context, Some(Upstream::Remote(section))).await,
            Self::CheckRemote(epoch, section) => rejoin::check_remote(context, epoch, section).await,
            Self::StartPrimary(epoch) => serve::start_primary(context, epoch).await,
            Self::StartStandby(upstream) => serve::start_standby(context, serve::member(context, upstream)).await,
            Self::PrePromote(epoch) => Ok(serve::pre_promote(context, epoch).await),
            Self::Promote(epoch) => serve::promote(context, epoch).await,
            Self::Checkpoint => handover::checkpoint(context).await,
            Self::Stop => handover::stop(context).await,
            Self::Confirm {
                members,
                checkpoint,
                timeline,
            } => Ok(Outcome::Confirmed(
                handover::confirmed_by(context, &members, checkpoint, timeline).await,
            )),
            Self::Poll(whom) => Ok(Outcome::Polled(poll::ask_all(context, whom, Boottime::now()).await?)),
            Self::CheckRejoin(leader) => rejoin::check(context, leader).await,
        }
    }
}
