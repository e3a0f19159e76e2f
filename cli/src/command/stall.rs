//! How long nobody took writes while the lead moved, measured from outside: when the old leader's PostgreSQL last let
//! somebody in, and when the new leader first took a write.
//!
//! A server that is told to stop refuses newcomers in the same moment in which it ends sessions, and says so to whoever
//! connects, before any password. That a new leader takes writes is known of ours by the write that it has proven itself by,
//! of Patroni's by its PostgreSQL's own word that it has left recovery.

use std::io::ErrorKind;
use std::time::Duration;

use pgherd_cluster::http::{Access, Ask, ask_at};
use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::{Address, DynamicConfig, Role};
use pgherd_cluster::view::{Member, View};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};

use super::site::Site;
use crate::failure::Failure;
use crate::terminal::say;

/// From one look to the next.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// For a server to answer one.
const LOOK_MAX: Duration = Duration::from_millis(500);
/// For a new leader to take writes, once it holds the lease.
const WRITES_MAX: Duration = Duration::from_secs(120);
/// For the old one to refuse, once the new one takes writes: one whose host is gone never does.
const REFUSAL_MAX: Duration = Duration::from_secs(1);

/// What is looked at meanwhile.
pub(crate) struct Watch {
    looking: JoinSet<Seen>,
    /// Who led before, where that leader took writes.
    former: Option<MemberName>,
    /// Whether anybody is to take writes at all.
    writes: bool,
}

/// What a look has shown, once.
#[derive(Debug)]
enum Seen {
    /// The old leader's PostgreSQL last let somebody in when it was asked at this time.
    LastIn(Instant),
    /// This member took writes when it answered at this time.
    Writes(MemberName, Instant),
}

impl Watch {
    /// Begins to look at the leader, and at the candidate or at all who could be one.
    pub(crate) fn begin(site: &Site, view: &View, candidate: Option<&Member>) -> Self {
        let leader = view.leader_member();
        let follows = view
            .config
            .value
            .as_ref()
            .is_some_and(DynamicConfig::is_standby_cluster);
        let writes = !follows && leader.is_none_or(|leader| leader.record.role != Role::StandbyLeader);
        let mut looking = JoinSet::new();
        if !writes {
            return Self {
                looking,
                former: None,
                writes,
            };
        }
        if let Some(address) = leader.and_then(|leader| leader.record.postgres_address()) {
            looking.spawn(async move { Seen::LastIn(last_in(&address).await) });
        }
        // Another one than was asked for may come first.
        let is_candidate = |member: &&Member| {
            let asked_for = candidate.is_some_and(|candidate| candidate.name == member.name);
            let leads = leader.is_some_and(|leader| leader.name == member.name);
            !leads && (asked_for || !member.record.nofailover())
        };
        for member in view.members.values().filter(is_candidate) {
            let (member, access) = (member.clone(), site.access());
            looking.spawn(async move {
                let at = first_write(&member, &access).await;
                Seen::Writes(member.name, at)
            });
        }
        Self {
            looking,
            former: leader.map(|leader| leader.name.clone()),
            writes,
        }
    }

    /// The lease has moved: waits until its holder takes writes, and says how long nobody did.
    ///
    /// # Errors
    /// When it does not within two minutes.
    pub(crate) async fn end(mut self, site: &Site) -> Result<(), Failure> {
        if !self.writes {
            return Ok(());
        }
        let Some((to, at)) = self.outcome().await else {
            let view = site.view().await?;
            let holder = view
                .epoch()
                .map_or_else(|| "nobody".to_owned(), |epoch| epoch.holder.to_string());
            return Err(Failure::TryAgain(format!(
                "{holder} holds the lease and has taken no write within {} s; `pgherd list` tells how it is",
                WRITES_MAX.as_secs()
            )));
        };
        say(match (at.last_in, &self.former) {
            (Some(last_in), Some(from)) => format!(
                "Writes stood still for {:.2} s, from the last that {from} let in to the first on {to}",
                at.first_write.saturating_duration_since(last_in).as_secs_f64()
            ),
            _ => format!("{to} takes writes"),
        });
        Ok(())
    }

    /// Who takes writes, and when; nothing when nobody does for too long.
    async fn outcome(&mut self) -> Option<(MemberName, Times)> {
        let (mut last, mut first) = (None, None);
        let mut until = Instant::now() + WRITES_MAX;
        while first.is_none() || (last.is_none() && self.former.is_some()) {
            match timeout_at(until, self.looking.join_next()).await {
                Ok(Some(Ok(Seen::LastIn(at)))) => last = Some(at),
                Ok(Some(Ok(Seen::Writes(name, at)))) if first.is_none() => {
                    first = Some((name, at));
                    until = Instant::now() + REFUSAL_MAX;
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
        let (name, first_write) = first?;
        let times = Times {
            last_in: last,
            first_write,
        };
        Some((name, times))
    }
}

#[derive(Clone, Copy, Debug)]
struct Times {
    last_in: Option<Instant>,
    first_write: Instant,
}

/// Looks until the server refuses; when it was last asked before that.
async fn last_in(address: &Address) -> Instant {
    let mut last = Instant::now();
    let mut tick = interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let asked = Instant::now();
        match timeout(LOOK_MAX, lets_in(address)).await {
            Ok(Some(true)) => last = asked,
            Ok(Some(false)) => return last,
            // It is slow, or could not be asked, which is no refusal.
            Ok(None) | Err(_) => {}
        }
    }
}

/// Whether a server takes newcomers: it asks for a password, or refuses for a reason of its own; nothing when that could not
/// be found out. PostgreSQL's protocol, "Message Formats": a StartupMessage is answered by Authentication or ErrorResponse.
async fn lets_in(address: &Address) -> Option<bool> {
    let ask = async {
        let mut stream = TcpStream::connect((address.host.as_str(), address.port)).await?;
        stream.write_all(&startup_message()).await?;
        let mut answer = [0; 512];
        let read = stream.read(&mut answer).await?;
        Ok::<_, std::io::Error>(answer.get(..read).is_some_and(is_served))
    };
    match ask.await {
        Ok(served) => Some(served),
        Err(error) => is_refusal(error.kind()).then_some(false),
    }
}

/// Whether the server's side said no. What is missing on ours, such as a free port, says nothing about it.
const fn is_refusal(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
    )
}

fn startup_message() -> Vec<u8> {
    const PROTOCOL_3_0: [u8; 4] = [0, 3, 0, 0];
    let parameters = b"user\0postgres\0database\0postgres\0application_name\0pgherd\0\0";
    let length = u32::try_from(parameters.len() + 8).unwrap_or_default();
    [length.to_be_bytes().as_slice(), &PROTOCOL_3_0, parameters].concat()
}

/// An error of class 57 says that the server starts or stops; any other is about whoever asks.
fn is_served(answer: &[u8]) -> bool {
    match answer.split_first() {
        Some((b'R', _)) => true,
        Some((b'E', rest)) => {
            let fields = rest.get(4..).unwrap_or_default().split(|byte| *byte == 0);
            let mut codes = fields.filter_map(|field| field.strip_prefix(b"C"));
            codes.next().is_some_and(|code| !code.starts_with(b"57"))
        }
        _ => false,
    }
}

/// Looks until the member takes writes; when it said so.
async fn first_write(member: &Member, access: &Access) -> Instant {
    let mut tick = interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        if takes_writes(member, access).await {
            return Instant::now();
        }
    }
}

async fn takes_writes(member: &Member, access: &Access) -> bool {
    let Some(endpoint) = member.record.api_endpoint() else {
        return false;
    };
    let ours = member.record.pgherd.is_some();
    let path = if ours { "/api/v1/warrant" } else { "/patroni" };
    let Ok(answer) = ask_at(&endpoint, Ask::get(path), LOOK_MAX, access).await else {
        return false;
    };
    let status = answer.json().unwrap_or_default();
    if ours {
        status["writable"] == true
    } else {
        status["state"] == "running" && status["role"] == "primary"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(code: &str) -> Vec<u8> {
        let fields = format!("SFATAL\0VFATAL\0C{code}\0Mno\0\0");
        let length = u32::try_from(fields.len() + 4).expect("short");
        [b"E".as_slice(), &length.to_be_bytes(), fields.as_bytes()].concat()
    }

    #[test]
    fn a_server_that_stops_says_so_and_one_that_dislikes_the_guest_serves_others() {
        assert!(is_served(b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0"));
        for (code, served) in [
            ("57P03", false),
            ("57P01", false),
            ("28000", true),
            ("53300", true),
            ("3D000", true),
        ] {
            assert_eq!(is_served(&error(code)), served, "{code}");
        }
        assert!(!is_served(b"") && !is_served(b"E\0\0"));
    }

    #[test]
    fn the_startup_message_counts_itself() {
        let message = startup_message();
        let length = message.first_chunk().map(|bytes: &[u8; 4]| u32::from_be_bytes(*bytes));
        assert_eq!(length.map(usize::try_from), Some(Ok(message.len())));
    }

    #[tokio::test]
    async fn a_host_that_could_not_be_asked_has_not_refused() {
        let address = Address {
            host: "no such host".to_owned(),
            port: 5432,
        };
        assert_eq!(lets_in(&address).await, None);
    }

    #[tokio::test]
    async fn a_closed_port_lets_nobody_in() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        drop(listener);
        let address = Address {
            host: "127.0.0.1".to_owned(),
            port,
        };
        assert_eq!(lets_in(&address).await, Some(false));
    }
}
