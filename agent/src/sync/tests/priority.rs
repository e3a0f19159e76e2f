//! Priority mode, step by step.

use super::*;

fn inputs(standbys: &[&str], configured: &str, senders: &[(&str, SyncRank)]) -> SyncInputs {
    let mut inputs = leader(SyncMode::Priority, state("n1", 0, standbys), configured);
    inputs.senders = senders.iter().map(|(name, rank)| sender(name, NOW.0, *rank)).collect();
    inputs
}

use SyncRank::{Async, Potential, Sync};

#[test]
fn the_record_and_the_setting_are_made_step_by_step() {
    let none: &[(&str, SyncRank)] = &[];
    let async2: &[_] = &[("n2", Async)];
    let sync2: &[_] = &[("n2", Sync)];
    for (standbys, configured, senders, expected, why) in [
        (&[][..], "", none, None, "nobody streams: nothing to wait for"),
        (&[], "", async2, set_names("n2"), "the setting grows first"),
        (&[], "n2", async2, None, "PostgreSQL does not wait for it yet"),
        (&[], "n2", sync2, write("n1", 0, &["n2"]), "it has caught up"),
        (&["n2"], "n2", sync2, None, "in order"),
        (&["N2"], "N2", sync2, None, "names are compared without case"),
        (
            &["n2"],
            "n2",
            &[("n3", Async)],
            write("n1", 0, &[]),
            "the record shrinks first",
        ),
        (
            &[],
            "n2",
            &[("n3", Async)],
            set_names("n3"),
            "and another takes the place",
        ),
        (
            &["n2"],
            "n2",
            &[("n2", Sync), ("n3", Async)],
            None,
            "it stays, though another is as good",
        ),
        (
            &["n2"],
            "",
            sync2,
            write("n1", 0, &[]),
            "the record promises what nobody keeps",
        ),
        (
            &["n2"],
            "1 (n2,n3)",
            &[("n2", Sync), ("n3", Potential)],
            write("n1", 0, &[]),
            "one of two is no promise",
        ),
        (
            &[],
            "1 (n2,n3)",
            &[("n2", Sync), ("n3", Potential)],
            set_names("n2"),
            "narrowed before it is listed",
        ),
        (
            &[],
            "1 (n2,n3)",
            none,
            None,
            "after a promotion commits wait for the first to come",
        ),
        (
            &["n2"],
            "n2",
            none,
            None,
            "a lost standby has everything, and may still lead",
        ),
    ] {
        assert_eq!(step(&inputs(standbys, configured, senders)), expected, "{why}");
    }
}

#[test]
fn a_standby_is_listed_only_when_it_has_all_that_was_acknowledged_without_it() {
    let mut behind = inputs(&[], "n2", &[("n2", Sync)]);
    behind.guc_changed_at = Some(Lsn(NOW.0 + 1));
    assert_eq!(step(&behind), None);
    behind.guc_changed_at = None;
    assert_eq!(step(&behind), None);
    behind.guc_changed_at = Some(NOW);
    behind.commit_level = CommitLevel::Replay;
    behind.senders[0].replay = Some(Lsn(5));
    assert_eq!(step(&behind), None, "commits wait for the replay");
    let old_setting = inputs(&[], "n2", &[("n2", Sync), ("n3", Sync)]);
    assert_eq!(
        step(&old_setting),
        None,
        "a walsender still works by the setting before"
    );
}

#[test]
fn nobody_is_waited_for_only_after_some_patience() {
    let mut lone = inputs(&["n2"], "n2", &[]);
    lone.waited = true;
    assert_eq!(step(&lone), write("n1", 0, &[]));
    assert_eq!(reason(&lone), Some(SyncReason::StandbyLost(set(&["n2"]))));
    lone.state = state("n1", 0, &[]);
    assert_eq!((step(&lone), reason(&lone)), (set_names(""), Some(SyncReason::Relaxed)));
    lone.settings.strict = true;
    assert_eq!(
        (step(&lone), reason(&lone)),
        (set_names("*"), Some(SyncReason::Blocked))
    );
    lone.waited = false;
    lone.configured = SyncNames::Off;
    assert_eq!(step(&lone), set_names("*"), "the strict mode begins without patience");
}

#[test]
fn a_record_of_another_leader_or_mode_lists_nobody() {
    let mut other = inputs(&["n1", "n3"], "n3", &[("n3", Sync)]);
    other.state.leader = Some("n2".to_owned());
    assert_eq!(
        (step(&other), reason(&other)),
        (write("n1", 0, &[]), Some(SyncReason::TookOver))
    );
    other.state = SyncState::default();
    assert_eq!(
        (step(&other), reason(&other)),
        (write("n1", 0, &[]), Some(SyncReason::Enabled))
    );
    let mut quorum = inputs(
        &["n2", "n3"],
        "ANY 1 (n2,n3)",
        &[("n2", SyncRank::Quorum), ("n3", SyncRank::Quorum)],
    );
    quorum.state.quorum = 1;
    assert_eq!(step(&quorum), write("n1", 0, &[]));
    quorum.state = state("n1", 0, &[]);
    assert_eq!(step(&quorum), set_names("n2"));
}

#[test]
fn standbys_are_chosen_by_rank_position_and_tags() {
    let chosen = |change: &dyn Fn(&mut SyncInputs)| {
        let mut inputs = inputs(&[], "", &[("n2", Async), ("n3", Async)]);
        change(&mut inputs);
        step(&inputs)
    };
    assert_eq!(chosen(&|_| {}), set_names("n2"));
    assert_eq!(chosen(&|i| i.settings.node_count = 2), set_names("2 (n2,n3)"));
    assert_eq!(chosen(&|i| i.members[2].sync_priority = 2), set_names("n3"));
    assert_eq!(chosen(&|i| i.senders[1].flush = Some(Lsn(1001))), set_names("n3"));
    for exclude in [
        |i: &mut SyncInputs| i.members[1].nosync = true,
        |i: &mut SyncInputs| i.members[1].nofailover = true,
        |i: &mut SyncInputs| i.members[1].running = false,
        |i: &mut SyncInputs| i.members[1].replicatefrom = Some("n3".into()),
        |i: &mut SyncInputs| i.senders[0].state = "catchup".to_owned(),
        |i: &mut SyncInputs| i.senders[0].stale = true,
        |i: &mut SyncInputs| i.senders[0].flush = None,
        |i: &mut SyncInputs| {
            i.senders[0].flush = Some(Lsn(10));
            i.members[1].sync_priority = 9;
            i.settings.lag_max = Some(100);
        },
    ] {
        assert_eq!(chosen(&exclude), set_names("n3"));
    }
    for allowed in ["n1", "gone"] {
        let from = |i: &mut SyncInputs| i.members[1].replicatefrom = Some(allowed.into());
        assert_eq!(chosen(&from), set_names("n2"), "{allowed} is the leader, or nobody");
    }
    let alone = |i: &mut SyncInputs| {
        i.senders.truncate(1);
        i.senders[0].flush = Some(Lsn(10));
        i.settings.lag_max = Some(100);
    };
    assert_eq!(chosen(&alone), None, "one alone is measured by the primary");
}
