//! Hosts on one machine: network namespaces on a switch in a namespace of its own, and what can go wrong between them.
//!
//! The machine's own network is never touched. What goes wrong goes wrong in the switch, as packets that are dropped
//! without a word: the hosts see neither a link that is down nor a refusal, only silence.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use rustix::process::{geteuid, getpid};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::process;
use crate::program;

/// Where `ip netns` keeps the names of namespaces.
const NAMES: &str = "/run/netns";
const PREFIX: &str = "pgherd-net-";
/// The switch's name among the hosts'.
const SWITCH: &str = "switch";
/// The host that clients run on.
const CLIENT: u8 = 221;

/// A member's host, an etcd member's, the proxy's, the clients'.
#[derive(Clone, Debug)]
struct Host {
    name: String,
    ip: Ipv4Addr,
}

/// Hosts on a switch. They are gone when this is dropped.
#[derive(Debug)]
pub struct Network {
    prefix: String,
    subnet: [u8; 3],
    hosts: Vec<Host>,
    rules: Mutex<Vec<String>>,
}

impl Network {
    /// Makes hosts for `members` members, `etcd` etcd members, a proxy and clients. What a process that was killed has
    /// left of its own is removed.
    ///
    /// # Errors
    /// When this is not root, or `ip`, `nft` or `nsenter` is missing or refuses.
    pub fn new(members: u8, etcd: u8) -> Result<Self> {
        ensure!(geteuid().is_root(), "network namespaces need root: run this as root");
        for (name, package) in [("ip", "iproute2"), ("nft", "nftables"), ("nsenter", "util-linux")] {
            let found = program::find(name).is_some() || Path::new("/usr/sbin").join(name).is_file();
            ensure!(found, "{name} is needed and not here: apt-get install {package}");
        }
        sweep();
        let pid = std::process::id();
        let started = process::look(getpid()).map_or(0, |me| me.started);
        let subnet = [10, 77, u8::try_from(pid % 250).unwrap_or_default()];
        let ip = |host: u8| Ipv4Addr::new(subnet[0], subnet[1], subnet[2], host);
        let mut hosts = Vec::new();
        let mut add = |name: String, host: u8| hosts.push(Host { name, ip: ip(host) });
        (0..members).for_each(|index| add(format!("m{}", index + 1), 1 + index));
        (0..etcd).for_each(|index| add(format!("etcd{index}"), 101 + index));
        add("proxy".to_owned(), 201);
        add("client".to_owned(), CLIENT);
        let network = Self {
            prefix: format!("{PREFIX}{pid}-{started}-"),
            subnet,
            hosts,
            rules: Mutex::new(Vec::new()),
        };
        network.build()?;
        Ok(network)
    }

    fn build(&self) -> Result<()> {
        let mut script = format!("netns add {}\n", self.namespace(SWITCH));
        for host in &self.hosts {
            writeln!(script, "netns add {}", self.namespace(&host.name))?;
        }
        ip_batch(None, &script)?;
        let mut script = String::from("link add name switch type bridge\nlink set dev switch up\n");
        for host in &self.hosts {
            let (port, namespace) = (port(host), self.namespace(&host.name));
            writeln!(
                script,
                "link add name {port} type veth peer name eth0 netns {namespace}"
            )?;
            writeln!(script, "link set dev {port} master switch up")?;
        }
        ip_batch(Some(&self.namespace(SWITCH)), &script)?;
        for host in &self.hosts {
            let script = format!(
                "link set dev lo up\naddress add {}/24 dev eth0\nlink set dev eth0 up\n",
                host.ip
            );
            ip_batch(Some(&self.namespace(&host.name)), &script)?;
        }
        Ok(())
    }

    /// The first three bytes of every host's address.
    #[must_use]
    pub const fn subnet(&self) -> [u8; 3] {
        self.subnet
    }

    /// All hosts' addresses, as in `10.77.3.0/24`.
    #[must_use]
    pub fn cidr(&self) -> String {
        let [one, two, three] = self.subnet;
        format!("{one}.{two}.{three}.0/24")
    }

    /// The clients' host.
    #[must_use]
    pub const fn client(&self) -> Ipv4Addr {
        Ipv4Addr::new(self.subnet[0], self.subnet[1], self.subnet[2], CLIENT)
    }

    fn namespace(&self, host: &str) -> String {
        format!("{}{host}", self.prefix)
    }

    fn host(&self, ip: Ipv4Addr) -> Result<&Host> {
        let found = self.hosts.iter().find(|host| host.ip == ip);
        found.with_context(|| format!("no host has the address {ip}"))
    }

    /// The file that names a host's namespace.
    ///
    /// # Errors
    /// When no host has this address.
    pub fn namespace_file(&self, ip: Ipv4Addr) -> Result<PathBuf> {
        Ok(Path::new(NAMES).join(self.namespace(&self.host(ip)?.name)))
    }

    /// Moves the calling thread, and the threads and processes that it starts from now on, onto a host.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn enter(&self, ip: Ipv4Addr) -> Result<()> {
        let file = self.namespace_file(ip)?;
        let namespace = File::open(&file).with_context(|| format!("opening {}", file.display()))?;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .with_context(|| format!("entering {}", file.display()))
    }

    /// From now on, nothing goes between a host and all others.
    ///
    /// # Errors
    /// When the switch cannot be told.
    pub fn isolate(&self, ip: Ipv4Addr) -> Result<()> {
        self.drop_packets(&[format!("ip saddr {ip} drop"), format!("ip daddr {ip} drop")])
    }

    /// From now on, nothing goes between a host and some others.
    ///
    /// # Errors
    /// When the switch cannot be told.
    pub fn cut(&self, ip: Ipv4Addr, others: &[Ipv4Addr]) -> Result<()> {
        let others = set(others);
        self.drop_packets(&[
            format!("ip saddr {ip} ip daddr {others} drop"),
            format!("ip saddr {others} ip daddr {ip} drop"),
        ])
    }

    /// From now on, nothing goes between a TCP port of a host and some others.
    ///
    /// # Errors
    /// When the switch cannot be told.
    pub fn cut_port(&self, ip: Ipv4Addr, port: u16, others: &[Ipv4Addr]) -> Result<()> {
        let others = set(others);
        self.drop_packets(&[
            format!("ip saddr {ip} ip daddr {others} tcp sport {port} drop"),
            format!("ip saddr {others} ip daddr {ip} tcp dport {port} drop"),
        ])
    }

    /// Takes a host's cable out of the switch.
    ///
    /// # Errors
    /// When the switch cannot be told.
    pub fn unplug(&self, ip: Ipv4Addr) -> Result<()> {
        let script = format!("link set dev {} down\n", port(self.host(ip)?));
        ip_batch(Some(&self.namespace(SWITCH)), &script)
    }

    /// Ends whatever the other functions have begun.
    ///
    /// # Errors
    /// When the switch cannot be told.
    pub fn heal(&self) -> Result<()> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.tell_switch(&[])?;
        let mut script = String::new();
        for host in &self.hosts {
            writeln!(script, "link set dev {} up", port(host))?;
        }
        ip_batch(Some(&self.namespace(SWITCH)), &script)
    }

    fn drop_packets(&self, more: &[String]) -> Result<()> {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        rules.extend_from_slice(more);
        self.tell_switch(&rules)
    }

    /// Replaces the switch's rules in one transaction.
    fn tell_switch(&self, rules: &[String]) -> Result<()> {
        let mut script = String::from("add table bridge chaos\ndelete table bridge chaos\n");
        writeln!(script, "table bridge chaos {{\n chain forward {{")?;
        writeln!(script, "  type filter hook forward priority 0; policy accept;")?;
        for rule in rules {
            writeln!(script, "  {rule}")?;
        }
        writeln!(script, " }}\n}}")?;
        let mut nft = Command::new("nsenter");
        nft.arg(format!("--net={NAMES}/{}", self.namespace(SWITCH)))
            .args(["nft", "-f", "-"]);
        feed(nft, &script)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        remove_namespaces(&self.prefix);
    }
}

/// A host's end of the cable in the switch.
fn port(host: &Host) -> String {
    format!("to-{}", host.name)
}

/// As nft writes a set of addresses.
fn set(ips: &[Ipv4Addr]) -> String {
    let ips: Vec<String> = ips.iter().map(Ipv4Addr::to_string).collect();
    format!("{{ {} }}", ips.join(", "))
}

fn ip_batch(namespace: Option<&str>, script: &str) -> Result<()> {
    let mut ip = Command::new("ip");
    if let Some(namespace) = namespace {
        ip.args(["-netns", namespace]);
    }
    ip.args(["-batch", "-"]);
    feed(ip, script)
}

fn feed(mut command: Command, script: &str) -> Result<()> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let shown = format!("{command:?}");
    let output = process::start_own(|| command.spawn(), |child| Some(child.id()))
        .and_then(|mut child| {
            if let Some(mut stdin) = child.stdin.take() {
                stdin.write_all(script.as_bytes())?;
            }
            child.wait_with_output()
        })
        .with_context(|| format!("running {shown}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{shown}: {said}\n{script}");
    Ok(())
}

fn remove_namespaces(prefix: &str) {
    for entry in fs::read_dir(NAMES).into_iter().flatten().flatten() {
        let name = entry.file_name();
        if name.to_string_lossy().starts_with(prefix) {
            // The cables go with the namespaces, as soon as nothing runs in them any more.
            if let Err(error) = ip_batch(None, &format!("netns delete {}\n", name.display())) {
                eprintln!("{error:#}");
            }
        }
    }
}

/// Removes the namespaces of processes that are gone.
fn sweep() {
    for entry in fs::read_dir(NAMES).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let mut parts = name.strip_prefix(PREFIX).unwrap_or_default().split('-');
        let (Some(Ok(pid)), Some(Ok(started))) =
            (parts.next().map(str::parse::<i32>), parts.next().map(str::parse::<u64>))
        else {
            continue;
        };
        let owner = process::Pid::from_raw(pid).and_then(process::look);
        if owner.is_none_or(|owner| owner.started != started || owner.is_zombie) {
            remove_namespaces(&format!("{PREFIX}{pid}-{started}-"));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;

    /// Runs on a thread of its own on the host: a test's own thread stays where it is.
    fn on_host<T: Send>(network: &Network, ip: Ipv4Addr, run: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                network.enter(ip).unwrap();
                run()
            });
            inside.join().unwrap()
        })
    }

    #[test]
    fn a_cut_is_silent_and_heals() {
        if !geteuid().is_root() {
            println!("skipped: network namespaces need root");
            return;
        }
        let network = Network::new(2, 1).unwrap();
        let [one, two, three, _] = network.subnet.iter().copied().chain([1]).collect::<Vec<u8>>()[..] else {
            unreachable!("three bytes and one")
        };
        let (m1, m2) = (Ipv4Addr::new(one, two, three, 1), Ipv4Addr::new(one, two, three, 2));
        let listener = on_host(&network, m1, || TcpListener::bind((m1, 5000)).unwrap());
        let connect = || {
            on_host(&network, m2, || {
                TcpStream::connect_timeout(&(m1, 5000).into(), Duration::from_millis(300)).map_err(|e| e.kind())
            })
        };
        assert!((0..20).any(|_| connect().is_ok()));
        network.cut_port(m1, 5000, &[m2]).unwrap();
        assert_eq!(connect().unwrap_err(), std::io::ErrorKind::TimedOut);
        network.heal().unwrap();
        assert!((0..20).any(|_| connect().is_ok()));
        network.isolate(m2).unwrap();
        network.unplug(m2).unwrap();
        assert!(connect().is_err());
        network.heal().unwrap();
        // The hosts may have to find each other's hardware addresses again.
        assert!((0..20).any(|_| connect().is_ok()));
        drop(listener);
        let prefix = network.prefix.clone();
        drop(network);
        let left = fs::read_dir(NAMES).unwrap().flatten();
        assert_eq!(
            left.filter(|e| e.file_name().to_string_lossy().starts_with(&prefix))
                .count(),
            0
        );
    }
}
