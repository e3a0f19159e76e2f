//! What the relay allocates for each message: nothing.
//!
//! A program of its own, since the allocator counts for the whole process. The test's own threads are left out, so that what
//! is counted are the proxy's workers.
#![expect(unsafe_code, reason = "an allocator that counts is an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::key::Keys;
use pgherd_cluster::name::Scope;
use pgherd_cluster::source::{ViewPublisher, channel};
use pgherd_cluster::view::{Entry, View};
use pgherd_proxy::{ListenerConfig, Proxy, ProxyConfig};
use tokio_util::sync::CancellationToken;

thread_local! {
    /// Set on the test's own threads.
    static IS_OURS: Cell<bool> = const { Cell::new(false) };
}
static COUNTS: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

impl Counting {
    fn note() {
        if COUNTS.load(Ordering::Relaxed) && !IS_OURS.get() {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::note();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::note();
        // SAFETY: the caller's promise is passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// For anything here: it only turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(20);
const QUERIES: usize = 2000;
const READY: &[u8] = b"Z\0\0\0\x05I";

/// Answers each piece that comes by one of the same length, once the startup message has been answered.
fn serve(listener: &TcpListener) -> std::io::Result<()> {
    let (mut client, _) = listener.accept()?;
    client.set_nodelay(true)?;
    let mut piece = [0; 4096];
    let _ = client.read(&mut piece)?;
    client.write_all(&[b"R\0\0\0\x08\0\0\0\0K\0\0\0\x0c\0\0\0\x07abcd", READY].concat())?;
    loop {
        match client.read(&mut piece)? {
            0 => return Ok(()),
            count => client.write_all(&piece[..count])?,
        }
    }
}

fn view(leader: SocketAddr) -> View {
    let scope = Scope::new("c").expect("a plain name");
    let keys = Keys::new("service", &scope);
    let entry = |key: &str, value: String, revision| Entry {
        key: format!("/service/c/{key}"),
        value,
        create_revision: revision,
        mod_revision: revision,
        lease: 1,
    };
    let member =
        format!(r#"{{"conn_url":"postgres://{leader}/postgres","api_url":"","state":"running","role":"primary"}}"#);
    let entries = [entry("leader", "n1".to_owned(), 1), entry("members/n1", member, 2)];
    View::from_entries(scope, &keys, entries, 2)
}

/// A proxy with one worker, whose control plane runs on a thread of ours.
fn proxy(publisher: ViewPublisher, proxy: Proxy, stop: CancellationToken) {
    IS_OURS.set(true);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let confirming = async {
            let mut tick = tokio::time::interval(Duration::from_millis(50));
            loop {
                tick.tick().await;
                publisher.confirm(Boottime::now());
            }
        };
        tokio::select! {
            ended = proxy.run(stop) => ended.expect("it stops in order"),
            () = confirming => {}
        }
    });
}

fn client(address: SocketAddr) -> TcpStream {
    let began = Instant::now();
    loop {
        let mut client = TcpStream::connect(address).expect("the proxy listens");
        client.set_nodelay(true).expect("set");
        client.set_read_timeout(Some(PATIENCE)).expect("set");
        client
            .write_all(b"\0\0\0\x17\0\x03\0\0user\0postgres\0\0")
            .expect("sent");
        let mut answer = Vec::new();
        let mut piece = [0; 512];
        while !answer.ends_with(READY) {
            match client.read(&mut piece).expect("in time") {
                0 => break,
                count => answer.extend_from_slice(&piece[..count]),
            }
        }
        if answer.ends_with(READY) {
            return client;
        }
        assert!(began.elapsed() < PATIENCE, "{}", answer.escape_ascii());
    }
}

/// Sends messages of this size, each once the one before has come back.
fn exchange(client: &mut TcpStream, bytes: usize, times: usize) {
    let (message, mut answer) = (vec![b'x'; bytes], vec![0; bytes]);
    for _ in 0..times {
        client.write_all(&message).expect("sent");
        client.read_exact(&mut answer).expect("answered");
    }
}

#[test]
fn a_message_is_relayed_without_an_allocation() {
    IS_OURS.set(true);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let server = listener.local_addr().expect("bound");
    let serving = thread::spawn(move || {
        IS_OURS.set(true);
        serve(&listener)
    });
    let (publisher, handle) = channel(Scope::new("c").expect("a plain name"));
    publisher.publish(view(server));
    let mut config = ProxyConfig::new(vec![ListenerConfig::write("127.0.0.1:0")]);
    (config.workers, config.drain) = (1, Duration::from_millis(100));
    let bound = Proxy::bind(config, handle).expect("any free port");
    let address = bound.addresses().listeners[0][0];
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    let proxying = thread::spawn(move || proxy(publisher, bound, stopping));

    let mut client = client(address);
    exchange(&mut client, 100, 100);
    COUNTS.store(true, Ordering::SeqCst);
    for bytes in [1, 100, 4000] {
        exchange(&mut client, bytes, QUERIES);
    }
    COUNTS.store(false, Ordering::SeqCst);
    let in_messages = ALLOCATIONS.swap(0, Ordering::SeqCst);

    // What is counted is counted: a session's beginning does allocate.
    COUNTS.store(true, Ordering::SeqCst);
    let mut other = TcpStream::connect(address).expect("the proxy listens");
    other.write_all(b"\0\0\0\x08\x04\xd2\x16\x2f").expect("sent");
    other.set_read_timeout(Some(PATIENCE)).expect("set");
    other.read_exact(&mut [0]).expect("answered");
    COUNTS.store(false, Ordering::SeqCst);
    let in_a_beginning = ALLOCATIONS.load(Ordering::SeqCst);

    drop((client, other));
    stop.cancel();
    proxying.join().expect("the proxy ends in order");
    let _ = serving.join(); // It has ended by a reset, perhaps.
    println!("{in_messages} allocations for {} messages", 2 * 3 * QUERIES);
    assert_eq!(in_messages, 0);
    assert!(in_a_beginning > 0);
}
