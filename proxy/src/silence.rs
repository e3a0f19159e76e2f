//! Notices members that have gone silent: hosts that lost power, froze or cannot be reached, of which TCP tells nothing for
//! long. Their readers are ended and go elsewhere.
//!
//! A member is asked, not its sessions: one that computes for minutes sends nothing, and lives. Its agent is asked once per
//! round, and when that does not answer soon, its PostgreSQL too. Whatever comes from its host is an answer, a refusal
//! included: what has ended there tells its sessions by itself. What keeps this proxy from asking, such as a resolver that
//! does not answer or descriptors that have run out, says nothing of the member. Members are asked only while there are
//! readers, and only those that have sessions or may get some.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::time::Duration;

use pgherd_cluster::http::{Ask, HttpError, ask};
use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::Address;
use pgherd_cluster::resolve::resolve as look_up;
use pgherd_cluster::view::View;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::balance::{self, Wanted};
use crate::events::EventKind;
use crate::shared::Shared;

/// From one round to the next.
const ROUND_EVERY: Duration = Duration::from_millis(750);
/// From one question of a round to the next, while none is answered. Each is on a connection of its own: what was lost on
/// the way to a network that pauses is sent again by the kernel only after a second, then two, then four.
const QUESTION_EVERY: Duration = Duration::from_millis(250);
/// So many questions without an answer are silence: 1.5 s, so that a pause of one second is none. Counted and not timed, so
/// that a proxy that stood still itself does not take its own silence for that of others.
const QUESTIONS: u32 = 6;
/// A question that is answered after its round helps nobody.
const QUESTION_MAX: Duration = Duration::from_millis(1500);
/// PostgreSQL answers it with one byte before it does anything else, and logs nothing.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// Where a member can be asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Place {
    agent: Option<Address>,
    postgres: Option<Address>,
}

/// Where that is. Looked up once, and again after a silence: a name may stand for another host by then.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Addresses {
    agent: Vec<SocketAddr>,
    postgres: Vec<SocketAddr>,
}

/// Who is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Agent,
    Postgres,
}

/// What came of one question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    /// The member's host has said something.
    Something,
    /// Nothing has come.
    Nothing,
    /// It could not be asked.
    Unasked,
}

/// What came of a round.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    Answered {
        by: By,
        at: Addresses,
    },
    Silent,
    /// This proxy could not ask.
    Unknown,
}

/// A round that is due.
#[derive(Debug, PartialEq, Eq)]
struct Round {
    name: MemberName,
    place: Place,
    /// Whom to ask first, and where, as in the last round that was answered.
    last: Option<(By, Addresses)>,
}

/// Runs until `stop`.
pub(crate) async fn run(shared: &Shared, stop: CancellationToken) -> std::io::Result<()> {
    tokio::select! {
        () = stop.cancelled() => {}
        () = watch_for_ever(shared) => {}
    }
    Ok(())
}

async fn watch_for_ever(shared: &Shared) {
    let mut watched = Watched::default();
    let mut rounds = JoinSet::new();
    let mut tick = interval(ROUND_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {
                for round in watched.due(whom(shared, &watched.places)) {
                    rounds.spawn(async move {
                        let outcome = run_round(&round).await;
                        (round.name, outcome)
                    });
                }
                shared.set_silent(watched.silent.clone());
            }
            Some(ended) = rounds.join_next() => {
                // A round that panicked told nothing, and its member is never asked again: better an end than that.
                let Ok((name, outcome)) = ended else { return };
                if let Some(kind) = watched.told(&name, outcome) {
                    match &kind {
                        EventKind::MemberSilent(_) => warn!("{kind}"),
                        _ => info!("{kind}"),
                    }
                    shared.events.record(kind);
                    shared.set_silent(watched.silent.clone());
                }
            }
        }
    }
}

/// The members to ask now, and where: nobody while nobody reads.
fn whom(shared: &Shared, known: &BTreeMap<MemberName, Place>) -> BTreeMap<MemberName, Place> {
    let open = shared.routes.open_by_member();
    let reads = shared.listeners().iter().any(|listener| {
        let reads = listener.config.load().role.is_balanced();
        reads && listener.connections.get() > 0
    });
    if !reads {
        return BTreeMap::new();
    }
    let view = shared.seen().view;
    let has_sessions = |name: &MemberName| open.get(name).is_some_and(|count| *count > 0);
    let mut whom = candidates(&view, has_sessions);
    // The key of one that is cut off expires before it is back; its sessions may be left.
    let leads = |name: &MemberName| view.epoch().is_some_and(|epoch| epoch.holder == *name);
    for (name, place) in known {
        if has_sessions(name) && !leads(name) {
            whom.entry(name.clone()).or_insert_with(|| place.clone());
        }
    }
    whom
}

/// Every standby that is read from or might be. The leader's sessions end with its warrant. Pure.
fn candidates(view: &View, has_sessions: impl Fn(&MemberName) -> bool) -> BTreeMap<MemberName, Place> {
    let asked = view.members.values().filter(|member| {
        let leads = view.epoch().is_some_and(|epoch| epoch.holder == member.name);
        let may_be_read = || {
            balance::readable(view, member, Wanted::ANY_REPLICA).is_ok()
                || balance::last_resort(view, member, Wanted::ANY_REPLICA).is_ok()
        };
        !leads && (has_sessions(&member.name) || may_be_read())
    });
    let place = |member: &pgherd_cluster::view::Member| Place {
        agent: member.record.api_address(),
        postgres: member.record.postgres_address(),
    };
    asked.map(|member| (member.name.clone(), place(member))).collect()
}

/// Who is asked, and what came of it. Pure.
#[derive(Debug, Default)]
struct Watched {
    places: BTreeMap<MemberName, Place>,
    /// Whose round is not over.
    asked: BTreeSet<MemberName>,
    /// Who answered last, and where.
    answered: BTreeMap<MemberName, (By, Addresses)>,
    silent: BTreeSet<MemberName>,
}

impl Watched {
    /// The rounds that begin now. Nothing is kept of members that are not asked any more: silence is a fact of now.
    fn due(&mut self, places: BTreeMap<MemberName, Place>) -> Vec<Round> {
        let before = std::mem::replace(&mut self.places, places);
        let places = &self.places;
        self.silent.retain(|name| places.contains_key(name));
        self.answered
            .retain(|name, _| places.get(name).is_some_and(|place| before.get(name) == Some(place)));
        let mut due = Vec::new();
        for (name, place) in places {
            let can_be_asked = place.agent.is_some() || place.postgres.is_some();
            if can_be_asked && self.asked.insert(name.clone()) {
                due.push(Round {
                    name: name.clone(),
                    place: place.clone(),
                    last: self.answered.get(name).cloned(),
                });
            }
        }
        due
    }

    /// A round is over: the news, if it is some.
    fn told(&mut self, name: &MemberName, outcome: Outcome) -> Option<EventKind> {
        self.asked.remove(name);
        if !self.places.contains_key(name) {
            return None;
        }
        match outcome {
            Outcome::Answered { by, at } => {
                self.answered.insert(name.clone(), (by, at));
                let was_silent = self.silent.remove(name);
                was_silent.then(|| EventKind::MemberAnswers(name.clone()))
            }
            Outcome::Silent => {
                self.answered.remove(name);
                let is_new = self.silent.insert(name.clone());
                is_new.then(|| EventKind::MemberSilent(name.clone()))
            }
            Outcome::Unknown => None,
        }
    }
}

/// One question to who answered last, and when that gets no answer soon, both, again and again.
async fn run_round(round: &Round) -> Outcome {
    let (first, at) = match &round.last {
        Some((by, at)) => (*by, at.clone()),
        None => match timeout(QUESTION_MAX, resolve(&round.place)).await {
            Ok(Ok(at)) => (By::Agent, at),
            Ok(Err(_)) | Err(_) => return Outcome::Unknown,
        },
    };
    let mut questions = JoinSet::new();
    let mut could_ask = true;
    for number in 0..QUESTIONS {
        let both = number > 0 || at.of(first).is_empty();
        for by in [By::Agent, By::Postgres].into_iter().filter(|by| both || *by == first) {
            for address in at.of(by).iter().copied() {
                questions.spawn(async move { (by, question(by, address).await) });
            }
        }
        tokio::select! {
            biased; // An answer that is there counts, however late it is looked at.
            by = first_answer(&mut questions, &mut could_ask) => return Outcome::Answered { by, at },
            () = sleep(QUESTION_EVERY) => {}
        }
    }
    if could_ask { Outcome::Silent } else { Outcome::Unknown }
}

impl Addresses {
    fn of(&self, by: By) -> &[SocketAddr] {
        match by {
            By::Agent => &self.agent,
            By::Postgres => &self.postgres,
        }
    }
}

async fn resolve(place: &Place) -> io::Result<Addresses> {
    let of = async |address: &Option<Address>| match address {
        Some(address) => look_up(address).await,
        None => Ok(Vec::new()),
    };
    Ok(Addresses {
        agent: of(&place.agent).await?,
        postgres: of(&place.postgres).await?,
    })
}

/// The first answer; never, while there is none.
async fn first_answer(questions: &mut JoinSet<(By, Said)>, could_ask: &mut bool) -> By {
    while let Some(ended) = questions.join_next().await {
        match ended {
            Ok((by, Said::Something)) => return by,
            Ok((_, Said::Nothing)) => {}
            Ok((_, Said::Unasked)) | Err(_) => *could_ask = false,
        }
    }
    std::future::pending().await
}

async fn question(by: By, address: SocketAddr) -> Said {
    match by {
        By::Agent => ask_agent(address).await,
        By::Postgres => {
            let asked = timeout(QUESTION_MAX, ask_postgres(address)).await;
            asked.unwrap_or(Said::Nothing)
        }
    }
}

async fn ask_agent(address: SocketAddr) -> Said {
    let address = Address {
        host: address.ip().to_string(),
        port: address.port(),
    };
    match ask(&address, Ask::get("/liveness"), QUESTION_MAX).await {
        // Whatever it said, and be it that it speaks TLS only.
        Ok(_) | Err(HttpError::Protocol(_)) => Said::Something,
        Err(HttpError::Connect { source, .. }) => said_by(&source),
        Err(HttpError::Timeout(_)) => Said::Nothing,
    }
}

async fn ask_postgres(address: SocketAddr) -> Said {
    let asked = async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(&SSL_REQUEST).await?;
        let mut byte = [0; 1];
        stream.read(&mut byte).await
    };
    match asked.await {
        Ok(_) => Said::Something,
        Err(error) => said_by(&error),
    }
}

/// A refusal is sent by the host itself. That it cannot be reached is said by others, and that it cannot be asked by our
/// own system.
fn said_by(error: &io::Error) -> Said {
    match error.kind() {
        ErrorKind::ConnectionRefused | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => Said::Something,
        ErrorKind::TimedOut | ErrorKind::HostUnreachable | ErrorKind::NetworkUnreachable | ErrorKind::NetworkDown => {
            Said::Nothing
        }
        _ => Said::Unasked,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Cluster, name};

    fn names<T>(map: &BTreeMap<MemberName, T>) -> Vec<&str> {
        map.keys().map(MemberName::as_str).collect()
    }

    #[test]
    fn standbys_that_may_be_read_and_whoever_has_sessions_are_asked_and_the_leader_is_not() {
        let view = Cluster::new()
            .leader("n1", 10)
            .primary("n1", 11)
            .replica("n2")
            .member("n3", "replica", "starting", r#""tags":{}"#)
            .member("n4", "replica", "stopped", r#""tags":{}"#)
            .view();
        assert_eq!(names(&candidates(&view, |_| false)), ["n2"]);
        let has_sessions = |name: &MemberName| ["n1", "n3"].contains(&name.as_str());
        assert_eq!(names(&candidates(&view, has_sessions)), ["n2", "n3"]);
    }

    #[test]
    fn silence_begins_and_ends_once_and_is_forgotten_with_the_asking() {
        let places = || {
            let address = Address {
                host: "n2".to_owned(),
                port: 8008,
            };
            let place = Place {
                agent: Some(address),
                postgres: None,
            };
            BTreeMap::from([(name("n2"), place), (name("n3"), Place::default())])
        };
        let told = |watched: &mut Watched, outcome: Outcome| watched.told(&name("n2"), outcome);
        let answered = || Outcome::Answered {
            by: By::Postgres,
            at: Addresses::default(),
        };
        let mut watched = Watched::default();
        assert_eq!(watched.due(places()).len(), 1, "n3 has no address");
        assert_eq!(watched.due(places()).len(), 0, "it is being asked");
        assert_eq!(told(&mut watched, answered()), None);
        let due = watched.due(places());
        assert!(matches!(due[0].last, Some((By::Postgres, _))));
        let silent = EventKind::MemberSilent(name("n2"));
        assert_eq!(told(&mut watched, Outcome::Silent), Some(silent));
        assert_eq!(watched.due(places())[0].last, None, "it is looked up anew");
        assert_eq!(told(&mut watched, Outcome::Silent), None);
        watched.due(places());
        assert_eq!(told(&mut watched, Outcome::Unknown), None);
        assert_eq!(watched.silent.len(), 1);
        watched.due(places());
        let answers = EventKind::MemberAnswers(name("n2"));
        assert_eq!(told(&mut watched, answered()), Some(answers));
        watched.due(places());
        assert_eq!(told(&mut watched, Outcome::Unknown), None);
        assert!(watched.silent.is_empty(), "who could not be asked is not silent");
        watched.due(places());
        assert!(told(&mut watched, Outcome::Silent).is_some());
        watched.due(BTreeMap::new());
        assert!(watched.silent.is_empty());
    }

    #[tokio::test]
    async fn a_name_that_cannot_be_looked_up_says_nothing_of_its_member() {
        let nowhere = Address {
            host: "x".repeat(300), // Longer than a name can be: nobody else is asked.
            port: 1,
        };
        let round = Round {
            name: name("n2"),
            place: Place {
                agent: Some(nowhere),
                postgres: None,
            },
            last: None,
        };
        assert_eq!(run_round(&round).await, Outcome::Unknown);
    }

    #[test]
    fn only_the_hosts_own_refusal_is_an_answer_and_our_own_troubles_are_no_silence() {
        let said = |errno: rustix::io::Errno| said_by(&io::Error::from_raw_os_error(errno.raw_os_error()));
        use rustix::io::Errno;
        for (errno, expected) in [
            (Errno::CONNREFUSED, Said::Something),
            (Errno::CONNRESET, Said::Something),
            (Errno::HOSTUNREACH, Said::Nothing),
            (Errno::TIMEDOUT, Said::Nothing),
            (Errno::MFILE, Said::Unasked),
            (Errno::ADDRNOTAVAIL, Said::Unasked),
            (Errno::NOBUFS, Said::Unasked),
        ] {
            assert_eq!(said(errno), expected, "{errno}");
        }
    }
}
