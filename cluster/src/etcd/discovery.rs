//! etcd's endpoints by DNS, as Patroni finds them: the first of six services that has hosts.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use tokio::time::timeout;

use super::{EtcdTls, StoreError};
use crate::http::{AccessConfig, Ask, Endpoint, ask_at};
use crate::resolve::srv::{RESOLV_CONF, servers, services};

/// The services in Patroni's order. Those of peers are no endpoints: their hosts are asked for their members' endpoints.
const SERVICES: [&str; 6] = ["-client-ssl", "-client", "-ssl", "", "-server-ssl", "-server"];
/// How long one peer may take to tell the members.
const PEER_MAX: Duration = Duration::from_secs(1);
/// How long a lookup may take while endpoints of before are known.
const AGAIN_MAX: Duration = Duration::from_millis(300);

/// Where etcd's endpoints are looked up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Discovery {
    /// The domain.
    pub domain: String,
    /// What the services' names end with, when several clusters share the domain.
    pub suffix: Option<String>,
}

impl Discovery {
    /// The endpoints as they are now; those of before when nothing can be learnt in a moment.
    pub(super) async fn find(&self, known: Vec<String>, tls: &EtcdTls) -> Result<Vec<String>, StoreError> {
        let unreachable = |what: String| StoreError::Unreachable {
            what: format!("looking up etcd in DNS: {what}"),
        };
        let asked = async {
            let servers = servers(Path::new(RESOLV_CONF)).await;
            self.ask(&servers.map_err(|error| format!("{RESOLV_CONF}: {error}"))?, tls)
                .await
        };
        if known.is_empty() {
            return asked.await.map_err(unreachable);
        }
        match timeout(AGAIN_MAX, asked).await {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(what)) => {
                tracing::debug!("looking up etcd in DNS: {what}");
                Ok(known)
            }
            Err(_) => Ok(known),
        }
    }

    async fn ask(&self, servers: &[SocketAddr], tls: &EtcdTls) -> Result<Vec<String>, String> {
        let suffix = self
            .suffix
            .as_ref()
            .map_or_else(String::new, |suffix| format!("-{suffix}"));
        for service in SERVICES {
            let name = format!("_etcd{service}{suffix}._tcp.{}", self.domain);
            let found = services(&name, servers)
                .await
                .map_err(|error| format!("{name}: {error}"))?;
            let by_tls = service.ends_with("-ssl");
            let peers = service.starts_with("-server");
            let mut endpoints = Vec::new();
            for host in found {
                let endpoint = Endpoint {
                    address: host.address,
                    tls: by_tls,
                };
                if peers {
                    endpoints = members(&endpoint, tls).await;
                } else {
                    endpoints.push(endpoint.to_string());
                }
                if peers && !endpoints.is_empty() {
                    break;
                }
            }
            if !endpoints.is_empty() {
                return Ok(endpoints);
            }
        }
        Err(format!("no host of etcd's is known under {}", self.domain))
    }
}

/// The endpoints that a peer tells of. It is not made sure whose word that is; but from one behind TLS only such endpoints
/// count, and their certificates are looked at when they are connected to.
async fn members(peer: &Endpoint, tls: &EtcdTls) -> Vec<String> {
    let access = AccessConfig {
        identity: tls.cert.clone().zip(tls.key.clone().map(Into::into)),
        insecure: true,
        ..AccessConfig::default()
    };
    let Ok(access) = access.load() else { return Vec::new() };
    let answer = ask_at(peer, Ask::get("/members"), PEER_MAX, &access).await;
    let list = answer
        .ok()
        .filter(|answer| answer.status < 400)
        .and_then(|answer| answer.json());
    let urls = list.iter().filter_map(Value::as_array).flatten();
    let urls = urls.filter_map(|member| member.get("clientURLs")?.as_array()).flatten();
    urls.filter_map(Value::as_str)
        .filter(|url| url.starts_with("https://") || !peer.tls && url.starts_with("http://"))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::task::JoinSet;

    use super::*;
    use crate::resolve::srv::tests::{NameServer, Zone};

    fn at(domain: &str, suffix: Option<&str>) -> Discovery {
        Discovery {
            domain: domain.to_owned(),
            suffix: suffix.map(str::to_owned),
        }
    }

    #[tokio::test]
    async fn the_first_service_that_has_hosts_counts_and_says_whether_by_tls() {
        let host = |name: &str| vec![(1, 1, 2379, name.to_owned())];
        let zone = Zone::from([
            ("_etcd-client._tcp.plain.example".to_owned(), host("plain")),
            ("_etcd-server._tcp.plain.example".to_owned(), host("peer")),
            ("_etcd-client-ssl._tcp.both.example".to_owned(), host("safe")),
            ("_etcd-client._tcp.both.example".to_owned(), host("plain")),
            ("_etcd-client-two._tcp.both.example".to_owned(), host("second")),
        ]);
        let server = NameServer::start(zone, usize::MAX).await;
        for (discovery, expected) in [
            (at("plain.example", None), Ok("http://plain:2379")),
            (at("both.example", None), Ok("https://safe:2379")),
            (at("both.example", Some("two")), Ok("http://second:2379")),
            (
                at("none.example", None),
                Err("no host of etcd's is known under none.example"),
            ),
        ] {
            let found = discovery.ask(&[server.address], &EtcdTls::default()).await;
            let expected = expected.map(|one| vec![one.to_owned()]).map_err(str::to_owned);
            assert_eq!(found, expected);
        }
    }

    #[tokio::test]
    async fn peers_are_asked_for_the_endpoints_of_their_members() {
        let peer = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port");
        let port = peer.local_addr().expect("an address").port();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            while let Ok((mut client, _)) = peer.accept().await {
                let mut request = vec![0; 4096];
                let read = client.read(&mut request).await.expect("a request");
                assert!(request[..read].starts_with(b"GET /members "));
                let body = r#"[{"id":1,"peerURLs":["http://x:2380"],"clientURLs":["http://a:2379"]},{"clientURLs":["http://b:1"]}]"#;
                let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
                client.write_all(format!("{head}{body}").as_bytes()).await.expect("sent");
            }
        });
        let host = vec![(1, 1, port, "127.0.0.1".to_owned())];
        let zone = Zone::from([("_etcd-server._tcp.x.example".to_owned(), host)]);
        let server = NameServer::start(zone, usize::MAX).await;
        let found = at("x.example", None).ask(&[server.address], &EtcdTls::default()).await;
        assert_eq!(found, Ok(vec!["http://a:2379".to_owned(), "http://b:1".to_owned()]));
    }
}
