//! Passing cancel requests to the server whose client sent them, from whichever worker they arrive at.

use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use pgherd_cluster::clock::Boottime;
use pgherd_cluster::record::Address;
use pgherd_cluster::view::Member;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

use crate::balance::{self, Wanted};
use crate::config::ListenerRole;
use crate::dial::dial;
use crate::shared::Shared;
use crate::stream::Stream;
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
pub(crate) async fn forward(shared: &Shared, role: ListenerRole, key: &CancelKey, packet: &Bytes) {
    let (known, addresses) = match shared.sessions.find(key) {
        Some(server) => ("known", vec![address_of(server)]),
        None if !shared.unknown_cancels.passes(Boottime::now()) => {
            shared.cancels.count("limited", "unknown");
            return;
        }
        None => ("unknown", possible_servers(shared, role)),
    };
    if addresses.is_empty() {
        shared.cancels.count("nowhere", known);
    }
    // All at once: a member that does not answer must not keep the one whose query it is waiting.
    let mut deliveries = JoinSet::new();
    for address in addresses {
        deliveries.spawn(deliver(address, packet.clone()));
    }
    while let Some(outcome) = deliveries.join_next().await {
        shared.cancels.count(outcome.unwrap_or("failed"), known);
    }
}

fn address_of(server: SocketAddr) -> Address {
    Address {
        host: server.ip().to_string(),
        port: server.port(),
    }
}

/// Where the session of a key that another proxy passed on may be. PostgreSQL ignores a key that is not its own.
fn possible_servers(shared: &Shared, role: ListenerRole) -> Vec<Address> {
    let view = shared.seen().view;
    let leader = || view.leader_member().into_iter();
    let readable = || {
        let members = view.members.values();
        members.filter(|member| balance::readable(&view, member, Wanted::ANY_REPLICA).is_ok())
    };
    let address = |member: &Member| member.record.postgres_address();
    match role {
        ListenerRole::Write | ListenerRole::StandbyLeader => leader().filter_map(address).collect(),
        ListenerRole::Read | ListenerRole::Sync | ListenerRole::Async => readable().filter_map(address).collect(),
        ListenerRole::Any => leader().chain(readable()).filter_map(address).collect(),
    }
}

async fn deliver(address: Address, packet: Bytes) -> &'static str {
    match timeout(CANCEL_MAX, hand_over(&address, &packet)).await {
        Ok(Ok(())) => "delivered",
        Ok(Err(error)) => {
            debug!(%address, %error, "a cancel request was not delivered");
            "failed"
        }
        Err(_) => "timeout",
    }
}

async fn hand_over(address: &Address, packet: &[u8]) -> io::Result<()> {
    let mut server = Stream::Plain(dial(address).await?);
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
