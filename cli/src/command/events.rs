//! `pgherd events`: what happened, why, and by whose will; from etcd, or, where that does not answer, from a member.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use pgherd_cluster::clock::wall_now;
use pgherd_cluster::event::{Event, EventId, Events};
use pgherd_cluster::http::{Ask, Endpoint, Event as Pushed, Opened, ask_at, events as open};
use pgherd_cluster::source::EtcdSource;
use serde_json::{Map, Value};
use tokio_util::sync::CancellationToken;

use super::output::{Rows, spaced_json};
use super::site::{ANSWER_MAX, Scene, Site};
use super::{when, yaml_text};
use crate::args::{EventsArgs, Format, KindArg};
use crate::failure::Failure;
use crate::terminal::{print, say};

/// A member that follows the cluster says within fifteen seconds that it lives; two of them missing.
const SILENCE_MAX: Duration = Duration::from_secs(35);

/// Which events are wanted.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    since_ms: u64,
    kind: Option<KindArg>,
}

impl Wanted {
    fn takes(&self, event: &Event) -> bool {
        event.at_ms >= self.since_ms && self.kind.is_none_or(|kind| kind.is(event.kind))
    }
}

/// Where events are read.
pub(super) enum Whence {
    Etcd,
    Member(Endpoint),
}

/// Runs the command.
///
/// # Errors
/// Bad configuration; when neither etcd nor a member answers.
pub(crate) async fn run(scene: &Scene, args: &EventsArgs) -> Result<(), Failure> {
    let document = scene.document()?;
    let site = Site::new(&document, args.cluster.cluster.as_deref(), args.cluster.group)?;
    let wanted = Wanted {
        since_ms: args.since.as_deref().map(since).transpose()?.unwrap_or_default(),
        kind: args.kind,
    };
    let (from, events) = read(&site, args.url.as_deref()).await?;
    let events: Vec<Arc<Event>> = events.iter().filter(|event| wanted.takes(event)).cloned().collect();
    if !args.follow {
        print(&render(&events, args.output));
        return Ok(());
    }
    let mut printed = Printed::default();
    let mut tell = |event: &Event| {
        if wanted.takes(event) && printed.is_new(&event.id) {
            print(&one(event, args.output));
        }
    };
    events.iter().for_each(|event| tell(event));
    match from {
        Whence::Etcd => follow_etcd(&site, &mut tell).await,
        Whence::Member(endpoint) => follow_member(&site, &endpoint, &mut tell).await,
    }
}

/// What has been printed; what is told again is not.
#[derive(Default)]
struct Printed(BTreeSet<EventId>);

impl Printed {
    fn is_new(&mut self, id: &EventId) -> bool {
        let is_new = self.0.insert(id.clone());
        while self.0.len() > 10_000 {
            self.0.pop_first();
        }
        is_new
    }
}

/// The events that are known: etcd's, or those of the member at `url`; where etcd does not answer, those of the member whose
/// configuration this is.
///
/// # Errors
/// When nobody answers.
pub(super) async fn read(site: &Site, url: Option<&str>) -> Result<(Whence, Events), Failure> {
    let asked = match url {
        Some(url) => Some(Endpoint::of(url).ok_or_else(|| {
            Failure::configuration(format!(
                "--url {url:?}: write a member's REST address, such as http://10.0.0.1:8008"
            ))
        })?),
        None => None,
    };
    if let Some(endpoint) = asked {
        let events = of_member(site, &endpoint).await?;
        return Ok((Whence::Member(endpoint), events));
    }
    match site.view().await {
        Ok(view) => Ok((Whence::Etcd, view.events)),
        Err(Failure::Unavailable(why)) => {
            let Some(endpoint) = site.own_agent() else {
                return Err(Failure::Unavailable(format!(
                    "{why}; --url with a member's REST address asks that member instead"
                )));
            };
            let events = of_member(site, &endpoint).await;
            let events = events.map_err(|error| Failure::Unavailable(format!("{why}; {error}")))?;
            Ok((Whence::Member(endpoint), events))
        }
        Err(other) => Err(other),
    }
}

async fn of_member(site: &Site, endpoint: &Endpoint) -> Result<Events, Failure> {
    let asked = ask_at(endpoint, Ask::get("/api/v1/journal"), ANSWER_MAX, &site.access()).await;
    let answer = asked.map_err(|error| Failure::Unavailable(format!("{endpoint}: {error}")))?;
    let document = answer.json().filter(|_| answer.status == 200);
    let events = document
        .as_ref()
        .and_then(|document| document.get("events")?.as_array());
    let events = events
        .ok_or_else(|| Failure::Unavailable(format!("{endpoint} tells of no events (HTTP {})", answer.status)))?;
    Ok(events.iter().filter_map(Event::parse).collect())
}

/// Until it is interrupted. What is missed while etcd is away is told when it is back.
async fn follow_etcd(site: &Site, tell: &mut impl FnMut(&Event)) -> Result<(), Failure> {
    let scope = site.cluster.scope.clone();
    let (source, view) = EtcdSource::new(site.etcd.clone(), site.keys(), scope, false);
    let mut changes = view.subscribe();
    let stop = CancellationToken::new();
    let following = async {
        while changes.changed().await.is_ok() {
            let events = changes.borrow_and_update().events.clone();
            events.iter().for_each(|event| tell(event));
        }
    };
    tokio::select! {
        () = source.run(stop) => {}
        () = following => {}
    }
    Err(Failure::Unavailable("etcd is followed no more".to_owned()))
}

async fn follow_member(site: &Site, endpoint: &Endpoint, tell: &mut impl FnMut(&Event)) -> Result<(), Failure> {
    let lost = |error: &dyn std::fmt::Display| Failure::Unavailable(format!("{endpoint}: {error}"));
    let path = "/api/v1/journal?follow=1";
    let mut stream = match open(endpoint, path, ANSWER_MAX, &site.access()).await {
        Ok(Opened::Events(stream)) => stream,
        Ok(Opened::Refused(code)) => return Err(lost(&format!("it cannot be followed (HTTP {code})"))),
        Err(error) => return Err(lost(&error)),
    };
    loop {
        match stream.next(SILENCE_MAX).await {
            Ok(Pushed::Data(text)) => {
                let event = serde_json::from_str::<Value>(&text).ok();
                if let Some(event) = event.as_ref().and_then(Event::parse) {
                    tell(&event);
                }
            }
            Ok(Pushed::Alive) => {}
            Err(error) => return Err(lost(&error)),
        }
    }
}

/// A time, or how long ago, such as `10m`; in milliseconds since 1970.
fn since(text: &str) -> Result<u64, Failure> {
    let now = Timestamp::try_from(wall_now()).unwrap_or(Timestamp::UNIX_EPOCH);
    let at = match text.parse::<SignedDuration>() {
        Ok(ago) => now.checked_sub(ago.abs()).ok(),
        Err(_) => {
            when::parse(text, &jiff::tz::TimeZone::system())?.map_or(Some(now), |text| text.parse::<Timestamp>().ok())
        }
    };
    let at = at.ok_or_else(|| {
        Failure::configuration(format!("--since {text:?}: write a time, or how long ago, such as 10m"))
    })?;
    Ok(u64::try_from(at.as_millisecond()).unwrap_or_default())
}

/// As `2026-01-02T03:04:05.678Z`.
pub(super) fn utc(at_ms: u64) -> String {
    let at = i64::try_from(at_ms)
        .ok()
        .and_then(|at| Timestamp::from_millisecond(at).ok());
    at.map_or_else(|| "?".to_owned(), |at| format!("{at:.3}"))
}

fn render(events: &[Arc<Event>], format: Format) -> String {
    match format {
        Format::Pretty => events.iter().map(|event| one(event, format)).collect(),
        Format::Tsv => rows(events).render(format, "\t"),
        Format::Json => format!("{}\n", spaced_json(&documents(events))),
        Format::Yaml => format!("{}\n", yaml_text::document(&documents(events))),
    }
}

fn documents(events: &[Arc<Event>]) -> Value {
    Value::Array(events.iter().map(|event| document(event)).collect())
}

/// As it is stored, with the time as people read it.
fn document(event: &Event) -> Value {
    let mut map = Map::new();
    map.insert("time".to_owned(), utc(event.at_ms).into());
    if let Value::Object(stored) = event.to_json() {
        map.extend(stored);
    }
    Value::Object(map)
}

/// One event while they are followed: a line, or a document.
fn one(event: &Event, format: Format) -> String {
    match format {
        Format::Pretty => line(event) + "\n",
        Format::Tsv => {
            let rows = rows(&[Arc::new(event.clone())]).render(format, "\t");
            rows.lines().skip(1).map(|line| format!("{line}\n")).collect()
        }
        Format::Json => format!("{}\n", spaced_json(&document(event))),
        Format::Yaml => yaml_text::document(&Value::Array(vec![document(event)])),
    }
}

fn line(event: &Event) -> String {
    let mut line = format!(
        "{}  {}  {:<13}  {}",
        utc(event.at_ms),
        event.id,
        event.kind.as_str(),
        event.what
    );
    if let Some(cause) = &event.cause {
        line.push_str(&format!(": {cause}"));
    }
    if let Some(actor) = &event.actor {
        line.push_str(&format!(", asked by {actor}"));
    }
    let evidence = evidence(event);
    if !evidence.is_empty() {
        line.push_str(&format!(" ({evidence})"));
    }
    line
}

fn evidence(event: &Event) -> String {
    let piece = |(name, value): (&String, &Value)| match value {
        Value::String(text) => format!("{name} {text}"),
        other => format!("{name} {other}"),
    };
    event.evidence.iter().map(piece).collect::<Vec<_>>().join(", ")
}

fn rows(events: &[Arc<Event>]) -> Rows {
    let headings = ["Time", "Event", "By", "Kind", "What", "Cause", "Actor", "Evidence"];
    let text = |text: &Option<String>| Value::from(text.clone().unwrap_or_default());
    let row = |event: &Arc<Event>| {
        vec![
            utc(event.at_ms).into(),
            event.id.as_str().into(),
            event.by.as_str().into(),
            event.kind.as_str().into(),
            event.what.as_str().into(),
            text(&event.cause),
            text(&event.actor),
            evidence(event).into(),
        ]
    };
    Rows {
        headings: headings.map(str::to_owned).to_vec(),
        right: Vec::new(),
        rows: events.iter().map(row).collect(),
    }
}

/// Says that there is nothing, where a table would be empty.
pub(super) fn say_none(what: &str) {
    say(format!("No {what} is known."));
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::event::Kind;
    use serde_json::json;

    use super::*;

    fn event() -> Arc<Event> {
        Arc::new(Event {
            cause: Some("switchover from n1 to n2".to_owned()),
            actor: Some("admin at 10.0.0.5".to_owned()),
            evidence: json!({"lsn": "0/4000060", "timeline": 4})
                .as_object()
                .cloned()
                .unwrap_or_default(),
            ..Event::new(
                EventId::new(1_795_218_269_498, "n2"),
                1_795_218_269_498,
                "n2",
                Kind::Leader,
                "n2 takes writes as n2@40",
            )
        })
    }

    #[test]
    fn an_event_is_a_line_that_says_what_why_by_whom_and_on_what_grounds() {
        let id = EventId::new(1_795_218_269_498, "n2");
        let expected = format!(
            "2026-11-20T23:44:29.498Z  {id}  leader         n2 takes writes as n2@40: switchover from n1 to n2, \
             asked by admin at 10.0.0.5 (lsn 0/4000060, timeline 4)\n"
        );
        assert_eq!(render(&[event()], Format::Pretty), expected);
    }

    #[test]
    fn programs_get_the_same_as_rows_and_documents() {
        let tsv = render(&[event()], Format::Tsv);
        assert_eq!(tsv.lines().count(), 2);
        assert!(tsv.starts_with("Time\tEvent\tBy\tKind\t"), "{tsv}");
        let json: Value = serde_json::from_str(&render(&[event()], Format::Json)).expect("JSON");
        assert_eq!(json[0]["time"], "2026-11-20T23:44:29.498Z");
        assert_eq!(Event::parse(&json[0]).map(Arc::new), Some(event()));
        let followed = one(&event(), Format::Json);
        assert_eq!(followed.lines().count(), 1);
    }

    #[test]
    fn since_is_a_time_or_how_long_ago() {
        let now = u64::try_from(Timestamp::try_from(wall_now()).expect("now").as_millisecond()).expect("after 1970");
        let ago = now - since("10m").expect("a duration");
        // It was asked for a moment after `now`.
        assert!((540_000..=600_000).contains(&ago), "{ago}");
        assert_eq!(since("2026-11-20T23:44:29Z").expect("a time"), 1_795_218_269_000);
        assert!(since("yesterday-ish").is_err());
    }
}
