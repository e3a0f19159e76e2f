//! `pgherd reinit`: a member's data is replaced by a new copy.

use std::time::Duration;

use hyper::Method;
use pgherd_cluster::http::Answer;
use pgherd_cluster::view::{Member, View};
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::answer::{Outcomes, text_of};
use super::members::{chosen, confirm, in_role, names};
use super::prompt::Prompter;
use super::site::{ANSWER_MAX, NoAnswer, Scene, Site, order};
use crate::args::{ReinitArgs, RoleArg};
use crate::failure::Failure;
use crate::terminal::say;

const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A copy of a large database takes hours.
const COPY_MAX: Duration = Duration::from_secs(24 * 3600);
/// A member that does not answer for so long is not waited for.
const SILENT_MAX: Duration = Duration::from_secs(60);

/// Runs the command.
///
/// # Errors
/// When it makes no sense, was not confirmed, or a member refused or failed.
pub(crate) async fn run(scene: &Scene, args: &ReinitArgs) -> Result<(), Failure> {
    let mut prompter = scene.prompter("the members' names, and --force");
    if !args.members.force {
        prompter.ensure_somebody_answers()?;
    }
    let site = scene.site(Some(&args.members.cluster), args.members.group)?;
    let view = site.view().await?;
    Site::show(&view);
    let members = which(args, &view, &mut prompter)?;
    if !args.members.force {
        confirm(&mut prompter, "reinitialize", &members, None)?;
    }
    let mut outcomes = Outcomes::default();
    let mut begun = Vec::new();
    for member in members {
        // What it was before is how its end is told: a new copy means a new postmaster.
        let before = site.get(member, "/patroni", ANSWER_MAX).await.unwrap_or_default();
        let mut answer = ask(&site, member, args, args.members.force).await;
        if !args.members.force && is_busy(&answer) {
            say(answer.as_ref().map(text_of).unwrap_or_default());
            if prompter.confirms("Do you want to cancel it and reinitialize anyway?")? {
                answer = ask(&site, member, args, true).await;
            }
        }
        if outcomes.note("reinitialize", member.name.as_str(), &answer) {
            begun.push((member, before));
        }
    }
    if args.wait {
        for (member, before) in begun {
            say(format!("Waiting for reinitialize to complete on: {}", member.name));
            match wait(&site, member, &before).await {
                Ok(()) => outcomes.done(format!("Reinitialize is completed on: {}", member.name)),
                Err(why) => outcomes.failed(format!("Failed: reinitialize for member {}: {why}", member.name)),
            }
        }
    }
    outcomes.end()
}

/// The members that are meant; all replicas would be too many to guess.
fn which<'a>(args: &ReinitArgs, view: &'a View, prompter: &mut Prompter<'_>) -> Result<Vec<&'a Member>, Failure> {
    let mut named = args.members.members.clone();
    if named.is_empty() {
        let replicas = in_role(view, RoleArg::Replica);
        let question = format!("Which member do you want to reinitialize [{}]? []: ", names(&replicas));
        named = prompter
            .ask(&question)?
            .unwrap_or_default()
            .split([',', ' '])
            .map(str::to_owned)
            .collect();
        named.retain(|name| !name.is_empty());
    }
    if named.is_empty() {
        return Err(Failure::Refused("no member was named".to_owned()));
    }
    let leads = |name: &String| view.epoch().is_some_and(|epoch| epoch.holder.as_str() == name);
    if named.iter().any(leads) {
        return Err(Failure::Refused(
            "No replica among provided members: the leader is what the others are copies of".to_owned(),
        ));
    }
    chosen(view, &named, RoleArg::Replica)
}

async fn ask(site: &Site, member: &Member, args: &ReinitArgs, force: bool) -> Result<Answer, NoAnswer> {
    let body = json!({"force": force, "from_leader": args.from_leader});
    site.ask(member, order(Method::POST, "/reinitialize", body), ANSWER_MAX)
        .await
}

fn is_busy(answer: &Result<Answer, NoAnswer>) -> bool {
    answer
        .as_ref()
        .is_ok_and(|answer| answer.status == 503 && answer.text().ends_with("already in progress"))
}

/// Waits until the member runs on its new copy, and shows how far it is.
async fn wait(site: &Site, member: &Member, before: &Value) -> Result<(), String> {
    let until = Instant::now() + COPY_MAX;
    let mut heard = Instant::now();
    let mut shown = String::new();
    let mut was_gone = false;
    let mut tick = interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while Instant::now() < until {
        tick.tick().await;
        match site.get(member, "/patroni", ANSWER_MAX).await {
            Some(status) => {
                heard = Instant::now();
                was_gone |= status["state"] != "running";
                match Progress::of(before, was_gone, &status) {
                    Progress::Done => return Ok(()),
                    Progress::Failed(why) => return Err(why),
                    Progress::UnderWay => {}
                }
            }
            None if heard.elapsed() >= SILENT_MAX => {
                return Err(format!("it has not answered for {} s", SILENT_MAX.as_secs()));
            }
            None => {}
        }
        if let Some(line) = copied(site, member).await
            && line != shown
        {
            say(format!("{}: {line}", member.name));
            shown = line;
        }
    }
    Err(format!("it takes longer than {} h", COPY_MAX.as_secs() / 3600))
}

/// How far a member is, by its own word.
#[derive(Debug, PartialEq, Eq)]
enum Progress {
    UnderWay,
    Done,
    Failed(String),
}

impl Progress {
    /// A copy was made where another postmaster runs than before, or one runs again after it was seen that none does. What ran
    /// before need not be known: the member may not have answered then.
    fn of(before: &Value, was_gone: bool, now: &Value) -> Self {
        if let Some(why) = now["pgherd"]["reinitialize_failed"].as_str() {
            return Self::Failed(why.to_owned());
        }
        let started = |status: &Value| status["postmaster_start_time"].as_str().map(str::to_owned);
        let another = started(before).is_some() && started(now).is_some() && started(now) != started(before);
        let anew = another || was_gone;
        match now["state"].as_str() {
            Some("running") if anew => Self::Done,
            Some(state @ ("start failed" | "initdb failed")) => Self::Failed(format!("state is {state}")),
            _ => Self::UnderWay,
        }
    }
}

/// What the leader says of the copy, where it is one of ours.
async fn copied(site: &Site, member: &Member) -> Option<String> {
    let view = site.view().await.ok()?;
    let leader = view.leader_member().filter(|leader| leader.record.pgherd.is_some())?;
    let backups = site.get(leader, "/api/v1/backups", ANSWER_MAX).await?;
    let of = backups
        .as_array()?
        .iter()
        .find(|backup| backup["name"] == member.name.as_str())?;
    progress_line(of)
}

/// In tenths, so that an hour's copy is no more than a few lines.
fn progress_line(backup: &Value) -> Option<String> {
    let phase = backup["phase"].as_str()?;
    let (total, streamed) = (
        backup["total"].as_u64(),
        backup["streamed"].as_u64().unwrap_or_default(),
    );
    Some(match total.filter(|total| *total > 0) {
        Some(total) => {
            let tenths = (u128::from(streamed) * 10 / u128::from(total)).min(10);
            format!("{phase}, {} % of {} MB", tenths * 10, total.div_ceil(1 << 20))
        }
        None => phase.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::members::tests::view_with;
    use super::*;
    use crate::args::MembersArgs;

    #[test]
    fn a_new_postmaster_tells_that_a_copy_is_done() {
        let running = |started: &str| json!({"state": "running", "postmaster_start_time": started});
        let before = running("then");
        for (now, expected) in [
            (running("then"), Progress::UnderWay),
            (json!({"state": "creating replica"}), Progress::UnderWay),
            (json!({"state": "starting"}), Progress::UnderWay),
            (running("later"), Progress::Done),
            (
                json!({"state": "start failed"}),
                Progress::Failed("state is start failed".to_owned()),
            ),
            (
                json!({"state": "running", "postmaster_start_time": "later", "pgherd": {"reinitialize_failed": "no room"}}),
                Progress::Failed("no room".to_owned()),
            ),
        ] {
            assert_eq!(Progress::of(&before, false, &now), expected, "{now}");
        }
        // What was before is not known, and what runs may be just that.
        assert_eq!(Progress::of(&json!(null), false, &running("x")), Progress::UnderWay);
        assert_eq!(Progress::of(&json!(null), true, &running("x")), Progress::Done);
    }

    #[test]
    fn progress_is_told_in_tenths() {
        let line = |backup: Value| progress_line(&backup);
        let phase = "streaming database files";
        assert_eq!(
            line(json!({"phase": phase, "total": 104_857_600, "streamed": 48_000_000})).as_deref(),
            Some("streaming database files, 40 % of 100 MB")
        );
        assert_eq!(
            line(json!({"phase": phase, "total": null, "streamed": 1})).as_deref(),
            Some(phase)
        );
        assert_eq!(line(json!({})), None);
    }

    fn asked(named: &[&str], answers: &str) -> (String, Result<String, Failure>) {
        let view = view_with(Some("node3"), &[]);
        let args = ReinitArgs {
            members: MembersArgs {
                cluster: "batman".to_owned(),
                members: named.iter().map(|name| (*name).to_owned()).collect(),
                group: crate::args::Group::default(),
                force: true,
            },
            from_leader: false,
            wait: false,
        };
        let mut output = Vec::new();
        let chosen = which(&args, &view, &mut Prompter::scripted(answers, &mut output)).map(|members| names(&members));
        (String::from_utf8(output).expect("text"), chosen)
    }

    #[test]
    fn only_replicas_that_are_named_are_reinitialized() {
        assert_eq!(asked(&["node1"], ""), (String::new(), Ok("node1".to_owned())));
        let (question, chosen) = asked(&[], "node2\n");
        assert_eq!(
            question,
            "Which member do you want to reinitialize [node1, node2, node4]? []: "
        );
        assert_eq!(chosen, Ok("node2".to_owned()));
        let refused = asked(&["node3"], "").1.expect_err("it leads").to_string();
        assert!(refused.starts_with("No replica among provided members"), "{refused}");
        assert!(asked(&[], "\n").1.is_err());
    }
}
