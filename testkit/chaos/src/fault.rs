//! What happens in each case, and how it is mended again.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use pgherd_cluster::clock::Boottime;
use pgherd_testkit::address::POSTGRES_PORT;
use pgherd_testkit::process::{self, Pid, Signal};
use pgherd_testkit::{Cluster, Member, Network, eventually};
use serde_json::json;
use tokio::net::TcpStream;
use tokio::time::sleep;

use crate::case::Case;
use crate::load::Load;

/// Until clients write to another member; more than any bound, and with an end.
const MOVED_MAX: Duration = Duration::from_secs(45);
const GOES_ON_MAX: Duration = Duration::from_secs(60);
/// Where the proxy listens when it has read its configuration again.
const MORE_PORT: u16 = 15_434;
const RELOADED_MAX: Duration = Duration::from_secs(5);
/// How long replication stands still before the leader is lost.
const REPLICATION_CUT: Duration = Duration::from_secs(3);

/// What a case happens to.
#[derive(Clone, Copy)]
pub struct Scene<'a> {
    /// The cluster.
    pub cluster: &'a Cluster,
    /// The hosts that it is on.
    pub network: &'a Arc<Network>,
    /// Who leads when it begins.
    pub leader: &'a Member,
    /// The clients.
    pub load: &'a Load,
    /// How long what ends by itself lasts.
    pub span: Duration,
}

impl Scene<'_> {
    /// Lets it happen, and mends it. `begun` is told when it begins.
    ///
    /// # Errors
    /// When it could not be made to happen, or clients were not served again.
    pub async fn happen(&self, case: Case, begun: &mut Option<Boottime>) -> Result<()> {
        let leader = self.leader;
        if case == Case::ReplicationCutThenLost {
            return self.cut_replication_and_lose(begun).await;
        }
        // What comes of the partition is worth knowing also where the reload was refused.
        let prepared = match case {
            Case::ReloadThenPartitioned => self.reload_proxy().await,
            _ => Ok(()),
        };
        let replica = self.replica_for(case).await?;
        let etcd_leader = self.etcd_leader().await?;
        *begun = Some(Boottime::now());
        match case {
            Case::Quiet => self.last().await,
            Case::Switchover => self.switch_over().await?,
            Case::PostmasterKilled => leader.kill_postmaster()?,
            Case::AgentKilled => {
                leader.kill_agent().await?;
                self.last_ttl().await;
            }
            Case::AgentForbidden => {
                leader.forbid_agent().await?;
                self.moved().await?;
                leader.allow_agent().await?;
            }
            Case::AgentFrozen => self.freeze(vec![leader.agent_pid().await?]).await?,
            Case::KeeperAndAgentFrozen => {
                self.freeze(vec![leader.keeper_pid().await?, leader.agent_pid().await?])
                    .await?;
            }
            Case::MemberFrozen => {
                let frozen = leader.freeze_everything().await?;
                self.last().await;
                leader.thaw(&frozen);
            }
            Case::MemberLost => self.lose_leader().await?,
            Case::ProcessesKilled => {
                leader.kill_everything().await?;
                leader.start().await?;
            }
            Case::Partitioned | Case::ReloadThenPartitioned => self.silence(leader).await?,
            Case::CutFromEtcd => {
                self.network.cut(leader.ip(), &self.etcd_ips())?;
                self.last().await;
                self.network.heal()?;
            }
            Case::EtcdLeaderKilled => self.kill_etcd(&[etcd_leader]).await?,
            Case::EtcdLeaderFrozen => self.freeze_etcd(etcd_leader).await?,
            Case::EtcdQuorumLost => {
                let other = (etcd_leader + 1) % self.cluster.etcd().size();
                self.kill_etcd(&[etcd_leader, other]).await?;
            }
            Case::ReplicaKilled | Case::SyncStandbyKilled | Case::QuorumStandbyKilled => {
                let replica = replica.context("the case is about a replica")?;
                replica.kill_everything().await?;
                self.last_ttl().await;
                replica.start().await?;
            }
            Case::ReplicaSilent | Case::SyncStandbySilent => {
                self.silence(replica.context("the case is about a replica")?).await?;
            }
            Case::RestartedOneByOne => self.restart_one_by_one().await?,
            Case::ReplicationCutThenLost => bail!("this case is handled above"),
        }
        self.load.goes_on(GOES_ON_MAX).await?;
        prepared
    }

    /// The span is the fault itself: there is no condition to wait for.
    async fn last(&self) {
        sleep(self.span).await;
    }

    /// For what is over at once: long enough that a lease which it has cost would have expired.
    async fn last_ttl(&self) {
        sleep(crate::case::TTL + Duration::from_secs(2)).await;
    }

    async fn freeze(&self, processes: Vec<Pid>) -> Result<()> {
        for pid in &processes {
            process::signal(*pid, Signal::STOP)?;
        }
        self.last().await;
        self.leader.thaw(&processes);
        Ok(())
    }

    async fn silence(&self, member: &Member) -> Result<()> {
        self.network.isolate(member.ip())?;
        self.last().await;
        self.network.heal()
    }

    async fn moved(&self) -> Result<()> {
        self.load.moves_from(self.leader.ip(), MOVED_MAX).await
    }

    /// All of etcd must be there to begin with.
    async fn etcd_leader(&self) -> Result<u8> {
        eventually("all etcd members answer, and one leads", GOES_ON_MAX, async || {
            self.cluster.etcd().leader().await
        })
        .await
    }

    fn etcd_ips(&self) -> Vec<Ipv4Addr> {
        let etcd = self.cluster.etcd();
        (0..etcd.size()).map(|index| etcd.ip(index)).collect()
    }

    async fn switch_over(&self) -> Result<()> {
        let arguments = ["--leader", self.leader.name(), "--force"];
        let shown = self.cluster.pgherd("switchover", &arguments).await?.success()?;
        ensure!(shown.contains("uccessfully switched over"), "{shown}");
        Ok(())
    }

    /// Gives the proxy one more listener, or takes it away again, and waits until it is so.
    async fn reload_proxy(&self) -> Result<()> {
        let (write, read) = (self.cluster.write_address(), self.cluster.read_address());
        let more = SocketAddr::new(write.ip(), MORE_PORT);
        let listens = async || TcpStream::connect(more).await.is_ok();
        let before = listens().await;
        let mut listeners = vec![
            json!({"address": write.to_string(), "role": "write"}),
            json!({"address": read.to_string(), "role": "read", "fallback": "leader"}),
        ];
        if !before {
            listeners.push(json!({"address": more.to_string(), "role": "read"}));
        }
        self.cluster
            .write_proxy_config(json!({"proxy": {"listeners": listeners}}))?;
        self.cluster.signal_proxy(Signal::HUP).await?;
        eventually("the proxy has read its configuration again", RELOADED_MAX, async || {
            ensure!(listens().await != before, "listening on {more} is {before} as before");
            Ok(())
        })
        .await
    }

    /// The cable first, so that nobody is told of the end of the processes.
    async fn lose_leader(&self) -> Result<()> {
        self.network.unplug(self.leader.ip())?;
        self.network.isolate(self.leader.ip())?;
        self.leader.kill_everything().await?;
        self.moved().await?;
        self.network.heal()?;
        self.leader.start().await
    }

    async fn cut_replication_and_lose(&self, begun: &mut Option<Boottime>) -> Result<()> {
        let replicas = self.cluster.others(self.leader.name());
        let replicas: Vec<Ipv4Addr> = replicas.into_iter().map(Member::ip).collect();
        *begun = Some(Boottime::now());
        self.network.cut_port(self.leader.ip(), POSTGRES_PORT, &replicas)?;
        sleep(REPLICATION_CUT).await;
        self.lose_leader().await?;
        self.load.goes_on(GOES_ON_MAX).await
    }

    async fn kill_etcd(&self, members: &[u8]) -> Result<()> {
        let etcd = self.cluster.etcd();
        for index in members {
            etcd.kill_member(*index).await?;
        }
        self.last().await;
        for index in members {
            etcd.start_member(*index).await?;
        }
        etcd.wait_ready().await
    }

    async fn freeze_etcd(&self, member: u8) -> Result<()> {
        self.cluster.etcd().freeze_member(member).await?;
        self.last().await;
        self.cluster.etcd().thaw_member(member).await?;
        self.cluster.etcd().wait_ready().await
    }

    async fn restart_one_by_one(&self) -> Result<()> {
        for member in self.cluster.members() {
            member.stop().await?;
            member.start().await?;
            self.cluster.settled().await?;
        }
        Ok(())
    }

    /// Whom the case is about, where it is about a replica.
    async fn replica_for(&self, case: Case) -> Result<Option<&Member>> {
        let found = match case {
            Case::ReplicaKilled | Case::ReplicaSilent => self.replica_with_a_reader().await?,
            Case::SyncStandbyKilled | Case::SyncStandbySilent => self.replica_in("sync").await?,
            Case::QuorumStandbyKilled => self.replica_in("quorum").await?,
            _ => return Ok(None),
        };
        Ok(Some(found))
    }

    async fn replica_with_a_reader(&self) -> Result<&Member> {
        let found = eventually("a reader reads from a replica", GOES_ON_MAX, async || {
            let server = self.load.server_of_a_reader()?;
            let mut replicas = self.cluster.others(self.leader.name()).into_iter();
            let replica = replicas.find(|replica| replica.ip().to_string() == server);
            replica.with_context(|| format!("it reads from {server}"))
        });
        found.await
    }

    async fn replica_in(&self, sync_state: &str) -> Result<&Member> {
        let question =
            format!("SELECT application_name FROM pg_stat_replication WHERE sync_state = '{sync_state}' LIMIT 1");
        let name = self.leader.sql(&question).await?;
        self.cluster.member(&name)
    }
}
