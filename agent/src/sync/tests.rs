//! What the pure core answers, and that no order of events loses an acknowledged commit.

mod elections;
mod model;
mod names;
mod priority;
mod quorum;
mod world;

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::record::DynamicConfig;

use super::*;

const NOW: Lsn = Lsn(1000);

fn name(text: &str) -> MemberName {
    MemberName::new(text).expect("test names are well-formed")
}

fn set(names: &[&str]) -> NameSet {
    names.iter().map(|name| StandbyName::from(*name)).collect()
}

fn guc(text: &str) -> SyncNames {
    SyncNames::parse(text).expect("test values are well-formed")
}

fn state(leader: &str, quorum: usize, standbys: &[&str]) -> SyncState {
    record(&name(leader), quorum, &set(standbys))
}

fn standby(text: &str) -> Standby {
    Standby {
        name: StandbyName::from(text),
        running: true,
        nosync: false,
        sync_priority: 1,
        nofailover: false,
        replicatefrom: None,
    }
}

fn sender(text: &str, at: u64, sync_state: SyncRank) -> Sender {
    let position = Some(Lsn(at));
    Sender {
        application_name: StandbyName::from(text),
        pid: 1,
        state: "streaming".to_owned(),
        sync_state,
        sent: position,
        write: position,
        flush: position,
        replay: position,
        stale: false,
    }
}

/// A leader `n1` with the members `n2` and `n3`, nobody streaming, at [`NOW`], where the setting came into force.
fn leader(mode: SyncMode, state: SyncState, configured: &str) -> SyncInputs {
    SyncInputs {
        me: name("n1"),
        settings: SyncSettings {
            mode,
            ..SyncSettings::default()
        },
        state,
        sync_revision: 7,
        configured: guc(configured),
        user_names: SyncNames::Off,
        senders: vec![],
        members: vec![standby("n1"), standby("n2"), standby("n3")],
        running: true,
        flush_lsn: NOW,
        guc_changed_at: Some(NOW),
        waited: false,
        commit_level: CommitLevel::Flush,
    }
}

fn write(leader: &str, quorum: usize, standbys: &[&str]) -> Option<SyncStep> {
    Some(SyncStep::WriteSync {
        state: state(leader, quorum, standbys),
        revision: 7,
    })
}

fn set_names(text: &str) -> Option<SyncStep> {
    Some(SyncStep::SetNames(guc(text)))
}

fn step(inputs: &SyncInputs) -> Option<SyncStep> {
    next_step(inputs).map(|next| next.step)
}

fn reason(inputs: &SyncInputs) -> Option<SyncReason> {
    next_step(inputs).map(|next| next.reason)
}

#[test]
fn settings_are_read_as_patroni_reads_them() {
    let of = |text: &str| SyncSettings::of(&DynamicConfig::parse(text));
    assert_eq!(of("{}"), SyncSettings::default());
    for on in ["true", "\"on\"", "\"True\""] {
        assert_eq!(
            of(&format!("{{\"synchronous_mode\":{on}}}")).mode,
            SyncMode::Priority,
            "{on}"
        );
    }
    for off in ["false", "\"off\"", "null", "[]"] {
        assert_eq!(
            of(&format!("{{\"synchronous_mode\":{off}}}")).mode,
            SyncMode::Off,
            "{off}"
        );
    }
    assert_eq!(of(r#"{"synchronous_mode":"Quorum"}"#).mode, SyncMode::Quorum);
    let followed = of(r#"{"synchronous_mode":true,"standby_cluster":{"host":"x"}}"#);
    assert_eq!(followed.mode, SyncMode::Off);
    let all = of(
        r#"{"synchronous_mode":"quorum","synchronous_mode_strict":"on","synchronous_node_count":"2","maximum_lag_on_syncnode":1024}"#,
    );
    assert!(all.strict && all.node_count == 2 && all.lag_max == Some(1024));
    let odd = of(r#"{"synchronous_node_count":0,"maximum_lag_on_syncnode":-1}"#);
    assert!(odd.node_count == 1 && odd.lag_max.is_none());
}

#[test]
fn tags_decide_who_may_be_synchronous() {
    let of = |tags: &str| {
        let text = format!(r#"{{"conn_url":"","api_url":"","state":"running","role":"replica","tags":{tags}}}"#);
        Standby::of(&name("n2"), &MemberRecord::parse(&text))
    };
    assert!(!of("{}").nosync && of("{}").sync_priority == 1 && of("{}").running);
    assert!(of(r#"{"nosync":true}"#).nosync && of(r#"{"sync_priority":0}"#).nosync);
    assert!(!of(r#"{"nosync":false,"sync_priority":0}"#).nosync, "the boolean wins");
    assert_eq!(of(r#"{"sync_priority":"5"}"#).sync_priority, 5);
    assert_eq!(
        of(r#"{"replicatefrom":"n3"}"#).replicatefrom,
        Some(StandbyName::from("n3"))
    );
}

#[test]
fn a_mode_that_is_turned_off_ends_the_record_before_the_waiting() {
    let mut inputs = leader(SyncMode::Off, state("n1", 0, &["n2"]), "n2");
    inputs.user_names = guc("archive");
    assert_eq!(step(&inputs), Some(SyncStep::DeleteSync { revision: 7 }));
    inputs.state = SyncState::default();
    assert_eq!(step(&inputs), set_names("archive"));
    inputs.configured = guc("archive");
    assert_eq!(step(&inputs), None);
    inputs.configured = guc("n2");
    inputs.running = false;
    assert_eq!(step(&inputs), None, "only a running primary is managed");
}

#[test]
fn a_walsender_that_owes_an_acknowledgement_for_too_long_is_lost() {
    let (limit, at) = (Duration::from_secs(2), |secs: u64| {
        Boottime::from_nanos(secs * 1_000_000_000)
    });
    let mut seen = Acknowledgements::default();
    let mut senders = [sender("n2", 100, SyncRank::Sync)];
    seen.note(&mut senders, at(1), limit);
    senders[0].sent = Some(Lsn(200));
    seen.note(&mut senders, at(50), limit);
    seen.note(&mut senders, at(52), limit);
    assert!(
        !is_lost(&StandbyName::from("N2"), &senders),
        "owed since it was first seen to be"
    );
    senders[0].flush = Some(Lsn(150));
    seen.note(&mut senders, at(53), limit);
    seen.note(&mut senders, at(55), limit);
    assert!(senders[0].streams(), "it advances");
    seen.note(&mut senders, at(56), limit);
    assert!(is_lost(&StandbyName::from("n2"), &senders));
    senders[0].flush = Some(Lsn(200));
    seen.note(&mut senders, at(57), limit);
    assert!(senders[0].streams());
    senders[0].state = "catchup".to_owned();
    assert!(is_lost(&StandbyName::from("n2"), &senders) && is_lost(&StandbyName::from("n3"), &[]));
}
