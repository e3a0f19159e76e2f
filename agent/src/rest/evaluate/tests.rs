//! Patroni's matrices, as tables: one row per path, one column per member.

use std::sync::Arc;
use std::time::Duration;

use pgherd_cluster::name::Lsn;
use serde_json::{Value, json};

use super::super::fixtures::{
    AT, NOW, entry, facts, facts_of, holding, leader_status, name, object, replica, replica_server, replica_status,
    stopped, view, view_with, without_store,
};
use super::*;
use crate::status::{MemberStatus, ServerStatus};

/// The code of GET.
fn get(target: &str, facts: &Facts) -> u16 {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let query = Query::parse(query);
    match path {
        "/liveness" => liveness(facts),
        "/readiness" => readiness(&query, facts),
        path => evaluate(path, &query, facts),
    }
}

/// Checks rows of `paths: codes`, a code for each of `members`.
fn check(members: &[(&str, &Facts)], table: &str) {
    for row in table.lines().map(str::trim).filter(|row| !row.is_empty()) {
        let (paths, codes) = row.split_once(':').expect("paths, then codes");
        for path in paths.split_whitespace() {
            let expected: Vec<&str> = codes.split_whitespace().collect();
            assert_eq!(expected.len(), members.len(), "{row}");
            for ((member, facts), code) in members.iter().zip(expected) {
                assert_eq!(get(path, facts).to_string(), code, "GET {path} of {member}");
            }
        }
    }
}

fn with_status(mut facts: Facts, change: impl FnOnce(&mut MemberStatus)) -> Facts {
    change(Arc::make_mut(&mut facts.status));
    facts
}

fn with_config(status: MemberStatus, config: Value) -> Facts {
    facts_of(status, view_with(Some("node1"), config, vec![]))
}

/// A replica `behind` bytes behind what the leader stored, having received `received` bytes of that.
fn lagging(behind: u64, received: u64) -> Facts {
    with_status(replica(), |status| {
        let wal = WalStatus::Standby {
            received: Lsn(AT.0 - behind + received),
            replayed: Lsn(AT.0 - behind),
            replayed_at: None,
            paused: false,
            latest_end: None,
        };
        status.server = Some(ServerStatus {
            wal,
            ..replica_server()
        });
    })
}

#[test]
fn an_asynchronous_cluster_answers_as_captured() {
    let (leader, replica) = (facts(), replica());
    let table = "
        / /leader /primary /master /read-write:                              200 503
        /standby-leader /standby_leader:                                     503 503
        /replica /replica?lag=1:                                             503 200
        /read-only:                                                          200 200
        /health:                                                             200 200
        /liveness /readiness:                                                200 200
        /sync /synchronous /quorum:                                          503 503
        /async /asynchronous:                                                503 200
        /read-only-sync /read-only-synchronous /read-only-quorum:            200 503
        /replica?tag_my_tag=abc:                                             503 200
        /replica?tag_my_tag=abd /replica?tag_other=abc /replica?tag_my_tag=abc&tag_x=y: 503 503
        /replica?tag_clonefrom=true /read-only?tag_clonefrom=true:           503 200
        /replica?tag_clonefrom=True:                                         503 503
        /primary?tag_x=y /leader?tag_x=y:                                    200 503
        /replica?replication_state=streaming /async?replication_state=streaming: 503 200
        /replica?replication_state=in+archive+recovery /async?replication_state=x: 503 503
        /read-only?replication_state=x /read-only-sync?replication_state=x:  200 503
        /read-only?replication_state=streaming:                              200 200
        /replica?replication_state=streaming&lag=1kB&tag_my_tag=abc:         503 200
        /replica?replication_state= /replica?lag=1PB /replica?lag=+1:        503 200
        /primary?replication_state=x&lag=0:                                  200 503
        /health?tag_x=y /read-only?tag_x=y:                                  503 503
        /nosuch /sync/ /api/v1/other:                                        503 503
        /my/primary/check /a-leader:                                         200 503
        /replica-health /xreplica:                                           503 200
    ";
    check(&[("leader", &leader), ("replica", &replica)], table);
}

#[test]
fn synchronous_and_quorum_clusters_answer_as_captured() {
    let sync_key = |quorum: u32, listed: &str| {
        vec![entry(
            "sync",
            json!({"leader": "node1", "quorum": quorum, "sync_standby": listed}),
            48,
        )]
    };
    let sync_view = || view_with(Some("node1"), json!({"synchronous_mode": true}), sync_key(0, "NODE2"));
    let quorum_view = |quorum, listed| {
        view_with(
            Some("node1"),
            json!({"synchronous_mode": "quorum"}),
            sync_key(quorum, listed),
        )
    };
    let other = || MemberStatus {
        name: name("node3"),
        ..replica_status(NOW)
    };
    let leader = facts_of(leader_status(NOW), sync_view());
    let standby = facts_of(replica_status(NOW), sync_view());
    let outsider = facts_of(other(), sync_view());
    let quorum_leader = facts_of(leader_status(NOW), quorum_view(1, "node2,node3"));
    let voter = facts_of(replica_status(NOW), quorum_view(1, "node2,node3"));
    // With one voter the stored quorum is 0, as in priority mode.
    let only_voter = facts_of(replica_status(NOW), quorum_view(0, "node2"));
    let members = [
        ("leader", &leader),
        ("sync standby", &standby),
        ("other", &outsider),
        ("leader of a quorum", &quorum_leader),
        ("voter", &voter),
        ("only voter", &only_voter),
    ];
    let table = "
        / /primary /leader /read-write:            200 503 503 200 503 503
        /replica:                                  503 200 200 503 200 200
        /read-only:                                200 200 200 200 200 200
        /sync /synchronous /sync?lag=0:            503 200 503 503 503 503
        /quorum:                                   503 503 503 503 200 200
        /async /asynchronous:                      503 503 200 503 503 503
        /read-only-sync /read-only-synchronous:    200 200 503 200 503 503
        /read-only-quorum:                         200 503 503 200 200 200
    ";
    check(&members, table);
    let off = facts_of(
        replica_status(NOW),
        view_with(Some("node1"), json!({}), sync_key(0, "node2")),
    );
    check(&[("listed, but the mode is off", &off)], "/sync: 503\n/async: 200");
}

#[test]
fn each_state_of_a_member_answers_as_in_patronis_matrix() {
    let standby_config = || json!({"standby_cluster": {"host": "elsewhere"}});
    let dead = with_status(facts(), |status| status.server = None);
    let unpromoted = with_status(replica(), |status| status.holding = Some(holding(NOW)));
    let not_streaming = with_status(replica(), |status| {
        let server = ServerStatus {
            replication_state: None,
            ..replica_server()
        };
        status.server = Some(server);
    });
    let unbalanced = with_status(replica(), |status| {
        status.tags = object(json!({"noloadbalance": true}));
    });
    let starting = with_status(stopped(), |status| status.state = PgState::Starting);
    let cloning = with_status(stopped(), |status| status.state = PgState::CreatingReplica);
    let standby_leader = with_config(
        MemberStatus {
            role: Role::StandbyLeader,
            holding: Some(holding(NOW)),
            ..replica_status(NOW)
        },
        standby_config(),
    );
    let standby_replica = with_config(replica_status(NOW), standby_config());
    let stray = with_status(facts(), |status| status.holding = None);
    let expired = with_status(facts(), |status| {
        let mut held = holding(NOW);
        held.deadline = NOW;
        status.holding = Some(held);
    });
    let table = [
        ("leader", &facts(), "200 503 200 200 200 200"),
        ("leader whose PostgreSQL is dead", &dead, "200 503 200 503 200 200"),
        ("leader before its promotion", &unpromoted, "200 200 200 200 200 200"),
        ("replica", &replica(), "503 200 200 200 200 200"),
        (
            "replica that does not stream",
            &not_streaming,
            "503 200 200 200 503 200",
        ),
        ("replica with noloadbalance", &unbalanced, "503 503 503 200 200 200"),
        ("replica that starts", &starting, "503 503 503 503 503 200"),
        ("replica that is stopped", &stopped(), "503 503 503 503 503 200"),
        ("replica that is cloned", &cloning, "503 503 503 503 503 200"),
        ("standby leader", &standby_leader, "503 503 200 200 200 200"),
        (
            "replica of a standby cluster",
            &standby_replica,
            "503 200 200 200 200 200",
        ),
        ("primary without the key", &stray, "503 503 503 200 503 200"),
        ("primary past its deadline", &expired, "503 503 503 200 503 200"),
    ];
    for (member, facts, codes) in table {
        let paths = [
            "/primary",
            "/replica",
            "/read-only",
            "/health",
            "/readiness",
            "/liveness",
        ];
        for (path, code) in paths.into_iter().zip(codes.split(' ')) {
            check(&[(member, facts)], &format!("{path}: {code}"));
        }
    }
    let leads = "/leader /standby-leader /read-only-sync /read-only-quorum: 200\n/async /sync /quorum /: 503";
    check(&[("standby leader", &standby_leader)], leads);
}

#[test]
fn without_a_view_only_what_is_known_locally_counts() {
    let (leader, streams) = (without_store(facts()), without_store(replica()));
    let table = "
        /primary /leader:                                              200 503
        /replica:                                                      503 200
        /read-only /health /readiness:                                 200 200
        /sync /async /quorum /read-only-sync /read-only-quorum:        503 503
    ";
    check(&[("leader", &leader), ("replica", &streams)], table);
    // Nothing was ever read, which is no better.
    let nothing = facts_of(
        replica_status(NOW),
        pgherd_cluster::view::View::empty(super::super::fixtures::scope()),
    );
    check(&[("replica", &nothing)], "/replica: 200\n/async: 503");
    let mut short = replica();
    short.failing_since = Some(NOW - Duration::from_secs(30));
    check(
        &[("replica whose outage is younger than a lease", &short)],
        "/async: 200",
    );
    let unheard = without_store(lagging(0, 0));
    check(
        &[("replica that cannot know how far the leader is", &unheard)],
        "/readiness: 503",
    );
}

#[test]
fn a_paused_cluster_without_a_store_answers_by_what_sql_says() {
    let paused = |status| with_config(status, json!({"pause": true}));
    let keyless = || MemberStatus {
        holding: None,
        ..leader_status(NOW)
    };
    let (primary, cut_off) = (paused(keyless()), without_store(paused(keyless())));
    let (replica, replica_cut_off) = (paused(replica_status(NOW)), without_store(paused(replica_status(NOW))));
    let members = [
        ("primary", &primary),
        ("primary without store", &cut_off),
        ("replica", &replica),
        ("replica without store", &replica_cut_off),
    ];
    let table = "
        /primary /leader:     503 200 503 503
        /standby-leader:      503 503 503 503
        /replica:             503 503 200 200
        /health /liveness:    200 200 200 200
    ";
    check(&members, table);
}

#[test]
fn lag_is_measured_from_the_farthest_that_is_known_of_the_leader() {
    let late = lagging(1000, 600);
    let table = "
        /replica /replica?lag=1000 /replica?lag=1kB /replica?lag=junk:      200
        /replica?lag=999 /read-only?lag=0 /async?lag=0 /replica?lag=-1:     503
        /async?lag=1MB:                                                     200
        /readiness /readiness?lag=1000 /readiness?lag=400&mode=write:       200
        /readiness?lag=999 /readiness?lag=400&mode=apply /readiness?lag=399&mode=write: 503
    ";
    check(&[("replica", &late)], table);
    let strict = facts_of(
        (*lagging(1000, 0).status).clone(),
        view_with(Some("node1"), json!({"maximum_lag_on_failover": 999}), vec![]),
    );
    check(&[("replica", &strict)], "/readiness: 503\n/replica: 200");
    let heard = with_status(late, |status| {
        if let Some(ServerStatus {
            wal: WalStatus::Standby { latest_end, .. },
            ..
        }) = &mut status.server
        {
            *latest_end = Some(Lsn(AT.0 + 500));
        }
    });
    check(&[("replica", &heard)], "/replica?lag=1499: 503\n/replica?lag=1500: 200");
}

#[test]
fn a_stuck_loop_is_not_alive_and_a_primary_gets_less_patience() {
    let overdue = |status: MemberStatus, seconds: u64| {
        let status = MemberStatus {
            next_cycle_at: NOW - Duration::from_secs(seconds),
            ..status
        };
        facts_of(status, view())
    };
    for (status, seconds, code) in [
        (leader_status(NOW), 29, 200),
        (leader_status(NOW), 30, 503),
        (replica_status(NOW), 59, 200),
        (replica_status(NOW), 60, 503),
    ] {
        assert_eq!(liveness(&overdue(status, seconds)), code, "{seconds} s");
    }
    let mut paused = overdue(leader_status(NOW), 900);
    paused.view = Arc::new(view_with(Some("node1"), json!({"pause": true}), vec![]));
    assert_eq!(liveness(&paused), 200);
}
