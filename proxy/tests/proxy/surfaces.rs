use std::net::SocketAddr;

use pgherd_proxy::{CompatMetrics, PageLogin, StatsConfig};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

use crate::fake::*;

async fn request(address: SocketAddr, line: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).await.expect("the page listens");
    let request = format!("{line} HTTP/1.1\r\nHost: test\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    stream
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = request(address, &format!("GET {path}")).await;
    let mut answer = String::new();
    within("an answer", stream.read_to_string(&mut answer))
        .await
        .expect("text");
    answer
}

async fn with_page(cluster: &Cluster) -> (Running, SocketAddr) {
    let mut config = config(vec![write_listener(), read_listener()]);
    config.stats = Some(StatsConfig {
        address: "127.0.0.1:0".to_owned(),
    });
    let proxy = Running::start(config, cluster);
    let page = proxy.addresses.stats[0];
    (proxy, page)
}

#[tokio::test]
async fn a_guarded_page_is_shown_to_whoever_has_the_password_and_health_to_everybody() {
    let cluster = Cluster::new();
    let mut config = config(vec![write_listener()]);
    config.stats = Some(StatsConfig {
        address: "127.0.0.1:0".to_owned(),
    });
    config.page_login = Some(PageLogin::new("Basic YWRtaW46c2VjcmV0".to_owned()));
    let mut proxy = Running::start(config.clone(), &cluster);
    let page = proxy.addresses.stats[0];
    let shown = async |login: &str| {
        let header = if login.is_empty() {
            String::new()
        } else {
            format!("\r\nAuthorization: {login}")
        };
        let mut stream = TcpStream::connect(page).await.expect("the page listens");
        let request = format!("GET /metrics HTTP/1.1\r\nHost: test{header}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.expect("sent");
        let mut answer = String::new();
        within("an answer", stream.read_to_string(&mut answer))
            .await
            .expect("text");
        answer.lines().next().unwrap_or_default().to_owned()
    };
    let all = [
        "/",
        "/stats",
        "/stats;csv",
        "/stats.json",
        "/stats/live",
        "/stats/page.css",
        "/stats/act",
        "/metrics",
        "/api/v1/stream",
    ];
    for path in all {
        let answer = get(page, path).await;
        assert!(
            answer.starts_with("HTTP/1.1 401") && answer.contains("www-authenticate: Basic"),
            "{path}: {answer}"
        );
    }
    assert!(get(page, "/healthz").await.starts_with("HTTP/1.1 200"));
    assert_eq!(shown("").await, "HTTP/1.1 401 Unauthorized");
    assert_eq!(shown("Basic YWRtaW46d3Jvbmc=").await, "HTTP/1.1 401 Unauthorized");
    assert_eq!(shown("Basic YWRtaW46c2VjcmV0").await, "HTTP/1.1 200 OK");
    // The page stays where it is, and another password counts.
    config.page_login = Some(PageLogin::new("Basic YWRtaW46bmV3".to_owned()));
    config.stats = Some(StatsConfig {
        address: "127.0.0.1:0".to_owned(),
    });
    proxy.reload(config).await.expect("applied");
    assert_eq!(shown("Basic YWRtaW46c2VjcmV0").await, "HTTP/1.1 401 Unauthorized");
    assert_eq!(shown("Basic YWRtaW46bmV3").await, "HTTP/1.1 200 OK");
}

#[tokio::test]
async fn page_json_and_health_say_where_writes_go() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let (proxy, page) = with_page(&cluster).await;
    let mut client = proxy.client().await;
    let _session = server.session().await;
    expect_hello(&mut client).await;
    until("the first proof is seen", async || {
        get(page, "/stats").await.contains("WRITABLE").then_some(())
    })
    .await;
    let html = get(page, "/stats").await;
    assert!(html.starts_with("HTTP/1.1 200 OK"), "{html}");
    assert!(html.contains("leader since before this proxy started"), "{html}");
    assert!(
        html.contains("script-src 'self'") && !html.contains("unsafe-inline"),
        "{html}"
    );
    let csv = get(page, "/stats;csv;norefresh").await;
    let of_n1 = csv.lines().find(|line| line.starts_with("primary,n1,"));
    assert!(of_n1.is_some_and(|line| line.contains(",UP,")), "{csv}");
    let refused = get(page, "/stats/act?do=restart&member=n1").await;
    assert!(
        refused.starts_with("HTTP/1.1 403") && refused.contains("HAPROXY_STATS_PASSWORD"),
        "{refused}"
    );
    assert!(get(page, "/healthz").await.contains("writable: yes"));
    let json = get(page, "/stats.json").await;
    let (_, body) = json.split_once("\r\n\r\n").expect("a body");
    let state: serde_json::Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(state["verdict"]["word"], "WRITABLE");
    assert_eq!(state["members"][0]["takes"], "write");
    assert_eq!(state["members"][0]["sessions_write"], 1);
    assert_eq!(state["listeners"][0]["sessions"], 1);
}

#[tokio::test]
async fn a_held_client_and_its_reason_are_shown() {
    let mut cluster = Cluster::new();
    cluster.no_leader();
    let (proxy, page) = with_page(&cluster).await;
    let _client = proxy.client().await;
    let html = until("the hold is shown", async || {
        let html = get(page, "/stats").await;
        html.contains("1 client is held").then_some(html)
    })
    .await;
    assert!(
        html.contains("HOLDING") && html.contains("there is no leader"),
        "{html}"
    );
    assert!(get(page, "/healthz").await.contains("writable: no"));
}

#[tokio::test]
async fn metrics_count_sessions_bytes_and_endings() {
    let mut server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster.writable("n1", server.address);
    let (proxy, page) = with_page(&cluster).await;
    let mut client = proxy.client().await;
    let mut session = server.session().await;
    expect_hello(&mut client).await;
    exchange(&mut client, &mut session).await;
    let listener = proxy.addresses.listeners[0][0];
    let metrics = get(page, "/metrics").await;
    for line in [
        "pgherd_up 1".to_owned(),
        format!("pgherd_build_info{{version=\"{}\"}} 1", pgherd_cluster::VERSION),
        format!(r#"pgherd_route_sessions{{listener="{listener}",node="n1"}} 1"#),
        format!(r#"pgherd_route_bytes_total{{direction="to_server",listener="{listener}",node="n1"}} 5"#),
        r#"pgherd_leader{node="n1"} 1"#.to_owned(),
        "pgherd_writable 1".to_owned(),
    ] {
        assert!(metrics.lines().any(|found| found == line), "no {line} in {metrics}");
    }
    session.stream.write_all(&ready()).await.expect("sent");
    assert!(read_message(&mut client).await.is_some());
    cluster.no_leader();
    expect_fatal(&mut client).await;
    drop(client);
    let ended = r#"pgherd_sessions_ended_total{reason="epoch_over",sqlstate="57P01"} 1"#;
    until("the ending is counted", async || {
        get(page, "/metrics").await.contains(ended).then_some(())
    })
    .await;
}

#[tokio::test]
async fn events_are_shown_and_texts_are_escaped() {
    let mut cluster = Cluster::new();
    cluster.record("<b>&n1", "127.0.0.1:1".parse().expect("an address"), "replica", "");
    let (_proxy, page) = with_page(&cluster).await;
    // Once the first look is over.
    until("the start is shown", async || {
        get(page, "/stats").await.contains("this proxy started").then_some(())
    })
    .await;
    until("the member is shown", async || {
        get(page, "/stats").await.contains("&lt;b&gt;&amp;n1").then_some(())
    })
    .await;
    cluster.leader_key("n2");
    until("the change is shown", async || {
        get(page, "/stats").await.contains("n2 leads").then_some(())
    })
    .await;
    assert!(!get(page, "/stats").await.contains("<b>&n1"));
}

#[tokio::test]
async fn the_stream_tells_of_a_change() {
    let mut cluster = Cluster::new();
    cluster.no_leader();
    let (_proxy, page) = with_page(&cluster).await;
    let mut lines = BufReader::new(request(page, "GET /api/v1/stream").await).lines();
    let mut changed = false;
    let told = async {
        while let Some(line) = lines.next_line().await.expect("text") {
            if line.contains("n7 leads") {
                return;
            }
            if line.starts_with("data: ") && !std::mem::replace(&mut changed, true) {
                cluster.leader_key("n7");
            }
        }
        panic!("the stream ended");
    };
    within("the change is told", told).await;
}

#[tokio::test]
async fn the_page_takes_no_orders() {
    let cluster = Cluster::new();
    let (_proxy, page) = with_page(&cluster).await;
    let mut stream = request(page, "POST /stats").await;
    let mut answer = String::new();
    within("an answer", stream.read_to_string(&mut answer))
        .await
        .expect("text");
    assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
    assert!(get(page, "/").await.contains("location: /stats"));
    assert!(get(page, "/nowhere").await.starts_with("HTTP/1.1 404"));
}

#[tokio::test]
async fn times_are_histograms_and_other_programs_names_are_there_for_whoever_wants_them() {
    let (mut cluster, mut server) = (Cluster::new(), Server::start().await);
    cluster.writable("n1", server.address);
    let (mut proxy, page) = with_page(&cluster).await;
    let _client = proxy.client().await;
    let _session = server.session().await;
    let listener = proxy.addresses.listeners[0][0];
    let startups = format!("pgherd_startup_seconds_count{{listener=\"{listener}\"}} 1\n");
    let metrics = until("the session has begun", async || {
        let metrics = get(page, "/metrics").await;
        metrics.contains(&startups).then_some(metrics)
    })
    .await;
    for expected in [
        "pgherd_backend_connect_seconds_bucket{node=\"n1\",le=\"+Inf\"} 1\n",
        &format!("pgherd_hold_seconds_count{{listener=\"{listener}\"}} 0\n"),
        &format!("pgherd_queue_oldest_seconds{{listener=\"{listener}\"}} 0\n"),
        "pgherd_node_takes{node=\"n1\",what=\"write\"} 1\n",
        "pgherd_connections 1\n",
    ] {
        assert!(metrics.contains(expected), "{expected} is not in {metrics}");
    }
    assert!(!metrics.contains("haproxy_") && !metrics.contains("pgbouncer_"));
    let mut both = config(vec![write_listener(), read_listener()]);
    both.stats = Some(StatsConfig {
        address: "127.0.0.1:0".to_owned(),
    });
    both.compat_metrics = CompatMetrics {
        haproxy: true,
        pgbouncer: true,
    };
    proxy.reload(both).await.expect("applied");
    let metrics = get(page, "/metrics").await;
    for expected in [
        "haproxy_server_status{proxy=\"primary\",server=\"n1\",state=\"UP\"} 1\n",
        "haproxy_server_status{proxy=\"replicas\",server=\"n1\",state=\"UP\"} 0\n",
        "haproxy_backend_status{proxy=\"primary\",state=\"UP\"} 1\n",
        "haproxy_server_current_sessions{proxy=\"primary\",server=\"n1\"} 1\n",
        "pgbouncer_pools_client_active_connections{database=\"ann\",user=\"ann\"} 1\n",
        "pgbouncer_up 1\n",
    ] {
        assert!(metrics.contains(expected), "{expected} is not in {metrics}");
    }
}

/// User and system time of this process, in hundredths of a second (proc(5), fields 14 and 15).
fn cpu_time() -> u64 {
    let stat = std::fs::read_to_string("/proc/self/stat").expect("there is /proc");
    let (_, after_name) = stat.rsplit_once(") ").expect("a name");
    let fields: Vec<&str> = after_name.split(' ').collect();
    fields[11..13]
        .iter()
        .map(|field| field.parse::<u64>().expect("a number"))
        .sum()
}

#[tokio::test]
#[ignore = "long: measures for ten seconds"]
async fn two_hundred_open_pages_cost_little() {
    const PAGES: usize = 200;
    const MEASURED: u64 = 10;
    let server = Server::start().await;
    let mut cluster = Cluster::new();
    cluster
        .writable("n1", server.address)
        .replica_at("n2", server.address, 5)
        .replica_at("n3", server.address, 7)
        .optime(9);
    let (_proxy, page) = with_page(&cluster).await;
    let mut readers = tokio::task::JoinSet::new();
    for _ in 0..PAGES {
        let mut stream = request(page, "GET /stats/live").await;
        readers.spawn(async move { tokio::io::copy(&mut stream, &mut tokio::io::sink()).await });
    }
    let mut last = BufReader::new(request(page, "GET /stats/live").await).lines();
    let mut renderings = 0;
    let (began, cpu_before) = (std::time::Instant::now(), cpu_time());
    // What is measured is what goes on while pages are looked at: a rendering each second.
    while renderings < MEASURED {
        let line = within("a rendering", last.next_line())
            .await
            .expect("text")
            .expect("more");
        renderings += u64::from(line.starts_with("data: "));
    }
    let spent = (cpu_time() - cpu_before) as f64 / 100.0;
    let part = spent / began.elapsed().as_secs_f64();
    println!(
        "{PAGES} open pages take {:.1} % of a core, their readers and the cluster of the test included",
        part * 100.0
    );
    assert!(readers.try_join_next().is_none(), "one was turned away");
}
