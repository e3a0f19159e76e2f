use std::sync::LazyLock;

use proptest::prelude::*;

use super::*;
use crate::testing::{Cluster, NO_POSITIONS, NO_WORDS, NOBODY, name};
use crate::warrant::{Vouch, with_leader};

const SECOND: u64 = 1_000_000_000;
const ASKED: Boottime = Boottime::from_nanos(100 * SECOND);

static PLAIN: ReadRules = ReadRules::none();
static FALLBACK: LazyLock<ReadRules> = LazyLock::new(|| ReadRules {
    fallback_to_leader: true,
    ..ReadRules::none()
});

fn rules(fallback_to_leader: bool) -> &'static ReadRules {
    if fallback_to_leader { &FALLBACK } else { &PLAIN }
}

fn policy(role: ListenerRole) -> Policy<'static> {
    Policy {
        role,
        rules: &PLAIN,
        hold_until: Boottime::from_nanos(u64::MAX),
    }
}

/// The leader runs, and says that it takes writes.
fn led_by_n1() -> Cluster {
    Cluster::new().leader("n1", 10).primary("n1", 11)
}

/// The leader of this view was confirmed at `ASKED`, nobody has given its word, and nobody is silent.
fn evidence(view: &View, now: Boottime) -> Evidence<'_> {
    Evidence {
        view,
        warrant: Warrant::new(view, Some(ASKED)),
        words: &NO_WORDS,
        silent: &NOBODY,
        positions: &NO_POSITIONS,
        now,
    }
}

/// What a session with the leader of this epoch rests on.
fn with_the_leader_of(epoch: &Epoch) -> Footing {
    Footing {
        member: epoch.holder.clone(),
        epoch: Some(epoch.clone()),
        on_promoted: OnChange::End,
        listener: 0,
        in_clear: true,
        since: ASKED,
    }
}

/// What a session with a replica rests on.
fn with_the_replica(member: &str, may_be_led: bool) -> Footing {
    Footing {
        member: name(member),
        epoch: None,
        on_promoted: if may_be_led { OnChange::Keep } else { OnChange::End },
        listener: 0,
        in_clear: true,
        since: ASKED,
    }
}

fn decide(policy: Policy<'_>, cluster: &Cluster, now: Boottime) -> Decision {
    route(policy, evidence(&cluster.view(), now), Load::IDLE)
}

fn write(cluster: &Cluster) -> Decision {
    decide(policy(ListenerRole::Write), cluster, ASKED + Duration::from_secs(1))
}

fn target(decision: Decision) -> Option<(String, Option<i64>)> {
    match decision {
        Decision::To(target) => Some((
            target.member.to_string(),
            target.epoch.map(|epoch| epoch.create_revision),
        )),
        Decision::Hold(_) | Decision::Refuse(_) => None,
    }
}

#[test]
fn writers_go_to_a_leader_that_says_it_is_primary() {
    let cluster = led_by_n1().replica("n2");
    assert_eq!(target(write(&cluster)), Some(("n1".to_owned(), Some(10))));
}

#[test]
fn writers_wait_while_the_leader_is_not_writable_yet() {
    let cases = [
        (Cluster::new().replica("n1"), Why::NoLeader),
        (Cluster::new().leader("n1", 10), Why::NoRecord { leader: name("n1") }),
        (
            Cluster::new().leader("n1", 10).with_role("n1", "promoted", 11),
            Why::NotWritable {
                leader: name("n1"),
                role: Role::Promoted,
                state: PgState::Running,
                from_before: false,
            },
        ),
        (
            Cluster::new().leader("n1", 10).primary("n1", 9),
            Why::NotWritable {
                leader: name("n1"),
                role: Role::Primary,
                state: PgState::Running,
                from_before: true,
            },
        ),
    ];
    for (cluster, why) in cases {
        assert_eq!(write(&cluster), Decision::Hold(why));
    }
}

#[test]
fn a_standby_cluster_refuses_writers_at_once() {
    let cluster = Cluster::new().leader("n1", 10).with_role("n1", "standby_leader", 11);
    assert_eq!(
        write(&cluster),
        Decision::Refuse(Why::StandbyCluster { leader: name("n1") })
    );
    let being_promoted = Cluster::new().leader("n1", 10).with_role("n1", "standby_leader", 9);
    assert!(matches!(
        write(&being_promoted),
        Decision::Hold(Why::NotWritable { .. })
    ));
}

#[test]
fn a_lapsed_warrant_closes_the_route_and_patience_ends() {
    let cluster = led_by_n1();
    let late = ASKED + Duration::from_secs(29);
    let age = Duration::from_secs(29);
    let patient = policy(ListenerRole::Write);
    assert_eq!(
        decide(patient, &cluster, late),
        Decision::Hold(Why::WarrantLapsed { age })
    );
    let impatient = Policy {
        hold_until: late,
        ..patient
    };
    assert_eq!(
        decide(impatient, &cluster, late),
        Decision::Refuse(Why::WarrantLapsed { age })
    );
}

#[test]
fn readers_go_to_replicas_and_to_the_leader_only_as_a_last_resort() {
    let read = policy(ListenerRole::Read);
    let fallback = Policy {
        rules: &FALLBACK,
        ..read
    };
    let now = ASKED + Duration::from_secs(1);
    let with_replica = led_by_n1().replica("n2");
    assert_eq!(
        target(decide(fallback, &with_replica, now)),
        Some(("n2".to_owned(), None))
    );
    let alone = led_by_n1();
    assert!(matches!(
        decide(read, &alone, now),
        Decision::Hold(Why::NoReplica { .. })
    ));
    // A session with the leader rests on its epoch, whichever port it came by.
    assert_eq!(target(decide(fallback, &alone, now)), Some(("n1".to_owned(), Some(10))));
    let late = ASKED + Duration::from_secs(29);
    assert!(matches!(
        decide(fallback, &alone, late),
        Decision::Hold(Why::NoReplica { .. })
    ));
}

#[test]
fn readers_go_to_a_standby_that_does_not_stream_only_while_there_is_nobody_to_stream_from() {
    let archive = r#""replication_state":"in archive recovery""#;
    let stranded = Cluster::new().member("n2", "replica", "running", archive);
    let led = || stranded.clone().leader("n1", 10).primary("n1", 11);
    let to = |member: &str, epoch: Option<i64>| Some((member.to_owned(), epoch));
    let n1 = [name("n1")];
    let cases = [
        (stranded.clone(), false, &[][..], to("n2", None)),
        (led(), false, &[], None),
        (led(), true, &[], to("n1", Some(10))),
        // The leader has been tried and did not answer.
        (led(), false, &n1, to("n2", None)),
        (led(), true, &n1, to("n2", None)),
        // One that streams is the first choice, with a leader or without.
        (led().replica("n3"), true, &[], to("n3", None)),
        (stranded.clone().replica("n3"), false, &[], to("n3", None)),
        (stranded.replica("n3"), false, &[name("n3")], to("n2", None)),
    ];
    for (cluster, fallback_to_leader, avoid, expected) in cases {
        let policy = Policy {
            rules: rules(fallback_to_leader),
            ..policy(ListenerRole::Read)
        };
        let view = cluster.view();
        let evidence = evidence(&view, ASKED);
        let decision = route(policy, evidence, Load { avoid, ..Load::IDLE });
        if let Decision::To(chosen) = &decision {
            assert!(still_leads_to(chosen, policy, evidence, avoid));
        }
        assert_eq!(target(decision), expected, "{avoid:?}");
    }
}

#[test]
fn each_role_of_readers_gets_its_kind_of_member() {
    let cluster = led_by_n1().sync(r#"{"leader":"n1","sync_standby":"n2"}"#);
    let cluster = cluster.replica("n2").replica("n3");
    let whom = |role: ListenerRole, cluster: &Cluster| -> Vec<String> {
        // Every draw: whoever may be chosen is.
        let third = u64::MAX / 3;
        let draws = (0..3).flat_map(|first| (0..3).map(move |second| [first * third, second * third]));
        let view = cluster.view();
        let decided = draws.map(|draws| route(policy(role), evidence(&view, ASKED), Load { draws, ..Load::IDLE }));
        let found: BTreeSet<String> = decided
            .filter_map(target)
            .map(|(member, epoch)| format!("{member}{}", if epoch.is_some() { " leads" } else { "" }))
            .collect();
        found.into_iter().collect()
    };
    assert_eq!(whom(ListenerRole::Read, &cluster), ["n2", "n3"]);
    assert_eq!(whom(ListenerRole::Sync, &cluster), ["n2"]);
    assert_eq!(whom(ListenerRole::Async, &cluster), ["n3"]);
    assert_eq!(whom(ListenerRole::Any, &cluster), ["n1 leads", "n2", "n3"]);
    let quorum = cluster
        .clone()
        .sync(r#"{"leader":"n1","quorum":1,"sync_standby":"n2,n3"}"#);
    assert_eq!(whom(ListenerRole::Sync, &quorum), ["n2", "n3"]);
    // A list that is not in force says nothing.
    let inactive = cluster.sync(r#"{"leader":null,"sync_standby":"n2"}"#);
    assert_eq!(whom(ListenerRole::Sync, &inactive), Vec::<String>::new());
    assert_eq!(whom(ListenerRole::Async, &inactive), ["n2", "n3"]);
    let Decision::Hold(Why::NoReplica { members }) = decide(policy(ListenerRole::Sync), &inactive, ASKED) else {
        panic!("nobody is synchronous");
    };
    assert!(members.contains(&(name("n2"), LeftOut::NotSync)));
}

#[test]
fn the_leader_is_one_of_any_only_by_a_warrant_and_with_the_tags() {
    let any = policy(ListenerRole::Any);
    let late = ASKED + Duration::from_secs(29);
    let led = led_by_n1();
    assert_eq!(target(decide(any, &led, ASKED)), Some(("n1".to_owned(), Some(10))));
    let why = |cluster: &Cluster, policy: Policy<'_>, now| match decide(policy, cluster, now) {
        Decision::Hold(Why::NoReplica { members }) => members.into_iter().map(|(_, why)| why).next(),
        other => panic!("{other:?}"),
    };
    let lapsed = why(&led, any, late).expect("it is listed");
    assert!(lapsed.to_string().contains("it is not certain who leads"), "{lapsed}");
    let unproven = Cluster::new().leader("n1", 10).primary("n1", 9);
    assert!(matches!(why(&unproven, any, ASKED), Some(LeftOut::LeadsAnd(_))));
    let tagged = ReadRules {
        tags: [("purpose".to_owned(), "reports".to_owned())].into(),
        ..ReadRules::none()
    };
    let tagged = Policy { rules: &tagged, ..any };
    assert!(matches!(why(&led, tagged, ASKED), Some(LeftOut::OtherTag { .. })));
}

#[test]
fn the_leader_of_a_standby_cluster_is_found_by_those_who_came_for_it() {
    let role = policy(ListenerRole::StandbyLeader);
    let standby = Cluster::new().leader("n1", 10).with_role("n1", "standby_leader", 11);
    let to_n1 = Some(("n1".to_owned(), Some(10)));
    assert_eq!(target(decide(role, &standby, ASKED)), to_n1);
    // It is their leader for readers of either kind, too.
    let last_resort = Policy {
        rules: rules(true),
        ..policy(ListenerRole::Read)
    };
    for policy in [last_resort, policy(ListenerRole::Any)] {
        let decided = decide(policy, &standby, ASKED);
        assert_eq!(target(decided.clone()), to_n1);
        let Decision::To(chosen) = decided else {
            panic!("checked above")
        };
        assert!(still_leads_to(&chosen, policy, evidence(&standby.view(), ASKED), &[]));
    }
    let late = ASKED + Duration::from_secs(29);
    assert!(matches!(
        decide(role, &standby, late),
        Decision::Hold(Why::WarrantLapsed { .. })
    ));
    let unproven = Cluster::new().leader("n1", 10).with_role("n1", "standby_leader", 9);
    assert!(matches!(
        decide(role, &unproven, ASKED),
        Decision::Hold(Why::NotUp { .. })
    ));
    let leader = name("n1");
    assert_eq!(
        decide(role, &led_by_n1(), ASKED),
        Decision::Refuse(Why::NoStandbyCluster { leader })
    );
}

#[test]
fn the_leader_as_a_last_resort_takes_so_many_readers_and_no_more() {
    let limited = ReadRules {
        fallback_max: Some(2),
        ..rules(true).clone()
    };
    let policy = Policy {
        rules: &limited,
        ..policy(ListenerRole::Read)
    };
    let decide = |cluster: &Cluster, open: usize| {
        let load = Load {
            of_listener: &|_| open,
            ..Load::IDLE
        };
        route(policy, evidence(&cluster.view(), ASKED), load)
    };
    let alone = led_by_n1();
    assert_eq!(target(decide(&alone, 1)), Some(("n1".to_owned(), Some(10))));
    let leader = name("n1");
    let full = Why::LeaderFull { leader, limit: 2 };
    assert_eq!(decide(&alone, 2), Decision::Hold(full));
    assert_eq!(target(decide(&alone.replica("n2"), 2)), Some(("n2".to_owned(), None)));
}

#[test]
fn a_member_has_strayed_when_it_is_known_to_be_other_and_not_when_nothing_is_known_of_it() {
    let limited = ReadRules {
        max_lag_bytes: Some(100),
        ..ReadRules::none()
    };
    let why = |cluster: &Cluster| {
        let view = cluster.view();
        strayed(
            ListenerRole::Read,
            &limited,
            evidence(&view, ASKED),
            &view.members[&name("n2")],
            &[],
        )
    };
    let led = || led_by_n1().status(r#"{"optime":1000}"#);
    let with = |cluster: Cluster, state: &str, more: &str| cluster.member("n2", "replica", state, more);
    let (streams, archive) = (r#""replication_state":"streaming""#, r#""replay_lsn":950"#);
    assert_eq!(why(&with(led(), "running", &format!("{streams},{archive}"))), None);
    let lags = Some(LeftOut::Lags {
        bytes: 200,
        bytes_max: 100,
    });
    assert_eq!(
        why(&with(led(), "running", &format!(r#"{streams},"replay_lsn":800"#))),
        lags
    );
    assert_eq!(why(&with(led(), "running", archive)), Some(LeftOut::NotStreaming(None)));
    // Nobody can stream while nobody leads; how far it is counts all the same.
    let leaderless = || Cluster::new().status(r#"{"optime":1000}"#);
    assert_eq!(why(&with(leaderless(), "running", archive)), None);
    assert_eq!(why(&with(leaderless(), "running", r#""replay_lsn":800"#)), lags);
    assert_eq!(why(&with(led(), "running", streams)), None, "its lag is not known");
    assert_eq!(why(&with(led(), "stopping", streams)), None);
    assert_eq!(why(&Cluster::new().leader("n2", 10).primary("n2", 11)), None);
}

#[test]
fn what_becomes_of_a_session_at_its_members_promotion_is_as_it_was_told() {
    let view = Cluster::new().leader("n2", 10).view();
    let leaves = |on_promoted: OnChange| {
        let footing = Footing {
            on_promoted,
            ..with_the_replica("n2", false)
        };
        let told = may_go_on(&footing, evidence(&view, ASKED));
        told.map(|epoch| should_leave(&footing, epoch.as_ref()).is_some())
    };
    let member = name("n2");
    assert_eq!(leaves(OnChange::End), Err(Outlived::Promoted { member }));
    assert_eq!(leaves(OnChange::EndWhenIdle), Ok(true));
    assert_eq!(leaves(OnChange::Keep), Ok(false));
    // Who was on a leader from the start leaves for no promotion.
    let led = Footing {
        on_promoted: OnChange::EndWhenIdle,
        ..with_the_leader_of(view.epoch().expect("n2 leads"))
    };
    assert_eq!(should_leave(&led, view.epoch()), None);
}

#[test]
fn a_leader_is_asked_only_for_a_reader_whom_its_silence_would_help() {
    let read = policy(ListenerRole::Read);
    let led = led_by_n1();
    let archive = r#""replication_state":"in archive recovery""#;
    let stranded = led.clone().member("n2", "replica", "running", archive);
    let asks = |policy: Policy<'_>, cluster: &Cluster, avoid: &[MemberName]| {
        worth_asking(policy, evidence(&cluster.view(), ASKED), avoid).map(|leader| leader.name.to_string())
    };
    assert_eq!(asks(read, &stranded, &[]), Some("n1".to_owned()));
    assert_eq!(asks(read, &led, &[]), None);
    assert_eq!(asks(read, &stranded, &[name("n1")]), None);
    assert_eq!(asks(read, &stranded, &[name("n2")]), None);
    assert_eq!(asks(policy(ListenerRole::Write), &stranded, &[]), None);
    assert_eq!(asks(read, &Cluster::new().replica("n2"), &[]), None);
}

#[test]
fn a_session_lives_as_long_as_its_epoch_and_the_warrant() {
    let epoch = |revision| Epoch {
        holder: name("n1"),
        create_revision: revision,
    };
    let footing = with_the_leader_of(&epoch(10));
    let judge = |cluster: &Cluster, now: Boottime| may_go_on(&footing, evidence(&cluster.view(), now));
    let same = Cluster::new().leader("n1", 10);
    assert_eq!(judge(&same, ASKED), Ok(Some(epoch(10))));
    assert_eq!(
        judge(&same, ASKED + Duration::from_secs(60)),
        Err(Outlived::WarrantLapsed)
    );
    let again = Cluster::new().leader("n1", 20);
    assert_eq!(judge(&again, ASKED), Err(Outlived::EpochOver { now: Some(epoch(20)) }));
    assert_eq!(judge(&Cluster::new(), ASKED), Err(Outlived::EpochOver { now: None }));
}

#[test]
fn a_session_goes_over_to_a_key_that_its_leader_made_anew_while_its_word_stood() {
    let word = led_by_n1().word(ASKED + Duration::from_secs(2));
    let footing = with_the_leader_of(word.epoch());
    let words = Words::none().with(word);
    let judge = |holder: &str, now: Boottime, as_of: Boottime| {
        let view = Cluster::new().leader(holder, 20).view();
        let evidence = Evidence {
            warrant: Warrant::new(&view, Some(as_of)),
            words: &words,
            ..evidence(&view, now)
        };
        (may_go_on(&footing, evidence), view.epoch().cloned())
    };
    let (told, anew) = judge("n1", ASKED + Duration::from_secs(1), ASKED);
    assert_eq!(told, Ok(anew));
    let (late, now) = judge("n1", ASKED + Duration::from_secs(2), ASKED);
    assert_eq!(late, Err(Outlived::EpochOver { now }));
    let (other, now) = judge("n2", ASKED, ASKED);
    assert_eq!(other, Err(Outlived::EpochOver { now }));
    let (unconfirmed, _) = judge("n1", ASKED, ASKED - Duration::from_secs(60));
    assert_eq!(unconfirmed, Err(Outlived::WarrantLapsed));
}

#[test]
fn a_leader_without_a_key_keeps_its_sessions_and_gets_newcomers_once_it_was_asked_again() {
    let word = led_by_n1().word(ASKED + Duration::from_secs(2));
    let footing = with_the_leader_of(word.epoch());
    for without_key in [false, true] {
        let word = Vouch {
            without_key,
            ..word.clone()
        };
        let view = with_leader(&Cluster::new().replica("n2").view(), &word);
        let mut evidence = Evidence {
            // That nobody holds the key is confirmed just now, and lengthens nothing.
            warrant: Warrant::by_word(&word, Some(ASKED)),
            ..evidence(&view, ASKED + Duration::from_millis(1_999))
        };
        assert_eq!(may_go_on(&footing, evidence), Ok(footing.epoch.clone()));
        let decided = route(policy(ListenerRole::Write), evidence, Load::IDLE);
        let expected = without_key.then(|| ("n1".to_owned(), Some(10)));
        assert_eq!(target(decided.clone()), expected);
        assert!(without_key || decided == Decision::Hold(Why::NoLeader));
        evidence.now = ASKED + Duration::from_secs(2);
        assert_eq!(may_go_on(&footing, evidence), Err(Outlived::WarrantLapsed));
        let late = route(policy(ListenerRole::Write), evidence, Load::IDLE);
        assert!(matches!(late, Decision::Hold(Why::WarrantLapsed { .. })));
    }
}

#[test]
fn a_silent_replica_is_left_and_gets_nobody() {
    let silent = BTreeSet::from([name("n2")]);
    let read = policy(ListenerRole::Read);
    let led = led_by_n1().replica("n2");
    let leaderless = Cluster::new().replica("n2");
    for (cluster, takes_over) in [(&led, true), (&led, false), (&leaderless, true), (&leaderless, false)] {
        let view = if takes_over {
            cluster.clone().replica("n3").view()
        } else {
            cluster.view()
        };
        let evidence = Evidence {
            silent: &silent,
            ..evidence(&view, ASKED)
        };
        match route(read, evidence, Load::IDLE) {
            Decision::To(target) => assert_eq!((target.member, takes_over), (name("n3"), true)),
            Decision::Hold(Why::NoReplica { members }) => {
                assert!(members.contains(&(name("n2"), LeftOut::Silent)) && !takes_over);
            }
            other => panic!("{other:?}"),
        }
        let chosen = Target {
            member: name("n2"),
            address: view.members[&name("n2")].record.postgres_address().expect("it has one"),
            epoch: None,
        };
        assert!(!still_leads_to(&chosen, read, evidence, &[]));
        let member = name("n2");
        assert_eq!(
            may_go_on(&with_the_replica("n2", true), evidence),
            Err(Outlived::Silent { member })
        );
        assert_eq!(may_go_on(&with_the_replica("n3", true), evidence), Ok(None));
    }
}

#[test]
fn a_session_with_a_replica_needs_a_warrant_from_its_promotion_on_or_ends() {
    let judge = |leader: Option<&str>, may_be_led: bool, now: Boottime| {
        let cluster = leader.map_or_else(Cluster::new, |leader| Cluster::new().leader(leader, 10));
        may_go_on(&with_the_replica("n2", may_be_led), evidence(&cluster.view(), now))
    };
    let late = ASKED + Duration::from_secs(60);
    let epoch = Epoch {
        holder: name("n2"),
        create_revision: 10,
    };
    for may_be_led in [false, true] {
        assert_eq!(judge(None, may_be_led, late), Ok(None));
        assert_eq!(judge(Some("n1"), may_be_led, late), Ok(None));
    }
    let promoted = Outlived::Promoted { member: name("n2") };
    assert_eq!(judge(Some("n2"), false, ASKED), Err(promoted));
    assert_eq!(judge(Some("n2"), true, ASKED), Ok(Some(epoch)));
    assert_eq!(judge(Some("n2"), true, late), Err(Outlived::WarrantLapsed));
}

proptest! {
    /// The rule, told without the implementation's words: whoever gets a writer holds the key, has said that it is a
    /// running primary since it got the key, and was confirmed less than a ttl ago.
    #[test]
    fn no_write_is_routed_without_a_warrant(
        leader in proptest::option::of((0_usize..3, 1_i64..20)),
        records in proptest::collection::vec((0_usize..3, 0_usize..4, 1_i64..20), 0..4),
        confirmed in proptest::option::of(0_u64..60),
        read: bool,
        draws: [u64; 2],
    ) {
        let roles = ["primary", "promoted", "replica", "standby_leader"];
        let mut cluster = Cluster::new();
        if let Some((holder, revision)) = leader {
            cluster = cluster.leader(&format!("n{holder}"), revision);
        }
        for (member, role, revision) in &records {
            cluster = cluster.with_role(&format!("n{member}"), roles[*role], *revision);
        }
        let view = cluster.view();
        let now = Boottime::from_nanos(1000 * SECOND);
        let as_of = confirmed.map(|age| now - Duration::from_secs(age));
        let role = if read { ListenerRole::Read } else { ListenerRole::Write };
        let policy = Policy { rules: rules(read), ..policy(role) };
        let evidence = Evidence { warrant: Warrant::new(&view, as_of), ..evidence(&view, now) };
        if let Decision::To(target) = route(policy, evidence, Load { draws, ..Load::IDLE }) {
            let holds_the_key = leader.is_some_and(|(holder, _)| target.member.as_str() == format!("n{holder}"));
            prop_assert_eq!(target.epoch.is_some(), holds_the_key);
            if !read {
                let (_, created) = leader.expect("a writer has a target");
                prop_assert!(holds_the_key);
                prop_assert!(confirmed.is_some_and(|age| age < 5));
                let member = &view.members[&target.member];
                prop_assert!(member.mod_revision > created && member.record.role == Role::Primary);
            }
        }
    }
}
