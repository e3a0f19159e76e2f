//! `pgherd reload`: members read their configuration again.

use hyper::Method;
use serde_json::json;

use super::answer::{Outcomes, failed};
use super::members::{chosen, confirm};
use super::site::{ANSWER_MAX, Scene, Site, order};
use crate::args::ReloadArgs;
use crate::failure::Failure;

/// Runs the command.
///
/// # Errors
/// When it makes no sense, was not confirmed, or a member refused.
pub(crate) async fn run(scene: &Scene, args: &ReloadArgs) -> Result<(), Failure> {
    let mut prompter = scene.prompter("--force");
    if !args.members.force {
        prompter.ensure_somebody_answers()?;
    }
    let site = scene.site(Some(&args.members.cluster), args.members.group)?;
    let view = site.view().await?;
    Site::show(&view);
    let members = chosen(&view, &args.members.members, args.role)?;
    if !args.members.force {
        confirm(&mut prompter, "reload", &members, None)?;
    }
    let mut outcomes = Outcomes::default();
    for member in members {
        let name = member.name.as_str();
        let answer = site
            .ask(member, order(Method::POST, "/reload", json!({})), ANSWER_MAX)
            .await;
        match answer.as_ref().map(|answer| answer.status) {
            Ok(200) => outcomes.done(format!("No changes to apply on member {name}")),
            Ok(202) => outcomes.done(format!(
                "Reload request received for member {name} and will be processed within {} seconds",
                view.timing().loop_wait().as_secs()
            )),
            _ => outcomes.failed(failed("reload", name, &answer)),
        }
    }
    outcomes.end()
}
