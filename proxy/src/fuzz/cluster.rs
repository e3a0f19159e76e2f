//! What etcd holds and what members' agents say: others write it, so it may be anything.
//!
//! An input is a line for each key, its name below the scope and its value with a space between, such as `leader n1`.

use std::cell::LazyCell;
use std::collections::BTreeSet;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::http::Answer;
use pgherd_cluster::key::Keys;
use pgherd_cluster::name::{MemberName, Scope};
use pgherd_cluster::record::{DynamicConfig, FailoverRequest, History, MemberRecord, Status};
use pgherd_cluster::source::{ViewPublisher, channel};
use pgherd_cluster::view::{Change, Entry, Epoch, View};

use super::choice;
use crate::balance::Load;
use crate::config::{ListenerConfig, ListenerRole, ProxyConfig, ReadRules};
use crate::lag::{LeaderPositions, leader_position};
use crate::refusal::{self, Knowledge};
use crate::route::{self, Decision, Evidence, Policy};
use crate::shared::{ListenerState, Shared};
use crate::stats::{json, metrics, page};
use crate::tls::TlsSettings;
use crate::vouch::{Heard, ours_told, patroni_told};
use crate::warrant::{Warrant, Words};

/// A value in etcd is at most 1.5 MiB; this is enough for anything strange.
const INPUT_BYTES_MAX: usize = 16 * 1024;
/// The longest lease that makes any sense, and more than any number that could be added to it.
const TIME_MAX: Duration = Duration::from_secs(400 * 366 * 24 * 3600);
/// A beginning of a tag that no page of ours has. No text may put one there.
const NO_TAG_OF_OURS: &str = "<z";
const ROLES: [ListenerRole; 6] = [
    ListenerRole::Write,
    ListenerRole::Read,
    ListenerRole::Sync,
    ListenerRole::Async,
    ListenerRole::Any,
    ListenerRole::StandbyLeader,
];

/// Any keys and values: a view, where it leads, what is shown of it.
pub(super) fn view(input: &[u8]) {
    let text = String::from_utf8_lossy(input.get(..INPUT_BYTES_MAX).unwrap_or(input));
    let Ok(scope) = Scope::new("c") else { return };
    let keys = Keys::new("service", &scope);
    let entries = entries(&keys, &text);
    let view = View::from_entries(scope, &keys, entries.clone(), 100);
    folds(&view, &keys, &entries);
    records(&text);
    let timing = view.timing();
    assert!(timing.loop_wait() + 2 * timing.retry_timeout() <= timing.ttl() && timing.ttl() < TIME_MAX);
    assert!(timing.margin() < timing.ttl());
    for member in view.members.values() {
        let _ = (
            view.shown_role(member),
            view.shown_state(member),
            member.name.slot_name(),
        );
    }
    routes(&view);
    shown(view);
}

fn entries(keys: &Keys, text: &str) -> Vec<Entry> {
    let lines = text.lines().zip(1..).filter_map(|(line, number)| {
        let (key, value) = line.split_once(' ')?;
        Some(Entry {
            key: format!("{}{key}", keys.prefix()),
            value: value.to_owned(),
            create_revision: number,
            mod_revision: number,
            lease: 1,
        })
    });
    lines.collect()
}

/// Changes one by one make the same view as a full read, and taken back they leave nothing.
fn folds(view: &View, keys: &Keys, entries: &[Entry]) {
    let mut folded = entries.iter().fold(View::empty(view.scope.clone()), |view, entry| {
        view.with(keys, [Change::Put(entry.clone())], 100)
    });
    folded.revision = view.revision;
    assert_eq!(&folded, view);
    let gone = entries.iter().map(|entry| Change::Delete { key: entry.key.clone() });
    let mut nothing = View::empty(view.scope.clone());
    nothing.revision = 101;
    assert_eq!(view.with(keys, gone, 101), nothing);
}

/// Each kind of record, read from any text, and read again as it is written.
fn records(text: &str) {
    for line in text.lines().chain([text]) {
        let value = line.split_once(' ').map_or(line, |(_, value)| value);
        let mut record = MemberRecord::parse(value);
        let _ = (
            record.postgres_address(),
            record.api_address(),
            record.tag("noloadbalance"),
        );
        // JSON of any kind may hold numbers that are written as others.
        (record.pending_restart_reason, record.scheduled_restart) = (None, None);
        record.tags.clear();
        let written = serde_json::to_string(&record).unwrap_or_default();
        assert_eq!(MemberRecord::parse(&written), record, "{written}");
        let history = History::parse(value);
        assert_eq!(History::parse(&history.to_json().to_string()), history);
        let _ = (history.timeline(), FailoverRequest::parse(value));
        let status = Status::parse(value);
        let written = serde_json::to_string(&status).unwrap_or_default();
        assert_eq!(Status::parse(&written), status, "{written}");
        let config = DynamicConfig::parse(value);
        let times = [config.primary_start_timeout(), config.member_slots_ttl()];
        assert!(times.iter().all(|time| *time < TIME_MAX), "{times:?}");
    }
}

/// Whoever is led somewhere may go there, and stays led there.
fn routes(view: &View) {
    let now = Boottime::from_nanos(1_000_000_000_000);
    let mut positions = LeaderPositions::none();
    if let Some(position) = leader_position(view) {
        positions.note(position, now - Duration::from_secs(1));
    }
    let (words, nobody) = (Words::none(), BTreeSet::new());
    let strict = ReadRules {
        max_lag_bytes: Some(1),
        max_lag_time: Some(Duration::from_millis(1)),
        fallback_to_leader: true,
        tags: [("z".to_owned(), "1".to_owned())].into(),
        ..ReadRules::none()
    };
    for age in [0, 3, 100] {
        let evidence = Evidence {
            view,
            warrant: Warrant::new(view, Some(now - Duration::from_secs(age))),
            words: &words,
            silent: &nobody,
            positions: &positions,
            now,
        };
        for (role, rules) in ROLES
            .iter()
            .flat_map(|role| [(*role, ReadRules::none()), (*role, strict.clone())])
        {
            let policy = Policy {
                role,
                rules: &rules,
                hold_until: now,
            };
            led(policy, evidence);
            for member in view.members.values() {
                let _ = route::strayed(role, &rules, evidence, member, &[]);
            }
        }
    }
}

fn led(policy: Policy<'_>, evidence: Evidence<'_>) {
    let view = evidence.view;
    match route::route(policy, evidence, Load::IDLE) {
        Decision::To(target) => {
            let Some(member) = view.members.get(&target.member) else {
                panic!("{target:?} is no member")
            };
            assert_eq!(member.record.postgres_address().as_ref(), Some(&target.address));
            assert!(route::still_leads_to(&target, policy, evidence, &[]));
            let leads = view
                .writable_leader()
                .is_some_and(|leader| leader.name == target.member);
            if policy.role == ListenerRole::Write {
                assert!(leads && target.epoch.as_ref() == view.epoch() && evidence.warrant.holds(evidence.now));
            }
        }
        Decision::Hold(why) => panic!("nobody is held beyond the time for that: {why:?}"),
        Decision::Refuse(why) => {
            let said = refusal::cannot_route(&why, Duration::ZERO, Knowledge::default()).encode();
            assert!(!said.is_empty());
        }
    }
}

/// A proxy that follows what is published.
struct Follower {
    publisher: ViewPublisher,
    shared: Shared,
}

impl Follower {
    fn new() -> Option<Self> {
        let (publisher, handle) = channel(Scope::new("c").ok()?);
        let listeners: Vec<ListenerConfig> = ROLES.iter().map(|role| ListenerConfig::new("h:1", *role)).collect();
        let config = ProxyConfig::new(listeners.clone());
        let tls = TlsSettings::load(None, &config.server_tls).ok()?;
        let shared = Shared::new(config, tls, handle, 1);
        for listener in listeners {
            shared.add_listener(ListenerState::new(listener, Vec::new()));
        }
        Some(Self { publisher, shared })
    }
}

/// Page, metrics and JSON can be made of any cluster, and none of its texts is taken for markup.
fn shown(view: View) {
    thread_local! {
        static FOLLOWER: LazyCell<Option<Follower>> = const { LazyCell::new(Follower::new) };
    }
    FOLLOWER.with(|follower| match follower.as_ref() {
        Some(follower) => shown_by(follower, view),
        None => panic!("a proxy without TLS is always possible"),
    });
}

fn shown_by(Follower { publisher, shared }: &Follower, view: View) {
    publisher.publish(view);
    publisher.confirm(Boottime::now());
    let seen = shared.seen();
    shared.note_up(&seen);
    shared.note_position(&seen);
    let page = page(shared);
    assert!(!page.contains(NO_TAG_OF_OURS), "{page}");
    let text = json(shared);
    assert!(serde_json::from_str::<serde_json::Value>(&text).is_ok(), "{text}");
    let rendered = metrics::render(shared);
    assert!(rendered.is_ok(), "{rendered:?}");
}

/// What an agent answers, ours or Patroni's: a yes is for no longer than a lease, and from no other status than 200.
pub(super) fn agent(input: &[u8]) {
    let (how, body) = choice(input);
    let answer = Answer {
        status: if how & 1 == 0 { 200 } else { 503 },
        body: body.to_vec().into(),
    };
    let (Ok(scope), Ok(holder)) = (Scope::new("c"), MemberName::new("n1")) else {
        return;
    };
    let epoch = Epoch {
        holder,
        create_revision: 10,
    };
    let ttl = Duration::from_secs(5);
    for heard in [
        ours_told(&answer, &epoch, how & 2 == 0, ttl),
        patroni_told(&answer, &View::empty(scope), &epoch),
    ] {
        if let Heard::Yes(remaining) = heard {
            assert!(remaining <= ttl && answer.status == 200);
        }
    }
}
