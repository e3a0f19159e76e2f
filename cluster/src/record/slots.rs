//! The replication slots that the dynamic configuration speaks of: those that every member keeps, and those that nobody
//! touches. Patroni's keys and rules.

use std::collections::BTreeMap;

use serde_json::Value;

use super::DynamicConfig;

/// The key's names; a later one wins, as with Patroni.
const KEYS: [&str; 3] = ["slots", "permanent_slots", "permanent_replication_slots"];
/// PostgreSQL's own limit, `NAMEDATALEN` less one.
const NAME_BYTES_MAX: usize = 63;

/// A slot that is kept on every member that may lead.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PermanentSlot {
    /// For a program or a cluster that streams.
    Physical,
    /// For a consumer of decoded changes.
    Logical {
        /// The database that it decodes.
        database: String,
        /// Its output plugin.
        plugin: String,
    },
}

/// The permanent slots, and what cannot be one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PermanentSlots {
    /// By name.
    pub slots: BTreeMap<String, PermanentSlot>,
    /// Sentences about entries that are passed over, with key, value and fix.
    pub refused: Vec<String>,
}

/// What a slot must be to be left alone: every attribute that is given must be the slot's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IgnoredSlot {
    /// Its name.
    pub name: Option<String>,
    /// `physical` or `logical`.
    pub kind: Option<String>,
    /// A logical slot's database.
    pub database: Option<String>,
    /// A logical slot's output plugin.
    pub plugin: Option<String>,
}

/// What becomes of a candidate that lacks logical slots which PostgreSQL should have copied to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FailoverSlots {
    /// It may lead, and its log says what it lacks.
    #[default]
    Warn,
    /// It may not lead.
    Require,
}

impl DynamicConfig {
    /// The permanent slots of this cluster, as far as their `cluster_type` is its own.
    #[must_use]
    pub fn permanent_slots(&self) -> PermanentSlots {
        let mut found = PermanentSlots::default();
        let key = KEYS.iter().rev().find(|key| self.document().contains_key(**key));
        let Some((key, Value::Object(entries))) = key.and_then(|key| Some((key, self.document().get(*key)?))) else {
            return found;
        };
        let own_type = if self.is_standby_cluster() {
            "standby"
        } else {
            "primary"
        };
        for (name, value) in entries {
            let told = |what: &str| format!("{key}.{name}: {what}");
            if !is_slot_name(name) {
                let rule = "is not a slot's name; use lower-case letters, digits and underscores, at most 63";
                found.refused.push(told(rule));
                continue;
            }
            let text = |field: &str| value.get(field).and_then(Value::as_str).map(str::to_owned);
            if text("cluster_type").is_some_and(|wanted| wanted != own_type) {
                continue;
            }
            let (database, plugin) = (text("database"), text("plugin"));
            let both = database.is_some() && plugin.is_some();
            let kind = text("type").unwrap_or_else(|| if both { "logical" } else { "physical" }.to_owned());
            let usual = value.is_object() || is_empty(value);
            match (kind.as_str(), database, plugin) {
                ("physical", ..) if usual => {
                    found.slots.insert(name.clone(), PermanentSlot::Physical);
                }
                ("logical", Some(database), Some(plugin)) => {
                    let slot = PermanentSlot::Logical { database, plugin };
                    found.slots.insert(name.clone(), slot);
                }
                ("logical", ..) => found
                    .refused
                    .push(told("a logical slot needs database and plugin; add both")),
                _ => {
                    let what = format!("{value} is not a slot; write a type of physical or logical");
                    found.refused.push(told(&what));
                }
            }
        }
        found
    }

    /// The slots that are left alone, whatever else is said.
    #[must_use]
    pub fn ignored_slots(&self) -> Vec<IgnoredSlot> {
        let Some(Value::Array(entries)) = self.document().get("ignore_slots") else {
            return Vec::new();
        };
        let entry = |entry: &Value| {
            let text = |field: &str| entry.get(field).and_then(Value::as_str).map(str::to_owned);
            entry.is_object().then(|| IgnoredSlot {
                name: text("name"),
                kind: text("type"),
                database: text("database"),
                plugin: text("plugin"),
            })
        };
        entries.iter().filter_map(entry).collect()
    }

    /// Whether members have slots at all: `postgresql.use_slots`, on unless switched off.
    #[must_use]
    pub fn use_slots(&self) -> bool {
        let set = self
            .document()
            .get("postgresql")
            .and_then(|section| section.get("use_slots"));
        match set {
            Some(Value::Bool(set)) => *set,
            Some(Value::Number(number)) => number.as_f64() != Some(0.0),
            Some(Value::String(text)) => !matches!(text.to_lowercase().as_str(), "off" | "false" | "no" | "0"),
            _ => true,
        }
    }

    /// What becomes of a candidate without the failover slots: `pgherd.failover_slots`, `warn` or `require`.
    #[must_use]
    pub fn failover_slots(&self) -> FailoverSlots {
        let set = self
            .document()
            .get("pgherd")
            .and_then(|ours| ours.get("failover_slots"));
        match set.and_then(Value::as_str) {
            Some("require") => FailoverSlots::Require,
            _ => FailoverSlots::Warn,
        }
    }
}

impl IgnoredSlot {
    /// Whether a slot is meant.
    #[must_use]
    pub fn means(&self, name: &str, kind: &str, database: Option<&str>, plugin: Option<&str>) -> bool {
        let is = |given: &Option<String>, has: Option<&str>| given.as_deref().is_none_or(|given| has == Some(given));
        is(&self.name, Some(name))
            && is(&self.kind, Some(kind))
            && is(&self.database, database)
            && is(&self.plugin, plugin)
    }
}

fn is_slot_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.chars().all(plain)
}

/// What YAML and JSON write for nothing: such an entry is a physical slot.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::Array(items) => items.is_empty(),
        Value::Bool(true) | Value::Object(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(document: &Value) -> DynamicConfig {
        DynamicConfig::new(document.as_object().cloned().unwrap_or_default())
    }

    #[test]
    fn permanent_slots_are_read_as_patroni_reads_them() {
        let slots = json!({
            "plain": null, "empty": {}, "typed": {"type": "physical"},
            "decoded": {"database": "app", "plugin": "pgoutput"},
            "elsewhere": {"type": "physical", "cluster_type": "standby"},
            "Upper": null, "half": {"type": "logical", "database": "app"}, "odd": 7,
        });
        let found = config(&json!({ "slots": slots })).permanent_slots();
        assert_eq!(
            found.slots.keys().map(String::as_str).collect::<Vec<_>>(),
            ["decoded", "empty", "plain", "typed"]
        );
        let (database, plugin) = ("app".to_owned(), "pgoutput".to_owned());
        assert_eq!(
            found.slots.get("decoded"),
            Some(&PermanentSlot::Logical { database, plugin })
        );
        assert_eq!(
            found.refused,
            [
                "slots.Upper: is not a slot's name; use lower-case letters, digits and underscores, at most 63",
                "slots.half: a logical slot needs database and plugin; add both",
                "slots.odd: 7 is not a slot; write a type of physical or logical",
            ]
        );
    }

    #[test]
    fn the_longer_name_of_the_key_wins_and_a_standby_cluster_has_its_own() {
        let both = json!({"slots": {"a": null}, "permanent_slots": {"b": null}});
        assert!(config(&both).permanent_slots().slots.keys().eq(["b"]));
        let standby = json!({
            "standby_cluster": {"host": "x"},
            "slots": {"here": {"cluster_type": "standby"}, "there": {"cluster_type": "primary"}, "both": null},
        });
        assert!(config(&standby).permanent_slots().slots.keys().eq(["both", "here"]));
    }

    #[test]
    fn a_slot_is_ignored_when_all_that_is_given_is_its_own() {
        let document = json!({"ignore_slots": [{"name": "a", "type": "logical"}, {"plugin": "p"}, "odd"]});
        let ignored = config(&document).ignored_slots();
        let means = |name: &str, kind: &str, plugin| ignored.iter().any(|one| one.means(name, kind, Some("d"), plugin));
        assert!(means("a", "logical", None));
        assert!(!means("a", "physical", None));
        assert!(means("x", "logical", Some("p")));
        assert!(!means("x", "logical", Some("q")));
    }

    #[test]
    fn a_candidate_without_failover_slots_is_refused_only_where_that_is_set() {
        assert_eq!(config(&json!({})).failover_slots(), FailoverSlots::Warn);
        let set = json!({"pgherd": {"failover_slots": "require"}});
        assert_eq!(config(&set).failover_slots(), FailoverSlots::Require);
    }
}
