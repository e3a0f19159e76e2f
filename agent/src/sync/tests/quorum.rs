//! Quorum mode, step by step.

use super::*;

fn inputs(quorum: usize, voters: &[&str], configured: &str, senders: &[&str]) -> SyncInputs {
    let mut inputs = leader(SyncMode::Quorum, state("n1", quorum, voters), configured);
    let rank = |name: &str| match (&inputs.configured, inputs.configured.covers(&name.into())) {
        (SyncNames::Any { .. }, true) => SyncRank::Quorum,
        (_, true) => SyncRank::Sync,
        (_, false) => SyncRank::Async,
    };
    inputs.senders = senders.iter().map(|name| sender(name, NOW.0, rank(name))).collect();
    inputs
}

const TWO: &[&str] = &["n2"];
const BOTH: &[&str] = &["n2", "n3"];

#[test]
fn standbys_that_come_are_taken_in_step_by_step() {
    for (quorum, voters, configured, senders, expected, why) in [
        (0, &[][..], "", &[][..], None, "nobody streams"),
        (
            0,
            &[],
            "",
            TWO,
            set_names("ANY 1 (n2)"),
            "without voters the setting grows first",
        ),
        (
            0,
            &[],
            "ANY 1 (n2)",
            TWO,
            write("n1", 0, TWO),
            "a confirmed standby votes",
        ),
        (0, TWO, "ANY 1 (n2)", TWO, None, "in order"),
        (
            0,
            TWO,
            "ANY 1 (n2)",
            BOTH,
            write("n1", 1, BOTH),
            "one more to choose from needs one vote more, first",
        ),
        (
            1,
            BOTH,
            "ANY 1 (n2)",
            BOTH,
            set_names("ANY 1 (n2,n3)"),
            "and then the setting",
        ),
        (1, BOTH, "ANY 1 (n2,n3)", BOTH, None, "in order"),
    ] {
        assert_eq!(step(&inputs(quorum, voters, configured, senders)), expected, "{why}");
    }
}

#[test]
fn standbys_that_go_are_let_go_step_by_step() {
    for (quorum, voters, configured, senders, expected, why) in [
        (
            1,
            BOTH,
            "ANY 1 (n2,n3)",
            TWO,
            set_names("ANY 1 (n2)"),
            "the lost one is waited for no more",
        ),
        (
            1,
            BOTH,
            "ANY 1 (n2)",
            TWO,
            write("n1", 0, TWO),
            "and then votes no more",
        ),
        (
            0,
            BOTH,
            "ANY 2 (n2,n3)",
            TWO,
            write("n1", 0, TWO),
            "commits are on both: the record goes first",
        ),
        (
            0,
            TWO,
            "ANY 2 (n2,n3)",
            TWO,
            set_names("ANY 1 (n2)"),
            "and then the setting",
        ),
        (
            0,
            TWO,
            "ANY 1 (n2)",
            &["n3"],
            write("n1", 0, &[]),
            "the only voter is gone",
        ),
        (
            0,
            &[],
            "ANY 1 (n2)",
            &["n3"],
            set_names("ANY 1 (n3)"),
            "another takes its place",
        ),
    ] {
        assert_eq!(step(&inputs(quorum, voters, configured, senders)), expected, "{why}");
    }
}

#[test]
fn a_record_of_other_numbers_is_brought_into_line() {
    for (quorum, voters, configured, senders, expected, why) in [
        (
            0,
            BOTH,
            "2 (n2,n3)",
            BOTH,
            write("n1", 1, BOTH),
            "from all of two to one of two",
        ),
        (
            1,
            BOTH,
            "2 (n2,n3)",
            BOTH,
            set_names("ANY 1 (n2,n3)"),
            "and then the setting",
        ),
        (
            0,
            BOTH,
            "ANY 1 (n2,n3)",
            BOTH,
            write("n1", 0, &[]),
            "the record asks for too few votes",
        ),
        (
            0,
            TWO,
            "",
            TWO,
            write("n1", 0, &[]),
            "the record promises what nobody keeps",
        ),
        (
            2,
            BOTH,
            "ANY 1 (n2,n3)",
            BOTH,
            write("n1", 1, BOTH),
            "fewer votes once one is confirmed",
        ),
    ] {
        assert_eq!(step(&inputs(quorum, voters, configured, senders)), expected, "{why}");
    }
}

#[test]
fn more_standbys_per_commit_let_candidates_do_with_fewer_votes_once_they_have_caught_up() {
    let both = &["n2", "n3"];
    let mut more = inputs(1, both, "ANY 1 (n2,n3)", both);
    more.settings.node_count = 2;
    assert_eq!(step(&more), set_names("ANY 2 (n2,n3)"));
    more.configured = guc("ANY 2 (n2,n3)");
    assert_eq!(step(&more), write("n1", 0, both));
    more.senders[1].flush = Some(Lsn(5));
    assert_eq!(step(&more), None, "one of the two has not what was acknowledged before");
    more.senders[1].flush = Some(NOW);
    more.state = state("n1", 0, both);
    more.settings.node_count = 1;
    assert_eq!(step(&more), write("n1", 1, both));
}

#[test]
fn a_switchover_goes_as_captured() {
    // n1 handed over to n3; the setting was made from the record before the promotion.
    let mut new = inputs(1, &["n2", "n3"], "ANY 1 (n1,n2)", &["n2"]);
    new.me = name("n3");
    assert_eq!(
        (step(&new), reason(&new)),
        (write("n3", 1, &["n1", "n2"]), Some(SyncReason::TookOver))
    );
    new.state = state("n3", 1, &["n1", "n2"]);
    assert_eq!(step(&new), set_names("ANY 1 (n2)"));
    assert_eq!(reason(&new), Some(SyncReason::StandbyLost(set(&["n1"]))));
    new.configured = guc("ANY 1 (n2)");
    assert_eq!(step(&new), write("n3", 0, &["n2"]));
    new.state = state("n3", 0, &["n2"]);
    new.senders.push(sender("n1", NOW.0, SyncRank::Async));
    assert_eq!(step(&new), write("n3", 1, &["n1", "n2"]));
    new.state = state("n3", 1, &["n1", "n2"]);
    assert_eq!(step(&new), set_names("ANY 1 (n1,n2)"));
    new.configured = guc("ANY 1 (n1,n2)");
    new.senders[1].sync_state = SyncRank::Quorum;
    assert_eq!(step(&new), None);
}

#[test]
fn a_takeover_without_a_setting_lets_nobody_else_lead() {
    let mut new = inputs(1, &["n2", "n3"], "", &[]);
    new.me = name("n3");
    assert_eq!(step(&new), write("n3", 0, &[]));
}

#[test]
fn nobody_is_waited_for_only_after_some_patience() {
    let mut lone = inputs(0, &["n2"], "ANY 1 (n2)", &[]);
    assert_eq!(step(&lone), None);
    lone.waited = true;
    assert_eq!(step(&lone), write("n1", 0, &[]));
    lone.state = state("n1", 0, &[]);
    assert_eq!((step(&lone), reason(&lone)), (set_names(""), Some(SyncReason::Relaxed)));
    lone.settings.strict = true;
    assert_eq!(
        (step(&lone), reason(&lone)),
        (set_names("ANY 1 (*)"), Some(SyncReason::Blocked))
    );
    lone.configured = guc("ANY 1 (*)");
    assert_eq!(step(&lone), None);
}

#[test]
fn a_standby_that_may_not_lead_is_waited_for_only_where_others_are_too_few() {
    let mut two = inputs(0, &[], "", &["n2", "n3"]);
    two.members[1].nofailover = true;
    assert_eq!(step(&two), set_names("ANY 1 (n3)"));
    two.settings.node_count = 2;
    assert_eq!(step(&two), set_names("ANY 2 (n2,n3)"));
    two.settings.node_count = 1;
    two.members[2].nosync = true;
    assert_eq!(step(&two), set_names("ANY 1 (n2)"));
}
