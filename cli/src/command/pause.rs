//! `pgherd pause` and `pgherd resume`.

use std::time::Duration;

use hyper::Method;
use pgherd_cluster::record::DynamicConfig;
use pgherd_cluster::view::{Member, View};
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::answer::text_of;
use super::site::{ANSWER_MAX, Scene, Site, order};
use crate::args::PauseArgs;
use crate::failure::Failure;
use crate::terminal::say;

/// How often it is looked whether all have seen it.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Members may take a second longer than their cycle, and much longer than a short one on a busy machine.
const GRACE: Duration = Duration::from_secs(1);
const SEEN_MIN: Duration = Duration::from_secs(15);

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Pause,
    Resume,
}

impl Change {
    const fn is_pause(self) -> bool {
        matches!(self, Self::Pause)
    }

    const fn word(self) -> &'static str {
        if self.is_pause() { "pause" } else { "resume" }
    }

    fn done(self) -> String {
        format!("Success: cluster management is {}d", self.word())
    }
}

/// Runs either.
///
/// # Errors
/// When it is so already, when nobody can be asked, or when `--wait` was in vain.
pub(crate) async fn run(scene: &Scene, args: &PauseArgs, change: Change) -> Result<(), Failure> {
    let site = scene.site(args.cluster.cluster.as_deref(), args.cluster.group)?;
    let view = site.view().await?;
    let paused = view.config.value.as_ref().is_some_and(DynamicConfig::is_paused);
    if paused == change.is_pause() {
        let already = if paused { "already paused" } else { "not paused" };
        return Err(Failure::Refused(format!("Cluster is {already}")));
    }
    ask(&site, &view, change).await?;
    if !args.wait {
        say(change.done());
        return Ok(());
    }
    say(format!(
        "'{}' request sent, waiting until it is recognized by all nodes",
        change.word()
    ));
    seen_by_all(&site, &view, change).await?;
    say(change.done());
    Ok(())
}

/// Asks the leader, and then the others until one answers.
async fn ask(site: &Site, view: &View, change: Change) -> Result<(), Failure> {
    let value = if change.is_pause() {
        Value::from(true)
    } else {
        Value::Null
    };
    let mut unreachable = Vec::new();
    for member in leader_first(view) {
        let asked = order(Method::PATCH, "/config", json!({"pause": value}));
        match site.ask(member, asked, ANSWER_MAX).await {
            Ok(answer) if answer.status == 200 => return Ok(()),
            Ok(answer) => {
                return Err(Failure::Refused(format!(
                    "Failed: {} cluster management status code={}, ({})",
                    change.word(),
                    answer.status,
                    text_of(&answer)
                )));
            }
            Err(no_answer) => unreachable.push(no_answer.why),
        }
    }
    let tried = unreachable.join("; ");
    Err(Failure::Unavailable(format!(
        "Can not find accessible cluster member{}{tried}",
        if tried.is_empty() { "" } else { ": " }
    )))
}

/// The leader, then the others by name.
pub(crate) fn leader_first(view: &View) -> Vec<&Member> {
    let leader = view.leader_member();
    let others = view.members.values();
    let others = others.filter(|member| leader.is_none_or(|leader| leader.name != member.name));
    leader.into_iter().chain(others).collect()
}

/// Waits until every member that was there says in its key that it has seen it.
async fn seen_by_all(site: &Site, before: &View, change: Change) -> Result<(), Failure> {
    let limit = (before.timing().loop_wait() + GRACE).max(SEEN_MIN);
    let until = Instant::now() + limit;
    let mut tick = interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let view = site.view().await?;
        let missing = not_seen_by(before, &view, change);
        if missing.is_empty() {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(Failure::TryAgain(format!(
                "{} members didn't recognized {} state after {} seconds",
                missing.join(", "),
                change.word(),
                limit.as_secs()
            )));
        }
    }
}

/// Those of `before` that are still there and have not seen it.
fn not_seen_by<'a>(before: &View, now: &'a View, change: Change) -> Vec<&'a str> {
    let members = now
        .members
        .values()
        .filter(|member| before.members.contains_key(&member.name));
    let missing = members.filter(|member| (member.record.pause == Some(true)) != change.is_pause());
    missing.map(|member| member.name.as_str()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::members::tests::view_with;
    use super::*;

    #[test]
    fn the_leader_is_asked_first_and_all_must_have_seen_it() {
        let view = view_with(Some("node3"), &[]);
        let order: Vec<&str> = leader_first(&view).iter().map(|member| member.name.as_str()).collect();
        assert_eq!(order, ["node3", "node1", "node2", "node4"]);
        let seen = json!({"conn_url": "postgres://h:1/p", "api_url": "http://h:2/patroni", "pause": true});
        let half = view_with(
            Some("node3"),
            &[("members/node1", seen.clone()), ("members/node5", seen)],
        );
        assert_eq!(not_seen_by(&view, &half, Change::Pause), ["node2", "node3", "node4"]);
        assert_eq!(not_seen_by(&view, &half, Change::Resume), ["node1"]);
        assert_eq!(Change::Resume.done(), "Success: cluster management is resumed");
    }
}
