//! Write gaps: the longest time between two acknowledged rows of four writers, for each kind of fault.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use pgherd_testkit::{Cluster, Load, Member};
use serde_json::json;

use crate::spread;

#[derive(Clone, Copy)]
enum Fault {
    Switchover,
    PostmasterKilled,
    AgentKilled,
    AgentFrozen,
    LeaderKilled,
    EtcdAway,
}

const FAULTS: [(Fault, &str); 6] = [
    (Fault::Switchover, "planned switchover"),
    (Fault::PostmasterKilled, "postmaster killed"),
    (Fault::AgentKilled, "agent killed"),
    (Fault::AgentFrozen, "agent frozen"),
    (Fault::LeaderKilled, "everything of the leader killed"),
    (Fault::EtcdAway, "etcd stopped and started"),
];

pub(crate) async fn measure(cluster: &Cluster, runs: usize) -> Result<()> {
    let mut lines = Vec::new();
    for (fault, name) in FAULTS {
        let mut gaps: Vec<Duration> = Vec::new();
        let (mut lost, mut errors) = (0, 0);
        for _ in 0..runs {
            let leader = cluster.settled().await?;
            let load = Load::start(cluster).await?;
            let began = Instant::now();
            fault.happen(cluster, leader, &load).await?;
            let (_, report) = load.end(cluster, name, began).await?;
            gaps.push(report.write_gap);
            lost += report.lost.len();
            errors += report.errors.values().sum::<usize>();
        }
        let (median, least, greatest) = spread(gaps);
        let [median, least, greatest] = [median, least, greatest].map(|gap| gap.as_secs_f64());
        lines.push(format!(
            "{name:<34} {median:>7.3} {least:>7.3} {greatest:>7.3} {lost:>6} {errors:>7}"
        ));
    }
    println!("\nwrite gap in seconds, {runs} runs each   median   least    most   lost  errors");
    println!("{}", lines.join("\n"));
    Ok(())
}

impl Fault {
    /// Lets it happen, and mends what does not mend itself once clients write again.
    async fn happen(self, cluster: &Cluster, leader: &Member, load: &Load) -> Result<()> {
        match self {
            Self::Switchover => {
                let answer = leader
                    .ask("POST", "/switchover", Some(&json!({"leader": leader.name()})))
                    .await?;
                ensure!(answer.status == 200, "{answer:?}");
            }
            Self::PostmasterKilled => leader.kill_postmaster()?,
            Self::AgentKilled => leader.kill_agent().await?,
            Self::AgentFrozen => {
                let agent = leader.freeze_agent().await?;
                cluster.next_leader(leader.name()).await?;
                leader.thaw(&[agent]);
            }
            Self::LeaderKilled => {
                leader.kill_everything().await?;
                cluster.next_leader(leader.name()).await?;
                leader.start().await?;
            }
            Self::EtcdAway => {
                cluster.etcd().stop().await?;
                load.goes_on().await?;
                cluster.etcd().start_again().await?;
            }
        }
        Ok(())
    }
}
