//! Where writes through a proxy land: each acknowledged one tells which member took it, on which timeline, and is held
//! against who held the leader key meanwhile.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use crate::cluster::Cluster;
use crate::holders::HolderWatch;
use crate::sql::{Sql, SqlFailure};
use crate::wait::eventually;

const PACE: Duration = Duration::from_millis(15);
/// A client waits this long for an answer, then gives up and connects anew.
const ANSWER_MAX: Duration = Duration::from_secs(40);
const GOES_ON_MAX: Duration = Duration::from_secs(60);
/// How much later than the writers' own news that of the leader key may come, on a machine that has other work.
const NEWS_LATE_MAX: Duration = Duration::from_secs(2);
const TABLE: &str = "CREATE TABLE IF NOT EXISTS landed (writer int NOT NULL, seq bigint NOT NULL)";

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Reign {
    address: String,
    timeline: String,
}

#[derive(Clone, Debug)]
struct Landed {
    reign: Reign,
    sent: Instant,
    acknowledged: Instant,
}

#[derive(Default)]
struct Book {
    landed: Vec<Landed>,
    errors: BTreeMap<String, usize>,
}

/// Writers at work on a write port, until this is finished or dropped.
pub struct Landing {
    book: Arc<Mutex<Book>>,
    tasks: JoinSet<()>,
}

fn open(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Landing {
    /// Makes the table, and starts `writers`, each in sessions of its own.
    ///
    /// # Errors
    /// When the table cannot be made.
    pub async fn start(write: SocketAddr, writers: u32) -> Result<Self> {
        Sql::connect(write, ANSWER_MAX).await?.rows(TABLE, ANSWER_MAX).await?;
        let book = Arc::new(Mutex::new(Book::default()));
        let mut tasks = JoinSet::new();
        for writer in 0..writers {
            tasks.spawn(write_rows(write, writer, Arc::clone(&book)));
        }
        let landing = Self { book, tasks };
        landing.goes_on().await?;
        Ok(landing)
    }

    /// Waits until some more writes have landed.
    ///
    /// # Errors
    /// When none has within a minute.
    pub async fn goes_on(&self) -> Result<()> {
        let since = Instant::now();
        eventually("writes land", GOES_ON_MAX, async || {
            let book = open(&self.book);
            let count = book.landed.iter().filter(|landed| landed.sent > since).count();
            ensure!(count > 50, "{count} since, errors {:?}", book.errors);
            Ok(())
        })
        .await
    }

    /// Stops, and judges: no write was refused because a replica got it, each one landed at a member that held the key
    /// meanwhile, and no two members took writes at once. Answers with the errors that writers met, by their codes.
    ///
    /// # Errors
    /// When one of that is not so.
    pub async fn finish(mut self, cluster: &Cluster, holders: &HolderWatch) -> Result<BTreeMap<String, usize>> {
        self.tasks.shutdown().await;
        let book = std::mem::take(&mut *open(&self.book));
        ensure!(
            !book.errors.contains_key("25006"),
            "a write was routed to a replica: {:?}",
            book.errors
        );
        let holdings = holders.holdings();
        for landed in &book.landed {
            let of = |name: &str| cluster.member(name).map(|member| member.postgres().ip().to_string());
            let fits = holdings.iter().any(|holding| {
                of(&holding.holder).is_ok_and(|address| address == landed.reign.address)
                    && holding.since <= landed.acknowledged + NEWS_LATE_MAX
                    && holding.until.is_none_or(|until| until + NEWS_LATE_MAX >= landed.sent)
            });
            ensure!(fits, "{landed:?} did not land at a holder of the key: {holdings:?}");
        }
        one_after_the_other(&book.landed)?;
        println!("{} writes landed; errors {:?}", book.landed.len(), book.errors);
        Ok(book.errors)
    }
}

/// Of two reigns, the earlier one took nothing that was sent after the later one's first acknowledgement.
fn one_after_the_other(landed: &[Landed]) -> Result<()> {
    let mut reigns: BTreeMap<&Reign, (Instant, Instant)> = BTreeMap::new();
    for landed in landed {
        let (first_acknowledged, last_sent) = reigns
            .entry(&landed.reign)
            .or_insert((landed.acknowledged, landed.sent));
        *first_acknowledged = landed.acknowledged.min(*first_acknowledged);
        *last_sent = landed.sent.max(*last_sent);
    }
    let mut reigns: Vec<(&Reign, (Instant, Instant))> = reigns.into_iter().collect();
    reigns.sort_by_key(|(_, (first_acknowledged, _))| *first_acknowledged);
    for (index, (later, (first_acknowledged, _))) in reigns.iter().enumerate() {
        for (earlier, (_, last_sent)) in &reigns[..index] {
            ensure!(
                last_sent <= first_acknowledged,
                "{earlier:?} took a write after {later:?} had acknowledged one"
            );
        }
    }
    Ok(())
}

async fn write_rows(address: SocketAddr, writer: u32, book: Arc<Mutex<Book>>) {
    let mut pace = interval(PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut connection = None;
    for seq in 1_u64.. {
        pace.tick().await;
        match write_row(address, &mut connection, writer, seq).await {
            Ok(landed) => open(&book).landed.push(landed),
            Err(failure) => {
                connection = None;
                *open(&book).errors.entry(failure.code().to_owned()).or_default() += 1;
            }
        }
    }
}

async fn write_row(
    address: SocketAddr,
    connection: &mut Option<Sql>,
    writer: u32,
    seq: u64,
) -> Result<Landed, SqlFailure> {
    let sql = match connection {
        Some(sql) => sql,
        None => connection.insert(Sql::connect(address, ANSWER_MAX).await?),
    };
    let insert = format!(
        "INSERT INTO landed VALUES ({writer}, {seq}) \
         RETURNING host(inet_server_addr()), left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)"
    );
    let sent = Instant::now();
    let rows = sql.rows(&insert, ANSWER_MAX).await?;
    let column = |index| {
        rows.first()
            .and_then(|row| row.get(index))
            .unwrap_or_default()
            .to_owned()
    };
    Ok(Landed {
        reign: Reign {
            address: column(0),
            timeline: column(1),
        },
        sent,
        acknowledged: Instant::now(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_that_take_writes_at_once_are_found() {
        let at = Instant::now();
        let landed = |address: &str, sent: u64, acknowledged: u64| Landed {
            reign: Reign {
                address: address.to_owned(),
                timeline: address.to_owned(),
            },
            sent: at + Duration::from_millis(sent),
            acknowledged: at + Duration::from_millis(acknowledged),
        };
        let one = [landed("a", 0, 1), landed("a", 10, 25), landed("b", 15, 20)];
        one_after_the_other(&one).unwrap();
        let two = [landed("a", 0, 1), landed("b", 15, 20), landed("a", 21, 25)];
        assert!(one_after_the_other(&two).is_err());
    }
}
