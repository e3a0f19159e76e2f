//! `pgherd flush`: what was scheduled is taken back.

use hyper::Method;
use pgherd_cluster::etcd::Txn;
use pgherd_cluster::key::Key;
use pgherd_cluster::view::View;
use serde_json::json;

use super::answer::{Outcomes, failed, text_of};
use super::members::{chosen, confirm};
use super::pause::leader_first;
use super::site::{ANSWER_MAX, Scene, Site, order};
use crate::args::FlushArgs;
use crate::failure::Failure;
use crate::terminal::say;

/// What is taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Restart,
    Switchover,
}

/// Runs the command.
///
/// # Errors
/// When it makes no sense, was not confirmed, or a member refused.
pub(crate) async fn run(scene: &Scene, args: &FlushArgs) -> Result<(), Failure> {
    let (names, target) = target_of(&args.words)?;
    let mut prompter = scene.prompter("--force");
    if target == Target::Restart && !args.force {
        prompter.ensure_somebody_answers()?;
    }
    let site = scene.site(Some(&args.cluster), args.group)?;
    let view = site.view().await?;
    if target == Target::Switchover {
        return switchover(&site, &view).await;
    }
    Site::show(&view);
    let members = chosen(&view, names, args.role)?;
    if !args.force {
        confirm(&mut prompter, "flush scheduled restart of", &members, None)?;
    }
    let mut outcomes = Outcomes::default();
    for member in members {
        let name = member.name.as_str();
        if member.record.scheduled_restart.is_none() {
            outcomes.done(format!("No scheduled restart for member {name}"));
            continue;
        }
        let answer = site
            .ask(member, order(Method::DELETE, "/restart", json!({})), ANSWER_MAX)
            .await;
        match answer.as_ref().map(|answer| answer.status) {
            // Its time came a moment ago, or somebody else took it back.
            Ok(404) => outcomes.done(format!("No scheduled restart for member {name}")),
            _ => {
                outcomes.note("flush scheduled restart", name, &answer);
            }
        }
    }
    outcomes.end()
}

fn target_of(words: &[String]) -> Result<(&[String], Target), Failure> {
    match words.split_last().map(|(last, names)| (last.as_str(), names)) {
        Some(("restart", names)) => Ok((names, Target::Restart)),
        Some(("switchover", names)) => Ok((names, Target::Switchover)),
        _ => Err(Failure::configuration(
            "the last word says what to take back: restart or switchover",
        )),
    }
}

async fn switchover(site: &Site, view: &View) -> Result<(), Failure> {
    let scheduled = view
        .failover
        .value
        .as_ref()
        .is_some_and(|request| request.scheduled_at.is_some());
    if !scheduled {
        say("No pending scheduled switchover");
        return Ok(());
    }
    for member in leader_first(view) {
        let answer = site
            .ask(member, order(Method::DELETE, "/switchover", json!({})), ANSWER_MAX)
            .await;
        match answer.as_ref().map(|answer| answer.status) {
            Ok(200) => {
                say(format!(
                    "Success: {}",
                    answer.map(|answer| text_of(&answer)).unwrap_or_default()
                ));
                return Ok(());
            }
            Ok(404) => {
                return Err(Failure::Refused("Failed: no switchover is scheduled".to_owned()));
            }
            Ok(_) => {
                return Err(Failure::Refused(failed(
                    "flush switchover",
                    member.name.as_str(),
                    &answer,
                )));
            }
            Err(_) => {} // The next one.
        }
    }
    say("No member answers: takes it back in etcd");
    in_store(site, view).await
}

/// As a member does it: an empty request is none.
async fn in_store(site: &Site, view: &View) -> Result<(), Failure> {
    let key = site.keys().of(&Key::Failover);
    let nothing = "{}";
    let txn = Txn::put_over(key, nothing.to_owned(), view.failover.mod_revision);
    let outcome = site.etcd.txn(&txn, site.budget()).await;
    match outcome.map_err(|error| site.store_failure(&error))? {
        outcome if outcome.has_put(nothing) => {
            say("Success: scheduled switchover deleted");
            Ok(())
        }
        _ => Err(Failure::TryAgain(
            "the request has just been changed by somebody else".to_owned(),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_says_what_to_take_back() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let restart = words("n1 n2 restart");
        assert_eq!(target_of(&restart), Ok((&words("n1 n2")[..], Target::Restart)));
        assert_eq!(target_of(&words("switchover")), Ok((&[][..], Target::Switchover)));
        assert!(target_of(&words("restart n1")).is_err());
    }
}
