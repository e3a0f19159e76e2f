//! Which of several members each reader gets.

use std::net::SocketAddr;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::fake::*;

/// A server that can be told to take no connections now.
struct Moody {
    address: SocketAddr,
    takes: watch::Sender<bool>,
    asked: watch::Receiver<usize>,
    _tasks: JoinSet<()>,
}

impl Moody {
    async fn start(takes: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (takes, does_take) = watch::channel(takes);
        let (count, asked) = watch::channel(0);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut sessions = JoinSet::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                count.send_modify(|count| *count += 1);
                let takes = *does_take.borrow();
                sessions.spawn(async move {
                    read_packet(&mut stream).await;
                    if !takes {
                        let _ = stream.write_all(&starting_up()).await;
                        return;
                    }
                    let hello = [message(b'R', &[0; 4]), message(b'K', &[7; 12]), ready()].concat();
                    let _ = stream.write_all(&hello).await;
                    std::future::pending().await
                });
            }
        });
        Self {
            address,
            takes,
            asked,
            _tasks: tasks,
        }
    }
}

/// How many of so many new sessions, which stay open, get the key of the server that is moody.
async fn of_newcomers(proxy: &Running, count: usize, kept: &mut Vec<TcpStream>) -> usize {
    let mut moody = 0;
    for _ in 0..count {
        let mut client = proxy.client().await;
        moody += usize::from(expect_hello(&mut client).await.len() == 12);
        kept.push(client);
    }
    moody
}

#[tokio::test]
async fn readers_stay_in_their_zone_while_somebody_there_can_take_them() {
    let (mut near, mut far) = (Server::start().await, Server::start().await);
    let in_zone = |zone: &str| format!(r#","replication_state":"streaming","tags":{{"zone":"{zone}"}}"#);
    let mut cluster = Cluster::new();
    cluster
        .record("n2", far.address, "replica", &in_zone("b"))
        .record("n3", near.address, "replica", &in_zone("a"));
    let mut config = config(vec![read_listener()]);
    config.zone = Some("a".to_owned());
    let proxy = Running::start(config, &cluster);
    let mut kept = Vec::new();
    for _ in 0..6 {
        kept.push(proxy.client().await);
        near.session().await;
    }
    cluster.member_leaves("n3");
    let mut client = proxy.client().await;
    let _session = far.session().await;
    expect_hello(&mut client).await;
}

#[tokio::test]
async fn sessions_that_stay_open_are_spread_evenly() {
    // The keys tell the servers apart.
    let servers = [
        Server::with_secret_bytes(4).await,
        Server::with_secret_bytes(5).await,
        Server::with_secret_bytes(6).await,
    ];
    let mut cluster = Cluster::new();
    for (index, server) in servers.iter().enumerate() {
        cluster.replica(&format!("n{index}"), server.address);
    }
    let proxy = Running::start(config(vec![read_listener()]), &cluster);
    let mut kept = Vec::new();
    let mut open = [0; 3];
    for _ in 0..240 {
        let mut client = proxy.client().await;
        open[expect_hello(&mut client).await.len() - 8] += 1;
        kept.push(client);
    }
    // Connecting is not equally quick everywhere on a machine that does other things too.
    assert!(open.iter().all(|open| (60..=100).contains(open)), "{open:?}");
}

#[tokio::test]
async fn a_member_that_fails_is_left_alone_comes_back_by_a_trial_and_starts_slowly() {
    let (mut moody, good) = (Moody::start(false).await, Server::start().await);
    let mut cluster = Cluster::new();
    cluster.replica("n2", moody.address).replica("n3", good.address);
    let mut config = config(vec![read_listener()]);
    config.slow_start = Duration::from_secs(600);
    let proxy = Running::start(config, &cluster);
    let mut kept = Vec::new();
    assert_eq!(of_newcomers(&proxy, 40, &mut kept).await, 0);
    // Asked at the start, and again a second later, two seconds later, and so on.
    let asked = *moody.asked.borrow_and_update();
    assert!(asked <= 6, "it was asked {asked} times");
    moody.takes.send_replace(true);
    until("a newcomer has tried it", async || {
        // Those that the other gets do not stay.
        let mut tried = Vec::new();
        let found = of_newcomers(&proxy, 1, &mut tried).await > 0;
        found.then(|| kept.append(&mut tried))
    })
    .await;
    // It has far fewer than the other, and would get all of them were it not for its slow start.
    let others = kept.len();
    let got = of_newcomers(&proxy, 100, &mut kept).await;
    assert!(got <= 60, "{got} of 100, beside {others}");
}

#[tokio::test]
async fn a_member_that_was_only_passed_over_has_not_been_tried() {
    let (mut moody, good) = (Moody::start(true).await, Server::start().await);
    let mut cluster = Cluster::new();
    cluster.replica("n2", moody.address);
    let mut config = config(vec![read_listener()]);
    config.slow_start = Duration::ZERO;
    let mut proxy = Running::start(config.clone(), &cluster);
    let mut kept = Vec::new();
    assert_eq!(of_newcomers(&proxy, 1, &mut kept).await, 1);
    cluster.replica("n3", good.address);
    moody.takes.send_replace(false);
    let failed_at = until("a newcomer has tried it in vain", async || {
        let mut tried = Vec::new();
        of_newcomers(&proxy, 1, &mut tried).await;
        tried.into_iter().for_each(break_off);
        (*moody.asked.borrow_and_update() > 1).then(Boottime::now)
    })
    .await;
    // From here on it has no room, and would be tried again after a second.
    moody.takes.send_replace(true);
    config.limits.per_member = Some(1);
    proxy.reload(config.clone()).await.expect("a good configuration");
    until("newcomers have passed it over", async || {
        let mut others = Vec::new();
        assert_eq!(of_newcomers(&proxy, 1, &mut others).await, 0);
        others.into_iter().for_each(break_off);
        (Boottime::now().since(failed_at) > Duration::from_millis(1_500)).then_some(())
    })
    .await;
    config.limits.per_member = None;
    proxy.reload(config).await.expect("a good configuration");
    assert_eq!(of_newcomers(&proxy, 1, &mut kept).await, 1, "the next one tries it");
}
