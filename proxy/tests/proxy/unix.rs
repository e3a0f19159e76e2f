//! Clients on unix sockets.

use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use pgherd_proxy::{Inherited, ListenerConfig, Proxy};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use crate::fake::{
    CANCEL_REQUEST, Cluster, Running, SSL_REQUEST, Server, config, exchange, expect_hello, packet, startup, until,
    within, write_listener,
};
use crate::relay::{receive_all, send_all};

fn file_in(dir: &tempfile::TempDir) -> PathBuf {
    dir.path().join(".s.PGSQL.5432")
}

fn listener(path: &Path, mode: u32) -> ListenerConfig {
    let mut listener = ListenerConfig::write(path.to_str().expect("text"));
    listener.mode = mode;
    listener
}

async fn connect(path: &Path) -> UnixStream {
    UnixStream::connect(path).await.expect("the proxy listens")
}

async fn client(path: &Path) -> UnixStream {
    let mut client = connect(path).await;
    client.write_all(&startup()).await.expect("sent");
    client
}

/// The kernel is asked to tell of room on such a socket only once there is none.
#[tokio::test]
async fn a_client_on_a_unix_socket_that_reads_late_gets_every_byte() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = file_in(&dir);
    let (mut cluster, mut server) = (Cluster::new(), Server::start().await);
    cluster.writable("n1", server.address);
    let _proxy = Running::start(config(vec![listener(&path, 0o700)]), &cluster);
    let mut client = client(&path).await;
    expect_hello(&mut client).await;
    let mut session = server.session().await;
    exchange(&mut client, &mut session).await;
    let sending = async {
        let sent = send_all(&mut session.stream, 3000);
        tokio::pin!(sent);
        // Nobody reads until nothing more is taken.
        let stuck = tokio::time::timeout(std::time::Duration::from_millis(200), &mut sent).await;
        assert!(stuck.is_err(), "30 MB fit on the way");
        tokio::join!(sent, receive_all(&mut client))
    };
    let (sent, (received, total)) = within("the late reader gets all", sending).await;
    assert_eq!((sent, 3000 * 9973), (received, total));
}

#[tokio::test]
async fn a_session_a_cancel_and_the_refusal_of_tls_go_through_a_unix_socket() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = file_in(&dir);
    let (mut cluster, mut server) = (Cluster::new(), Server::start().await);
    cluster.writable("n1", server.address);
    let mut config = config(vec![listener(&path, 0o700)]);
    // They have no address that these could count.
    config.limits.per_client_address = Some(1);
    config.limits.startups_per_client_address = Some(1);
    let mut proxy = Running::start(config, &cluster);
    let name = path.to_str().expect("text").to_owned();
    assert_eq!(
        (proxy.addresses.unix.clone(), proxy.addresses.listeners[0].len()),
        (vec![name], 0)
    );
    let mode = std::fs::metadata(&path).expect("it is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o700);

    let mut first = connect(&path).await;
    first.write_all(&packet(SSL_REQUEST, b"")).await.expect("sent");
    let mut answer = [0];
    within(
        "an answer",
        tokio::io::AsyncReadExt::read_exact(&mut first, &mut answer),
    )
    .await
    .expect("a byte");
    assert_eq!(&answer, b"N");
    first.write_all(&startup()).await.expect("sent");
    let key = expect_hello(&mut first).await;
    let mut session = server.session().await;
    exchange(&mut first, &mut session).await;

    let mut second = client(&path).await;
    expect_hello(&mut second).await;
    let mut other = server.session().await;
    exchange(&mut second, &mut other).await;

    let mut cancelling = connect(&path).await;
    cancelling.write_all(&packet(CANCEL_REQUEST, &key)).await.expect("sent");
    assert_eq!(server.cancel().await[8..], session.key);

    drop((first, second, cancelling));
    proxy.stop.cancel();
    proxy.ended().await.expect("in order");
    assert_eq!(
        std::fs::read_dir(dir.path()).expect("a directory").count(),
        0,
        "it is tidy"
    );
}

#[tokio::test]
async fn a_reload_opens_changes_and_closes_unix_sockets_and_leaves_their_sessions() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = file_in(&dir);
    let (mut cluster, mut server) = (Cluster::new(), Server::start().await);
    cluster.writable("n1", server.address);
    let mut proxy = Running::start(config(vec![write_listener()]), &cluster);
    let with = |mode| config(vec![write_listener(), listener(&path, mode)]);
    let mode = || std::fs::metadata(&path).expect("it is there").permissions().mode() & 0o777;

    proxy.reload(with(0o777)).await.expect("applied");
    assert_eq!(mode(), 0o777);
    let mut client = client(&path).await;
    expect_hello(&mut client).await;
    let mut session = server.session().await;

    proxy.reload(with(0o770)).await.expect("applied");
    assert_eq!((mode(), proxy.addresses.unix.len()), (0o770, 1));
    proxy.reload(config(vec![write_listener()])).await.expect("applied");
    assert!(!path.exists() && proxy.addresses.unix.is_empty());
    exchange(&mut client, &mut session).await;

    // One that somebody else has changes nothing.
    let _theirs = std::os::unix::net::UnixListener::bind(&path).expect("free");
    assert!(proxy.reload(with(0o777)).await.is_err());
    exchange(&mut client, &mut session).await;
    UnixStream::connect(&path).await.expect("theirs still listens");
}

#[tokio::test]
async fn a_unix_socket_goes_over_to_another_proxy_with_its_file() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = file_in(&dir);
    let (mut cluster, mut server) = (Cluster::new(), Server::start().await);
    cluster.writable("n1", server.address);
    let mut old = Running::start(config(vec![listener(&path, 0o777)]), &cluster);
    let sockets = within("copies", old.reloader.sockets()).await.expect("copied");
    let inherited = Inherited::new(sockets);
    assert_eq!(inherited.names(), [path.to_str().expect("text")]);
    let new = Proxy::bind_or_inherit(config(vec![listener(&path, 0o777)]), cluster.handle.clone(), inherited);
    let new = new.expect("it has the socket");
    let (reloader, stop) = (new.reloader(), CancellationToken::new());
    let mut running = tokio::task::JoinSet::new();
    running.spawn(new.run(stop.clone()));

    // Both are one process here, so that the one has to end before the file may name the other.
    within("released", old.reloader.set_files_ours(false)).await;
    old.stop.cancel();
    old.ended().await.expect("in order");
    within("claimed", reloader.set_files_ours(true)).await;
    let mut client = until("the new one serves", async || {
        let mut client = client(&path).await;
        expect_hello(&mut client).await;
        Some(client)
    })
    .await;
    exchange(&mut client, &mut server.session().await).await;
    drop(client);
    stop.cancel();
    within("the new one ends", running.join_next()).await;
    assert!(!path.exists(), "it was the new one's to remove");
}

#[tokio::test]
async fn a_socket_of_a_service_managers_is_served_and_its_file_stays() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = file_in(&dir);
    let held = std::os::unix::net::UnixListener::bind(&path).expect("free");
    let inherited = Inherited::new(vec![OwnedFd::from(held.try_clone().expect("copied"))]);
    let (mut cluster, mut server) = (Cluster::new(), Server::start().await);
    cluster.writable("n1", server.address);
    let proxy = Proxy::bind_or_inherit(config(vec![listener(&path, 0o777)]), cluster.handle.clone(), inherited);
    let stop = CancellationToken::new();
    let mut running = tokio::task::JoinSet::new();
    running.spawn(proxy.expect("it has the socket").run(stop.clone()));
    let mut client = client(&path).await;
    expect_hello(&mut client).await;
    exchange(&mut client, &mut server.session().await).await;
    drop(client);
    stop.cancel();
    let ended = within("it ends", running.join_next()).await.expect("it runs");
    ended.expect("no panic").expect("in order");
    assert!(path.exists(), "the next one is started by whoever connects");
}
