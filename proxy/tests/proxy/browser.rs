//! The page in a browser: complete without a script, live with one, and nothing is done by whoever may not.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use pgherd_cluster::http::AccessConfig;
use pgherd_proxy::{PageLogin, StatsConfig};

use crate::chromium::Browser;
use crate::fake::*;
use crate::told::{Told, answer};

/// operator:correct horse
const LOGIN: &str = "Basic b3BlcmF0b3I6Y29ycmVjdCBob3JzZQ==";
/// operator:wrong horse
const WRONG: &str = "Basic b3BlcmF0b3I6d3JvbmcgaG9yc2U=";
/// What members are shown.
const MEMBERS: &str = "Basic bWVtYmVyczpzZWNyZXQ=";
const A_SECOND: Duration = Duration::from_secs(1);
/// The machine may be busy with something else for a moment.
const ATTEMPTS: usize = 5;

/// A cluster of three, whose members' agents are all played by `agent`.
fn three(agent: SocketAddr, server: SocketAddr) -> Cluster {
    let access = AccessConfig {
        authorization: Some(MEMBERS.to_owned()),
        ..AccessConfig::default()
    };
    let mut cluster = Cluster::with_access(access.load().expect("no files"));
    cluster.writable_with_agent("n1", server, agent, true);
    cluster.replica_with_agent("n2", server, agent);
    cluster.replica_with_agent("n3", server, agent);
    cluster
}

fn hand_over(cluster: &mut Cluster, from: &str, to: &str, agent: SocketAddr, server: SocketAddr) {
    cluster.replica_with_agent(from, server, agent);
    cluster.writable_with_agent(to, server, agent, true);
}

#[tokio::test]
async fn the_page_is_complete_live_and_obeys_nobody_else() {
    let server = Server::start().await;
    let agent = Told::serve([("*".to_owned(), answer("text/plain", "restarted successfully"))].into()).await;
    let mut cluster = three(agent.address, server.address);
    let mut config = config(vec![write_listener(), read_listener()]);
    config.stats = Some(StatsConfig {
        address: "127.0.0.1:0".to_owned(),
    });
    config.page_login = Some(PageLogin::new(LOGIN.to_owned()));
    let proxy = Running::start(config, &cluster);
    cluster.confirmed().await;
    let host = format!("http://{}", proxy.addresses.stats[0]);
    let mut browser = Browser::start().await;
    browser.window(1280, 900, false).await;

    is_complete_without_a_script(&mut browser, &host).await;
    follows_within_a_second(&mut browser, &host, &mut cluster, agent.address, server.address).await;
    assert_eq!(browser.complaints(&host).await, Vec::<String>::new());

    let restarts = || agent.asked_to("POST /restart");
    refuses_whoever_may_not(&mut browser, &host).await;
    refuses_a_stale_page(&mut browser, &host, &mut cluster, agent.address, server.address).await;
    assert_eq!(restarts(), Vec::<String>::new(), "nothing was changed so far");
    obeys_who_may(&mut browser, &host).await;
    let [restart] = &restarts()[..] else {
        panic!("{:?}", restarts())
    };
    assert!(restart.contains(MEMBERS) && !restart.contains(LOGIN), "{restart}");
}

async fn is_complete_without_a_script(browser: &mut Browser, host: &str) {
    browser.log_in(LOGIN).await;
    browser.scripts(false).await;
    browser.open(&format!("{host}/stats")).await;
    let text = browser.text("body").await;
    for part in [
        "WRITABLE",
        "Who is suffering?",
        "What happened?",
        "What may I safely do?",
        "n1",
        "n2",
        "n3",
        "as of this moment",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    let pictures = browser
        .evaluate("document.querySelectorAll('svg.topology, svg.plot').length")
        .await;
    assert_eq!(pictures, 3);
    assert_eq!(browser.complaints(host).await, Vec::<String>::new());
    browser.scripts(true).await;
}

async fn follows_within_a_second(
    browser: &mut Browser,
    host: &str,
    cluster: &mut Cluster,
    agent: SocketAddr,
    server: SocketAddr,
) {
    browser.open(&format!("{host}/stats")).await;
    browser.shows("#live", "live").await;
    let mut took = Vec::new();
    let (mut from, mut to) = ("n1", "n2");
    for _ in 0..ATTEMPTS {
        let began = Instant::now();
        hand_over(cluster, from, to, agent, server);
        browser.shows("#verdict .sentence", to).await;
        took.push(began.elapsed());
        (from, to) = (to, from);
        if took.iter().any(|took| *took < A_SECOND) {
            break;
        }
    }
    println!("a change of leader is on screen after {took:?}");
    assert!(took.iter().any(|took| *took < A_SECOND), "{took:?}");
    browser.screenshot("live").await;
    // As it was.
    if from == "n2" {
        hand_over(cluster, "n2", "n1", agent, server);
    }
    browser.shows("#verdict .sentence", "n1").await;
}

async fn refuses_whoever_may_not(browser: &mut Browser, host: &str) {
    browser.open(&format!("{host}/stats")).await;
    let forged = "new URLSearchParams({do: 'restart', member: 'n3', typed: 'n3', token: '00'.repeat(16), decides: 'n1@1 watching -'})";
    let send = format!(
        "fetch('/stats/act', {{method: 'POST', credentials: 'omit', body: {forged}}}).then((answer) => answer.status)"
    );
    browser.log_in(WRONG).await;
    assert_eq!(browser.evaluate(&send).await, 401, "a wrong password");
    let look = "fetch('/stats/act?do=restart&member=n3', {credentials: 'omit'}).then((answer) => answer.status)";
    assert_eq!(browser.evaluate(look).await, 401, "not even a form");
    browser.log_in(LOGIN).await;
    assert_eq!(browser.evaluate(&send).await, 403, "a token that was never given out");

    // A page of somebody else's, opened by who is logged in, with a token that is good.
    browser.open(&format!("{host}/stats/act?do=restart&member=n3")).await;
    let form = browser.evaluate("document.querySelector('form').innerHTML").await;
    let form = form
        .as_str()
        .expect("a form")
        .replace("name=\"typed\"", "name=\"typed\" value=\"n3\"");
    let html = format!("<!DOCTYPE html><form method=\"post\" action=\"{host}/stats/act\">{form}</form>");
    let page = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: {}\r\n\r\n{html}",
        html.len()
    );
    let elsewhere = Told::serve([("/".to_owned(), page)].into()).await;
    browser.open(&format!("http://{}/", elsewhere.address)).await;
    browser.evaluate("document.forms[0].requestSubmit()").await;
    browser.loaded().await;
    browser.shows("#outcome", "does not come from this page").await;
}

async fn confirm(browser: &mut Browser, typed: &str) {
    browser
        .evaluate(&format!("document.getElementById('typed').value = '{typed}'"))
        .await;
    browser.evaluate("document.forms[0].requestSubmit()").await;
    browser.loaded().await;
}

async fn refuses_a_stale_page(
    browser: &mut Browser,
    host: &str,
    cluster: &mut Cluster,
    agent: SocketAddr,
    server: SocketAddr,
) {
    browser.open(&format!("{host}/stats/act?do=restart&member=n3")).await;
    browser.screenshot("confirm").await;
    confirm(browser, "n1").await;
    browser.shows("#outcome", "to confirm, type \"n3\"").await;
    browser.open(&format!("{host}/stats/act?do=restart&member=n3")).await;
    hand_over(cluster, "n1", "n2", agent, server);
    confirm(browser, "n3").await;
    browser.shows("#outcome", "NOTHING WAS CHANGED").await;
    browser
        .shows("#outcome", "the cluster has changed since you looked")
        .await;
}

async fn obeys_who_may(browser: &mut Browser, host: &str) {
    browser.open(&format!("{host}/stats/act?do=restart&member=n3")).await;
    confirm(browser, "n3").await;
    browser.shows("#outcome", "restarted successfully").await;
    browser.open(&format!("{host}/stats")).await;
    browser
        .shows("#events", "operator asked from the page for restart n3: done")
        .await;
}
