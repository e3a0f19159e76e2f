//! Where a connection goes. Pure: role, view, warrant and time in, decision out. Dialling and waiting are others' work.

use std::collections::BTreeSet;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::{Address, PgState, Role};
use pgherd_cluster::view::{Epoch, Member, View};

use crate::balance::{self, LeftOut, Load, Wanted};
use crate::config::{ListenerRole, OnChange, ReadRules};
use crate::lag::LeaderPositions;
use crate::warrant::{Warrant, Words};

/// What is known, and when.
#[derive(Clone, Copy)]
pub struct Evidence<'a> {
    /// The newest view.
    pub view: &'a View,
    /// The belief in its leader.
    pub warrant: Warrant,
    /// What leaders' own agents have told.
    pub words: &'a Words,
    /// Members that do not answer, whatever the view says of them.
    pub silent: &'a BTreeSet<MemberName>,
    /// How far the leader was, and when.
    pub positions: &'a LeaderPositions,
    /// The time of asking.
    pub now: Boottime,
}

/// What the listener and this client's patience allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy<'a> {
    /// What the client came for.
    pub role: ListenerRole,
    /// What a reader is promised.
    pub rules: &'a ReadRules,
    /// Until when the client is kept waiting.
    pub hold_until: Boottime,
}

impl<'a> Evidence<'a> {
    /// What a listener with this role and these rules asks of members.
    #[must_use]
    pub fn wanted(&self, role: ListenerRole, rules: &'a ReadRules) -> Wanted<'a> {
        let age = self.warrant.age(self.now).unwrap_or_default();
        Wanted {
            role,
            rules,
            positions: self.positions,
            as_of: self.now - age,
        }
    }
}

impl Policy<'_> {
    fn wanted<'b>(&'b self, evidence: Evidence<'b>) -> Wanted<'b> {
        evidence.wanted(self.role, self.rules)
    }
}

/// A member to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// Its name.
    pub member: MemberName,
    /// Where its PostgreSQL listens.
    pub address: Address,
    /// The holding of the leader key that the session rests on; nothing for a session with a replica.
    pub epoch: Option<Epoch>,
}

/// What to do with a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Connect it.
    To(Target),
    /// Keep it: this may pass.
    Hold(Why),
    /// Send it away: this will not pass, or not soon enough.
    Refuse(Why),
}

/// Why a client cannot be connected now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// No view has been read since the start.
    NothingKnown,
    /// Nobody holds the leader key.
    NoLeader,
    /// The holder of the leader key has no key of its own.
    NoRecord {
        /// The holder.
        leader: MemberName,
    },
    /// The leader has not said yet that it takes writes.
    NotWritable {
        /// The leader.
        leader: MemberName,
        /// The role in its record.
        role: Role,
        /// The state in its record.
        state: PgState,
        /// Whether that record was written under an earlier holding of the key.
        from_before: bool,
    },
    /// The proof that the leader leads is too old.
    WarrantLapsed {
        /// The age of the proof.
        age: Duration,
    },
    /// The leader itself has not said that it leads, or not for a while.
    NoWord {
        /// Who leads by what the others say.
        leader: MemberName,
    },
    /// The leader follows another cluster: no member takes writes.
    StandbyCluster {
        /// The leader.
        leader: MemberName,
    },
    /// The client came for the leader of a standby cluster, and this one takes writes.
    NoStandbyCluster {
        /// The leader.
        leader: MemberName,
    },
    /// The leader of a standby cluster has not said yet that it is up.
    NotUp {
        /// The leader.
        leader: MemberName,
        /// The role in its record.
        role: Role,
        /// The state in its record.
        state: PgState,
    },
    /// The leader's record has no address that could be read.
    NoAddress {
        /// The leader.
        leader: MemberName,
    },
    /// No replica may be read from, and why not each.
    NoReplica {
        /// All members.
        members: Vec<(MemberName, LeftOut)>,
    },
    /// No replica may be read from, and the leader has as many of these readers as it may.
    LeaderFull {
        /// The leader.
        leader: MemberName,
        /// How many it may have.
        limit: usize,
    },
    /// The member that the route names cannot be connected to.
    Unreachable {
        /// The member.
        member: MemberName,
    },
    /// The member's PostgreSQL is there and takes no connections now.
    NotNow {
        /// The member.
        member: MemberName,
        /// Its reason, in its own words.
        said: String,
    },
}

/// Decides. `load` matters for readers only.
#[must_use]
pub fn route(policy: Policy<'_>, evidence: Evidence<'_>, load: Load<'_>) -> Decision {
    let found = match policy.role {
        ListenerRole::Write => writer(evidence),
        ListenerRole::StandbyLeader => standby_leader(evidence),
        ListenerRole::Read | ListenerRole::Sync | ListenerRole::Async | ListenerRole::Any => {
            reader(policy, evidence, load)
        }
    };
    match found {
        Ok(target) => Decision::To(target),
        Err(why @ (Why::StandbyCluster { .. } | Why::NoStandbyCluster { .. })) => Decision::Refuse(why),
        Err(why) if evidence.now >= policy.hold_until => Decision::Refuse(why),
        Err(why) => Decision::Hold(why),
    }
}

/// The leader, if writes may go there.
fn writer(evidence: Evidence<'_>) -> Result<Target, Why> {
    let (epoch, member) = holder(evidence)?;
    if evidence.view.writable_leader().is_none() {
        return Err(not_writable(epoch, member));
    }
    led_by(epoch, member)
}

/// The leader of a standby cluster, if readers may go there. It takes no writes, and its sessions rest on its epoch and a
/// warrant all the same: it may be promoted at any time.
fn standby_leader(evidence: Evidence<'_>) -> Result<Target, Why> {
    let (epoch, member) = holder(evidence)?;
    let (leader, record) = (epoch.holder.clone(), &member.record);
    let proven = member.mod_revision > epoch.create_revision;
    match record.role {
        Role::Primary if proven => Err(Why::NoStandbyCluster { leader }),
        Role::StandbyLeader if proven && record.state == PgState::Running => led_by(epoch, member),
        role => Err(Why::NotUp {
            leader,
            role,
            state: record.state,
        }),
    }
}

/// The leader of either kind of cluster, if readers may go there.
fn leader_of_either_kind(evidence: Evidence<'_>) -> Result<Target, Why> {
    match writer(evidence) {
        Err(Why::StandbyCluster { .. }) => standby_leader(evidence),
        found => found,
    }
}

/// Who holds the leader key by a warrant that holds and admits newcomers.
fn holder(evidence: Evidence<'_>) -> Result<(&Epoch, &Member), Why> {
    let Evidence { view, warrant, now, .. } = evidence;
    let Some(age) = warrant.age(now) else {
        return Err(Why::NothingKnown);
    };
    if !warrant.holds(now) {
        if !warrant.by_word_alone() {
            return Err(Why::WarrantLapsed { age });
        }
        let leader = view.epoch().ok_or(Why::NoLeader)?.holder.clone();
        return Err(Why::NoWord { leader });
    }
    let epoch = view.epoch().filter(|_| warrant.admits()).ok_or(Why::NoLeader)?;
    let leader = epoch.holder.clone();
    let member = view.leader_member().ok_or(Why::NoRecord { leader })?;
    Ok((epoch, member))
}

fn led_by(epoch: &Epoch, member: &Member) -> Result<Target, Why> {
    let leader = epoch.holder.clone();
    Ok(Target {
        member: epoch.holder.clone(),
        address: member.record.postgres_address().ok_or(Why::NoAddress { leader })?,
        epoch: Some(epoch.clone()),
    })
}

fn not_writable(epoch: &Epoch, member: &Member) -> Why {
    let leader = epoch.holder.clone();
    let from_before = member.mod_revision <= epoch.create_revision;
    match member.record.role {
        // A record from before may speak of a standby cluster that is being promoted right now.
        Role::StandbyLeader if !from_before => Why::StandbyCluster { leader },
        role => Why::NotWritable {
            leader,
            role,
            state: member.record.state,
            from_before,
        },
    }
}

/// A replica that streams, or the leader where that is allowed, or else, while there is nobody to stream from, any standby.
fn reader(policy: Policy<'_>, evidence: Evidence<'_>, load: Load<'_>) -> Result<Target, Why> {
    let view = evidence.view;
    if evidence.warrant.age(evidence.now).is_none() {
        return Err(Why::NothingKnown);
    }
    let Found {
        mut candidates,
        leader,
        left_out,
    } = find(policy, evidence);
    let target_of = |member: &Member| match &leader {
        Some(target) if target.member == member.name => Some(target.clone()),
        _ => standby(member),
    };
    if let Some(target) = balance::choose(&candidates, load).and_then(target_of) {
        return Ok(target);
    }
    if policy.rules.fallback_to_leader
        && let Ok(target) = leader_of_either_kind(evidence)
        && !load.avoid.contains(&target.member)
    {
        match policy.rules.fallback_max {
            Some(limit) if (load.of_listener)(&target.member) >= limit => {
                let leader = target.member;
                return Err(Why::LeaderFull { leader, limit });
            }
            Some(_) | None => return Ok(target),
        }
    }
    if balance::nobody_to_stream_from(view, load.avoid) {
        candidates = stranded(policy, evidence);
        if let Some(target) = balance::choose(&candidates, load).and_then(standby) {
            return Ok(target);
        }
    }
    match candidates.first() {
        // Every one that could be read from has been tried for this client.
        Some(candidate) => Err(Why::Unreachable {
            member: candidate.name.clone(),
        }),
        None => Err(Why::NoReplica { members: left_out }),
    }
}

/// Whom readers may be led to.
struct Found<'a> {
    candidates: Vec<&'a Member>,
    /// The leader, if it is one of them.
    leader: Option<Target>,
    /// The others, and why.
    left_out: Vec<(MemberName, LeftOut)>,
}

fn find<'a>(policy: Policy<'_>, evidence: Evidence<'a>) -> Found<'a> {
    let mut found = Found {
        candidates: Vec::new(),
        leader: None,
        left_out: Vec::new(),
    };
    for member in evidence.view.members.values() {
        let told = match readable(policy, evidence, member) {
            Err(LeftOut::Leads) if policy.role == ListenerRole::Any => {
                as_one_of_them(policy, evidence, member).map(|target| found.leader = Some(target))
            }
            told => told,
        };
        match told {
            Ok(()) => found.candidates.push(member),
            Err(left_out) => found.left_out.push((member.name.clone(), left_out)),
        }
    }
    found
}

/// The members that a listener's readers are led to by its rules, whichever is the best of them.
#[must_use]
pub fn candidates<'a>(policy: Policy<'_>, evidence: Evidence<'a>) -> Vec<&'a Member> {
    find(policy, evidence).candidates
}

/// Why `member` is no longer what a listener's readers came for, if it is known to be so.
#[must_use]
pub fn strayed(
    role: ListenerRole,
    rules: &ReadRules,
    evidence: Evidence<'_>,
    member: &Member,
    did_not_answer: &[MemberName],
) -> Option<LeftOut> {
    let policy = Policy {
        role,
        rules,
        hold_until: evidence.now,
    };
    balance::strayed(evidence.view, member, policy.wanted(evidence), did_not_answer)
}

/// The leader as one of the members that readers are spread over, or why it is none.
fn as_one_of_them(policy: Policy<'_>, evidence: Evidence<'_>, member: &Member) -> Result<Target, LeftOut> {
    if member.record.tag("noloadbalance") {
        return Err(LeftOut::NoLoadBalance);
    }
    balance::has_tags(member, policy.rules)?;
    leader_of_either_kind(evidence).map_err(|why| LeftOut::LeadsAnd(Box::new(why)))
}

/// Whether readers may go to `member`: one that does not answer is no choice, and is said to be none for that.
fn readable(policy: Policy<'_>, evidence: Evidence<'_>, member: &Member) -> Result<(), LeftOut> {
    balance::readable(evidence.view, member, policy.wanted(evidence))?;
    if evidence.silent.contains(&member.name) {
        return Err(LeftOut::Silent);
    }
    Ok(())
}

fn standby(member: &Member) -> Option<Target> {
    Some(Target {
        member: member.name.clone(),
        address: member.record.postgres_address()?,
        epoch: None,
    })
}

/// Standbys that may be read from while there is nobody to stream from, those that stream by their last word among them.
fn stranded<'a>(policy: Policy<'_>, evidence: Evidence<'a>) -> Vec<&'a Member> {
    let view = evidence.view;
    let may = |member: &&Member| {
        let last_resort = balance::last_resort(view, member, policy.wanted(evidence));
        last_resort.is_ok() && !evidence.silent.contains(&member.name)
    };
    view.members.values().filter(may).collect()
}

/// The leader, if a reader that no replica can take could be helped by knowing that it does not answer. Nothing for a leader
/// of which that is known.
#[must_use]
pub fn worth_asking<'a>(policy: Policy<'_>, evidence: Evidence<'a>, avoid: &[MemberName]) -> Option<&'a Member> {
    let view = evidence.view;
    if !policy.role.is_balanced() || balance::nobody_to_stream_from(view, avoid) {
        return None;
    }
    let untried = |member: &&Member| !avoid.contains(&member.name);
    stranded(policy, evidence)
        .iter()
        .any(untried)
        .then(|| view.leader_member())?
}

/// Whether `target`, chosen a moment ago, may still be connected to: a dial takes time. `avoid` is what it was chosen with.
#[must_use]
pub fn still_leads_to(target: &Target, policy: Policy<'_>, evidence: Evidence<'_>, avoid: &[MemberName]) -> bool {
    if target.epoch.is_some() {
        let leader = match policy.role {
            ListenerRole::Write => writer(evidence),
            ListenerRole::StandbyLeader => standby_leader(evidence),
            ListenerRole::Read | ListenerRole::Sync | ListenerRole::Async | ListenerRole::Any => {
                leader_of_either_kind(evidence)
            }
        };
        return leader.as_ref() == Ok(target);
    }
    let Some(member) = evidence.view.members.get(&target.member) else {
        return false;
    };
    let same_address = member.record.postgres_address().as_ref() == Some(&target.address);
    let view = evidence.view;
    let readable = || readable(policy, evidence, member).is_ok();
    let is_last_resort = || {
        balance::nobody_to_stream_from(view, avoid)
            && balance::last_resort(view, member, policy.wanted(evidence)).is_ok()
            && !evidence.silent.contains(&member.name)
    };
    same_address && (readable() || is_last_resort())
}

/// What a session stands on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footing {
    /// Its member.
    pub member: MemberName,
    /// The holding of the leader key that it rests on; nothing while its member is a replica.
    pub epoch: Option<Epoch>,
    /// What becomes of it when its member is promoted.
    pub on_promoted: OnChange,
    /// The number of the listener that it came by.
    pub listener: usize,
    /// When it began.
    pub since: Boottime,
    /// The proxy can read its bytes, and so can end it between two transactions.
    pub in_clear: bool,
}

/// Why a session must end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outlived {
    /// The leader key is held anew or by another, or by nobody.
    EpochOver {
        /// The holding now, if any.
        now: Option<Epoch>,
    },
    /// The proof that the leader leads is too old.
    WarrantLapsed,
    /// It came for a replica, and its member is none any more.
    Promoted {
        /// The member.
        member: MemberName,
    },
    /// Its replica does not answer: its host is gone or cannot be reached.
    Silent {
        /// The member.
        member: MemberName,
    },
    /// Its member has been other than its listener asks for, for too long.
    Strayed {
        /// The member.
        member: MemberName,
        /// In what.
        why: LeftOut,
    },
    /// Its member has more sessions than its part.
    Moved {
        /// The member.
        member: MemberName,
    },
}

/// Whether a session may go on, and on which epoch from now on, or why not. A promoted member takes writes, so a session
/// with it needs a warrant like any other. A session goes over to a later holding of the same member that was not ended in
/// between.
///
/// # Errors
/// The reason to end it.
pub fn may_go_on(footing: &Footing, evidence: Evidence<'_>) -> Result<Option<Epoch>, Outlived> {
    let now = evidence.view.epoch();
    let promoted = || now.filter(|now| now.holder == footing.member);
    let Some(epoch) = footing.epoch.as_ref().or_else(promoted) else {
        let member = footing.member.clone();
        return if evidence.silent.contains(&member) {
            Err(Outlived::Silent { member })
        } else {
            Ok(None)
        };
    };
    if footing.epoch.is_none() && footing.on_promoted == OnChange::End {
        let member = footing.member.clone();
        return Err(Outlived::Promoted { member });
    }
    let reach = |now: &Epoch| evidence.words.reach(epoch, now, evidence.view, evidence.now);
    let Some(now) = now.filter(|now| *now == epoch || reach(now)) else {
        return Err(Outlived::EpochOver { now: now.cloned() });
    };
    if !evidence.warrant.holds(evidence.now) {
        return Err(Outlived::WarrantLapsed);
    }
    Ok(Some(now.clone()))
}

/// Why a session that goes on, resting on `epoch` from now on, should leave when it is idle: its member has just been
/// promoted.
#[must_use]
pub fn should_leave(footing: &Footing, epoch: Option<&Epoch>) -> Option<Outlived> {
    let is_promoted = footing.epoch.is_none() && epoch.is_some();
    let member = footing.member.clone();
    (is_promoted && footing.on_promoted == OnChange::EndWhenIdle).then_some(Outlived::Promoted { member })
}

#[cfg(test)]
mod reader_tests;
#[cfg(test)]
mod tests;
