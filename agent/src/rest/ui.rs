//! `GET /ui`: the operator's page, as this member sees the cluster. It is looked at; who wants to act has a proxy's page or
//! pgherd's commands.

use std::convert::Infallible;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::record::Role;
use pgherd_cluster::source::SourceHealth;
use pgherd_page::headers::{Paths, file};
use pgherd_page::live::{Feed, Live};
use pgherd_page::model::{LeaderState, MemberState, Mood, State, Teller, Verdict, ViewState};
use pgherd_page::of_view;
use pgherd_page::render::{Acting, Page};
use pgherd_page::ring::Ring;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{sleep, timeout};

use super::answer::{Answer, error_page, page_part, page_stream};
use super::facts::Facts;
use super::{Api, OUT_OF_TOUCH};

const PATHS: Paths = Paths { root: "/ui" };
/// Numbers move without events.
const REFRESH: Duration = Duration::from_secs(1);
/// However much happens.
const REFRESH_MIN: Duration = Duration::from_millis(200);

/// What the page remembers.
#[derive(Default)]
pub(super) struct Board {
    live: Live,
    ring: Mutex<Ring>,
}

impl Board {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn acting() -> Acting {
    let where_to = "Look here; act from the page of a proxy (/stats), or with pgherd's commands: pgherd switchover, restart, \
                    reload, reinit, pause, resume.";
    Acting::Refused(where_to.to_owned())
}

/// Serves what lies below `/ui`. A stream needs `slot`.
pub(super) fn serve(api: &Api, path: &str, slot: Option<OwnedSemaphorePermit>) -> Answer {
    match PATHS.below(path).unwrap_or_default() {
        "" => {
            let (state, now, acting) = (state(api, &api.facts()), Boottime::now(), acting());
            let ring = api.board.ring();
            page_part("text/html; charset=utf-8", page(&state, &ring, now, &acting).whole())
        }
        "state" => {
            // The state has text keys only, which is all that could fail.
            let state = serde_json::to_string(&state(api, &api.facts())).unwrap_or_default();
            page_part("application/json", state)
        }
        "live" => match slot {
            Some(slot) => page_stream(api.board.live.watch(Feed::Page, slot)),
            None => error_page(503, "too many subscribers"),
        },
        name => match file(name) {
            Some((content_type, text)) => page_part(content_type, text),
            None => error_page(404, "Not Found"),
        },
    }
}

fn page<'a>(state: &'a State, ring: &'a Ring, now: Boottime, acting: &'a Acting) -> Page<'a> {
    Page {
        state,
        ring,
        now,
        acting,
        paths: PATHS,
    }
}

/// Looks once a second and whenever the view changes, and renders once for everybody who watches.
pub(super) async fn keep(api: &Api) -> Infallible {
    let mut views = api.view.subscribe();
    let mut statuses = api.status.clone();
    let acting = acting();
    loop {
        let (state, now) = (state(api, &api.facts()), Boottime::now());
        {
            let mut ring = api.board.ring();
            if ring.is_due(now) {
                ring.sample(&state, now);
            }
            if api.board.live.is_watched() {
                api.board.live.publish(&page(&state, &ring, now, &acting));
            }
        }
        sleep(REFRESH_MIN).await;
        let news = async {
            tokio::select! {
                Ok(()) = views.changed() => {}
                Ok(()) = statuses.changed() => {}
                () = api.board.live.somebody_came() => {}
                else => std::future::pending().await,
            }
        };
        // Without news the time alone is reason enough.
        let _ = timeout(REFRESH - REFRESH_MIN, news).await;
    }
}

fn state(api: &Api, facts: &Facts) -> State {
    let health = api.view.health().borrow().clone();
    let heard = api.view.heard_at().map(|at| facts.now.since(at));
    of_facts(facts, &health, heard)
}

/// What this member knows. Pure.
fn of_facts(facts: &Facts, health: &SourceHealth, heard: Option<Duration>) -> State {
    let view = &*facts.view;
    let teller = Teller::Agent {
        name: facts.status.name.to_string(),
        reason: facts.status.reason.clone(),
    };
    let (verdict, writable) = verdict(facts);
    let timing = view.timing();
    let holding = facts.status.holding.as_ref();
    let left = holding.map_or(Duration::ZERO, |holding| holding.deadline.since(facts.now));
    State {
        writable,
        paused: facts.is_paused(),
        verdict,
        safety: of_view::safety(view),
        view: ViewState {
            revision: view.revision,
            age_seconds: heard.map(|age| age.as_secs_f64()),
            warrant_left_seconds: if facts.leads() { left.as_secs_f64() } else { 0.0 },
            warrant_seconds: timing.ttl().as_secs_f64(),
            store: match health {
                SourceHealth::Starting => "starting",
                SourceHealth::Following => "following",
                SourceHealth::Failing(_) => "failing",
            },
            store_error: match health {
                SourceHealth::Failing(error) => Some(error.to_string()),
                SourceHealth::Starting | SourceHealth::Following => None,
            },
            relists: 0,
            ttl_seconds: timing.ttl().as_secs_f64(),
        },
        leader: view.epoch().map(|epoch| LeaderState {
            name: epoch.holder.to_string(),
            epoch: epoch.create_revision,
            since: None,
            since_seconds: 0.0,
            timeline: view
                .leader_member()
                .and_then(|member| member.record.timeline)
                .map(|timeline| timeline.0),
        }),
        asked: of_view::asked(view),
        members: view
            .members
            .values()
            .map(|member| shown(facts, of_view::member(view, member)))
            .collect(),
        history: of_view::history(view),
        ..State::unknown(view.scope.as_str(), teller)
    }
}

/// A member, with what this one knows of itself.
fn shown(facts: &Facts, mut member: MemberState) -> MemberState {
    let writable = facts.view.writable_leader();
    if writable.is_some_and(|leader| leader.name.as_str() == member.name) {
        member.takes = Some("write");
    } else if member.state == "streaming" {
        member.takes = Some("read");
    }
    if facts.status.name.as_str() == member.name && member.takes.is_none() {
        member.left_out = Some(facts.status.reason.clone());
    }
    member
}

/// Whether the cluster can be written to, as far as this member knows.
fn verdict(facts: &Facts) -> (Verdict, bool) {
    let told = |word, mood, sentence: String| Verdict { word, mood, sentence };
    let name = &facts.status.name;
    if facts.is_failsafe_active() && facts.role() == Role::Primary {
        let sentence = format!("{name} leads on by the word of all other members, since etcd does not answer");
        return (told("WRITABLE", Mood::Wait, sentence), true);
    }
    let Some(view) = facts.known_view() else {
        return (told("UNCERTAIN", Mood::Bad, OUT_OF_TOUCH.to_owned()), false);
    };
    let Some(epoch) = view.epoch() else {
        return (
            told("NO LEADER", Mood::Bad, "nobody holds the leader key".to_owned()),
            false,
        );
    };
    let leader = &epoch.holder;
    if facts.is_standby_cluster() {
        let sentence = format!("{leader} leads; it follows another cluster and takes no writes");
        return (told("STANDBY CLUSTER", Mood::Wait, sentence), false);
    }
    match view.writable_leader() {
        Some(member) => {
            let timeline = member
                .record
                .timeline
                .map(|timeline| format!(", timeline {}", timeline.0));
            let sentence = format!("{leader}{}, by its own word", timeline.unwrap_or_default());
            (told("WRITABLE", Mood::Good, sentence), true)
        }
        None => {
            let sentence = format!("{leader} holds the leader key, and has not proven yet that it takes writes");
            (told("NOT WRITABLE", Mood::Bad, sentence), false)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::super::fixtures::{facts, view_with};
    use super::*;

    fn shown_of(facts: &Facts) -> (State, String) {
        let state = of_facts(facts, &SourceHealth::Following, Some(Duration::from_millis(20)));
        let html = page(&state, &Ring::default(), facts.now, &acting()).whole();
        (state, html)
    }

    #[test]
    fn the_page_of_a_member_shows_the_whole_cluster() {
        let (state, html) = shown_of(&facts());
        assert!(state.writable && state.verdict.word == "WRITABLE");
        assert_eq!(
            state
                .members
                .iter()
                .filter(|member| member.takes == Some("read"))
                .count(),
            2
        );
        for part in [
            "node1",
            "node2",
            "node3",
            "as the agent of",
            "/ui/page.css",
            "pgherd switchover",
        ] {
            assert!(html.contains(part), "{part} in {html}");
        }
        assert!(!html.contains("<form") && !html.contains("/ui/act"));
    }

    #[test]
    fn nobody_leads_is_said() {
        let mut facts = facts();
        facts.view = Arc::new(view_with(None, json!({}), vec![]));
        let (state, html) = shown_of(&facts);
        assert!(!state.writable && html.contains("NO LEADER"), "{html}");
    }
}
