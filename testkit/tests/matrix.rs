//! Every client that people use, through both ports: without TLS, by TLS with the proxy, and by TLS with the server behind it.
//!
//! One cluster per way of TLS, shared by all clients. What fails is collected, so that one client does not hide another.

use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use pgherd_testkit::address::{READ_PORT, WRITE_PORT, at};
use pgherd_testkit::certificates::Authority;
use pgherd_testkit::{Cluster, client};
use serde_json::json;

#[path = "matrix/drivers.rs"]
mod drivers;
#[path = "matrix/dumps.rs"]
mod dumps;
#[path = "matrix/programs.rs"]
mod programs;
#[path = "matrix/replication.rs"]
mod replication;
#[path = "matrix/rust.rs"]
mod rust;

const SOON: Duration = Duration::from_secs(30);
/// For one program from its start to its end.
const RUN_MAX: Duration = Duration::from_secs(120);
/// The listeners that speak TLS themselves.
const PROXY_TLS_WRITE: u16 = WRITE_PORT + 10;
const PROXY_TLS_READ: u16 = READ_PORT + 10;
/// The listeners that leave TLS to the server.
const SERVER_TLS_WRITE: u16 = WRITE_PORT + 20;
const SERVER_TLS_READ: u16 = READ_PORT + 20;

/// Where TLS ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tls {
    Nowhere,
    Proxy,
    Server,
}

impl Tls {
    /// As clients' programs are told.
    const fn word(self) -> &'static str {
        match self {
            Self::Nowhere => "nowhere",
            Self::Proxy => "proxy",
            Self::Server => "server",
        }
    }
}

/// A cluster of two, and how clients come to it.
struct Field {
    cluster: Cluster,
    authority: Authority,
    tls: Tls,
}

impl Field {
    async fn start(tls: Tls) -> Result<Self> {
        let parameters = json!({"wal_level": "logical", "max_connections": 80});
        let builder = Cluster::builder().members(2);
        let cluster = builder
            .dcs(json!({"postgresql": {"parameters": parameters}}))
            .prepare()
            .await?;
        let site = cluster.site();
        let ip = site.addresses().proxy(0);
        let authority = Authority::new(site)?;
        let own = authority.issue(site, "proxy", &[ip])?;
        let listener =
            |port, role: &str, tls: &str| json!({"address": at(ip, port).to_string(), "role": role, "tls": tls});
        let listeners = [
            listener(WRITE_PORT, "write", "off"),
            listener(READ_PORT, "read", "off"),
            listener(PROXY_TLS_WRITE, "write", "require"),
            listener(PROXY_TLS_READ, "read", "require"),
            listener(SERVER_TLS_WRITE, "write", "passthrough"),
            listener(SERVER_TLS_READ, "read", "passthrough"),
        ];
        let tls_files = json!({"certificate": own.certificate, "private_key": own.key});
        cluster.write_proxy_config(json!({"proxy": {"listeners": listeners, "tls": tls_files}}))?;
        for member in cluster.members() {
            // Clients that speak with it know it by the proxy's address.
            let own = authority.issue(site, member.name(), &[member.ip(), ip])?;
            let parameters = json!({"ssl": "on", "ssl_cert_file": own.certificate, "ssl_key_file": own.key});
            member.alter_config(json!({"postgresql": {"parameters": parameters}}))?;
            member.start().await?;
        }
        cluster.start_proxy().await?;
        cluster.settled().await?;
        Ok(Self {
            cluster,
            authority,
            tls,
        })
    }

    fn write(&self) -> SocketAddr {
        let port = match self.tls {
            Tls::Nowhere => WRITE_PORT,
            Tls::Proxy => PROXY_TLS_WRITE,
            Tls::Server => SERVER_TLS_WRITE,
        };
        at(self.cluster.site().addresses().proxy(0), port)
    }

    fn read(&self) -> SocketAddr {
        let port = match self.tls {
            Tls::Nowhere => READ_PORT,
            Tls::Proxy => PROXY_TLS_READ,
            Tls::Server => SERVER_TLS_READ,
        };
        at(self.cluster.site().addresses().proxy(0), port)
    }

    fn ports(&self) -> [(&'static str, SocketAddr); 2] {
        [("write", self.write()), ("read", self.read())]
    }

    /// A program of libpq's kind, or one that goes by the same environment. The server behind the proxy must be whom its
    /// certificate names, and where TLS is the server's, be the one that the client speaks TLS with.
    fn libpq(&self, program: impl AsRef<std::ffi::OsStr>, address: SocketAddr) -> Command {
        let mut command = client::libpq(self.cluster.site(), program, address);
        match self.tls {
            Tls::Nowhere => command.env("PGSSLMODE", "disable"),
            Tls::Proxy | Tls::Server => command
                .env("PGSSLMODE", "verify-full")
                .env("PGSSLROOTCERT", self.authority.file()),
        };
        if self.tls == Tls::Server {
            command.env("PGCHANNELBINDING", "require");
        }
        command
    }

    /// Runs a program to its end, which must be a good one, and returns what it wrote.
    async fn run(&self, command: Command) -> Result<String> {
        self.cluster.site().run(command, RUN_MAX).await?.success()
    }
}

/// What clients said.
#[derive(Default)]
struct Outcomes {
    failed: Vec<String>,
}

impl Outcomes {
    async fn of(&mut self, client: &str, check: impl Future<Output = Result<()>>) {
        let began = Instant::now();
        let outcome = check.await;
        println!("{client}: {:.1} s", began.elapsed().as_secs_f64());
        if let Err(error) = outcome {
            self.failed.push(format!("{client}: {error:#}"));
        }
    }
}

async fn every_client(tls: Tls) -> Result<()> {
    let field = Field::start(tls).await?;
    let programs = async {
        let mut outcomes = Outcomes::default();
        outcomes.of("psql", programs::psql(&field)).await;
        outcomes.of("psql 17", programs::newer_psql(&field)).await;
        outcomes.of("pgbench", programs::pgbench(&field)).await;
        outcomes
            .of("pg_dump and pg_restore", dumps::dump_and_restore(&field))
            .await;
        outcomes.of("pg_basebackup", replication::basebackup(&field)).await;
        outcomes.of("pg_receivewal", replication::receivewal(&field)).await;
        outcomes.of("pg_recvlogical", replication::recvlogical(&field)).await;
        outcomes.failed
    };
    let drivers = async {
        let mut outcomes = Outcomes::default();
        outcomes.of("tokio-postgres", rust::tokio_postgres(&field)).await;
        outcomes.of("psycopg 3", drivers::python(&field, "psycopg3.py")).await;
        outcomes
            .of("SQLAlchemy on psycopg 2", drivers::python(&field, "sqlalchemy2.py"))
            .await;
        outcomes
            .of("asyncpg", drivers::python(&field, "asyncpg_check.py"))
            .await;
        outcomes.of("JDBC", drivers::jdbc(&field)).await;
        outcomes.failed
    };
    let (mut failed, more) = tokio::join!(programs, drivers);
    failed.extend(more);
    if !failed.is_empty() {
        bail!("{} clients failed\n{}", failed.len(), failed.join("\n"));
    }
    field.cluster.pass();
    Ok(())
}

#[tokio::test]
async fn every_client_works_without_tls() -> Result<()> {
    every_client(Tls::Nowhere).await
}

#[tokio::test]
async fn every_client_works_by_tls_with_the_proxy() -> Result<()> {
    every_client(Tls::Proxy).await
}

#[tokio::test]
async fn every_client_works_by_tls_with_the_server() -> Result<()> {
    every_client(Tls::Server).await
}
