use std::time::Duration;

use super::*;
use crate::name::Timeline;
use crate::timing::LeaseTiming;

/// Values captured from a live Patroni 4.1.4 cluster must come back byte for byte.
#[test]
fn patronis_member_records_survive_a_round_trip() {
    for text in [
        r#"{"conn_url":"postgres://127.0.3.1:23432/postgres","api_url":"http://127.0.3.1:23008/patroni","state":"running","role":"primary","version":"4.1.4","xlog_location":67108960,"timeline":1}"#,
        r#"{"conn_url":"postgres://127.0.3.2:23432/postgres","api_url":"http://127.0.3.2:23008/patroni","state":"running","role":"replica","version":"4.1.4","tags":{"clonefrom":true,"my_tag":"abc"},"xlog_location":67108960,"replay_lsn":67108960,"receive_lsn":67108960,"replication_state":"streaming","timeline":1}"#,
        r#"{"conn_url":"postgres://h:1/postgres","api_url":"http://h:2/patroni","state":"running","role":"promoted","version":"4.1.4","checkpoint_after_promote":false,"xlog_location":67567016,"timeline":3}"#,
        r#"{"conn_url":"postgres://h:1/postgres","api_url":"http://h:2/patroni","state":"stopped","role":"primary","version":"4.1.4","pause":true}"#,
    ] {
        let record = MemberRecord::parse(text);
        assert_eq!(serde_json::to_string(&record).expect("a record is JSON"), text);
    }
}

#[test]
fn master_is_read_as_primary_and_written_as_primary() {
    let record = MemberRecord::parse(r#"{"conn_url":"a","api_url":"b","state":"running","role":"master"}"#);
    assert_eq!(record.role, Role::Primary);
    assert!(
        serde_json::to_string(&record)
            .expect("a record is JSON")
            .contains(r#""role":"primary""#)
    );
}

#[test]
fn odd_member_records_lose_a_field_and_not_the_member() {
    let record = MemberRecord::parse(
        r#"{"conn_url":"postgres://h:1/p","api_url":"u","state":"dancing","role":"jester","timeline":"x","tags":7,"new":1}"#,
    );
    assert_eq!(
        (record.state, record.role, record.timeline),
        (PgState::Unknown, Role::Unknown, None)
    );
    assert_eq!(
        record.postgres_address(),
        Some(Address {
            host: "h".into(),
            port: 1
        })
    );
    assert_eq!(MemberRecord::parse("rubbish").conn_url, "");
    let ancient =
        MemberRecord::parse("postgres://u:p@10.0.0.1:5433/postgres?application_name=http://10.0.0.1:8008/patroni");
    assert_eq!(
        ancient.postgres_address(),
        Some(Address {
            host: "10.0.0.1".into(),
            port: 5433
        })
    );
    assert_eq!(
        ancient.api_address(),
        Some(Address {
            host: "10.0.0.1".into(),
            port: 8008
        })
    );
}

#[test]
fn addresses_of_every_family_are_read() {
    let parse = |text: &str| Address::parse(text, 5432).map(|address| (address.host, address.port));
    assert_eq!(parse("h:1"), Some(("h".into(), 1)));
    assert_eq!(parse("h"), Some(("h".into(), 5432)));
    assert_eq!(parse("[::1]:7"), Some(("::1".into(), 7)));
    assert_eq!(parse("[::1]"), Some(("::1".into(), 5432)));
    assert_eq!(parse("fe80::1"), Some(("fe80::1".into(), 5432)));
    assert_eq!(parse("h:70000"), None);
    assert_eq!(parse(""), None);
    assert_eq!(
        Address {
            host: "::1".into(),
            port: 7
        }
        .to_string(),
        "[::1]:7"
    );
}

#[test]
fn tags_decide_who_may_lead() {
    let with = |tags: &str| {
        MemberRecord::parse(&format!(
            r#"{{"conn_url":"a","api_url":"b","state":"running","role":"replica","tags":{tags}}}"#
        ))
    };
    assert!(with(r#"{"nofailover":true}"#).nofailover());
    assert!(with(r#"{"nofailover":"yes"}"#).nofailover());
    assert!(with(r#"{"failover_priority":0}"#).nofailover());
    assert!(with(r#"{"failover_priority":"-1"}"#).nofailover());
    assert!(!with(r#"{"nofailover":false,"failover_priority":0}"#).nofailover());
    assert!(!with("{}").nofailover());
}

#[test]
fn status_is_read_in_all_its_forms() {
    let text = r#"{"optime":67108960,"slots":{"node1":67108960,"node2":67108960},"retain_slots":["node1","node2"]}"#;
    let status = Status::parse(text);
    assert_eq!(serde_json::to_string(&status).expect("a status is JSON"), text);
    assert_eq!(Status::parse("67108960").optime, Some(Lsn(67_108_960)));
    let texts = r#"{"optime":5,"slots":"{\"a\":7}","retain_slots":"[\"a\"]"}"#;
    assert_eq!(Status::parse(texts).slots.get("a"), Some(&Lsn(7)));
    assert_eq!(Status::parse(texts).retain_slots, ["a"]);
    assert_eq!(Status::parse("junk"), Status::default());
}

#[test]
fn sync_is_written_with_nulls_and_compared_without_case() {
    let text = r#"{"leader":"node3","quorum":0,"sync_standby":null}"#;
    let sync: SyncState = serde_json::from_str(text).expect("a captured value");
    assert!(sync.is_active());
    assert_eq!(serde_json::to_string(&sync).expect("it is JSON"), text);
    let sync: SyncState =
        serde_json::from_str(r#"{"leader":"a","quorum":1,"sync_standby":"Node2,node3"}"#).expect("JSON");
    assert!(sync.lists(&MemberName::new("node2").expect("a plain name")));
    assert!(!sync.lists(&MemberName::new("node").expect("a plain name")));
}

#[test]
fn a_failover_request_is_nothing_when_cleared() {
    assert_eq!(FailoverRequest::parse("{}"), None);
    assert_eq!(FailoverRequest::parse(""), None);
    let request = FailoverRequest::parse(r#"{"leader":"node3","member":"node2"}"#).expect("a request");
    assert_eq!(
        (request.leader.as_deref(), request.member.as_deref()),
        (Some("node3"), Some("node2"))
    );
    assert_eq!(
        FailoverRequest::parse("a:b").and_then(|request| request.member),
        Some("b".to_owned())
    );
}

#[test]
fn history_keeps_short_rows_short() {
    let text =
        r#"[[1,67533552,"no recovery target specified","2026-11-20T23:47:37.317976+00:00","node3"],[2,67562736,"x"]]"#;
    let history = History::parse(text);
    assert_eq!(history.to_json().to_string(), text);
    assert_eq!(history.timeline(), Timeline(3));
    assert_eq!(History::parse("[]").timeline(), Timeline(1));
}

#[test]
fn the_dynamic_configuration_keeps_what_it_does_not_know() {
    let text = r#"{"ttl":30,"zebra":{"a":1},"loop_wait":10,"retry_timeout":10}"#;
    let config = DynamicConfig::parse(text);
    assert_eq!(Value::Object(config.document().clone()).to_string(), text);
    assert_eq!(config.timing(), Ok(LeaseTiming::PATRONI_DEFAULT));
    assert_eq!(
        DynamicConfig::parse(r#"{"member_slots_ttl":"5min"}"#).member_slots_ttl(),
        Duration::from_secs(300)
    );
    for (text, expected) in [
        (r#"{"primary_stop_timeout":15}"#, Some(15)),
        (r#"{"master_stop_timeout":"1min"}"#, Some(60)),
        (r#"{"primary_stop_timeout":0}"#, None),
        ("{}", None),
    ] {
        let limit = DynamicConfig::parse(text).primary_stop_timeout();
        assert_eq!(limit, expected.map(Duration::from_secs), "{text}");
    }
    assert!(DynamicConfig::parse(r#"{"pause":"on"}"#).is_paused());
    assert!(DynamicConfig::parse(r#"{"ttl":3,"loop_wait":10}"#).timing().is_err());
}

#[test]
fn times_and_timelines_without_end_have_one_here() {
    let most = u64::MAX;
    let text = format!(
        r#"{{"ttl":{most},"loop_wait":"{most}","retry_timeout":{most},"primary_start_timeout":"200000000000d"}}"#
    );
    let config = DynamicConfig::parse(&text);
    let timing = config.timing_in_force();
    assert!(timing.loop_wait() + 2 * timing.retry_timeout() <= timing.ttl());
    let century = Duration::from_secs(100 * 365 * 24 * 3600);
    assert_eq!((timing.ttl(), config.primary_start_timeout()), (century, century));
    assert_eq!(History::parse(r#"[[4294967295,1,"x"]]"#).timeline(), Timeline(u32::MAX));
}
