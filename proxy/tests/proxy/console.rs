//! The console: what psql, drivers and scrapers get of it, and what strangers do not.

use std::net::SocketAddr;
use std::process::Output;

use pgherd_proxy::{ConsoleConfig, ConsoleUser, ListenerConfig, Proxy, ProxyConfig, Verifier};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::task::JoinSet;
use tokio_postgres::error::SqlState;
use tokio_postgres::{NoTls, SimpleQueryMessage};
use tokio_util::sync::CancellationToken;

use crate::fake::*;

const PASSWORD: &str = "a secret, with a comma";

fn user(name: &str, admin: bool) -> ConsoleUser {
    ConsoleUser {
        name: name.to_owned(),
        verifier: Verifier::new(name, PASSWORD).expect("a password"),
        admin,
    }
}

fn with_console() -> ProxyConfig {
    let mut config = config(vec![write_listener()]);
    config.console = Some(ConsoleConfig {
        database: "pgherd".to_owned(),
        users: vec![user("ops", true), user("scraper", false)],
        peers: true,
    });
    config
}

fn address(proxy: &Running) -> SocketAddr {
    proxy.addresses.listeners[0][0]
}

async fn psql(host: &str, port: u16, user: &str, password: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new("psql");
    command
        .args([
            "-X",
            "-w",
            "-h",
            host,
            "-p",
            &port.to_string(),
            "-U",
            user,
            "-d",
            "pgherd",
        ])
        .args(arguments)
        .env("PGPASSWORD", password)
        .env("PGCONNECT_TIMEOUT", "15")
        .kill_on_drop(true);
    within("psql ends", command.output()).await.expect("psql is there")
}

async fn asked(proxy: &Running, user: &str, arguments: &[&str]) -> (String, String) {
    let output = psql("127.0.0.1", address(proxy).port(), user, PASSWORD, arguments).await;
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (text(output.stdout), text(output.stderr))
}

async fn driver(proxy: &Running, user: &str) -> (tokio_postgres::Client, JoinSet<()>) {
    let mut config = tokio_postgres::Config::new();
    config
        .host("127.0.0.1")
        .port(address(proxy).port())
        .user(user)
        .password(PASSWORD)
        .dbname("pgherd")
        .application_name("a driver");
    let (client, connection) = within("a login", config.connect(NoTls)).await.expect("let in");
    let mut running = JoinSet::new();
    running.spawn(async move {
        let _ = connection.await; // Its client hears why.
    });
    (client, running)
}

#[tokio::test]
async fn psql_is_let_in_with_the_password_only_and_other_databases_are_the_servers() {
    let (mut cluster, mut server) = (Cluster::new(), Server::start().await);
    cluster.writable("n1", server.address);
    let proxy = Running::start(with_console(), &cluster);
    let (version, _) = asked(&proxy, "ops", &["-At", "-c", "SHOW VERSION"]).await;
    assert!(version.starts_with("PgBouncer 1.24.0. Served by pgherd "), "{version}");
    let port = address(&proxy).port();
    for (user, password) in [("ops", "wrong"), ("nobody", PASSWORD), ("ops", "")] {
        let refused = psql("127.0.0.1", port, user, password, &["-c", "SHOW VERSION"]).await;
        let why = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert_eq!(refused.status.code(), Some(2), "{why}");
        let same = format!("password authentication failed for user \"{user}\"");
        assert!(why.contains(&same) || why.contains("no password supplied"), "{why}");
    }
    // The database is called after the user, and so is not the console.
    let _client = proxy.client().await;
    assert!(server.session().await.startup.starts_with(&startup()));
    let held = ProxyConfig {
        console: None,
        ..with_console()
    };
    let open = Running::start(held, &cluster);
    let mut client = open.connect().await;
    client
        .write_all(&packet(196_608, b"user\0ann\0database\0pgherd\0\0"))
        .await
        .expect("sent");
    assert!(
        server.session().await.startup.ends_with(b"pgherd\0\0"),
        "without a console it is a database"
    );
}

/// The columns of PgBouncer 1.24, by name and in order; `#` for numbers.
const COLUMNS: &[(&str, &str)] = &[
    (
        "POOLS",
        "database user cl_active# cl_waiting# cl_active_cancel_req# cl_waiting_cancel_req# sv_active# sv_active_cancel# \
         sv_being_canceled# sv_idle# sv_used# sv_tested# sv_login# maxwait# maxwait_us# pool_mode load_balance_hosts",
    ),
    (
        "CLIENTS",
        "type user database replication state addr port# local_addr local_port# connect_time request_time wait# wait_us# \
         close_needed# ptr link remote_pid# tls application_name prepared_statements# id#",
    ),
    (
        "SERVERS",
        "type user database replication state addr port# local_addr local_port# connect_time request_time wait# wait_us# \
         close_needed# ptr link remote_pid# tls application_name prepared_statements# id#",
    ),
    (
        "DATABASES",
        "name host port# database force_user pool_size# min_pool_size# reserve_pool_size# server_lifetime# pool_mode \
         load_balance_hosts max_connections# current_connections# max_client_connections# current_client_connections# \
         paused# disabled#",
    ),
    (
        "USERS",
        "name pool_size reserve_pool_size pool_mode max_user_connections# current_connections# \
         max_user_client_connections# current_client_connections#",
    ),
    (
        "STATS",
        "database total_server_assignment_count# total_xact_count# total_query_count# total_received# total_sent# \
         total_xact_time# total_query_time# total_wait_time# total_client_parse_count# total_server_parse_count# \
         total_bind_count# avg_server_assignment_count# avg_xact_count# avg_query_count# avg_recv# avg_sent# avg_xact_time# \
         avg_query_time# avg_wait_time# avg_client_parse_count# avg_server_parse_count# avg_bind_count#",
    ),
    (
        "STATS_TOTALS",
        "database server_assignment_count# xact_count# query_count# bytes_received# bytes_sent# xact_time# query_time# \
         wait_time# client_parse_count# server_parse_count# bind_count#",
    ),
    ("LISTS", "list items#"),
    ("VERSION", "version"),
    ("CONFIG", "key value default changeable"),
    ("STATE", "key value"),
];

/// What prometheus-community/pgbouncer_exporter and pgbouncer_fdw send, as they write it.
const SCRAPED: &[&str] = &[
    "SHOW STATS",
    "SHOW LISTS;",
    "SHOW CONFIG;",
    "SHOW VERSION;",
    "SHOW databases;",
    "SHOW stats_totals;",
    "SHOW pools;",
    "show version",
    "show clients",
    "show config",
    "show databases",
    "show lists",
    "show pools",
    "show servers",
    "show stats",
    "show users",
];

#[tokio::test]
async fn columns_are_pgbouncers_by_name_order_and_type_and_every_scrapers_query_is_answered() {
    let (mut cluster, mut server) = (Cluster::new(), Server::start().await);
    cluster.writable("n1", server.address);
    let proxy = Running::start(with_console(), &cluster);
    let _client = proxy.client().await;
    let _session = server.session().await;
    let (scraper, _running) = driver(&proxy, "scraper").await;
    for (what, columns) in COLUMNS {
        let query = format!("SHOW {what}");
        let statement = within("a description", scraper.prepare(&query))
            .await
            .expect("prepared");
        let is_number = |column: &tokio_postgres::Column| matches!(column.type_().oid(), 20 | 23 | 1700);
        let described: Vec<String> = statement
            .columns()
            .iter()
            .map(|column| format!("{}{}", column.name(), if is_number(column) { "#" } else { "" }))
            .collect();
        assert_eq!(described.join(" "), *columns, "{what}");
        // In binary, and every row has as many cells as there are columns.
        within("an answer", scraper.query(&statement, &[])).await.expect("rows");
    }
    for query in SCRAPED {
        let answered = within("an answer", scraper.simple_query(query)).await;
        let rows = answered.unwrap_or_else(|error| panic!("{query}: {error}"));
        let rows = rows
            .iter()
            .filter(|message| matches!(message, SimpleQueryMessage::Row(_)));
        assert!(rows.count() > 0, "{query}");
    }
    let (pools, _) = asked(&proxy, "scraper", &["-At", "-F", " ", "-c", "show pools"]).await;
    assert!(pools.contains("ann ann 1 0 0 0 1 0 0 0 0 0 0 0 0 session "), "{pools}");
    let (clients, _) = asked(&proxy, "scraper", &["-At", "-c", "SHOW CLIENTS"]).await;
    assert!(clients.starts_with("C|ann|ann|none|active|127.0.0.1|"), "{clients}");
    let (servers, _) = asked(&proxy, "scraper", &["-At", "-c", "SHOW SERVERS"]).await;
    assert!(
        servers.contains(&format!("|active|127.0.0.1|{}|", server.address.port())),
        "{servers}"
    );
    let (nodes, _) = asked(
        &proxy,
        "scraper",
        &["-At", "-c", "SHOW NODES; SHOW ROUTES; SHOW EVENTS"],
    )
    .await;
    assert!(
        nodes.starts_with("n1|leader|running|") && nodes.contains("|write|n1|1|1|"),
        "{nodes}"
    );
    let (_, help) = asked(&proxy, "scraper", &["-c", "SHOW HELP"]).await;
    assert!(help.contains("SHOW POOLS|CLIENTS"), "{help}");
}

#[tokio::test]
async fn who_is_held_is_shown_with_the_reason_and_until_when() {
    let cluster = Cluster::new();
    let proxy = Running::start(with_console(), &cluster);
    let _held = proxy.client().await;
    let held = until("somebody is held", async || {
        let (held, _) = asked(&proxy, "ops", &["-At", "-c", "SHOW HELD"]).await;
        (!held.is_empty()).then_some(held)
    })
    .await;
    assert!(held.contains("|ann|ann|") && held.starts_with("127.0.0.1:"), "{held}");
    let (pools, _) = asked(&proxy, "ops", &["-At", "-c", "SHOW POOLS"]).await;
    assert!(pools.starts_with("ann|ann|0|1|"), "{pools}");
}

#[tokio::test]
async fn drivers_may_begin_and_set_and_prepare_and_errors_are_theirs_alone() {
    let cluster = Cluster::new();
    let proxy = Running::start(with_console(), &cluster);
    let (mut client, _running) = driver(&proxy, "scraper").await;
    for polite in [
        "",
        "SET application_name = 'x'",
        "SET extra_float_digits = 3; SHOW LISTS",
        "DISCARD ALL",
        "-- ping",
    ] {
        within("an answer", client.simple_query(polite)).await.expect(polite);
    }
    let block = within("BEGIN", client.transaction()).await.expect("begun");
    let listed = within("rows", block.query("SHOW LISTS", &[])).await.expect("rows");
    let (list, items): (&str, i32) = (listed[0].get(0), listed[0].get(1));
    assert_eq!((list, items), ("databases", 0));
    let failed = within("an error", block.query("SELECT 1", &[]))
        .await
        .expect_err("no SQL here");
    assert_eq!(failed.code(), Some(&SqlState::SYNTAX_ERROR));
    let again = within("an error", block.query("SHOW LISTS", &[]))
        .await
        .expect_err("aborted");
    assert_eq!(again.code(), Some(&SqlState::IN_FAILED_SQL_TRANSACTION));
    within("ROLLBACK", block.rollback()).await.expect("rolled back");
    for (command, word) in [
        ("PAUSE", "pgherd pause"),
        ("KILL app", "pg_terminate_backend"),
        ("RESUME;", "pgherd resume"),
    ] {
        let refused = within("an error", client.simple_query(command))
            .await
            .expect_err("not here");
        let told = refused.as_db_error().expect("told");
        assert_eq!(told.code(), &SqlState::FEATURE_NOT_SUPPORTED);
        assert!(told.hint().is_some_and(|hint| hint.contains(word)), "{told:?}");
    }
    let refused = within("an error", client.simple_query("RELOAD"))
        .await
        .expect_err("only a scraper");
    assert_eq!(refused.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE));
    within("it goes on", client.simple_query("SHOW POOLS"))
        .await
        .expect("an answer");
}

#[tokio::test]
async fn an_admin_reloads_and_hears_what_became_of_it() {
    let cluster = Cluster::new();
    let proxy = Proxy::bind(with_console(), cluster.handle.clone()).expect("any free port");
    let (mut requests, addresses) = (proxy.reload_requests(), proxy.addresses());
    let (reloader, stop) = (proxy.reloader(), CancellationToken::new());
    let mut running = JoinSet::new();
    running.spawn(proxy.run(stop.clone()));
    let mut proxy = Running {
        addresses,
        reloader,
        stop,
        running,
    };
    let (client, _running) = driver(&proxy, "ops").await;
    for outcome in [Ok(()), Err("proxy.listeners: missing".to_owned())] {
        let reloading = async {
            let done = requests.recv().await.expect("a wish");
            done.send(outcome.clone()).expect("somebody waits");
        };
        let (told, ()) = within("RELOAD", async {
            tokio::join!(client.simple_query("RELOAD"), reloading)
        })
        .await;
        match outcome {
            Ok(()) => assert!(told.is_ok(), "{told:?}"),
            Err(why) => {
                assert!(told.is_err_and(|told| told.as_db_error().is_some_and(|told| told.message().contains(&why))))
            }
        }
    }
    // And its session does not keep the proxy from stopping.
    proxy.stop.cancel();
    proxy.ended().await.expect("a clean stop");
    let gone = within("told", client.simple_query("SHOW POOLS")).await;
    assert!(gone.is_err());
}

#[tokio::test]
async fn root_and_our_own_user_come_in_through_a_unix_socket_without_a_password() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join(".s.PGSQL.5432");
    let cluster = Cluster::new();
    let mut config = with_console();
    config.listeners = vec![ListenerConfig::write(path.to_str().expect("text"))];
    let mut proxy = Running::start(config.clone(), &cluster);
    let host = dir.path().to_str().expect("text").to_owned();
    let shown = async || psql(&host, 5432, "whoever", "", &["-At", "-c", "SHOW STATE"]).await;
    let output = shown().await;
    assert_eq!(output.stdout, b"active|yes\npaused|no\nsuspended|no\n", "{output:?}");
    if let Some(console) = &mut config.console {
        console.peers = false;
    }
    proxy.reload(config).await.expect("applied");
    let refused = shown().await;
    assert_eq!(refused.status.code(), Some(2), "{refused:?}");
}

/// A connection that has asked for the console and been asked for a password.
async fn stranger(proxy: &Running) -> TcpStream {
    let mut stream = proxy.connect().await;
    let startup = packet(196_608, b"user\0ops\0database\0pgherd\0\0");
    stream.write_all(&startup).await.expect("sent");
    let mut question = [0; 24];
    within("a question", stream.read_exact(&mut question))
        .await
        .expect("asked");
    assert!(question.starts_with(b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0"));
    stream
}

#[tokio::test]
async fn a_stranger_gets_nothing_by_long_early_or_senseless_messages() {
    let cluster = Cluster::new();
    let proxy = Running::start(with_console(), &cluster);
    for (bytes, word) in [
        (&b"p\x7f\xff\xff\xff"[..], "SCRAM"),
        (b"Q\0\0\0\x10SHOW POOLS;\0", "SCRAM"),
        (b"p\0\0\0\x05\0", "SCRAM"),
        (b"\0\0\0\0\0", "SCRAM"),
    ] {
        let mut stream = stranger(&proxy).await;
        stream.write_all(bytes).await.expect("sent");
        let mut told = Vec::new();
        within("the end", stream.read_to_end(&mut told))
            .await
            .expect("closed in order");
        let told = String::from_utf8_lossy(&told).into_owned();
        assert!(
            told.starts_with('E') && told.contains("C08P01") && told.contains(word),
            "{told}"
        );
    }
    // Many that say nothing keep nobody out.
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(stranger(&proxy).await);
    }
    let (version, _) = asked(&proxy, "ops", &["-At", "-c", "SHOW VERSION"]).await;
    assert!(version.starts_with("PgBouncer"), "{version}");
}

#[tokio::test]
async fn one_that_has_logged_in_is_bounded_too() {
    let cluster = Cluster::new();
    let proxy = Running::start(with_console(), &cluster);
    let (client, _running) = driver(&proxy, "scraper").await;
    let mut prepared = Vec::new();
    let refused = loop {
        match within("an answer", client.prepare("SHOW POOLS")).await {
            Ok(statement) => prepared.push(statement),
            Err(refused) => break refused,
        }
        assert!(prepared.len() <= 64, "there is no bound");
    };
    assert_eq!(refused.code(), Some(&SqlState::PROGRAM_LIMIT_EXCEEDED));
    let long = format!("SET application_name = '{}'", "x".repeat(20_000));
    let ended = within("the end", client.simple_query(&long))
        .await
        .expect_err("too long");
    let is_told = ended
        .as_db_error()
        .is_some_and(|told| told.code() == &SqlState::PROTOCOL_VIOLATION);
    assert!(is_told || ended.is_closed(), "{ended:?}");
    let mut let_in = Vec::new();
    let refused = loop {
        let mut config = tokio_postgres::Config::new();
        config
            .host("127.0.0.1")
            .port(address(&proxy).port())
            .user("ops")
            .password(PASSWORD)
            .dbname("pgherd");
        match within("a login", config.connect(NoTls)).await {
            Ok((client, connection)) => {
                let mut running = JoinSet::new();
                running.spawn(connection);
                let_in.push((client, running));
            }
            Err(refused) => break refused,
        }
        assert!(let_in.len() <= 32, "there is no bound");
    };
    assert_eq!(refused.code(), Some(&SqlState::TOO_MANY_CONNECTIONS));
}
