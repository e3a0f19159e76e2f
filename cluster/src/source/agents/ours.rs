//! What our agents say of a cluster, written and read in one place. Pure.

use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::event::{Event, Kind};
use crate::name::{MemberName, Scope};
use crate::record::{DynamicConfig, FailoverRequest, MemberRecord, Status, SyncState};
use crate::timing::LeaseTiming;
use crate::view::{Epoch, Leader, Member, Revised, View};

/// How many events a view is told with: those of a change of the leader, by all who took part.
const ENDS_TOLD: usize = 8;

/// What a view is to somebody who routes by it. `age` is how long ago the store was last heard, which a relay passes on;
/// `in_touch` is whether it is being followed.
#[must_use]
pub fn view_document(view: &View, age: Option<Duration>, in_touch: bool) -> Value {
    json!({
        "revision": view.revision,
        "scope": view.scope,
        "leader": view.epoch().map(|epoch| &epoch.holder),
        "epoch": view.epoch().map(|epoch| json!({
            "holder": epoch.holder,
            "create_revision": epoch.create_revision,
        })),
        "members": view.members.values().map(|one| member(view, one)).collect::<Vec<_>>(),
        "sync": view.sync.value,
        "optime": view.status.optime,
        "timing": times(view.timing()),
        "pause": view.config.value.as_ref().is_some_and(|config| config.is_paused()),
        "failover": view.failover.value,
        "events": ends(view),
        "age_ms": age.map(millis),
        "in_touch": in_touch,
    })
}

/// The last that ended a holding of the leader key, which clients are told the names of.
fn ends(view: &View) -> Vec<Value> {
    let ends = view.events.iter().rev();
    let ends = ends.filter(|event| event.from.is_some() && event.kind != Kind::Refusal);
    ends.take(ENDS_TOLD).map(|event| event.to_json()).collect()
}

fn member(view: &View, member: &Member) -> Value {
    let record = &member.record;
    json!({
        "name": member.name,
        "role": record.role,
        "shown_role": view.shown_role(member).as_str(),
        "state": record.state,
        "replication_state": record.replication_state,
        "timeline": record.timeline,
        "lsn": record.xlog_location,
        "replay_lsn": record.replay_lsn,
        "receive_lsn": record.receive_lsn,
        "conn_url": record.conn_url,
        "api_url": record.api_url,
        "tags": record.tags,
        "pgherd": record.pgherd,
        // Evidence of writability counts only when it was written under the present holding of the key.
        "mod_revision": member.mod_revision,
    })
}

fn times(timing: LeaseTiming) -> Value {
    json!({
        "ttl_ms": millis(timing.ttl()),
        "loop_wait_ms": millis(timing.loop_wait()),
        "retry_timeout_ms": millis(timing.retry_timeout()),
    })
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A view that was told.
#[derive(Debug)]
pub(super) struct Told {
    pub(super) view: View,
    /// The age of what it rests on.
    pub(super) age: Duration,
    /// Whether the teller follows the store.
    pub(super) in_touch: bool,
}

#[derive(Deserialize)]
struct Document {
    revision: i64,
    scope: String,
    epoch: Option<Holding>,
    members: Vec<Value>,
    #[serde(default)]
    sync: SyncState,
    optime: Option<u64>,
    timing: Times,
    #[serde(default)]
    pause: bool,
    failover: Option<FailoverRequest>,
    #[serde(default)]
    events: Vec<Value>,
    age_ms: Option<u64>,
    #[serde(default)]
    in_touch: bool,
}

#[derive(Deserialize)]
struct Holding {
    holder: MemberName,
    create_revision: i64,
}

#[derive(Deserialize)]
struct Times {
    ttl_ms: u64,
    loop_wait_ms: u64,
    retry_timeout_ms: u64,
}

/// Who does not say how old its word is has heard nothing for longer than anybody waits.
const AGE_UNTOLD: Duration = Duration::from_secs(3600);

/// Reads what [`view_document`] writes.
///
/// # Errors
/// When it is something else, another cluster's, or from somebody who knows nothing yet.
pub(super) fn read(text: &str, scope: &Scope) -> Result<Told, String> {
    let document: Document = serde_json::from_str(text).map_err(|error| format!("it tells no view: {error}"))?;
    if document.scope != scope.as_str() {
        return Err(format!("it is of the cluster {:?}", document.scope));
    }
    if document.revision == 0 {
        return Err("it knows nothing of the cluster yet".to_owned());
    }
    let mut view = View::empty(scope.clone());
    view.revision = document.revision;
    view.leader = document.epoch.map(|holding| Leader {
        mod_revision: holding.create_revision,
        lease: 0,
        epoch: Epoch {
            holder: holding.holder,
            create_revision: holding.create_revision,
        },
    });
    let members = document.members.into_iter().filter_map(read_member);
    view.members = members.map(|member| (member.name.clone(), member)).collect();
    view.sync.value = document.sync;
    view.status = Status::parse(&json!({"optime": document.optime}).to_string());
    view.failover.value = document.failover;
    let events = document.events.iter().take(ENDS_TOLD);
    view.events = events.filter_map(Event::parse).collect();
    view.config = Revised {
        value: Some(config(&document.timing, document.pause)),
        mod_revision: document.revision,
    };
    Ok(Told {
        view,
        age: document.age_ms.map_or(AGE_UNTOLD, Duration::from_millis),
        in_touch: document.in_touch,
    })
}

fn read_member(value: Value) -> Option<Member> {
    let name = MemberName::new(value.get("name")?.as_str()?).ok()?;
    let mod_revision = value.get("mod_revision")?.as_i64()?;
    let Value::Object(mut fields) = value else { return None };
    if let Some(position) = fields.remove("lsn") {
        fields.insert("xlog_location".to_owned(), position);
    }
    let record: MemberRecord = serde_json::from_value(Value::Object(fields)).ok()?;
    Some(Member {
        name,
        record,
        mod_revision,
    })
}

/// The times are those in force, whichever members are about.
fn config(times: &Times, pause: bool) -> DynamicConfig {
    let seconds = |millis: u64| millis.div_ceil(1000);
    let document = json!({
        "ttl": seconds(times.ttl_ms),
        "loop_wait": seconds(times.loop_wait_ms),
        "retry_timeout": seconds(times.retry_timeout_ms),
        "pause": pause,
    });
    DynamicConfig::parse(&document.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::Keys;
    use crate::view::Entry;

    fn scope() -> Scope {
        Scope::new("c").expect("a plain name")
    }

    fn view() -> View {
        let entry = |key: &str, value: &str, create_revision, mod_revision| Entry {
            key: format!("/service/c/{key}"),
            value: value.to_owned(),
            create_revision,
            mod_revision,
            lease: 1,
        };
        let n1 = r#"{"conn_url":"postgres://h1:1/p","api_url":"http://h1:2/patroni","state":"running","role":"primary","timeline":3,"xlog_location":99,"pgherd":"0.1.0","tags":{"zone":"a"}}"#;
        let n2 = r#"{"conn_url":"postgres://h2:1/p","api_url":"http://h2:2/patroni","state":"running","role":"replica","replication_state":"streaming","replay_lsn":90,"receive_lsn":95,"pgherd":"0.1.0"}"#;
        let entries = vec![
            entry("leader", "n1", 10, 12),
            entry("members/n1", n1, 1, 11),
            entry("members/n2", n2, 1, 5),
            entry("config", r#"{"ttl":5,"loop_wait":1,"retry_timeout":2}"#, 1, 1),
            entry("status", r#"{"optime":99}"#, 1, 1),
            entry("sync", r#"{"leader":"n1","sync_standby":"n2"}"#, 1, 1),
        ];
        View::from_entries(scope(), &Keys::new("service", &scope()), entries, 50)
    }

    #[test]
    fn what_is_written_is_read_again() {
        let original = view();
        let text = view_document(&original, Some(Duration::from_millis(12)), true).to_string();
        let told = read(&text, &scope()).expect("a view");
        assert_eq!((told.age, told.in_touch), (Duration::from_millis(12), true));
        let read = told.view;
        assert_eq!(read.members, original.members);
        assert!(read.leader.is_some() && read.writable_leader().is_some());
        assert_eq!(read.epoch(), original.epoch());
        assert_eq!(
            (read.timing(), read.status, read.sync.value, read.revision),
            (
                original.timing(),
                original.status.clone(),
                original.sync.value.clone(),
                50
            )
        );
    }

    #[test]
    fn another_clusters_view_and_no_view_are_refused() {
        let other = Scope::new("d").expect("a plain name");
        let text = view_document(&view(), None, true).to_string();
        assert!(
            read(&text, &other)
                .expect_err("another's")
                .contains("of the cluster \"c\"")
        );
        let nothing = view_document(&View::empty(scope()), None, true).to_string();
        assert!(read(&nothing, &scope()).expect_err("nothing").contains("knows nothing"));
        assert!(read("{}", &scope()).is_err() && read("", &scope()).is_err());
    }
}
