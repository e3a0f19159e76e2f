//! All clients of a run at work: writers and readers on the clients' host, and a writer on each member's own host.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgherd_cluster::clock::Boottime;
use pgherd_testkit::{Cluster, Member, Network, Sql, eventually};
use tokio::sync::watch;
use tokio::task::JoinSet;

use crate::book::{Book, Entries};
use crate::clients::{ROWS, TABLE, read_through, write_locally, write_through};

const WRITERS: u8 = 2;
const READERS: u8 = 4;
const START_MAX: Duration = Duration::from_secs(20);
const COMPARE_MAX: Duration = Duration::from_secs(20);
/// Rows of all writers that show that clients are being served.
const ROWS_GOING_ON: usize = 60;

/// Clients at work, until this is finished or dropped.
pub struct Load {
    book: Arc<Book>,
    through_proxy: JoinSet<()>,
    stop: watch::Sender<bool>,
    local: Vec<JoinHandle<()>>,
}

impl Load {
    /// Empties the table, starts all clients, and waits until they are served.
    ///
    /// # Errors
    /// When they are not.
    pub async fn start(cluster: &Cluster, network: &Arc<Network>) -> Result<Self> {
        let sql = Sql::connect(cluster.write_address(), START_MAX).await?;
        sql.rows(TABLE, START_MAX).await.context("making the table")?;
        let book = Arc::new(Book::default());
        let mut through_proxy = JoinSet::new();
        for number in 0..WRITERS {
            through_proxy.spawn(write_through(cluster.write_address(), number, Arc::clone(&book)));
        }
        for number in 0..READERS {
            through_proxy.spawn(read_through(cluster.read_address(), number, Arc::clone(&book)));
        }
        let (stop, stopped) = watch::channel(false);
        let mut load = Self {
            book,
            through_proxy,
            stop,
            local: Vec::new(),
        };
        for member in cluster.members() {
            let client = start_local(member, network, &load.book, stopped.clone())?;
            load.local.push(client);
        }
        load.goes_on(START_MAX).await?;
        eventually("all readers are answered", START_MAX, async || {
            let readers: BTreeSet<u8> = load.book.open().reads.iter().map(|read| read.reader).collect();
            ensure!(readers.len() == usize::from(READERS), "{readers:?}");
            Ok(())
        })
        .await?;
        Ok(load)
    }

    /// Waits until rows that were sent from now on have been acknowledged to each writer.
    ///
    /// # Errors
    /// When they have not been within `limit`.
    pub async fn goes_on(&self, limit: Duration) -> Result<()> {
        let since = Boottime::now();
        self.rows_since("clients write on", limit, since, |_| true).await
    }

    /// Waits until clients of the proxy have been told of rows by another server than the one at `former`.
    ///
    /// # Errors
    /// When they have not been within `limit`.
    pub async fn moves_from(&self, former: Ipv4Addr, limit: Duration) -> Result<()> {
        let (since, former) = (Boottime::now(), former.to_string());
        let what = format!("clients write to another server than {former}");
        self.rows_since(&what, limit, since, |server| server != former).await
    }

    async fn rows_since(
        &self,
        what: &str,
        limit: Duration,
        since: Boottime,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let going_on = eventually(what, limit, async || {
            let entries = self.book.open();
            let later = entries.acks.iter().rev().take_while(|ack| ack.at > since);
            let rows = later.filter(|ack| ack.sent > since && wanted(&ack.server)).count();
            ensure!(rows >= ROWS_GOING_ON, "{rows} rows; errors {:?}", entries.errors);
            Ok(())
        });
        going_on.await
    }

    /// The server that reader 0 was answered by last.
    ///
    /// # Errors
    /// When it never was.
    pub fn server_of_a_reader(&self) -> Result<String> {
        let entries = self.book.open();
        let last = entries.reads.iter().rfind(|read| read.reader == 0);
        Ok(last.context("nobody was answered")?.server.clone())
    }

    /// Stops all clients, and returns what they noted and when they were stopped.
    pub async fn stop(mut self) -> (Entries, Boottime) {
        let end = Boottime::now();
        self.through_proxy.shutdown().await;
        self.stop_local();
        (std::mem::take(&mut *self.book.open()), end)
    }

    fn stop_local(&mut self) {
        self.stop.send_replace(true);
        for client in self.local.drain(..) {
            if client.join().is_err() {
                eprintln!("a client on a member's host has panicked");
            }
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop_local();
    }
}

/// A thread, because what host a socket is on is decided by the thread that makes it.
fn start_local(
    member: &Member,
    network: &Arc<Network>,
    book: &Arc<Book>,
    mut stopped: watch::Receiver<bool>,
) -> Result<JoinHandle<()>> {
    let (name, address, ip) = (member.name().to_owned(), member.postgres(), member.ip());
    let (network, book) = (Arc::clone(network), Arc::clone(book));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let client = std::thread::Builder::new().name(format!("local-{name}"));
    let started = client.spawn(move || {
        if let Err(error) = network.enter(ip) {
            eprintln!("{error:#}");
            return;
        }
        runtime.block_on(async {
            tokio::select! {
                () = write_locally(address, name, book) => {}
                _ = stopped.wait_for(|stopped| *stopped) => {}
            }
        });
    });
    Ok(started?)
}

/// The rows that a server holds, by writer's name and number.
///
/// # Errors
/// When it cannot be read.
pub async fn rows_of(member: &Member) -> Result<BTreeSet<(String, u64)>> {
    let rows = member.client().await?.rows(ROWS, COMPARE_MAX).await?;
    let mut held = BTreeSet::new();
    for row in rows {
        let (writer, seq) = row.get(0).zip(row.get(1)).context("a row of two columns")?;
        held.insert((writer.to_owned(), seq.parse()?));
    }
    Ok(held)
}
