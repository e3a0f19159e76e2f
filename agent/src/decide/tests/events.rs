//! What is worth an event, and what is measured of a change of the leader.

use pgherd_cluster::event::{Kind, phase};
use pgherd_cluster::record::SyncState;

use super::*;
use crate::journal::{Draft, News, Stopwatch, kind_of};

fn told(drafts: &[Draft]) -> Vec<(Kind, &str)> {
    drafts.iter().map(|draft| (draft.kind(), draft.what())).collect()
}

fn leads() -> Observation {
    Observation {
        postgres: primary(),
        ..seen(LeaseSeen::Mine(epoch("n1")))
    }
}

fn proven() -> Memory {
    Memory {
        proven: Some(epoch("n1")),
        ..Memory::default()
    }
}

#[test]
fn nothing_is_news_at_the_first_look_nor_while_nothing_changes() {
    let mut news = News::default();
    for _ in 0..100 {
        assert_eq!(news.note(&leads(), &proven()), []);
    }
}

#[test]
fn a_change_of_role_is_told_once_and_what_lies_on_the_way_is_not() {
    let mut news = News::default();
    let standby = seen(LeaseSeen::Theirs(epoch("n2")));
    assert_eq!(news.note(&standby, &Memory::default()), []);
    // It holds the key and is primary, and has taken no write: promoted.
    assert_eq!(news.note(&leads(), &Memory::default()), []);
    let drafts = news.note(&leads(), &proven());
    assert_eq!(told(&drafts), [(Kind::Role, "n1 is primary now, and was replica")]);
    assert_eq!(news.note(&leads(), &proven()), []);
}

#[test]
fn the_leader_tells_what_all_see_and_the_others_do_not() {
    let change = |seen: Observation| {
        with_view(seen, |view| {
            view.sync = Revised {
                value: SyncState {
                    leader: Some("n1".to_owned()),
                    quorum: 0,
                    sync_standby: Some("n2".to_owned()),
                },
                mod_revision: 40,
            };
            let config = json!({"pause": true, "ttl": 20, "standby_cluster": {"password": "secret"}});
            view.config = Revised {
                value: Some(DynamicConfig::new(config.as_object().cloned().unwrap_or_default())),
                mod_revision: 41,
            };
        })
    };
    let mut news = News::default();
    news.note(&leads(), &proven());
    let drafts = news.note(&change(leads()), &proven());
    let expected = [
        (Kind::Sync, "/sync lists n2, and listed nobody"),
        (Kind::Operator, "the cluster is paused"),
        (
            Kind::Configuration,
            "the dynamic configuration has changed: ttl, standby_cluster",
        ),
    ];
    assert_eq!(told(&drafts), expected);
    assert!(!format!("{drafts:?}").contains("secret"));

    let replica = || seen(LeaseSeen::Theirs(epoch("n2")));
    let mut news = News::default();
    news.note(&replica(), &Memory::default());
    assert_eq!(news.note(&change(replica()), &Memory::default()), []);
}

#[test]
fn a_fence_of_the_keepers_is_told_with_the_holding_that_it_ended() {
    let mut news = News::default();
    news.note(&leads(), &proven());
    let fenced = Observation {
        postgres: Postgres::Down,
        fenced_term: Some(7),
        ..seen(LeaseSeen::Unknown)
    };
    let drafts = news.note(&fenced, &proven());
    assert!(drafts.iter().any(|draft| draft.kind() == Kind::Fence), "{drafts:?}");
    assert!(
        news.note(&fenced, &proven())
            .iter()
            .all(|draft| draft.kind() != Kind::Fence)
    );
}

#[test]
fn everyday_reasons_are_no_events() {
    for reason in [
        Reason::Leading,
        Reason::Following(name("n2")),
        Reason::Polling,
        Reason::Paused,
    ] {
        assert_eq!(kind_of(&reason), None, "{reason}");
    }
    assert_eq!(kind_of(&Reason::LostLease), Some(Kind::Fence));
    assert_eq!(kind_of(&Reason::HandoverFailed("no".to_owned())), Some(Kind::Refusal));
}

#[test]
fn an_election_is_measured_from_the_last_commit_to_the_first_write() {
    let at = |millis| NOW + Duration::from_millis(millis);
    let standby = |lease, streams: Option<&str>| {
        let WalStatus::Standby {
            received,
            replayed,
            paused,
            latest_end,
            ..
        } = standby_wal(100)
        else {
            unreachable!("a standby");
        };
        let replayed_at = Some("2026-11-20 23:44:29.300+00:00".to_owned());
        let wal = WalStatus::Standby {
            received,
            replayed,
            replayed_at,
            paused,
            latest_end,
        };
        Observation {
            postgres: server(wal, streams),
            ..seen(lease)
        }
    };
    let mut watch = Stopwatch::default();
    let memory = Memory::default();
    watch.note(
        &standby(LeaseSeen::Theirs(epoch("n2")), Some("streaming")),
        &memory,
        at(0),
    );
    watch.note(&standby(LeaseSeen::Theirs(epoch("n2")), None), &memory, at(400));
    watch.note(&standby(LeaseSeen::Free, None), &memory, at(1000));
    watch.note(&standby(LeaseSeen::Free, None), &memory, at(1010));
    watch.mark(phase::BID_WON, at(1050));
    watch.mark(phase::PROMOTE, at(1051));
    watch.mark(phase::WRITABLE, at(1500));
    // 23:44:30.500
    let measured = watch.take(at(1600), 1_795_218_270_500);
    assert_eq!(measured.former, Some(epoch("n2")));
    assert!(!measured.in_place);
    let told: Vec<(&str, u64)> = measured
        .phases
        .iter()
        .map(|phase| (phase.name.as_str(), phase.at_ms - 1_795_218_269_000))
        .collect();
    let expected = [
        (phase::STREAM_LOST, 300),
        (phase::LAST_COMMIT, 300),
        (phase::LEASE_FREE, 900),
        (phase::BID_WON, 950),
        (phase::PROMOTE, 951),
        (phase::WRITABLE, 1400),
    ];
    assert_eq!(told, expected);
    assert!(watch.take(at(1700), 5).phases.is_empty(), "it begins anew");
}

#[test]
fn who_has_just_taken_the_lead_tells_of_the_holding_before_its_own() {
    let mut watch = Stopwatch::default();
    watch.note(&seen(LeaseSeen::Theirs(epoch("n2"))), &Memory::default(), NOW);
    watch.note(&seen(LeaseSeen::Free), &Memory::default(), NOW);
    watch.mark(phase::WRITABLE, NOW);
    watch.note(&leads(), &proven(), NOW);
    assert_eq!(watch.take(NOW, 0).former, Some(epoch("n2")));
    watch.note(&leads(), &proven(), NOW);
    watch.mark(phase::WRITABLE, NOW);
    assert_eq!(watch.take(NOW, 0).former, Some(epoch("n1")));
}

#[test]
fn a_leader_that_dies_and_restarts_in_place_is_measured_from_its_death() {
    let mut watch = Stopwatch::default();
    watch.note(&leads(), &proven(), NOW);
    let down = Observation {
        postgres: Postgres::Down,
        ..leads()
    };
    watch.note(&down, &proven(), NOW);
    watch.mark(phase::START, NOW);
    watch.mark(phase::WRITABLE, NOW);
    let measured = watch.take(NOW, 1_795_218_270_500);
    let names: Vec<&str> = measured.phases.iter().map(|phase| phase.name.as_str()).collect();
    assert_eq!((names, measured.in_place), (vec!["died", "start", "writable"], true));
}
