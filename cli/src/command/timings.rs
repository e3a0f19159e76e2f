//! `pgherd history --timings`: each change of the leader with its phases, as those who took part have measured them.

use pgherd_cluster::event::{LeadChange, lead_changes};
use serde_json::{Map, Value, json};

use super::events::{read, say_none, utc};
use super::output::{Rows, spaced_json};
use super::site::Site;
use super::yaml_text;
use crate::args::Format;
use crate::failure::Failure;
use crate::terminal::print;

/// How wide the picture of the phases is.
const WIDTH: u64 = 40;

/// Prints the changes that are known, oldest first.
///
/// # Errors
/// When neither etcd nor a member answers.
pub(super) async fn run(site: &Site, format: Format, url: Option<&str>) -> Result<(), Failure> {
    let (_, events) = read(site, url).await?;
    let changes = lead_changes(events.iter());
    if changes.is_empty() && format == Format::Pretty {
        say_none("change of the leader");
        return Ok(());
    }
    print(&render(&changes, format));
    Ok(())
}

fn render(changes: &[LeadChange], format: Format) -> String {
    let documents = || Value::Array(changes.iter().map(document).collect());
    match format {
        Format::Pretty => changes.iter().map(waterfall).collect::<Vec<_>>().join("\n"),
        Format::Tsv => rows(changes).render(format, "\t"),
        Format::Json => format!("{}\n", spaced_json(&documents())),
        Format::Yaml => format!("{}\n", yaml_text::document(&documents())),
    }
}

/// A phase, when it began after the first, and how long it lasted; the last has no end.
struct Bar<'a> {
    name: &'a str,
    by: &'a str,
    at_ms: u64,
    offset_ms: u64,
    lasted_ms: Option<u64>,
}

fn bars(change: &LeadChange) -> Vec<Bar<'_>> {
    let began = change.steps.first().map_or(0, |step| step.at_ms);
    let nexts = change.steps.iter().skip(1).map(|step| Some(step.at_ms)).chain([None]);
    change
        .steps
        .iter()
        .zip(nexts)
        .map(|(step, next)| Bar {
            name: &step.name,
            by: &step.by,
            at_ms: step.at_ms,
            offset_ms: step.at_ms.saturating_sub(began),
            lasted_ms: next.map(|next| next.saturating_sub(step.at_ms)),
        })
        .collect()
}

fn seconds(millis: u64) -> String {
    format!("{}.{:03}", millis / 1000, millis % 1000)
}

fn title(change: &LeadChange) -> String {
    let began = change.steps.first().map_or(0, |step| step.at_ms);
    let holding = |holding: &Option<String>| holding.clone().unwrap_or_else(|| "nobody".to_owned());
    let mut title = format!("{}  {} -> {}", utc(began), holding(&change.from), holding(&change.to));
    if let Some(cause) = &change.cause {
        title.push_str(&format!(": {cause}"));
    }
    if let Some(actor) = &change.actor {
        title.push_str(&format!(", asked by {actor}"));
    }
    title
}

fn waterfall(change: &LeadChange) -> String {
    let bars = bars(change);
    let whole = bars.last().map_or(0, |last| last.offset_ms).max(1);
    let name_width = bars.iter().map(|bar| bar.name.chars().count()).max().unwrap_or(0);
    let by_width = bars.iter().map(|bar| bar.by.chars().count()).max().unwrap_or(0);
    let mut text = title(change) + "\n";
    for bar in &bars {
        let lasted = bar
            .lasted_ms
            .map_or_else(String::new, |lasted| format!("{} s", seconds(lasted)));
        let column = |millis: u64| usize::try_from(millis * WIDTH / whole).unwrap_or_default();
        let begin = column(bar.offset_ms);
        let end = column(bar.offset_ms + bar.lasted_ms.unwrap_or_default());
        let drawn = format!("{}{}", " ".repeat(begin), "#".repeat((end - begin).max(1)));
        let line = format!(
            "  +{:>8} s  {:<name_width$}  {:<by_width$}  {lasted:>10}  {drawn}",
            seconds(bar.offset_ms),
            bar.name,
            bar.by
        );
        text.push_str(line.trim_end());
        text.push('\n');
    }
    match change.stall() {
        Some((begin, end)) => text.push_str(&format!("  writes stood still for {} s\n", seconds(end - begin))),
        None => text.push_str("  how long writes stood still is not known\n"),
    }
    text
}

fn document(change: &LeadChange) -> Value {
    let phase = |bar: Bar<'_>| {
        json!({
            "phase": bar.name, "by": bar.by, "time": utc(bar.at_ms), "at_ms": bar.at_ms,
            "offset_ms": bar.offset_ms, "lasted_ms": bar.lasted_ms,
        })
    };
    let mut map = Map::new();
    let fields = [
        ("from", json!(change.from)),
        ("to", json!(change.to)),
        ("cause", json!(change.cause)),
        ("actor", json!(change.actor)),
        ("stall_ms", json!(change.stall().map(|(begin, end)| end - begin))),
        ("phases", bars(change).into_iter().map(phase).collect::<Vec<_>>().into()),
        (
            "events",
            change
                .events
                .iter()
                .map(|event| event.id.as_str())
                .collect::<Vec<_>>()
                .into(),
        ),
    ];
    for (name, value) in fields {
        map.insert(name.to_owned(), value);
    }
    Value::Object(map)
}

/// A row for each phase.
fn rows(changes: &[LeadChange]) -> Rows {
    let headings = ["From", "To", "Time", "Phase", "By", "Offset ms", "Lasted ms"];
    let text = |text: &Option<String>| Value::from(text.clone().unwrap_or_default());
    let rows = changes.iter().flat_map(|change| {
        bars(change).into_iter().map(move |bar| {
            vec![
                text(&change.from),
                text(&change.to),
                utc(bar.at_ms).into(),
                bar.name.into(),
                bar.by.into(),
                bar.offset_ms.into(),
                json!(bar.lasted_ms),
            ]
        })
    });
    Rows {
        headings: headings.map(str::to_owned).to_vec(),
        right: Vec::new(),
        rows: rows.collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use pgherd_cluster::event::{Event, EventId, Kind, Phase, phase};

    use super::*;

    fn change() -> Vec<LeadChange> {
        let phase = |name: &str, at_ms| Phase {
            name: name.to_owned(),
            at_ms,
        };
        let start = 1_795_218_269_000;
        let event = Event {
            from: Some("n1@33".to_owned()),
            to: Some("n2@40".to_owned()),
            cause: Some("the lease of n1 ended".to_owned()),
            phases: vec![
                phase(phase::LAST_COMMIT, start),
                phase(phase::LEASE_FREE, start + 500),
                phase(phase::BID_WON, start + 600),
                phase(phase::WRITABLE, start + 1000),
            ],
            ..Event::new(EventId::new(start, "n2"), start, "n2", Kind::Leader, "n2 takes writes")
        };
        lead_changes(&[Arc::new(event)])
    }

    #[test]
    fn a_change_is_drawn_as_a_waterfall() {
        let expected = "\
2026-11-20T23:44:29.000Z  n1@33 -> n2@40: the lease of n1 ended
  +   0.000 s  last_commit  n2     0.500 s  ####################
  +   0.500 s  lease_free   n2     0.100 s                      ####
  +   0.600 s  bid_won      n2     0.400 s                          ################
  +   1.000 s  writable     n2                                                      #
  writes stood still for 1.000 s
";
        assert_eq!(render(&change(), Format::Pretty), expected);
    }

    #[test]
    fn programs_get_the_same_numbers() {
        let json: Value = serde_json::from_str(&render(&change(), Format::Json)).expect("JSON");
        assert_eq!(json[0]["stall_ms"], 1000);
        assert_eq!(json[0]["phases"][1]["lasted_ms"], 100);
        assert_eq!(json[0]["phases"][3]["lasted_ms"], Value::Null);
        assert_eq!(render(&change(), Format::Tsv).lines().count(), 5);
    }
}
