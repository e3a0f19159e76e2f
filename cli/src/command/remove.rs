//! `pgherd remove`: a cluster's keys are removed from etcd. Its data is not touched.

use pgherd_cluster::view::View;

use super::list;
use super::prompt::Prompter;
use super::site::{Scene, Site};
use crate::args::RemoveArgs;
use crate::failure::Failure;
use crate::terminal::say;

/// What has to be typed.
const AWARE: &str = "Yes I am aware";

/// Runs the command.
///
/// # Errors
/// When it was not confirmed as asked, or etcd does not answer.
pub(crate) async fn run(scene: &Scene, args: &RemoveArgs) -> Result<(), Failure> {
    let mut prompter = scene.prompter("--confirm NAME, and --leader NAME where somebody leads");
    if args.confirm.is_none() {
        prompter.ensure_somebody_answers()?;
    }
    let site = scene.site(Some(&args.cluster), args.group)?;
    let view = site.view().await?;
    say(list::render(&view, args.format, false).trim_end());
    confirm(args, &view, &mut prompter)?;
    remove(&site).await?;
    say(format!("All keys below {} are removed", site.keys().prefix()));
    Ok(())
}

async fn remove(site: &Site) -> Result<(), Failure> {
    let removed = site.etcd.remove(site.keys().prefix(), site.budget()).await;
    removed.map_err(|error| site.store_failure(&error))
}

/// Three answers, of which the last is wanted only where somebody leads.
fn confirm(args: &RemoveArgs, view: &View, prompter: &mut Prompter<'_>) -> Result<(), Failure> {
    let refused = |text: &str| Err(Failure::Refused(text.to_owned()));
    let asks = args.confirm.is_none();
    let name = match &args.confirm {
        Some(name) => Some(name.clone()),
        None => prompter.ask("Please confirm the cluster name to remove: ")?,
    };
    if name.as_deref() != Some(view.scope.as_str()) {
        return refused("Cluster names specified do not match");
    }
    if asks {
        let question = format!(
            "You are about to remove all information in DCS for {}, please type: \"{AWARE}\": ",
            view.scope
        );
        if prompter.ask(&question)?.as_deref() != Some(AWARE) {
            return refused("You did not exactly type \"Yes I am aware\"");
        }
    }
    let Some(epoch) = view.epoch() else { return Ok(()) };
    let question = "This cluster currently is healthy. Please specify the leader name to continue: ";
    let leader = match &args.leader {
        Some(leader) => Some(leader.clone()),
        None if asks => prompter.ask(question)?,
        None => None,
    };
    if leader.as_deref() == Some(epoch.holder.as_str()) {
        Ok(())
    } else {
        refused("You did not specify the current leader of the cluster")
    }
}

#[cfg(test)]
mod tests {
    use super::super::members::tests::view_with;
    use super::*;
    use crate::args::{Format, Group};

    fn talk(
        leader: Option<&str>,
        confirm: Option<&str>,
        named: Option<&str>,
        answers: &str,
    ) -> (String, Result<(), Failure>) {
        let args = RemoveArgs {
            cluster: "batman".to_owned(),
            group: Group::default(),
            format: Format::Pretty,
            confirm: confirm.map(str::to_owned),
            leader: named.map(str::to_owned),
        };
        let mut output = Vec::new();
        let result = super::confirm(
            &args,
            &view_with(leader, &[]),
            &mut Prompter::scripted(answers, &mut output),
        );
        (String::from_utf8(output).expect("text"), result)
    }

    #[test]
    fn a_cluster_that_somebody_leads_is_removed_after_three_answers() {
        let (asked, result) = talk(Some("node1"), None, None, "batman\nYes I am aware\nnode1\n");
        assert_eq!(
            asked,
            "Please confirm the cluster name to remove: \
             You are about to remove all information in DCS for batman, please type: \"Yes I am aware\": \
             This cluster currently is healthy. Please specify the leader name to continue: "
        );
        assert_eq!(result, Ok(()));
        assert_eq!(talk(None, None, None, "batman\nYes I am aware\n").1, Ok(()));
    }

    #[test]
    fn anything_else_removes_nothing() {
        for (leader, confirm, named, answers) in [
            (Some("node1"), None, None, "robin\n"),
            (Some("node1"), None, None, "batman\nyes\n"),
            (Some("node1"), None, None, "batman\nYes I am aware\nnode2\n"),
            (Some("node1"), None, None, "batman\nYes I am aware\n"),
            (Some("node1"), Some("batman"), None, ""),
            (Some("node1"), Some("batman"), Some("node2"), ""),
            (None, Some("robin"), None, ""),
        ] {
            assert!(talk(leader, confirm, named, answers).1.is_err(), "{answers:?}");
        }
        assert_eq!(talk(Some("node1"), Some("batman"), Some("node1"), "").1, Ok(()));
        assert_eq!(talk(None, Some("batman"), None, "").1, Ok(()));
    }
}
