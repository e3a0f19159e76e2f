//! `pgherd demote-cluster` and `pgherd promote-cluster`: the section `standby_cluster` of the dynamic configuration is written or
//! removed, and the leader's role is waited for.

use std::time::Duration;

use hyper::Method;
use pgherd_cluster::record::{PgState, Role};
use pgherd_cluster::view::View;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::answer::text_of;
use super::site::{ANSWER_MAX, Scene, Site, order};
use super::utc_now;
use crate::args::{DemoteClusterArgs, PromoteClusterArgs};
use crate::failure::Failure;
use crate::terminal::say;

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A leader that is demoted is stopped, may be rewound, and is started again.
const CHANGED_MAX: Duration = Duration::from_secs(300);

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    Demote,
    Promote,
}

impl Change {
    const fn word(self) -> &'static str {
        match self {
            Self::Demote => "demote",
            Self::Promote => "promote",
        }
    }

    const fn noun(self) -> &'static str {
        match self {
            Self::Demote => "demotion",
            Self::Promote => "promotion",
        }
    }

    /// Whether the view shows that it has come about: the role, under this holding of the leader key, of a server that runs.
    fn is_done(self, view: &View) -> bool {
        let role = match self {
            Self::Demote => Role::StandbyLeader,
            Self::Promote => Role::Primary,
        };
        let member = view.leader_member();
        member.is_some_and(|member| member.record.role == role && member.record.state == PgState::Running)
    }
}

/// Runs `demote-cluster`.
///
/// # Errors
/// When it makes no sense, was not confirmed, was refused, or does not come about.
pub(crate) async fn demote(scene: &Scene, args: &DemoteClusterArgs) -> Result<(), Failure> {
    let section = section_of(args);
    if !["host", "port", "restore_command"]
        .iter()
        .any(|key| section.contains_key(*key))
    {
        return Err(Failure::configuration(
            "At least --host, --port or --restore-command should be specified",
        ));
    }
    let site = scene.site(args.cluster.cluster.as_deref(), args.cluster.group)?;
    change(scene, &site, Change::Demote, Value::Object(section), args.force).await
}

/// Runs `promote-cluster`.
///
/// # Errors
/// As for [`demote`].
pub(crate) async fn promote(scene: &Scene, args: &PromoteClusterArgs) -> Result<(), Failure> {
    let site = scene.site(args.cluster.cluster.as_deref(), args.cluster.group)?;
    change(scene, &site, Change::Promote, Value::Null, args.force).await
}

fn section_of(args: &DemoteClusterArgs) -> Map<String, Value> {
    let fields = [
        ("host", args.host.clone().map(Value::from)),
        ("port", args.port.map(Value::from)),
        ("restore_command", args.restore_command.clone().map(Value::from)),
        ("primary_slot_name", args.primary_slot_name.clone().map(Value::from)),
    ];
    let given = fields
        .into_iter()
        .filter_map(|(key, value)| Some((key.to_owned(), value?)));
    given.collect()
}

async fn change(scene: &Scene, site: &Site, change: Change, section: Value, force: bool) -> Result<(), Failure> {
    let mut prompter = scene.prompter("--force");
    if !force {
        prompter.ensure_somebody_answers()?;
    }
    let view = site.view().await?;
    let Some(leader) = view.leader_member() else {
        return Err(Failure::Refused(format!(
            "Cluster has no leader, {} is not possible",
            change.noun()
        )));
    };
    let config = view.config.value.as_ref();
    let follows = config.is_some_and(pgherd_cluster::record::DynamicConfig::is_standby_cluster);
    if follows == (change == Change::Demote) {
        return Err(Failure::Refused("Cluster is already in the required state".to_owned()));
    }
    say("Current cluster topology");
    Site::show(&view);
    let (word, name) = (change.word(), site.name());
    if !force && !prompter.confirms(&format!("Are you sure you want to {word} {name} cluster?"))? {
        return Err(Failure::Refused(format!("Aborted cluster {}", change.noun())));
    }
    let patch = order(Method::PATCH, "/config", json!({"standby_cluster": section}));
    match site.ask(leader, patch, ANSWER_MAX).await {
        Ok(answer) if answer.status == 200 => {}
        Ok(answer) => {
            return Err(Failure::Refused(format!(
                "Failed to {word} {name} cluster: {}, {}",
                answer.status,
                text_of(&answer)
            )));
        }
        Err(no_answer) => {
            return Err(Failure::Unavailable(format!(
                "Failed to {word} {name} cluster: {}",
                no_answer.why
            )));
        }
    }
    wait(site, change).await?;
    Site::show(&site.view().await?);
    Ok(())
}

async fn wait(site: &Site, change: Change) -> Result<(), Failure> {
    let until = Instant::now() + CHANGED_MAX;
    let mut tick = interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while Instant::now() < until {
        tick.tick().await;
        let view = site.view().await?;
        let now = utc_now("%Y-%m-%d %H:%M:%S");
        if change.is_done(&view) {
            say(format!("{now} cluster is successfully {}d", change.word()));
            return Ok(());
        }
        say(format!("{now} {}", progress(&view)));
    }
    Err(Failure::TryAgain(format!(
        "the cluster is not {}d after {} s; `pgherd list` tells how it is",
        change.word(),
        CHANGED_MAX.as_secs()
    )))
}

fn progress(view: &View) -> String {
    let leader = view.leader_member().map(|member| &member.record);
    let unlocked = if view.epoch().is_none() { "True" } else { "False" };
    let role = leader.map_or("None", |record| record.role.as_str());
    let state = leader.map_or("None", |record| record.state.as_str());
    format!("cluster is unlocked: {unlocked}, leader role: {role}, leader state: {state}")
}

#[cfg(test)]
mod tests {
    use super::super::members::tests::view_with;
    use super::*;

    #[test]
    fn a_change_is_done_when_the_leader_runs_in_its_new_role() {
        let leader = |role: &str, state: &str| {
            let record =
                json!({"conn_url": "postgres://h:1/p", "api_url": "http://h:2/patroni", "role": role, "state": state});
            view_with(Some("node1"), &[("members/node1", record)])
        };
        assert!(Change::Promote.is_done(&leader("primary", "running")));
        assert!(!Change::Promote.is_done(&leader("standby_leader", "running")));
        assert!(Change::Demote.is_done(&leader("standby_leader", "running")));
        assert!(!Change::Demote.is_done(&leader("standby_leader", "stopping")));
        assert!(!Change::Demote.is_done(&view_with(None, &[])));
        assert_eq!(
            progress(&leader("standby_leader", "running")),
            "cluster is unlocked: False, leader role: standby_leader, leader state: running"
        );
        assert_eq!(
            progress(&view_with(None, &[])),
            "cluster is unlocked: True, leader role: None, leader state: None"
        );
    }
}
