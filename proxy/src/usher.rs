//! Asks readers' sessions to leave, or ends them, as their listener's rules say: where their member has fallen behind or is
//! no longer of the kind that the listener is for, and where another has come back that should have its part of them.
//!
//! Nothing here is urgent, unlike what the fence does: it looks once a second, and only while a listener has such a rule.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::view::Member;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::balance::{self, LeftOut, Load, Standing};
use crate::config::{ListenerConfig, OnChange};
use crate::dial::dial;
use crate::events::EventKind;
use crate::route::{self, Footing, Outlived};
use crate::sessions::{Ending, Verdict};
use crate::settle::{self, Place, Strayed};
use crate::shared::{Seen, Shared};

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// At most one session of so many is asked to leave at a time for balance.
const MOVED_ONE_OF: usize = 100;

/// Runs until `stop`.
pub(crate) async fn run(shared: &Shared, stop: CancellationToken) -> std::io::Result<()> {
    tokio::select! {
        () = stop.cancelled() => {}
        () = look_for_ever(shared) => {}
    }
    Ok(())
}

async fn look_for_ever(shared: &Shared) {
    let mut strayed = Strayed::default();
    let mut tick = interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        look(shared, &mut strayed).await;
    }
}

async fn look(shared: &Shared, strayed: &mut Strayed) {
    let configs: Vec<Arc<ListenerConfig>> = shared
        .listeners()
        .iter()
        .map(|listener| listener.config.load_full())
        .collect();
    let has_rules = |config: &Arc<ListenerConfig>| {
        config.reads.on_stale != OnChange::Keep || config.reads.rebalance_after.is_some()
    };
    if !configs
        .iter()
        .any(|config| config.role.is_balanced() && has_rules(config))
    {
        *strayed = Strayed::default(); // What was so before the rules went is no beginning for those that come.
        return;
    }
    end_strayed(shared, &configs, strayed).await;
    let seen = shared.seen();
    for (listener, config) in configs.iter().enumerate() {
        if let Some(age) = config.reads.rebalance_after.filter(|_| config.role.is_balanced()) {
            rebalance(shared, listener, config, &seen, age);
        }
    }
}

/// Which members are other than which listener asks for, and why.
type Why = BTreeMap<(usize, MemberName), LeftOut>;

/// Ends sessions with members that have been other than their listener asks for longer than a change of leader takes.
async fn end_strayed(shared: &Shared, configs: &[Arc<ListenerConfig>], strayed: &mut Strayed) {
    let mut judged = judge(configs, &shared.seen(), &[], strayed);
    let mut any_for_no_stream = false;
    shared.sessions.for_each(|footing, leaves| {
        let why = judged.get(&(footing.listener, footing.member.clone()));
        let is_judged = !leaves && footing.epoch.is_none();
        any_for_no_stream |= is_judged && matches!(why, Some(LeftOut::NotStreaming(_)));
    });
    // Where nobody can stream because the leader does not answer, newcomers get such a standby as the last resort: whoever
    // was ended would come back there, to be ended again.
    if any_for_no_stream && let Some(leader) = silent_leader(&shared.seen()).await {
        judged = judge(configs, &shared.seen(), &[leader], strayed);
    }
    if !judged.is_empty() {
        tell_strayed(shared, configs, &judged);
    }
}

/// Those members that have been so for longer than a change of leader takes.
fn judge(configs: &[Arc<ListenerConfig>], seen: &Seen, did_not_answer: &[MemberName], strayed: &mut Strayed) -> Why {
    let mut why = Why::new();
    for (listener, config) in configs.iter().enumerate() {
        if config.reads.on_stale == OnChange::Keep || !config.role.is_balanced() {
            continue;
        }
        for member in seen.view.members.values() {
            let told = route::strayed(config.role, &config.reads, seen.evidence(), member, did_not_answer);
            if let Some(left_out) = told {
                why.insert((listener, member.name.clone()), left_out);
            }
        }
    }
    // Members write their records at least once per loop_wait, so within this all have told of a new leader.
    let grace = seen.view.timing().ttl();
    let for_good = strayed.note(&why.keys().cloned().collect(), grace, seen.now);
    why.retain(|place, _| for_good.contains(place));
    why
}

/// The leader, if it cannot be connected to.
async fn silent_leader(seen: &Seen) -> Option<MemberName> {
    let leader = seen.view.leader_member()?;
    let address = leader.record.postgres_address()?;
    dial(&address).await.is_err().then(|| leader.name.clone())
}

fn tell_strayed(shared: &Shared, configs: &[Arc<ListenerConfig>], why: &Why) {
    let told = shared.sessions.tell_where(|footing, _| {
        if footing.epoch.is_some() {
            return None;
        }
        let ending = Ending::Outlived(Outlived::Strayed {
            member: footing.member.clone(),
            why: why.get(&(footing.listener, footing.member.clone()))?.clone(),
        });
        match configs.get(footing.listener)?.reads.on_stale {
            OnChange::EndWhenIdle if footing.in_clear => Some(Verdict::Leave(ending)),
            OnChange::Keep | OnChange::EndWhenIdle => None,
            OnChange::End => Some(Verdict::End(ending)),
        }
    });
    if told > 0 {
        info!(
            sessions = told,
            "sessions with replicas that have fallen behind are to end"
        );
    }
}

/// Asks some sessions to leave members that have more than their part, or where newcomers do not go any more.
fn rebalance(shared: &Shared, listener: usize, config: &ListenerConfig, seen: &Seen, age: Duration) {
    let (mut ours, mut leaving) = (BTreeMap::<MemberName, usize>::new(), 0);
    shared.sessions.for_each(|footing, leaves| {
        // The others stay where they are, and are among those that are open there.
        if footing.listener == listener && footing.in_clear {
            if leaves {
                leaving += 1;
            }
            *ours.entry(footing.member.clone()).or_default() += 1;
        }
    });
    let all: usize = ours.values().sum();
    let places = places(shared, config, seen, &ours);
    let mut moves = settle::plan(&places, leaving, all.div_ceil(MOVED_ONE_OF));
    if moves.is_empty() {
        return;
    }
    let is_old = |footing: &Footing| seen.now.since(footing.since) >= age;
    let told = shared.sessions.tell_where(|footing, leaves| {
        if leaves || footing.listener != listener || !footing.in_clear || !is_old(footing) {
            return None;
        }
        let left = moves.get_mut(&footing.member).filter(|left| **left > 0)?;
        *left -= 1;
        let member = footing.member.clone();
        Some(Verdict::Leave(Ending::Outlived(Outlived::Moved { member })))
    });
    if told > 0 {
        shared.events.record_many(EventKind::SessionsMoved, told);
    }
}

/// The members that this listener's readers are with or may go to.
fn places(
    shared: &Shared,
    config: &ListenerConfig,
    seen: &Seen,
    ours: &BTreeMap<MemberName, usize>,
) -> BTreeMap<MemberName, Place> {
    let proxy = shared.config.load();
    let policy = route::Policy {
        role: config.role,
        rules: &config.reads,
        hold_until: Boottime::from_nanos(u64::MAX),
    };
    let candidates: Vec<&Member> = route::candidates(policy, seen.evidence());
    let open = shared.routes.open_by_member();
    let experience = shared.experience();
    let standing = |member: &MemberName| experience.standing(member, seen.now, proxy.slow_start);
    let load = Load {
        standing: &standing,
        zone: proxy.zone.as_deref(),
        ..Load::IDLE
    };
    let preferred: BTreeSet<&MemberName> = balance::preferred(&candidates, load)
        .iter()
        .map(|member| &member.name)
        .collect();
    let mut places = BTreeMap::new();
    for member in &candidates {
        let weight = match standing(&member.name) {
            Standing::Takes(weight) if preferred.contains(&member.name) => Some(weight.as_f64()),
            // It has failed newcomers; those who are there may be well served.
            Standing::Trial | Standing::Out => continue,
            Standing::Takes(_) => None,
        };
        places.insert(member.name.clone(), (weight, &member.name));
    }
    // Readers who are on the leader for want of a replica go back.
    if let Some(leader) = seen.view.epoch().map(|epoch| &epoch.holder)
        && config.reads.fallback_to_leader
    {
        places.entry(leader.clone()).or_insert((None, leader));
    }
    let place = |(name, (weight, member)): (MemberName, (Option<f64>, &MemberName))| {
        let place = Place {
            weight,
            open: open.get(member).copied().unwrap_or_default(),
            ours: ours.get(member).copied().unwrap_or_default(),
        };
        (name, place)
    };
    places.into_iter().map(place).collect()
}
