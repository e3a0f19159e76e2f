//! What clients are told: a [`Fatal`] for every way in which the proxy sends one away or ends its session.
//!
//! Host names and addresses stay in our log. No text says that nothing was committed: the proxy cannot know.

use std::time::Duration;

use pgherd_cluster::event::EventId;
use pgherd_cluster::name::MemberName;

use crate::admission::{Of, Reached, Who};
use crate::config::LimitsConfig;
use crate::gate::Crowd;
use crate::handshake::HandshakeError;
use crate::route::{Outlived, Why};
use crate::wire::error_response::Fatal;
use crate::wire::startup::Malformed;

/// SQLSTATE `cannot_connect_now`: drivers throw the connection away and try again.
const CANNOT_CONNECT_NOW: &str = "57P03";
const ADMIN_SHUTDOWN: &str = "57P01";
const TOO_MANY_CONNECTIONS: &str = "53300";
const INVALID_AUTHORIZATION: &str = "28000";
const PROTOCOL_VIOLATION: &str = "08P01";
const FEATURE_NOT_SUPPORTED: &str = "0A000";

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

/// What this proxy itself knows of the cluster: what a refusal can say beside its reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Knowledge {
    /// Who has to answer before anything is known; nothing where nobody has been asked.
    pub(crate) awaited: Option<Awaited>,
    /// How long this proxy has seen nobody lead, while nobody does.
    pub(crate) leaderless: Option<Leaderless>,
}

/// Whom the proxy asks about the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Awaited {
    /// etcd.
    Store,
    /// etcd, which answers that this proxy may not ask.
    StoreThatRefuses,
    /// Members' agents.
    Agents,
    /// Hosts, by SQL.
    Hosts,
}

/// Since when nobody leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaderless {
    /// Somebody led, until so long ago.
    For(Duration),
    /// This proxy has seen nobody lead, since it first looked so long ago.
    SinceTheStart(Duration),
}

impl Awaited {
    const fn missing(self) -> &'static str {
        match self {
            Self::Store => "etcd has not answered since this proxy started",
            Self::StoreThatRefuses => "etcd refuses this proxy's credentials",
            Self::Agents => "no member's agent has answered since this proxy started",
            Self::Hosts => "none of its hosts has answered since this proxy started",
        }
    }

    const fn silent(self) -> &'static str {
        match self {
            Self::Store => "its store does not answer",
            Self::StoreThatRefuses => "its store refuses this proxy's credentials",
            Self::Agents => "no member's agent answers",
            Self::Hosts => "the host that took writes does not answer",
        }
    }
}

/// A client that could not be connected.
pub(crate) fn cannot_route(why: &Why, waited: Duration, knowledge: Knowledge) -> Fatal {
    let message = match why {
        Why::NothingKnown => {
            let missing = knowledge.awaited.map_or("nobody has answered yet", Awaited::missing);
            format!("nothing is known of the cluster yet: {missing}")
        }
        Why::NoLeader => match knowledge.leaderless {
            Some(Leaderless::For(time)) => format!("there is no leader: nobody has led for {}", seconds(time)),
            Some(Leaderless::SinceTheStart(time)) => format!(
                "there is no leader: none has been seen since this proxy started to look {} ago",
                seconds(time)
            ),
            None => "there is no leader".to_owned(),
        },
        Why::NoRecord { leader } => format!("leader {leader} has not announced itself yet"),
        Why::NotWritable {
            leader,
            from_before: true,
            ..
        } => {
            format!("leader {leader} is not writable yet: it has not told its role since it became leader")
        }
        Why::NotWritable {
            leader, role, state, ..
        } => {
            format!(
                "leader {leader} is not writable yet: role {}, state {}",
                role.as_str(),
                state.as_str()
            )
        }
        Why::WarrantLapsed { age } => format!(
            "it is not certain who leads: the view of the cluster is {} old, {}",
            seconds(*age),
            knowledge.awaited.map_or("nobody confirms it", Awaited::silent)
        ),
        Why::NoWord { leader } => format!("{leader} leads by what its members tell, and does not confirm it itself"),
        Why::StandbyCluster { leader } => format!("this is a standby cluster: {leader} leads it and takes no writes"),
        Why::NoStandbyCluster { leader } => {
            format!("this is no standby cluster: {leader} leads it and takes writes")
        }
        Why::NotUp { leader, role, state } => format!(
            "leader {leader} of the standby cluster is not up yet: role {}, state {}",
            role.as_str(),
            state.as_str()
        ),
        Why::NoAddress { leader } => format!("leader {leader} has announced no address"),
        Why::NoReplica { members } if members.is_empty() => {
            "no replica can be read from: the cluster has no members".to_owned()
        }
        Why::NoReplica { members } => {
            let listed: Vec<String> = members.iter().map(|(name, why)| format!("{name}: {why}")).collect();
            format!("no replica can be read from ({})", listed.join("; "))
        }
        Why::LeaderFull { leader, limit } => {
            format!("no replica can be read from, and leader {leader} takes only {limit} readers in their place")
        }
        Why::Unreachable { member } => format!("{member} cannot be connected to"),
        Why::NotNow { member, said } => format!("{member} takes no connections now: {said}"),
    };
    let hint = match why {
        Why::StandbyCluster { .. } => "Write to the cluster that this one follows.",
        Why::NoStandbyCluster { .. } => "Connect to a listener for writers or readers.",
        _ => "Try again: the cluster recovers by itself if it can.",
    };
    Fatal::new(CANNOT_CONNECT_NOW, message)
        .detail(format!(
            "The connection was held for {} before it was refused.",
            seconds(waited)
        ))
        .hint(hint)
}

/// A client for whom there is no place to wait.
pub(crate) fn hold_full(why: &Why, limit: usize, knowledge: Knowledge) -> Fatal {
    let cause = cannot_route(why, Duration::ZERO, knowledge);
    Fatal::new(
        TOO_MANY_CONNECTIONS,
        format!("too many clients wait already: {}", cause.message()),
    )
    .detail(format!("The proxy holds at most {limit} clients."))
    .hint("Try again later.")
}

/// A client whose address the listener does not take, as PostgreSQL says it.
pub(crate) fn not_allowed(who: &Who) -> Fatal {
    let address = who
        .address
        .map_or_else(|| "unknown".to_owned(), |address| address.to_string());
    let (user, database) = (who.user.as_deref(), who.database.as_deref());
    let message = format!(
        "no entry of allow for host \"{address}\", user {:?}, database {:?}",
        user.unwrap_or_default(),
        database.unwrap_or("replication")
    );
    Fatal::new(INVALID_AUTHORIZATION, message)
        .detail("The proxy's listener takes clients from certain addresses only.")
        .hint("Connect from another address, or add this one to allow of the listener.")
}

/// A client for whom a limit leaves no place.
pub(crate) fn limit_reached(reached: &Reached) -> Fatal {
    let Reached { of, open, limit } = reached;
    let (message, one) = match of {
        Of::Connections => (
            "too many connections to the proxy".to_owned(),
            "client connections".to_owned(),
        ),
        Of::User(user) => (
            format!("too many connections for user {user:?}"),
            "connections of one user".to_owned(),
        ),
        Of::Database(database) => (
            format!("too many connections for database {database:?}"),
            "connections to one database".to_owned(),
        ),
        Of::Address(address) => (
            format!("too many connections from address {address}"),
            "connections from one address".to_owned(),
        ),
    };
    Fatal::new(TOO_MANY_CONNECTIONS, format!("{message}: {open} are open"))
        .detail(format!("The proxy takes at most {limit} {one}."))
        .hint(format!(
            "Close connections that are not used, or raise limits.{}.",
            of.key()
        ))
}

/// A client for whom a member has no place: none to wait at either, or none in the time that it `waited`.
pub(crate) fn member_full(member: &MemberName, crowd: Crowd, limits: &LimitsConfig, waited: Option<Duration>) -> Fatal {
    let Crowd { inside, waiting } = crowd;
    let message = match waited {
        None => format!("too many sessions on {member}: {inside} are open, and {waiting} clients wait already"),
        Some(waited) => format!(
            "too many sessions on {member}: {inside} are open, and none ended in {}",
            seconds(waited)
        ),
    };
    let sessions = limits.per_member.unwrap_or(inside);
    let (clients, timeout) = (limits.queue.clients, seconds(limits.queue.timeout));
    Fatal::new(TOO_MANY_CONNECTIONS, message)
        .detail(format!(
            "The proxy opens at most {sessions} sessions on one member, and lets at most {clients} clients wait for one, for {timeout}."
        ))
        .hint("Close connections that are not used, or raise limits.per_member or limits.queue.")
}

/// A client whose turn to start at a member has not come.
pub(crate) fn startups_full(member: &MemberName, crowd: Crowd, waited: Option<Duration>) -> Fatal {
    let Crowd { inside, waiting } = crowd;
    let fatal = Fatal::new(
        CANNOT_CONNECT_NOW,
        format!(
            "too many clients connect to {member} at once: {inside} are starting, and {waiting} more wait for their turn"
        ),
    );
    let fatal = match waited {
        Some(waited) => fatal.detail(format!(
            "The connection was held for {} before it was refused.",
            seconds(waited)
        )),
        None => fatal,
    };
    fatal.hint("Try again; limits.startups_per_member says how many may start at a time.")
}

/// Said when sessions are cut at the end of a drain, and to clients that have no session yet.
pub(crate) fn stopping() -> Fatal {
    Fatal::new(ADMIN_SHUTDOWN, "terminating connection: the proxy stops")
        .detail("The proxy was asked to stop, and its grace period is over.")
        .hint(RECONNECT)
}

const RECONNECT: &str = "Reconnect; the statement in progress, if any, may or may not have been committed.";

/// A session that must not outlive its leader.
pub(crate) fn outlived(why: &Outlived) -> Fatal {
    let detail = match why {
        Outlived::EpochOver { now: None } => "The leader that this session was connected to leads no longer; nobody leads now.".to_owned(),
        Outlived::EpochOver { now: Some(epoch) } => format!(
            "The leadership that this session was connected under is over; {} leads now.",
            epoch.holder
        ),
        Outlived::WarrantLapsed => {
            "It is no longer certain that the member which this session was connected to leads: the cluster's store does not answer.".to_owned()
        }
        Outlived::Promoted { member } => format!("{member} was promoted; this session came for a replica."),
        Outlived::Silent { member } => format!("{member} does not answer; neither does its agent."),
        Outlived::Strayed { member, why } => format!("{member} is no longer what this session came for: {why}."),
        Outlived::Moved { member } => format!("{member} has more sessions than its part; a new one goes to another member."),
    };
    let message = match why {
        Outlived::Promoted { .. } => "terminating connection: its replica is none any more",
        Outlived::Silent { .. } => "terminating connection: its replica does not answer",
        Outlived::Strayed { .. } => "terminating connection: its replica is not what it came for",
        Outlived::Moved { .. } => "terminating connection: sessions are spread anew",
        Outlived::EpochOver { .. } | Outlived::WarrantLapsed => "terminating connection: its leader no longer leads",
    };
    Fatal::new(ADMIN_SHUTDOWN, message).detail(detail).hint(RECONNECT)
}

/// Adds the name of the event that is behind it, under which log, page and `pgherd events` tell more.
pub(crate) fn told_by(fatal: Fatal, event: Option<EventId>) -> Fatal {
    match event {
        Some(event) => fatal.more_detail(&format!("Event {event}.")),
        None => fatal,
    }
}

/// Whether what ended, or did not begin, did so for something that happened to the leader.
pub(crate) const fn is_about_leader(why: &Why) -> bool {
    matches!(
        why,
        Why::NoLeader | Why::NoRecord { .. } | Why::NotWritable { .. } | Why::WarrantLapsed { .. } | Why::NoWord { .. }
    )
}

/// A client whose certificate is another user's.
pub(crate) fn not_your_certificate(name: Option<&str>, user: Option<&str>) -> Fatal {
    let user = user.unwrap_or_default();
    let detail = match name {
        Some(name) => format!("The certificate is for {name}."),
        None => "The certificate names nobody: it has no common name, or several.".to_owned(),
    };
    Fatal::new(
        INVALID_AUTHORIZATION,
        format!("the client's certificate is not for user \"{user}\""),
    )
    .detail(detail)
    .hint("Connect as the user whom the certificate names, or with another certificate.")
}

/// A client that did not come in a way that is taken here, or nothing for one who would not understand an answer.
pub(crate) fn unwelcome(why: &HandshakeError) -> Option<Fatal> {
    match why {
        HandshakeError::Malformed(what) => malformed(what),
        HandshakeError::TlsRequired => Some(
            Fatal::new(INVALID_AUTHORIZATION, "this address takes connections by TLS only")
                .hint("Connect with sslmode=require, or better, with sslmode=verify-full."),
        ),
        HandshakeError::Io(_) | HandshakeError::Tls(_) => None,
    }
}

/// A first packet that is not understood, or nothing for one whose sender would not understand an answer.
fn malformed(what: &Malformed) -> Option<Fatal> {
    let sqlstate = match what {
        Malformed::DirectTls => return None,
        Malformed::Protocol { .. } => FEATURE_NOT_SUPPORTED,
        _ => PROTOCOL_VIOLATION,
    };
    Some(Fatal::new(sqlstate, what.to_string()))
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::record::{PgState, Role};
    use pgherd_cluster::view::Epoch;

    use super::*;
    use crate::balance::LeftOut;
    use crate::testing::name;

    #[test]
    fn a_refusal_says_why() {
        let say_with = |why: Why, awaited: Option<Awaited>, leaderless: Option<Leaderless>| {
            let knowledge = Knowledge { awaited, leaderless };
            cannot_route(&why, Duration::from_secs(10), knowledge)
                .message()
                .to_owned()
        };
        let say = |why: Why| say_with(why, None, None);
        let time = Duration::from_millis(12_300);
        assert_eq!(
            say_with(Why::NoLeader, None, Some(Leaderless::For(time))),
            "there is no leader: nobody has led for 12.3 s"
        );
        assert_eq!(
            say_with(Why::NoLeader, None, Some(Leaderless::SinceTheStart(time))),
            "there is no leader: none has been seen since this proxy started to look 12.3 s ago"
        );
        for (awaited, named) in [
            (Awaited::Store, "etcd has not answered"),
            (Awaited::StoreThatRefuses, "etcd refuses this proxy's credentials"),
            (Awaited::Agents, "no member's agent has answered"),
            (Awaited::Hosts, "none of its hosts has answered"),
        ] {
            let said = say_with(Why::NothingKnown, Some(awaited), None);
            assert!(
                said.starts_with("nothing is known of the cluster yet: ") && said.contains(named),
                "{said}"
            );
        }
        let promoted = Why::NotWritable {
            leader: name("n1"),
            role: Role::Promoted,
            state: PgState::Running,
            from_before: false,
        };
        assert_eq!(
            say(promoted),
            "leader n1 is not writable yet: role promoted, state running"
        );
        let lapsed = Why::WarrantLapsed {
            age: Duration::from_secs(31),
        };
        assert!(say(lapsed.clone()).contains("the view of the cluster is 31.0 s old, nobody confirms it"));
        assert!(say_with(lapsed, Some(Awaited::Hosts), None).ends_with("the host that took writes does not answer"));
    }

    #[test]
    fn no_text_promises_what_became_of_a_statement() {
        let epoch = Epoch {
            holder: name("n2"),
            create_revision: 5,
        };
        for why in [
            Outlived::WarrantLapsed,
            Outlived::EpochOver { now: None },
            Outlived::EpochOver { now: Some(epoch) },
            Outlived::Promoted { member: name("n2") },
            Outlived::Silent { member: name("n2") },
            Outlived::Moved { member: name("n2") },
            Outlived::Strayed {
                member: name("n2"),
                why: LeftOut::NotSync,
            },
        ] {
            let fatal = outlived(&why);
            assert_eq!(fatal.sqlstate(), "57P01");
            let bytes = fatal.encode();
            let text = String::from_utf8_lossy(&bytes).into_owned();
            assert!(text.contains("may or may not have been committed") && !text.contains("nothing was committed"));
        }
    }
}
