//! Gathers an [`Observation`]: everything in parallel, each answer with a deadline, and "unknown" is an answer.

use std::collections::BTreeSet;

use pgherd_cluster::clock::{Boottime, wall_now};
use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::{DynamicConfig, FailoverRequest, FailoverSlots, StandbyCluster};
use pgherd_cluster::source::SourceHealth;
use pgherd_cluster::view::{Epoch, View};

use pgherd_keeper::protocol::{WatchdogMode, WatchdogState};

use crate::context::Context;
use crate::keeper::Instance;
use crate::lease::{LeaseState, Proof};
use crate::observation::{JobKind, LeaseSeen, Observation, Postgres, SyncSeen, WatchdogSeen};
use crate::postgres::bootstrap::UNFINISHED_MARKER;
use crate::postgres::control::inspect;
use crate::postgres::settings::user_names;
use crate::postgres::{DataDir, ToolError, Upstream};
use crate::record::own_tags;
use crate::slots::plan::lacking;
use crate::status::{WalSender, WalStatus};
use crate::sync::{CommitLevel, Sender, StandbyName, SyncNames, SyncRank, SyncSettings};
use crate::topology::Place;

/// What the loop knows that no question tells.
#[derive(Clone, Debug, Default)]
pub struct Known {
    /// The job under way.
    pub job: Option<JobKind>,
    /// What our standby is configured to stream from.
    pub upstream: Option<Upstream>,
    /// The last holding that this member is known to have had since the machine started.
    pub last_held: Option<Epoch>,
    /// Whether the running server came up writable or was promoted.
    pub writable: bool,
    /// The last dynamic configuration: an etcd that was emptied has forgotten it.
    pub last_config: Option<DynamicConfig>,
    /// The failover slots that were last seen here.
    pub failover_slots: BTreeSet<String>,
    /// What the data directory was last seen to hold; it does not change while a postmaster runs on it.
    pub data: Option<DataDir>,
}

impl Known {
    /// Takes in what a server that runs tells of itself: one that an agent before this one has started or promoted takes
    /// writes as well. One that is about to be promoted says no yet, and takes nothing back.
    pub fn note(&mut self, postgres: &Postgres) {
        if let Postgres::Running(server) = postgres {
            self.writable |= matches!(server.wal, WalStatus::Primary { .. });
        }
    }

    /// Whether it is known what PostgreSQL's files say: the dynamic configuration, and whom a standby streams from. An agent
    /// that has just begun learns both from etcd, and until then what the agent before it has written stands. What is kept of
    /// the configuration beside the data does not count: it may be older than what was written.
    #[must_use]
    pub fn can_configure(&self, view: &View, lease: &LeaseSeen) -> bool {
        let leader_known = match lease {
            LeaseSeen::Mine(_) | LeaseSeen::Theirs(_) | LeaseSeen::Free => true,
            LeaseSeen::MineUnproven(_) | LeaseSeen::Stale { .. } | LeaseSeen::Unknown => false,
        };
        view.config.value.is_some() && (self.writable || self.upstream.is_some() || leader_known)
    }
}

/// Observes.
///
/// # Errors
/// When the data directory cannot be read: nothing can be decided on a guess about data.
pub async fn observe(context: &Context, known: &Known) -> Result<Observation, ToolError> {
    let instance = context.keeper.instance().borrow().clone();
    let data_dir = &context.config.postgresql.data_dir;
    let data = async {
        match &known.data {
            Some(data) if instance.postmaster.is_some() => Ok(data.clone()),
            _ => inspect(&context.programs, data_dir).await,
        }
    };
    let (data, postgres) = tokio::join!(data, postgres(context, &instance, known));
    let data = data?;
    let bootstrap_unfinished = data_dir.join(UNFINISHED_MARKER).exists();
    // By value: whoever publishes it would wait with us where the line above hangs on a disk.
    let health = *context.vigil.health.borrow();
    let view = context.view();
    let in_touch = *context.view.health().borrow() == SourceHealth::Following;
    let state = context.lease.state().borrow().clone();
    let now = Boottime::now();
    let lease = lease_seen(&view, in_touch, &state, &instance, &context.config.name, now);
    let me = own_tags(&context.live());
    let scripts = context.scripts();
    let lacks_slots = lacks_slots(&view, known);
    Ok(Observation {
        me: context.config.name.clone(),
        request_due: view.failover.value.as_ref().is_none_or(is_due),
        server_hangs_since: health.server_hangs_since(instance.postmaster),
        disk_fails_since: health.disk_fails_since,
        sync: sync_seen(context, &view, &postgres),
        standby_cluster: followed(&view, &data, &context.config.bootstrap.dcs, known),
        view,
        lease,
        data_dir: data_dir.clone(),
        data,
        bootstrap_unfinished,
        pre_promote: scripts.pre_promote.is_some(),
        made_without_leader: scripts.can_do_without_leader(),
        postgres,
        lease_term: state.holding.as_ref().map(|held| held.term),
        armed: instance.armed,
        fenced_term: instance.fenced,
        fence_paused: instance.paused,
        lease_paused: state.paused,
        stranger: instance.stranger.is_some(),
        watchdog: watchdog_seen(context, &instance),
        vouched_for: state
            .vouched
            .filter(|vouched| now < vouched.until)
            .map(|vouched| vouched.leader),
        last_held: known.last_held.clone(),
        job: known.job,
        upstream: known.upstream.clone(),
        rewinds: context.divergence().use_pg_rewind,
        nofailover: me.nofailover(),
        place: Place::of(&me),
        lacks_slots,
        failover_priority: me.failover_priority(),
        stopping: instance.stopping,
    })
}

/// The cluster that this one follows. While there is neither a configuration nor data, what would become the first
/// configuration says so: whoever makes the cluster makes a standby cluster then.
fn followed(
    view: &View,
    data: &DataDir,
    first: &serde_json::Map<String, serde_json::Value>,
    known: &Known,
) -> Option<StandbyCluster> {
    match (&view.config.value, data) {
        (Some(config), _) => config.standby_cluster(),
        (None, DataDir::Empty) => DynamicConfig::new(first.clone()).standby_cluster(),
        // What the cluster was before etcd forgot it, it is still.
        (None, DataDir::Cluster { .. } | DataDir::Foreign(_)) => known.last_config.as_ref()?.standby_cluster(),
    }
}

async fn postgres(context: &Context, instance: &Instance, known: &Known) -> Postgres {
    match (instance.postmaster, instance.left) {
        (None, false) => Postgres::Down,
        (None, true) => Postgres::Ending,
        (Some(_), _) => match context.sql.status().await {
            Ok(server) => Postgres::Running(Box::new(server)),
            Err(error) => {
                tracing::debug!(error = error.chain(), "PostgreSQL does not answer");
                Postgres::Silent {
                    writable: known.writable || instance.armed,
                }
            }
        },
    }
}

fn sync_seen(context: &Context, view: &View, postgres: &Postgres) -> SyncSeen {
    let config = view.config.value.clone().unwrap_or_default();
    let live = context.live();
    let local = &live.postgresql.parameters;
    let user_names = user_names(&config, local);
    let commit = local
        .get("synchronous_commit")
        .cloned()
        .or_else(|| config.parameters().get("synchronous_commit").cloned());
    let written = || context.sync_names().unwrap_or_else(|| user_names.clone());
    let (configured, taken_over, senders) = match postgres {
        Postgres::Running(server) => (
            // What cannot be read is not what we would have written, and is written anew.
            SyncNames::parse(&server.waiting.names).unwrap_or_default(),
            server.waiting.taken_over,
            server.replication.iter().map(sender).collect(),
        ),
        Postgres::Down | Postgres::Ending | Postgres::Silent { .. } => (written(), false, Vec::new()),
    };
    SyncSeen {
        settings: SyncSettings::of(&config),
        configured,
        taken_over,
        user_names,
        senders,
        commit_level: CommitLevel::of(commit.as_ref().and_then(|value| value.as_str()).unwrap_or("on")),
    }
}

fn sender(row: &WalSender) -> Sender {
    Sender {
        application_name: StandbyName::from(row.application_name.as_str()),
        pid: row.pid,
        state: row.state.clone(),
        sync_state: SyncRank::of(&row.sync_state),
        sent: row.sent,
        write: row.written,
        flush: row.flushed,
        replay: row.replayed,
        stale: false,
    }
}

fn watchdog_seen(context: &Context, instance: &Instance) -> WatchdogSeen {
    let required = context.live().watchdog.mode == WatchdogMode::Required;
    match (required, instance.watchdog) {
        (false, _) => WatchdogSeen::NotNeeded,
        (true, WatchdogState::Usable) => WatchdogSeen::Usable,
        (true, _) => WatchdogSeen::Unusable,
    }
}

/// Until it has looked at its own slots, a standby has none.
fn lacks_slots(view: &View, known: &Known) -> Vec<String> {
    let required = view.config.value.as_ref().map(DynamicConfig::failover_slots) == Some(FailoverSlots::Require);
    if known.writable || !required {
        return Vec::new();
    }
    lacking(&view.status.pgherd.failover_slots, &known.failover_slots)
}

fn is_due(request: &FailoverRequest) -> bool {
    let Some(at) = &request.scheduled_at else { return true };
    // A time that cannot be read is a request that cannot be meant: REST refuses it, so nobody waits for it.
    let Ok(at) = at.parse::<jiff::Timestamp>() else {
        return false;
    };
    jiff::Timestamp::try_from(wall_now()).is_ok_and(|now| at <= now)
}

/// What this member may rely on of the leader key.
#[must_use]
pub fn lease_seen(
    view: &View,
    in_touch: bool,
    state: &LeaseState,
    instance: &Instance,
    me: &MemberName,
    now: Boottime,
) -> LeaseSeen {
    if let Some(held) = &state.holding {
        // The view may still be from before our bid; once it has reached it, it must agree.
        let other = in_touch && view.revision >= held.epoch.create_revision && view.epoch() != Some(&held.epoch);
        // A key that went with its lease while all others vouch is about to be won anew; nobody else bids meanwhile.
        let carried = held.proof == Proof::Vouches && view.epoch().is_none_or(|epoch| epoch.holder == *me);
        let contradicted = other && !carried;
        let fenced = instance.fenced == Some(held.term);
        if !contradicted && !fenced {
            return match held.deadline {
                Some(deadline) if now < deadline => LeaseSeen::Mine(held.epoch.clone()),
                Some(_) => LeaseSeen::Unknown,
                None => LeaseSeen::MineUnproven(held.epoch.clone()),
            };
        }
    }
    if !in_touch {
        return LeaseSeen::Unknown;
    }
    match &view.leader {
        None => LeaseSeen::Free,
        Some(leader) if leader.epoch.holder == *me => LeaseSeen::Stale {
            epoch: leader.epoch.clone(),
            lease: leader.lease,
        },
        Some(leader) => LeaseSeen::Theirs(leader.epoch.clone()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pgherd_cluster::name::{Lsn, Scope};
    use pgherd_cluster::view::Leader;

    use super::*;
    use crate::lease::{Held, term_of};

    fn name(text: &str) -> MemberName {
        MemberName::new(text).expect("a plain name")
    }

    fn epoch(holder: &str, create_revision: i64) -> Epoch {
        Epoch {
            holder: name(holder),
            create_revision,
        }
    }

    fn view(leader: Option<Epoch>, revision: i64) -> View {
        let leader = leader.map(|epoch| Leader {
            epoch,
            lease: 7,
            mod_revision: revision,
        });
        View {
            leader,
            revision,
            ..View::empty(Scope::new("c").expect("a plain name"))
        }
    }

    fn held(epoch: Epoch, deadline: Option<u64>) -> LeaseState {
        let deadline = deadline.map(|seconds| Boottime::default() + Duration::from_secs(seconds));
        LeaseState {
            holding: Some(Held {
                term: term_of(&epoch),
                epoch,
                deadline,
                proof: Proof::Store,
            }),
            ..LeaseState::default()
        }
    }

    fn seen(view: &View, in_touch: bool, state: &LeaseState, fenced: Option<u64>) -> LeaseSeen {
        let instance = Instance {
            fenced,
            ..Instance::default()
        };
        lease_seen(
            view,
            in_touch,
            state,
            &instance,
            &name("n1"),
            Boottime::default() + Duration::from_secs(10),
        )
    }

    #[test]
    fn a_proof_counts_until_its_deadline_and_not_once_the_keeper_has_fenced() {
        let key = view(Some(epoch("n1", 5)), 9);
        let mine = LeaseSeen::Mine(epoch("n1", 5));
        assert_eq!(seen(&key, true, &held(epoch("n1", 5), Some(11)), None), mine);
        assert_eq!(seen(&key, false, &held(epoch("n1", 5), Some(11)), None), mine);
        assert_eq!(
            seen(&key, true, &held(epoch("n1", 5), Some(10)), None),
            LeaseSeen::Unknown
        );
        assert_eq!(
            seen(&key, true, &held(epoch("n1", 5), None), None),
            LeaseSeen::MineUnproven(epoch("n1", 5))
        );
        let stale = LeaseSeen::Stale {
            epoch: epoch("n1", 5),
            lease: 7,
        };
        assert_eq!(seen(&key, true, &held(epoch("n1", 5), Some(11)), Some(5)), stale);
    }

    #[test]
    fn a_view_from_before_the_bid_does_not_contradict_it_and_a_later_one_does() {
        let mine = held(epoch("n1", 5), Some(11));
        assert_eq!(seen(&view(None, 4), true, &mine, None), LeaseSeen::Mine(epoch("n1", 5)));
        assert_eq!(seen(&view(None, 6), true, &mine, None), LeaseSeen::Free);
        assert_eq!(
            seen(&view(Some(epoch("n2", 6)), 6), true, &mine, None),
            LeaseSeen::Theirs(epoch("n2", 6))
        );
    }

    #[test]
    fn without_etcd_nothing_is_known_of_others() {
        let none = LeaseState::default();
        assert_eq!(
            seen(&view(Some(epoch("n2", 5)), 9), false, &none, None),
            LeaseSeen::Unknown
        );
        assert_eq!(
            seen(&view(Some(epoch("n2", 5)), 9), true, &none, None),
            LeaseSeen::Theirs(epoch("n2", 5))
        );
        assert_eq!(seen(&view(None, 9), true, &none, None), LeaseSeen::Free);
    }

    fn running(wal: WalStatus) -> Postgres {
        Postgres::Running(Box::new(crate::status::ServerStatus {
            postmaster_start_time: String::new(),
            server_version: 170_000,
            wal,
            timeline: None,
            replication_state: None,
            replication: Vec::new(),
            waiting: crate::status::CommitWaiting::default(),
        }))
    }

    #[test]
    fn an_agent_that_resumes_learns_from_its_server_that_it_takes_writes() {
        let standby = WalStatus::Standby {
            received: Lsn(7),
            replayed: Lsn(7),
            replayed_at: None,
            paused: false,
            latest_end: None,
        };
        let mut known = Known::default();
        known.note(&running(standby.clone()));
        assert!(!known.writable);
        known.note(&running(WalStatus::Primary { location: Lsn(7) }));
        assert!(known.writable);
        known.note(&running(standby));
        assert!(known.writable, "it may be about to be promoted");
    }

    #[test]
    fn until_an_agent_knows_what_is_configured_and_whom_to_follow_it_writes_no_configuration() {
        let theirs = LeaseSeen::Theirs(epoch("n2", 5));
        let mut view = view(None, 9);
        let mut known = Known {
            last_config: Some(DynamicConfig::default()),
            ..Known::default()
        };
        assert!(!known.can_configure(&view, &theirs), "no view has come yet");
        view.config.value = known.last_config.clone();
        assert!(
            !known.can_configure(&view, &LeaseSeen::Unknown),
            "its standby would lose whom it streams from"
        );
        assert!(known.can_configure(&view, &theirs));
        known.writable = true;
        assert!(known.can_configure(&view, &LeaseSeen::Unknown));
    }

    #[test]
    fn a_scheduled_request_is_due_at_its_time() {
        let at = |text: &str| FailoverRequest {
            scheduled_at: Some(text.to_owned()),
            ..FailoverRequest::default()
        };
        assert!(is_due(&FailoverRequest::default()));
        assert!(is_due(&at("2000-01-01T00:00:00+00:00")));
        assert!(!is_due(&at("2999-01-01T00:00:00+00:00")));
        assert!(!is_due(&at("tomorrow")));
    }
}
