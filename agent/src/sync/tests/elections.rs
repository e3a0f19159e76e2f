//! Who may win, and what the winner does first.

use super::*;

#[test]
fn in_priority_mode_only_the_record_may_run() {
    let listed = state("n1", 0, &["N2"]);
    for (mode, record, me, expected) in [
        (SyncMode::Priority, &listed, "n1", true),
        (SyncMode::Priority, &listed, "n2", true),
        (SyncMode::Priority, &listed, "n3", false),
        (SyncMode::Priority, &SyncState::default(), "n3", true),
        (SyncMode::Quorum, &listed, "n3", true),
        (SyncMode::Off, &listed, "n3", true),
    ] {
        assert_eq!(may_run(mode, record, &name(me)), expected, "{mode:?} {me}");
    }
}

#[test]
fn votes_are_counted_among_leader_and_voters() {
    let record = state("n1", 1, &["n2", "n3"]);
    for (me, votes, expected) in [
        ("n2", &[][..], false),
        ("n2", &["n2"], false),
        ("n2", &["n4"], false),
        ("n2", &["N3"], true),
        ("n2", &["n1"], true),
        ("n4", &["n3"], false),
        ("n4", &["n2", "n3"], true),
        ("N1", &[], true),
    ] {
        assert_eq!(
            quorum_reached(&record, &name(me), &set(votes)),
            expected,
            "{me} {votes:?}"
        );
    }
    assert_eq!(needs_votes_of(&record, &name("n2")), set(&["n1", "n3"]));
    assert_eq!(needs_votes_of(&record, &name("n4")), set(&["n1", "n2", "n3"]));
    assert!(
        quorum_reached(&state("n1", 0, &["n2"]), &name("n2"), &set(&[])),
        "priority mode asks for none"
    );
    assert!(quorum_reached(&SyncState::default(), &name("n2"), &set(&[])));
}

fn winner(mode: SyncMode, quorum: usize, standbys: &[&str]) -> SyncInputs {
    let mut inputs = leader(mode, state("n1", quorum, standbys), "");
    inputs.me = name("n3");
    inputs.running = false;
    inputs
}

#[test]
fn in_priority_mode_the_first_commit_already_waits() {
    let mut winner = winner(SyncMode::Priority, 0, &["n3"]);
    let before = before_promotion(&winner);
    assert_eq!(before.write_sync, Some(state("n3", 0, &[])));
    assert_eq!(before.names, guc("1 (n1,n2)"));
    winner.settings.node_count = 3;
    winner.members[0].nofailover = true;
    assert_eq!(before_promotion(&winner).names, guc("2 (n2,n1)"));
    winner.members.remove(0);
    assert_eq!(before_promotion(&winner).names.to_string(), "n2");
    winner.members[0].running = false;
    assert_eq!(before_promotion(&winner).names, SyncNames::Off);
    winner.settings.strict = true;
    assert_eq!(before_promotion(&winner).names, guc("*"));
    winner.state = state("n3", 0, &[]);
    assert_eq!(before_promotion(&winner).write_sync, None, "it says so already");
}

#[test]
fn in_quorum_mode_the_setting_comes_from_the_record() {
    for (quorum, voters, names, after) in [
        (1, &["n2", "n3"][..], "ANY 1 (n1,n2)", &["n1", "n2"][..]),
        (0, &["n2", "n3"], "ANY 2 (n1,n2)", &["n1", "n2"]),
        (1, &["n2", "n4"], "ANY 2 (n1,n2,n4)", &["n1", "n2", "n4"]),
        (0, &["n3"], "ANY 1 (n1)", &["n1"]),
        (1, &["n3"], "", &["n1"]),
    ] {
        let before = before_promotion(&winner(SyncMode::Quorum, quorum, voters));
        assert_eq!(before.names, guc(names), "{quorum} {voters:?}");
        assert_eq!(
            before.write_sync,
            Some(state("n3", quorum, after)),
            "{quorum} {voters:?}"
        );
    }
    let mut lone = winner(SyncMode::Quorum, 0, &[]);
    lone.state = state("n3", 0, &[]);
    assert_eq!(before_promotion(&lone).write_sync, None);
    assert_eq!(before_promotion(&lone).names, SyncNames::Off);
    lone.settings.strict = true;
    assert_eq!(before_promotion(&lone).names, guc("ANY 1 (*)"));
    lone.state = SyncState::default();
    assert_eq!(before_promotion(&lone).write_sync, Some(state("n3", 0, &[])));
}

/// The leader of the record needs no votes. A former one that is still named there could come back and win without what
/// the new primary has acknowledged; so the record changes before the first commit.
#[test]
fn a_former_leader_needs_votes_before_the_new_one_takes_a_commit() {
    let winner = winner(SyncMode::Quorum, 1, &["n2", "n3"]);
    assert!(quorum_reached(&winner.state, &name("n1"), &set(&[])));
    let record = before_promotion(&winner)
        .write_sync
        .expect("another leader's record is rewritten");
    assert!(!quorum_reached(&record, &name("n1"), &set(&[])));
}

#[test]
fn without_the_mode_a_promotion_changes_no_record() {
    let mut winner = winner(SyncMode::Off, 0, &["n2"]);
    winner.user_names = guc("archive");
    let before = before_promotion(&winner);
    assert_eq!((before.write_sync, before.names), (None, guc("archive")));
}
