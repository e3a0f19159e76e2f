//! What is done from the page: a form is given out, judged when it comes back, and passed on to the members' agents, who
//! have the last word.

use std::time::Duration;

use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode};
use pgherd_cluster::clock::Boottime;
use pgherd_cluster::http::{Ask, ask_at};
use pgherd_cluster::view::Member;
use pgherd_page::acting::{Action, Order, Refusal, Submission, may_act};
use pgherd_page::login::PageLogin;
use pgherd_page::model::{Mood, State as Shown};
use pgherd_page::render::{Sheet, notice};
use pgherd_page::words::{size, span};
use serde_json::{Value, json};
use tokio::time::timeout;
use tracing::info;

use super::PATHS;
use super::answer::{Answer, html};
use super::state::State;
use crate::events::EventKind;
use crate::shared::Shared;

/// The longest form; names are at most some hundreds of bytes.
const FORM_BYTES_MAX: usize = 8 << 10;
/// How long a form may take to arrive.
const FORM_MAX: Duration = Duration::from_secs(5);
/// How long a member may take to say what a switchover would meet.
const FORECAST_MAX: Duration = Duration::from_secs(2);
/// How long a member may take to do what it was asked for; a switchover answers when it is over.
const DONE_MAX: Duration = Duration::from_secs(60);
/// How much of a member's answer is shown and kept.
const SAID_CHARS_MAX: usize = 300;

/// Where members expect credentials to be configured on this side.
const CREDENTIALS: &str = "set ctl.authentication (or restapi.authentication) with username and password in this proxy's \
                           configuration to what the members have under restapi.authentication";

/// The form that confirms what a link of the page asks for.
pub(super) async fn form(shared: &Shared, login: Option<&PageLogin>, query: Option<&str>) -> Answer {
    let state = State::of(shared);
    let login = match may_act(login) {
        Ok(login) => login,
        Err(refusal) => return refused(&state, &refusal),
    };
    let Some(order) = Order::of_query(query.unwrap_or_default()) else {
        return refused(&state, &Refusal::NotAForm);
    };
    if let Some(name) = &order.member
        && state.members.iter().all(|member| member.name != *name)
    {
        return refused(&state, &Refusal::NoSuchMember(name.clone()));
    }
    let forecast = forecast(shared, &state, &order).await;
    let Some(token) = shared.board.desk.issue(login, &order, Boottime::now()) else {
        return html(
            StatusCode::SERVICE_UNAVAILABLE,
            notice(
                &state,
                PATHS,
                Mood::Bad,
                "NOT NOW",
                "the system gives no random numbers",
            ),
        );
    };
    let sheet = Sheet {
        order: &order,
        state: &state,
        paths: PATHS,
        forecast: &forecast,
        token: &token,
    };
    html(StatusCode::OK, sheet.html())
}

/// A form that was sent back.
pub(super) async fn submit(shared: &Shared, login: Option<&PageLogin>, request: Request<Incoming>) -> Answer {
    match judged(shared, login, request).await {
        Ok((login, order)) => obey(shared, &login, &order).await,
        Err(refusal) => {
            info!(%refusal, "a form of the page was refused");
            refused(&State::of(shared), &refusal)
        }
    }
}

async fn judged(
    shared: &Shared,
    login: Option<&PageLogin>,
    request: Request<Incoming>,
) -> Result<(PageLogin, Order), Refusal> {
    let login = may_act(login)?;
    let (head, body) = request.into_parts();
    let body = timeout(FORM_MAX, Limited::new(body, FORM_BYTES_MAX).collect());
    let body = match body.await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(Refusal::NotAForm),
        Ok(Err(_)) | Err(_) => return Err(Refusal::NotAForm),
    };
    let submission = Submission::parse(&head.headers, &body)?;
    let state = State::of(shared);
    let now = Boottime::now();
    let order = shared
        .board
        .desk
        .judge(login, &head.headers, &submission, &state, now)?;
    Ok((login.clone(), order))
}

fn refused(state: &Shown, refusal: &Refusal) -> Answer {
    let status = match refusal {
        Refusal::NoPassword | Refusal::WeakPassword(_) | Refusal::FromElsewhere | Refusal::Forged => {
            StatusCode::FORBIDDEN
        }
        Refusal::NotAForm => StatusCode::BAD_REQUEST,
        Refusal::Stale { .. } | Refusal::NotTyped(_) | Refusal::NoSuchMember(_) => StatusCode::CONFLICT,
    };
    let text = format!("{refusal}.");
    html(status, notice(state, PATHS, Mood::Wait, "NOTHING WAS CHANGED", &text))
}

/// What a member's agent is asked for.
fn request(order: &Order, state: &Shown) -> (Method, &'static str, Value) {
    match order.action {
        Action::Switchover => {
            let leader = state.leader.as_ref().map(|leader| leader.name.as_str());
            (
                Method::POST,
                "/switchover",
                json!({"leader": leader, "candidate": order.member}),
            )
        }
        Action::Pause => (Method::PATCH, "/config", json!({"pause": true})),
        Action::Resume => (Method::PATCH, "/config", json!({"pause": null})),
        Action::Restart => (Method::POST, "/restart", json!({})),
        Action::Reload => (Method::POST, "/reload", json!({})),
        Action::Reinitialize => (Method::POST, "/reinitialize", json!({"force": false})),
    }
}

async fn obey(shared: &Shared, login: &PageLogin, order: &Order) -> Answer {
    let state = State::of(shared);
    let outcome = pass_on(shared, &state, order).await;
    let (done, said) = match &outcome {
        Ok(said) => (true, said),
        Err(why) => (false, why),
    };
    // What lies between may answer with a whole page of its own.
    let said: &String = &said.chars().take(SAID_CHARS_MAX).collect();
    let by = login.name();
    info!(%order, by, done, said, "asked for from the page");
    shared.events.record(EventKind::AskedFor {
        order: order.to_string(),
        by,
        said: said.clone(),
        done,
    });
    let state = State::of(shared);
    let (status, mood, title) = if done {
        (StatusCode::OK, Mood::Good, "DONE")
    } else {
        (StatusCode::BAD_GATEWAY, Mood::Bad, "NOT DONE")
    };
    html(status, notice(&state, PATHS, mood, title, &format!("{order}: {said}")))
}

/// The member whose agent is asked: the one that it is about, and the leader's for what is about the cluster.
fn asked_of(shared: &Shared, order: &Order) -> Option<Member> {
    let view = shared.seen().view;
    let about = match order.action {
        Action::Switchover | Action::Pause | Action::Resume => None,
        Action::Restart | Action::Reload | Action::Reinitialize => order.member.as_deref(),
    };
    let found = match about {
        Some(name) => view.members.values().find(|member| member.name.as_str() == name),
        None => view.leader_member().or_else(|| view.members.values().next()),
    };
    found.cloned()
}

/// What the member's agent said, or why nothing was done.
async fn pass_on(shared: &Shared, state: &Shown, order: &Order) -> Result<String, String> {
    let member = asked_of(shared, order).ok_or("there is no member to ask")?;
    let name = &member.name;
    let endpoint = member
        .record
        .api_endpoint()
        .ok_or_else(|| format!("{name} does not say where its REST interface is"))?;
    let (method, path, json) = request(order, state);
    let ask = Ask {
        method,
        path: path.to_owned(),
        json: Some(json),
        authorization: None,
    };
    let answer = ask_at(&endpoint, ask, DONE_MAX, shared.view.access()).await;
    let answer = answer.map_err(|error| format!("{name}: {error}"))?;
    match answer.status {
        401 | 403 => Err(format!(
            "{name} lets nobody do that without its credentials ({}): {CREDENTIALS}",
            answer.text()
        )),
        200..300 if answer.json().is_some() => Ok(format!("{name} has done it")),
        200..300 => Ok(format!("{name} says: {}", answer.text())),
        status => Err(format!("{name} answers {status}: {}", answer.text())),
    }
}

/// What an order would meet, in rows; a member that does not tell is no reason not to show the form.
async fn forecast(shared: &Shared, state: &Shown, order: &Order) -> Vec<(String, String)> {
    let mut rows = Vec::new();
    let mut row = |what: &str, how: String| rows.push((what.to_owned(), how));
    let about = state
        .members
        .iter()
        .find(|member| Some(&member.name) == order.member.as_ref());
    if let Some(member) = about {
        let lag = member.lag_bytes.filter(|_| !state.leads(&member.name));
        row("it is", format!("{}, {}", member.role, member.state));
        if let Some(lag) = lag {
            row("behind the leader", size(lag));
        }
        let sessions = member.sessions_write + member.sessions_read;
        row("sessions through this proxy", sessions.to_string());
    }
    if order.action != Action::Switchover {
        return rows;
    }
    let writers: usize = state.members.iter().map(|member| member.sessions_write).sum();
    row("sessions of writers that will end", writers.to_string());
    match told_by_leader(shared).await {
        Ok(told) => rows.extend(read_forecast(&told)),
        Err(why) => rows.push(("the leader's forecast".to_owned(), why)),
    }
    rows
}

async fn told_by_leader(shared: &Shared) -> Result<Value, String> {
    let view = shared.seen().view;
    let leader = view.leader_member().ok_or("nobody leads")?;
    let endpoint = leader
        .record
        .api_endpoint()
        .ok_or("it does not say where its REST interface is")?;
    let asked = ask_at(
        &endpoint,
        Ask::get("/api/v1/forecast"),
        FORECAST_MAX,
        shared.view.access(),
    )
    .await;
    let answer = asked.map_err(|error| error.to_string())?;
    match answer.status {
        401 | 403 => Err(format!("not without credentials: {CREDENTIALS}")),
        200 => answer.json().ok_or_else(|| "it cannot be read".to_owned()),
        status => Err(format!("it answers {status}")),
    }
}

/// The parts of `GET /api/v1/forecast` that decide how long writes stand still.
fn read_forecast(told: &Value) -> Vec<(String, String)> {
    let number = |name: &str| told.get(name).and_then(Value::as_u64);
    let seconds = |seconds: u64| span(std::time::Duration::from_secs(seconds).as_secs_f64());
    let rows = [
        (
            "transactions under way on the leader",
            number("transactions").map(|count| count.to_string()),
        ),
        ("of which the oldest began", oldest(told)),
        (
            "log since the last checkpoint",
            number("wal_since_checkpoint").map(size),
        ),
        (
            "the last checkpoint took place",
            number("checkpoint_age_seconds").map(|age| format!("{} ago", seconds(age))),
        ),
        (
            "segments that wait for the archiver",
            number("ready_files").map(|count| count.to_string()),
        ),
    ];
    rows.into_iter()
        .filter_map(|(what, how)| Some((what.to_owned(), how?)))
        .collect()
}

fn oldest(told: &Value) -> Option<String> {
    let seconds = told.get("oldest")?.get(0)?.get("seconds")?.as_f64()?;
    Some(format!("{} ago", span(seconds)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_forecast_is_read_as_far_as_it_is_known() {
        let told = json!({"transactions": 2, "oldest": [{"seconds": 61.0}], "ready_files": 0, "other": true});
        let rows = read_forecast(&told);
        let rows: Vec<_> = rows.iter().map(|(what, how)| (what.as_str(), how.as_str())).collect();
        assert_eq!(
            rows,
            [
                ("transactions under way on the leader", "2"),
                ("of which the oldest began", "1 min 1 s ago"),
                ("segments that wait for the archiver", "0"),
            ]
        );
        assert!(read_forecast(&json!(null)).is_empty());
    }
}
