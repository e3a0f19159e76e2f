//! Clients that do not read, that say half of something, that have said their last: each costs what it may, and no more.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use pgherd_testkit::eventually;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::stage::{Door, Guest, Holding, Stage, message};

const SESSIONS: u64 = 1000;
const OPENING_AT_A_TIME: u64 = 20;
/// What a session may keep of each direction while its reader takes nothing: as much as one receive may bring.
const KEPT_BYTES_MAX: u64 = 64 * 1024;
/// What it costs besides.
const SESSION_BYTES_MAX: u64 = 16 * 1024;
/// Pipes that threads keep for the next bulk transfer, two ends each.
const PIPE_ENDS_PER_THREAD: usize = 2 * 8;
const BULK: &str = "bulk 2";
const BULK_BYTES: usize = 2 << 20;
/// As many messages as never fit between a client and a server that reads nothing, and rounds of saying them.
const SAID_MESSAGES: usize = 64;
const ROUNDS: usize = 3;
/// Nothing has moved for so many looks: nothing will.
const STILL_LOOKS: u32 = 5;
const STILL_MAX: Duration = Duration::from_secs(60);
/// For a client to write while nobody reads, or to read all of its rows.
const MOVE_MAX: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_that_do_not_read_keep_their_bounds_and_get_all_in_the_end() -> Result<()> {
    let stage = Arc::new(Stage::start(json!({})).await?);
    let empty = stage.empties(usize::MAX).await?;
    // Rows wait for every client. A server that sends rows does not read, so what clients say next waits too; and every
    // third has then said its last.
    let mut guests = all(&stage, &message(b'Q', format!("{BULK}\0").as_bytes())).await?;
    let more = message(b'd', &[b'x'; 16 * 1024]).repeat(SAID_MESSAGES);
    let mut said = vec![0; guests.len()];
    for _ in 0..ROUNDS {
        for (guest, said) in guests.iter().zip(&mut said) {
            // As much as is taken at once.
            *said += guest.0.try_write(&more[*said..]).unwrap_or(0);
        }
        still(&stage).await?;
    }
    for guest in guests.iter_mut().step_by(3) {
        guest.0.shutdown().await?;
    }
    let stalled = still(&stage).await?;
    let each = stalled.memory.saturating_sub(empty.memory) / SESSIONS;
    println!("empty: {empty}; {SESSIONS} that do not read: {stalled}, {each} bytes each");
    ensure!(
        each <= 2 * KEPT_BYTES_MAX + SESSION_BYTES_MAX,
        "a session whose client does not read costs {each} bytes"
    );
    // Some read on and get every byte; the others go without a word.
    for (nth, guest) in guests.iter_mut().enumerate() {
        if nth % 10 == 0 {
            let got = read_rows(guest).await.with_context(|| format!("client {nth}"))?;
            ensure!(got > BULK_BYTES, "client {nth} got {got} bytes");
        } else {
            guest.0.set_zero_linger()?;
        }
    }
    drop(guests);
    let pipes = PIPE_ENDS_PER_THREAD * empty.threads;
    let after = stage.empties(empty.files + pipes).await?;
    println!("after: {after}");
    end(stage).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_in_the_middle_of_a_word_cost_no_more_than_idle_ones() -> Result<()> {
    let stage = Arc::new(Stage::start(json!({})).await?);
    let empty = stage.empties(usize::MAX).await?;
    let query = message(b'Q', b"select 1\0");
    let (begins, ends) = query.split_at(7);
    let mut guests = all(&stage, begins).await?;
    let waiting = still(&stage).await?;
    let each = waiting.memory.saturating_sub(empty.memory) / SESSIONS;
    println!("empty: {empty}; {SESSIONS} in the middle of a word: {waiting}, {each} bytes each");
    ensure!(each <= SESSION_BYTES_MAX, "such a session costs {each} bytes");
    for guest in &mut guests {
        guest.0.write_all(ends).await?;
        guest.ready().await?;
    }
    drop(guests);
    stage.empties(empty.files).await?;
    end(stage).await
}

async fn end(stage: Arc<Stage>) -> Result<()> {
    let mut stage = Arc::into_inner(stage).context("nobody else has it")?;
    stage.ensure_sound().await?;
    stage.site.pass();
    Ok(())
}

/// A thousand sessions, each of which has said this.
async fn all(stage: &Arc<Stage>, says: &[u8]) -> Result<Vec<Guest>> {
    let mut opening = JoinSet::new();
    for _ in 0..OPENING_AT_A_TIME {
        let (stage, says) = (Arc::clone(stage), says.to_vec());
        opening.spawn(async move {
            let mut opened = Vec::new();
            for _ in 0..SESSIONS / OPENING_AT_A_TIME {
                let mut guest = Guest::enter_with(&stage, Door::Plain, true).await?;
                guest.0.write_all(&says).await?;
                opened.push(guest);
            }
            anyhow::Ok(opened)
        });
    }
    let mut guests = Vec::new();
    while let Some(opened) = opening.join_next().await {
        guests.extend(opened??);
    }
    Ok(guests)
}

/// Waits until no byte has moved for some looks. What the proxy holds then.
async fn still(stage: &Stage) -> Result<Holding> {
    let (mut last, mut looks) = (0.0, 0);
    eventually("nothing moves any more", STILL_MAX, async || {
        let moved = stage.metric("pgherd_route_bytes_total", "").await?;
        looks = if (moved - last).abs() < 1.0 { looks + 1 } else { 0 };
        last = moved;
        ensure!(looks >= STILL_LOOKS, "{moved} bytes, the same for {looks} looks");
        stage.holding()
    })
    .await
}

/// Reads until the server is ready, or has ended. How many bytes that were.
async fn read_rows(guest: &mut Guest) -> Result<usize> {
    let mut total = 0;
    let mut piece = vec![0; 64 * 1024];
    let reading = async {
        loop {
            let count = guest.0.read(&mut piece).await?;
            total += count;
            if count == 0 || piece[..count].ends_with(b"Z\0\0\0\x05I") {
                return anyhow::Ok(total);
            }
        }
    };
    timeout(MOVE_MAX, reading).await.context("not all rows come")?
}
