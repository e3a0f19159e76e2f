use pgherd_cluster::etcd::{Compare, Op};

use super::*;

fn network() -> Network {
    Network::new(1, NODES)
}

fn put(key: &str, value: &str, lease: i64) -> Op {
    Op::Put {
        key: key.to_owned(),
        value: value.to_owned(),
        lease,
    }
}

fn at(millis: u64) -> Time {
    Time::millis(millis)
}

#[test]
fn a_transaction_is_one_revision_and_creation_is_remembered() {
    let mut store = Store::new();
    let both = Txn::new().then(put("a", "1", 0)).then(put("b", "1", 0));
    let outcome = store.commit(&both, at(0)).expect("no lease is named");
    assert!(outcome.succeeded);
    assert_eq!(outcome.revision, 2);
    store
        .commit(&Txn::new().then(put("a", "2", 0)), at(1))
        .expect("no lease is named");
    let entry = store.get("a").expect("written");
    assert_eq!((entry.create_revision, entry.mod_revision), (2, 3));
    let reads = Txn::new().then(Op::Get("a".into()));
    assert_eq!(
        store.commit(&reads, at(2)).expect("a read").revision,
        3,
        "a read makes no revision"
    );
}

#[test]
fn conditions_choose_the_branch() {
    let mut store = Store::new();
    let create = |value: &str| {
        Txn::new()
            .when(Compare::Absent("k".into()))
            .then(put("k", value, 0))
            .otherwise(Op::Get("k".into()))
    };
    assert!(store.commit(&create("mine"), at(0)).expect("no lease").succeeded);
    let second = store.commit(&create("theirs"), at(0)).expect("no lease");
    assert!(!second.succeeded);
    assert_eq!(second.read.first().map(|entry| entry.value.as_str()), Some("mine"));
    for (compare, holds) in [
        (Compare::Value("k".into(), "mine".into()), true),
        (Compare::CreateRevision("k".into(), 2), true),
        (Compare::ModRevision("k".into(), 3), false),
        (Compare::ModRevision("absent".into(), 0), true),
        (Compare::Lease("k".into(), 0), true),
        (Compare::Lease("k".into(), 7), false),
    ] {
        assert_eq!(
            store
                .commit(&Txn::new().when(compare.clone()), at(0))
                .map(|o| o.succeeded),
            Ok(holds),
            "{compare:?}"
        );
    }
}

#[test]
fn a_lease_ends_late_and_never_early_and_takes_its_keys_along() {
    let mut store = Store::new();
    let (network, mut random) = (network(), Random::new(3));
    let lease = store.grant(Duration::from_secs(5), at(0), &mut random);
    store
        .commit(
            &Txn::new().then(put("leader", "n1", lease)).then(put("m", "x", lease)),
            at(0),
        )
        .expect("the lease lives");
    store.tick(at(4999), &network, &mut random);
    assert!(store.get("leader").is_some());
    assert_eq!(
        store.keep_alive(lease, at(5000)),
        Err(StoreError::LeaseGone),
        "over, though its keys are still there"
    );
    store.tick(at(5500), &network, &mut random);
    assert!(store.get("leader").is_none() && store.get("m").is_none());
    let gone = store.commit(&Txn::new().then(put("leader", "n1", lease)), at(5600));
    assert_eq!(gone, Err(StoreError::LeaseGone));
    let news = store.news(0, 0, 2, at(6000)).expect("nothing was compacted");
    assert_eq!(news.len(), 1, "both keys went in one revision");
}

#[test]
fn without_its_leader_etcd_pauses_and_a_new_one_gives_leases_their_time_anew() {
    let mut store = Store::new();
    let (network, mut random) = (network(), Random::new(5));
    let lease = store.grant(Duration::from_secs(3), at(0), &mut random);
    store.stop(0);
    assert!(!store.serves(1, &network));
    for now in (0..=3500).step_by(50) {
        store.tick(at(now), &network, &mut random);
    }
    assert!(store.serves(1, &network) && !store.serves(0, &network));
    assert!(store.state().expires(lease).is_some_and(|expires| expires >= at(4000)));
}

#[test]
fn a_minority_answers_nobody() {
    let mut store = Store::new();
    let mut network = network();
    for other in [1, 2] {
        network.cut(Site::Etcd(0), Site::Etcd(other));
    }
    let mut random = Random::new(5);
    for now in (0..=4000).step_by(50) {
        store.tick(at(now), &network, &mut random);
    }
    assert!(!store.serves(0, &network) && store.serves(1, &network) && store.serves(2, &network));
    assert_ne!(store.leader(), Some(0));
    store.stop(2);
    assert!(!store.is_serving(&network));
}

#[test]
fn a_watch_tells_in_order_late_where_a_node_lags_and_not_across_compaction_or_restore() {
    let mut store = Store::new();
    let mut random = Random::new(1);
    for (index, value) in ["1", "2", "3"].into_iter().enumerate() {
        let now = at(100 * u64::try_from(index).expect("small"));
        store
            .commit(&Txn::new().then(put("k", value, 0)), now)
            .expect("no lease");
        if index == 0 {
            store.back_up(now);
        }
    }
    let revisions = |news: Vec<Commit>| news.iter().map(|commit| commit.revision).collect::<Vec<_>>();
    assert_eq!(store.news(0, 0, 2, at(300)).map(revisions), Ok(vec![3, 4]));
    store.set_lag(1, Duration::from_millis(150));
    assert_eq!(store.news(1, 0, 2, at(300)).map(revisions), Ok(vec![3]));
    store.compact();
    assert_eq!(store.news(0, 0, 2, at(300)).map(revisions), Err(StoreError::Compacted));
    store.restore(Duration::from_secs(1), at(400), &mut random);
    assert_eq!(store.state().revision, 2);
    assert!(matches!(
        store.news(0, 0, 2, at(400)),
        Err(StoreError::Unreachable { .. })
    ));
    assert_eq!(store.news(0, store.era(), 2, at(400)).map(revisions), Ok(vec![]));
}

#[test]
fn the_backup_that_comes_back_is_as_old_as_was_asked_or_the_oldest() {
    let mut random = Random::new(1);
    for (age, revision) in [(0, 5), (1, 3), (100, 3), (101, 2), (5000, 2)] {
        let mut store = Store::new();
        for now in [at(0), at(100), at(200)] {
            store.commit(&Txn::new().then(put("k", "v", 0)), now).expect("no lease");
            store.back_up(now);
        }
        store
            .commit(&Txn::new().then(put("k", "v", 0)), at(250))
            .expect("no lease");
        store.restore(Duration::from_millis(age), at(300), &mut random);
        assert_eq!(store.state().revision, revision, "{age} ms");
    }
}
