//! `proxy.source`: where the proxy's knowledge of the cluster comes from, and what each of them needs.

use std::fs;
use std::path::PathBuf;

use pgherd_cluster::http::{AccessConfig, Endpoint};
use pgherd_cluster::record::Address;
use pgherd_cluster::tls::ServerTlsConfig;

use super::super::rest::peers;
use super::super::section::Section;
use super::super::value;
use super::one_of;

/// PostgreSQL's own port.
const POSTGRES_PORT: u16 = 5432;

/// Where the view comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SourceSection {
    /// The store itself.
    Etcd,
    /// Members' REST interfaces.
    Agents { urls: Vec<Endpoint>, access: AccessConfig },
    /// Hosts that are asked by SQL.
    Static(StaticSection),
}

/// Hosts, and as whom they are asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StaticSection {
    pub(crate) hosts: Vec<Address>,
    pub(crate) user: String,
    pub(crate) database: String,
    /// A file with the password alone.
    pub(crate) password_file: Option<PathBuf>,
    /// A file as libpq's `passfile`.
    pub(crate) passfile: Option<PathBuf>,
    /// `server_tls` and what goes with it: hosts are asked as sessions are opened.
    pub(crate) tls: ServerTlsConfig,
}

impl SourceSection {
    /// Whether etcd has to be known.
    pub(crate) fn needs_store(&self) -> bool {
        *self == Self::Etcd
    }
}

/// Reads `source` and what goes with it.
pub(super) fn read(root: &Section<'_>, section: &Section<'_>, server_tls: &ServerTlsConfig) -> Option<SourceSection> {
    let word = one_of(section, "source", &["etcd", "agents", "static"], &[]).unwrap_or("etcd");
    for (key, of) in [("urls", "agents"), ("hosts", "static"), ("probe", "static")] {
        if section.has(key) && word != of {
            section.error(
                key,
                format!("has a meaning for source: {of} only; remove it, or write source: {of}"),
            );
        }
    }
    match word {
        "agents" => {
            let urls = urls(section);
            let access = peers(root, urls.iter().flatten().any(|url| url.tls));
            Some(SourceSection::Agents { urls: urls?, access })
        }
        "static" => hosts(section, server_tls).map(SourceSection::Static),
        _ => Some(SourceSection::Etcd),
    }
}

/// The texts of a list that must have some.
fn listed(section: &Section<'_>, key: &str, fix: &str) -> Option<Vec<String>> {
    let Some(found) = section.get(key) else {
        section.missing(key, fix);
        return None;
    };
    let texts = value::texts(found).filter(|texts| !texts.is_empty());
    if texts.is_none() {
        section.unusable(key, found, "such a list", fix);
    }
    texts
}

fn urls(section: &Section<'_>) -> Option<Vec<Endpoint>> {
    let texts = listed(
        section,
        "urls",
        "[http://10.0.0.1:8008, ...], the REST interfaces of some members",
    )?;
    let read = texts.iter().map(|text| {
        let read = Endpoint::of(text).filter(|url| !url.address.host.contains(char::is_whitespace));
        if read.is_none() {
            section.error(
                "urls",
                format!("{text:?} is not a URL; write one such as http://10.0.0.1:8008"),
            );
        }
        read
    });
    let read: Vec<Option<Endpoint>> = read.collect(); // All of them, for their findings.
    read.into_iter().collect()
}

fn hosts(section: &Section<'_>, server_tls: &ServerTlsConfig) -> Option<StaticSection> {
    let texts = listed(
        section,
        "hosts",
        "[10.0.0.1:5432, ...], where members' PostgreSQL listens",
    )?;
    let read = texts.iter().map(|text| {
        let read = value::address(text, POSTGRES_PORT);
        if read.is_none() {
            section.error(
                "hosts",
                format!("{text:?} is not an address; write HOST:PORT, such as 10.0.0.1:5432"),
            );
        }
        read
    });
    let read: Vec<Option<Address>> = read.collect();
    let probe = section.section("probe");
    let (password_file, passfile) = (probe.text("password_file"), probe.text("passfile"));
    if password_file.is_some() && passfile.is_some() {
        probe.error("passfile", "there is a password_file too; remove one of them");
    }
    Some(StaticSection {
        hosts: read.into_iter().collect::<Option<_>>()?,
        user: probe.text("username").unwrap_or_else(|| "postgres".to_owned()),
        database: probe.text("database").unwrap_or_else(|| "postgres".to_owned()),
        password_file: password_file.map(PathBuf::from),
        passfile: passfile.map(PathBuf::from),
        tls: server_tls.clone(),
    })
}

impl StaticSection {
    /// The password for each host, as far as the files have one.
    ///
    /// # Errors
    /// Names the file that cannot be read.
    pub(crate) fn passwords(&self) -> Result<Vec<Option<String>>, String> {
        let read = |key: &str, path: &PathBuf| {
            let fix = "write the path of a file that this user may read";
            fs::read_to_string(path).map_err(|error| {
                format!(
                    "proxy.probe.{key}: \"{}\" cannot be read: {error}; {fix}",
                    path.display()
                )
            })
        };
        if let Some(path) = &self.password_file {
            let text = read("password_file", path)?;
            let password = text.trim_end_matches(['\r', '\n']).to_owned();
            return Ok(self.hosts.iter().map(|_| Some(password.clone())).collect());
        }
        let lines = match &self.passfile {
            Some(path) => read("passfile", path)?,
            None => String::new(),
        };
        let of = |host: &Address| password_of(&lines, host, &self.database, &self.user);
        Ok(self.hosts.iter().map(of).collect())
    }
}

/// The first line of a passfile that fits, see "The Password File" of libpq.
pub(crate) fn password_of(lines: &str, host: &Address, database: &str, user: &str) -> Option<String> {
    let wanted = [host.host.as_str(), &host.port.to_string(), database, user].map(str::to_owned);
    lines.lines().filter(|line| !line.starts_with('#')).find_map(|line| {
        let fields = fields(line);
        let (password, named) = fields.split_last()?;
        let fits = named.len() == wanted.len()
            && named
                .iter()
                .zip(&wanted)
                .all(|(named, wanted)| named == "*" || named == wanted);
        fits.then(|| password.clone())
    })
}

/// Five fields with colons between them; a backslash takes the meaning of what follows it.
fn fields(line: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut rest = line.chars();
    while let Some(c) = rest.next() {
        let count = fields.len();
        match (c, fields.last_mut()) {
            (':', _) if count < 5 => fields.push(String::new()),
            ('\\', Some(field)) => field.extend(rest.next()),
            (c, Some(field)) => field.push(c),
            (_, None) => {}
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use pgherd_cluster::tls::ServerTlsMode;

    use super::super::tests::read_from;
    use super::*;

    #[test]
    fn each_source_is_read_with_what_it_needs() {
        let of = |section: Value| {
            let (config, errors) = read_from(section);
            assert_eq!(errors, Vec::<String>::new());
            config.expect("no errors").source
        };
        assert!(of(json!({})).needs_store());
        let agents = of(json!({"source": "agents", "urls": ["http://10.0.0.1:8008", "10.0.0.2"]}));
        let SourceSection::Agents { urls, .. } = agents else {
            panic!("{agents:?}")
        };
        assert_eq!(
            urls.iter().map(Endpoint::to_string).collect::<Vec<_>>(),
            ["http://10.0.0.1:8008", "http://10.0.0.2:8008"]
        );
        let hosts = of(
            json!({"source": "static", "hosts": ["10.0.0.1", "[::1]:6432"], "probe": {"username": "u"}, "server_tls": "prefer"}),
        );
        let SourceSection::Static(section) = hosts else {
            panic!("{hosts:?}")
        };
        assert_eq!(
            section.hosts.iter().map(Address::to_string).collect::<Vec<_>>(),
            ["10.0.0.1:5432", "[::1]:6432"]
        );
        assert_eq!((section.user.as_str(), section.database.as_str()), ("u", "postgres"));
        assert_eq!(section.tls.mode, ServerTlsMode::Prefer);
    }

    #[test]
    fn mistakes_are_told_with_key_value_and_fix() {
        for (section, expected) in [
            (
                json!({"source": "agents"}),
                "proxy.urls: missing; write [http://10.0.0.1:8008, ...]",
            ),
            (
                json!({"source": "agents", "urls": ["ftp://x"]}),
                "proxy.urls: \"ftp://x\" is not a URL; write one such as http",
            ),
            (
                json!({"source": "agents", "urls": ["https://x"]}),
                "ctl.cacert: missing; write the file of the CAs",
            ),
            (
                json!({"source": "static"}),
                "proxy.hosts: missing; write [10.0.0.1:5432, ...]",
            ),
            (
                json!({"source": "static", "hosts": ["a:b"]}),
                "proxy.hosts: \"a:b\" is not an address; write HOST:PORT",
            ),
            (
                json!({"hosts": ["a:1"]}),
                "proxy.hosts: has a meaning for source: static only; remove it",
            ),
            (
                json!({"source": "static", "hosts": "a:1", "probe": {"passfile": "/a", "password_file": "/b"}}),
                "proxy.probe.passfile: there is a password_file too; remove one of them",
            ),
        ] {
            let found = read_from(section.clone()).1;
            assert!(
                found.first().is_some_and(|found| found.starts_with(expected)),
                "{section}: {found:?}"
            );
        }
    }

    #[test]
    fn a_passfile_is_read_as_libpq_reads_it() {
        let host = Address {
            host: "::1".to_owned(),
            port: 5432,
        };
        let lines = "# *:*:*:*:no\nother:5432:*:*:no\n\\:\\:1:5432:*:ann:a\\:b\\\\c\n*:*:*:*:rest\n";
        assert_eq!(password_of(lines, &host, "postgres", "ann").as_deref(), Some("a:b\\c"));
        assert_eq!(password_of(lines, &host, "postgres", "bob").as_deref(), Some("rest"));
        assert_eq!(password_of("short:line\n", &host, "postgres", "bob"), None);
    }
}
