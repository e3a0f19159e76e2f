//! Which members readers may go to, and which of them each gets. Pure: the view, what is known of each member, the sessions
//! that are open and random draws in, a member out.

mod choice;

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::{Lsn, MemberName};
use pgherd_cluster::record::{PgState, Role};
use pgherd_cluster::view::{Member, View};
use serde_json::Value;

use crate::config::{ListenerRole, ReadRules};
use crate::lag::{Behind, LeaderPositions};
use crate::refusal::{self, Knowledge};
use crate::route::Why;

pub use self::choice::{Load, QUICK, Standing, Weight, choose, preferred, zone_of};

/// What a listener asks of a member before its readers go there.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The listener's role.
    pub role: ListenerRole,
    /// Its rules.
    pub rules: &'a ReadRules,
    /// How far the leader was, and when.
    pub positions: &'a LeaderPositions,
    /// As of when the view is known to be right. While the store does not answer, nobody falls further behind by that.
    pub as_of: Boottime,
}

static NO_RULES: ReadRules = ReadRules::none();
static NO_POSITIONS: LeaderPositions = LeaderPositions::none();

impl Wanted<'static> {
    /// Any replica.
    pub const ANY_REPLICA: Self = Self {
        role: ListenerRole::Read,
        rules: &NO_RULES,
        positions: &NO_POSITIONS,
        as_of: Boottime::from_nanos(0),
    };
}

/// Why a member gets no reader.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeftOut {
    /// It holds the leader key, whatever its own record still says.
    Leads,
    /// It leads and is none of the members that readers go to, for this reason.
    LeadsAnd(Box<Why>),
    /// Its PostgreSQL is in this state.
    NotRunning(PgState),
    /// It is not a standby, whether it streams or not.
    NotStandby(Role),
    /// It is not a streaming standby.
    NotStreaming(Option<String>),
    /// It is tagged so.
    NoLoadBalance,
    /// The listener is for synchronous replicas, and it is none.
    NotSync,
    /// The listener is for asynchronous replicas, and it is synchronous.
    IsSync,
    /// The listener asks for a tag that it does not have, or not with this value.
    OtherTag {
        /// The tag.
        key: String,
        /// What is asked for.
        wanted: String,
        /// What it has.
        found: Option<String>,
    },
    /// It is further behind the leader than the listener allows.
    Lags {
        /// How far, in bytes.
        bytes: u64,
        /// How far it may be.
        bytes_max: u64,
    },
    /// The leader has been past it for longer than the listener allows.
    LagsFor {
        /// For how long, at least.
        time: Duration,
        /// How long it may be.
        time_max: Duration,
    },
    /// The listener limits the lag and this member's is not known.
    LagUnknown,
    /// Its record has no address that could be read.
    NoAddress,
    /// It does not answer this proxy, whatever its record says.
    Silent,
}

impl LeftOut {
    /// Whether a member is known to be other than a listener asks for, and up. Of one that is down its sessions hear by
    /// themselves; what is not known ends nobody's session.
    const fn is_known_to_be_other(&self) -> bool {
        match self {
            Self::NotStreaming(_)
            | Self::NoLoadBalance
            | Self::NotSync
            | Self::IsSync
            | Self::OtherTag { .. }
            | Self::Lags { .. }
            | Self::LagsFor { .. } => true,
            Self::Leads
            | Self::LeadsAnd(_)
            | Self::NotRunning(_)
            | Self::NotStandby(_)
            | Self::LagUnknown
            | Self::NoAddress
            | Self::Silent => false,
        }
    }
}

/// Why `member` is no longer what a listener's readers came for, if it is known to be so. A newcomer would be led to a
/// standby that does not stream while [`nobody_to_stream_from`], so nobody has strayed by that.
#[must_use]
pub fn strayed(view: &View, member: &Member, wanted: Wanted<'_>, did_not_answer: &[MemberName]) -> Option<LeftOut> {
    let told = if nobody_to_stream_from(view, did_not_answer) {
        last_resort(view, member, wanted)
    } else {
        readable(view, member, wanted)
    };
    told.err().filter(LeftOut::is_known_to_be_other)
}

impl std::fmt::Display for LeftOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Leads => f.write_str("it leads"),
            Self::LeadsAnd(why) => {
                f.write_str(refusal::cannot_route(why, Duration::ZERO, Knowledge::default()).message())
            }
            Self::NotRunning(state) => write!(f, "PostgreSQL is {}", state.as_str()),
            Self::NotStandby(role) => write!(f, "its role is {}", role.as_str()),
            Self::NotStreaming(None) => f.write_str("it does not stream"),
            Self::NotStreaming(Some(state)) => write!(f, "it does not stream: {state}"),
            Self::NoLoadBalance => f.write_str("tagged noloadbalance"),
            Self::NotSync => f.write_str("it is not synchronous"),
            Self::IsSync => f.write_str("it is synchronous"),
            Self::OtherTag { key, wanted, found } => match found {
                Some(found) => write!(f, "its tag {key} is {found}, not {wanted}"),
                None => write!(f, "it has no tag {key}, {wanted} is asked for"),
            },
            Self::Lags { bytes, bytes_max } => write!(f, "{bytes} bytes behind, {bytes_max} allowed"),
            Self::LagsFor { time, time_max } => write!(
                f,
                "{:.1} s behind, {:.1} s allowed",
                time.as_secs_f64(),
                time_max.as_secs_f64()
            ),
            Self::LagUnknown => f.write_str("its lag is not known"),
            Self::NoAddress => f.write_str("it has no address"),
            Self::Silent => f.write_str("it does not answer"),
        }
    }
}

/// How many bytes a member's replay is behind the leader's last known position. Members before Patroni 4.1 tell only the
/// greater of received and replayed, which is the nearest that there is.
#[must_use]
pub fn lag_bytes(view: &View, member: &Member) -> Option<u64> {
    Some(replayed(member)?.behind(view.status.optime?))
}

/// How long the leader has been past what a member has replayed.
#[must_use]
pub fn lag_time(member: &Member, positions: &LeaderPositions, as_of: Boottime) -> Option<Behind> {
    positions.behind(replayed(member)?, as_of)
}

fn replayed(member: &Member) -> Option<Lsn> {
    member.record.replay_lsn.or(member.record.xlog_location)
}

/// Whether readers may go to `member`, or why not.
///
/// # Errors
/// The first reason found.
pub fn readable(view: &View, member: &Member, wanted: Wanted<'_>) -> Result<(), LeftOut> {
    let record = &member.record;
    if view.epoch().is_some_and(|epoch| epoch.holder == member.name) {
        return Err(LeftOut::Leads);
    }
    if record.state != PgState::Running {
        return Err(LeftOut::NotRunning(record.state));
    }
    if record.replication_state.as_deref() != Some("streaming") {
        return Err(LeftOut::NotStreaming(record.replication_state.clone()));
    }
    fit(view, member, wanted)
}

/// Whether readers may go to `member` rather than nowhere, while [`nobody_to_stream_from`], or why not. A former leader's
/// record may still say that it runs: only a standby can take no writes.
///
/// # Errors
/// The first reason found.
pub fn last_resort(view: &View, member: &Member, wanted: Wanted<'_>) -> Result<(), LeftOut> {
    let record = &member.record;
    if view.epoch().is_some_and(|epoch| epoch.holder == member.name) {
        return Err(LeftOut::Leads);
    }
    if record.state != PgState::Running {
        return Err(LeftOut::NotRunning(record.state));
    }
    if record.role != Role::Replica {
        return Err(LeftOut::NotStandby(record.role));
    }
    fit(view, member, wanted)
}

/// Whether standbys cannot stream because nobody leads, the leader is down by its own word, or it is among those that did
/// not answer.
#[must_use]
pub fn nobody_to_stream_from(view: &View, did_not_answer: &[MemberName]) -> bool {
    let Some(leader) = view.leader_member() else {
        return true;
    };
    leader.record.state != PgState::Running || did_not_answer.contains(&leader.name)
}

/// What is asked of every member that is read from.
fn fit(view: &View, member: &Member, wanted: Wanted<'_>) -> Result<(), LeftOut> {
    let record = &member.record;
    if record.tag("noloadbalance") {
        return Err(LeftOut::NoLoadBalance);
    }
    let is_sync = view.sync.value.is_active() && view.sync.value.lists(&member.name);
    match wanted.role {
        ListenerRole::Sync if !is_sync => return Err(LeftOut::NotSync),
        ListenerRole::Async if is_sync => return Err(LeftOut::IsSync),
        _ => {}
    }
    has_tags(member, wanted.rules)?;
    if record.postgres_address().is_none() {
        return Err(LeftOut::NoAddress);
    }
    match (wanted.rules.max_lag_bytes, lag_bytes(view, member)) {
        (None, _) => Ok(()),
        (Some(_), None) => Err(LeftOut::LagUnknown),
        (Some(bytes_max), Some(bytes)) if bytes > bytes_max => Err(LeftOut::Lags { bytes, bytes_max }),
        (Some(_), Some(_)) => Ok(()),
    }?;
    let Some(time_max) = wanted.rules.max_lag_time else {
        return Ok(());
    };
    match lag_time(member, wanted.positions, wanted.as_of) {
        Some(Behind::For(time) | Behind::AtLeast(time)) if time > time_max => Err(LeftOut::LagsFor { time, time_max }),
        Some(Behind::For(_)) => Ok(()),
        // It may have been behind for long when this proxy began to look.
        Some(Behind::AtLeast(_)) | None => Err(LeftOut::LagUnknown),
    }
}

/// Whether a member has the tags that the rules ask for.
///
/// # Errors
/// The first tag that is missing or other.
pub fn has_tags(member: &Member, rules: &ReadRules) -> Result<(), LeftOut> {
    for (key, wanted) in &rules.tags {
        let found = member.record.tags.get(key).and_then(tag_text);
        if found.as_ref() != Some(wanted) {
            return Err(LeftOut::OtherTag {
                key: key.clone(),
                wanted: wanted.clone(),
                found,
            });
        }
    }
    Ok(())
}

/// As Patroni compares tags: texts as they are, anything else as it is written.
fn tag_text(value: &Value) -> Option<String> {
    match value {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Cluster, name};

    fn limited(max_lag_bytes: Option<u64>) -> ReadRules {
        ReadRules {
            max_lag_bytes,
            ..ReadRules::none()
        }
    }

    #[test]
    fn the_time_limit_counts_from_when_the_leader_was_past_it() {
        let at = |seconds: u64| Boottime::from_nanos(seconds * 1_000_000_000);
        let mut positions = LeaderPositions::none();
        for (time, position) in [(10, 100), (20, 200), (30, 300)] {
            positions.note(Lsn(position), at(time));
        }
        let time_max = Duration::from_secs(5);
        let rules = ReadRules {
            max_lag_time: Some(time_max),
            ..ReadRules::none()
        };
        let told = |more: &str, positions: &LeaderPositions, as_of: u64| {
            let more = format!(r#""replication_state":"streaming",{more}"#);
            let view = Cluster::new().member("n2", "replica", "running", &more).view();
            let wanted = Wanted {
                rules: &rules,
                positions,
                as_of: at(as_of),
                ..Wanted::ANY_REPLICA
            };
            readable(&view, &view.members[&name("n2")], wanted)
        };
        assert_eq!(told(r#""replay_lsn":300"#, &positions, 99), Ok(()));
        assert_eq!(told(r#""replay_lsn":200"#, &positions, 35), Ok(()));
        let time = Duration::from_secs(6);
        let lags = Err(LeftOut::LagsFor { time, time_max });
        assert_eq!(told(r#""replay_lsn":200"#, &positions, 36), lags);
        assert_eq!(told(r#""replay_lsn":50"#, &positions, 12), Err(LeftOut::LagUnknown));
        let time = Duration::from_secs(26);
        assert_eq!(
            told(r#""replay_lsn":50"#, &positions, 36),
            Err(LeftOut::LagsFor { time, time_max })
        );
        assert_eq!(told(r#""tags":{}"#, &positions, 36), Err(LeftOut::LagUnknown));
        let nothing = LeaderPositions::none();
        assert_eq!(told(r#""replay_lsn":300"#, &nothing, 36), Err(LeftOut::LagUnknown));
    }

    fn why(cluster: &Cluster, member: &str, max_lag_bytes: Option<u64>) -> Option<LeftOut> {
        let view = cluster.view();
        let member = view.members.get(&name(member)).expect("the test made it");
        let rules = &limited(max_lag_bytes);
        readable(
            &view,
            member,
            Wanted {
                rules,
                ..Wanted::ANY_REPLICA
            },
        )
        .err()
    }

    #[test]
    fn only_a_streaming_running_replica_is_read_from() {
        let cluster = Cluster::new()
            .leader("n1", 10)
            .primary("n1", 11)
            .replica("n2")
            .member(
                "n3",
                "replica",
                "running",
                r#""replication_state":"in archive recovery""#,
            )
            .member("n4", "replica", "starting", r#""replication_state":"streaming""#)
            .member(
                "n5",
                "replica",
                "running",
                r#""replication_state":"streaming","tags":{"noloadbalance":true}"#,
            );
        assert_eq!(why(&cluster, "n1", None), Some(LeftOut::Leads));
        assert_eq!(why(&cluster, "n2", None), None);
        assert!(matches!(
            why(&cluster, "n3", None),
            Some(LeftOut::NotStreaming(Some(_)))
        ));
        assert_eq!(why(&cluster, "n4", None), Some(LeftOut::NotRunning(PgState::Starting)));
        assert_eq!(why(&cluster, "n5", None), Some(LeftOut::NoLoadBalance));
    }

    #[test]
    fn without_a_leader_a_standby_is_read_from_although_it_does_not_stream() {
        let archive = r#""replication_state":"in archive recovery","replay_lsn":900"#;
        let none = r#""replay_lsn":900"#;
        let cases = [
            ("replica", "running", archive, None, Ok(())),
            ("replica", "running", none, Some(100), Ok(())),
            (
                "replica",
                "running",
                none,
                Some(99),
                Err(LeftOut::Lags {
                    bytes: 100,
                    bytes_max: 99,
                }),
            ),
            ("replica", "running", r#""tags":{}"#, None, Ok(())),
            ("replica", "running", r#""tags":{}"#, Some(99), Err(LeftOut::LagUnknown)),
            (
                "replica",
                "starting",
                none,
                None,
                Err(LeftOut::NotRunning(PgState::Starting)),
            ),
            // It may take writes for all that is known.
            (
                "primary",
                "running",
                none,
                None,
                Err(LeftOut::NotStandby(Role::Primary)),
            ),
            (
                "replica",
                "running",
                r#""tags":{"noloadbalance":true}"#,
                None,
                Err(LeftOut::NoLoadBalance),
            ),
        ];
        for (role, state, more, max_lag_bytes, expected) in cases {
            let cluster = Cluster::new()
                .status(r#"{"optime":1000}"#)
                .member("n2", role, state, more);
            let view = cluster.view();
            let rules = &limited(max_lag_bytes);
            let wanted = Wanted {
                rules,
                ..Wanted::ANY_REPLICA
            };
            let told = last_resort(&view, &view.members[&name("n2")], wanted);
            assert_eq!(told, expected, "{role} {state} {more} {max_lag_bytes:?}");
        }
    }

    #[test]
    fn a_leader_that_runs_and_answers_can_be_streamed_from() {
        let runs = Cluster::new().leader("n1", 10).primary("n1", 11);
        assert!(!nobody_to_stream_from(&runs.view(), &[]));
        assert!(!nobody_to_stream_from(&runs.view(), &[name("n2")]));
        assert!(nobody_to_stream_from(&runs.view(), &[name("n1")]));
        assert!(nobody_to_stream_from(&Cluster::new().primary("n1", 11).view(), &[]));
        assert!(nobody_to_stream_from(&Cluster::new().leader("n1", 10).view(), &[]));
        let crashed = runs.member("n1", "primary", "crashed", r#""tags":{}"#);
        assert!(nobody_to_stream_from(&crashed.view(), &[]));
    }

    #[test]
    fn a_promoted_member_leaves_in_the_moment_that_the_key_names_it() {
        let cluster = Cluster::new().replica("n2");
        assert_eq!(why(&cluster, "n2", None), None);
        assert_eq!(why(&cluster.leader("n2", 10), "n2", None), Some(LeftOut::Leads));
    }

    #[test]
    fn the_lag_limit_counts_replayed_bytes() {
        let cluster = Cluster::new().status(r#"{"optime":1000}"#).member(
            "n2",
            "replica",
            "running",
            r#""replication_state":"streaming","replay_lsn":900"#,
        );
        assert_eq!(why(&cluster, "n2", Some(100)), None);
        let lags = LeftOut::Lags {
            bytes: 100,
            bytes_max: 99,
        };
        assert_eq!(why(&cluster, "n2", Some(99)), Some(lags));
        let unknown = Cluster::new().replica("n2");
        assert_eq!(why(&unknown, "n2", Some(99)), Some(LeftOut::LagUnknown));
    }

    #[test]
    fn a_member_needs_every_tag_with_the_value_that_is_asked_for() {
        let cluster = Cluster::new().member(
            "n2",
            "replica",
            "running",
            r#""replication_state":"streaming","tags":{"dc":"a","fast":true,"size":2,"none":null}"#,
        );
        let view = cluster.view();
        let member = &view.members[&name("n2")];
        let told = |tags: &[(&str, &str)]| {
            let tags = tags.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
            let rules = &ReadRules {
                tags: tags.collect(),
                ..ReadRules::none()
            };
            let told = readable(
                &view,
                member,
                Wanted {
                    rules,
                    ..Wanted::ANY_REPLICA
                },
            );
            told.map_err(|left_out| left_out.to_string())
        };
        assert_eq!(told(&[("dc", "a"), ("fast", "true"), ("size", "2")]), Ok(()));
        let other = Err("its tag dc is a, not b".to_owned());
        assert_eq!(told(&[("dc", "b"), ("fast", "true")]), other);
        for key in ["zone", "none"] {
            assert_eq!(told(&[(key, "x")]), Err(format!("it has no tag {key}, x is asked for")));
        }
    }
}
