//! What is looked at on this machine before any port is bound: each finding names a key, what is wrong and what to do.

pub(crate) mod data_dir;
pub(crate) mod port;
pub(crate) mod programs;

use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::Path;

use pgherd_agent::config::AgentConfig;
use pgherd_agent::rest::Doors;
use pgherd_cluster::etcd::EtcdTls;
use pgherd_cluster::record::Address;
use rustix::process::geteuid;

use self::port::{Holder, Taken};
use self::programs::Search;
use crate::config::proxy::{ProxySection, unix};

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Preflight {
    /// Must be mended before a start.
    pub(crate) errors: Vec<String>,
    /// In use by a PostgreSQL or pgherd that may well be the one that the configuration is for.
    pub(crate) in_use: Vec<String>,
}

/// Looks at what a member needs, and fills in where PostgreSQL's programs are.
pub(crate) fn member(config: &mut AgentConfig) -> Preflight {
    let mut preflight = Preflight::default();
    let uid = Some(geteuid().as_raw()).filter(|uid| *uid != 0);
    match programs::find(&Search {
        bin_dir: config.postgresql.bin_dir.as_deref(),
        path: std::env::var_os("PATH").as_deref(),
        root: Path::new("/"),
    }) {
        Ok(bin_dir) => config.postgresql.bin_dir = Some(bin_dir),
        Err(missing) => preflight.errors.push(missing.finding),
    }
    preflight
        .errors
        .extend(data_dir::check(&config.postgresql.data_dir, uid));
    preflight.errors.extend(tls_files(&config.etcd.tls));
    if let Err(error) = Doors::new(&config.restapi) {
        preflight.errors.push(format!(
            "restapi: its TLS cannot be set up: {error}; write files in PEM that this user may read and that belong together"
        ));
    }
    preflight.port("restapi.listen", &config.restapi.listen, None);
    // A PostgreSQL that runs in our own data directory is taken over, not in the way.
    let own_postmaster = postmaster_pid(&config.postgresql.data_dir);
    for host in &config.postgresql.listen_addresses {
        let address = Address {
            host: host.clone(),
            port: config.postgresql.port,
        };
        preflight.port("postgresql.listen", &address, own_postmaster);
    }
    preflight
}

/// Looks at what a proxy needs.
pub(crate) fn proxy(config: &ProxySection, tls: &EtcdTls) -> Preflight {
    proxy_with(config, tls, &[], &[])
}

/// The same for one that has sockets on some `ports` and unix sockets of some `names` already.
pub(crate) fn proxy_with(config: &ProxySection, tls: &EtcdTls, ports: &[SocketAddr], names: &[String]) -> Preflight {
    let mut preflight = Preflight::default();
    preflight.errors.extend(tls_files(tls));
    let has = |address: &Address| {
        if unix::is_unix(address) {
            names.contains(&unix::name(address))
        } else {
            ports.iter().any(|port| port.port() == address.port)
        }
    };
    for (index, listener) in config.listeners.iter().enumerate() {
        if !has(&listener.address) {
            preflight.port(&format!("proxy.listeners[{index}].address"), &listener.address, None);
        }
    }
    if !has(&config.stats) {
        preflight.port("proxy.stats.address", &config.stats, None);
    }
    preflight
}

/// Looks at what a proxy needs that runs by `before` and is to run by `config`: its ports are its own already.
pub(crate) fn proxy_again(config: &ProxySection, before: &ProxySection, tls: &EtcdTls) -> Preflight {
    let mut preflight = Preflight::default();
    preflight.errors.extend(tls_files(tls));
    let is_ours = |address: &Address| before.listeners.iter().any(|listener| listener.address == *address);
    for (index, listener) in config.listeners.iter().enumerate() {
        if !is_ours(&listener.address) {
            preflight.port(&format!("proxy.listeners[{index}].address"), &listener.address, None);
        }
    }
    if config.stats != before.stats {
        preflight.port("proxy.stats.address", &config.stats, None);
    }
    preflight
}

/// PostgreSQL refuses to run as root, and so must whoever starts it.
pub(crate) fn refuse_root(command: &str) -> Option<String> {
    geteuid().is_root().then(|| {
        // The very command that was typed, so that what is said can be pasted.
        let arguments = std::env::args().skip(2).collect::<Vec<_>>().join(" ");
        let typed = format!("runuser -u postgres -- pgherd {command} {arguments}");
        format!(
            "PostgreSQL refuses to run as root; start pgherd as its user: {}",
            typed.trim_end()
        )
    })
}

/// Where PostgreSQL goes when the proxy takes its port.
const BEHIND: u16 = 5434;

/// The ports that a member and a proxy on one host both want.
pub(crate) fn clashes(agent: &AgentConfig, proxy: &ProxySection) -> Vec<String> {
    let postgresql = agent.postgresql.listen_addresses.iter().map(|host| {
        (
            "postgresql.listen",
            Address {
                host: host.clone(),
                port: agent.postgresql.port,
            },
        )
    });
    let members: Vec<_> = postgresql
        .chain([("restapi.listen", agent.restapi.listen.clone())])
        .collect();
    let ports = proxy.listeners.iter().map(|listener| &listener.address);
    let ports: Vec<String> = ports
        .chain([&proxy.stats])
        .map(|address| address.port.to_string())
        .collect();
    let listeners = proxy.listeners.iter().enumerate();
    let listeners = listeners.map(|(index, listener)| (format!("proxy.listeners[{index}].address"), &listener.address));
    let wanted = listeners.chain([("proxy.stats.address".to_owned(), &proxy.stats)]);
    wanted
        .filter_map(|(key, address)| {
            let (other, _) = members.iter().find(|(_, other)| overlap(other, address))?;
            let keeps = format!("{key}: \"{address}\" is {other}'s port too; the proxy stands in front, so let {other} have another, such as");
            if *other != "postgresql.listen" {
                return Some(format!("{keeps} 8009"));
            }
            // All of it, since the file is most likely a patroni.yml that knows of no proxy.
            let (hosts, own) = (agent.postgresql.listen_addresses.join(","), &agent.postgresql.connect_address.host);
            Some(format!(
                "{keeps} {BEHIND}: write postgresql.listen: '{hosts}:{BEHIND}' and postgresql.connect_address: '{own}:{BEHIND}'; \
                 clients keep their port, and this host has PostgreSQL on {BEHIND}, REST on {}, the proxy on {}",
                agent.restapi.listen.port,
                ports.join(", ")
            ))
        })
        .collect()
}

fn overlap(a: &Address, b: &Address) -> bool {
    let everywhere = |host: &str| host == "*" || host == "0.0.0.0" || host == "::";
    let alike = unix::is_unix(a) == unix::is_unix(b);
    alike && a.port == b.port && (a.host == b.host || everywhere(&a.host) || everywhere(&b.host))
}

impl Preflight {
    fn port(&mut self, key: &str, address: &Address, allowed: Option<u32>) {
        if unix::is_unix(address) {
            let name = unix::name(address);
            if let Err(error) = pgherd_proxy::probe_unix(&name) {
                let finding = format!("{key}: \"{name}\" cannot be listened on: {error}; mend that, or write another");
                match error.kind() {
                    ErrorKind::AddrInUse => self.in_use.push(finding),
                    _ => self.errors.push(finding),
                }
            }
            return;
        }
        let Err(taken) = port::probe(address) else { return };
        let finding = port::finding(key, address, &taken);
        match &taken {
            Taken::By(holders) if holders.iter().any(|holder| Some(holder.pid) == allowed) => {}
            Taken::By(holders) if holders.iter().any(is_kin) => self.in_use.push(finding),
            Taken::By(_) | Taken::Impossible(_) => self.errors.push(finding),
        }
    }
}

fn is_kin(holder: &Holder) -> bool {
    ["pgherd", "postgres", "patroni", "haproxy"].contains(&holder.name.as_str())
}

/// Whether a PostgreSQL runs in the data directory, which a keeper takes over.
pub(crate) fn runs_already(config: &AgentConfig) -> bool {
    postmaster_pid(&config.postgresql.data_dir).is_some_and(|pid| Path::new("/proc").join(pid.to_string()).exists())
}

fn postmaster_pid(data_dir: &Path) -> Option<u32> {
    fs::read_to_string(data_dir.join("postmaster.pid"))
        .ok()?
        .lines()
        .next()?
        .trim()
        .parse()
        .ok()
}

fn tls_files(tls: &EtcdTls) -> Vec<String> {
    let files = [("cacert", &tls.cacert), ("cert", &tls.cert), ("key", &tls.key)];
    let unreadable = files.into_iter().filter_map(|(key, path)| {
        let path = path.as_ref()?;
        let error = fs::File::open(path).err()?;
        Some(format!(
            "etcd3.{key}: \"{}\" cannot be read: {error}; write the path of a file that this user may read",
            path.display()
        ))
    });
    unreadable.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(host: &str, port: u16) -> Address {
        Address {
            host: host.to_owned(),
            port,
        }
    }

    #[test]
    fn addresses_overlap_by_port_and_by_wildcard() {
        assert!(overlap(&address("*", 1), &address("10.0.0.1", 1)));
        assert!(overlap(&address("10.0.0.1", 1), &address("0.0.0.0", 1)));
        assert!(!overlap(&address("10.0.0.1", 1), &address("10.0.0.1", 2)));
        assert!(!overlap(&address("127.0.0.1", 1), &address("10.0.0.1", 1)));
    }

    #[test]
    fn an_unreadable_certificate_is_told_by_key() {
        let tls = EtcdTls {
            cacert: Some("/nowhere/ca.pem".into()),
            cert: None,
            key: None,
        };
        let findings = tls_files(&tls);
        assert!(
            findings.len() == 1 && findings[0].starts_with("etcd3.cacert: \"/nowhere/ca.pem\" cannot be read"),
            "{findings:?}"
        );
    }
}
