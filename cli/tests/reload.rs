//! A running `pgherd proxy` is told to read its configuration again.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// Far more than anything here takes: it only turns a hang into a failure.
const PATIENCE: Duration = Duration::from_secs(20);

struct Proxy {
    child: Child,
    file: PathBuf,
    log: Receiver<String>,
    reader: Option<JoinHandle<()>>,
    _dir: tempfile::TempDir,
}

impl Proxy {
    fn start(config: &str) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("proxy.yml");
        fs::write(&file, config).expect("written");
        let mut child = Command::new(env!("CARGO_BIN_EXE_pgherd"))
            .arg("proxy")
            .arg("--config")
            .arg(&file)
            .env_clear()
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        let (lines, log) = sync_channel(10_000);
        let reader = std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                let _ = lines.try_send(line);
            }
        });
        let proxy = Self {
            child,
            file,
            log,
            reader: Some(reader),
            _dir: dir,
        };
        proxy.says("listens on");
        proxy
    }

    /// The log from the last line asked for on, up to the next line with this text.
    fn says(&self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut said = String::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.log.recv_timeout(left);
            let line = line.unwrap_or_else(|_| panic!("it does not say {text:?}, but: {said}"));
            said.push_str(&line);
            said.push('\n');
            if line.contains(text) {
                return said;
            }
        }
    }

    fn reads_again(&self, config: &str) {
        fs::write(&self.file, config).expect("written");
        self.signal(Signal::HUP);
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("it runs");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn free_addresses<const N: usize>() -> [SocketAddr; N] {
    let bound = [(); N].map(|()| TcpListener::bind("127.0.0.1:0").expect("a port"));
    bound.map(|listener| listener.local_addr().expect("bound"))
}

/// No etcd is there, and none is needed: what listens is asked of the proxy alone.
fn config(store: SocketAddr, page: SocketAddr, listeners: &[String], more: &str) -> String {
    let listeners = listeners.join(", ");
    format!(
        "scope: c\netcd3: {{hosts: [\"{store}\"]}}\nproxy:\n  stats: {{address: \"{page}\"}}\n  \
         listeners: [{listeners}]\n{more}"
    )
}

fn listener(address: SocketAddr, role: &str) -> String {
    format!("{{address: \"{address}\", role: {role}}}")
}

fn listens(address: SocketAddr) -> bool {
    TcpStream::connect(address).is_ok()
}

#[test]
fn a_good_file_is_applied_and_a_bad_one_refused_by_key_value_and_fix() {
    let [store, page, first, second] = free_addresses();
    let write = listener(first, "write");
    let mut proxy = Proxy::start(&config(store, page, std::slice::from_ref(&write), ""));
    assert!(listens(first) && !listens(second));

    let both = [write.clone(), listener(second, "read")];
    proxy.reads_again(&config(store, page, &both, ""));
    proxy.says("SIGHUP: the configuration was read again and is in force");
    assert!(listens(first) && listens(second));

    // Refused whole: the good half of it is not applied.
    proxy.reads_again(&config(store, page, &[listener(first, "primary")], "  workers: 0\n"));
    let told = proxy.says("SIGHUP: nothing was changed");
    for finding in [
        "proxy.listeners[0].role: \"primary\" is not known here; write write or read",
        "proxy.workers: 0 is not such a number; write a whole number from 1 up",
    ] {
        assert!(told.contains(finding), "{told}");
    }
    assert!(listens(first) && listens(second));

    // A port that somebody else has.
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let taken_address = taken.local_addr().expect("bound");
    let mut wanted = both.to_vec();
    wanted.push(listener(taken_address, "read"));
    proxy.reads_again(&config(store, page, &wanted[1..], ""));
    let told = proxy.says("proxy.listeners[1].address");
    assert!(
        told.contains("is taken by") && told.contains("write another port"),
        "{told}"
    );
    proxy.says("SIGHUP: nothing was changed");
    assert!(listens(first) && listens(second));

    // No YAML at all.
    proxy.reads_again("proxy: [");
    proxy.says("SIGHUP: nothing was changed");

    // What is for the next start is said, and the rest applied.
    let [other_store] = free_addresses();
    proxy.reads_again(&config(other_store, page, &[write], "  workers: 3\n"));
    let told = proxy.says("SIGHUP: the configuration was read again and is in force");
    for key in ["etcd3.hosts", "proxy.workers"] {
        let finding = format!("{key}: cannot change while the proxy runs");
        assert!(told.contains(&finding), "{told}");
    }
    assert!(listens(first) && !listens(second));

    proxy.signal(Signal::TERM);
    assert_eq!(proxy.child.wait().expect("it ends").code(), Some(0));
}

#[test]
fn a_file_that_a_refused_configuration_lacks_is_enough_once_it_is_there() {
    let [store, page, first] = free_addresses();
    let write = listener(first, "write");
    let proxy = Proxy::start(&config(store, page, std::slice::from_ref(&write), ""));
    let ca = proxy.file.with_file_name("ca.pem");
    let verified = format!("  server_tls: verify-ca\n  server_ca: {}\n", ca.display());
    proxy.reads_again(&config(store, page, std::slice::from_ref(&write), &verified));
    let told = proxy.says("SIGHUP: nothing was changed");
    assert!(told.contains("ca.pem"), "{told}");
    fs::write(&ca, include_str!("data/ca.pem")).expect("written");
    proxy.says("the configuration's files have changed: the configuration was read again and is in force");
}

#[test]
fn the_place_where_a_proxy_is_taken_over_follows_its_configuration() {
    let [store, page, first] = free_addresses();
    let write = listener(first, "write");
    let dir = tempfile::tempdir().expect("a directory");
    let at = |name: &str| {
        let path = dir.path().join(name).join("takeover.sock");
        let more = format!("  takeover: {}\n", path.display());
        (path, config(store, page, std::slice::from_ref(&write), &more))
    };
    let can_be_taken = |path: &PathBuf| {
        let deadline = Instant::now() + PATIENCE;
        while UnixStream::connect(path).is_err() {
            assert!(Instant::now() < deadline, "nobody is at {}", path.display());
            std::thread::yield_now();
        }
    };
    let ((before, first_config), (after, second_config)) = (at("a"), at("b"));
    let proxy = Proxy::start(&first_config);
    can_be_taken(&before);
    proxy.reads_again(&second_config);
    proxy.says("is in force");
    can_be_taken(&after);
    // One where no socket can be changes nothing.
    let (_, third_config) = at(&"c".repeat(100));
    proxy.reads_again(&third_config);
    let told = proxy.says("SIGHUP: nothing was changed");
    assert!(
        told.contains("proxy.takeover: \"/") && told.contains("may have 107"),
        "{told}"
    );
}
