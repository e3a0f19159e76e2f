//! Clients: one row per transaction and one answer at a time, each noted with the time and the server that it came from.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_testkit::{Sql, SqlFailure};
use tokio::time::{MissedTickBehavior, interval};

use crate::book::Book;
use crate::judge::{Ack, Read, Writer};

/// The table that all of them write to. A number is used once, whatever became of it.
pub const TABLE: &str = "CREATE TABLE IF NOT EXISTS chaos_row (writer text, seq bigint, PRIMARY KEY (writer, seq)); \
                         TRUNCATE chaos_row";
/// All rows of it.
pub const ROWS: &str = "SELECT writer, seq FROM chaos_row";

const WRITE_PACE: Duration = Duration::from_millis(20);
const READ_PACE: Duration = Duration::from_millis(25);
/// Between two looks whether a replica has become the leader.
const LOOK_PACE: Duration = Duration::from_millis(50);
const CONNECT_MAX: Duration = Duration::from_secs(15);
const LOCAL_CONNECT_MAX: Duration = Duration::from_secs(1);
/// Most applications wait for ever: how long it is for them is what is measured.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// Writes through the proxy until it is dropped.
pub async fn write_through(address: SocketAddr, number: u8, book: Arc<Book>) {
    let writer = Writer::Proxy(number);
    let mut pace = interval(WRITE_PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut connection = None;
    for seq in 1_u64.. {
        pace.tick().await;
        match write(address, CONNECT_MAX, &mut connection, &writer, seq).await {
            Ok(ack) => book.ack(ack),
            Err(failure) => {
                connection = None;
                book.error("write", failure.code());
            }
        }
    }
}

/// Reads through the proxy until it is dropped.
pub async fn read_through(address: SocketAddr, reader: u8, book: Arc<Book>) {
    let mut pace = interval(READ_PACE);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut connection = None;
    loop {
        pace.tick().await;
        let asked = async {
            let sql = connected(address, CONNECT_MAX, &mut connection).await?;
            sql.value("SELECT host(inet_server_addr()) FROM chaos_row LIMIT 1", ANSWER_MAX)
                .await
        };
        match asked.await {
            Ok(server) => book.read(Read {
                reader,
                server,
                at: Boottime::now(),
            }),
            Err(failure) => {
                connection = None;
                book.error("read", failure.code());
            }
        }
    }
}

/// Writes to one member's own PostgreSQL, whenever that takes writes, until it is dropped.
pub async fn write_locally(address: SocketAddr, member: String, book: Arc<Book>) {
    let writer = Writer::Local(member);
    let mut write_pace = interval(WRITE_PACE);
    write_pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut look_pace = interval(LOOK_PACE);
    look_pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut connection = None;
    for seq in 1_u64.. {
        write_pace.tick().await;
        while !takes_writes(address, &mut connection).await {
            look_pace.tick().await;
        }
        match write(address, LOCAL_CONNECT_MAX, &mut connection, &writer, seq).await {
            Ok(ack) => book.ack(ack),
            Err(_) => connection = None, // A member that is down takes no writes; that is no error.
        }
    }
}

/// Asked before each write, or a replica's log would fill with refusals.
async fn takes_writes(address: SocketAddr, connection: &mut Option<Sql>) -> bool {
    let asked = async {
        let sql = connected(address, LOCAL_CONNECT_MAX, connection).await?;
        sql.value("SELECT pg_is_in_recovery()", ANSWER_MAX).await
    };
    match asked.await {
        Ok(in_recovery) => in_recovery == "f",
        Err(_) => {
            *connection = None;
            false
        }
    }
}

async fn write(
    address: SocketAddr,
    connect_max: Duration,
    connection: &mut Option<Sql>,
    writer: &Writer,
    seq: u64,
) -> Result<Ack, SqlFailure> {
    let sql = connected(address, connect_max, connection).await?;
    let insert = format!(
        "INSERT INTO chaos_row VALUES ('{}', {seq}) \
         RETURNING host(inet_server_addr()) || ' ' || left(pg_walfile_name(pg_current_wal_insert_lsn()), 8)",
        writer.name()
    );
    let sent = Boottime::now();
    let told = sql.value(&insert, ANSWER_MAX).await?;
    let (server, timeline) = told.split_once(' ').unwrap_or((&told, ""));
    Ok(Ack {
        writer: writer.clone(),
        seq,
        server: server.to_owned(),
        timeline: timeline.to_owned(),
        sent,
        at: Boottime::now(),
    })
}

async fn connected(
    address: SocketAddr,
    connect_max: Duration,
    connection: &mut Option<Sql>,
) -> Result<&Sql, SqlFailure> {
    match connection {
        Some(sql) => Ok(sql),
        None => Ok(connection.insert(Sql::connect(address, connect_max).await?)),
    }
}
