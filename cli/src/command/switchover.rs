//! `pgherd switchover` and `pgherd failover`: patronictl's conversation, one request to a member's REST interface, and then the
//! wait until the new leader takes writes.
//!
//! Departs from patronictl in two things: what was refused or failed ends with exit code 1, so that scripts see it; and
//! success means that the new leader takes writes, not that the lease has moved.

use std::time::Duration;

use hyper::Method;
use jiff::tz::TimeZone;
use pgherd_cluster::etcd::Txn;
use pgherd_cluster::http::Answer;
use pgherd_cluster::key::Key;
use pgherd_cluster::record::{DynamicConfig, FailoverRequest};
use pgherd_cluster::view::{Member, ShownRole, View};
use serde_json::{Map, Value};

use super::answer::text_of;
use super::pause::leader_first;
use super::prompt::Prompter;
use super::site::{NoAnswer, Scene, Site, order};
use super::stall::Watch;
use super::{forecast, utc_now, when};
use crate::args::{FailoverArgs, SwitchoverArgs};
use crate::failure::Failure;
use crate::terminal::say;

/// A member answers when the switchover is over, or has failed, or after two of its cycles, and twenty seconds at least.
const BESIDE_CYCLES: Duration = Duration::from_secs(40);

/// Who gives and who takes; an absent candidate leaves the choice to the members, an absent leader makes it a failover.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) leader: Option<String>,
    pub(crate) candidate: Option<String>,
    pub(crate) scheduled_at: Option<String>,
}

impl Request {
    const fn action(&self) -> &'static str {
        if self.leader.is_some() {
            "switchover"
        } else {
            "failover"
        }
    }

    const fn title(&self) -> &'static str {
        if self.leader.is_some() {
            "Switchover"
        } else {
            "Failover"
        }
    }

    fn body(&self) -> Map<String, Value> {
        let fields = [
            ("candidate", &self.candidate),
            ("leader", &self.leader),
            ("scheduled_at", &self.scheduled_at),
        ];
        let given = fields
            .into_iter()
            .filter_map(|(key, value)| Some((key.to_owned(), value.as_deref()?.into())));
        given.collect()
    }
}

/// Runs `switchover`.
///
/// # Errors
/// When it makes no sense, was not confirmed, could not be asked for, or was refused.
pub(crate) async fn run(scene: &Scene, args: &SwitchoverArgs) -> Result<(), Failure> {
    let mut prompter = scene.prompter("--force");
    if !args.force && !args.dry_run {
        prompter.ensure_somebody_answers()?;
    }
    let site = scene.site(args.cluster.as_deref(), args.group)?;
    let view = site.view().await?;
    if args.dry_run {
        return forecast::run(&site, &view, args).await;
    }
    say("Current cluster topology");
    Site::show(&view);
    let request = converse(args, &view, &mut prompter)?;
    carry_out(&site, &view, &request).await?;
    Site::show(&site.view().await?);
    Ok(())
}

/// Runs `failover`.
///
/// # Errors
/// As for [`run`].
pub(crate) async fn failover(scene: &Scene, args: &FailoverArgs) -> Result<(), Failure> {
    let mut prompter = scene.prompter("--candidate NAME and --force");
    if !args.force {
        prompter.ensure_somebody_answers()?;
    }
    let site = scene.site(args.cluster.cluster.as_deref(), args.cluster.group)?;
    let view = site.view().await?;
    say("Current cluster topology");
    Site::show(&view);
    let request = converse_failover(args, &view, &mut prompter)?;
    carry_out(&site, &view, &request).await?;
    Site::show(&site.view().await?);
    Ok(())
}

fn refused<T>(text: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::Refused(text.into()))
}

/// Fills in what the arguments leave open, by asking, and checks the whole against the view.
fn converse(args: &SwitchoverArgs, view: &View, prompter: &mut Prompter<'_>) -> Result<Request, Failure> {
    let scope = &view.scope;
    let Some(current) = view.epoch().map(|epoch| epoch.holder.to_string()) else {
        return refused("This cluster has no leader");
    };
    let word = match view.leader_member().map(|member| view.shown_role(member)) {
        Some(ShownRole::StandbyLeader) => "Standby Leader",
        _ => "Primary",
    };
    let leader = match &args.leader {
        Some(leader) => leader.clone(),
        None if args.force => current.clone(),
        None => prompter
            .ask(&format!("{word} [{current}]: "))?
            .unwrap_or_else(|| current.clone()),
    };
    if leader != current {
        return refused(format!("Member {leader} is not the leader of cluster {scope}"));
    }
    let candidates = candidates(view);
    if candidates.is_empty() {
        return refused("No candidates found to switchover to");
    }
    let candidate = match &args.candidate {
        Some(candidate) => Some(candidate.clone()),
        None if args.force => None,
        None => prompter.ask(&question_for(&candidates))?,
    };
    check_candidate(view, &candidates, candidate.as_deref())?;
    let scheduled = match &args.scheduled {
        Some(at) => at.clone(),
        None if args.force => String::new(),
        None => {
            let question = format!(
                "When should the switchover take place (e.g. {} )  [now]: ",
                when::example()
            );
            prompter.ask(&question)?.unwrap_or_default()
        }
    };
    let scheduled_at = when::parse(&scheduled, &TimeZone::system())?;
    if scheduled_at.is_some() && view.config.value.as_ref().is_some_and(DynamicConfig::is_paused) {
        return refused("Can't schedule switchover in the paused state");
    }
    if !args.force {
        let demoting = format!("demoting current leader {current}");
        let (question, aborted) = match &scheduled_at {
            Some(at) => (
                format!("Are you sure you want to schedule switchover of cluster {scope} at {at}, {demoting}?"),
                "Aborting scheduled switchover",
            ),
            None => (
                format!("Are you sure you want to switchover cluster {scope}, {demoting}?"),
                "Aborting switchover",
            ),
        };
        if !prompter.confirms(&question)? {
            return refused(aborted);
        }
    }
    Ok(Request {
        leader: Some(leader),
        candidate,
        scheduled_at,
    })
}

fn converse_failover(args: &FailoverArgs, view: &View, prompter: &mut Prompter<'_>) -> Result<Request, Failure> {
    let scope = &view.scope;
    let candidates = candidates(view);
    if candidates.is_empty() {
        return refused("No candidates found to failover to");
    }
    let candidate = match &args.candidate {
        Some(candidate) => Some(candidate.clone()),
        None if args.force => None,
        None => prompter.ask(&question_for(&candidates))?,
    };
    let Some(candidate) = candidate else {
        return refused("Failover could be performed only to a specific candidate");
    };
    check_candidate(view, &candidates, Some(&candidate))?;
    let sync = &view.sync.value;
    let listed = sync.standbys().any(|standby| standby.eq_ignore_ascii_case(&candidate));
    if sync.is_active() && !listed && !args.force {
        let question = format!("Are you sure you want to failover to the asynchronous node {candidate}?");
        if !prompter.confirms(&question)? {
            return refused("Aborting failover");
        }
    }
    if !args.force {
        let demoting = view
            .epoch()
            .map(|epoch| format!(", demoting current leader {}", epoch.holder));
        let question = format!(
            "Are you sure you want to failover cluster {scope}{}?",
            demoting.unwrap_or_default()
        );
        if !prompter.confirms(&question)? {
            return refused("Aborting failover");
        }
    }
    Ok(Request {
        leader: None,
        candidate: Some(candidate),
        scheduled_at: None,
    })
}

fn question_for(candidates: &[String]) -> String {
    let quoted: Vec<String> = candidates.iter().map(|name| format!("'{name}'")).collect();
    format!("Candidate [{}] []: ", quoted.join(", "))
}

fn check_candidate(view: &View, candidates: &[String], candidate: Option<&str>) -> Result<(), Failure> {
    let scope = &view.scope;
    match candidate {
        Some(name) if view.epoch().is_some_and(|epoch| epoch.holder.as_str() == name) => {
            refused(format!("Member {name} is already the leader of cluster {scope}"))
        }
        Some(name) if !candidates.iter().any(|candidate| candidate == name) => refused(format!(
            "Member {name} does not exist in cluster {scope} or is tagged as nofailover"
        )),
        _ => Ok(()),
    }
}

/// Who may be named: sorted, without the leader and without members that must not lead.
fn candidates(view: &View) -> Vec<String> {
    let leader = view.epoch().map(|epoch| &epoch.holder);
    let others = view.members.values();
    let others = others.filter(|member| Some(&member.name) != leader && !member.record.nofailover());
    others.map(|member| member.name.to_string()).collect()
}

/// Asks for it, waits until the new leader takes writes, and says so and how long nobody did.
///
/// # Errors
/// When it was refused, failed, or is not known to have come about.
pub(crate) async fn carry_out(site: &Site, view: &View, request: &Request) -> Result<(), Failure> {
    let candidate = request.candidate.as_deref();
    let candidate = candidate.and_then(|name| view.members.values().find(|member| member.name.as_str() == name));
    let watch = match request.scheduled_at {
        None => Some(Watch::begin(site, view, candidate)),
        Some(_) => None,
    };
    let mut unheard = Vec::new();
    // Any member takes it; the leader carries it out soonest.
    for member in leader_first(view) {
        match ask(site, view, member, request).await {
            Ok(answer) => {
                told(&answer, request)?;
                return match watch {
                    Some(watch) => watch.end(site).await,
                    None => Ok(()),
                };
            }
            Err(NoAnswer { heard: false, why }) => unheard.push(why),
            Err(NoAnswer { heard: true, why }) => {
                return Err(Failure::TryAgain(format!(
                    "{why}; whether the {} happened, `pgherd list` tells",
                    request.action()
                )));
            }
        }
    }
    say(format!("{} {}, falling back to DCS", stamp(), unheard.join("; ")));
    in_store(site, view, request).await
}

async fn ask(site: &Site, view: &View, member: &Member, request: &Request) -> Result<Answer, NoAnswer> {
    let limit = 2 * view.timing().loop_wait() + BESIDE_CYCLES;
    let asked = |path: &str| order(Method::POST, path, Value::Object(request.body()));
    let answer = site
        .order(member, asked(&format!("/{}", request.action())), limit)
        .await;
    // A Patroni from before there were switchovers.
    if answer.as_ref().is_ok_and(|answer| answer.status == 501) {
        return site.ask(member, asked("/failover"), limit).await;
    }
    answer
}

fn told(answer: &Answer, request: &Request) -> Result<(), Failure> {
    let text = text_of(answer);
    if matches!(answer.status, 200 | 202) {
        say(format!("{} {text}", stamp()));
        return Ok(());
    }
    let failed = format!("{} failed, details: {}, {text}", request.title(), answer.status);
    // It may still come about.
    Err(if text.ends_with("status unknown") {
        Failure::TryAgain(failed)
    } else {
        Failure::Refused(failed)
    })
}

/// Patronictl's time has five decimals.
fn stamp() -> String {
    let mut time = utc_now("%Y-%m-%d %H:%M:%S.%6f");
    time.pop();
    time
}

/// Leaves the request where the members look for it: no member that could check it has answered.
async fn in_store(site: &Site, view: &View, request: &Request) -> Result<(), Failure> {
    let key = site.keys().of(&Key::Failover);
    let value = FailoverRequest {
        leader: request.leader.clone(),
        member: request.candidate.clone(),
        scheduled_at: request.scheduled_at.clone(),
    };
    let value = serde_json::to_string(&value).unwrap_or_default();
    let txn = Txn::put_over(key, value.clone(), view.failover.mod_revision);
    let outcome = site.etcd.txn(&txn, site.budget()).await;
    match outcome.map_err(|error| site.store_failure(&error))? {
        outcome if outcome.has_put(&value) => Err(Failure::TryAgain(format!(
            "no member could be asked, so the {} was left in etcd; `pgherd list` tells what becomes of it",
            request.action()
        ))),
        _ => Err(Failure::TryAgain("another request has just been made".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::members::tests::view_with;
    use super::*;
    use crate::args::{ClusterArgs, Group};

    fn args(leader: Option<&str>, candidate: Option<&str>, force: bool) -> SwitchoverArgs {
        SwitchoverArgs {
            leader: leader.map(Into::into),
            candidate: candidate.map(Into::into),
            force,
            ..SwitchoverArgs::default()
        }
    }

    fn talk(args: &SwitchoverArgs, view: &View, answers: &str) -> (String, Result<Request, Failure>) {
        let mut output = Vec::new();
        let result = converse(args, view, &mut Prompter::scripted(answers, &mut output));
        (without_example(output), result)
    }

    /// The example of a time is another each minute.
    fn without_example(output: Vec<u8>) -> String {
        let text = String::from_utf8(output).expect("text");
        match text.split_once("(e.g. ") {
            Some((before, rest)) => format!("{before}(e.g. ...{}", rest.get(16..).unwrap_or_default()),
            None => text,
        }
    }

    fn request(candidate: Option<&str>) -> Request {
        Request {
            leader: Some("node3".into()),
            candidate: candidate.map(Into::into),
            scheduled_at: None,
        }
    }

    #[test]
    fn the_conversation_is_patronictls() {
        let view = view_with(Some("node3"), &[]);
        let (asked, result) = talk(&args(None, None, false), &view, "\nnode2\n\ny\n");
        assert_eq!(
            asked,
            "Primary [node3]: Candidate ['node1', 'node2'] []: \
             When should the switchover take place (e.g. ... )  [now]: \
             Are you sure you want to switchover cluster batman, demoting current leader node3? [y/N]: "
        );
        assert_eq!(result, Ok(request(Some("node2"))));
        let (asked, result) = talk(&args(None, None, false), &view, "\n\n2040-01-01T00:00Z\nyes\n");
        assert!(
            asked.ends_with(
                "Are you sure you want to schedule switchover of cluster batman at 2040-01-01T00:00:00+00:00, \
                 demoting current leader node3? [y/N]: "
            ),
            "{asked}"
        );
        let scheduled_at = Some("2040-01-01T00:00:00+00:00".to_owned());
        assert_eq!(
            result,
            Ok(Request {
                scheduled_at,
                ..request(None)
            })
        );
    }

    #[test]
    fn force_asks_nothing() {
        let view = view_with(Some("node3"), &[]);
        let (asked, result) = talk(&args(None, None, true), &view, "");
        assert_eq!((asked.as_str(), result), ("", Ok(request(None))));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let leads = || view_with(Some("node3"), &[]);
        for (args, view, answers, expected) in [
            (
                args(None, None, true),
                view_with(None, &[]),
                "",
                "This cluster has no leader",
            ),
            (
                args(Some("node1"), None, true),
                leads(),
                "",
                "Member node1 is not the leader of cluster batman",
            ),
            (
                args(None, Some("node3"), true),
                leads(),
                "",
                "Member node3 is already the leader of cluster batman",
            ),
            (
                args(None, Some("node4"), true),
                leads(),
                "",
                "Member node4 does not exist in cluster batman or is tagged as nofailover",
            ),
            (args(None, None, false), leads(), "\n\n\nn\n", "Aborting switchover"),
            (args(None, None, false), leads(), "\n\n\n\n", "Aborting switchover"),
            (
                args(None, None, false),
                leads(),
                "\n\n2040-01-01T00:00Z\n\n",
                "Aborting scheduled switchover",
            ),
            (args(None, None, false), leads(), "\n", "Aborted!"),
        ] {
            assert_eq!(
                talk(&args, &view, answers).1,
                Err(Failure::Refused(expected.to_owned())),
                "{args:?}"
            );
        }
        let paused = view_with(Some("node3"), &[("config", json!({"pause": true}))]);
        let scheduled = SwitchoverArgs {
            scheduled: Some("2040-01-01T00:00Z".to_owned()),
            ..args(None, None, true)
        };
        let expected = Failure::Refused("Can't schedule switchover in the paused state".to_owned());
        assert_eq!(talk(&scheduled, &paused, "").1, Err(expected));
    }

    fn talk_of_failover(
        candidate: Option<&str>,
        force: bool,
        view: &View,
        answers: &str,
    ) -> (String, Result<Request, Failure>) {
        let args = FailoverArgs {
            candidate: candidate.map(str::to_owned),
            force,
            cluster: ClusterArgs {
                cluster: None,
                group: Group::default(),
            },
        };
        let mut output = Vec::new();
        let result = converse_failover(&args, view, &mut Prompter::scripted(answers, &mut output));
        (String::from_utf8(output).expect("text"), result)
    }

    #[test]
    fn a_failover_needs_a_candidate_and_a_second_thought_for_an_asynchronous_one() {
        let view = view_with(Some("node3"), &[]);
        let wanted = Request {
            leader: None,
            ..request(Some("node2"))
        };
        let (asked, result) = talk_of_failover(None, false, &view, "node2\ny\n");
        assert_eq!(
            asked,
            "Candidate ['node1', 'node2'] []: \
             Are you sure you want to failover cluster batman, demoting current leader node3? [y/N]: "
        );
        assert_eq!(result, Ok(wanted.clone()));
        let sync = json!({"leader": "node3", "sync_standby": "node1", "quorum": 0});
        let synchronous = view_with(Some("node3"), &[("sync", sync)]);
        let (asked, result) = talk_of_failover(Some("node2"), false, &synchronous, "y\ny\n");
        assert!(
            asked.starts_with("Are you sure you want to failover to the asynchronous node node2? [y/N]: "),
            "{asked}"
        );
        assert_eq!(result, Ok(wanted.clone()));
        assert_eq!(
            talk_of_failover(Some("node2"), true, &view_with(None, &[]), "").1,
            Ok(wanted)
        );
        let expected = Failure::Refused("Failover could be performed only to a specific candidate".to_owned());
        assert_eq!(talk_of_failover(None, true, &view, "").1, Err(expected));
        let (asked, result) = talk_of_failover(Some("node2"), false, &view, "n\n");
        assert_eq!(result, Err(Failure::Refused("Aborting failover".to_owned())), "{asked}");
    }

    #[test]
    fn a_request_says_only_what_was_said() {
        let body = Value::Object(request(None).body());
        assert_eq!(body, json!({"leader": "node3"}));
        assert_eq!(
            (request(None).action(), request(None).title()),
            ("switchover", "Switchover")
        );
    }
}
