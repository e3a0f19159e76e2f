//! `proxy.stats.username` and the password: who may see the page.

use std::path::PathBuf;

use pgherd_agent::config::Credentials;
use pgherd_agent::rest::authorization;
use pgherd_proxy::tls::ClientTlsConfig;
use pgherd_proxy::{CompatMetrics, PageLogin};

use super::super::section::Section;
use super::tls;

/// Who may see the page.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PageSection {
    /// Everybody when absent.
    pub(crate) login: Option<PageLogin>,
    /// Where the password comes from, to be looked at again.
    pub(crate) password_file: Option<PathBuf>,
    /// Whose names metrics have beside ours.
    pub(crate) compat_metrics: CompatMetrics,
    /// What it shows by TLS; plain HTTP when absent.
    pub(crate) tls: Option<ClientTlsConfig>,
}

pub(super) fn read(section: &Section<'_>) -> PageSection {
    let username = section.text("username");
    let (password, file) = (password(section), section.text("password_file"));
    let has_password = section.has("password") || section.has("password_file");
    if username.is_none() && has_password {
        section.missing("username", "the name that goes with the password");
    }
    if username.is_some() && !has_password {
        section.missing("password_file", "the path of a file with the password");
    }
    let credentials = username.zip(password).map(|(username, password)| Credentials {
        username,
        password: Some(password),
    });
    PageSection {
        login: authorization(credentials.as_ref()).map(PageLogin::new),
        password_file: file.map(PathBuf::from),
        compat_metrics: compat_metrics(section),
        tls: tls::clients(section),
    }
}

fn compat_metrics(section: &Section<'_>) -> CompatMetrics {
    let mut compat = CompatMetrics::default();
    for word in section.texts("compat_metrics").unwrap_or_default() {
        match word.as_str() {
            "haproxy" => compat.haproxy = true,
            "pgbouncer" => compat.pgbouncer = true,
            other => section.error(
                "compat_metrics",
                format!("{other:?} is not known here; write haproxy or pgbouncer"),
            ),
        }
    }
    compat
}

/// A password that is written down, or lies in a file.
pub(super) fn password(section: &Section<'_>) -> Option<String> {
    match (section.secret("password"), section.text("password_file")) {
        (Some(_), Some(_)) => {
            section.error("password", "there is a password_file too; remove one of them");
            None
        }
        (written, None) => written,
        (None, Some(path)) => from_file(section, &path),
    }
}

/// The first line of a file.
fn from_file(section: &Section<'_>, path: &str) -> Option<String> {
    match std::fs::read_to_string(path) {
        Ok(text) => {
            let password = text.lines().next().unwrap_or_default().to_owned();
            if password.is_empty() {
                section.error(
                    "password_file",
                    format!("{path:?} is empty; write the password into it"),
                );
            }
            Some(password)
        }
        Err(error) => {
            section.error(
                "password_file",
                format!("{path:?} cannot be read: {error}; write the path of a file that this user may read"),
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
    fn a_page_is_guarded_by_a_name_and_a_password_from_a_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("password");
        std::fs::write(&file, "secret\n").expect("written");
        let (config, errors) = read_from(json!({"stats": {"username": "admin", "password_file": file}}));
        assert_eq!(errors, Vec::<String>::new());
        let page = config.expect("no errors").page;
        assert!(page.login.expect("a login").lets_in(Some(b"Basic YWRtaW46c2VjcmV0")));
        assert_eq!(page.password_file, Some(file.clone()));
        std::fs::write(&file, "\n").expect("written");
        for (stats, expected) in [
            (json!({"username": "admin"}), "proxy.stats.password_file: missing"),
            (
                json!({"username": "admin", "password_file": file}),
                "is empty; write the password into it",
            ),
            (
                json!({"compat_metrics": ["haproxy", "pgbouncer", "odyssey"]}),
                "proxy.stats.compat_metrics: \"odyssey\" is not known here; write haproxy or pgbouncer",
            ),
            (
                json!({"username": "admin", "password_file": "/nowhere"}),
                "cannot be read",
            ),
            (
                json!({"username": "admin", "password": "x", "password_file": file}),
                "proxy.stats.password: there is a password_file too",
            ),
        ] {
            let found = read_from(json!({ "stats": stats })).1;
            assert!(found.first().is_some_and(|found| found.contains(expected)), "{found:?}");
        }
    }
}
