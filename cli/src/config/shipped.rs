//! What lies in `docker/` for others to load: alert rules and a dashboard. They are read as their programs read them, and
//! every metric that they name is one that proxies or agents tell.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::yaml;

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn text_of(path: &str) -> String {
    let path = repository().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every name that a metric is registered or written under.
fn told() -> BTreeSet<String> {
    let sources = [
        "proxy/src/stats/metrics.rs",
        "proxy/src/stats/metrics/compat.rs",
        "agent/src/rest/metrics.rs",
        "agent/src/rest/metrics/events.rs",
    ];
    let mut names = BTreeSet::new();
    for source in sources {
        let text = text_of(source);
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        // Names are written out in full wherever one is registered.
        names.extend(code.split('"').filter(|text| is_metric(text)).map(str::to_owned));
    }
    names
}

fn is_metric(word: &str) -> bool {
    let prefixed = ["pgherd_", "patroni_", "haproxy_", "pgbouncer_"]
        .iter()
        .any(|prefix| word.starts_with(prefix));
    prefixed
        && word
            .chars()
            .all(|character| character.is_ascii_lowercase() || character == '_')
}

/// The metrics in an expression, without what is behind a histogram's name.
fn named_in(expression: &str) -> BTreeSet<String> {
    let words = expression.split(|character: char| !(character.is_ascii_alphanumeric() || character == '_'));
    let bare = |word: &str| {
        let known = told();
        let parts = ["_bucket", "_sum", "_count"]
            .iter()
            .filter_map(|part| word.strip_suffix(part));
        let histogram = parts.map(str::to_owned).find(|name| known.contains(name));
        histogram.unwrap_or_else(|| word.to_owned())
    };
    words.filter(|word| is_metric(word)).map(bare).collect()
}

fn assert_told(expression: &str, place: &str) {
    let (named, known) = (named_in(expression), told());
    assert!(!named.is_empty(), "{place} names no metric of ours: {expression}");
    for name in &named {
        assert!(known.contains(name), "{place} rests on {name}, which nobody tells");
    }
    let (open, closed) = (
        expression.matches(['(', '[', '{']).count(),
        expression.matches([')', ']', '}']).count(),
    );
    assert_eq!(open, closed, "{place}: {expression}");
}

#[test]
fn alert_rules_load_and_rest_on_metrics_that_there_are() {
    let file = "docker/prometheus/alerts.yml";
    let rules = yaml::parse(&text_of(file)).expect("YAML");
    let groups = rules["groups"].as_array().expect("groups");
    let mut names = BTreeSet::new();
    for rule in groups
        .iter()
        .flat_map(|group| group["rules"].as_array().expect("rules"))
    {
        let name = rule["alert"].as_str().expect("a name");
        assert!(names.insert(name.to_owned()), "{name} is there twice");
        assert_told(rule["expr"].as_str().expect("an expression"), name);
        assert!(
            matches!(rule["labels"]["severity"].as_str(), Some("critical" | "warning")),
            "{name}"
        );
        for text in ["summary", "description"] {
            assert!(
                rule["annotations"][text].as_str().is_some_and(|text| !text.is_empty()),
                "{name}: {text}"
            );
        }
        let keys = rule.as_object().expect("a rule").keys();
        for key in keys {
            assert!(
                matches!(key.as_str(), "alert" | "expr" | "for" | "labels" | "annotations"),
                "{name}: {key}"
            );
        }
        if let Some(duration) = rule.get("for") {
            let duration = duration.as_str().expect("a duration");
            let digits = duration.trim_end_matches(|character: char| character.is_ascii_lowercase());
            assert!(
                digits.parse::<u32>().is_ok() && digits.len() + 1 == duration.len(),
                "{name}: {duration}"
            );
        }
    }
    assert!(names.len() >= 12, "{names:?}");
    // Where Prometheus is installed it has the last word.
    match Command::new("promtool")
        .args(["check", "rules"])
        .arg(repository().join(file))
        .output()
    {
        Ok(checked) => assert!(checked.status.success(), "{checked:?}"),
        Err(_) => println!("promtool is not here: the rules were only read"),
    }
}

#[test]
fn the_dashboard_loads_and_shows_metrics_that_there_are() {
    let board: Value = serde_json::from_str(&text_of("docker/grafana/pgherd.json")).expect("JSON");
    assert!(board["title"].is_string() && board["uid"] == "pgherd" && board["schemaVersion"].is_u64());
    let panels = board["panels"].as_array().expect("panels");
    let mut ids = BTreeSet::new();
    for panel in panels {
        let title = panel["title"].as_str().expect("a title");
        assert!(
            ids.insert(panel["id"].as_u64().expect("an id")),
            "{title} has the id of another"
        );
        let place = &panel["gridPos"];
        let end = place["x"].as_u64().zip(place["w"].as_u64()).map(|(x, width)| x + width);
        assert!(end.is_some_and(|end| end <= 24), "{title} is beyond the grid");
        let targets = panel["targets"].as_array().expect("targets");
        assert!(!targets.is_empty(), "{title}");
        for target in targets {
            assert_told(target["expr"].as_str().expect("an expression"), title);
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{title}");
        }
    }
    assert_told(
        board["annotations"]["list"][0]["expr"].as_str().expect("an expression"),
        "the annotations",
    );
}

#[test]
fn a_name_that_nobody_tells_is_found() {
    assert!(told().contains("pgherd_startup_seconds") && told().contains("patroni_postgres_running"));
    assert_eq!(
        named_in("rate(pgherd_startup_seconds_bucket[5m]) / pgherd_nothing_count"),
        ["pgherd_nothing_count", "pgherd_startup_seconds"]
            .map(str::to_owned)
            .into()
    );
    assert!(std::panic::catch_unwind(|| assert_told("sum(pgherd_nothing)", "a rule")).is_err());
}
