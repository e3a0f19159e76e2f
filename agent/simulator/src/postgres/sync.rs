//! `synchronous_standby_names`: what it means, and for whom a commit waits.

/// A read setting.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum SyncNames {
    /// Nobody is waited for.
    #[default]
    Off,
    /// The first so many that are connected, in the order of the list.
    First(usize, Vec<String>),
    /// Any so many of the list.
    Any(usize, Vec<String>),
}

/// A standby as its walsender shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Confirmed<'a> {
    pub(crate) name: &'a str,
    /// How many records it has flushed.
    pub(crate) flushed: usize,
}

impl SyncNames {
    /// Reads the setting as PostgreSQL does, without its exotic forms.
    pub(crate) fn parse(text: &str) -> Self {
        let text = text.trim();
        if text.is_empty() {
            return Self::Off;
        }
        let (head, names) = match text.split_once('(') {
            Some((head, rest)) => (head.trim(), rest.trim_end_matches(')')),
            None => ("1", text),
        };
        let (any, count) = match head.split_once(char::is_whitespace) {
            Some((word, count)) => (word.eq_ignore_ascii_case("any"), count),
            None if head.eq_ignore_ascii_case("any") || head.eq_ignore_ascii_case("first") => return Self::Off,
            None => (false, head),
        };
        let names: Vec<String> = names
            .split(',')
            .map(|name| name.trim().trim_matches('"').replace("\"\"", "\""))
            .filter(|name| !name.is_empty())
            .collect();
        let count = count.trim().parse().unwrap_or(1);
        if any {
            Self::Any(count, names)
        } else {
            Self::First(count, names)
        }
    }

    fn rank(names: &[String], name: &str) -> Option<usize> {
        names
            .iter()
            .position(|listed| listed == "*" || listed.eq_ignore_ascii_case(name))
    }

    /// The word in `pg_stat_replication` for one of the connected, and its rank.
    pub(crate) fn state_of(&self, name: &str, connected: &[Confirmed<'_>]) -> (&'static str, i32) {
        let (Self::First(_, names) | Self::Any(_, names)) = self else {
            return ("async", 0);
        };
        let Some(rank) = Self::rank(names, name) else {
            return ("async", 0);
        };
        match self {
            Self::Off => ("async", 0),
            Self::Any(..) => ("quorum", 1),
            Self::First(count, _) => {
                let place = self.chosen(connected).iter().position(|chosen| chosen.name == name);
                let word = if place.is_some_and(|place| place < *count) {
                    "sync"
                } else {
                    "potential"
                };
                (word, i32::try_from(rank + 1).unwrap_or(i32::MAX))
            }
        }
    }

    /// Those of the list that are connected, by rank.
    fn chosen<'a>(&self, connected: &[Confirmed<'a>]) -> Vec<Confirmed<'a>> {
        let (Self::First(_, names) | Self::Any(_, names)) = self else {
            return Vec::new();
        };
        let mut listed: Vec<(usize, Confirmed<'a>)> = connected
            .iter()
            .filter_map(|standby| Some((Self::rank(names, standby.name)?, *standby)))
            .collect();
        listed.sort_by_key(|(rank, standby)| (*rank, standby.name));
        listed.into_iter().map(|(_, standby)| standby).collect()
    }

    /// Whether a commit whose record is the `position`th may be acknowledged.
    pub(crate) fn satisfied(&self, position: usize, connected: &[Confirmed<'_>]) -> bool {
        let chosen = self.chosen(connected);
        let has = |standby: &&Confirmed<'_>| standby.flushed > position;
        match self {
            Self::Off => true,
            Self::First(count, _) => chosen.len() >= *count && chosen.iter().take(*count).all(|standby| has(&standby)),
            Self::Any(count, _) => chosen.iter().filter(has).count() >= *count,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(names: &[&str]) -> Vec<String> {
        names.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn the_usual_forms_are_read() {
        for (text, names) in [
            ("", SyncNames::Off),
            ("n2", SyncNames::First(1, list(&["n2"]))),
            ("\"n-2\"", SyncNames::First(1, list(&["n-2"]))),
            ("2 (n2,n3)", SyncNames::First(2, list(&["n2", "n3"]))),
            ("FIRST 1 (n2, n3)", SyncNames::First(1, list(&["n2", "n3"]))),
            ("ANY 1 (\"n-2\",n3)", SyncNames::Any(1, list(&["n-2", "n3"]))),
            ("*", SyncNames::First(1, list(&["*"]))),
        ] {
            assert_eq!(SyncNames::parse(text), names, "{text}");
        }
    }

    #[test]
    fn a_commit_waits_for_the_first_or_for_any() {
        let has = |name, flushed| Confirmed { name, flushed };
        let both = [has("n2", 5), has("n3", 9)];
        let first = SyncNames::First(1, list(&["n2", "n3"]));
        assert!(first.satisfied(4, &both) && !first.satisfied(5, &both));
        assert!(
            first.satisfied(8, &both[1..]),
            "the next one takes the place of one that is gone"
        );
        let any = SyncNames::Any(1, list(&["n2", "n3"]));
        assert!(any.satisfied(8, &both) && !any.satisfied(9, &both));
        assert!(!SyncNames::First(2, list(&["n2", "n3"])).satisfied(0, &both[..1]));
        assert!(!SyncNames::parse("*").satisfied(0, &[]));
        assert!(SyncNames::Off.satisfied(99, &[]));
    }

    #[test]
    fn walsenders_say_which_part_they_have() {
        let has = |name| Confirmed { name, flushed: 1 };
        let all = [has("n2"), has("n3"), has("n4")];
        let first = SyncNames::First(1, list(&["n3", "n2"]));
        assert_eq!(first.state_of("n3", &all), ("sync", 1));
        assert_eq!(first.state_of("n2", &all), ("potential", 2));
        assert_eq!(first.state_of("n4", &all), ("async", 0));
        assert_eq!(SyncNames::Any(1, list(&["n2"])).state_of("n2", &all), ("quorum", 1));
    }
}
