//! Ways to a server: straight, or through a proxy that is a process of its own.

use std::cell::Cell;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use pgherd_testkit::process::{self, Daemon, Pid, Signal};
use pgherd_testkit::{Etcd, Site, address, config, eventually, program, yaml};
use serde_json::json;
use tokio::task::spawn_blocking;

use super::certificate::Certificate;
use super::client::{Asked, Client, Door};

const UP_MAX: Duration = Duration::from_secs(10);
const END_MAX: Duration = Duration::from_secs(10);
/// As many as anything here connects, and some more.
const CONNECTIONS: usize = 6000;
const BEFORE_ENV: &str = "PGHERD_BIN_BEFORE";
const FIRST_PORT: u16 = 16_000;

/// How to get to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Direct,
    Pgherd,
    /// Another build of it, to compare with: the one in `PGHERD_BIN_BEFORE`.
    Before,
    HaProxy,
    /// The same, made to move bytes in the kernel.
    HaProxySplice,
    PgBouncer,
}

impl Kind {
    pub(crate) const ALL: [Self; 6] = [
        Self::Direct,
        Self::Pgherd,
        Self::Before,
        Self::HaProxy,
        Self::HaProxySplice,
        Self::PgBouncer,
    ];

    /// HAProxy knows nothing of PostgreSQL, so that there TLS begins at once.
    const fn asked(self) -> Asked {
        match self {
            Self::Direct | Self::PgBouncer => Asked::First,
            Self::Pgherd | Self::Before | Self::HaProxy | Self::HaProxySplice => Asked::Never,
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Pgherd => "pgherd",
            Self::Before => "pgherd before",
            Self::HaProxy => "HAProxy",
            Self::HaProxySplice => "HAProxy splice",
            Self::PgBouncer => "PgBouncer",
        }
    }
}

/// A way that leads to the server.
pub(crate) struct Way {
    pub(crate) kind: Kind,
    pub(crate) door: Door,
    daemon: Option<Daemon>,
}

impl Way {
    /// The proxy's process.
    pub(crate) fn pid(&self) -> Option<Pid> {
        self.daemon.as_ref().map(Daemon::pid)
    }

    /// Ends the proxy.
    pub(crate) async fn end(mut self) -> Result<()> {
        if let Some(daemon) = &mut self.daemon {
            process::signal(daemon.pid(), Signal::KILL)?;
            daemon.end(END_MAX).await?;
        }
        Ok(())
    }
}

/// A server, and what is needed to put proxies before it.
pub(crate) struct Bed {
    pub(crate) site: Arc<Site>,
    etcd: Arc<Etcd>,
    /// The name of the cluster whose leader the server is, as etcd has it.
    scope: &'static str,
    pub(crate) server: SocketAddr,
    /// The server's process.
    pub(crate) server_pid: Pid,
    certificate: Certificate,
    next_port: Cell<u16>,
}

impl Bed {
    /// Writes into etcd that the server is the leader, as Patroni would.
    pub(crate) async fn new(
        site: &Arc<Site>,
        etcd: &Arc<Etcd>,
        scope: &'static str,
        server: SocketAddr,
        server_pid: Pid,
    ) -> Result<Self> {
        let member = json!({
            "conn_url": format!("postgres://{server}/postgres"),
            "api_url": format!("http://{}/patroni", address::at(site.addresses().nobody(), address::REST_PORT)),
            "state": "running", "role": "primary", "version": "4.1.4", "xlog_location": 67_108_960, "timeline": 1,
        });
        for (key, value) in [
            ("initialize", "7710403737510608197".to_owned()),
            (
                "config",
                json!({"ttl": 30, "loop_wait": 10, "retry_timeout": 10}).to_string(),
            ),
            ("leader", "m1".to_owned()),
            // After it: what a member said before it led proves nothing.
            ("members/m1", member.to_string()),
        ] {
            let key = format!("/service/{scope}/{key}");
            etcd.ctl(&["put", &key, &value]).await?.success()?;
        }
        Ok(Self {
            site: Arc::clone(site),
            etcd: Arc::clone(etcd),
            scope,
            server,
            server_pid,
            certificate: Certificate::make(site)?,
            next_port: Cell::new(FIRST_PORT),
        })
    }

    /// Starts a way and waits until it leads to the server; nothing where its program is not installed. With TLS, that is
    /// between the client and the proxy.
    pub(crate) async fn way(&self, kind: Kind, tls: bool) -> Result<Option<Way>> {
        let here = self.free_address();
        let name = format!("{}-{}-{}", self.scope, kind.name().replace(' ', "-"), here.port());
        let (program, args) = match kind {
            Kind::Direct => {
                return Ok(Some(Way {
                    kind,
                    door: Door {
                        address: self.server,
                        tls: None,
                    },
                    daemon: None,
                }));
            }
            Kind::Pgherd | Kind::Before => {
                let Some(program) = self.program_of(kind)? else {
                    return Ok(None);
                };
                (program, self.pgherd(&name, here, tls)?)
            }
            Kind::HaProxy | Kind::HaProxySplice => {
                let Some(program) = installed("haproxy") else {
                    return Ok(None);
                };
                (program, self.haproxy(&name, here, kind == Kind::HaProxySplice, tls)?)
            }
            Kind::PgBouncer => {
                let Some(program) = installed("pgbouncer") else {
                    return Ok(None);
                };
                (program, self.pgbouncer(&name, here, tls)?)
            }
        };
        let mut command = self.site.command(program);
        command.args(args);
        let daemon = self.site.start(&name, command)?;
        let door = Door {
            address: here,
            tls: tls.then(|| (Arc::clone(&self.certificate.client), kind.asked())),
        };
        eventually(&format!("{} leads to the server", kind.name()), UP_MAX, async || {
            let door = door.clone();
            spawn_blocking(move || Client::connect(&door)?.end()).await?
        })
        .await
        .with_context(|| daemon.output())?;
        Ok(Some(Way {
            kind,
            door,
            daemon: Some(daemon),
        }))
    }

    /// Our program of this kind; nothing where none is named.
    pub(crate) fn program_of(&self, kind: Kind) -> Result<Option<PathBuf>> {
        let program = match kind {
            Kind::Before => program::named(BEFORE_ENV),
            _ => Some(program::pgherd()?),
        };
        program.map(|program| self.site.reachable(&program)).transpose()
    }

    pub(crate) fn ip(&self) -> Ipv4Addr {
        self.site.addresses().proxy(0)
    }

    pub(crate) fn free_address(&self) -> SocketAddr {
        let port = self.next_port.get();
        self.next_port.set(port + 2);
        // Two beds share the address.
        let port = if self.server.port() == address::POSTGRES_PORT {
            port
        } else {
            port + 1000
        };
        address::at(self.ip(), port)
    }

    /// One worker: one thread against one thread.
    fn pgherd(&self, name: &str, here: SocketAddr, tls: bool) -> Result<Vec<String>> {
        let mut config = json!({
            "scope": self.scope,
            "etcd3": {"hosts": self.etcd.hosts()},
            "proxy": {
                "listeners": [{"address": here.to_string(), "role": "write"}],
                "stats": {"address": address::at(self.ip(), here.port() + 1).to_string()},
                "workers": 1,
            },
        });
        if tls {
            let Certificate { certificate, key, .. } = &self.certificate;
            let over = json!({"proxy": {
                "listeners": [{"address": here.to_string(), "role": "write", "tls": "allow"}],
                "tls": {"certificate": certificate, "private_key": key},
            }});
            config::merge(&mut config, over);
        }
        let file = self.site.write_file(&format!("{name}.yml"), &yaml::write(&config))?;
        Ok(["proxy", "--config"]
            .map(str::to_owned)
            .into_iter()
            .chain([shown(&file)])
            .collect())
    }

    fn haproxy(&self, name: &str, here: SocketAddr, splice: bool, tls: bool) -> Result<Vec<String>> {
        let server = self.server;
        let (pipes, splice) = if splice {
            ("  maxpipes 64\n", "  option splice-request\n  option splice-response\n")
        } else {
            ("", "")
        };
        let bind = if tls {
            format!("{here} ssl crt {} alpn postgresql", self.certificate.both.display())
        } else {
            here.to_string()
        };
        let config = format!(
            "global\n  maxconn {CONNECTIONS}\n  nbthread 1\n{pipes}\
             defaults\n  mode tcp\n  timeout connect 5s\n  timeout client 1h\n  timeout server 1h\n{splice}\
             listen postgres\n  bind {bind}\n  server leader {server}\n"
        );
        let file = self.site.write_file(&format!("{name}.cfg"), &config)?;
        Ok(["-db", "-f"]
            .map(str::to_owned)
            .into_iter()
            .chain([shown(&file)])
            .collect())
    }

    fn pgbouncer(&self, name: &str, here: SocketAddr, tls: bool) -> Result<Vec<String>> {
        let users = self.site.write_file(&format!("{name}.users"), "\"postgres\" \"\"\n")?;
        let tls = if tls {
            let Certificate { certificate, key, .. } = &self.certificate;
            let (key, certificate) = (key.display(), certificate.display());
            format!("client_tls_sslmode = allow\nclient_tls_key_file = {key}\nclient_tls_cert_file = {certificate}\n")
        } else {
            String::new()
        };
        let config = format!(
            "[databases]\npostgres = host={} port={}\n[pgbouncer]\nlisten_addr = {}\nlisten_port = {}\nunix_socket_dir =\n\
             auth_type = trust\nauth_file = {}\npool_mode = session\nmax_client_conn = {CONNECTIONS}\n\
             default_pool_size = {CONNECTIONS}\nlog_connections = 0\nlog_disconnections = 0\nlog_stats = 0\n{tls}",
            self.server.ip(),
            self.server.port(),
            here.ip(),
            here.port(),
            users.display(),
        );
        let file = self.site.write_file(&format!("{name}.ini"), &config)?;
        Ok(vec![shown(&file)])
    }
}

fn shown(file: &std::path::Path) -> String {
    file.display().to_string()
}

/// A program on `PATH`, or where Debian has those of daemons.
pub(crate) fn installed(name: &str) -> Option<PathBuf> {
    let debian = PathBuf::from("/usr/sbin").join(name);
    program::find(name).or_else(|| debian.is_file().then_some(debian))
}
