//! Tens of thousands of connections that no client of PostgreSQL would make, while one that does is served beside them.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::{interval, timeout};

use crate::stage::{Door, Guest, STRANGERS, Stage, length, message, number, startup};

const COUNT: u64 = 50_000;
/// So many at a time.
const AT_A_TIME: usize = 64;
/// Whatever the proxy keeps for later, such as its threads' buffers, is there after these.
const WARM_UP: u64 = 3000;
/// What a process may grow by without leaking: the heap of a program with several threads wanders by some MiB.
const GROWTH_MAX: u64 = 12 << 20;
/// One each ten seconds of each kind, and some of the cluster's own.
const LINES_MAX: usize = 60;
const ASK_EVERY: Duration = Duration::from_millis(5);
/// So long a stranger listens for an answer to what it has begun with. Many beginnings have none.
const PATIENCE: Duration = Duration::from_millis(30);
const CONNECT_MAX: Duration = Duration::from_secs(4);
const CONNECT_TRIES: u32 = 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_disturb_nobody_and_leave_nothing_behind() -> Result<()> {
    let total = number("PGHERD_TEST_STRANGERS", COUNT)?;
    let seed = number("PGHERD_TEST_SEED", u64::from(std::process::id()))?;
    let stage = Arc::new(Stage::start(json!({})).await?);
    println!("{total} strangers, seed {seed}");
    let at_first = stage.empties(usize::MAX).await?;
    come(&stage, seed, 0..WARM_UP.min(total)).await?;
    let before = stage.empties(at_first.files).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut client = JoinSet::new();
    client.spawn(client_that_is_served(Arc::clone(&stage), Arc::clone(&stop)));
    let began = Instant::now();
    come(&stage, seed, WARM_UP..total.max(WARM_UP)).await?;
    let took = began.elapsed();
    stop.store(true, Ordering::Relaxed);
    let served = client.join_next().await.context("it was begun")???;
    let after = stage.empties(before.files).await?;
    println!(
        "in {:.1} s, {served}; before: {before}; after: {after}",
        took.as_secs_f64()
    );
    let grown = after.memory.saturating_sub(before.memory);
    ensure!(grown <= GROWTH_MAX, "grown by {grown} bytes");
    let mut stage = Arc::into_inner(stage).context("nobody else has it")?;
    stage.ensure_sound().await?;
    let lines = stage.proxy.output().lines().count();
    ensure!(lines <= LINES_MAX, "{lines} lines in the log: {}", stage.proxy.output());
    stage.site.pass();
    Ok(())
}

/// Asks again and again in one session, and in new ones, and expects an answer each time.
async fn client_that_is_served(stage: Arc<Stage>, stop: Arc<AtomicBool>) -> Result<String> {
    let mut tick = interval(ASK_EVERY);
    let mut session = Guest::enter(&stage, Door::Plain).await?;
    let (mut asked, mut slowest) = (0_u32, Duration::ZERO);
    while !stop.load(Ordering::Relaxed) || asked < 10 {
        tick.tick().await;
        let began = Instant::now();
        if asked % 10 == 9 {
            session.leave().await?;
            session = Guest::enter(&stage, Door::Plain).await.context("a new session")?;
        }
        session.ask("select 1").await.context("the client beside them")?;
        slowest = slowest.max(began.elapsed());
        asked += 1;
    }
    session.leave().await?;
    Ok(format!("{asked} queries beside them, the slowest took {slowest:?}"))
}

/// Lets the strangers of these numbers come, so many at a time.
async fn come(stage: &Arc<Stage>, seed: u64, numbers: std::ops::Range<u64>) -> Result<()> {
    let next = Arc::new(AtomicU64::new(numbers.start));
    let mut doors = JoinSet::new();
    for _ in 0..AT_A_TIME {
        let (stage, next, end) = (Arc::clone(stage), Arc::clone(&next), numbers.end);
        doors.spawn(async move {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= end {
                    return anyhow::Ok(());
                }
                let mut draws = Draws(seed ^ number.wrapping_mul(0xD134_2543_DE82_EF95));
                let stranger = Stranger::draw(&stage, &mut draws);
                let shown = format!("PGHERD_TEST_SEED={seed}, stranger {number}: {stranger}");
                stranger.come(&stage).await.context(shown)?;
            }
        });
    }
    while let Some(ended) = doors.join_next().await {
        ended??;
    }
    Ok(())
}

/// SplitMix64: <https://prng.di.unimi.it/splitmix64.c>.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(end.max(1)).unwrap_or(1)).unwrap_or(0)
    }

    fn bytes(&mut self, most: usize) -> Vec<u8> {
        (0..self.below(most + 1))
            .map(|_| self.next().to_le_bytes()[0])
            .collect()
    }
}

#[derive(Clone, Copy, Debug)]
enum End {
    Close,
    Reset,
    /// Says that nothing more comes, and listens until the proxy has ended too.
    Listen,
}

/// Where one goes, what it says, in two parts perhaps, and how it ends.
struct Stranger {
    to: SocketAddr,
    says: Vec<u8>,
    then: Vec<u8>,
    end: End,
}

impl std::fmt::Display for Stranger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (says, then) = (self.says.escape_ascii(), self.then.escape_ascii());
        write!(f, "to {}: b\"{says}\", b\"{then}\", {:?}", self.to, self.end)
    }
}

const SSL_REQUEST: &[u8] = b"\0\0\0\x08\x04\xd2\x16\x2f";
const GSS_REQUEST: &[u8] = b"\0\0\0\x08\x04\xd2\x16\x30";
const PROXY_LINE: &[u8] = b"PROXY TCP4 10.1.2.3 10.0.0.1 12345 5432\r\n";
const PROXY_BLOCK: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x0a\x01\x02\x03\x0a\0\0\x01\x30\x39\x15\x38";
const REQUEST: &[u8] = b"GET /stats HTTP/1.1\r\nHost: h\r\n\r\n";

impl Stranger {
    fn draw(stage: &Stage, draws: &mut Draws) -> Self {
        let doors = [Door::Plain, Door::Tls, Door::Passthrough, Door::BehindProxy];
        let mut to = stage.door(doors[draws.below(doors.len())]);
        let mut then = Vec::new();
        let says = match draws.below(14) {
            0 => Vec::new(),
            1 => draws.bytes(300),
            2 => framed(8 + draws.below(9_992), &draws.bytes(200)),
            3 => cut(&startup(), draws),
            4 => {
                let lengths = [0, 1, 3, 4, 7, 10_001, 0x7fff_ffff, 0xffff_ffff];
                framed(lengths[draws.below(lengths.len())], &startup()[4..])
            }
            5 => {
                to = stage.door(Door::Tls);
                then = cut(&client_hello(), draws);
                SSL_REQUEST.to_vec()
            }
            6 => changed(&client_hello(), draws),
            7 => {
                to = stage.door(Door::BehindProxy);
                changed([PROXY_LINE, PROXY_BLOCK][draws.below(2)], draws)
            }
            8 => {
                to = stage.door(Door::BehindProxy);
                then = changed(&startup(), draws);
                [PROXY_LINE, PROXY_BLOCK][draws.below(2)].to_vec()
            }
            9 => startup(),
            10 => {
                let key = [&0x04d2_162e_u32.to_be_bytes()[..], &draws.bytes(80)].concat();
                framed(4 + key.len(), &key)
            }
            11 => {
                to = stage.page();
                changed(REQUEST, draws)
            }
            12 => {
                then = changed(&message(b'Q', b"select 1\0"), draws);
                changed(&startup(), draws)
            }
            _ => {
                then = changed(&startup(), draws);
                [SSL_REQUEST, GSS_REQUEST][draws.below(2)].to_vec()
            }
        };
        let end = [End::Close, End::Reset, End::Listen][draws.below(3)];
        Self { to, says, then, end }
    }

    /// A million are more than the kernel remembers closed connections of: a port may be given again that the proxy's side still
    /// has, and then takes seconds to be free. That the proxy takes connections is for the client beside them to see.
    async fn connected(&self, stage: &Stage) -> Result<Guest> {
        let mut tries = 1;
        loop {
            let connecting = Guest::connect(stage, &STRANGERS, self.to, false);
            match timeout(CONNECT_MAX, connecting).await {
                Ok(connected) => return connected,
                Err(_) if tries == CONNECT_TRIES => bail!("no connection in {tries} tries"),
                Err(_) => tries += 1,
            }
        }
    }

    async fn come(self, stage: &Stage) -> Result<()> {
        let mut guest = self.connected(stage).await?;
        // The proxy may have ended it already: what it thinks of the rest is no longer said.
        let _ = guest.0.write_all(&self.says).await;
        if !self.then.is_empty() {
            let _ = timeout(PATIENCE, guest.0.read(&mut [0; 1])).await;
            let _ = guest.0.write_all(&self.then).await;
        }
        match self.end {
            End::Close => {}
            End::Reset => guest.0.set_zero_linger()?,
            End::Listen => {
                let _ = guest.0.shutdown().await;
                guest.ended().await?;
            }
        }
        Ok(())
    }
}

fn framed(bytes: usize, rest: &[u8]) -> Vec<u8> {
    [&length(bytes)[..], rest].concat()
}

fn cut(bytes: &[u8], draws: &mut Draws) -> Vec<u8> {
    bytes[..draws.below(bytes.len())].to_vec()
}

/// Some bytes are others, and perhaps the end is missing or there is more.
fn changed(bytes: &[u8], draws: &mut Draws) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for _ in 0..draws.below(4) {
        let at = draws.below(bytes.len());
        bytes[at] = draws.next().to_le_bytes()[0];
    }
    match draws.below(3) {
        0 => cut(&bytes, draws),
        1 => [bytes, draws.bytes(50)].concat(),
        _ => bytes,
    }
}

/// The beginning of a handshake, without all that would make it whole.
fn client_hello() -> Vec<u8> {
    let hello = [&[3, 3][..], &[7; 32], &[0, 0, 2, 0x13, 1, 1, 0, 0, 0]].concat();
    let handshake = [&[1, 0, 0, u8::try_from(hello.len()).unwrap_or(0)][..], &hello].concat();
    [
        &[0x16, 3, 1, 0, u8::try_from(handshake.len()).unwrap_or(0)][..],
        &handshake,
    ]
    .concat()
}
