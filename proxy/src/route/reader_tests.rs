//! Whom readers get, told without the implementation's words.

use proptest::prelude::*;

use super::*;
use crate::balance::{Standing, Weight};
use crate::testing::{Cluster, NO_POSITIONS, NO_WORDS, name};

const NOW: Boottime = Boottime::from_nanos(1_000_000_000_000);
const ROLES: [ListenerRole; 4] = [
    ListenerRole::Read,
    ListenerRole::Sync,
    ListenerRole::Async,
    ListenerRole::Any,
];

/// A member as a test draws it.
#[derive(Clone, Debug)]
struct Drawn {
    streams: bool,
    runs: bool,
    tagged: bool,
    replayed: u64,
    silent: bool,
    standing: u8,
}

fn drawn() -> impl Strategy<Value = Drawn> {
    (any::<[bool; 4]>(), 900_u64..1000, 0_u8..3).prop_map(|([streams, runs, tagged, silent], replayed, standing)| {
        Drawn {
            streams,
            runs,
            tagged,
            replayed,
            silent,
            standing,
        }
    })
}

fn cluster(members: &[Drawn], sync: &[bool], leads: bool) -> Cluster {
    let listed: Vec<String> = (0..members.len())
        .filter(|index| sync[*index])
        .map(|index| format!("r{index}"))
        .collect();
    let mut cluster = Cluster::new()
        .status(r#"{"optime":1000}"#)
        .sync(&format!(r#"{{"leader":"n1","sync_standby":"{}"}}"#, listed.join(",")));
    if leads {
        cluster = cluster.leader("n1", 10).primary("n1", 11);
    }
    for (index, member) in members.iter().enumerate() {
        let replication = if member.streams {
            "streaming"
        } else {
            "in archive recovery"
        };
        let purpose = if member.tagged { "reports" } else { "else" };
        let more = format!(
            r#""replication_state":"{replication}","replay_lsn":{},"tags":{{"purpose":"{purpose}"}}"#,
            member.replayed
        );
        let state = if member.runs { "running" } else { "starting" };
        cluster = cluster.member(&format!("r{index}"), "replica", state, &more);
    }
    cluster
}

proptest! {
    /// Whoever gets a reader runs, answers, has the tags, is of the listener's kind and near enough; it streams, or there is
    /// nobody to stream from. And whenever there is such a member, a reader gets one.
    #[test]
    fn a_reader_gets_a_member_that_is_what_its_listener_asks_for(
        members in proptest::collection::vec(drawn(), 0..5),
        sync: [bool; 5],
        leads: bool,
        role in 0_usize..4,
        tags: bool,
        bytes_max in proptest::option::of(0_u64..100),
        draws: [u64; 2],
    ) {
        let role = ROLES[role];
        let mut rules = ReadRules::none();
        rules.max_lag_bytes = bytes_max;
        if tags {
            rules.tags.insert("purpose".to_owned(), "reports".to_owned());
        }
        let view = cluster(&members, &sync, leads).view();
        let at = |member: &MemberName| member.as_str()[1..].parse::<usize>().expect("named above");
        let silent = members.iter().enumerate().filter(|(_, member)| member.silent);
        let silent: BTreeSet<MemberName> = silent.map(|(index, _)| name(&format!("r{index}"))).collect();
        let evidence = Evidence {
            view: &view,
            warrant: Warrant::new(&view, Some(NOW)),
            words: &NO_WORDS,
            silent: &silent,
            positions: &NO_POSITIONS,
            now: NOW,
        };
        let standing = |member: &MemberName| match members.get(at(member)).map(|member| member.standing) {
            Some(1) => Standing::Trial,
            Some(2) => Standing::Out,
            _ => Standing::Takes(Weight::FULL),
        };
        let load = Load { standing: &standing, draws, ..Load::IDLE };
        let policy = Policy { role, rules: &rules, hold_until: NOW };
        let is_asked_for = |index: usize| {
            let member = &members[index];
            let of_the_kind = match role {
                ListenerRole::Sync => sync[index],
                ListenerRole::Async => !sync[index],
                _ => true,
            };
            let near = bytes_max.is_none_or(|max| 1000 - member.replayed <= max);
            member.runs && !member.silent && (member.tagged || !tags) && of_the_kind && near && (member.streams || !leads)
        };
        let anybody = (0..members.len()).any(is_asked_for);
        match route(policy, evidence, load) {
            Decision::To(target) if target.epoch.is_some() => {
                prop_assert!(role == ListenerRole::Any && leads && !tags && target.member == name("n1"));
            }
            Decision::To(target) => {
                prop_assert!(is_asked_for(at(&target.member)));
                prop_assert!(still_leads_to(&target, policy, evidence, &[]));
            }
            Decision::Refuse(Why::NoReplica { members: left_out }) => {
                prop_assert!(!anybody);
                // Each is named with its reason.
                prop_assert_eq!(left_out.len(), view.members.len());
            }
            other => prop_assert!(false, "{:?}", other),
        }
    }
}
