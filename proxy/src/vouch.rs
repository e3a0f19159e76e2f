//! Asks the leader's own agent whether it still leads, while the cluster's store confirms nothing and somebody needs to know.
//!
//! Losing the store alone must stop nothing, and a leader that is cut off from it must not be written to for longer than it
//! may write. So only the answer to a question of this proxy counts, from before the question was sent.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::http::{Answer, Ask, ask};
use pgherd_cluster::view::{Epoch, Member, View};
use serde::Deserialize;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::config::ListenerRole;
use crate::shared::Shared;
use crate::warrant::Vouch;

/// Two confirmations missing.
const SILENT_AFTER: Duration = Duration::from_secs(2);
/// From one question to the next.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// For a member to answer.
const ANSWER_MAX: Duration = Duration::from_millis(500);
/// How soon a client is noticed that needs an answer, while the store is silent.
const WANTED_POLL: Duration = Duration::from_millis(100);
/// What a yes of Patroni's is good for: it tells no deadline.
const PATRONI_YES: Duration = Duration::from_secs(2);

/// Runs until `stop`.
pub(crate) async fn run(shared: &Shared, stop: CancellationToken) -> std::io::Result<()> {
    tokio::select! {
        () = stop.cancelled() => {}
        () = ask_for_ever(shared) => {}
    }
    Ok(())
}

async fn ask_for_ever(shared: &Shared) {
    let mut asked_at = None;
    loop {
        let (confirmed, view) = shared.view.evidence();
        let wait = wait(confirmed, asked_at, Boottime::now());
        if !wait.is_zero() {
            sleep(wait).await;
        } else if is_wanted(shared)
            && let Some(leader) = view.leader_member()
        {
            asked_at = Some(Boottime::now());
            if let Some(vouch) = vouch(&view, leader).await {
                shared.vouched(vouch);
            }
        } else {
            sleep(WANTED_POLL).await;
        }
    }
}

/// How long no question may be asked. Pure.
fn wait(confirmed: Option<Boottime>, asked_at: Option<Boottime>, now: Boottime) -> Duration {
    // Without a view there is nobody to ask.
    let Some(confirmed) = confirmed else {
        return WANTED_POLL;
    };
    let silent = (confirmed + SILENT_AFTER).since(now);
    let again = asked_at.map_or(Duration::ZERO, |asked_at| (asked_at + ASK_EVERY).since(now));
    silent.max(again)
}

/// Whether there are sessions that rest on a warrant, or clients that wait for one.
fn is_wanted(shared: &Shared) -> bool {
    let waits = shared.listeners.iter().any(|listener| {
        let for_leader = listener.config.role == ListenerRole::Write || listener.config.fallback_to_leader;
        for_leader && listener.held.get() > 0
    });
    waits || shared.sessions.any_with_epoch()
}

async fn vouch(view: &View, leader: &Member) -> Option<Vouch> {
    let epoch = view.epoch()?;
    let address = leader.record.api_address()?;
    let ours = leader.record.pgherd.is_some();
    let question = Ask::get(if ours { "/api/v1/warrant" } else { "/primary" });
    let asked_at = Boottime::now();
    let answer = match ask(&address, question, ANSWER_MAX).await {
        Ok(answer) => answer,
        Err(error) => {
            debug!(leader = %leader.name, %error, "the leader's agent gives no answer");
            return None;
        }
    };
    let told = if ours {
        ours_told(&answer, epoch).map(|remaining| remaining.min(view.timing().ttl()))
    } else {
        patroni_told(&answer, view, epoch)
    };
    debug!(leader = %leader.name, status = answer.status, ?told, "the leader's agent answers");
    Some(Vouch {
        epoch: epoch.clone(),
        end: asked_at + told?,
    })
}

#[derive(Deserialize)]
struct Remaining {
    epoch: Option<Held>,
    remaining_ms: u64,
}

#[derive(Deserialize)]
struct Held {
    holder: String,
    create_revision: i64,
}

/// For how long our agent may be writable under `epoch`. Pure.
fn ours_told(answer: &Answer, epoch: &Epoch) -> Option<Duration> {
    let told: Remaining = serde_json::from_slice(&answer.body)
        .ok()
        .filter(|_| answer.status == 200)?;
    let held = told.epoch?;
    let same = held.holder == epoch.holder.as_str() && held.create_revision == epoch.create_revision;
    same.then(|| Duration::from_millis(told.remaining_ms))
}

/// What a yes of Patroni's is good for, unless it is another's: addresses are given anew. Pure.
fn patroni_told(answer: &Answer, view: &View, epoch: &Epoch) -> Option<Duration> {
    let body = answer.json().unwrap_or_default();
    let of_another = |key: &str, expected: &str| {
        let said = body.pointer(key).and_then(serde_json::Value::as_str);
        said.is_some_and(|said| said != expected)
    };
    let another =
        of_another("/patroni/name", epoch.holder.as_str()) || of_another("/patroni/scope", view.scope.as_str());
    (answer.status == 200 && !another).then_some(PATRONI_YES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Cluster, name};

    fn answer(status: u16, body: &str) -> Answer {
        Answer {
            status,
            body: body.to_owned().into(),
        }
    }

    fn epoch() -> Epoch {
        Epoch {
            holder: name("n1"),
            create_revision: 10,
        }
    }

    #[test]
    fn only_a_holder_of_the_same_epoch_vouches_and_for_no_longer_than_it_says() {
        let body = |holder: &str, revision: i64| {
            format!(
                r#"{{"name":"n1","epoch":{{"holder":"{holder}","create_revision":{revision}}},"remaining_ms":300,"role":"primary","writable":true}}"#
            )
        };
        let told = |status, body: &str| ours_told(&answer(status, body), &epoch());
        assert_eq!(told(200, &body("n1", 10)), Some(Duration::from_millis(300)));
        assert_eq!(told(503, &body("n1", 10)), None);
        assert_eq!(told(200, &body("n1", 11)), None);
        assert_eq!(told(200, &body("n2", 10)), None);
        assert_eq!(told(200, r#"{"name":"n1","epoch":null,"remaining_ms":300}"#), None);
        assert_eq!(told(200, "it leads"), None);
    }

    #[test]
    fn a_yes_of_patronis_is_good_for_two_seconds() {
        let view = Cluster::new().leader("n1", 10).patroni("n1").view();
        let told = |status, body: &str| patroni_told(&answer(status, body), &view, &epoch());
        assert_eq!(told(200, ""), Some(PATRONI_YES));
        assert_eq!(told(200, r#"{"patroni":{"name":"n1","scope":"c"}}"#), Some(PATRONI_YES));
        assert_eq!(told(200, r#"{"patroni":{"name":"n2","scope":"c"}}"#), None);
        assert_eq!(told(200, r#"{"patroni":{"name":"n1","scope":"d"}}"#), None);
        assert_eq!(told(503, ""), None);
    }

    #[test]
    fn nobody_is_asked_while_the_store_confirms_nor_twice_in_a_second() {
        let at = |millis: u64| Boottime::from_nanos(millis * 1_000_000);
        let cases = [
            (None, None, 9_000, WANTED_POLL),
            (Some(1_000), None, 1_500, Duration::from_millis(1_500)),
            (Some(1_000), None, 3_000, Duration::ZERO),
            (Some(1_000), Some(3_000), 3_400, Duration::from_millis(600)),
            (Some(1_000), Some(3_000), 4_000, Duration::ZERO),
            (Some(3_500), Some(3_000), 4_000, Duration::from_millis(1_500)),
        ];
        for (confirmed, asked_at, now, expected) in cases {
            assert_eq!(wait(confirmed.map(at), asked_at.map(at), at(now)), expected);
        }
    }
}
