//! What members tell of each other opens nothing: the leader itself is asked, once somebody needs to know.

use tokio::io::AsyncReadExt;

use crate::fake::*;
use crate::vouch::Agent;

#[tokio::test]
async fn a_writer_is_let_in_by_the_leaders_own_word_and_by_nothing_else() {
    let (mut server, agent) = (Server::start().await, Agent::start().await);
    let mut cluster = Cluster::by_hearsay();
    cluster.writable_with_agent("n1", server.address, agent.address, true);
    agent.says(&cluster, 503, 0, 0);
    let proxy = Running::start(config(vec![write_listener()]), &cluster);
    cluster.confirmed().await;
    assert!(agent.asked().is_empty(), "nobody needs to know");
    let mut client = proxy.client().await;
    until("the leader is asked twice", async || {
        (agent.asked().len() > 1).then_some(())
    })
    .await;
    agent.says(&cluster, 200, 0, 2_500);
    let mut session = server.session().await;
    expect_hello(&mut client).await;
    exchange(&mut client, &mut session).await;
    // It takes its word back, and nothing else is left.
    agent.says(&cluster, 503, 0, 0);
    let mut rest = Vec::new();
    let _ = within("the session ends", client.read_to_end(&mut rest)).await;
}

#[tokio::test]
async fn a_view_that_was_pushed_ends_sessions_at_once() {
    let (mut server, agent) = (Server::start().await, Agent::start().await);
    let mut cluster = Cluster::by_hearsay();
    cluster.writable_with_agent("n1", server.address, agent.address, true);
    agent.says(&cluster, 200, 0, 60_000);
    let mut config = config(vec![write_listener()]);
    config.hold.timeout = std::time::Duration::from_secs(4);
    let proxy = Running::start(config, &cluster);
    let mut client = proxy.client().await;
    let _session = server.session().await;
    expect_hello(&mut client).await;
    cluster.leader_key("n2");
    let fatal = expect_fatal(&mut client).await;
    assert_eq!(fatal.sqlstate, "57P01");
    // And the next one is not believed by that alone.
    let other = Server::start().await;
    cluster.record("n2", other.address, "primary", "");
    let mut late = proxy.client().await;
    let why = expect_fatal(&mut late).await;
    assert!(
        why.sqlstate == "57P03" && why.text.contains("does not confirm it itself"),
        "{}",
        why.text
    );
}
