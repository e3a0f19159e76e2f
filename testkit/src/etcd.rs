//! A real etcd of one or three members.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::sync::{Mutex, MutexGuard};

use crate::address::{ETCD_CLIENT_PORT, ETCD_PEER_PORT, at};
use crate::process::{self, Daemon, Signal};
use crate::program;
use crate::site::{Outcome, Site};
use crate::wait::eventually;

const READY_MAX: Duration = Duration::from_secs(30);
const STOP_MAX: Duration = Duration::from_secs(20);
const CALL_MAX: Duration = Duration::from_secs(20);

/// An etcd cluster. It ends with its site.
pub struct Etcd {
    site: Arc<Site>,
    members: Vec<Mutex<Option<Daemon>>>,
    password: Option<String>,
}

/// One key with what etcd keeps beside its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Its value.
    pub value: String,
    /// The lease that it is bound to, 0 for none.
    pub lease: i64,
    /// The revision at which it was created.
    pub create_revision: i64,
    /// The revision at which it was last written.
    pub mod_revision: i64,
}

impl Etcd {
    /// Starts one or three members, and waits until they take writes.
    ///
    /// # Errors
    /// When they do not.
    pub async fn start(site: &Arc<Site>, members: u8) -> Result<Self> {
        ensure!(matches!(members, 1 | 3), "etcd runs with 1 or 3 members, not {members}");
        let members = (0..members).map(|_| Mutex::new(None)).collect();
        let etcd = Self {
            site: Arc::clone(site),
            members,
            password: None,
        };
        for index in 0..etcd.size() {
            etcd.start_member(index).await?;
        }
        etcd.wait_ready().await?;
        Ok(etcd)
    }

    /// Asks for a password from now on; the user is `root`.
    ///
    /// # Errors
    /// When etcd refuses.
    pub async fn enable_auth(&mut self, password: &str) -> Result<()> {
        self.ctl(&["user", "add", &format!("root:{password}")])
            .await?
            .success()?;
        self.ctl(&["user", "grant-role", "root", "root"]).await?.success()?;
        self.ctl(&["auth", "enable"]).await?.success()?;
        self.password = Some(password.to_owned());
        self.wait_ready().await
    }

    /// User and password, once etcd asks for them.
    #[must_use]
    pub fn credentials(&self) -> Option<(&str, &str)> {
        self.password.as_deref().map(|password| ("root", password))
    }

    /// How many members there are.
    ///
    /// # Panics
    /// Never: there are at most three.
    #[must_use]
    pub fn size(&self) -> u8 {
        u8::try_from(self.members.len()).expect("one or three")
    }

    /// `host:port` of each member, for clients.
    #[must_use]
    pub fn hosts(&self) -> Vec<String> {
        (0..self.size())
            .map(|index| self.client_address(index).to_string())
            .collect()
    }

    /// A member's address.
    #[must_use]
    pub fn ip(&self, index: u8) -> Ipv4Addr {
        self.site.addresses().etcd(index)
    }

    /// Where a member answers clients, and tells its metrics.
    #[must_use]
    pub fn client_address(&self, index: u8) -> SocketAddr {
        at(self.ip(index), ETCD_CLIENT_PORT)
    }

    /// The member that leads etcd itself.
    ///
    /// # Errors
    /// When no member says of itself that it does.
    pub async fn leader(&self) -> Result<u8> {
        let text = self.ctl(&["endpoint", "status", "-w", "fields"]).await?.success()?;
        // Fields of one endpoint after the other, in the order in which they were asked.
        let numbers = |name: &str| -> Vec<&str> {
            let values = text.lines().filter_map(|line| line.split_once(" : "));
            values
                .filter(|(field, _)| *field == name)
                .map(|(_, value)| value)
                .collect()
        };
        let (own, leaders) = (numbers("\"MemberID\""), numbers("\"Leader\""));
        let position = own.iter().zip(&leaders).position(|(own, leader)| own == leader);
        let position = position.with_context(|| format!("no etcd member leads:\n{text}"))?;
        u8::try_from(position).context("at most three")
    }

    fn peer_url(&self, index: u8) -> String {
        format!("http://{}", at(self.site.addresses().etcd(index), ETCD_PEER_PORT))
    }

    async fn member(&self, index: u8) -> MutexGuard<'_, Option<Daemon>> {
        self.members[usize::from(index)].lock().await
    }

    /// Starts a member, on the data that it left, if any. Does not wait for it.
    ///
    /// # Errors
    /// When etcd is not installed.
    pub async fn start_member(&self, index: u8) -> Result<()> {
        let data_dir: PathBuf = self.site.make_dir(&format!("etcd{index}"))?;
        let client = format!("http://{}", self.client_address(index));
        let cluster: Vec<String> = (0..self.size())
            .map(|i| format!("etcd{i}={}", self.peer_url(i)))
            .collect();
        let program = match program::etcd() {
            named if named.is_absolute() => self.site.reachable(&named)?,
            on_path => on_path,
        };
        let mut command = self.site.command_at(self.ip(index), program)?;
        command
            .arg("--name")
            .arg(format!("etcd{index}"))
            .arg("--data-dir")
            .arg(data_dir);
        command
            .arg("--listen-client-urls")
            .arg(&client)
            .arg("--advertise-client-urls")
            .arg(&client);
        command.arg("--listen-peer-urls").arg(self.peer_url(index));
        command.arg("--initial-advertise-peer-urls").arg(self.peer_url(index));
        command
            .arg("--initial-cluster")
            .arg(cluster.join(","))
            .arg("--log-level")
            .arg("warn")
            .arg("--logger")
            .arg("zap");
        let daemon = self
            .site
            .start(&format!("etcd{index}"), command)
            .context("etcd is needed (make deps)")?;
        *self.member(index).await = Some(daemon);
        Ok(())
    }

    /// Waits until a write is taken.
    ///
    /// # Errors
    /// When none is within half a minute.
    pub async fn wait_ready(&self) -> Result<()> {
        let ready = eventually("etcd takes writes", READY_MAX, async || {
            self.ctl(&["put", "/testkit/ready", "yes"]).await?.success()?;
            Ok(())
        });
        ready.await
    }

    /// Stops a member with SIGTERM, and waits for its end.
    ///
    /// # Errors
    /// When it does not end.
    pub async fn stop_member(&self, index: u8) -> Result<()> {
        self.end_member(index, Signal::TERM).await
    }

    /// Ends a member with SIGKILL.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn kill_member(&self, index: u8) -> Result<()> {
        self.end_member(index, Signal::KILL).await
    }

    async fn end_member(&self, index: u8, signal: Signal) -> Result<()> {
        let mut daemon = self
            .member(index)
            .await
            .take()
            .with_context(|| format!("etcd{index} does not run"))?;
        process::signal(daemon.pid(), signal)?;
        daemon.end(STOP_MAX).await?;
        Ok(())
    }

    /// Stops a member's process with SIGSTOP: its connections stay open, and nothing answers.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn freeze_member(&self, index: u8) -> Result<()> {
        self.signal_member(index, Signal::STOP).await
    }

    /// Lets a frozen member go on.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn thaw_member(&self, index: u8) -> Result<()> {
        self.signal_member(index, Signal::CONT).await
    }

    async fn signal_member(&self, index: u8, signal: Signal) -> Result<()> {
        let member = self.member(index).await;
        let daemon = member.as_ref().with_context(|| format!("etcd{index} does not run"))?;
        process::signal(daemon.pid(), signal)
    }

    /// Stops all members.
    ///
    /// # Errors
    /// When one does not end.
    pub async fn stop(&self) -> Result<()> {
        for index in 0..self.size() {
            self.stop_member(index).await?;
        }
        Ok(())
    }

    /// Starts all members again on the data that they left, and waits until they take writes.
    ///
    /// # Errors
    /// When they do not.
    pub async fn start_again(&self) -> Result<()> {
        for index in 0..self.size() {
            self.start_member(index).await?;
        }
        self.wait_ready().await
    }

    /// Runs `etcdctl` with `args`.
    ///
    /// # Errors
    /// When it cannot be run.
    pub async fn ctl(&self, args: &[&str]) -> Result<Outcome> {
        let mut command = self.site.command("etcdctl");
        command
            .env("ETCDCTL_API", "3")
            .arg("--endpoints")
            .arg(self.hosts().join(","));
        command.args(["--dial-timeout", "2s", "--command-timeout", "5s"]);
        if let Some((user, password)) = self.credentials() {
            command.arg("--user").arg(format!("{user}:{password}"));
        }
        command.args(args);
        self.site.run(command, CALL_MAX).await
    }

    /// All entries whose key begins with `prefix`, in key order.
    ///
    /// # Errors
    /// When etcd does not answer.
    pub async fn entries(&self, prefix: &str) -> Result<Vec<Entry>> {
        let text = self
            .ctl(&["get", "--prefix", prefix, "-w", "fields"])
            .await?
            .success()?;
        parse_fields(&text)
    }

    /// One key's entry, if there is one.
    ///
    /// # Errors
    /// When etcd does not answer.
    pub async fn entry(&self, key: &str) -> Result<Option<Entry>> {
        let text = self.ctl(&["get", key, "-w", "fields"]).await?.success()?;
        Ok(parse_fields(&text)?.pop())
    }

    /// One key's entry as it was at a revision, if there was one.
    ///
    /// # Errors
    /// When etcd does not answer, or has forgotten that revision.
    pub async fn entry_at(&self, key: &str, revision: i64) -> Result<Option<Entry>> {
        let revision = format!("--rev={revision}");
        let text = self.ctl(&["get", key, &revision, "-w", "fields"]).await?.success()?;
        Ok(parse_fields(&text)?.pop())
    }
}

/// Reads etcdctl's `fields` format: lines of `"Name" : value`, six for each entry, beginning with its key.
fn parse_fields(text: &str) -> Result<Vec<Entry>> {
    let mut entries: Vec<Entry> = Vec::new();
    for line in text.lines() {
        let Some((name, value)) = line.split_once(" : ") else {
            continue;
        };
        if name == "\"Key\"" {
            let key = unquote(value)?;
            entries.push(Entry {
                key,
                value: String::new(),
                lease: 0,
                create_revision: 0,
                mod_revision: 0,
            });
            continue;
        }
        let Some(entry) = entries.last_mut() else { continue }; // The answer's header comes first.
        match name {
            "\"Value\"" => entry.value = unquote(value)?,
            "\"Lease\"" => entry.lease = value.parse()?,
            "\"CreateRevision\"" => entry.create_revision = value.parse()?,
            "\"ModRevision\"" => entry.mod_revision = value.parse()?,
            _ => {}
        }
    }
    Ok(entries)
}

/// Go's quoting is JSON's for the printable texts that are stored.
fn unquote(text: &str) -> Result<String> {
    serde_json::from_str(text).with_context(|| format!("not a quoted text: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site() -> Arc<Site> {
        Arc::new(Site::new().unwrap())
    }

    #[tokio::test]
    async fn data_survives_a_kill_and_a_leased_key_shows_its_lease() {
        let site = site();
        let etcd = Etcd::start(&site, 1).await.unwrap();
        let lease = etcd.ctl(&["lease", "grant", "100"]).await.unwrap().success().unwrap();
        let lease = lease.split(' ').nth(1).unwrap();
        etcd.ctl(&["put", "/a/leader", "node1", "--lease", lease])
            .await
            .unwrap()
            .success()
            .unwrap();
        etcd.ctl(&["put", "/a/config", r#"{"ttl":5,"x":"a\"b"}"#])
            .await
            .unwrap()
            .success()
            .unwrap();
        etcd.kill_member(0).await.unwrap();
        etcd.start_again().await.unwrap();
        let entries = etcd.entries("/a/").await.unwrap();
        assert_eq!(
            (entries[0].key.as_str(), entries[0].value.as_str()),
            ("/a/config", r#"{"ttl":5,"x":"a\"b"}"#)
        );
        assert_eq!(entries[1].lease, i64::from_str_radix(lease, 16).unwrap());
        assert_eq!(etcd.entry("/a/none").await.unwrap(), None);
        site.pass();
    }

    #[tokio::test]
    async fn a_wrong_password_is_refused() {
        let site = site();
        let mut etcd = Etcd::start(&site, 1).await.unwrap();
        etcd.enable_auth("secret").await.unwrap();
        assert!(etcd.entries("/").await.is_ok());
        etcd.password = Some("guessed".to_owned());
        let outcome = etcd.ctl(&["get", "/"]).await.unwrap();
        assert!(
            outcome.code != Some(0) && outcome.stderr.contains("authentication failed"),
            "{outcome:?}"
        );
        site.pass();
    }

    #[tokio::test]
    async fn three_members_go_on_without_one() {
        let site = site();
        let etcd = Etcd::start(&site, 3).await.unwrap();
        etcd.freeze_member(0).await.unwrap();
        etcd.kill_member(1).await.unwrap();
        etcd.start_member(1).await.unwrap();
        etcd.wait_ready().await.unwrap();
        etcd.thaw_member(0).await.unwrap();
        etcd.stop().await.unwrap();
        site.pass();
    }
}
