use pgherd_cluster::etcd::Op;
use pgherd_cluster::name::Scope;

use super::renewal::{may_move, proof_lasts};
use super::*;
use crate::lease::AskedBy;

const TTL: Duration = LeaseTiming::DEFAULT.ttl();

fn name(text: &str) -> MemberName {
    MemberName::new(text).expect("a plain name")
}

fn at(millis: u64) -> Boottime {
    Boottime::from_nanos(1_000_000_000_000) + Duration::from_millis(millis)
}

fn core() -> LeaseCore {
    let keys = Keys::new("service", &Scope::new("c").expect("a plain name"));
    let mut core = LeaseCore::new(name("n1"), keys, LeaseTiming::DEFAULT, &Resumed::default());
    // A word about the pause, so that deadlines are given; what that sets off is dropped.
    let _ = core.handle(at(0), Input::Pause(false));
    LeaseCore {
        flow: Flow::Idle,
        next_at: at(0),
        ..core
    }
}

fn key(value: &str, lease: i64, create_revision: i64) -> Entry {
    Entry {
        key: "/service/c/leader".to_owned(),
        value: value.to_owned(),
        create_revision,
        mod_revision: create_revision,
        lease,
    }
}

/// The one request that is put out.
fn asked(outputs: &[Output]) -> (u64, Ask) {
    let mut asks = outputs.iter().filter_map(|output| match output {
        Output::Ask { token, ask } => Some((*token, ask.clone())),
        _ => None,
    });
    let ask = asks.next().unwrap_or_else(|| panic!("nothing is asked in {outputs:?}"));
    assert_eq!(asks.next(), None, "one request at a time");
    ask
}

fn answer(core: &mut LeaseCore, now: Boottime, to: &[Output], answer: Result<Answer, StoreError>) -> Vec<Output> {
    let (token, _) = asked(to);
    core.handle(now, Input::Answer { token, answer })
}

fn txn(read: Vec<Entry>) -> Result<Answer, StoreError> {
    Ok(Answer::Txn(TxnOutcome {
        succeeded: true,
        read,
        revision: 9,
    }))
}

fn unreachable() -> StoreError {
    StoreError::Unreachable { what: "x".to_owned() }
}

const GUARDS: BidGuards = BidGuards {
    sync: 1,
    failsafe: 2,
    failover: 3,
    config: 4,
};

/// A core with lease 7, granted at 0.
fn with_lease() -> LeaseCore {
    let mut core = core();
    let out = core.handle(at(0), Input::Tick);
    assert_eq!(asked(&out).1, Ask::Grant { ttl: TTL });
    let _ = answer(&mut core, at(5), &out, Ok(Answer::Granted(7)));
    core
}

/// A leader by revision 9, whose bid was asked for at 100 and confirmed by the keeper.
fn leader() -> LeaseCore {
    let mut core = with_lease();
    let out = core.handle(at(100), Input::Bid(GUARDS));
    assert_eq!(asked(&out).1, Ask::KeepAlive { lease: 7 });
    let out = answer(&mut core, at(150), &out, Ok(Answer::KeptAlive));
    let out = answer(&mut core, at(300), &out, txn(vec![key("n1", 7, 9)]));
    let arm = Output::Arm {
        term: 9,
        deadline: at(100) + TTL,
        margin: LeaseTiming::DEFAULT.margin(),
    };
    assert_eq!(out.first(), Some(&arm), "counted from before the keepalive was sent");
    confirm(&mut core, at(301), at(100) + TTL);
    core
}

fn confirm(core: &mut LeaseCore, now: Boottime, deadline: Boottime) {
    let _ = core.handle(now, Input::Armed { term: 9, deadline });
}

fn deadline(core: &LeaseCore) -> Option<Boottime> {
    core.state().holding.as_ref().and_then(|held| held.deadline)
}

/// Carries out one renewal that begins at `begin`, with this answer to the read of the key.
fn renew(core: &mut LeaseCore, begin: Boottime, found: Option<Entry>) -> Vec<Output> {
    let out = core.handle(begin, Input::Tick);
    assert_eq!(asked(&out).1, Ask::KeepAlive { lease: 7 });
    let out = answer(core, begin, &out, Ok(Answer::KeptAlive));
    assert_eq!(asked(&out).1, Ask::ReadLeader);
    answer(
        core,
        begin + Duration::from_millis(400),
        &out,
        Ok(Answer::Leader(found)),
    )
}

#[test]
fn a_proof_lasts_no_longer_than_the_lease_that_it_is_of() {
    let timing = LeaseTiming::PATRONI_DEFAULT;
    assert_eq!(proof_lasts(Duration::from_secs(5), timing), Duration::from_secs(5));
    assert_eq!(proof_lasts(Duration::from_secs(60), timing), timing.ttl());
}

#[test]
fn a_shorter_lease_takes_over_only_when_no_longer_deadline_is_out() {
    let five = Duration::from_secs(5);
    assert!(!may_move(five, at(0), at(30_000)));
    assert!(!may_move(five, at(24_000), at(30_000)));
    assert!(may_move(five, at(25_000), at(30_000)));
    assert!(may_move(Duration::from_secs(60), at(0), at(30_000)));
}

#[test]
fn a_bid_compares_everything_that_the_decision_used() {
    let mut core = with_lease();
    let out = core.handle(at(100), Input::Bid(GUARDS));
    let out = answer(&mut core, at(110), &out, Ok(Answer::KeptAlive));
    let (_, Ask::Txn(txn)) = asked(&out) else {
        panic!("a transaction is expected in {out:?}");
    };
    let keys = Keys::new("service", &Scope::new("c").expect("a plain name"));
    let text = format!("{txn:?}");
    for (name, revision) in [("sync", 1), ("failsafe", 2), ("failover", 3), ("config", 4)] {
        let guard = format!("ModRevision(\"/service/c/{name}\", {revision})");
        assert!(text.contains(&guard), "{guard} in {text}");
    }
    assert!(text.contains(&format!("Absent({:?})", keys.of(&pgherd_cluster::key::Key::Leader))));
    assert!(text.contains(&format!("{:?}", Op::Get("/service/c/leader".to_owned()))));
}

#[test]
fn a_deadline_counts_once_the_keeper_has_confirmed_it() {
    let mut core = leader();
    assert_eq!(deadline(&core), Some(at(100) + TTL));
    let out = renew(&mut core, at(1500), Some(key("n1", 7, 9)));
    assert!(matches!(out.first(), Some(Output::Arm { deadline, .. }) if *deadline == at(1500) + TTL));
    assert_eq!(deadline(&core), Some(at(100) + TTL));
    confirm(&mut core, at(1910), at(1500) + TTL);
    assert_eq!(deadline(&core), Some(at(1500) + TTL));
}

#[test]
fn a_live_lease_without_the_key_ends_postgres() {
    for found in [
        None,
        Some(key("n2", 8, 12)),
        Some(key("n1", 7, 12)),
        Some(key("n1", 8, 9)),
    ] {
        let mut core = leader();
        let out = renew(&mut core, at(1500), found.clone());
        assert!(matches!(out.first(), Some(Output::End { .. })), "{found:?}");
        assert_eq!(core.state().holding, None);
    }
}

#[test]
fn a_keeper_that_confirms_nothing_gets_the_lease_expired() {
    let mut core = leader();
    renew(&mut core, at(1500), Some(key("n1", 7, 9)));
    // Never confirmed: nothing is asked of etcd until the deadline, and the holding is over then.
    for millis in [2600, 4000, 6400] {
        let out = core.handle(at(millis), Input::Tick);
        assert_eq!(out, [], "{millis}");
    }
    let out = core.handle(at(6600), Input::Tick);
    assert!(matches!(out.first(), Some(Output::End { .. })));
    assert_eq!(asked(&out).1, Ask::Grant { ttl: TTL });
}

/// The keeper may still let PostgreSQL write by a deadline of the agent before this one.
#[test]
fn a_resumed_lease_gives_way_to_a_shorter_one_only_after_the_deadline_that_the_keeper_has() {
    let long = Duration::from_secs(30);
    let resumed = Resumed {
        lease: Some(7),
        lease_ttl: long,
        epoch: Some(Epoch {
            holder: name("n1"),
            create_revision: 9,
        }),
        armed_until: Some(at(0) + long),
        ..Resumed::default()
    };
    let keys = Keys::new("/service", &Scope::new("c").expect("a plain name"));
    let mut core = LeaseCore::new(name("n1"), keys, LeaseTiming::DEFAULT, &resumed);
    let _ = core.handle(at(0), Input::Pause(false));
    (core.flow, core.next_at) = (Flow::Idle, at(0));
    let moves = |core: &mut LeaseCore, now: Boottime| {
        let out = core.handle(now, Input::Tick);
        let out = answer(core, now, &out, Ok(Answer::KeptAlive));
        let out = answer(core, now, &out, Ok(Answer::Leader(Some(key("n1", 7, 9)))));
        confirm(core, now, now + TTL);
        out.iter().any(|output| {
            matches!(
                output,
                Output::Ask {
                    ask: Ask::Grant { .. },
                    ..
                }
            )
        })
    };
    assert!(
        !moves(&mut core, at(200)),
        "whether these are the cluster's times nobody knows"
    );
    let _ = core.handle(at(300), Input::Retime(LeaseTiming::DEFAULT));
    assert!(!moves(&mut core, at(3000)), "the deadline of before reaches further");
    assert!(moves(&mut core, at(26_000)));
}

#[test]
fn a_lease_that_is_forsaken_is_not_renewed_and_the_next_one_carries_no_key() {
    let mut core = leader();
    let out = core.handle(at(1000), Input::Forsake { lease: None });
    assert!(matches!(out.first(), Some(Output::End { .. })), "{out:?}");
    let (_, ask) = asked(&out);
    assert!(matches!(ask, Ask::Grant { .. }), "{ask:?}");
    let _ = answer(&mut core, at(1010), &out, Ok(Answer::Granted(78)));
    assert_eq!((core.state().lease, &core.state().holding), (Some(78), &None));
}

#[test]
fn an_unclear_bid_is_found_again_and_vouches_for_nobody_meanwhile() {
    let mut core = with_lease();
    let out = core.handle(at(100), Input::Bid(GUARDS));
    let out = answer(&mut core, at(110), &out, Ok(Answer::KeptAlive));
    let out = answer(&mut core, at(1500), &out, Err(unreachable()));
    assert!(
        matches!(&out[..], [Output::BidEnded(Err(BidLoss::Store(_)))]),
        "{out:?}"
    );
    let seen = KeySeen::Unknown;
    let refused = core.vouch(at(1550), &name("n2"), TTL, &seen);
    assert_eq!(refused, Err(VouchRefusal::Seeks));
    renew(&mut core, at(1700), Some(key("n1", 7, 9)));
    confirm(&mut core, at(2200), at(1700) + TTL);
    assert_eq!(deadline(&core), Some(at(1700) + TTL));
}

#[test]
fn a_vouch_and_a_bid_exclude_each_other() {
    let mut core = with_lease();
    let given = core.vouch(at(100), &name("n2"), Duration::from_secs(60), &KeySeen::Unknown);
    assert_eq!(given, Ok(TTL));
    let out = core.handle(at(5000), Input::Bid(GUARDS));
    assert!(out.contains(&Output::BidEnded(Err(BidLoss::Vouched(name("n2"))))));
    let out = core.handle(at(100) + TTL, Input::Bid(GUARDS));
    assert!(
        !out.iter().any(|output| matches!(output, Output::BidEnded(_))),
        "{out:?}"
    );
    let refused = core.vouch(at(5200), &name("n2"), TTL, &KeySeen::Unknown);
    assert_eq!(refused, Err(VouchRefusal::Seeks));
    let held = KeySeen::Held(Epoch {
        holder: name("n3"),
        create_revision: 3,
    });
    let refused = with_lease().vouch(at(100), &name("n2"), TTL, &held);
    assert!(matches!(refused, Err(VouchRefusal::OtherHolder(_))));
    let refused = leader().vouch(at(400), &name("n2"), TTL, &KeySeen::Free);
    assert_eq!(refused, Err(VouchRefusal::Holds));
}

#[test]
fn a_vouch_ends_with_the_holding_that_it_was_for_and_with_no_other() {
    let holding = |create_revision| Epoch {
        holder: name("n2"),
        create_revision,
    };
    let vouched_for = |asked: &[Option<i64>]| {
        let mut core = with_lease();
        for by in asked {
            let by = AskedBy {
                create_revision: *by,
                lease: Some(70),
            };
            let given = core.vouch_for(at(100), &name("n2"), by, TTL, &KeySeen::Unknown);
            assert_eq!(given, Ok(TTL));
        }
        core
    };
    for (asked, ended, stands) in [
        (&[Some(9)][..], 9, false),
        (&[Some(9)], 8, true),
        (&[None], 9, true),
        (&[Some(9), Some(9)], 9, false),
        (&[Some(9), Some(12)], 9, true),
        (&[Some(12), Some(9)], 9, true),
    ] {
        for (said, stands) in [(None, stands), (Some(70), stands), (Some(71), true)] {
            let mut core = vouched_for(asked);
            core.withdraw(&holding(ended), said);
            assert_eq!(core.state().vouched.is_some(), stands, "{asked:?}, {ended}, {said:?}");
        }
    }
    let mut core = vouched_for(&[Some(9)]);
    let others = Epoch {
        holder: name("n3"),
        create_revision: 9,
    };
    core.withdraw(&others, None);
    assert!(core.state().vouched.is_some());
}

fn vouchers() -> Vec<Voucher> {
    let voucher = |text: &str| Voucher {
        name: name(text),
        api_url: format!("http://{text}:8008/patroni"),
    };
    ["n1", "n2", "n3"].map(voucher).to_vec()
}

/// A leader whose etcd has been silent since its bid, at the moment when it has asked for vouches.
fn asking() -> (LeaseCore, u64) {
    let mut core = leader();
    let _ = core.handle(at(400), Input::Failsafe(Some(vouchers())));
    let out = core.handle(at(100) + TTL / 2, Input::Tick);
    let round = out.iter().find_map(|output| match output {
        Output::AskVouches { round, members, .. } => {
            let asked: Vec<&str> = members.iter().map(|voucher| voucher.name.as_str()).collect();
            assert_eq!(asked, ["n2", "n3"]);
            Some(*round)
        }
        _ => None,
    });
    (core, round.expect("half of the deadline is gone"))
}

fn vouch(core: &mut LeaseCore, now: Boottime, round: u64, member: &str, lasts: Option<Duration>) -> Vec<Output> {
    let member = name(member);
    core.handle(now, Input::Vouch { round, member, lasts })
}

#[test]
fn all_vouches_extend_a_deadline_by_the_least_from_before_the_question() {
    let (mut core, round) = asking();
    let asked_at = at(100) + TTL / 2;
    assert_eq!(vouch(&mut core, at(2700), round, "n2", Some(TTL)), []);
    let four = Duration::from_secs(4);
    let out = vouch(&mut core, at(3400), round, "n3", Some(four));
    assert!(
        matches!(out.first(), Some(Output::Arm { deadline, .. }) if *deadline == asked_at + four),
        "{out:?}"
    );
    confirm(&mut core, at(3401), asked_at + four);
    assert!(core.rests_on_vouches(at(3402)));
}

#[test]
fn one_refusal_or_silence_extends_nothing() {
    let (mut core, round) = asking();
    assert_eq!(vouch(&mut core, at(2700), round, "n2", Some(TTL)), []);
    assert_eq!(vouch(&mut core, at(2800), round, "n3", None), []);
    assert_eq!(
        vouch(&mut core, at(2900), round, "n3", Some(TTL)),
        [],
        "it said no in this round"
    );
    assert_eq!(deadline(&core), Some(at(100) + TTL));
}

#[test]
fn a_key_that_went_with_its_lease_is_won_anew_while_vouches_carry() {
    let (mut core, round) = asking();
    let asked_at = at(100) + TTL / 2;
    vouch(&mut core, at(2700), round, "n2", Some(TTL));
    vouch(&mut core, at(2700), round, "n3", Some(TTL));
    confirm(&mut core, at(2701), asked_at + TTL);
    // The keepalive that was asked for meanwhile finds the lease gone.
    let token = core.token;
    let answer_of = |answer| Input::Answer { token, answer };
    let out = core.handle(at(7000), answer_of(Err(StoreError::LeaseGone)));
    assert_eq!(asked(&out).1, Ask::Grant { ttl: TTL });
    let out = answer(&mut core, at(7010), &out, Ok(Answer::Granted(8)));
    assert!(matches!(asked(&out).1, Ask::Txn(_)));
    let out = answer(&mut core, at(7020), &out, txn(vec![key("n1", 8, 30)]));
    assert!(
        matches!(out.first(), Some(Output::Arm { term: 9, .. })),
        "the same term: {out:?}"
    );
    let held = core.state().holding.clone().expect("it holds on");
    assert_eq!((held.epoch.create_revision, held.term), (30, 9));
}

#[test]
fn in_pause_nothing_goes_to_the_keeper_and_nobody_is_asked_to_vouch() {
    let mut core = leader();
    let _ = core.handle(at(400), Input::Failsafe(Some(vouchers())));
    let _ = core.handle(at(500), Input::Pause(true));
    let token = core.token;
    let answer_of = |token, answer| Input::Answer { token, answer };
    let out = core.handle(at(510), answer_of(token, Ok(Answer::KeptAlive)));
    let out = answer(&mut core, at(520), &out, Ok(Answer::Leader(Some(key("n1", 7, 9)))));
    assert_eq!(out, []);
    assert_eq!(deadline(&core), Some(at(500) + TTL));
    let out = core.handle(at(4000), Input::Tick);
    assert!(!out.iter().any(|output| matches!(output, Output::AskVouches { .. })));
}
