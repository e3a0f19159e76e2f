//! The `restapi` section, and how other members' interfaces are reached.

use std::path::PathBuf;

use pgherd_agent::config::{Allow, RestConfig, RestTls, VerifyClient};
use pgherd_agent::rest::authorization;
use pgherd_cluster::http::AccessConfig;
use pgherd_cluster::tls::KeyFile;
use serde_json::Value;

use super::agent::credentials;
use super::section::Section;
use super::{postgresql, value};

const REST_PORT: u16 = 8008;

/// Reads the section. Every key is read before the first missing one ends it, so that all findings are told.
pub(super) fn read(root: &Section<'_>) -> Option<RestConfig> {
    let section = root.section("restapi");
    let credentials = credentials(&section.section("authentication"));
    if !section.has("listen") {
        section.missing(
            "listen",
            "the address for other members and checks, such as 10.0.0.1:8008",
        );
    }
    let tls = tls(&section);
    let allow = Allow {
        list: section.texts("allowlist").unwrap_or_default(),
        include_members: section.boolean("allowlist_include_members").unwrap_or(false),
    };
    let headers = headers(&section, tls.is_some());
    let peers = AccessConfig {
        // Requests that need it bring it along.
        authorization: None,
        ..peers(root, false)
    };
    let peers = believed(root, peers, tls.is_some());
    for key in ["request_queue_size", "thread_pool_size"] {
        section.integer(key, 1); // For its finding: connections are bounded without it.
    }
    if section.has("ciphers") {
        section.warn(
            "ciphers",
            "has no effect: TLS 1.2 and 1.3 are spoken with the suites that rustls holds for safe, and no others",
        );
    }
    let mut listen = section.address("listen", REST_PORT)?;
    let hosts = std::slice::from_ref(&listen.host);
    let connect_address = postgresql::connect_address(&section, hosts, listen.port)?;
    if listen.host == "*" {
        listen.host = "0.0.0.0".to_owned();
    }
    Some(RestConfig {
        listen,
        connect_address,
        credentials,
        tls,
        allow,
        headers,
        peers,
    })
}

fn tls(section: &Section<'_>) -> Option<RestTls> {
    let verify_client = verify_client(section);
    let client_ca = section.text("cafile").map(PathBuf::from);
    let Some(certificate) = section.text("certfile") else {
        if section.has("keyfile") {
            section.missing("certfile", "the path of the certificate that belongs to the key");
        }
        if verify_client != VerifyClient::None {
            section.missing(
                "certfile",
                "the path of our own certificate: without TLS nobody shows theirs",
            );
        }
        return None;
    };
    if verify_client != VerifyClient::None && client_ca.is_none() {
        section.missing("cafile", "the file of the CAs that clients' certificates lead to");
    }
    Some(RestTls {
        key: KeyFile {
            path: section.text("keyfile").unwrap_or_else(|| certificate.clone()).into(),
            password: section.secret("keyfile_password"),
        },
        certificate: certificate.into(),
        client_ca,
        verify_client,
    })
}

fn verify_client(section: &Section<'_>) -> VerifyClient {
    let Some(found) = section.get("verify_client") else {
        return VerifyClient::None;
    };
    match found.as_str() {
        Some("none") => VerifyClient::None,
        Some("optional") => VerifyClient::Optional,
        Some("required") => VerifyClient::Required,
        _ => {
            section.unusable("verify_client", found, "known", "none, optional or required");
            VerifyClient::None
        }
    }
}

/// `http_extra_headers`, and over them, where TLS is spoken, `https_extra_headers`.
fn headers(section: &Section<'_>, tls: bool) -> Vec<(String, String)> {
    let mut headers: Vec<(String, String)> = Vec::new();
    let keys = ["http_extra_headers", "https_extra_headers"];
    for key in keys.into_iter().take(if tls { 2 } else { 1 }) {
        for (name, value) in section.map(key) {
            let usable = value::text(&value).filter(|text| is_token(&name) && !text.contains(['\r', '\n']));
            let Some(text) = usable else {
                section.error(
                    key,
                    format!("{name:?} with this value is no header; write NAME: text, on one line"),
                );
                continue;
            };
            headers.retain(|(known, _)| !known.eq_ignore_ascii_case(&name));
            headers.push((name, text));
        }
    }
    if let Some(Value::String(word)) = section.get("server_tokens")
        && !["original", "minimal", "productonly"].contains(&word.to_ascii_lowercase().as_str())
    {
        section.error(
            "server_tokens",
            format!("{word:?} is not known; write original, minimal or productonly"),
        );
    }
    headers
}

/// Whether a text may be a header's name (RFC 9110, section 5.6.2).
fn is_token(name: &str) -> bool {
    !name.is_empty()
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

/// Files of the CAs that a system believes, by what puts them there: Debian, Red Hat, Alpine.
const SYSTEM_CAS: [&str; 3] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
];

/// Where members speak TLS and no CA is named, those of the system are believed.
fn believed(root: &Section<'_>, peers: AccessConfig, tls: bool) -> AccessConfig {
    if !tls || peers.cacert.is_some() || peers.insecure {
        return peers;
    }
    let cacert = SYSTEM_CAS.iter().map(PathBuf::from).find(|path| path.exists());
    if cacert.is_none() {
        root.section("ctl").missing(
            "cacert",
            "the file of the CAs of members' certificates, in PEM; or insecure: true to believe anybody",
        );
    }
    AccessConfig { cacert, ..peers }
}

/// How members' interfaces are reached, as patronictl reads it: what `ctl` does not say, `restapi` does. `tls`: whether some
/// of them are known to speak it.
pub(super) fn peers(root: &Section<'_>, tls: bool) -> AccessConfig {
    let (ctl, restapi) = (root.section("ctl"), root.section("restapi"));
    let path = |key: &str, other: &str| ctl.text(key).or_else(|| restapi.text(other)).map(PathBuf::from);
    let insecure = ctl.boolean("insecure").unwrap_or(false);
    let cacert = path("cacert", "cafile");
    if tls && cacert.is_none() && !insecure {
        ctl.missing(
            "cacert",
            "the file of the CAs of members' certificates, in PEM; or insecure: true to believe anybody",
        );
    }
    let certificate = path("certfile", "certfile");
    let key = path("keyfile", "keyfile");
    let password = ctl
        .secret("keyfile_password")
        .or_else(|| restapi.secret("keyfile_password"));
    // Read before anything is decided on, for its findings.
    let presented = credentials(&ctl.section("authentication"));
    let presented = presented.or_else(|| credentials(&restapi.section("authentication")));
    AccessConfig {
        cacert,
        identity: certificate.map(|certificate| {
            let path = key.unwrap_or_else(|| certificate.clone());
            (certificate, KeyFile { path, password })
        }),
        insecure,
        authorization: authorization(presented.as_ref()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::section::Findings;

    fn read_from(restapi: &Value, ctl: &Value) -> (Option<RestConfig>, Vec<String>) {
        let tree = json!({"restapi": restapi, "ctl": ctl});
        let findings = Findings::default();
        let config = read(&Section::root(tree.as_object().expect("a map"), &findings));
        (config, findings.errors())
    }

    #[test]
    fn tls_headers_and_who_may_change_things_are_read() {
        let (config, errors) = read_from(
            &json!({
                "listen": "10.0.0.1:8008", "certfile": "/own.pem", "keyfile_password": "hunter2", "cafile": "/ca.pem", "verify_client": "optional",
                "allowlist": "10.0.0.0/8,admin", "allowlist_include_members": true,
                "http_extra_headers": {"X-Frame-Options": "DENY"}, "https_extra_headers": {"x-frame-options": "SAMEORIGIN"},
            }),
            &json!({}),
        );
        assert_eq!(errors, Vec::<String>::new());
        let config = config.expect("no errors");
        let tls = config.tls.clone().expect("TLS");
        assert_eq!(
            (&tls.key.path, tls.verify_client),
            (&PathBuf::from("/own.pem"), VerifyClient::Optional)
        );
        assert_eq!(tls.key.password.as_deref(), Some("hunter2"));
        assert!(!format!("{config:?}").contains("hunter2"), "{config:?}");
        assert_eq!(config.allow.list, ["10.0.0.0/8", "admin"]);
        assert_eq!(
            config.headers,
            [("x-frame-options".to_owned(), "SAMEORIGIN".to_owned())]
        );
        assert_eq!(
            config.peers.cacert,
            Some(PathBuf::from("/ca.pem")),
            "what ctl does not say, restapi does"
        );
    }

    #[test]
    fn mistakes_are_told_with_key_value_and_fix() {
        for (section, expected) in [
            (
                json!({"keyfile": "/k"}),
                "restapi.certfile: missing; write the path of the certificate that belongs to the key",
            ),
            (
                json!({"verify_client": "always"}),
                "restapi.verify_client: \"always\" is not known; write none, optional or required",
            ),
            (
                json!({"verify_client": "required", "certfile": "/c"}),
                "restapi.cafile: missing; write the file of the CAs that clients' certificates lead to",
            ),
            (
                json!({"http_extra_headers": {"a b": "x"}}),
                "restapi.http_extra_headers: \"a b\" with this value is no header; write NAME: text, on one line",
            ),
            (
                json!({"request_queue_size": 0}),
                "restapi.request_queue_size: 0 is not such a number; write a whole number from 1 up",
            ),
        ] {
            let mut section = section;
            section["listen"] = json!("10.0.0.1:8008");
            assert_eq!(read_from(&section, &json!({"insecure": true})).1, [expected]);
        }
    }
}
