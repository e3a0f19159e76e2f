//! Texts and scalars into what they mean: durations, sizes, addresses, lists. Pure.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use pgherd_cluster::record::Address;
use serde_json::Value;

/// Yes or no, in all of YAML 1.1's and PostgreSQL's words.
pub(crate) fn boolean(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(set) => Some(*set),
        Value::Number(number) => match number.as_i64() {
            Some(0) => Some(false),
            Some(1) => Some(true),
            _ => None,
        },
        Value::String(text) => match text.trim().to_ascii_lowercase().as_str() {
            "on" | "true" | "yes" | "1" => Some(true),
            "off" | "false" | "no" | "0" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// A whole number, as a number or as a text.
pub(crate) fn integer(value: &Value) -> Option<i64> {
    match value {
        Value::Number(number) => number.as_i64(),
        Value::String(text) => text.trim().parse().ok(),
        _ => None,
    }
}

/// A text; numbers are taken as they would be written.
pub(crate) fn text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// `10s`, `500ms`, `2min`; a bare number is in seconds.
pub(crate) fn duration(value: &Value) -> Option<Duration> {
    let (number, unit) = number_and_unit(value)?;
    let micros: u64 = match unit.as_str() {
        "us" => 1,
        "ms" => 1_000,
        "s" | "" => 1_000_000,
        "min" | "m" => 60_000_000,
        "h" => 3_600_000_000,
        "d" => 86_400_000_000,
        _ => return None,
    };
    Some(Duration::from_micros(number.checked_mul(micros)?))
}

/// `16MB`, in steps of 1024 as PostgreSQL counts; a bare number is in bytes.
pub(crate) fn size(value: &Value) -> Option<u64> {
    let (number, unit) = number_and_unit(value)?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "b" | "" => 0,
        "kb" => 10,
        "mb" => 20,
        "gb" => 30,
        "tb" => 40,
        _ => return None,
    };
    number.checked_mul(1 << shift)
}

fn number_and_unit(value: &Value) -> Option<(u64, String)> {
    let text = match value {
        Value::Number(number) => return Some((number.as_u64()?, String::new())),
        Value::String(text) => text.trim(),
        _ => return None,
    };
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    Some((number.parse().ok()?, unit.trim().to_owned()))
}

/// A list of texts: a YAML list, or one text with commas, whose parts may be quoted or the whole be in brackets, as
/// Patroni reads environment variables.
pub(crate) fn texts(value: &Value) -> Option<Vec<String>> {
    match value {
        Value::Array(items) => items.iter().map(text).collect(),
        Value::String(joined) => {
            let inner = joined.trim();
            let inner = inner
                .strip_prefix('[')
                .and_then(|inner| inner.strip_suffix(']'))
                .unwrap_or(inner);
            let parts = inner
                .split(',')
                .map(|part| part.trim().trim_matches(['\'', '"']).to_owned());
            Some(parts.filter(|part| !part.is_empty()).collect())
        }
        _ => None,
    }
}

/// `addr[,addr...]:port`, as PostgreSQL's listen is written: the last colon parts the port, addresses may be `*`, names, or
/// IPv6 with or without brackets.
pub(crate) fn listen(text: &str, port_default: u16) -> Option<(Vec<String>, u16)> {
    let text = text.trim();
    let (hosts, port) = if text.parse::<Ipv6Addr>().is_ok() || text.ends_with(']') {
        (text, port_default)
    } else {
        match text.rsplit_once(':') {
            // A port alone stands for every interface, as images write it.
            Some((hosts, port)) => (
                if hosts.is_empty() { "*" } else { hosts },
                port.parse().ok().filter(|port| *port > 0)?,
            ),
            None => (text, port_default),
        }
    };
    let hosts: Vec<String> = hosts
        .split(',')
        .map(|host| host.trim().trim_start_matches('[').trim_end_matches(']').to_owned())
        .collect();
    let plausible = |host: &String| {
        !host.is_empty()
            && !host.contains(char::is_whitespace)
            && (!host.contains(':') || host.parse::<Ipv6Addr>().is_ok())
    };
    hosts.iter().all(plausible).then_some((hosts, port))
}

/// A single `host:port`.
pub(crate) fn address(text: &str, port_default: u16) -> Option<Address> {
    let (mut hosts, port) = listen(text, port_default)?;
    (hosts.len() == 1)
        .then(|| hosts.pop())
        .flatten()
        .map(|host| Address { host, port })
}

/// Whether `host` means every interface, so that nobody could connect to it by that name.
pub(crate) fn is_wildcard(host: &str) -> bool {
    host == "*" || host.parse::<IpAddr>().is_ok_and(|address| address.is_unspecified())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn durations_and_sizes_know_their_units() {
        for (value, expected) in [
            (json!("10s"), Some(10_000)),
            (json!("500ms"), Some(500)),
            (json!("2 min"), Some(120_000)),
            (json!(3), Some(3_000)),
            (json!("3"), Some(3_000)),
            (json!("1d"), Some(86_400_000)),
            (json!("10 parsecs"), None),
            (json!("s"), None),
            (json!(-1), None),
            (json!(u64::MAX), None),
            (json!(true), None),
        ] {
            assert_eq!(
                duration(&value).map(|duration| duration.as_millis()),
                expected,
                "{value}"
            );
        }
        for (value, expected) in [
            (json!("16MB"), Some(16 << 20)),
            (json!("16 mb"), Some(16 << 20)),
            (json!(1024), Some(1024)),
            (json!("1TB"), Some(1 << 40)),
            (json!("16MiB"), None),
            (json!("99999999999TB"), None),
        ] {
            assert_eq!(size(&value), expected, "{value}");
        }
    }

    #[test]
    fn listen_takes_what_postgresql_takes() {
        let hosts =
            |hosts: &[&str], port| Some((hosts.iter().map(|host| (*host).to_owned()).collect::<Vec<_>>(), port));
        for (text, expected) in [
            ("*:5432", hosts(&["*"], 5432)),
            ("127.0.0.1,10.0.0.1:5433", hosts(&["127.0.0.1", "10.0.0.1"], 5433)),
            ("[::1]:5432", hosts(&["::1"], 5432)),
            ("127.0.0.1,[::1]:5432", hosts(&["127.0.0.1", "::1"], 5432)),
            ("::1", hosts(&["::1"], 5000)),
            ("[::1]", hosts(&["::1"], 5000)),
            (":::5432", hosts(&["::"], 5432)),
            ("db.example.com", hosts(&["db.example.com"], 5000)),
            ("db:54x2", None),
            ("db:0", None),
            ("db:70000", None),
            (":5432", hosts(&["*"], 5432)),
            ("", None),
            ("a b:1", None),
            ("a:b:1", None),
        ] {
            assert_eq!(listen(text, 5000), expected, "{text}");
        }
        assert_eq!(address("a,b:1", 1), None);
        assert!(is_wildcard("*") && is_wildcard("0.0.0.0") && is_wildcard("::") && !is_wildcard("10.0.0.1"));
    }

    #[test]
    fn lists_come_as_lists_or_with_commas() {
        let expected = Some(vec!["a:1".to_owned(), "b:2".to_owned()]);
        for value in [
            json!(["a:1", "b:2"]),
            json!("a:1,b:2"),
            json!("'a:1', \"b:2\""),
            json!("[a:1, b:2,]"),
        ] {
            assert_eq!(texts(&value), expected, "{value}");
        }
        assert_eq!(texts(&json!({"a": 1})), None);
    }
}
