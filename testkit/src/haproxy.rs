//! An HAProxy as the field puts it before Patroni: two listeners that ask each member's REST interface for its role.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context, Result};

use crate::address::{READ_PORT, REST_PORT, WRITE_PORT, at};
use crate::member::Member;
use crate::process::Daemon;
use crate::program;
use crate::site::Site;

/// Debian has it in a directory that is not on everybody's `PATH`.
const DEBIAN: &str = "/usr/sbin/haproxy";

/// A running HAProxy. It ends with its site.
pub struct HaProxy {
    ip: Ipv4Addr,
    _daemon: Daemon,
}

impl HaProxy {
    /// Starts one on `ip` before `members`. Does not wait for it.
    ///
    /// # Errors
    /// When it is not installed.
    pub fn start<'a>(site: &Arc<Site>, ip: Ipv4Addr, members: impl Iterator<Item = &'a Member>) -> Result<Self> {
        let program = program::find("haproxy").unwrap_or_else(|| DEBIAN.into());
        let file = site.write_file("haproxy.cfg", &configuration(ip, members))?;
        let mut command = site.command(program);
        command.arg("-db").arg("-f").arg(file);
        let daemon = site
            .start("haproxy", command)
            .context("HAProxy is needed (scripts/deps.sh tests)")?;
        Ok(Self { ip, _daemon: daemon })
    }

    /// Where it takes writes.
    #[must_use]
    pub fn write_address(&self) -> SocketAddr {
        at(self.ip, WRITE_PORT)
    }

    /// Where it takes reads.
    #[must_use]
    pub fn read_address(&self) -> SocketAddr {
        at(self.ip, READ_PORT)
    }
}

/// The usual checks, but each second instead of every three.
fn configuration<'a>(ip: Ipv4Addr, members: impl Iterator<Item = &'a Member>) -> String {
    let mut text = String::from(
        "global\n    maxconn 200\n\ndefaults\n    mode tcp\n    retries 2\n    timeout client 30m\n    timeout connect 4s\n    \
         timeout server 30m\n    timeout check 5s\n",
    );
    let servers: Vec<String> = members
        .map(|member| {
            let (name, address) = (member.name(), member.postgres());
            format!("    server {name} {address} maxconn 100 check port {REST_PORT}\n")
        })
        .collect();
    for (name, port, path) in [("write", WRITE_PORT, "/primary"), ("read", READ_PORT, "/replica")] {
        text.push_str(&format!(
            "\nlisten {name}\n    bind {}\n    option httpchk GET {path}\n    http-check expect status 200\n    \
             default-server inter 1s fall 3 rise 2 on-marked-down shutdown-sessions\n{}",
            at(ip, port),
            servers.concat(),
        ));
    }
    text
}
