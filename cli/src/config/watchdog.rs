//! The `watchdog` section.

use std::path::{Path, PathBuf};

use pgherd_agent::config::{SafetyMargin, WatchdogConfig};
use pgherd_agent::keeper::{WatchdogDriver, WatchdogMode};
use serde_json::Value;

use super::section::{Section, shown};
use super::value;

/// Asks for half of the ttl.
const HALF: i64 = -1;

/// Reads the section. What cannot be used is a finding, and has its default here.
pub(crate) fn read(section: &Section<'_>) -> WatchdogConfig {
    let default = WatchdogConfig::default();
    WatchdogConfig {
        mode: mode(section).unwrap_or(default.mode),
        driver: driver(section).unwrap_or(default.driver),
        device: device(section).unwrap_or(default.device),
        safety_margin: safety_margin(section).unwrap_or(default.safety_margin),
    }
}

/// YAML may have read `off` as a no.
fn mode(section: &Section<'_>) -> Option<WatchdogMode> {
    let found = section.get("mode")?;
    let word = match found {
        Value::Bool(false) => Some("off".to_owned()),
        found => found.as_str().map(str::to_ascii_lowercase),
    };
    match word.as_deref() {
        Some("off" | "disable" | "disabled") => Some(WatchdogMode::Off),
        Some("auto" | "automatic") => Some(WatchdogMode::Automatic),
        Some("require" | "required") => Some(WatchdogMode::Required),
        _ => {
            section.unusable("mode", found, "a mode", "off, automatic or required");
            None
        }
    }
}

fn driver(section: &Section<'_>) -> Option<WatchdogDriver> {
    let found = section.get("driver")?;
    match found.as_str() {
        Some("default" | "linux") => Some(WatchdogDriver::Linux),
        Some("testing") => Some(WatchdogDriver::Testing),
        _ => {
            section.unusable("driver", found, "a driver", "default, or remove the key");
            None
        }
    }
}

fn device(section: &Section<'_>) -> Option<PathBuf> {
    let device = section.text("device")?;
    if !Path::new(&device).is_absolute() {
        section.error(
            "device",
            format!("{device:?} is not an absolute path; write one such as /dev/watchdog"),
        );
        return None;
    }
    Some(PathBuf::from(device))
}

fn safety_margin(section: &Section<'_>) -> Option<SafetyMargin> {
    let found = section.get("safety_margin")?;
    if value::integer(found) == Some(HALF) {
        return Some(SafetyMargin::Half);
    }
    let margin = value::duration(found);
    if margin.is_none() {
        section.error(
            "safety_margin",
            format!(
                "{} is not a duration; write one such as 5 (seconds), or -1 for half of the ttl",
                shown(found)
            ),
        );
    }
    margin.map(SafetyMargin::Is)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::config::section::Findings;

    fn read_from(watchdog: &Value) -> (WatchdogConfig, Vec<String>) {
        let findings = Findings::default();
        let tree = json!({ "watchdog": watchdog });
        let root = Section::root(tree.as_object().expect("a map"), &findings);
        let config = read(&root.section("watchdog"));
        (config, findings.errors())
    }

    #[test]
    fn nothing_means_patronis_defaults() {
        let (config, errors) = read_from(&json!(null));
        assert_eq!((config, errors), (WatchdogConfig::default(), vec![]));
        assert_eq!(WatchdogConfig::default().device, Path::new("/dev/watchdog"));
        assert_eq!(WatchdogConfig::default().mode, WatchdogMode::Automatic);
    }

    #[test]
    fn patronis_words_are_understood() {
        for (word, mode) in [
            (json!("off"), WatchdogMode::Off),
            (json!(false), WatchdogMode::Off),
            (json!("disabled"), WatchdogMode::Off),
            (json!("Auto"), WatchdogMode::Automatic),
            (json!("required"), WatchdogMode::Required),
        ] {
            let (config, errors) = read_from(&json!({ "mode": word }));
            assert_eq!((config.mode, errors), (mode, vec![]), "{word}");
        }
        for (margin, expected) in [
            (json!(-1), SafetyMargin::Half),
            (json!("-1"), SafetyMargin::Half),
            (json!(7), SafetyMargin::Is(Duration::from_secs(7))),
            (json!("500ms"), SafetyMargin::Is(Duration::from_millis(500))),
        ] {
            let (config, errors) = read_from(&json!({ "safety_margin": margin }));
            assert_eq!((config.safety_margin, errors), (expected, vec![]), "{margin}");
        }
        let (config, errors) = read_from(&json!({"driver": "testing", "device": "/tmp/fifo"}));
        assert_eq!((config.driver, errors), (WatchdogDriver::Testing, vec![]));
        assert_eq!(config.device, Path::new("/tmp/fifo"));
    }

    #[test]
    fn each_mistake_is_told_with_key_value_and_fix() {
        for (key, found, expected) in [
            (
                "mode",
                json!("on"),
                "watchdog.mode: \"on\" is not a mode; write off, automatic or required",
            ),
            (
                "mode",
                json!(true),
                "watchdog.mode: true is not a mode; write off, automatic or required",
            ),
            (
                "driver",
                json!("ipmi"),
                "watchdog.driver: \"ipmi\" is not a driver; write default, or remove the key",
            ),
            (
                "device",
                json!("watchdog"),
                "watchdog.device: \"watchdog\" is not an absolute path; write one such as /dev/watchdog",
            ),
            (
                "safety_margin",
                json!(-2),
                "watchdog.safety_margin: -2 is not a duration; write one such as 5 (seconds), or -1 for half of the ttl",
            ),
        ] {
            assert_eq!(read_from(&json!({ key: found })).1, [expected], "{key}");
        }
    }
}
