//! A view from what Patroni's agents answer: `/cluster` of any member, and `/patroni` of the leader.
//!
//! They name no holding of the leader key. One is made of who leads and on which timeline: a member that is promoted again is
//! on a later one, and a leader that has only made its key anew, or restarted in place, is on the same.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::{ANSWER_MAX, told};
use crate::http::{Access, Answer, Ask, Endpoint, ask_at};
use crate::name::{Lsn, MemberName, Scope, Timeline};
use crate::record::{DynamicConfig, MemberRecord, PgState, Role, SyncState};
use crate::view::{Epoch, Leader, Member, Revised, View};

/// After so many views the dynamic configuration is asked for again.
const CONFIG_EVERY: u32 = 30;
/// For the leader to say what it is, beside what the others say of it.
const LEADER_MAX: Duration = Duration::from_millis(700);

/// What is kept from one poll to the next.
#[derive(Default)]
pub(super) struct Polled {
    polls: i64,
    config: Option<DynamicConfig>,
    config_in: u32,
}

/// What the leader's own agent says of its PostgreSQL.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Said {
    role: Role,
    state: PgState,
    timeline: Option<Timeline>,
    position: Option<Lsn>,
}

/// Whether an answer is one of Patroni's status documents, of this cluster.
pub(super) fn is_one(answer: &Answer, scope: &Scope) -> Result<(), String> {
    let body = answer.json().unwrap_or_default();
    match body.pointer("/patroni/scope").and_then(Value::as_str) {
        Some(theirs) if theirs == scope.as_str() => Ok(()),
        Some(theirs) => Err(format!("it is of the cluster {theirs:?}")),
        None => Err(format!("it answers {} and is no agent", answer.status)),
    }
}

impl Polled {
    /// Asks `endpoint` for the cluster, and its leader for its role.
    pub(super) async fn ask(
        &mut self,
        endpoint: &Endpoint,
        scope: &Scope,
        access: &Access,
        before: &View,
    ) -> Result<View, String> {
        let answer = ask_at(endpoint, Ask::get("/cluster"), ANSWER_MAX, access).await;
        let answer = answer.map_err(told)?;
        if answer.status != 200 {
            return Err(format!("/cluster answers {}", answer.status));
        }
        if self.config_in == 0 {
            let config = ask_at(endpoint, Ask::get("/config"), ANSWER_MAX, access).await;
            let config = config.map_err(told)?;
            self.config = (config.status == 200).then(|| DynamicConfig::parse(&config.text()));
            self.config_in = CONFIG_EVERY;
        }
        self.config_in -= 1;
        self.polls += 1;
        let mut view = read(&answer.json().unwrap_or_default(), scope)?;
        view.revision = self.polls;
        view.config = Revised {
            value: self.config.clone(),
            mod_revision: 1,
        };
        // Asked after the cluster has said who leads.
        let said = ask_leader(&view, scope, access).await;
        if let Some(position) = said.as_ref().and_then(|said| said.position) {
            view.status.optime = Some(position);
        }
        prove(&mut view, said.as_ref(), before);
        Ok(view)
    }
}

async fn ask_leader(view: &View, scope: &Scope, access: &Access) -> Option<Said> {
    let leader = view.leader_member()?;
    let endpoint = leader.record.api_endpoint()?;
    let answer = ask_at(&endpoint, Ask::get("/patroni"), LEADER_MAX, access).await.ok()?;
    is_one(&answer, scope).ok()?;
    said(&answer.json()?, &leader.name)
}

/// What a status document says, if it is of this member: addresses are given anew.
fn said(body: &Value, name: &MemberName) -> Option<Said> {
    let theirs = body.pointer("/patroni/name").and_then(Value::as_str);
    if theirs.is_some_and(|theirs| theirs != name.as_str()) {
        return None;
    }
    let field = |key: &str| body.get(key).cloned().unwrap_or_default();
    Some(Said {
        role: serde_json::from_value(field("role")).unwrap_or(Role::Unknown),
        state: serde_json::from_value(field("state")).unwrap_or(PgState::Unknown),
        timeline: serde_json::from_value(field("timeline")).ok(),
        position: body.pointer("/xlog/location").and_then(Value::as_u64).map(Lsn),
    })
}

/// Reads `/cluster`. Nobody is proven to be anything yet.
fn read(document: &Value, scope: &Scope) -> Result<View, String> {
    let theirs = document.get("scope").and_then(Value::as_str);
    if theirs.is_some_and(|theirs| theirs != scope.as_str()) {
        return Err(format!("it is of the cluster {:?}", theirs.unwrap_or_default()));
    }
    let rows = document.get("members").and_then(Value::as_array);
    let rows = rows.ok_or("/cluster lists no members")?;
    let mut view = View::empty(scope.clone());
    let (mut standbys, mut quorum) = (Vec::new(), false);
    for row in rows {
        let Some((member, role)) = read_member(row) else {
            continue;
        };
        match role.as_str() {
            "leader" | "master" | "standby_leader" => view.leader = Some(held_by(&member.name)),
            "sync_standby" | "quorum_standby" => {
                quorum |= role == "quorum_standby";
                standbys.push(member.name.as_str().to_owned());
            }
            _ => {}
        }
        // A replica tells how far behind it is, and so where the leader was.
        let position = member.record.replay_lsn.or(member.record.xlog_location);
        let lag = ["replay_lag", "lag"].iter().find_map(|key| row.get(key)?.as_u64());
        let leaders = position
            .zip(lag)
            .map(|(position, lag)| Lsn(position.0.saturating_add(lag)));
        view.status.optime = view.status.optime.max(leaders);
        view.members.insert(member.name.clone(), member);
    }
    if !standbys.is_empty() {
        view.sync.value = SyncState {
            leader: view.epoch().map(|epoch| epoch.holder.as_str().to_owned()),
            quorum: u32::from(quorum),
            sync_standby: Some(standbys.join(",")),
        };
    }
    Ok(view)
}

fn held_by(holder: &MemberName) -> Leader {
    Leader {
        epoch: Epoch {
            holder: holder.clone(),
            create_revision: 0,
        },
        lease: 0,
        mod_revision: 0,
    }
}

fn read_member(row: &Value) -> Option<(Member, String)> {
    let text = |key: &str| row.get(key).and_then(Value::as_str).map(str::to_owned);
    let name = MemberName::new(text("name")?).ok()?;
    let (role, state) = (text("role").unwrap_or_default(), text("state").unwrap_or_default());
    let host = text("host").unwrap_or_default();
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    let port = row.get("port").and_then(Value::as_u64).unwrap_or(5432);
    // A replica that streams, or reads the archive, says that instead of its state.
    let replicates = matches!(state.as_str(), "streaming" | "in archive recovery");
    let lsn = |keys: &[&str]| keys.iter().find_map(|key| text(key)?.parse::<Lsn>().ok());
    let own_role = if role == "standby_leader" {
        role.as_str()
    } else {
        "replica"
    };
    let mut fields = Map::new();
    let mut put = |key: &str, value: Value| fields.insert(key.to_owned(), value);
    put("conn_url", format!("postgres://{host}:{port}/postgres").into());
    put("api_url", text("api_url").unwrap_or_default().into());
    put("state", if replicates { "running" } else { state.as_str() }.into());
    put("role", own_role.into());
    put("timeline", row.get("timeline").cloned().unwrap_or_default());
    put("tags", row.get("tags").cloned().unwrap_or_else(|| json!({})));
    put("xlog_location", json!(lsn(&["lsn", "receive_lsn"])));
    put("receive_lsn", json!(lsn(&["receive_lsn"])));
    put("replay_lsn", json!(lsn(&["replay_lsn"])));
    if replicates {
        put("replication_state", state.into());
    }
    let record: MemberRecord = serde_json::from_value(Value::Object(fields)).ok()?;
    let member = Member {
        name,
        record,
        mod_revision: 0,
    };
    Some((member, role))
}

/// Names the holding of the leader, and enters what it has said of itself. One that says nothing for a moment is what it was.
fn prove(view: &mut View, said: Option<&Said>, before: &View) {
    let Some(holder) = view.epoch().map(|epoch| epoch.holder.clone()) else {
        return;
    };
    let known = before.epoch().filter(|epoch| epoch.holder == holder);
    let earlier = before.members.get(&holder).filter(|_| known.is_some());
    let Some(member) = view.members.get_mut(&holder) else {
        return;
    };
    let timeline = said.and_then(|said| said.timeline).or(member.record.timeline);
    let was = earlier.and_then(|earlier| earlier.record.timeline);
    let same = known.filter(|_| timeline.is_none() || was.is_none() || was == timeline);
    let epoch = same.cloned().unwrap_or_else(|| Epoch {
        holder,
        create_revision: timeline.map_or(0, |timeline| i64::from(timeline.0)),
    });
    member.record.timeline = timeline;
    if let Some(said) = said {
        member.record.role = said.role;
        member.record.state = said.state;
        member.mod_revision = epoch.create_revision.saturating_add(1);
    } else if let Some(earlier) = earlier.filter(|_| same.is_some()) {
        member.record.role = earlier.record.role;
        member.mod_revision = earlier.mod_revision;
    }
    if let Some(leader) = &mut view.leader {
        leader.mod_revision = epoch.create_revision;
        leader.epoch = epoch;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope() -> Scope {
        Scope::new("batman").expect("a plain name")
    }

    fn name(text: &str) -> MemberName {
        MemberName::new(text).expect("a plain name")
    }

    fn empty() -> View {
        View::empty(scope())
    }

    /// As captured from Patroni 4.1, with another leader and timeline put in.
    fn cluster(leader: &str, timeline: u32) -> View {
        let (l, r) = if leader == "node1" {
            ("node1", "node2")
        } else {
            ("node2", "node1")
        };
        let document = json!({"members": [
            {"name": l, "role": "leader", "state": "running", "api_url": "http://127.0.3.1:23008/patroni", "host": "127.0.3.1", "port": 23432, "timeline": timeline},
            {"name": r, "role": "quorum_standby", "state": "streaming", "api_url": "http://127.0.3.2:23008/patroni", "host": "127.0.3.2", "port": 23432, "timeline": 1, "tags": {"clonefrom": true, "zone": "a"}, "receive_lag": 0, "receive_lsn": "0/4000060", "replay_lag": 16, "replay_lsn": "0/4000050", "lag": 16, "lsn": "0/4000060"},
            {"name": "node3", "role": "replica", "state": "starting", "api_url": "", "host": "::1", "port": 23432, "lag": "unknown", "lsn": "unknown"},
        ], "scope": "batman"});
        read(&document, &scope()).expect("a cluster")
    }

    fn primary(timeline: u32) -> Said {
        Said {
            role: Role::Primary,
            state: PgState::Running,
            timeline: Some(Timeline(timeline)),
            position: None,
        }
    }

    fn proven(leader: &str, timeline: u32, said: Option<&Said>, before: &View) -> View {
        let mut view = cluster(leader, timeline);
        prove(&mut view, said, before);
        view
    }

    #[test]
    fn a_cluster_is_read_and_its_leader_is_writable_once_it_says_so() {
        let view = cluster("node1", 1);
        let replica = &view.members[&name("node2")];
        assert_eq!(replica.record.replication_state.as_deref(), Some("streaming"));
        assert_eq!(
            (replica.record.state, replica.record.replay_lsn),
            (PgState::Running, Some(Lsn(0x400_0050)))
        );
        assert_eq!(view.status.optime, Some(Lsn(0x400_0060)));
        assert_eq!(
            (view.sync.value.quorum, view.sync.value.lists(&replica.name)),
            (1, true)
        );
        let third = view.members[&name("node3")].record.postgres_address();
        assert_eq!(third.expect("an address").to_string(), "[::1]:23432");
        assert!(view.writable_leader().is_none());

        let writable = |said: Option<&Said>| proven("node1", 1, said, &empty()).writable_leader().is_some();
        let replica_still = Said {
            role: Role::Replica,
            ..primary(1)
        };
        assert!(!writable(None) && !writable(Some(&replica_still)) && writable(Some(&primary(1))));
    }

    #[test]
    fn a_holding_ends_with_its_holder_or_its_timeline_and_not_with_a_moment_of_silence() {
        let first = proven("node1", 1, Some(&primary(1)), &empty());
        let silent = proven("node1", 1, None, &first);
        assert_eq!(silent.epoch(), first.epoch());
        assert!(silent.writable_leader().is_some(), "what it was");
        let other = proven("node2", 2, None, &silent);
        assert_ne!(other.epoch(), first.epoch());
        assert!(
            other.writable_leader().is_none(),
            "what its predecessor said is not its own"
        );
        let other = proven("node2", 2, Some(&primary(2)), &other);
        let back = proven("node1", 3, Some(&primary(3)), &other);
        assert_ne!(back.epoch(), first.epoch());
        // The holding that our agents name stays, when only one of Patroni's is left to tell.
        let mut named = first.clone();
        named.leader.as_mut().expect("a leader").epoch.create_revision = 4711;
        assert_eq!(proven("node1", 1, Some(&primary(1)), &named).epoch(), named.epoch());
    }

    #[test]
    fn only_a_member_of_this_cluster_speaks_for_the_leader() {
        let body = json!({"state": "running", "role": "master", "timeline": 2, "xlog": {"location": 7}, "patroni": {"name": "node1", "scope": "batman"}});
        let expected = Said {
            position: Some(Lsn(7)),
            ..primary(2)
        };
        assert_eq!(said(&body, &name("node1")), Some(expected));
        assert_eq!(said(&body, &name("node2")), None);
        let answer = |scope: &str| Answer {
            status: 503,
            body: json!({"patroni": {"scope": scope}}).to_string().into(),
        };
        assert!(is_one(&answer("batman"), &scope()).is_ok() && is_one(&answer("robin"), &scope()).is_err());
        let document = json!({"members": [], "scope": "robin"});
        assert!(read(&document, &scope()).is_err());
    }
}
