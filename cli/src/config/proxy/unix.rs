//! Listeners on unix sockets. Their addresses are read as libpq reads `host` and `port`: a directory and a port, or the
//! file that the two stand for. `@` stands for names without a file.

use pgherd_cluster::record::Address;
use pgherd_proxy::SOCKET_MODE;
use pgherd_proxy::tls::ListenerTls;
use serde_json::Value;

use super::super::section::Section;
use super::{Listener, WRITE_PORT};

/// The longest name of a socket that Linux has room for.
const NAME_BYTES_MAX: usize = 107;
const FILE: &str = "/.s.PGSQL.";

/// Whether an address is one of a unix socket.
pub(crate) fn is_unix(address: &Address) -> bool {
    address.host.starts_with(['/', '@'])
}

/// A listener's address as the proxy is told it: for a unix socket the file's whole name.
pub(crate) fn name(address: &Address) -> String {
    if is_unix(address) {
        format!("{}{FILE}{}", address.host.trim_end_matches('/'), address.port)
    } else {
        address.to_string()
    }
}

/// The address of a listener, of either kind.
pub(super) fn address(section: &Section<'_>) -> Option<Address> {
    match section.get("address").and_then(Value::as_str) {
        Some(text) if text.starts_with(['/', '@']) => socket(section, text),
        _ => section.address("address", WRITE_PORT).map(super::bindable),
    }
}

fn socket(section: &Section<'_>, text: &str) -> Option<Address> {
    let read = parse(text);
    match &read {
        None => section.error(
            "address",
            format!(
                "{text:?} is not a unix socket; write a directory and a port, such as /run/pgherd:5432, which clients \
                 reach by host=/run/pgherd port=5432"
            ),
        ),
        Some(address) if name(address).len() > NAME_BYTES_MAX => section.error(
            "address",
            format!(
                "{text:?} is {:?} on disk, {} bytes long; sockets' names have at most {NAME_BYTES_MAX}: write a shorter one",
                name(address),
                name(address).len()
            ),
        ),
        Some(_) => {}
    }
    read
}

fn parse(text: &str) -> Option<Address> {
    let port = |digits: &str| digits.parse().ok().filter(|port| *port > 0);
    let (dir, port) = match (text.rsplit_once(FILE), text.rsplit_once(':')) {
        (Some((dir, digits)), _) => (dir, port(digits)?),
        (None, Some((dir, digits))) => (dir, port(digits)?),
        (None, None) => (text, WRITE_PORT),
    };
    let trimmed = dir.trim_end_matches('/');
    // `/.s.PGSQL.5432` lies in the root.
    let host = if trimmed.is_empty() && text.starts_with('/') {
        "/"
    } else {
        trimmed
    };
    (!matches!(host, "" | "@")).then(|| Address {
        host: host.to_owned(),
        port,
    })
}

/// Who may connect, as in chmod(1).
pub(super) fn mode(section: &Section<'_>) -> u32 {
    let Some(found) = section.get("mode") else {
        return SOCKET_MODE;
    };
    // A number would be read in one base here and in another one there.
    let read = found.as_str().and_then(|digits| u32::from_str_radix(digits, 8).ok());
    read.filter(|mode| *mode <= 0o777).unwrap_or_else(|| {
        section.unusable("mode", found, "such a mode", "octal digits in quotes, such as \"0770\"");
        SOCKET_MODE
    })
}

/// Reports what a listener has and its kind of socket does not know.
pub(super) fn check(section: &Section<'_>, listener: &Listener) {
    let without_meaning = |key: &str, why: &str| section.error(key, format!("{why}; remove it here"));
    if !is_unix(&listener.address) {
        if section.has("mode") {
            without_meaning("mode", "has a meaning for unix sockets only");
        }
        return;
    }
    for key in ["allow", "proxy_protocol"].into_iter().filter(|key| section.has(key)) {
        without_meaning(
            key,
            "clients on a unix socket have no address; the socket's mode and its directory say who may connect",
        );
    }
    if listener.tls != ListenerTls::Off {
        without_meaning("tls", "there is no TLS on unix sockets, as in PostgreSQL");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::read_from;
    use super::*;

    #[test]
    fn a_socket_is_named_as_libpq_names_it() {
        for (text, host, port, file) in [
            ("/run/pgherd", "/run/pgherd", 5432, "/run/pgherd/.s.PGSQL.5432"),
            ("/run/pgherd/:6432", "/run/pgherd", 6432, "/run/pgherd/.s.PGSQL.6432"),
            (
                "/run/pgherd/.s.PGSQL.6432",
                "/run/pgherd",
                6432,
                "/run/pgherd/.s.PGSQL.6432",
            ),
            ("/.s.PGSQL.5432", "/", 5432, "/.s.PGSQL.5432"),
            ("@pgherd:6432", "@pgherd", 6432, "@pgherd/.s.PGSQL.6432"),
        ] {
            let address = parse(text).expect(text);
            assert_eq!((address.host.as_str(), address.port), (host, port), "{text}");
            assert_eq!(name(&address), file, "{text}");
        }
        for text in ["@", "/run:x", "/run/.s.PGSQL.0", "@:5432"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn mistakes_are_told_with_key_value_and_fix() {
        let listener = |mut more: Value| {
            more["role"] = json!("write");
            read_from(json!({"listeners": [more]}))
        };
        let (config, errors) = listener(json!({"address": "/run/pgherd", "mode": "0660"}));
        assert_eq!(errors, Vec::<String>::new());
        assert_eq!(config.expect("no errors").listeners[0].mode, 0o660);
        for (section, expected) in [
            (
                json!({"address": "/run/pgherd:http"}),
                "proxy.listeners[0].address: \"/run/pgherd:http\" is not a unix socket; write a directory and a port",
            ),
            (
                json!({"address": format!("/{}", "x".repeat(100))}),
                "proxy.listeners[0].address: \"/xxx",
            ),
            (
                json!({"address": "/run/pgherd", "mode": 660}),
                "proxy.listeners[0].mode: 660 is not such a mode; write octal digits in quotes, such as \"0770\"",
            ),
            (
                json!({"address": "a:1", "mode": "0660"}),
                "proxy.listeners[0].mode: has a meaning for unix sockets only; remove it here",
            ),
            (
                json!({"address": "/run/pgherd", "allow": ["10.0.0.0/8"]}),
                "proxy.listeners[0].allow: clients on a unix socket have no address",
            ),
            (
                json!({"address": "/run/pgherd", "tls": "passthrough"}),
                "proxy.listeners[0].tls: there is no TLS on unix sockets, as in PostgreSQL; remove it here",
            ),
        ] {
            let found = listener(section.clone()).1;
            assert!(
                found.first().is_some_and(|found| found.starts_with(expected)),
                "{section}: {found:?}"
            );
        }
    }
}
