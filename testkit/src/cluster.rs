//! A whole cluster: etcd, members, a proxy; and what is true of it when it is well.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tokio::sync::Mutex;

use crate::address::{READ_PORT, STATS_PORT, WRITE_PORT, at};
use crate::config::{self, MemberPlace, PREFIX};
use crate::etcd::Etcd;
use crate::member::{self, Member};
use crate::network::Network;
use crate::process::{self, Daemon, Signal};
use crate::site::{Outcome, Site};
use crate::sql::{Sql, value};
use crate::volume::{Volume, VolumeKind};
use crate::wait::eventually;
use crate::{program, yaml};

/// How long a cluster may take from nothing to three members that stream, on a busy machine.
const SETTLED_MAX: Duration = Duration::from_secs(90);
const SQL_MAX: Duration = Duration::from_secs(2);
const STOP_MAX: Duration = Duration::from_secs(30);
const COMMAND_MAX: Duration = Duration::from_secs(60);

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub struct ClusterBuilder {
    members: u8,
    etcd: u8,
    etcd_password: Option<String>,
    dcs: Value,
    member: Value,
    single: Vec<(String, Value)>,
    proxy: Value,
    network: Option<Arc<Network>>,
    volumes: Option<VolumeKind>,
}

impl ClusterBuilder {
    /// How many members; 3 unless set.
    #[must_use]
    pub const fn members(mut self, members: u8) -> Self {
        self.members = members;
        self
    }

    /// How many etcd members; 1 unless set.
    #[must_use]
    pub const fn etcd(mut self, members: u8) -> Self {
        self.etcd = members;
        self
    }

    /// Lets etcd ask for a password.
    #[must_use]
    pub fn etcd_password(mut self, password: &str) -> Self {
        self.etcd_password = Some(password.to_owned());
        self
    }

    /// Puts `over` over the first dynamic configuration.
    #[must_use]
    pub fn dcs(mut self, over: Value) -> Self {
        config::merge(&mut self.dcs, over);
        self
    }

    /// Puts `over` over the configuration of each member.
    #[must_use]
    pub fn member_config(mut self, over: Value) -> Self {
        self.member = over;
        self
    }

    /// Puts `over` over the configuration of the member called `name`.
    #[must_use]
    pub fn config_of(mut self, name: &str, over: Value) -> Self {
        self.single.push((name.to_owned(), over));
        self
    }

    /// Puts `over` over the proxy's configuration.
    #[must_use]
    pub fn proxy_config(mut self, over: Value) -> Self {
        self.proxy = over;
        self
    }

    /// Puts each part on the host of `network` that has its address; the test itself must be on the clients' host.
    #[must_use]
    pub fn on(mut self, network: &Arc<Network>) -> Self {
        self.network = Some(Arc::clone(network));
        self
    }

    /// Gives each member's data directory a filesystem of its own. Needs root.
    #[must_use]
    pub const fn volumes(mut self, kind: VolumeKind) -> Self {
        self.volumes = Some(kind);
        self
    }

    /// Starts everything, and waits until the cluster is well.
    ///
    /// # Errors
    /// When it does not get well.
    pub async fn start(self) -> Result<Cluster> {
        let cluster = self.prepare().await?;
        for member in cluster.members() {
            member.start().await?;
        }
        cluster.start_proxy().await?;
        cluster.settled().await?;
        Ok(cluster)
    }

    /// Starts etcd only, and writes the configurations.
    ///
    /// # Errors
    /// When etcd does not start.
    pub async fn prepare(self) -> Result<Cluster> {
        let site = match &self.network {
            Some(network) => Site::on(network)?,
            None => Site::new()?,
        };
        let site = Arc::new(site);
        let mut etcd = Etcd::start(&site, self.etcd).await?;
        if let Some(password) = &self.etcd_password {
            etcd.enable_auth(password).await?;
        }
        let etcd3 = config::etcd3(&etcd.hosts(), etcd.credentials());
        let bin_dir = program::postgres_bin_dir()?;
        let mut members = Vec::new();
        for index in 0..self.members {
            let name = format!("m{}", index + 1);
            let dir = site.make_dir(&name)?;
            let place = MemberPlace {
                name: &name,
                ip: site.addresses().member(index),
                dir: &dir,
                bin_dir: &bin_dir,
            };
            let mut text = config::member(&place, etcd3.clone(), self.dcs.clone());
            if let Some(network) = &self.network {
                config::merge(&mut text, config::access_from(&network.cidr()));
            }
            config::merge(&mut text, self.member.clone());
            for (_, over) in self.single.iter().filter(|(single, _)| *single == name) {
                config::merge(&mut text, over.clone());
            }
            let volume = match self.volumes {
                Some(kind) => {
                    let mount = site.make_dir(&format!("{name}/{}", member::VOLUME))?;
                    Some(Volume::mount(&site, kind, &name, &mount).await?)
                }
                None => None,
            };
            members.push(Member::new(&site, name, index, dir, text, volume)?);
        }
        let mut proxy = config::proxy(site.addresses().proxy(0), etcd3);
        let takeover = json!({"proxy": {"takeover": site.dir().join("takeover.sock")}});
        config::merge(&mut proxy, takeover);
        config::merge(&mut proxy, self.proxy);
        site.write_file("proxy.yml", &yaml::write(&proxy))?;
        Ok(Cluster {
            site,
            etcd,
            members,
            proxy_config: proxy,
            proxy: Mutex::new(None),
        })
    }
}

/// A running cluster. All of it ends when this is dropped.
pub struct Cluster {
    site: Arc<Site>,
    etcd: Etcd,
    members: Vec<Member>,
    proxy_config: Value,
    proxy: Mutex<Option<Daemon>>,
}

impl Cluster {
    /// Three members, one etcd, the tests' own dynamic configuration, one proxy.
    #[must_use]
    pub fn builder() -> ClusterBuilder {
        let nothing = Value::Object(serde_json::Map::new());
        ClusterBuilder {
            members: 3,
            etcd: 1,
            etcd_password: None,
            dcs: config::dcs(),
            member: nothing.clone(),
            single: Vec::new(),
            proxy: nothing,
            network: None,
            volumes: None,
        }
    }

    /// The test has passed: nothing needs to be kept or shown.
    pub fn pass(&self) {
        self.site.pass();
    }

    /// Where it lives.
    #[must_use]
    pub const fn site(&self) -> &Arc<Site> {
        &self.site
    }

    /// Its store.
    #[must_use]
    pub const fn etcd(&self) -> &Etcd {
        &self.etcd
    }

    /// Its members.
    #[must_use]
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// The member called `name`.
    ///
    /// # Errors
    /// When there is none.
    pub fn member(&self, name: &str) -> Result<&Member> {
        self.members
            .iter()
            .find(|member| member.name() == name)
            .with_context(|| format!("no member is called {name:?}"))
    }

    /// All members but the one called `name`.
    #[must_use]
    pub fn others(&self, name: &str) -> Vec<&Member> {
        self.members.iter().filter(|member| member.name() != name).collect()
    }

    /// Where the proxy takes writes.
    #[must_use]
    pub fn write_address(&self) -> SocketAddr {
        at(self.site.addresses().proxy(0), WRITE_PORT)
    }

    /// Where the proxy takes reads.
    #[must_use]
    pub fn read_address(&self) -> SocketAddr {
        at(self.site.addresses().proxy(0), READ_PORT)
    }

    /// Where the proxy shows its page.
    #[must_use]
    pub fn stats_address(&self) -> SocketAddr {
        at(self.site.addresses().proxy(0), STATS_PORT)
    }

    /// Starts `pgherd proxy`. Does not wait for it.
    ///
    /// # Errors
    /// When the binary is not built.
    pub async fn start_proxy(&self) -> Result<()> {
        *self.proxy.lock().await = Some(self.spawn_proxy("proxy", &[])?);
        Ok(())
    }

    /// Starts another `pgherd proxy` that takes over from the running one. Returns that one.
    ///
    /// # Errors
    /// When none runs.
    pub async fn take_proxy_over(&self) -> Result<Daemon> {
        let mut proxy = self.proxy.lock().await;
        let former = proxy.take().context("the proxy does not run")?;
        *proxy = Some(self.spawn_proxy("proxy-2", &["--takeover"])?);
        Ok(former)
    }

    fn spawn_proxy(&self, name: &str, arguments: &[&str]) -> Result<Daemon> {
        let program = self.site.reachable(&program::pgherd()?)?;
        let mut command = self.site.command_at(self.site.addresses().proxy(0), program)?;
        command
            .arg("proxy")
            .arg("--config")
            .arg(self.site.dir().join("proxy.yml"))
            .args(arguments);
        self.site.start(name, command)
    }

    /// Stops the proxy with SIGTERM, and waits for its end.
    ///
    /// # Errors
    /// When it does not end within its grace period, or not with exit code 0.
    pub async fn stop_proxy(&self) -> Result<()> {
        let mut daemon = self.proxy.lock().await.take().context("the proxy does not run")?;
        process::signal(daemon.pid(), Signal::TERM)?;
        let status = daemon.end(STOP_MAX).await?;
        ensure!(status.success(), "the proxy was stopped and ended with {status}");
        Ok(())
    }

    /// Writes the proxy's configuration anew: what it was to begin with, and `over` over it. The proxy is not told.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_proxy_config(&self, over: Value) -> Result<()> {
        let mut config = self.proxy_config.clone();
        config::merge(&mut config, over);
        self.site.write_file("proxy.yml", &yaml::write(&config))?;
        Ok(())
    }

    /// Sends the proxy a signal.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn signal_proxy(&self, signal: Signal) -> Result<()> {
        let mut proxy = self.proxy.lock().await;
        let daemon = proxy.as_mut().context("the proxy does not run")?;
        ensure!(daemon.ended()?.is_none(), "the proxy has ended: {}", daemon.output());
        process::signal(daemon.pid(), signal)
    }

    /// Runs an operator's command: `pgherd COMMAND --config FILE ARGS`, with the first member's configuration.
    ///
    /// # Errors
    /// When it does not end within a minute.
    pub async fn pgherd(&self, command: &str, args: &[&str]) -> Result<Outcome> {
        let mut run = self.site.command(self.site.reachable(&program::pgherd()?)?);
        let config = self.members.first().context("a cluster has members")?.config_file();
        run.arg(command).arg("--config").arg(config).args(args);
        self.site.run(run, COMMAND_MAX).await
    }

    /// The name in the leader key.
    ///
    /// # Errors
    /// When there is no such key, or etcd does not answer.
    pub async fn lease_holder(&self) -> Result<String> {
        let entry = self.etcd.entry(&format!("{PREFIX}leader")).await?;
        Ok(entry.context("there is no leader key")?.value)
    }

    /// The one member whose PostgreSQL takes writes, asked past the proxy.
    ///
    /// # Errors
    /// When none does, or more than one.
    pub async fn primary(&self) -> Result<&Member> {
        match self.primaries().await.as_slice() {
            [primary] => Ok(primary),
            [] => bail!("no member takes writes"),
            several => bail!("several take writes: {several:?}"),
        }
    }

    /// The members whose PostgreSQL says that it takes writes.
    pub async fn primaries(&self) -> Vec<&Member> {
        let mut primaries = Vec::new();
        for member in &self.members {
            // Members that are down are part of many tests.
            if member.is_primary().await.unwrap_or(false) {
                primaries.push(member);
            }
        }
        primaries
    }

    /// Waits until the cluster is well: one leader, in etcd and in fact; every other member streams from it; a write
    /// through the proxy reaches it. Returns the leader.
    ///
    /// # Errors
    /// When that does not come about within a minute and a half.
    pub async fn settled(&self) -> Result<&Member> {
        self.settled_with(self.members.len()).await
    }

    /// As [`Cluster::settled`], where only `up` of the members are up.
    ///
    /// # Errors
    /// As [`Cluster::settled`].
    pub async fn settled_with(&self, up: usize) -> Result<&Member> {
        eventually("the cluster is well", SETTLED_MAX, async || self.look(up).await).await
    }

    /// Waits until another member than `former` leads and takes writes through the proxy, whatever the rest does.
    ///
    /// # Errors
    /// When none does within a minute and a half.
    pub async fn next_leader(&self, former: &str) -> Result<&Member> {
        let what = format!("another member than {former} leads");
        let leads = eventually(&what, SETTLED_MAX, async || {
            let server = self.server_behind_write_port().await?;
            ensure!(server.name() != former, "{former} leads");
            ensure!(
                self.lease_holder().await? == server.name(),
                "the leader key does not name {}",
                server.name()
            );
            Ok(server)
        });
        leads.await
    }

    /// How many members stream from `primary`, by their own word: to its server a copy that is being made streams, too.
    pub async fn followers(&self, primary: &Member) -> usize {
        let follows = format!(
            "SELECT count(*) FROM pg_stat_wal_receiver WHERE status = 'streaming' AND sender_host = '{}'",
            primary.postgres().ip()
        );
        let mut followers = 0;
        for replica in self.others(primary.name()) {
            // Members that are down are part of many tests.
            followers += usize::from(replica.sql(&follows).await.is_ok_and(|count| count == "1"));
        }
        followers
    }

    /// The member that a new session on the write port ends up at, if a write goes through.
    ///
    /// # Errors
    /// When there is no session or no write.
    pub async fn server_behind_write_port(&self) -> Result<&Member> {
        let sql = Sql::connect(self.write_address(), SQL_MAX)
            .await
            .context("the write port")?;
        sql.rows(
            "CREATE TABLE IF NOT EXISTS testkit_probe (at timestamptz); INSERT INTO testkit_probe VALUES (now())",
            SQL_MAX,
        )
        .await
        .context("a write through the write port")?;
        let address = sql.value("SELECT host(inet_server_addr())", SQL_MAX).await?;
        let member = self
            .members
            .iter()
            .find(|member| member.postgres().ip().to_string() == address);
        member.with_context(|| format!("the write port leads to {address}, which is no member's"))
    }

    async fn look(&self, up: usize) -> Result<&Member> {
        let primary = self.primary().await?;
        let holder = self.lease_holder().await?;
        ensure!(
            holder == primary.name(),
            "{} takes writes, the leader key names {holder}",
            primary.name()
        );
        let streaming = self.followers(primary).await;
        ensure!(
            streaming + 1 == up,
            "{streaming} members stream from {holder}, {} should",
            up - 1
        );
        let behind = self.server_behind_write_port().await?;
        ensure!(
            behind.name() == holder,
            "the write port leads to {}, {holder} leads",
            behind.name()
        );
        value(self.read_address(), "SELECT 1", SQL_MAX)
            .await
            .context("the read port")?;
        Ok(primary)
    }
}
