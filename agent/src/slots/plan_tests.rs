use pgherd_cluster::name::Scope;
use pgherd_cluster::record::{DynamicConfig, MemberRecord, PgState};
use pgherd_cluster::view::{Epoch, Leader, Member, Revised};
use serde_json::{Value, json};

use super::*;

fn name(text: &str) -> MemberName {
    MemberName::new(text).expect("a plain name")
}

/// A cluster led by n1, seen from `me`. Everything has come to 100, and the leader's slots to 50.
fn seat(me: &str, members: &[(&str, Value)], config: Value) -> Seat {
    let mut view = View::empty(Scope::new("c").expect("a plain name"));
    let mut place = Place::default();
    for (text, tags) in members {
        let mut record = MemberRecord::new(String::new(), String::new());
        record.state = PgState::Running;
        record.xlog_location = Some(Lsn(70));
        record.tags = tags.as_object().cloned().unwrap_or_default();
        if *text == me {
            place = Place::of(&record);
        }
        let (name, mod_revision) = (name(text), 1);
        view.members.insert(
            name.clone(),
            Member {
                name,
                record,
                mod_revision,
            },
        );
    }
    let holder = name("n1");
    view.leader = Some(Leader {
        epoch: Epoch {
            holder: holder.clone(),
            create_revision: 1,
        },
        lease: 1,
        mod_revision: 1,
    });
    view.config = Revised {
        value: Some(DynamicConfig::new(config.as_object().cloned().unwrap_or_default())),
        mod_revision: 1,
    };
    let slots = members.iter().map(|(text, _)| (name(text).slot_name(), Lsn(50)));
    Seat {
        place,
        leader: Some(holder),
        settled: true,
        retained: BTreeSet::new(),
        writable: me == "n1",
        position: Lsn(100),
        leaders: slots.chain([("perm".to_owned(), Lsn(50))]).collect(),
        syncs_by_itself: false,
        me: name(me),
        view: Arc::new(view),
    }
}

fn three(me: &str, config: Value) -> Seat {
    seat(me, &[("n1", json!({})), ("n2", json!({})), ("N-3", json!({}))], config)
}

fn slot(name: &str, restart: u64) -> Slot {
    Slot {
        name: name.to_owned(),
        restart: Some(Lsn(restart)),
        ..Slot::default()
    }
}

fn logical(name: &str, confirmed: u64) -> Slot {
    Slot {
        logical: Some(("d".to_owned(), "p".to_owned())),
        confirmed: Some(Lsn(confirmed)),
        pins_rows: true,
        ..slot(name, confirmed)
    }
}

fn perm_logical() -> Value {
    json!({"slots": {"perm": {"type": "logical", "database": "d", "plugin": "p"}}})
}

fn create(name: &str) -> Action {
    Action::Create(name.to_owned())
}

fn drop(name: &str) -> Action {
    Action::Drop(name.to_owned())
}

fn advance(name: &str, to: u64) -> Action {
    Action::Advance {
        name: name.to_owned(),
        to: Lsn(to),
    }
}

#[test]
fn every_member_that_may_lead_has_a_slot_for_every_other_and_none_for_itself() {
    assert_eq!(plan(&three("n1", json!({})), &[]), [create("n2"), create("n_3")]);
    assert_eq!(plan(&three("n2", json!({})), &[]), [create("n1"), create("n_3")]);
    let nofailover = [
        ("n1", json!({})),
        ("n2", json!({"nofailover": true})),
        ("n3", json!({"replicatefrom": "n2"})),
    ];
    assert_eq!(
        plan(&seat("n2", &nofailover, json!({"slots": {"perm": null}})), &[]),
        [create("n3")]
    );
    assert_eq!(
        plan(&three("n2", json!({"member_slots_ttl": 0})), &[]),
        [],
        "as before there were spare ones"
    );
    let unused = json!({"postgresql": {"use_slots": false}, "slots": {"perm": null}});
    assert_eq!(plan(&three("n1", unused), &[]), []);
}

#[test]
fn who_takes_the_log_from_the_archive_has_no_slot() {
    let members = [("n1", json!({})), ("n2", json!({})), ("n3", json!({"nostream": true}))];
    assert_eq!(plan(&seat("n1", &members, json!({})), &[]), [create("n2")]);
    assert_eq!(
        told(&seat("n1", &members, json!({})), &[slot("n3", 5)]),
        BTreeMap::new()
    );
    assert_eq!(
        plan(&seat("n3", &members, perm_logical()), &[slot("n1", 50), slot("n2", 50)]),
        []
    );
}

#[test]
fn a_spare_slot_moves_with_the_leaders_and_never_back_or_beyond_what_is_here() {
    let mut seat = three("n2", json!({}));
    assert_eq!(plan(&seat, &[slot("n1", 40), slot("n_3", 60)]), [advance("n1", 50)]);
    seat.position = Lsn(45);
    assert_eq!(plan(&seat, &[slot("n1", 40), slot("n_3", 60)]), [advance("n1", 45)]);
    seat.leaders.clear();
    assert_eq!(plan(&seat, &[slot("n1", 40), slot("n_3", 60)]), []);
    let used = Slot {
        active: true,
        ..slot("n1", 1)
    };
    assert_eq!(plan(&three("n2", json!({})), &[used, slot("n_3", 50)]), []);
}

#[test]
fn the_slot_of_a_member_that_streams_from_another_moves_by_its_own_word() {
    let members = [
        ("n1", json!({})),
        ("n2", json!({})),
        ("n3", json!({"replicatefrom": "n2"})),
    ];
    assert_eq!(
        plan(&seat("n1", &members, json!({})), &[slot("n2", 5), slot("n3", 5)]),
        [advance("n3", 70)]
    );
    assert_eq!(
        plan(&seat("n2", &members, json!({})), &[slot("n1", 50), slot("n3", 5)]),
        [],
        "it is in use here"
    );
}

#[test]
fn the_slots_of_members_that_are_gone_are_dropped_and_those_of_late_ones_kept() {
    let mut seat = three("n1", json!({}));
    seat.retained = ["late".to_owned(), "n2".to_owned()].into();
    let mut late = slot("late", 5);
    late.pins_rows = true;
    let used = Slot {
        active: true,
        ..slot("used", 5)
    };
    let slots = [slot("n2", 5), slot("n_3", 5), late, slot("gone", 5), used];
    assert_eq!(plan(&seat, &slots), [drop("gone")]);
    seat.settled = false;
    assert_eq!(
        plan(&seat, &slots),
        [],
        "nothing is dropped while who leads is not certain"
    );
    assert_eq!(plan(&three("n1", json!({"pause": true})), &slots[..2]), []);
    assert_eq!(
        plan(&three("n1", json!({"pause": true})), &slots),
        [],
        "nor in maintenance"
    );
}

#[test]
fn without_a_configuration_nothing_is_known_to_be_unwanted() {
    let mut seat = three("n1", json!({}));
    let mut view = (*seat.view).clone();
    view.config.value = None;
    seat.view = Arc::new(view);
    assert_eq!(plan(&seat, &[slot("perm", 5)]), []);
}

#[test]
fn ignored_slots_are_left_alone_by_any_attribute() {
    let slots = [slot("n2", 5), slot("n_3", 5), logical("a", 5), slot("b", 5)];
    for pattern in [
        json!({"name": "a"}),
        json!({"type": "logical"}),
        json!({"database": "d"}),
        json!({"plugin": "p"}),
    ] {
        let mut replica = three("n1", json!({"ignore_slots": [pattern]}));
        replica.me = name("n9");
        replica.writable = false;
        replica.retained = ["n2".to_owned(), "n_3".to_owned()].into();
        let dropped: Vec<Action> = plan(&replica, &slots)
            .into_iter()
            .filter(|action| matches!(action, Action::Drop(_)))
            .collect();
        assert_eq!(dropped, [drop("b")]);
    }
}

#[test]
fn logical_slots_that_nobody_asked_for_stay_on_the_leader_and_go_from_a_replica() {
    let here = |me: &str| {
        let others = if me == "n1" { "n2" } else { "n1" };
        plan(
            &three(me, json!({})),
            &[slot(others, 50), slot("n_3", 50), logical("app", 5), logical("perm", 5)],
        )
    };
    assert_eq!(here("n1"), [drop("perm")], "which was a permanent one until now");
    assert_eq!(here("n2"), [drop("app"), drop("perm")]);
}

#[test]
fn failover_slots_are_dropped_only_where_they_are_in_the_way_of_postgresqls_own_copies() {
    let failover = Slot {
        failover: true,
        ..logical("app", 5)
    };
    let synced = Slot {
        synced: true,
        ..failover.clone()
    };
    let mut replica = three("n2", json!({}));
    let others = [slot("n1", 50), slot("n_3", 50)];
    let with = |slot: &Slot| [others.as_slice(), std::slice::from_ref(slot)].concat();
    assert_eq!(plan(&replica, &with(&failover)), []);
    replica.syncs_by_itself = true;
    assert_eq!(plan(&replica, &with(&failover)), [], "the leader has none of that name");
    let mut view = (*replica.view).clone();
    view.status.pgherd.failover_slots = vec!["app".to_owned()];
    replica.view = Arc::new(view);
    assert_eq!(plan(&replica, &with(&failover)), [drop("app")]);
    assert_eq!(plan(&replica, &with(&synced)), []);
    assert_eq!(failover_slots(&with(&synced)), BTreeSet::from(["app".to_owned()]));
    assert_eq!(
        lacking(&["app".to_owned(), "b".to_owned()], &failover_slots(&with(&synced))),
        ["b"]
    );
}

#[test]
fn a_permanent_logical_slot_is_made_on_the_leader_and_copied_to_the_others() {
    let members = [slot("n2", 50), slot("n_3", 50)];
    let make = |had, failover| Action::CreateLogical {
        name: "perm".to_owned(),
        database: "d".to_owned(),
        plugin: "p".to_owned(),
        failover,
        had,
    };
    let mut leader = three("n1", perm_logical());
    assert_eq!(plan(&leader, &members), [make(true, false)], "the leader before had it");
    leader.leaders.remove("perm");
    assert_eq!(plan(&leader, &members), [make(false, false)]);
    leader.syncs_by_itself = true;
    assert_eq!(plan(&leader, &members), [make(false, true)]);

    let members = [slot("n1", 50), slot("n_3", 50)];
    let mut replica = three("n2", perm_logical());
    assert_eq!(plan(&replica, &members), [Action::Copy("perm".to_owned())]);
    replica.syncs_by_itself = true;
    assert_eq!(plan(&replica, &members), [], "PostgreSQL does it");
    replica.syncs_by_itself = false;
    replica.leaders.remove("perm");
    assert_eq!(plan(&replica, &members), [], "the leader has not made it yet");
    let standby = json!({"standby_cluster": {"host": "x"}, "slots": {"perm": {"database": "d", "plugin": "p"}}});
    assert_eq!(plan(&three("n2", standby), &members), []);
}

#[test]
fn a_copy_of_a_logical_slot_moves_in_strides_as_far_as_its_consumer_and_the_replay_have_come() {
    let members = [slot("n1", 50), slot("n_3", 50)];
    let with = |slot: Slot| [members.as_slice(), &[slot]].concat();
    let to = |to: u64, stride: u64| Action::AdvanceLogical {
        name: "perm".to_owned(),
        to: Lsn(to),
        stride: Lsn(stride),
    };
    let mut seat = three("n2", perm_logical());
    assert_eq!(plan(&seat, &with(logical("perm", 40))), [to(50, 50)]);
    assert_eq!(plan(&seat, &with(logical("perm", 50))), []);
    seat.position = Lsn(45);
    assert_eq!(plan(&seat, &with(logical("perm", 40))), [to(45, 45)]);
    (seat.position, seat.settled) = (Lsn(u64::MAX), false);
    seat.leaders.insert("perm".to_owned(), Lsn(1 << 40));
    assert_eq!(
        plan(&seat, &with(logical("perm", 40))),
        [to(1 << 40, 40 + STRIDE_BYTES)],
        "without etcd too"
    );
    assert_eq!(
        plan(
            &three("n1", perm_logical()),
            &[slot("n2", 5), slot("n_3", 5), logical("perm", 4)]
        ),
        []
    );
}

#[test]
fn a_slot_of_another_kind_or_without_what_it_needs_is_made_anew() {
    let seat = three("n1", json!({"slots": {"perm": {"database": "other", "plugin": "p"}}}));
    let lost = Slot {
        lost: true,
        ..slot("n2", 5)
    };
    let empty = Slot {
        restart: None,
        ..slot("n_3", 5)
    };
    let renew = |name: &str| Action::Renew(name.to_owned());
    assert_eq!(
        plan(&seat, &[lost, empty, logical("perm", 5)]),
        [renew("n2"), renew("n_3"), drop("perm")]
    );
}

#[test]
fn an_unused_slot_of_a_former_leader_keeps_no_old_rows() {
    let pins = |name: &str| Slot {
        pins_rows: true,
        ..slot(name, 50)
    };
    let renew = |name: &str| Action::Renew(name.to_owned());
    let slots = [pins("n1"), pins("n_3"), pins("perm")];
    let config = json!({"slots": {"perm": null}});
    assert_eq!(
        plan(&three("n2", config.clone()), &slots),
        [renew("n1"), renew("n_3"), renew("perm")]
    );
    let on_the_leader = [pins("n2"), pins("n_3"), pins("perm")];
    assert_eq!(
        plan(&three("n1", config), &on_the_leader),
        [],
        "whose standbys are away for a moment"
    );
}

#[test]
fn a_leader_tells_of_the_slots_that_are_wanted() {
    let mut config = perm_logical();
    let slots = [slot("n2", 5), slot("n_3", 6), logical("perm", 7), logical("app", 8)];
    let names = |config: &Value| {
        told(&three("n1", config.clone()), &slots)
            .into_keys()
            .collect::<Vec<_>>()
    };
    assert_eq!(names(&config), ["n2", "n_3", "perm"]);
    config["member_slots_ttl"] = json!(0);
    assert_eq!(names(&config), ["perm"]);
}
