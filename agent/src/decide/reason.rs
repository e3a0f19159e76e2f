//! Why a member does what it does. Log, REST, page and tests all speak from this.

use std::fmt;

use pgherd_cluster::name::MemberName;

use crate::observation::JobKind;
use crate::sync::SyncReason;

/// The reason of a decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Takes writes under its own lease.
    Leading,
    /// Streams from the leader, or is about to.
    Following(MemberName),
    /// Is configured to stream from the leader and does not.
    NotStreaming(MemberName),
    /// A key names a leader that is not up yet.
    WaitingForLeader(MemberName),
    /// Another member bootstraps, or nobody may.
    WaitingForBootstrap,
    /// Only a former primary may name the cluster's system identifier.
    WaitingForPrimaryToInitialize,
    /// This member makes the cluster.
    Bootstrapping,
    /// This member writes the cluster's first keys.
    Initializing,
    /// Copies another member's data.
    Cloning(MemberName),
    /// Makes its data by a method that needs no leader.
    Restoring,
    /// What was to become a new cluster could not.
    BootstrapFailed(String),
    /// Another member has made the cluster that this one was making.
    MadeByAnother,
    /// The operator's program does not let it be promoted.
    PrePromoteRefuses,
    /// Its data holds what the leader's does not: it is cloned anew.
    Diverged(MemberName),
    /// Its data holds what the leader's does not: it is rewound.
    Rewinding(MemberName),
    /// It is to be rewound, once the leader has written its first checkpoint.
    WaitingForCheckpoint(MemberName),
    /// Its history is the leader's, and yet it neither streams nor moves: it is cloned anew.
    CannotFollow(MemberName),
    /// An operator asked for a new copy of the leader's data.
    Reinitializing(MemberName),
    /// Starts with the data that it has.
    StartingStandby,
    /// A leader that died restarts where it is.
    RestartingInPlace,
    /// An operator asked for a restart.
    Restarting,
    /// A leader that is down or starts for too long leaves the lead to a member that can take over.
    StartTooSlow,
    /// A leader that cannot be started gives the key up.
    CannotStart,
    /// Its deadline has passed, PostgreSQL has ended, and the key is still its own.
    WinningAnew,
    /// The key names this member from an earlier life.
    KeyFromBefore,
    /// PostgreSQL runs, and its data directory is gone.
    DataGone,
    /// It holds the key and has no data.
    LeadsWithoutData,
    /// The key is another's or nobody's.
    LostLease,
    /// The lease of an earlier agent is being proven.
    ProvingLease,
    /// It won, and its standby becomes primary.
    Promoting,
    /// It bids for the key.
    Bidding,
    /// It asks the others.
    Polling,
    /// Another member is ahead.
    Behind {
        /// Who.
        of: MemberName,
        /// By how many bytes.
        bytes: u64,
    },
    /// Another member, as far, comes first by its priority.
    Outranked(MemberName),
    /// Further behind the last known position of the leader than is allowed.
    LagTooGreat {
        /// How far.
        bytes: u64,
        /// How far it may be.
        bytes_max: u64,
    },
    /// On an older timeline than the cluster.
    OldTimeline,
    /// Another member is on a later timeline.
    OnLaterTimeline(MemberName),
    /// Holds the key of a cluster that follows another one, and streams from there.
    LeadsStandbys(String),
    /// The same, and does not stream.
    RemoteSilent(String),
    /// Its data holds what the cluster that it follows has not: it is copied anew.
    RemoteDiverged(String),
    /// It was primary, and the cluster is to follow another one.
    BecomesStandby,
    /// The cluster follows another one: what runs takes no writes and needs no deadline.
    NothingToFence,
    /// A synchronous set is in force that does not list this member.
    NotSynchronous,
    /// A failsafe list is in force that does not name this member.
    NotInFailsafe,
    /// A primary answers, although nobody holds the key.
    PrimaryAlive(MemberName),
    /// Its tags say so.
    MayNotLead,
    /// The leader had failover slots that are not here, and the configuration requires them.
    LacksSlots(Vec<String>),
    /// Takes its log from the archive, as its tags say.
    FollowingArchive,
    /// A switchover names another member.
    LeavesItTo(MemberName),
    /// A switchover's former leader comes last.
    FormerLeaderWaits,
    /// A switchover is under way.
    SwitchingOver(Option<MemberName>),
    /// A switchover waits for its time.
    SwitchoverScheduled,
    /// A request names another leader than the one there is.
    RequestNamesAnother,
    /// Long work is under way.
    Busy(JobKind),
    /// A failed try is repeated a little later.
    BackingOff,
    /// Processes of PostgreSQL are being ended.
    PostgresEnding,
    /// Processes of PostgreSQL have been killed and do not end.
    CannotEnd,
    /// The data directory cannot be written, and another member can take over.
    DiskFails,
    /// The data directory cannot be written, and nobody else can lead.
    DiskFailsAlone,
    /// The postmaster takes no new connection.
    ServerHangs,
    /// The postmaster runs and does not answer SQL.
    PostgresSilent,
    /// etcd does not answer.
    StoreUnreachable,
    /// The cluster is in maintenance.
    Paused,
    /// Deadlines go to the keeper again, or for the first time.
    Resuming,
    /// The maintenance has just ended, and the last leader may still run unwatched.
    JustResumed(Option<MemberName>),
    /// Runs as primary, without the lease, because of the maintenance.
    PrimaryWithoutLease,
    /// Takes over a PostgreSQL that another process started.
    Adopting,
    /// It has promised another member not to bid.
    VouchedFor(MemberName),
    /// An agent before this one may have promised another member not to bid.
    MayHaveVouched,
    /// A watchdog is required and cannot be used.
    WatchdogUnusable,
    /// The whole cluster is starting, and another member may have more.
    WaitingForLastLeader {
        /// How many bytes are missing to the last known position of the last leader.
        bytes: u64,
    },
    /// The whole cluster is starting, and another member does not know yet how far it is.
    ComingUp(MemberName),
    /// There is no record of whom commits waited for, and other members are silent.
    OthersAreSilent,
    /// Quorum commit: too few of the voters have answered that they are not ahead.
    TooFewVotes {
        /// How many have.
        votes: usize,
        /// How many are needed.
        needed: usize,
    },
    /// What commits wait for changes.
    Synchronous(SyncReason),
    /// A synchronous standby that stops lets the leader replace it first.
    LeavingSync,
    /// A leader that is to stop first finds a synchronous standby that may lead after it.
    NobodyMayFollowYet,
    /// A hand-over that was not carried out, and why: it leads on.
    HandoverFailed(String),
    /// Its lease is over, etcd cannot be reached, and the others are asked to delete its key.
    AskingForRelease,
    /// The data directory holds something else.
    ForeignFiles(Vec<String>),
    /// The process was told to stop.
    Stopping,
    /// It cannot go on.
    Fatal(String),
}

impl fmt::Display for Reason {
    #[expect(
        clippy::too_many_lines,
        reason = "a line for each reason; there is nothing to take apart"
    )]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Leading => f.write_str("leads"),
            Self::Following(leader) => write!(f, "follows {leader}"),
            Self::NotStreaming(leader) => write!(f, "does not stream from {leader} yet"),
            Self::WaitingForLeader(leader) => write!(f, "waits for {leader} to take writes"),
            Self::WaitingForBootstrap => f.write_str("waits for a member to make the cluster"),
            Self::WaitingForPrimaryToInitialize => {
                f.write_str("waits for a former primary to initialize the cluster's keys")
            }
            Self::Bootstrapping => f.write_str("makes a new cluster"),
            Self::Initializing => f.write_str("writes the cluster's first keys"),
            Self::Cloning(from) => write!(f, "has no data and is cloned from {from}"),
            Self::Restoring => f.write_str("has no data, and nobody leads: makes it by a method that needs no leader"),
            Self::BootstrapFailed(why) => write!(f, "could not make the new cluster, which is undone: {why}"),
            Self::MadeByAnother => {
                f.write_str("another member has made the cluster meanwhile: moves its own beginnings aside")
            }
            Self::PrePromoteRefuses => {
                f.write_str("pre_promote refuses: gives the lease up, and leaves it to others for one ttl")
            }
            Self::Diverged(from) => write!(f, "has data that {from} has not, and is cloned anew"),
            Self::Rewinding(leader) => write!(f, "has data that {leader} has not, and is rewound"),
            Self::WaitingForCheckpoint(leader) => {
                write!(f, "is to be rewound, and waits for the first checkpoint of {leader}")
            }
            Self::CannotFollow(leader) => write!(
                f,
                "has the history of {leader} and neither streams from it nor moves: is cloned anew"
            ),
            Self::Reinitializing(from) => write!(f, "is cloned anew from {from}, as asked"),
            Self::StartingStandby => f.write_str("starts PostgreSQL as a standby"),
            Self::Restarting => f.write_str("restarts PostgreSQL, as asked"),
            Self::StartTooSlow => f.write_str(
                "PostgreSQL has not come up within primary_start_timeout and another member can take over: gives the key up",
            ),
            Self::RestartingInPlace => f.write_str("PostgreSQL died: restarts it in place, which loses nothing"),
            Self::CannotStart => f.write_str("cannot start PostgreSQL as primary and gives the lease up"),
            Self::WinningAnew => f.write_str("its deadline passed and PostgreSQL was ended: wins the lease anew"),
            Self::KeyFromBefore => f.write_str("the leader key names it from before: deletes it"),
            Self::DataGone => f.write_str("the data directory is gone under a running PostgreSQL, which is ended"),
            Self::LeadsWithoutData => f.write_str("holds the lease without data and gives it up"),
            Self::LostLease => f.write_str("does not hold the lease any more: PostgreSQL is ended"),
            Self::ProvingLease => f.write_str("proves the lease of the agent before it"),
            Self::Promoting => f.write_str("holds the lease and is promoted"),
            Self::Bidding => f.write_str("nobody leads and nobody is ahead: bids for the lease"),
            Self::Polling => f.write_str("nobody leads: asks the other members"),
            Self::Behind { of, bytes } => write!(f, "nobody leads, but {of} is {bytes} bytes ahead"),
            Self::Outranked(by) => write!(f, "nobody leads, but {by} has a higher failover_priority"),
            Self::LagTooGreat { bytes, bytes_max } => {
                write!(
                    f,
                    "nobody leads, but it is {bytes} bytes behind the last leader, the limit is {bytes_max}"
                )
            }
            Self::OldTimeline => f.write_str("nobody leads, but it is on an older timeline than the cluster"),
            Self::OnLaterTimeline(of) => write!(f, "nobody leads, but {of} is on a later timeline"),
            Self::LeadsStandbys(source) => write!(f, "leads a standby cluster, which follows {source}"),
            Self::RemoteSilent(source) => {
                write!(f, "leads a standby cluster, and waits for {source} to stream from")
            }
            Self::RemoteDiverged(source) => write!(f, "has data that {source} has not, and is copied anew from there"),
            Self::BecomesStandby => f.write_str("the cluster is to follow another one: what was primary becomes a standby"),
            Self::NothingToFence => f.write_str("the cluster follows another one: nothing here takes writes"),
            Self::NotSynchronous => f.write_str("nobody leads, and it is not in the synchronous set"),
            Self::NotInFailsafe => f.write_str("nobody leads, and the failsafe list does not name it"),
            Self::PrimaryAlive(name) => write!(f, "nobody holds the lease, but {name} still runs a primary"),
            Self::LacksSlots(names) => write!(
                f,
                "nobody leads, and it lacks the failover slots {}, which pgherd.failover_slots requires",
                names.join(", ")
            ),
            Self::FollowingArchive => f.write_str("takes its log from the archive (nostream)"),
            Self::MayNotLead => f.write_str("nobody leads, and its tags forbid it to"),
            Self::LeavesItTo(candidate) => write!(f, "nobody leads: leaves it to {candidate}, which was asked for"),
            Self::FormerLeaderWaits => f.write_str("nobody leads: it just handed over and waits for the others"),
            Self::SwitchingOver(Some(candidate)) => write!(f, "hands over to {candidate}"),
            Self::SwitchingOver(None) => f.write_str("hands over to the best candidate"),
            Self::SwitchoverScheduled => f.write_str("leads; a switchover is scheduled"),
            Self::RequestNamesAnother => f.write_str("a switchover was asked for that does not fit, and is cleared"),
            Self::Busy(job) => write!(f, "is busy: {job}"),
            Self::BackingOff => f.write_str("waits a little before it tries again"),
            Self::PostgresEnding => f.write_str("waits for the last process of PostgreSQL to end"),
            Self::CannotEnd => f.write_str(
                "PostgreSQL was killed and does not end, as its disk may hang: leaves the lease to expire, for another to lead",
            ),
            Self::DiskFails => f.write_str("cannot write its data directory, and gives way to a member that can"),
            Self::DiskFailsAlone => {
                f.write_str("cannot write its data directory; leads on, as no other member is known that can take over")
            }
            Self::ServerHangs => f.write_str("PostgreSQL answers no new connection: it is ended and started again"),
            Self::PostgresSilent => f.write_str("PostgreSQL runs and does not answer"),
            Self::StoreUnreachable => f.write_str("etcd does not answer"),
            Self::Paused => f.write_str("the cluster is paused"),
            Self::JustResumed(leader) => {
                let who = leader.as_ref().map_or("a leader of before", MemberName::as_str);
                write!(f, "nobody leads, but the maintenance has just ended and {who} may still run: waits for one ttl")
            }
            Self::Resuming => f.write_str("puts PostgreSQL under the fence"),
            Self::PrimaryWithoutLease => f.write_str("runs as primary without the lease, as the cluster is paused"),
            Self::Adopting => f.write_str("takes over a PostgreSQL that runs already"),
            Self::VouchedFor(leader) => write!(f, "nobody leads, but it has vouched for {leader} and does not bid"),
            Self::MayHaveVouched => f.write_str(
                "nobody leads, but it has just begun and may have vouched for a leader before: waits one ttl",
            ),
            Self::WatchdogUnusable => f.write_str("a watchdog is required and cannot be used: it may not lead"),
            Self::WaitingForLastLeader { bytes } => write!(
                f,
                "the whole cluster starts, and it lacks {bytes} bytes of the last leader's log: waits for a better one"
            ),
            Self::ComingUp(peer) => write!(
                f,
                "the whole cluster starts, and {peer} cannot say yet how far it is: waits for it"
            ),
            Self::OthersAreSilent => f.write_str(
                "nobody leads, nothing says whom commits waited for, and others are silent: waits for them",
            ),
            Self::TooFewVotes { votes, needed } => {
                write!(
                    f,
                    "nobody leads, and {votes} of {needed} voters say that they are not ahead"
                )
            }
            Self::Synchronous(why) => write!(f, "leads; {why}"),
            Self::LeavingSync => f.write_str("is about to stop, and lets the leader find another synchronous standby"),
            Self::NobodyMayFollowYet => {
                f.write_str("is about to stop, and first finds a synchronous standby that may lead after it")
            }
            Self::HandoverFailed(why) => write!(f, "leads on: {why}"),
            Self::AskingForRelease => {
                f.write_str("PostgreSQL has ended, and others are asked to delete the leader key")
            }
            Self::ForeignFiles(files) => write!(
                f,
                "the data directory is not PostgreSQL's and not empty ({}): move these files away",
                files.join(", ")
            ),
            Self::Stopping => f.write_str("stops as asked"),
            Self::Fatal(why) => f.write_str(why),
        }
    }
}

impl fmt::Display for JobKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Initdb => "initdb",
            Self::CustomBootstrap => "running custom bootstrap script",
            Self::Clone => "cloning",
            Self::StartPrimary => "starting as primary",
            Self::StartStandby => "starting as standby",
            Self::PrePromote => "running pre_promote",
            Self::Promote => "promoting",
            Self::Checkpoint => "writing a checkpoint before it hands over",
            Self::Stop => "stopping",
            Self::Confirm => "asking who has received the last checkpoint",
            Self::Poll => "asking the other members",
            Self::CheckRejoin => "asking the leader for its history",
            Self::Rewind => "rewinding",
        })
    }
}
