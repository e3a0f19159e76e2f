//! Passing cancel requests to the server whose client sent them, from whichever worker they arrive at.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use pgherd_cluster::clock::Boottime;
use pgherd_cluster::record::{Address, PgState};
use pgherd_cluster::view::Member;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

use crate::config::ListenerConfig;
use crate::dial::dial;
use crate::secure::secure;
use crate::sessions::Server;
use crate::shared::Shared;
use crate::tls::TlsSettings;
use crate::wire::startup::CancelKey;

/// For connecting, sending and the server's close.
const CANCEL_MAX: Duration = Duration::from_secs(5);
/// Requests with keys that this proxy did not see: each costs a connection to every member that it may belong to.
const UNKNOWN_PER_SECOND: u32 = 50;

/// Lets a bounded number pass per second, and as many at once.
pub(crate) struct Limiter(Mutex<Bucket>);

struct Bucket {
    tokens: u32,
    filled_at: Boottime,
}

impl Limiter {
    pub(crate) fn new(now: Boottime) -> Self {
        Self(Mutex::new(Bucket {
            tokens: UNKNOWN_PER_SECOND,
            filled_at: now,
        }))
    }

    pub(crate) fn passes(&self, now: Boottime) -> bool {
        let mut bucket = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let token_time = Duration::from_secs(1) / UNKNOWN_PER_SECOND;
        let earned = now.since(bucket.filled_at).as_nanos() / token_time.as_nanos();
        let earned = u32::try_from(earned).unwrap_or(UNKNOWN_PER_SECOND);
        if earned > 0 {
            bucket.tokens = bucket.tokens.saturating_add(earned).min(UNKNOWN_PER_SECOND);
            bucket.filled_at = now;
        }
        match bucket.tokens.checked_sub(1) {
            Some(left) => {
                bucket.tokens = left;
                true
            }
            None => false,
        }
    }
}

/// Passes `packet` on as it came. The client learns nothing, as from PostgreSQL: its connection is closed afterwards.
pub(crate) async fn forward(shared: &Shared, config: &ListenerConfig, key: &CancelKey, packet: &Bytes) {
    let (known, ways) = match shared.sessions.find(key) {
        Some(server) => ("known", vec![Way::to(&server)]),
        None if !shared.unknown_cancels.passes(Boottime::now()) => {
            shared.cancels.count("limited", "unknown");
            return;
        }
        None => ("unknown", possible_servers(shared, config)),
    };
    let tls = shared.tls.load_full();
    if ways.is_empty() {
        shared.cancels.count("nowhere", known);
    }
    // All at once: a member that does not answer must not keep the one whose query it is waiting.
    let mut deliveries = JoinSet::new();
    for way in ways {
        deliveries.spawn(deliver(way, Arc::clone(&tls), packet.clone()));
    }
    while let Some(outcome) = deliveries.join_next().await {
        shared.cancels.count(outcome.unwrap_or("failed"), known);
    }
}

/// How a server is reached, and who it is.
struct Way {
    dial: Address,
    /// As its certificate may name it.
    named: Address,
}

impl Way {
    fn to(server: &Server) -> Self {
        let (port, named) = (server.at.port(), server.host.clone());
        Self {
            dial: Address {
                host: server.at.ip().to_string(),
                port,
            },
            named: Address { host: named, port },
        }
    }
}

impl From<Address> for Way {
    fn from(address: Address) -> Self {
        Self {
            dial: address.clone(),
            named: address,
        }
    }
}

/// Where the session of a key that another proxy passed on may be, also one whose member gets no newcomers any more.
/// PostgreSQL ignores a key that is not its own.
fn possible_servers(shared: &Shared, config: &ListenerConfig) -> Vec<Way> {
    let view = shared.seen().view;
    let leads = |member: &Member| view.epoch().is_some_and(|epoch| epoch.holder == member.name);
    let is_possible = |member: &&Member| match (config.role.is_balanced(), leads(member)) {
        (false, leads) => leads,
        (true, true) => config.may_be_with_leader(),
        (true, false) => member.record.state == PgState::Running,
    };
    let members = view.members.values().filter(is_possible);
    let addresses = members.filter_map(|member| member.record.postgres_address());
    addresses.map(Way::from).collect()
}

async fn deliver(way: Way, tls: Arc<TlsSettings>, packet: Bytes) -> &'static str {
    match timeout(CANCEL_MAX, hand_over(&way, &tls, &packet)).await {
        Ok(Ok(())) => "delivered",
        Ok(Err(error)) => {
            debug!(address = %way.named, %error, "a cancel request was not delivered");
            "failed"
        }
        Err(_) => "timeout",
    }
}

/// A key is a secret: where sessions go to members by TLS, it does as well.
async fn hand_over(way: &Way, tls: &TlsSettings, packet: &[u8]) -> io::Result<()> {
    let (socket, _) = dial(&way.dial).await?;
    let mut server = secure(socket, &way.named, tls, false).await?;
    server.write_all(packet).await?;
    // The server closes once it has signalled the backend. Only then may the client be let go: it takes the close for the
    // end of the matter, and its next query must not be hit.
    let mut nothing = [0; 16];
    while server.read(&mut nothing).await? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_to_the_rate() {
        let start = Boottime::from_nanos(1_000_000_000);
        let limiter = Limiter::new(start);
        let passed = |from: u64, to: u64| {
            let times = (from..to).map(|millis| start + Duration::from_millis(millis));
            times.filter(|now| limiter.passes(*now)).count()
        };
        assert_eq!(passed(0, 10), 10);
        let in_two_seconds = passed(10, 2_010);
        assert!((100..=145).contains(&in_two_seconds), "{in_two_seconds}");
    }
}
