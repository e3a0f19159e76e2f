//! Asks the leader's own agent whether it still leads: once a second while sessions rest on that, so that its word is at hand
//! when its key goes, at once when the key has gone, and while the cluster's store confirms nothing and somebody needs to know.
//!
//! Losing the store alone must stop nothing, neither where the proxy loses it nor where the leader does: the leader's key
//! then expires, and it goes on while the other members vouch for it. A leader that nobody vouches for must not be written to
//! for longer than it may write. So only the answer to a question of this proxy counts, from before the question was sent.
//! A word is over when another member's key appears, when it ends, and when its agent has taken it back.

use std::sync::Arc;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::http::{Access, Answer, Ask, ask_at};
use pgherd_cluster::source::Proof;
use pgherd_cluster::view::{Epoch, Leader, Member, View};
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::config::ListenerRole;
use crate::events::EventKind;
use crate::shared::Shared;
use crate::warrant::Vouch;

/// Two confirmations missing.
const SILENT_AFTER: Duration = Duration::from_secs(2);
/// From one question to the next.
const ASK_EVERY: Duration = Duration::from_secs(1);
/// The same while the key is gone and the last question got no word.
const ASK_AGAIN: Duration = Duration::from_millis(200);
/// For how long after the key's end that goes on.
const HURRY: Duration = Duration::from_secs(5);
/// For a member to answer.
const ANSWER_MAX: Duration = Duration::from_millis(500);
/// How soon sessions are noticed that begin to rest on the leader.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// What a yes of Patroni's is good for: it tells no deadline.
const PATRONI_YES: Duration = Duration::from_secs(2);
/// For how long an agent without a key must deny that it leads to be believed. One that makes its key anew says no for a
/// moment; the word that it gave before has an end of its own.
const DENIED_MAX: Duration = Duration::from_millis(500);

/// Runs until `stop`.
pub(crate) async fn run(shared: &Shared, stop: CancellationToken) -> std::io::Result<()> {
    tokio::select! {
        () = stop.cancelled() => {}
        () = ask_for_ever(shared) => {}
    }
    Ok(())
}

async fn ask_for_ever(shared: &Shared) {
    let mut changes = shared.view.subscribe();
    let mut asker = Asker::default();
    loop {
        let confirmed = asker.look(shared, &mut changes);
        let need = need(shared);
        shared.view.need(need != Need::None || shared.admitted.get() > 0);
        let wait = asker.wait(confirmed, need, shared.view.proof(), Boottime::now());
        if let Some(question) = wait.is_zero().then(|| asker.question()).flatten() {
            let asked_at = Boottime::now();
            let asking = vouch(&question, shared.view.load_full(), shared.view.access());
            tokio::pin!(asking);
            let heard = loop {
                tokio::select! {
                    heard = &mut asking => break heard,
                    // Another's key ends a word also while its giver is being asked.
                    () = changed(&mut changes) => { asker.look(shared, &mut changes); }
                }
            };
            asker.take(shared, asked_at, &question, heard);
            continue;
        }
        tokio::select! {
            () = sleep(wait.clamp(Duration::from_millis(1), LOOK_EVERY)) => {}
            () = changed(&mut changes) => {}
            () = shared.waits.notified() => {}
        }
    }
}

/// The next change; never, once nobody is left to make one.
async fn changed<T>(changes: &mut watch::Receiver<T>) {
    if changes.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Who needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Need {
    /// Nobody.
    None,
    /// Clients that wait for a leader.
    Waiting,
    /// Sessions that rest on a warrant.
    Resting,
}

fn need(shared: &Shared) -> Need {
    if shared.sessions.any_with_epoch() {
        return Need::Resting;
    }
    let waits = shared.listeners().iter().any(|listener| {
        let config = listener.config.load();
        let for_leader = match config.role {
            ListenerRole::Write | ListenerRole::StandbyLeader | ListenerRole::Any => true,
            ListenerRole::Read | ListenerRole::Sync | ListenerRole::Async => config.reads.fallback_to_leader,
        };
        // Where the leader is one of many it is chosen only when it has said so.
        let is_one_of_many = config.role == ListenerRole::Any && shared.view.proof() == Proof::Hearsay;
        for_leader && listener.held.get() > 0 || is_one_of_many && listener.connections.get() > 0
    });
    if waits { Need::Waiting } else { Need::None }
}

/// What came of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    /// It may write for this long, counted from before the question.
    Yes(Duration),
    /// It does not lead, or not by this holding.
    No,
    /// No answer, or none that says either.
    Nothing,
}

/// The last leader, and what is known of asking it.
#[derive(Debug, Default)]
struct Asker {
    last: Option<(Leader, Member)>,
    /// Since when nobody has held the leader key.
    gone_since: Option<Boottime>,
    asked: Option<(Boottime, Heard)>,
    denied_since: Option<Boottime>,
    /// It has been told that the leader goes on without its key.
    told: bool,
}

impl Asker {
    /// Looks at the newest view; when the leader was last confirmed.
    fn look(&mut self, shared: &Shared, changes: &mut watch::Receiver<Arc<View>>) -> Option<Boottime> {
        changes.mark_unchanged();
        let (confirmed, view) = shared.view.evidence();
        if let Some(leader) = &view.leader {
            shared.change_words(|words| words.only_of(&leader.epoch.holder));
        }
        self.note(&view, Boottime::now());
        confirmed
    }

    /// Notes who leads, or since when nobody does. Pure.
    fn note(&mut self, view: &View, now: Boottime) {
        let Some(leader) = &view.leader else {
            self.gone_since.get_or_insert(now);
            return;
        };
        self.gone_since = None;
        self.denied_since = None;
        self.told = false;
        let same = self.last.as_ref().is_some_and(|(last, _)| last.epoch == leader.epoch);
        if !same {
            self.asked = None;
        }
        match view.leader_member() {
            Some(member) => {
                let known = self.last.as_ref();
                if known.is_none_or(|(last, known)| last != leader || known != member) {
                    self.last = Some((leader.clone(), member.clone()));
                }
            }
            None if same => {}
            None => self.last = None,
        }
    }

    /// How long no question may be asked. Pure.
    fn wait(&self, confirmed: Option<Boottime>, need: Need, proof: Proof, now: Boottime) -> Duration {
        // Without a view there is nobody to ask.
        let (Some(confirmed), Some((_, member))) = (confirmed, &self.last) else {
            return Duration::MAX;
        };
        let ours = member.record.pgherd.is_some();
        let again = |pace| self.asked.map_or(Duration::ZERO, |(at, _)| (at + pace).since(now));
        let silent = (confirmed + SILENT_AFTER).since(now);
        match (self.gone_since, need) {
            (_, Need::None) => Duration::MAX,
            // Patroni's members name no holding: without a key there is nothing that a yes could be about.
            (Some(_), _) if !ours => Duration::MAX,
            (Some(gone), _) => match self.asked {
                Some((at, _)) if at < gone => Duration::ZERO,
                Some((_, Heard::No | Heard::Nothing)) if now.since(gone) < HURRY => again(ASK_AGAIN),
                _ => again(ASK_EVERY),
            },
            // Nothing else counts.
            (None, _) if proof == Proof::Hearsay => match self.asked {
                Some((_, Heard::No | Heard::Nothing)) => again(ASK_AGAIN),
                _ => again(ASK_EVERY),
            },
            // It has answered for itself, and there is no agent.
            (None, _) if proof != Proof::Store => Duration::MAX,
            (None, Need::Resting) if ours => again(ASK_EVERY),
            (None, _) => silent.max(again(ASK_EVERY)),
        }
    }

    fn question(&self) -> Option<Question> {
        let (leader, member) = self.last.clone()?;
        Some(Question { leader, member })
    }

    /// Takes an answer. An agent that says no shortens nothing while the key is there: the store's word stands, and its own
    /// earlier one.
    fn take(&mut self, shared: &Shared, asked_at: Boottime, question: &Question, heard: Heard) {
        self.asked = Some((asked_at, heard));
        let epoch = &question.leader.epoch;
        if self.last.as_ref().is_none_or(|(last, _)| last.epoch != *epoch) {
            return; // Overtaken by another's key.
        }
        match heard {
            Heard::Yes(remaining) => {
                self.denied_since = None;
                let without_key = self.gone_since.is_some_and(|gone| gone <= asked_at);
                shared.change_words(|words| words.with(question.answered(asked_at + remaining, without_key)));
                if without_key && !std::mem::replace(&mut self.told, true) {
                    let kind = EventKind::LeaderVouched(epoch.holder.clone());
                    warn!("{kind}");
                    shared.events.record(kind);
                }
            }
            Heard::No if self.gone_since.is_some() || shared.view.proof() == Proof::Hearsay => {
                let since = *self.denied_since.get_or_insert(asked_at);
                if Boottime::now().since(since) >= DENIED_MAX {
                    shared.change_words(|words| words.without(epoch));
                }
            }
            Heard::No | Heard::Nothing => {}
        }
        if shared.view.proof() == Proof::Hearsay && matches!(heard, Heard::No | Heard::Nothing) {
            shared.view.doubt(); // Somebody else may lead by now.
        }
    }
}

/// Whom to ask about what.
struct Question {
    leader: Leader,
    member: Member,
}

impl Question {
    fn answered(&self, end: Boottime, without_key: bool) -> Vouch {
        Vouch {
            leader: self.leader.clone(),
            member: self.member.clone(),
            end,
            names_epoch: self.member.record.pgherd.is_some(),
            without_key,
        }
    }
}

async fn vouch(question: &Question, view: Arc<View>, access: &Access) -> Heard {
    let (leader, epoch) = (&question.member, &question.leader.epoch);
    let Some(endpoint) = leader.record.api_endpoint() else {
        return Heard::Nothing;
    };
    let ours = leader.record.pgherd.is_some();
    let path = Ask::get(if ours { "/api/v1/warrant" } else { "/primary" });
    let answer = match ask_at(&endpoint, path, ANSWER_MAX, access).await {
        Ok(answer) => answer,
        Err(error) => {
            debug!(leader = %leader.name, %error, "the leader's agent gives no answer");
            return Heard::Nothing;
        }
    };
    let heard = if ours {
        let has_key = view.leader.is_some();
        ours_told(&answer, epoch, has_key, view.timing().ttl())
    } else {
        patroni_told(&answer, &view, epoch)
    };
    debug!(leader = %leader.name, status = answer.status, ?heard, "the leader's agent answers");
    heard
}

#[derive(Deserialize)]
struct Remaining {
    epoch: Option<Held>,
    remaining_ms: u64,
    #[serde(default)]
    writable: Option<bool>,
}

#[derive(Deserialize)]
struct Held {
    holder: String,
    create_revision: i64,
}

/// What our agent says of `epoch`, and for no longer than a lease. Without a key it must take writes by its own word: one
/// that is about to give its holding up has ended PostgreSQL before. Pure.
pub(crate) fn ours_told(answer: &Answer, epoch: &Epoch, has_key: bool, ttl: Duration) -> Heard {
    if answer.status != 200 {
        return Heard::No;
    }
    let Ok(told) = serde_json::from_slice::<Remaining>(&answer.body) else {
        return Heard::Nothing;
    };
    let same = told
        .epoch
        .is_some_and(|held| held.holder == epoch.holder.as_str() && held.create_revision == epoch.create_revision);
    match (same, told.writable) {
        (false, _) => Heard::No,
        (true, Some(false)) if !has_key => Heard::Nothing,
        (true, _) => Heard::Yes(Duration::from_millis(told.remaining_ms).min(ttl)),
    }
}

/// What a yes of Patroni's is good for, unless it is another's: addresses are given anew. Pure.
pub(crate) fn patroni_told(answer: &Answer, view: &View, epoch: &Epoch) -> Heard {
    let body = answer.json().unwrap_or_default();
    let of_another = |key: &str, expected: &str| {
        let said = body.pointer(key).and_then(serde_json::Value::as_str);
        said.is_some_and(|said| said != expected)
    };
    let another =
        of_another("/patroni/name", epoch.holder.as_str()) || of_another("/patroni/scope", view.scope.as_str());
    if answer.status == 200 && !another {
        Heard::Yes(PATRONI_YES)
    } else {
        Heard::No
    }
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
        let told = |status, body: &str| ours_told(&answer(status, body), &epoch(), true, Duration::from_secs(5));
        let yes = Heard::Yes(Duration::from_millis(300));
        assert_eq!(told(200, &body("n1", 10)), yes);
        assert_eq!(told(503, &body("n1", 10)), Heard::No);
        assert_eq!(told(200, &body("n1", 11)), Heard::No);
        assert_eq!(told(200, &body("n2", 10)), Heard::No);
        assert_eq!(told(200, r#"{"name":"n1","epoch":null,"remaining_ms":300}"#), Heard::No);
        assert_eq!(told(200, "it leads"), Heard::Nothing);
        let brief = ours_told(
            &answer(200, &body("n1", 10)),
            &epoch(),
            true,
            Duration::from_millis(200),
        );
        assert_eq!(brief, Heard::Yes(Duration::from_millis(200)));
    }

    #[test]
    fn without_a_key_a_leader_must_take_writes_by_its_own_word() {
        let body = |writable: bool| {
            format!(
                r#"{{"epoch":{{"holder":"n1","create_revision":10}},"remaining_ms":300,"role":"primary","writable":{writable}}}"#
            )
        };
        let yes = Heard::Yes(Duration::from_millis(300));
        for (writable, has_key, expected) in [
            (true, false, yes),
            (true, true, yes),
            (false, true, yes),
            (false, false, Heard::Nothing),
        ] {
            let told = ours_told(&answer(200, &body(writable)), &epoch(), has_key, Duration::from_secs(5));
            assert_eq!(told, expected, "{writable} {has_key}");
        }
    }

    #[test]
    fn a_yes_of_patronis_is_good_for_two_seconds() {
        let view = Cluster::new().leader("n1", 10).patroni("n1").view();
        let told = |status, body: &str| patroni_told(&answer(status, body), &view, &epoch());
        let yes = Heard::Yes(PATRONI_YES);
        assert_eq!(told(200, ""), yes);
        assert_eq!(told(200, r#"{"patroni":{"name":"n1","scope":"c"}}"#), yes);
        assert_eq!(told(200, r#"{"patroni":{"name":"n2","scope":"c"}}"#), Heard::No);
        assert_eq!(told(200, r#"{"patroni":{"name":"n1","scope":"d"}}"#), Heard::No);
        assert_eq!(told(503, ""), Heard::No);
    }

    fn at(millis: u64) -> Boottime {
        Boottime::from_nanos(millis * 1_000_000)
    }

    const YES: Heard = Heard::Yes(Duration::from_secs(1));

    fn wait(
        cluster: &Cluster,
        asked: Option<(u64, Heard)>,
        gone: Option<u64>,
        confirmed: Option<u64>,
        need: Need,
        now: u64,
    ) -> Duration {
        let mut asker = Asker::default();
        asker.note(&cluster.view(), at(0));
        asker.asked = asked.map(|(millis, heard)| (at(millis), heard));
        if let Some(gone) = gone {
            asker.note(&Cluster::new().view(), at(gone));
        }
        asker.wait(confirmed.map(at), need, Proof::Store, at(now))
    }

    #[test]
    fn a_leader_that_has_its_key_is_asked_once_a_second_for_sessions_and_for_nobody_else_while_the_store_confirms() {
        let never = Duration::MAX;
        let (now, millis) = (Duration::ZERO, Duration::from_millis);
        let ours = Cluster::new().leader("n1", 10).primary("n1", 11);
        let patronis = Cluster::new().leader("n1", 10).patroni("n1");
        let cases = [
            (&ours, None, None, Need::Resting, 9_000, never),
            (&ours, None, Some(1_000), Need::None, 9_000, never),
            (&ours, None, Some(1_000), Need::Resting, 1_500, now),
            (
                &ours,
                Some((1_200, YES)),
                Some(1_000),
                Need::Resting,
                1_500,
                millis(700),
            ),
            (&ours, None, Some(1_000), Need::Waiting, 1_500, millis(1_500)),
            (&patronis, None, Some(1_000), Need::Resting, 1_500, millis(1_500)),
            (&patronis, None, Some(1_000), Need::Resting, 3_000, now),
            (
                &patronis,
                Some((3_000, YES)),
                Some(1_000),
                Need::Resting,
                3_400,
                millis(600),
            ),
            (&patronis, Some((3_000, YES)), Some(1_000), Need::Resting, 4_000, now),
            (
                &patronis,
                Some((3_000, YES)),
                Some(3_500),
                Need::Resting,
                4_000,
                millis(1_500),
            ),
        ];
        for (cluster, asked, confirmed, need, now, expected) in cases {
            let told = wait(cluster, asked, None, confirmed, need, now);
            assert_eq!(told, expected, "{asked:?} {confirmed:?} {need:?} {now}");
        }
    }

    #[test]
    fn a_leader_whose_key_is_gone_is_asked_at_once_and_soon_again_until_it_answers() {
        let ours = Cluster::new().leader("n1", 10).primary("n1", 11);
        let millis = Duration::from_millis;
        let cases = [
            (Some((900, YES)), Need::Resting, 1_000, Duration::ZERO),
            (None, Need::Waiting, 1_000, Duration::ZERO),
            (Some((900, YES)), Need::None, 1_000, Duration::MAX),
            (Some((1_000, YES)), Need::Resting, 1_100, millis(900)),
            (Some((1_000, Heard::No)), Need::Resting, 1_100, millis(100)),
            (Some((1_000, Heard::Nothing)), Need::Waiting, 1_100, millis(100)),
            (Some((6_000, Heard::No)), Need::Waiting, 6_100, millis(900)),
        ];
        for (asked, need, now, expected) in cases {
            let told = wait(&ours, asked, Some(1_000), Some(900), need, now);
            assert_eq!(told, expected, "{asked:?} {need:?} {now}");
        }
        let patronis = Cluster::new().leader("n1", 10).patroni("n1");
        let told = wait(&patronis, None, Some(1_000), Some(900), Need::Resting, 9_000);
        assert_eq!(told, Duration::MAX);
    }

    #[test]
    fn where_only_the_leaders_word_counts_it_is_asked_as_soon_as_somebody_needs_it_and_soon_again_until_it_answers() {
        let mut asker = Asker::default();
        asker.note(&Cluster::new().leader("n1", 10).patroni("n1").view(), at(0));
        let mut wait = |asked: Option<(u64, Heard)>, need| {
            asker.asked = asked.map(|(millis, heard)| (at(millis), heard));
            asker.wait(Some(at(900)), need, Proof::Hearsay, at(1_100))
        };
        assert_eq!(wait(None, Need::None), Duration::MAX);
        assert_eq!(wait(None, Need::Waiting), Duration::ZERO);
        assert_eq!(wait(Some((1_000, YES)), Need::Resting), Duration::from_millis(900));
        assert_eq!(
            wait(Some((1_000, Heard::No)), Need::Resting),
            Duration::from_millis(100)
        );
        assert_eq!(
            wait(Some((1_000, Heard::Nothing)), Need::Waiting),
            Duration::from_millis(100)
        );
    }

    #[test]
    fn a_leader_without_a_record_is_asked_where_it_was_under_the_same_key_only() {
        let mut asker = Asker::default();
        asker.note(&Cluster::new().leader("n1", 10).primary("n1", 11).view(), at(0));
        asker.note(&Cluster::new().leader("n1", 10).view(), at(1));
        assert!(asker.question().is_some());
        asker.note(&Cluster::new().leader("n1", 20).view(), at(2));
        assert!(asker.question().is_none());
    }
}
