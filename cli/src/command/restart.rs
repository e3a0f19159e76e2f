//! `pgherd restart`: PostgreSQL of members, at once or at a time. One after another without a long stall is `rolling`.

use std::time::Duration;

use hyper::Method;
use jiff::tz::TimeZone;
use pgherd_cluster::http::Answer;
use pgherd_cluster::record::DynamicConfig;
use pgherd_cluster::view::{Member, View};
use serde_json::{Map, Value};

use super::answer::{Outcomes, failed};
use super::members::{chosen, confirm};
use super::prompt::Prompter;
use super::site::{NoAnswer, Scene, Site, order};
use super::{rolling, when};
use crate::args::RestartArgs;
use crate::failure::Failure;

/// For the checkpoint and the stop, beside the time that a start may take.
const BESIDE_THE_START: Duration = Duration::from_secs(120);

/// Runs the command.
///
/// # Errors
/// When it makes no sense, was not confirmed, or a member refused or failed.
pub(crate) async fn run(scene: &Scene, args: &RestartArgs) -> Result<(), Failure> {
    let mut prompter = scene.prompter("--force");
    if !args.members.force {
        prompter.ensure_somebody_answers()?;
    }
    let site = scene.site(Some(&args.members.cluster), args.members.group)?;
    let view = site.view().await?;
    Site::show(&view);
    let mut members = chosen(&view, &args.members.members, args.role)?;
    let conditions = converse(args, &view, &members, &mut prompter)?;
    if args.any {
        members = drawn(members);
    }
    if args.pending && !conditions.contains_key("schedule") {
        members.retain(|member| member.record.pending_restart == Some(true));
    }
    let limit = limit(&view, args.timeout.as_deref());
    if args.rolling {
        return rolling::run(&site, &view, &members, &conditions, limit).await;
    }
    let mut outcomes = Outcomes::default();
    for member in members {
        let answer = restart(&site, member, &conditions, limit).await;
        note(&mut outcomes, member.name.as_str(), &answer);
    }
    outcomes.end()
}

/// Asks a member, and waits until it has been restarted.
pub(crate) async fn restart(
    site: &Site,
    member: &Member,
    conditions: &Map<String, Value>,
    limit: Duration,
) -> Result<Answer, NoAnswer> {
    let asked = order(Method::POST, "/restart", Value::Object(conditions.clone()));
    site.order(member, asked, limit).await
}

/// Says what became of it; whether it was done.
pub(crate) fn note(outcomes: &mut Outcomes, name: &str, answer: &Result<Answer, NoAnswer>) -> bool {
    match answer.as_ref().map(|answer| answer.status) {
        Ok(202) => {
            outcomes.done(format!("Success: restart scheduled on member {name}"));
            true
        }
        Ok(409) => {
            outcomes.failed(format!("Failed: another restart is already scheduled on member {name}"));
            false
        }
        Ok(200) => outcomes.note("restart", name, answer),
        _ => {
            outcomes.failed(failed("restart", name, answer));
            false
        }
    }
}

/// One of them, whichever.
fn drawn(members: Vec<&Member>) -> Vec<&Member> {
    let now = pgherd_cluster::clock::Boottime::now().as_nanos();
    let count = u64::try_from(members.len()).unwrap_or(1).max(1);
    let at = usize::try_from(now / 1000 % count).unwrap_or_default();
    members.into_iter().skip(at).take(1).collect()
}

/// Fills in what the arguments leave open, by asking; the body of the request.
fn converse(
    args: &RestartArgs,
    view: &View,
    members: &[&Member],
    prompter: &mut Prompter<'_>,
) -> Result<Map<String, Value>, Failure> {
    let asks = !args.members.force;
    let scheduled = match &args.scheduled {
        Some(at) => at.clone(),
        None if asks && !args.rolling => {
            let question = format!("When should the restart take place (e.g. {})  [now]: ", when::example());
            prompter.ask(&question)?.unwrap_or_default()
        }
        None => String::new(),
    };
    let at = when::parse(&scheduled, &TimeZone::system())?;
    if asks {
        confirm(prompter, "restart", members, at.as_deref())?;
    }
    let version = match &args.pg_version {
        Some(version) => Some(version.clone()),
        None if asks => prompter.ask("Restart if the PostgreSQL version is less than provided (e.g. 9.5.2)  []: ")?,
        None => None,
    };
    let paused = view.config.value.as_ref().is_some_and(DynamicConfig::is_paused);
    if at.is_some() && paused {
        return Err(Failure::Refused(
            "Can't schedule restart in the paused state".to_owned(),
        ));
    }
    let mut body = Map::new();
    if args.pending {
        body.insert("restart_pending".to_owned(), true.into());
    }
    let texts = [
        ("postgres_version", version),
        ("schedule", at),
        ("timeout", args.timeout.clone()),
    ];
    for (key, value) in texts {
        if let Some(value) = value {
            body.insert(key.to_owned(), value.into());
        }
    }
    if let Some(version) = body.get("postgres_version").and_then(Value::as_str) {
        check_version(version)?;
    }
    Ok(body)
}

fn check_version(text: &str) -> Result<(), Failure> {
    match version_number(text) {
        Some(_) => Ok(()),
        None => Err(Failure::configuration(format!(
            "Invalid PostgreSQL version format: X.Y or X.Y.Z is accepted: {text}"
        ))),
    }
}

/// A version as PostgreSQL's `server_version_num` has it: two parts since 10, three before.
pub(super) fn version_number(text: &str) -> Option<u64> {
    let numbers: Vec<Option<u64>> = text.split('.').map(|part| part.parse().ok()).collect();
    match *numbers.as_slice() {
        [Some(major @ 1..=999), Some(minor @ 0..=99)] => Some(major * 10_000 + minor),
        [Some(major @ 1..=999), Some(middle @ 0..=99), Some(minor @ 0..=99)] => {
            Some(major * 10_000 + middle * 100 + minor)
        }
        _ => None,
    }
}

/// How long an answer is waited for.
fn limit(view: &View, timeout: Option<&str>) -> Duration {
    let config = view.config.value.clone().unwrap_or_default();
    let asked = timeout.and_then(|text| text.parse().ok()).map(Duration::from_secs);
    let start = asked.unwrap_or_default().max(config.primary_start_timeout());
    start.min(Duration::from_secs(86_400)) + BESIDE_THE_START
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::members::tests::view_with;
    use super::*;
    use crate::args::{MembersArgs, RoleArg};

    fn args(force: bool) -> RestartArgs {
        RestartArgs {
            members: MembersArgs {
                cluster: "batman".to_owned(),
                members: Vec::new(),
                group: crate::args::Group::default(),
                force,
            },
            role: RoleArg::Any,
            any: false,
            scheduled: None,
            pg_version: None,
            pending: false,
            timeout: None,
            rolling: false,
        }
    }

    fn talk(args: &RestartArgs, view: &View, answers: &str) -> (String, Result<Value, Failure>) {
        let mut output = Vec::new();
        let members = chosen(view, &["node1".to_owned(), "node2".to_owned()], RoleArg::Any).expect("there");
        let result = converse(args, view, &members, &mut Prompter::scripted(answers, &mut output));
        (String::from_utf8(output).expect("text"), result.map(Value::Object))
    }

    #[test]
    fn the_conversation_is_patronictls() {
        let view = view_with(Some("node3"), &[]);
        let (asked, result) = talk(&args(false), &view, "\ny\n16.1\n");
        let (head, tail) = asked.split_once(")  [now]: ").expect("a question for the time");
        assert!(
            head.starts_with("When should the restart take place (e.g. 20"),
            "{head}"
        );
        assert_eq!(
            tail,
            "Are you sure you want to restart members node1, node2? [y/N]: \
             Restart if the PostgreSQL version is less than provided (e.g. 9.5.2)  []: "
        );
        assert_eq!(result, Ok(json!({"postgres_version": "16.1"})));
        let (asked, result) = talk(&args(true), &view, "");
        assert_eq!((asked.as_str(), result), ("", Ok(json!({}))));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let view = view_with(Some("node3"), &[("config", json!({"pause": true}))]);
        let scheduled = RestartArgs {
            scheduled: Some("2040-01-01T00:00Z".to_owned()),
            ..args(true)
        };
        assert_eq!(
            talk(&scheduled, &view, "").1,
            Err(Failure::Refused(
                "Can't schedule restart in the paused state".to_owned()
            ))
        );
        let refused = talk(&args(false), &view, "\nn\n").1;
        assert_eq!(refused, Err(Failure::Refused("Aborted restart".to_owned())));
        let version = RestartArgs {
            pg_version: Some("sixteen".to_owned()),
            ..args(true)
        };
        assert!(talk(&version, &view, "").1.is_err());
        let numbers = ["16.1", "9.6.24", "15", "16.100"].map(version_number);
        assert_eq!(numbers, [Some(160_001), Some(90_624), None, None]);
    }
}
