//! The `proxy.console` section: the pseudo-database, and who may log in to it.

use std::path::PathBuf;

use pgherd_proxy::{ConsoleConfig, ConsoleUser, Verifier};

use super::super::section::Section;
use super::page::password;

/// `NAMEDATALEN` less its terminator: servers know no longer name.
const NAME_BYTES_MAX: usize = 63;

/// The console, and where its passwords come from, to be looked at again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConsoleSection {
    pub(crate) config: ConsoleConfig,
    pub(crate) password_files: Vec<PathBuf>,
}

pub(super) fn read(section: &Section<'_>) -> ConsoleSection {
    let database = section.text("database").unwrap_or_else(|| "pgherd".to_owned());
    if database.len() > NAME_BYTES_MAX {
        section.error(
            "database",
            format!("no name is longer than {NAME_BYTES_MAX} bytes; write a shorter one"),
        );
    }
    let (mut users, mut password_files) = (Vec::new(), Vec::new());
    for (index, element) in list(section).iter().enumerate() {
        let element = section.element("users", index, element);
        password_files.extend(element.text("password_file").map(PathBuf::from));
        users.extend(user(&element));
    }
    for (index, user) in users.iter().enumerate() {
        if users
            .iter()
            .take(index)
            .any(|earlier: &ConsoleUser| earlier.name == user.name)
        {
            section.error(
                "users",
                format!("{:?} is listed twice; give each its own name", user.name),
            );
        }
    }
    let config = ConsoleConfig {
        database,
        users,
        peers: section.boolean("peers").unwrap_or(true),
    };
    ConsoleSection { config, password_files }
}

fn list<'a>(section: &Section<'a>) -> &'a [serde_json::Value] {
    let Some(found) = section.get("users") else { return &[] };
    let Some(elements) = found.as_array() else {
        let fix = "one `- {username: NAME, password_file: FILE}` per line";
        section.unusable("users", found, "a list of users", fix);
        return &[];
    };
    elements
}

fn user(section: &Section<'_>) -> Option<ConsoleUser> {
    let name = section.required_text("username", "the name that goes with the password");
    let password = password(section);
    if !section.has("password") && !section.has("password_file") {
        section.missing("password_file", "the path of a file with the password");
    }
    let (name, password) = (name?, password?);
    match Verifier::new(&name, &password) {
        Ok(verifier) => Some(ConsoleUser {
            name,
            verifier,
            admin: section.boolean("admin").unwrap_or(false),
        }),
        Err(error) => {
            section.error(
                "password",
                format!("{error}; write it as pg_authid has it, or the password"),
            );
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::read_from;

    #[test]
    fn there_is_no_console_unless_it_is_written_down() {
        let (config, errors) = read_from(json!({}));
        assert!(errors.is_empty() && config.expect("defaults").console.is_none());
        let (config, errors) = read_from(json!({"console": {}}));
        assert_eq!(errors, Vec::<String>::new());
        let console = config.expect("no errors").console.expect("a console").config;
        assert!(console.database == "pgherd" && console.peers && console.users.is_empty());
    }

    #[test]
    fn users_come_with_passwords_from_files_and_the_same_file_is_the_same_configuration() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("password");
        std::fs::write(&file, "secret\n").expect("written");
        let section = json!({"console": {"database": "admin", "peers": false, "users": [
            {"username": "ops", "password_file": file, "admin": true},
            {"username": "scraper", "password": "SCRAM-SHA-256$4096:AAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="},
        ]}});
        let (config, errors) = read_from(section.clone());
        assert_eq!(errors, Vec::<String>::new());
        let console = config.expect("no errors").console.expect("a console");
        let names: Vec<(&str, bool)> = console
            .config
            .users
            .iter()
            .map(|user| (user.name.as_str(), user.admin))
            .collect();
        assert_eq!(names, [("ops", true), ("scraper", false)]);
        assert_eq!(console.password_files, [file]);
        assert!(!console.config.peers && !format!("{console:?}").contains("secret"));
        assert_eq!(read_from(section).0.expect("no errors").console, Some(console));
    }

    #[test]
    fn mistakes_are_told_with_key_value_and_fix() {
        for (users, expected) in [
            (
                json!("ops"),
                "proxy.console.users: \"ops\" is not a list of users; write one `- {username: NAME, password_file: FILE}` per line",
            ),
            (
                json!([{"password": "x"}]),
                "proxy.console.users[0].username: missing; write the name that goes with the password",
            ),
            (
                json!([{"username": "ops"}]),
                "proxy.console.users[0].password_file: missing; write the path of a file with the password",
            ),
            (
                json!([{"username": "ops", "password": "SCRAM-SHA-256$4096"}]),
                "proxy.console.users[0].password: it begins as a verifier of SCRAM does and is none; write it as pg_authid has it, or the password",
            ),
            (
                json!([{"username": "a", "password": "x"}, {"username": "a", "password": "y"}]),
                "proxy.console.users: \"a\" is listed twice; give each its own name",
            ),
        ] {
            let found = read_from(json!({"console": {"users": users}})).1;
            assert_eq!(found.first().map(String::as_str), Some(expected));
        }
    }
}
