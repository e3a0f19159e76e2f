//! `pgherd switchover --dry-run`: what a switchover would meet now, and how long writes would stand still.

use pgherd_agent::postgres::forecast::of_a_stop;
use pgherd_agent::postgres::sql::Target;
use pgherd_cluster::view::{Member, View};
use serde_json::Value;

use super::members::names;
use super::site::{ANSWER_MAX, Site};
use crate::args::SwitchoverArgs;
use crate::failure::Failure;
use crate::terminal::say;

/// What PostgreSQL itself needs to stop here and be promoted there.
const STALL_SECONDS_MIN: f64 = 0.1;
const STALL_SECONDS_USUAL: f64 = 0.8;
/// A segment that waits for the archiver takes as long as the archive command; most take less.
const ARCHIVE_SECONDS_EACH: f64 = 1.0;
/// A stop tries a failing archive command three times, a second apart.
const ARCHIVE_SECONDS_FAILING: f64 = 3.0;
/// What a standby replays at least in a second.
const REPLAY_BYTES_PER_SECOND: f64 = 20_000_000.0;

/// Looks and tells; changes nothing.
///
/// # Errors
/// When there is no leader or no candidate, or the leader cannot be asked.
pub(crate) async fn run(site: &Site, view: &View, args: &SwitchoverArgs) -> Result<(), Failure> {
    let Some(leader) = view.leader_member() else {
        return Err(Failure::Refused("This cluster has no leader".to_owned()));
    };
    if args.leader.as_ref().is_some_and(|named| *named != leader.name.as_str()) {
        return Err(Failure::Refused(format!(
            "Member {} is not the leader of cluster {}",
            args.leader.as_deref().unwrap_or_default(),
            view.scope
        )));
    }
    let candidates = candidates(view, leader, args.candidate.as_deref())?;
    let found = look(site, leader).await?;
    say(report(&found, view, leader, &candidates).trim_end());
    Ok(())
}

fn candidates<'a>(view: &'a View, leader: &Member, named: Option<&str>) -> Result<Vec<&'a Member>, Failure> {
    let is_candidate = |member: &&Member| match named {
        Some(named) => member.name.as_str() == named && member.name != leader.name,
        None => member.name != leader.name && !member.record.nofailover(),
    };
    let found: Vec<&Member> = view.members.values().filter(is_candidate).collect();
    match (found.is_empty(), named) {
        (false, _) => Ok(found),
        (true, Some(named)) => Err(Failure::Refused(format!(
            "Member {named} does not exist in cluster {} or leads it",
            view.scope
        ))),
        (true, None) => Err(Failure::Refused("No candidates found to switchover to".to_owned())),
    }
}

/// By the leader's REST where it is one of ours, else by SQL where the configuration says as whom.
async fn look(site: &Site, leader: &Member) -> Result<Value, Failure> {
    let name = &leader.name;
    if leader.record.pgherd.is_some() {
        let ask = pgherd_cluster::http::Ask::get("/api/v1/forecast");
        return match site.ask(leader, ask, ANSWER_MAX).await {
            Ok(answer) if answer.status == 200 => Ok(answer.json().unwrap_or_default()),
            Ok(answer) => Err(Failure::Refused(format!(
                "{name} says: {}, {}",
                answer.status,
                answer.text()
            ))),
            Err(no_answer) => Err(Failure::Unavailable(no_answer.why)),
        };
    }
    let (Some(user), Some(address)) = (&site.superuser, leader.record.postgres_address()) else {
        return Err(Failure::configuration(format!(
            "{name} is Patroni's, whose REST tells nothing of this; name a configuration with \
             postgresql.authentication.superuser to have its PostgreSQL asked"
        )));
    };
    of_a_stop(&Target::new(&address, "postgres", user))
        .await
        .map_err(|error| Failure::Unavailable(format!("{name}: {}", error.chain())))
}

/// The whole report, with its last newline.
fn report(found: &Value, view: &View, leader: &Member, candidates: &[&Member]) -> String {
    let mut lines = vec![format!(
        "A switchover of {} from {} to {}, as things are now; nothing is changed.",
        view.scope,
        leader.name,
        if candidates.len() == 1 {
            names(candidates)
        } else {
            format!("one of {}", names(candidates))
        }
    )];
    lines.extend(
        candidates
            .iter()
            .map(|candidate| format!("  {}", standing(found, view, candidate))),
    );
    lines.push(format!(
        "  checkpoint: {} of log since the last one, {} s ago; it is written while {} still serves, before the stop",
        bytes(number(&found["wal_since_checkpoint"])),
        found["checkpoint_age_seconds"],
        leader.name
    ));
    lines.push(transactions(found));
    lines.push(format!("  archiver: {}", archiver(found)));
    match expected(found, candidates) {
        Some((least, most)) => lines.push(format!("Writes would stand still for {least:.1} to {most:.1} s.")),
        None => lines.push("No candidate streams from the leader: a switchover would be refused.".to_owned()),
    }
    lines.join("\n") + "\n"
}

fn replica<'a>(found: &'a Value, member: &Member) -> Option<&'a Value> {
    let named = |row: &&Value| {
        row["name"]
            .as_str()
            .is_some_and(|name| name.eq_ignore_ascii_case(member.name.as_str()))
    };
    found["replicas"].as_array()?.iter().find(named)
}

fn standing(found: &Value, view: &View, candidate: &Member) -> String {
    let name = &candidate.name;
    let Some(row) = replica(found, candidate) else {
        return format!("{name}: does not stream from the leader, and cannot take over");
    };
    let sync = &view.sync.value;
    let unlisted = sync.is_active() && !sync.lists(name);
    format!(
        "{name}: {}, lacks {} of log, and has {} to replay{}",
        row["sync_state"].as_str().unwrap_or("streams"),
        bytes(number(&row["receive_lag"])),
        bytes(number(&row["replay_lag"])),
        if unlisted {
            "; not in /sync, so that it cannot be asked to take over"
        } else {
            ""
        }
    )
}

fn transactions(found: &Value) -> String {
    let mut text = format!(
        "  sessions: {}, of which {} are in a transaction and would be cut off",
        found["sessions"], found["transactions"]
    );
    for one in found["oldest"].as_array().into_iter().flatten() {
        let from = one["client_addr"].as_str().unwrap_or("the machine itself");
        text.push_str(&format!(
            "\n    for {:.1} s: pid {}, user {}, application {:?}, from {from}, {}",
            one["seconds"].as_f64().unwrap_or_default(),
            one["pid"],
            one["usename"].as_str().unwrap_or("unknown"),
            one["application_name"].as_str().unwrap_or_default(),
            one["state"].as_str().unwrap_or("state unknown")
        ));
    }
    text
}

fn archiver(found: &Value) -> String {
    let ready = number(&found["ready_files"]);
    match (found["archive_mode"].as_str(), ready, found["archiver_fails"] == true) {
        (Some("off") | None, ..) => "off".to_owned(),
        (_, 0, _) => "nothing waits for it".to_owned(),
        (_, ready, false) => format!("{ready} segments wait for it, and the stop waits for them all"),
        (_, ready, true) => {
            format!("{ready} segments wait for it, and its command fails: the stop tries for some seconds more")
        }
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_default()
}

fn bytes(bytes: u64) -> String {
    match bytes {
        0..=9_999 => format!("{bytes} bytes"),
        10_000..=9_999_999 => format!("{} kB", bytes.div_ceil(1 << 10)),
        _ => format!("{} MB", bytes.div_ceil(1 << 20)),
    }
}

/// The least and the most that is expected, in seconds, with whichever candidate comes off worst.
fn expected(found: &Value, candidates: &[&Member]) -> Option<(f64, f64)> {
    let replay = |row: &Value| {
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let by_bytes = number(&row["replay_lag"]) as f64 / REPLAY_BYTES_PER_SECOND;
        by_bytes.max(row["replay_lag_seconds"].as_f64().unwrap_or_default())
    };
    let replays = candidates
        .iter()
        .filter_map(|candidate| replica(found, candidate))
        .map(replay);
    let worst = replays.reduce(f64::max)?;
    let off = found["archive_mode"].as_str().is_none_or(|mode| mode == "off");
    let ready = u32::try_from(number(&found["ready_files"])).unwrap_or(u32::MAX);
    let archive = match (off || ready == 0, found["archiver_fails"] == true) {
        (true, _) => 0.0,
        (false, true) => ARCHIVE_SECONDS_FAILING,
        (false, false) => f64::from(ready) * ARCHIVE_SECONDS_EACH,
    };
    Some((STALL_SECONDS_MIN, STALL_SECONDS_USUAL + worst + archive))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::members::tests::view_with;
    use super::*;

    fn found() -> Value {
        json!({
            "wal_since_checkpoint": 50_000_000, "checkpoint_age_seconds": 35, "sessions": 5, "transactions": 1,
            "oldest": [{
                "pid": 4711, "usename": "ann", "application_name": "psql", "client_addr": "10.0.0.5",
                "state": "idle in transaction", "seconds": 312.1,
            }],
            "archive_mode": "on", "ready_files": 3, "archiver_fails": false,
            "replicas": [
                {"name": "node1", "sync_state": "async", "receive_lag": 0, "replay_lag": 0, "replay_lag_seconds": null},
                {"name": "node2", "sync_state": "async", "receive_lag": 200, "replay_lag": 40_000_000, "replay_lag_seconds": 1.5},
            ],
        })
    }

    fn told(found: &Value, named: Option<&str>) -> String {
        let view = view_with(Some("node3"), &[]);
        let leader = view.leader_member().expect("it leads");
        let candidates = candidates(&view, leader, named).expect("there are some");
        report(found, &view, leader, &candidates)
    }

    #[test]
    fn everything_that_a_switchover_waits_for_is_named() {
        let expected = "\
A switchover of batman from node3 to one of node1, node2, as things are now; nothing is changed.
  node1: async, lacks 0 bytes of log, and has 0 bytes to replay
  node2: async, lacks 200 bytes of log, and has 39 MB to replay
  checkpoint: 48 MB of log since the last one, 35 s ago; it is written while node3 still serves, before the stop
  sessions: 5, of which 1 are in a transaction and would be cut off
    for 312.1 s: pid 4711, user ann, application \"psql\", from 10.0.0.5, idle in transaction
  archiver: 3 segments wait for it, and the stop waits for them all
Writes would stand still for 0.1 to 5.8 s.
";
        assert_eq!(told(&found(), None), expected);
        assert!(told(&found(), Some("node1")).ends_with("Writes would stand still for 0.1 to 3.8 s.\n"));
    }

    #[test]
    fn a_failing_archiver_and_a_candidate_that_does_not_stream_are_told() {
        let mut failing = found();
        failing["archiver_fails"] = json!(true);
        let text = told(&failing, Some("node1"));
        assert!(
            text.contains("its command fails") && text.ends_with("0.1 to 3.8 s.\n"),
            "{text}"
        );
        let text = told(&found(), Some("node4"));
        assert!(text.contains("node4: does not stream from the leader"), "{text}");
        assert!(text.ends_with("a switchover would be refused.\n"), "{text}");
        let mut off = found();
        off["archive_mode"] = json!("off");
        assert!(told(&off, Some("node1")).contains("archiver: off"));
    }
}
