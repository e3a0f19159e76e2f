//! `pgherd version`: of this program, and of a cluster's members.

use pgherd_cluster::view::Member;
use pgherd_cluster::{PATRONI_VERSION, VERSION};
use serde_json::Value;

use super::Tool;
use super::members::chosen;
use super::site::{ANSWER_MAX, Scene, Site};
use crate::args::{RoleArg, VersionArgs};
use crate::failure::Failure;
use crate::terminal::say;

/// Runs the command.
///
/// # Errors
/// When there is no such cluster or member, or a member does not answer.
pub(crate) async fn run(scene: &Scene, args: &VersionArgs) -> Result<(), Failure> {
    say(match scene.tool {
        Tool::Pgherd => format!("pgherd version {VERSION}"),
        Tool::Patronictl => format!("patronictl version {PATRONI_VERSION} (pgherd {VERSION})"),
    });
    let Some(cluster) = &args.cluster else { return Ok(()) };
    let site = scene.site(Some(cluster), args.group)?;
    let view = site.view().await?;
    say("");
    let mut silent = false;
    for member in chosen(&view, &args.members, RoleArg::Any)? {
        let (line, answered) = line(&site, member).await;
        silent |= !answered;
        say(line);
    }
    if silent { Err(Failure::Ended(1)) } else { Ok(()) }
}

async fn line(site: &Site, member: &Member) -> (String, bool) {
    let ask = pgherd_cluster::http::Ask::get("/patroni");
    match site.ask(member, ask, ANSWER_MAX).await {
        Ok(answer) => (versions(member.name.as_str(), &answer.json().unwrap_or_default()), true),
        Err(no_answer) => (
            format!("{}: failed to get version: {}", member.name, no_answer.why),
            false,
        ),
    }
}

/// `node1: Patroni 4.1.4 PostgreSQL 15.20`, and what of ours it is.
fn versions(name: &str, status: &Value) -> String {
    let mut line = format!(
        "{name}: Patroni {}",
        status["patroni"]["version"].as_str().unwrap_or("unknown")
    );
    if let Some(number) = status["server_version"].as_u64() {
        line.push_str(&format!(" PostgreSQL {}", postgres_version(number)));
    }
    if let Some(version) = status["pgherd"]["version"].as_str() {
        line.push_str(&format!(" (pgherd {version})"));
    }
    line
}

/// 150020 is 15.20; before 10 there were three parts.
fn postgres_version(number: u64) -> String {
    if number < 100_000 {
        format!("{}.{}.{}", number / 10_000, number / 100 % 100, number % 100)
    } else {
        format!("{}.{}", number / 10_000, number % 10_000)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn versions_are_told_as_patronictl_tells_them() {
        let status = json!({"server_version": 150_020, "patroni": {"version": "4.1.4"}});
        assert_eq!(versions("node1", &status), "node1: Patroni 4.1.4 PostgreSQL 15.20");
        let ours = json!({"patroni": {"version": "4.1.4"}, "pgherd": {"version": "0.1.0"}});
        assert_eq!(versions("n1", &ours), "n1: Patroni 4.1.4 (pgherd 0.1.0)");
        assert_eq!(postgres_version(90_624), "9.6.24");
    }
}
