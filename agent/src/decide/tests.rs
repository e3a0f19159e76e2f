use std::sync::Arc;

use pgherd_cluster::name::{Lsn, Scope, SystemId, Timeline};
use pgherd_cluster::record::{DynamicConfig, FailoverRequest, MemberRecord, PgState, Status};
use pgherd_cluster::view::{Initialize, Leader, Member, Revised};
use serde_json::json;

use super::*;
use crate::observation::{Peer, Poll, Rejoin, SyncSeen, WatchdogSeen};
use crate::postgres::{Control, ControlState, Upstream};
use crate::status::{CommitWaiting, ServerStatus};
use crate::topology::Place;

mod elections;
mod events;
mod handovers;
mod making;
mod pauses;
mod property;
mod rejoining;
mod restarts;
mod sources;
mod standby_clusters;

const NOW: Boottime = Boottime::from_nanos(100_000_000_000);

fn name(text: &str) -> MemberName {
    MemberName::new(text).expect("a plain name")
}

fn epoch(holder: &str) -> Epoch {
    Epoch {
        holder: name(holder),
        create_revision: 10,
    }
}

fn member(text: &str, role: Role) -> Member {
    let number = text.trim_start_matches('n');
    let mut record = MemberRecord::new(
        format!("postgres://127.0.0.{number}:5432/postgres"),
        format!("http://127.0.0.{number}:8008/patroni"),
    );
    record.role = role;
    record.state = PgState::Running;
    Member {
        name: name(text),
        record,
        mod_revision: 20,
    }
}

/// Three members, initialized and configured, with `leader` holding the key.
fn view(leader: Option<&str>) -> View {
    let mut view = View::empty(Scope::new("c").expect("a plain name"));
    for text in ["n1", "n2", "n3"] {
        let role = if leader == Some(text) {
            Role::Primary
        } else {
            Role::Replica
        };
        view.members.insert(name(text), member(text, role));
    }
    view.initialize = Some(Initialize::Done(SystemId(7)));
    view.leader = leader.map(|leader| Leader {
        epoch: epoch(leader),
        lease: 5,
        mod_revision: 10,
    });
    view.config = Revised {
        value: Some(DynamicConfig::default()),
        mod_revision: 2,
    };
    view.revision = 30;
    view
}

fn data(state: ControlState, standby: bool) -> DataDir {
    let control = Control {
        state,
        system_id: SystemId(7),
        checkpoint: Lsn(50),
        timeline: Timeline(1),
        floors: Vec::new(),
    };
    DataDir::Cluster { control, standby }
}

fn server(wal: WalStatus, replication_state: Option<&str>) -> Postgres {
    Postgres::Running(Box::new(ServerStatus {
        postmaster_start_time: "x".to_owned(),
        server_version: 150_018,
        wal,
        timeline: Some(Timeline(1)),
        replication_state: replication_state.map(str::to_owned),
        replication: Vec::new(),
        waiting: CommitWaiting::default(),
    }))
}

fn standby_wal(position: u64) -> WalStatus {
    let lsn = Lsn(position);
    WalStatus::Standby {
        received: lsn,
        replayed: lsn,
        replayed_at: None,
        paused: false,
        latest_end: None,
    }
}

fn standby_at(position: u64) -> Postgres {
    server(standby_wal(position), Some("streaming"))
}

fn primary() -> Postgres {
    server(WalStatus::Primary { location: Lsn(100) }, None)
}

/// n1, a standby at 100 that streams from n2.
fn seen(lease: LeaseSeen) -> Observation {
    let leader = match &lease {
        LeaseSeen::Mine(epoch) | LeaseSeen::MineUnproven(epoch) | LeaseSeen::Theirs(epoch) => {
            Some(epoch.holder.to_string())
        }
        LeaseSeen::Stale { epoch, .. } => Some(epoch.holder.to_string()),
        LeaseSeen::Free | LeaseSeen::Unknown => None,
    };
    let view = view(leader.as_deref());
    Observation {
        me: name("n1"),
        upstream: upstream_address(&view, &name("n2")).map(Upstream::Member),
        standby_cluster: None,
        view: Arc::new(view),
        lease,
        data_dir: "/data".into(),
        data: data(ControlState::InArchiveRecovery, true),
        bootstrap_unfinished: false,
        pre_promote: false,
        made_without_leader: false,
        postgres: standby_at(100),
        armed: false,
        fenced_term: None,
        lease_term: None,
        fence_paused: false,
        lease_paused: Some(false),
        stranger: false,
        watchdog: WatchdogSeen::NotNeeded,
        vouched_for: None,
        server_hangs_since: None,
        disk_fails_since: None,
        sync: SyncSeen::default(),
        last_held: Some(epoch("n1")),
        job: None,
        rewinds: false,
        nofailover: false,
        place: Place::default(),
        lacks_slots: Vec::new(),
        failover_priority: 1,
        request_due: true,
        stopping: false,
    }
}

fn with_view(mut seen: Observation, change: impl FnOnce(&mut View)) -> Observation {
    change(Arc::make_mut(&mut seen.view));
    seen
}

fn request(leader: Option<&str>, member: Option<&str>) -> Revised<Option<FailoverRequest>> {
    let text = |text: Option<&str>| text.map(str::to_owned);
    let request = FailoverRequest {
        leader: text(leader),
        member: text(member),
        scheduled_at: None,
    };
    Revised {
        value: Some(request),
        mod_revision: 25,
    }
}

fn peer(text: &str, position: Option<u64>) -> Peer {
    Peer {
        name: name(text),
        primary: false,
        position: position.map(Lsn),
        timeline: Some(Timeline(1)),
        nofailover: false,
        failover_priority: 1,
    }
}

fn polled(peers: Vec<Peer>) -> Memory {
    let poll = Poll {
        asked_at: NOW,
        answered_at: NOW,
        own_position: Lsn(100),
        own_timeline: Some(Timeline(1)),
        peers,
        silent: 0,
    };
    Memory {
        free_since: Some(NOW),
        last_leader: Some(name("n2")),
        poll: Some(poll),
        ..Memory::default()
    }
}

fn reason(seen: &Observation, memory: &Memory) -> Reason {
    decide(seen, memory, NOW).reason
}

fn step(seen: &Observation, memory: &Memory) -> Option<Step> {
    decide(seen, memory, NOW).step
}

#[test]
fn a_primary_without_its_lease_is_ended() {
    let stale = LeaseSeen::Stale {
        epoch: epoch("n1"),
        lease: 5,
    };
    for lease in [LeaseSeen::Free, LeaseSeen::Theirs(epoch("n2")), stale] {
        for postgres in [primary(), Postgres::Silent { writable: true }] {
            let seen = Observation {
                postgres,
                armed: true,
                ..seen(lease.clone())
            };
            assert_eq!(step(&seen, &Memory::default()), Some(Step::End), "{lease:?}");
        }
    }
}

#[test]
fn a_server_that_hangs_is_ended_and_a_disk_that_fails_is_left_to_who_can_take_over() {
    let long_ago = Boottime::from_nanos(1);
    let leads = || Observation {
        postgres: primary(),
        ..seen(LeaseSeen::Mine(epoch("n1")))
    };
    let memory = Memory {
        proven: Some(epoch("n1")),
        ..Memory::default()
    };
    let server = |since| Observation {
        server_hangs_since: Some(since),
        ..leads()
    };
    assert_eq!(
        step(&server(NOW - Duration::from_secs(9)), &memory),
        None,
        "not long enough"
    );
    assert_eq!(step(&server(long_ago), &memory), Some(Step::End));
    let disk = || Observation {
        disk_fails_since: Some(long_ago),
        ..leads()
    };
    assert_eq!(step(&disk(), &memory), Some(Step::Poll));
    let asked = |peers| Memory {
        proven: Some(epoch("n1")),
        ..polled(peers)
    };
    assert_eq!(step(&disk(), &asked(vec![])), None, "nobody could take over");
    for memory in [&memory, &asked(vec![])] {
        assert_eq!(reason(&disk(), memory), Reason::DiskFailsAlone, "said all the time");
    }
    assert_eq!(step(&disk(), &asked(vec![peer("n2", Some(90))])), Some(Step::End));
    let down = Observation {
        postgres: Postgres::Down,
        data: data(ControlState::InProduction, false),
        ..disk()
    };
    assert_eq!(step(&down, &memory), Some(Step::Release { epoch: epoch("n1") }));
}

#[test]
fn a_primary_whose_etcd_is_silent_is_left_to_its_deadline() {
    let seen = Observation {
        postgres: primary(),
        ..seen(LeaseSeen::Unknown)
    };
    assert_eq!(step(&seen, &Memory::default()), None);
}

#[test]
fn a_promotion_is_over_when_a_write_has_been_proven_under_this_holding() {
    let seen = Observation {
        postgres: primary(),
        ..seen(LeaseSeen::Mine(epoch("n1")))
    };
    assert_eq!(step(&seen, &Memory::default()), Some(Step::Promote(epoch("n1"))));
    assert_eq!(published_role(&seen, &Memory::default()), Role::Promoted);
    let proven = Memory {
        proven: Some(epoch("n1")),
        ..Memory::default()
    };
    assert_eq!((step(&seen, &proven), reason(&seen, &proven)), (None, Reason::Leading));
    assert_eq!(published_role(&seen, &proven), Role::Primary);
    let earlier = Memory {
        proven: Some(Epoch {
            create_revision: 9,
            ..epoch("n1")
        }),
        ..Memory::default()
    };
    assert_eq!(published_role(&seen, &earlier), Role::Promoted);
}

#[test]
fn a_job_that_needs_the_lease_ends_with_it() {
    let busy = |lease, job| Observation {
        job: Some(job),
        ..seen(lease)
    };
    let memory = Memory::default();
    assert_eq!(
        step(&busy(LeaseSeen::Theirs(epoch("n2")), JobKind::Promote), &memory),
        Some(Step::End)
    );
    assert_eq!(
        step(&busy(LeaseSeen::Free, JobKind::StartPrimary), &memory),
        Some(Step::End)
    );
    assert_eq!(
        step(&busy(LeaseSeen::Theirs(epoch("n2")), JobKind::Checkpoint), &memory),
        None
    );
    assert_eq!(step(&busy(LeaseSeen::Free, JobKind::Stop), &memory), None);
    assert_eq!(
        step(&busy(LeaseSeen::Theirs(epoch("n2")), JobKind::Clone), &memory),
        None
    );
}

#[test]
fn a_dead_leader_restarts_in_place_and_gives_up_after_two_failures() {
    let down = |lease| Observation {
        postgres: Postgres::Down,
        data: data(ControlState::InProduction, false),
        ..seen(lease)
    };
    let mine = down(LeaseSeen::Mine(epoch("n1")));
    assert_eq!(step(&mine, &Memory::default()), Some(Step::StartPrimary));
    let failed = Memory {
        start_failures: 2,
        ..Memory::default()
    };
    assert_eq!(step(&mine, &failed), Some(Step::Release { epoch: epoch("n1") }));
    let stale = down(LeaseSeen::Stale {
        epoch: epoch("n1"),
        lease: 5,
    });
    assert_eq!(step(&stale, &Memory::default()), Some(Step::Poll));
    assert!(matches!(
        step(&stale, &polled(vec![peer("n2", Some(200))])),
        Some(Step::WinAnew { lease: 5, .. })
    ));
    let later = |peer| Peer {
        timeline: Some(Timeline(2)),
        ..peer
    };
    let primary = |peer| Peer { primary: true, ..peer };
    // An etcd that was restored has brought the key back.
    for newer in [later(peer("n2", Some(1))), primary(peer("n2", Some(1)))] {
        assert!(matches!(step(&stale, &polled(vec![newer])), Some(Step::Abandon { .. })));
    }
    assert!(matches!(step(&stale, &failed), Some(Step::Abandon { .. })));
}

#[test]
fn a_leader_hands_over_when_asked_and_clears_what_does_not_fit() {
    let proven = Memory {
        proven: Some(epoch("n1")),
        ..Memory::default()
    };
    let asked = |leader, member| {
        let seen = Observation {
            postgres: primary(),
            ..seen(LeaseSeen::Mine(epoch("n1")))
        };
        with_view(seen, |view| view.failover = request(leader, member))
    };
    let to = |candidate: Option<&str>| {
        Some(Step::BeginHandover {
            epoch: epoch("n1"),
            why: Why::Requested {
                candidate: candidate.map(name),
            },
        })
    };
    assert_eq!(step(&asked(Some("n1"), Some("n2")), &proven), to(Some("n2")));
    assert_eq!(step(&asked(Some("n1"), None), &proven), to(None));
    assert_eq!(step(&asked(None, Some("n2")), &proven), to(Some("n2")));
    assert_eq!(
        step(&asked(Some("n2"), Some("n1")), &proven),
        Some(Step::ClearRequest),
        "it has been done"
    );
    assert_eq!(step(&asked(Some("n3"), Some("n2")), &proven), Some(Step::ClearRequest));
    let scheduled = Observation {
        request_due: false,
        ..asked(Some("n1"), Some("n2"))
    };
    assert_eq!(step(&scheduled, &proven), None);
}

#[test]
fn a_stop_hands_over_and_leaves_only_when_nothing_runs() {
    let memory = Memory {
        proven: Some(epoch("n1")),
        ..Memory::default()
    };
    let stopping = |lease, postgres| Observation {
        stopping: true,
        postgres,
        ..seen(lease)
    };
    assert_eq!(
        step(&stopping(LeaseSeen::Mine(epoch("n1")), primary()), &memory),
        Some(Step::BeginHandover {
            epoch: epoch("n1"),
            why: Why::Stopping,
        })
    );
    assert_eq!(
        step(&stopping(LeaseSeen::Theirs(epoch("n2")), standby_at(1)), &memory),
        Some(Step::Stop)
    );
    assert_eq!(step(&stopping(LeaseSeen::Free, Postgres::Ending), &memory), None);
    assert_eq!(
        step(&stopping(LeaseSeen::Unknown, Postgres::Down), &memory),
        Some(Step::Leave {
            code: 0,
            keep_postgres: false
        })
    );
    let cloning = Observation {
        job: Some(JobKind::Clone),
        ..stopping(LeaseSeen::Theirs(epoch("n2")), Postgres::Down)
    };
    assert_eq!(step(&cloning, &memory), Some(Step::DropJob));
    let held = stopping(LeaseSeen::Mine(epoch("n1")), Postgres::Down);
    assert_eq!(step(&held, &memory), Some(Step::Release { epoch: epoch("n1") }));
}

#[test]
fn data_that_was_left_in_the_middle_of_a_promotion_is_not_started_as_primary() {
    for state in [ControlState::InArchiveRecovery, ControlState::ShutDownInRecovery] {
        let crashed = Observation {
            postgres: Postgres::Down,
            data: data(state, false),
            ..seen(LeaseSeen::Mine(epoch("n1")))
        };
        assert_eq!(
            step(&crashed, &Memory::default()),
            Some(Step::StartStandby { upstream: None })
        );
    }
}

#[test]
fn what_was_killed_and_does_not_end_keeps_the_lease_for_one_ttl_only() {
    for lease in [LeaseSeen::Mine(epoch("n1")), LeaseSeen::MineUnproven(epoch("n1"))] {
        for (job, stopping) in [(None, false), (Some(JobKind::Stop), false), (None, true)] {
            let mut ending = Observation {
                postgres: Postgres::Ending,
                job,
                stopping,
                ..seen(lease.clone())
            };
            let mut memory = Memory::default();
            memory.note(&mut ending, NOW);
            let ttl = ending.view.timing().ttl();
            let at = |now| decide(&ending, &memory, now).step;
            assert_eq!(at(NOW + ttl - Duration::from_millis(1)), None);
            assert_eq!(at(NOW + ttl), Some(Step::Forsake { lease: None }));
        }
    }
}

/// Its postmaster hangs as well, and the key of a holding that is over still names this member.
#[test]
fn what_is_to_end_gets_no_new_lease_while_it_hangs() {
    let silent = Observation {
        postgres: Postgres::Silent { writable: true },
        ..seen(LeaseSeen::Stale {
            epoch: epoch("n1"),
            lease: 5,
        })
    };
    let rebound = Some(Step::Rebind {
        epoch: epoch("n1"),
        lease: 5,
    });
    assert_eq!(
        step(&silent, &Memory::default()),
        rebound,
        "it is taken over as it runs"
    );
    let fenced = Observation {
        fenced_term: Some(crate::lease::term_of(&epoch("n1"))),
        ..silent.clone()
    };
    assert_eq!(step(&fenced, &Memory::default()), Some(Step::End));
    let mut memory = Memory::default();
    memory.stepped(&Step::End, NOW);
    assert_eq!(decide(&silent, &memory, NOW).step, Some(Step::End));
    let ttl = silent.view.timing().ttl();
    assert_eq!(
        decide(&silent, &memory, NOW + ttl).step,
        Some(Step::Forsake { lease: Some(5) })
    );
    let mut down = Observation {
        postgres: Postgres::Down,
        ..silent
    };
    memory.note(&mut down, NOW + ttl);
    assert_eq!(memory.ending_since, None);
}

#[test]
fn a_replica_follows_although_a_restored_etcd_has_forgotten_whose_data_it_is() {
    let standby = Observation {
        postgres: Postgres::Down,
        data: data(ControlState::ShutDownInRecovery, true),
        ..seen(LeaseSeen::Theirs(epoch("n2")))
    };
    let forgotten = with_view(standby, |view| view.initialize = None);
    assert_eq!(
        step(&forgotten, &Memory::default()),
        Some(Step::StartStandby {
            upstream: Some(name("n2"))
        })
    );
}

#[test]
fn a_key_that_this_machine_does_not_remember_is_not_won_anew() {
    let down = Observation {
        postgres: Postgres::Down,
        data: data(ControlState::InProduction, false),
        last_held: None,
        ..seen(LeaseSeen::Stale {
            epoch: epoch("n1"),
            lease: 5,
        })
    };
    assert!(matches!(step(&down, &Memory::default()), Some(Step::Abandon { .. })));
}

#[test]
fn a_standby_with_a_deadline_for_a_holding_that_is_none_is_ended_first() {
    let stale = LeaseSeen::Stale {
        epoch: epoch("n1"),
        lease: 5,
    };
    let armed = Observation {
        armed: true,
        ..seen(stale.clone())
    };
    assert_eq!(step(&armed, &Memory::default()), Some(Step::End));
    assert!(matches!(
        step(&seen(stale), &Memory::default()),
        Some(Step::Abandon { .. })
    ));
}

#[test]
fn a_promoted_leader_is_not_taken_for_the_standby_that_it_was() {
    let leader = Observation {
        postgres: primary(),
        ..seen(LeaseSeen::Mine(epoch("n1")))
    };
    let wiped = with_view(leader, |view| view.initialize = None);
    assert_eq!(step(&wiped, &Memory::default()), Some(Step::Initialize));
}
