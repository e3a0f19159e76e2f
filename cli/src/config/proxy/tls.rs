//! The proxy's keys for TLS.

use std::path::PathBuf;

use pgherd_proxy::tls::{ClientCertificates, ClientTlsConfig, ListenerTls, MinVersion, ServerTlsConfig, ServerTlsMode};

use pgherd_proxy::{OnChange, ReadRules};

use super::super::section::Section;
use super::{Listener, one_of};

pub(super) fn of_listener(section: &Section<'_>) -> ListenerTls {
    match one_of(section, "tls", &["off", "allow", "require", "passthrough"], &[]) {
        Some("allow") => ListenerTls::Allow,
        Some("require") => ListenerTls::Require,
        Some("passthrough") => ListenerTls::Passthrough,
        _ => ListenerTls::Off,
    }
}

/// What cannot be kept to where TLS is the server's: the proxy does not see where a transaction ends there.
pub(super) fn check_passthrough(section: &Section<'_>, tls: ListenerTls, reads: &ReadRules) {
    if tls != ListenerTls::Passthrough {
        return;
    }
    for (key, set, fix) in [
        ("rebalance", reads.rebalance_after.is_some(), "remove it"),
        ("on_stale", reads.on_stale == OnChange::EndWhenIdle, "write end or keep"),
        (
            "on_promoted",
            reads.on_promoted == Some(OnChange::EndWhenIdle),
            "write end or keep",
        ),
    ] {
        if set {
            section.error(
                key,
                format!(
                    "with tls: passthrough the proxy does not see where a transaction ends; {fix}, or let TLS end here (tls: \
                     allow or require)"
                ),
            );
        }
    }
}

fn path(section: &Section<'_>, key: &str) -> Option<PathBuf> {
    section.text(key).map(PathBuf::from)
}

/// `proxy.tls`.
pub(super) fn clients(proxy: &Section<'_>) -> Option<ClientTlsConfig> {
    if !proxy.has("tls") {
        return None;
    }
    let section = proxy.section("tls");
    for (key, fix) in [
        ("certificate", "the file of the proxy's certificate, in PEM"),
        ("private_key", "the file of its key, in PEM"),
    ] {
        if !section.has(key) {
            section.missing(key, fix);
        }
    }
    let client_ca = path(&section, "client_ca");
    let words = ["ignored", "optional", "required"];
    let client_certificates = match one_of(&section, "client_certificate", &words, &[]) {
        Some("required") => ClientCertificates::Required,
        Some("optional") => ClientCertificates::Optional,
        Some(_) => ClientCertificates::Ignored,
        // A CA that is given is given for something.
        None if client_ca.is_some() => ClientCertificates::Optional,
        None => ClientCertificates::Ignored,
    };
    if client_certificates != ClientCertificates::Ignored && client_ca.is_none() {
        section.missing("client_ca", "the file of the CAs that clients' certificates lead to");
    }
    let map_users = section.boolean("map_users").unwrap_or_default();
    if map_users && client_certificates == ClientCertificates::Ignored {
        section.error(
            "map_users",
            "no client is asked for a certificate; write client_certificate: required, or remove this",
        );
    }
    let min_version = match one_of(&section, "min_version", &["1.2", "1.3"], &[]) {
        Some("1.3") => MinVersion::Tls13,
        _ => MinVersion::Tls12,
    };
    Some(ClientTlsConfig {
        certificate: path(&section, "certificate")?,
        private_key: path(&section, "private_key")?,
        client_ca,
        client_certificates,
        map_users,
        min_version,
    })
}

/// `proxy.server_tls` and what goes with it.
pub(super) fn servers(proxy: &Section<'_>) -> ServerTlsConfig {
    let words = ["disable", "prefer", "require", "verify-ca", "verify-full"];
    let mode = match one_of(proxy, "server_tls", &words, &[]) {
        Some("prefer") => ServerTlsMode::Prefer,
        Some("require") => ServerTlsMode::Require,
        Some("verify-ca") => ServerTlsMode::VerifyCa,
        Some("verify-full") => ServerTlsMode::VerifyFull,
        _ => ServerTlsMode::Disable,
    };
    let ca = path(proxy, "server_ca");
    if mode >= ServerTlsMode::VerifyCa && ca.is_none() {
        proxy.missing("server_ca", "the file of the CAs that members' certificates lead to");
    }
    let identity = match (path(proxy, "server_certificate"), path(proxy, "server_key")) {
        (Some(certificate), Some(key)) => Some((certificate, key.into())),
        (None, None) => None,
        (Some(_), None) => {
            proxy.missing("server_key", "the file of the key of server_certificate");
            None
        }
        (None, Some(_)) => {
            proxy.missing("server_certificate", "the file of the certificate of server_key");
            None
        }
    };
    ServerTlsConfig { mode, ca, identity }
}

/// What cannot work together.
pub(super) fn check_listeners(
    proxy: &Section<'_>,
    listeners: &[Listener],
    clients: &Option<ClientTlsConfig>,
    servers: &ServerTlsConfig,
) {
    let ends_tls = |listener: &&Listener| matches!(listener.tls, ListenerTls::Allow | ListenerTls::Require);
    let Some(listener) = listeners.iter().find(ends_tls) else {
        return;
    };
    if clients.is_none() && !proxy.has("tls") {
        proxy.missing(
            "tls",
            &format!(
                "{{certificate: FILE, private_key: FILE}}: the listener {} ends TLS and needs something to show",
                listener.address
            ),
        );
    }
    let by_certificate = clients
        .as_ref()
        .filter(|clients| clients.map_users || clients.client_certificates == ClientCertificates::Required);
    let without = listeners.iter().find(|listener| listener.tls == ListenerTls::Allow);
    if let (Some(_), Some(listener)) = (by_certificate, without) {
        proxy.section("tls").error(
            "client_certificate",
            format!(
                "the listener {} lets clients in without TLS, and so without a certificate; write tls: require there, or \
                 client_certificate: optional and no map_users here",
                listener.address
            ),
        );
    }
    if servers.mode >= ServerTlsMode::Require {
        proxy.error(
            "server_tls",
            format!(
                "{} together with a listener that ends TLS ({}) lets nobody log in by SCRAM: the client binds its \
                 password exchange to the proxy's certificate, and the member to its own. Write tls: passthrough on the \
                 listener, or server_tls: prefer or disable, or tls: off on the listener",
                servers.mode.as_str(),
                listener.address
            ),
        );
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::read_from;

    #[test]
    fn what_cannot_work_together_is_told_with_the_ways_out() {
        for (section, expected) in [
            (
                json!({
                    "listeners": [{"address": "a:1", "role": "write", "tls": "allow"}],
                    "tls": {"certificate": "c", "private_key": "k"},
                    "server_tls": "require",
                }),
                "proxy.server_tls: require together with a listener that ends TLS (a:1) lets nobody log in by SCRAM: the client binds its password exchange to the proxy's certificate, and the member to its own. Write tls: passthrough on the listener, or server_tls: prefer or disable, or tls: off on the listener",
            ),
            (
                json!({
                    "listeners": [{"address": "a:1", "role": "write", "tls": "allow"}],
                    "tls": {"certificate": "c", "private_key": "k", "client_ca": "a", "client_certificate": "required"},
                }),
                "proxy.tls.client_certificate: the listener a:1 lets clients in without TLS, and so without a certificate; write tls: require there, or client_certificate: optional and no map_users here",
            ),
            (
                json!({"listeners": [{"address": "a:1", "role": "read", "tls": "passthrough", "rebalance": true}]}),
                "proxy.listeners[0].rebalance: with tls: passthrough the proxy does not see where a transaction ends; remove it, or let TLS end here (tls: allow or require)",
            ),
            (
                json!({"listeners": [{"address": "a:1", "role": "read", "tls": "passthrough", "on_stale": "end_when_idle"}]}),
                "proxy.listeners[0].on_stale: with tls: passthrough the proxy does not see where a transaction ends; write end or keep, or let TLS end here (tls: allow or require)",
            ),
            (
                json!({"server_tls": "verify-full"}),
                "proxy.server_ca: missing; write the file of the CAs that members' certificates lead to",
            ),
            (
                json!({"tls": {"certificate": "c", "private_key": "k", "map_users": true}}),
                "proxy.tls.map_users: no client is asked for a certificate; write client_certificate: required, or remove this",
            ),
            (
                json!({"tls": {"private_key": "k"}}),
                "proxy.tls.certificate: missing; write the file of the proxy's certificate, in PEM",
            ),
            (
                json!({"server_tls": "prefer", "server_certificate": "c"}),
                "proxy.server_key: missing; write the file of the key of server_certificate",
            ),
            (
                json!({"tls": {"certificate": "c", "private_key": "k", "client_certificate": "required"}}),
                "proxy.tls.client_ca: missing; write the file of the CAs that clients' certificates lead to",
            ),
        ] {
            let found = read_from(section.clone()).1;
            assert_eq!(found.first().map(String::as_str), Some(expected), "{section}");
        }
    }
}
