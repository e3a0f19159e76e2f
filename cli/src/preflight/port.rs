//! Whether an address can be listened on, and who is there already.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};
use std::path::Path;

use pgherd_cluster::record::Address;

/// A process that listens on a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) pid: u32,
    /// The kernel's short name for it.
    pub(crate) name: String,
    /// The program that it was started as. No arguments: they may hold a secret.
    pub(crate) program: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, name, program } = self;
        if program.is_empty() || program == name {
            write!(f, "pid {pid} ({name})")
        } else {
            write!(f, "pid {pid} ({name}: {program})")
        }
    }
}

/// Why an address cannot be listened on.
#[derive(Debug)]
pub(crate) enum Taken {
    /// Somebody listens there; who, if it can be seen.
    By(Vec<Holder>),
    /// The address is not this machine's, the port is privileged, or the like.
    Impossible(io::Error),
}

/// Tries to listen on `address`, for a moment.
pub(crate) fn probe(address: &Address) -> Result<(), Taken> {
    let host = if address.host == "*" {
        "0.0.0.0"
    } else {
        address.host.as_str()
    };
    let resolved = (host, address.port).to_socket_addrs().map_err(Taken::Impossible)?;
    for socket in resolved {
        match TcpListener::bind(socket) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::AddrInUse => {
                return Err(Taken::By(holders(Path::new("/proc"), socket)));
            }
            Err(error) => return Err(Taken::Impossible(error)),
        }
    }
    Ok(())
}

/// What an operator is told about an address under `key` that cannot be listened on.
pub(crate) fn finding(key: &str, address: &Address, taken: &Taken) -> String {
    match taken {
        Taken::By(holders) if holders.is_empty() => format!(
            "{key}: port {} of \"{address}\" is taken by a process that this user may not see; ask root with `ss -ltnp`, or write another port",
            address.port
        ),
        Taken::By(holders) => {
            let names: Vec<String> = holders.iter().map(Holder::to_string).collect();
            format!(
                "{key}: port {} of \"{address}\" is taken by {}; stop it, or write another port",
                address.port,
                names.join(" and ")
            )
        }
        Taken::Impossible(error) if error.kind() == ErrorKind::AddrNotAvailable => {
            format!(
                "{key}: \"{address}\" is not an address of this machine; write one of its own, or 0.0.0.0:{}",
                address.port
            )
        }
        Taken::Impossible(error) => format!("{key}: \"{address}\" cannot be listened on: {error}; write another"),
    }
}

/// Who listens where `wanted` would, as far as this user may see.
pub(crate) fn holders(proc: &Path, wanted: SocketAddr) -> Vec<Holder> {
    let tables = ["net/tcp", "net/tcp6"].map(|table| fs::read_to_string(proc.join(table)).unwrap_or_default());
    let inodes: HashSet<u64> = tables
        .iter()
        .flat_map(|table| listening_inodes(table, wanted))
        .collect();
    if inodes.is_empty() {
        return Vec::new();
    }
    let mut holders: Vec<Holder> = processes(proc)
        .filter(|pid| holds(proc, *pid, &inodes))
        .map(|pid| describe(proc, pid))
        .collect();
    holders.sort_by_key(|holder| holder.pid);
    // Children that inherited the socket add nothing.
    holders.truncate(1);
    holders
}

/// The inodes of listening sockets in the way of `wanted`, in a table as the kernel prints it, see proc_net_tcp.txt of the
/// kernel. The same port on another address of this machine is nobody's business.
fn listening_inodes(table: &str, wanted: SocketAddr) -> Vec<u64> {
    const LISTEN: &str = "0A";
    let of = |line: &str| {
        let mut fields = line.split_whitespace();
        let local = fields.nth(1)?;
        let state = fields.nth(1)?;
        let inode = fields.nth(5)?;
        let (address, port) = local.rsplit_once(':')?;
        let same_port = u16::from_str_radix(port, 16).ok()? == wanted.port();
        let in_the_way = same_port && overlaps(kernel_address(address)?, wanted.ip());
        (state == LISTEN && in_the_way).then(|| inode.parse().ok())?
    };
    table.lines().skip(1).filter_map(of).collect()
}

/// An address as the kernel prints it: each 32 bits of the wire's order as one number of this machine's order.
fn kernel_address(hex: &str) -> Option<IpAddr> {
    let word = |index: usize| {
        let digits = hex.get(index * 8..index * 8 + 8)?;
        u32::from_str_radix(digits, 16).ok().map(u32::to_ne_bytes)
    };
    match hex.len() {
        8 => Some(IpAddr::from(word(0)?)),
        32 => {
            let bytes: Vec<u8> = [word(0)?, word(1)?, word(2)?, word(3)?].concat();
            Some(IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical())
        }
        _ => None,
    }
}

fn overlaps(held: IpAddr, wanted: IpAddr) -> bool {
    held == wanted.to_canonical() || held.is_unspecified() || wanted.is_unspecified()
}

fn processes(proc: &Path) -> impl Iterator<Item = u32> {
    let entries = fs::read_dir(proc).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn holds(proc: &Path, pid: u32, inodes: &HashSet<u64>) -> bool {
    let Ok(descriptors) = fs::read_dir(proc.join(pid.to_string()).join("fd")) else {
        return false;
    };
    descriptors.flatten().any(|descriptor| {
        let target = fs::read_link(descriptor.path()).unwrap_or_default();
        let inode = target
            .to_str()
            .and_then(|target| target.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        inode.is_some_and(|inode: u64| inodes.contains(&inode))
    })
}

fn describe(proc: &Path, pid: u32) -> Holder {
    let read = |file: &str| fs::read_to_string(proc.join(pid.to_string()).join(file)).unwrap_or_default();
    let command_line = read("cmdline");
    // PostgreSQL's backends write their title over the whole line, with spaces.
    let program = command_line
        .split(['\0', ' '])
        .next()
        .unwrap_or_default()
        .trim_end_matches(':')
        .to_owned();
    Holder {
        pid,
        name: read("comm").trim().to_owned(),
        program,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:1538 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 111 1 0000 100 0 0 10 0
   1: 0100007F:1539 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 222 1 0000 100 0 0 10 0
   2: 0100007F:1538 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 333 1 0000 100 0 0 10 0
   garbage
";

    #[test]
    fn only_listening_sockets_of_that_port_count() {
        let inodes = |table, address: &str| listening_inodes(table, address.parse().expect("an address"));
        let none = Vec::<u64>::new();
        assert_eq!(inodes(TABLE, "127.0.0.1:5432"), [111]);
        assert_eq!(inodes(TABLE, "0.0.0.0:5433"), [222]);
        assert_eq!(inodes(TABLE, "127.0.0.2:5432"), none, "another address");
        assert_eq!(inodes(TABLE, "127.0.0.1:5434"), none);
        assert_eq!(inodes("", "127.0.0.1:5432"), none);
    }

    #[test]
    fn addresses_of_both_families_are_read_from_the_kernels_tables() {
        let v4 = u32::from_ne_bytes([127, 0, 0, 1]);
        assert_eq!(kernel_address(&format!("{v4:08X}")), Some(IpAddr::from([127, 0, 0, 1])));
        let last = u32::from_ne_bytes([0, 0, 0, 1]);
        assert_eq!(kernel_address(&format!("{:024X}{last:08X}", 0)), "::1".parse().ok());
        assert_eq!(kernel_address("12"), None);
    }

    #[test]
    fn a_taken_port_is_told_with_its_holder_who_is_this_very_test() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let address = Address {
            host: "127.0.0.1".to_owned(),
            port,
        };
        let Err(taken) = probe(&address) else {
            panic!("the port is taken")
        };
        let Taken::By(holders) = &taken else {
            panic!("{taken:?}")
        };
        assert_eq!(
            holders.iter().map(|holder| holder.pid).collect::<Vec<_>>(),
            [std::process::id()]
        );
        let finding = finding("restapi.listen", &address, &taken);
        let start = format!(
            "restapi.listen: port {port} of \"127.0.0.1:{port}\" is taken by pid {} (",
            std::process::id()
        );
        assert!(
            finding.starts_with(&start) && finding.ends_with("; stop it, or write another port"),
            "{finding}"
        );
        drop(listener);
        assert!(probe(&address).is_ok());
    }

    #[test]
    fn a_foreign_address_is_told_as_such() {
        let address = Address {
            host: "192.0.2.1".to_owned(),
            port: 5432,
        };
        let Err(taken) = probe(&address) else {
            panic!("that address is nobody's")
        };
        assert_eq!(
            finding("postgresql.listen", &address, &taken),
            "postgresql.listen: \"192.0.2.1:5432\" is not an address of this machine; write one of its own, or 0.0.0.0:5432"
        );
    }

    #[test]
    fn an_unseen_holder_is_said_to_be_unseen() {
        let address = Address {
            host: "a".to_owned(),
            port: 1,
        };
        assert!(finding("k", &address, &Taken::By(vec![])).contains("this user may not see"));
    }
}
