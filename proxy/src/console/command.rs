//! What may be said on the console. Pure and total.

use super::show::Show;

/// Statements in one simple query. More is no operator's.
const STATEMENTS_MAX: usize = 32;

/// One statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// Nothing but space and comments.
    Empty,
    Show(Show),
    /// `SHOW` of what drivers ask every server for, and its value.
    Parameter(&'static str, &'static str),
    Help,
    /// Something that changes nothing here and is done all the same, so that drivers are content; its tag.
    Nothing(&'static str),
    Begin,
    /// COMMIT, or ROLLBACK, with its tag.
    End(&'static str),
    Reload,
    /// A command of PgBouncer's that is not here, and what to do instead.
    Instead {
        word: &'static str,
        instead: &'static str,
    },
    Unknown,
}

/// What servers are asked for by drivers, as PgBouncer's console answers it.
const PARAMETERS: [(&str, &str); 9] = [
    ("client_encoding", "UTF8"),
    ("server_encoding", "UTF8"),
    ("standard_conforming_strings", "on"),
    ("default_transaction_isolation", "read committed"),
    ("transaction_isolation", "read committed"),
    ("datestyle", "ISO"),
    ("timezone", "GMT"),
    ("extra_float_digits", "2"),
    ("transaction_read_only", "on"),
];

/// PgBouncer's commands that have no place here.
const INSTEAD: [(&str, &str); 12] = [
    (
        "pause",
        "Clients are held by themselves while nobody takes writes. To keep members from changing roles: pgherd pause.",
    ),
    ("resume", "To let members change roles again: pgherd resume."),
    ("suspend", "To replace a proxy under load: pgherd proxy --takeover."),
    (
        "shutdown",
        "Stop the service: SIGTERM lets sessions end by themselves for proxy.drain, a second one ends them at once.",
    ),
    (
        "kill",
        "End sessions where they are: SELECT pg_terminate_backend(PID), with remote_pid of SHOW SERVERS.",
    ),
    (
        "kill_client",
        "End the session where it is: SELECT pg_terminate_backend(PID), with remote_pid of SHOW SERVERS.",
    ),
    (
        "reconnect",
        "Sessions are not pooled: each ends with its client. A session of a former leader ends by itself.",
    ),
    (
        "wait_close",
        "Sessions are not pooled. SHOW POOLS tells which databases have some.",
    ),
    (
        "disable",
        "To refuse a database: ALTER DATABASE name ALLOW_CONNECTIONS false, on the leader.",
    ),
    (
        "enable",
        "To allow a database again: ALTER DATABASE name ALLOW_CONNECTIONS true, on the leader.",
    ),
    ("switchover", "On a shell: pgherd switchover."),
    ("failover", "On a shell: pgherd failover."),
];

/// The statements of one query. `Err` says how many are too many.
pub(super) fn statements(query: &str) -> Result<Vec<&str>, usize> {
    let mut found = Vec::new();
    let mut quote = None;
    let mut start = 0;
    for (at, character) in query.char_indices() {
        match (quote, character) {
            (None, '\'' | '"') => quote = Some(character),
            (Some(open), _) if open == character => quote = None,
            (None, ';') => {
                found.extend(query.get(start..at));
                start = at + 1;
            }
            _ => {}
        }
    }
    found.extend(query.get(start..));
    found.retain(|statement| read(statement) != Command::Empty);
    if found.len() > STATEMENTS_MAX {
        return Err(STATEMENTS_MAX);
    }
    Ok(found)
}

/// Reads one statement.
pub(super) fn read(statement: &str) -> Command {
    let text = without_comments(statement);
    let lower = text.to_lowercase();
    let words: Vec<&str> = lower.split_whitespace().collect();
    match words.as_slice() {
        [] => Command::Empty,
        ["show", "help"] | ["help"] => Command::Help,
        // PgBouncer takes both words.
        ["show" | "select", what] => show(what.trim_matches('"')),
        ["show", "transaction", "isolation", "level"] => Command::Parameter("transaction_isolation", "read committed"),
        ["reload"] => Command::Reload,
        ["begin", ..] | ["start", "transaction", ..] => Command::Begin,
        ["commit", ..] | ["end", ..] => Command::End("COMMIT"),
        ["rollback" | "abort", ..] => Command::End("ROLLBACK"),
        ["set", _, ..] => Command::Nothing("SET"),
        ["reset", _] => Command::Nothing("RESET"),
        ["discard", "all"] => Command::Nothing("DISCARD ALL"),
        ["deallocate", ..] => Command::Nothing("DEALLOCATE"),
        ["close", "all"] => Command::Nothing("CLOSE CURSOR ALL"),
        ["unlisten", "*"] => Command::Nothing("UNLISTEN"),
        [first, ..] => {
            let found = INSTEAD.iter().find(|(word, _)| word == first);
            found.map_or(Command::Unknown, |(word, instead)| Command::Instead { word, instead })
        }
    }
}

fn show(what: &str) -> Command {
    if let Some(show) = Show::named(what) {
        return Command::Show(show);
    }
    let found = PARAMETERS.iter().find(|(name, _)| *name == what);
    found.map_or(Command::Unknown, |(name, value)| Command::Parameter(name, value))
}

/// Drivers and scrapers mark their queries by comments.
fn without_comments(statement: &str) -> String {
    let mut kept = String::new();
    let mut rest = statement.trim().trim_end_matches(';');
    while let Some((before, after)) = rest.split_once("/*") {
        kept.push_str(before);
        kept.push(' ');
        rest = after.split_once("*/").map_or("", |(_, behind)| behind);
    }
    kept.push_str(rest);
    let lines = kept
        .lines()
        .map(|line| line.split_once("--").map_or(line, |(code, _)| code));
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in ".{0,200}") {
            let _ = statements(&text).map(|found| found.into_iter().map(read).collect::<Vec<_>>());
        }
    }

    #[test]
    fn what_pgbouncers_users_and_drivers_say_is_understood() {
        let cases = [
            ("", Command::Empty),
            (" ;\n", Command::Empty),
            ("-- ping", Command::Empty),
            ("SHOW POOLS", Command::Show(Show::Pools)),
            ("show\tpools ;", Command::Show(Show::Pools)),
            ("/* exporter */ SHOW \"stats_totals\"", Command::Show(Show::StatsTotals)),
            ("SELECT version", Command::Show(Show::Version)),
            ("show client_encoding", Command::Parameter("client_encoding", "UTF8")),
            ("SET application_name = 'x;y'", Command::Nothing("SET")),
            ("set extra_float_digits to 3", Command::Nothing("SET")),
            ("BEGIN READ ONLY", Command::Begin),
            ("ROLLBACK", Command::End("ROLLBACK")),
            ("RELOAD", Command::Reload),
            ("SHOW", Command::Unknown),
            ("SELECT 1", Command::Unknown),
            ("DROP TABLE pools", Command::Unknown),
        ];
        for (text, expected) in cases {
            assert_eq!(read(text), expected, "{text}");
        }
        let Command::Instead { word, instead } = read("PAUSE app;") else {
            panic!("PAUSE is not here");
        };
        assert!(word == "pause" && instead.contains("pgherd pause"));
    }

    #[test]
    fn a_query_of_many_statements_is_cut_outside_of_quotes_and_bounded() {
        assert_eq!(
            statements("SET a = 'x;y'; ;SHOW POOLS;"),
            Ok(vec!["SET a = 'x;y'", "SHOW POOLS"])
        );
        assert_eq!(statements(" ; "), Ok(vec![]));
        assert_eq!(statements(&"SHOW POOLS;".repeat(33)), Err(32));
    }
}
