//! New clusters and new members, and the program that is asked before a promotion.

use super::*;
use crate::jobs::Outcome;

fn at(seconds: u64) -> Boottime {
    Boottime::from_nanos(seconds * 1_000_000_000)
}

fn empty(lease: LeaseSeen) -> Observation {
    Observation {
        data: DataDir::Empty,
        postgres: Postgres::Down,
        ..seen(lease)
    }
}

/// Has these replicas offer themselves for copies.
fn offering(names: &[&str], change: impl Fn(&mut MemberRecord)) -> Observation {
    with_view(empty(LeaseSeen::Theirs(epoch("n3"))), |view| {
        for text in names {
            let member = view.members.get_mut(&name(text)).expect("a member");
            member.record.tags.insert("clonefrom".to_owned(), true.into());
            member.record.replication_state = Some("streaming".to_owned());
            change(&mut member.record);
        }
    })
}

#[test]
fn a_member_is_cloned_from_a_replica_that_offers_itself_and_from_the_leader_when_that_fails() {
    let clone = |from: &str| Some(Step::Clone { from: name(from) });
    let offered = offering(&["n2"], |_| {});
    assert_eq!(step(&offered, &Memory::default()), clone("n2"));
    let failed = Memory {
        clone_failures: 1,
        ..Memory::default()
    };
    assert_eq!(step(&offered, &failed), clone("n3"));
    let failed_again = Memory {
        clone_failures: 2,
        ..Memory::default()
    };
    assert_eq!(step(&offered, &failed_again), clone("n2"), "each has its turn");
    // Its own offer, and that of the leader itself, count for nothing.
    assert_eq!(step(&offering(&["n1", "n3"], |_| {}), &Memory::default()), clone("n3"));
}

#[test]
fn what_may_lack_the_leaders_history_is_not_cloned() {
    let leader = Some(Step::Clone { from: name("n3") });
    let silent = offering(&["n2"], |record| record.replication_state = None);
    assert_eq!(step(&silent, &Memory::default()), leader);
    let stopped = offering(&["n2"], |record| record.state = PgState::Stopped);
    assert_eq!(step(&stopped, &Memory::default()), leader);
    let elsewhere = offering(&["n2"], |record| record.timeline = Some(Timeline(9)));
    assert_eq!(step(&elsewhere, &Memory::default()), leader);
}

#[test]
fn a_method_that_needs_no_leader_is_used_while_nobody_leads_and_the_cluster_exists() {
    let free = Observation {
        made_without_leader: true,
        ..empty(LeaseSeen::Free)
    };
    assert_eq!(step(&free, &known()), Some(Step::Restore));
    assert_eq!(step(&empty(LeaseSeen::Free), &known()), None);
    let new = with_view(free.clone(), |view| view.initialize = None);
    assert_eq!(step(&new, &known()), Some(Step::ClaimBootstrap));
    let begun = with_view(free, |view| view.initialize = Some(Initialize::Pending));
    assert_eq!(step(&begun, &known()), None);
}

/// What an agent remembers that has looked whose the initialize key is.
fn known() -> Memory {
    Memory {
        withdrawn: true,
        ..Memory::default()
    }
}

#[test]
fn an_agent_that_begins_gives_up_what_the_one_before_it_had_claimed_and_its_own_claim_stands() {
    let begun = with_view(empty(LeaseSeen::Free), |view| {
        view.initialize = Some(Initialize::Pending);
    });
    let mut memory = Memory::default();
    assert_eq!(step(&begun, &memory), Some(Step::Withdraw));
    memory.performed(&Step::Withdraw);
    assert_eq!(step(&begun, &memory), None);
    // A claim of its own whose job was lost is given up too.
    memory.stepped(&Step::ClaimBootstrap, NOW);
    assert_eq!(step(&begun, &memory), Some(Step::Withdraw));
}

#[test]
fn pre_promote_is_asked_once_per_holding_and_a_refusal_ends_the_holding_and_the_bids() {
    let mine = Observation {
        pre_promote: true,
        armed: true,
        ..seen(LeaseSeen::Mine(epoch("n1")))
    };
    assert_eq!(step(&mine, &Memory::default()), Some(Step::PrePromote(epoch("n1"))));
    let mut memory = Memory::default();
    memory.job_ended(JobKind::PrePromote, Ok(Outcome::PrePromoted(epoch("n1"), true)), at(1));
    assert_eq!(step(&mine, &memory), Some(Step::Promote(epoch("n1"))));
    let mut memory = Memory::default();
    memory.job_ended(
        JobKind::PrePromote,
        Ok(Outcome::PrePromoted(epoch("n1"), false)),
        at(100),
    );
    assert_eq!(decide(&mine, &memory, at(101)).step, Some(Step::End));
    let free = seen(LeaseSeen::Free);
    let ttl = free.view.timing().ttl();
    let bids = |now| !matches!(decide(&free, &memory, now).reason, Reason::PrePromoteRefuses);
    assert!(!bids(at(100) + ttl) && bids(at(101) + ttl));
}

#[test]
fn a_lost_lease_stops_the_program_and_leaves_the_standby_alone() {
    let lost = Observation {
        job: Some(JobKind::PrePromote),
        ..seen(LeaseSeen::Free)
    };
    assert_eq!(step(&lost, &Memory::default()), Some(Step::DropJob));
}

#[test]
fn a_restored_cluster_recovers_under_the_lease_and_is_not_promoted_from_outside() {
    let recovering = Observation {
        bootstrap_unfinished: true,
        ..seen(LeaseSeen::Mine(epoch("n1")))
    };
    assert_eq!(step(&recovering, &Memory::default()), Some(Step::StartPrimary));
    let down = Observation {
        bootstrap_unfinished: true,
        postgres: Postgres::Down,
        ..seen(LeaseSeen::Mine(epoch("n1")))
    };
    assert_eq!(step(&down, &Memory::default()), Some(Step::StartPrimary));
}

#[test]
fn a_cluster_that_could_not_be_made_is_ended_undone_and_then_told() {
    let mut memory = Memory::default();
    let failed = Outcome::BootstrapFailed {
        why: "post_init".to_owned(),
        for_good: true,
    };
    memory.job_ended(JobKind::StartPrimary, Ok(failed), at(1));
    let running = Observation {
        bootstrap_unfinished: true,
        postgres: primary(),
        ..seen(LeaseSeen::Mine(epoch("n1")))
    };
    assert_eq!(step(&running, &memory), Some(Step::End));
    let down = Observation {
        postgres: Postgres::Down,
        ..running
    };
    assert_eq!(step(&down, &memory), Some(Step::UndoBootstrap));
    memory.performed(&Step::UndoBootstrap);
    assert!(memory.fatal.is_some_and(|why| why.ends_with("post_init")));
}

#[test]
fn a_new_cluster_whose_server_does_not_start_is_undone_and_does_not_keep_others_from_making_one() {
    let down = Observation {
        bootstrap_unfinished: true,
        postgres: Postgres::Down,
        data: data(ControlState::ShutDown, false),
        ..seen(LeaseSeen::Mine(epoch("n1")))
    };
    let mut memory = Memory {
        start_failures: 2,
        ..Memory::default()
    };
    assert_eq!(step(&down, &memory), Some(Step::UndoBootstrap));
    memory.stepped(&Step::UndoBootstrap, NOW);
    memory.performed(&Step::UndoBootstrap);
    let undone = with_view(empty(LeaseSeen::Free), |view| view.initialize = None);
    assert_eq!(reason(&undone, &memory), Reason::BackingOff);
    memory.backoff_until = None;
    assert_eq!(
        step(&undone, &memory),
        Some(Step::ClaimBootstrap),
        "by whoever is first"
    );
}

#[test]
fn beginnings_that_another_member_has_overtaken_are_moved_aside_and_nothing_else_is() {
    let other = |unfinished| {
        let down = Observation {
            bootstrap_unfinished: unfinished,
            postgres: Postgres::Down,
            ..seen(LeaseSeen::Theirs(epoch("n2")))
        };
        with_view(down, |view| view.initialize = Some(Initialize::Done(SystemId(8))))
    };
    assert_eq!(step(&other(true), &Memory::default()), Some(Step::Discard));
    let fatal = step(&other(false), &Memory::default());
    assert!(matches!(fatal, Some(Step::Leave { code: 64, .. })), "{fatal:?}");
}
