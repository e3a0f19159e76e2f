//! A view from a list of hosts that are asked by SQL: for the simplest start, and for clusters that nothing else manages.
//!
//! There is no lease and no fence here. The leader is the one host that takes writes by its own word, good for two seconds from
//! before it was asked; when two say so, nobody leads, since no proxy can tell which of them the others follow.

mod session;

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::Map;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

pub use self::session::reach_postgres;
use self::session::{Session, said};
use super::{Proof, SourceHealth, ViewHandle, ViewPublisher, brief, channel_with};
use crate::clock::Boottime;
use crate::etcd::StoreError;
use crate::http::Access;
use crate::name::{Lsn, MemberName, Scope, Timeline};
use crate::record::{Address, MemberRecord, PgState, Role};
use crate::tls::ServerTlsConfig;
use crate::view::{Epoch, Leader, Member, View};

/// For how long a host is believed that says that it takes writes, as a yes of Patroni's is.
const GOOD_FOR: Duration = Duration::from_secs(2);
/// From one question to the next.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// For a host to answer, a new connection included.
const ANSWER_MAX: Duration = Duration::from_millis(700);

/// Everything that is asked, in one row. A user without further privileges may ask it.
const QUESTION: &str = "SELECT pg_is_in_recovery(), current_setting('default_transaction_read_only') = 'on', \
     CASE WHEN pg_is_in_recovery() THEN pg_last_wal_receive_lsn() ELSE pg_current_wal_lsn() END::text, \
     pg_last_wal_replay_lsn()::text, \
     CASE WHEN pg_is_in_recovery() THEN NULL ELSE substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END, \
     (SELECT system_identifier::text FROM pg_control_system()), \
     (SELECT timeline_id FROM pg_control_checkpoint()), \
     (SELECT coalesce(status, 'streaming') FROM pg_stat_wal_receiver WHERE pid IS NOT NULL)";

/// Whom to ask, and as whom.
#[derive(Clone, PartialEq, Eq)]
pub struct HostsConfig {
    /// Where PostgreSQL listens.
    pub hosts: Vec<Address>,
    /// The user to ask as.
    pub user: String,
    /// The database to connect to.
    pub database: String,
    /// Its password for each host, in their order.
    pub passwords: Vec<Option<String>>,
    /// How they are connected to: as the proxy's sessions are. Where that is in plaintext, a host that takes nobody so is asked
    /// by TLS all the same.
    pub tls: ServerTlsConfig,
}

impl std::fmt::Debug for HostsConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostsConfig {{ {:?}, {}, .. }}", self.hosts, self.user)
    }
}

/// What a host has answered.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Told {
    in_recovery: bool,
    /// Writes are refused by its settings.
    read_only: bool,
    position: Option<Lsn>,
    replayed: Option<Lsn>,
    timeline: Option<Timeline>,
    system_id: String,
    receiver: Option<String>,
}

impl Told {
    const fn is_writable(&self) -> bool {
        !self.in_recovery && !self.read_only
    }
}

/// Keeps a view of hosts that are asked by SQL.
pub struct HostsSource {
    config: HostsConfig,
    publisher: ViewPublisher,
    handle: ViewHandle,
    clients: Vec<Option<Session>>,
    rounds: i64,
    trouble: Trouble,
    /// Of the first host that was found to take writes: another one's data is another cluster's.
    system_id: Option<String>,
}

/// What was said last, so that it is said once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Trouble {
    writable: Vec<MemberName>,
    strangers: Vec<MemberName>,
}

impl HostsSource {
    /// A source, and the handle that reads from it.
    #[must_use]
    pub fn new(config: HostsConfig, scope: Scope) -> (Self, ViewHandle) {
        let (publisher, handle) = channel_with(scope, Proof::Server(GOOD_FOR), Access::default());
        let clients = config.hosts.iter().map(|_| None).collect();
        let source = Self {
            config,
            publisher,
            handle: handle.clone(),
            clients,
            rounds: 0,
            trouble: Trouble::default(),
            system_id: None,
        };
        (source, handle)
    }

    /// Runs until `stop`.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut tick = interval(ASK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let rounds = async {
            loop {
                tick.tick().await;
                self.round().await;
            }
        };
        tokio::select! {
            () = stop.cancelled() => {}
            () = rounds => {}
        }
    }

    /// Asks everybody once.
    async fn round(&mut self) {
        let asked_at = Boottime::now();
        let mut asking = JoinSet::new();
        for index in 0..self.clients.len() {
            let client = self.clients.get_mut(index).and_then(Option::take);
            let Some(host) = self.config.hosts.get(index).cloned() else {
                continue;
            };
            let (login, tls) = (self.login(index), self.config.tls.clone());
            asking.spawn(async move {
                let answer = timeout(ANSWER_MAX, ask(client, &host, &login, &tls)).await;
                (index, answer.unwrap_or_else(|_| Err("no answer in time".to_owned())))
            });
        }
        let (mut told, mut failures) = (BTreeMap::new(), Vec::new());
        while let Some(answer) = asking.join_next().await {
            let Ok((index, answer)) = answer else { continue };
            match answer {
                Ok((client, answer)) => {
                    told.insert(index, answer);
                    if let Some(kept) = self.clients.get_mut(index) {
                        *kept = Some(client);
                    }
                }
                Err(error) => failures.extend(
                    self.config
                        .hosts
                        .get(index)
                        .map(|host| format!("{host}: {}", brief(error))),
                ),
            }
        }
        self.rounds += 1;
        self.take(&told, asked_at);
        failures.sort();
        self.publisher.report(if told.is_empty() {
            let what = format!("no host answers ({})", failures.join("; "));
            SourceHealth::Failing(StoreError::Protocol { what })
        } else {
            debug!(?failures, "hosts that do not answer");
            SourceHealth::Following
        });
    }

    fn login(&self, index: usize) -> tokio_postgres::Config {
        let mut login = tokio_postgres::Config::new();
        login.user(&self.config.user).dbname(&self.config.database);
        login.application_name("pgherd proxy");
        if let Some(password) = self.config.passwords.get(index).and_then(Option::as_ref) {
            login.password(password);
        }
        login
    }

    fn take(&mut self, told: &BTreeMap<usize, Told>, asked_at: Boottime) {
        let before = self.handle.load_full();
        if self.system_id.is_none() {
            self.system_id = own_system_id(told);
        }
        let (mut view, trouble) = view(&self.config.hosts, told, self.system_id.as_deref(), &before);
        view.revision = self.rounds;
        if trouble != self.trouble {
            trouble.tell(&self.trouble);
            self.trouble = trouble;
        }
        let leads = view.leader.is_some();
        if told.is_empty() {
            return; // What is known ages.
        }
        // Nobody is proven to lead by a round in which the leader said nothing.
        let answered = view.writable_leader().is_some();
        self.publisher.publish(view);
        if answered || !leads {
            self.publisher.confirm(asked_at);
        }
    }
}

impl Trouble {
    fn tell(&self, before: &Self) {
        let listed = |names: &[MemberName]| {
            let names: Vec<&str> = names.iter().map(MemberName::as_str).collect();
            names.join(" and ")
        };
        if self.writable.len() > 1 {
            warn!(
                "{} take writes at the same time: writes go to none of them",
                listed(&self.writable)
            );
        } else if before.writable.len() > 1 {
            info!("no longer do several hosts take writes");
        }
        if !self.strangers.is_empty() && self.strangers != before.strangers {
            warn!(
                "{} have another system identifier than the first host that took writes: nobody is sent there",
                listed(&self.strangers)
            );
        }
    }
}

async fn ask(
    session: Option<Session>,
    host: &Address,
    login: &tokio_postgres::Config,
    tls: &ServerTlsConfig,
) -> Result<(Session, Told), String> {
    let session = match session.filter(|session| !session.client.is_closed()) {
        Some(session) => session,
        None => Session::open(host, login, tls).await?,
    };
    let said = |error: tokio_postgres::Error| said(&error);
    let row = session.client.query_one(QUESTION, &[]).await.map_err(said)?;
    let text = |index: usize| row.try_get::<_, Option<String>>(index).map_err(said);
    let of_file = text(4)?.and_then(|digits| u32::from_str_radix(&digits, 16).ok());
    let checkpoint: Option<i32> = row.try_get(6).map_err(said)?;
    let timeline = of_file.or_else(|| checkpoint.and_then(|timeline| u32::try_from(timeline).ok()));
    let told = Told {
        in_recovery: row.try_get(0).map_err(said)?,
        read_only: row.try_get(1).map_err(said)?,
        position: text(2)?.and_then(|text| text.parse().ok()),
        replayed: text(3)?.and_then(|text| text.parse().ok()),
        timeline: timeline.map(Timeline),
        system_id: text(5)?.unwrap_or_default(),
        receiver: text(7)?,
    };
    Ok((session, told))
}

/// Whose cluster it is: that of whoever takes writes, unless others do whose data is of another one.
fn own_system_id(told: &BTreeMap<usize, Told>) -> Option<String> {
    let mut writable = told.values().filter(|told| told.is_writable());
    let first = writable.next()?;
    writable
        .all(|other| other.system_id == first.system_id)
        .then(|| first.system_id.clone())
}

/// The view that the answers make. Pure.
fn view(hosts: &[Address], told: &BTreeMap<usize, Told>, system_id: Option<&str>, before: &View) -> (View, Trouble) {
    let mut view = View::empty(before.scope.clone());
    let mut trouble = Trouble::default();
    for (index, host) in hosts.iter().enumerate() {
        let Ok(name) = MemberName::new(host.to_string()) else {
            continue;
        };
        if view.members.contains_key(&name) {
            continue; // Written twice, it is one all the same.
        }
        let told = told.get(&index);
        let is_stranger = told.zip(system_id).is_some_and(|(told, known)| told.system_id != known);
        if is_stranger {
            trouble.strangers.push(name.clone());
        }
        let told = told.filter(|_| !is_stranger);
        if told.is_some_and(Told::is_writable) {
            trouble.writable.push(name.clone());
        }
        let earlier = before.members.get(&name);
        let member = member(&name, host, told, earlier);
        view.members.insert(name, member);
    }
    view.leader = match trouble.writable.as_slice() {
        [writable] => Some(held_by(writable, &view)),
        // Who led and says nothing is believed until its word has ended.
        [] => before.leader.clone().filter(|leader| {
            let holder = hosts
                .iter()
                .position(|host| host.to_string() == leader.epoch.holder.as_str());
            holder.is_some_and(|index| !told.contains_key(&index))
        }),
        [_, _, ..] => None,
    };
    if let Some(leader) = view.leader_member() {
        view.status.optime = leader.record.xlog_location;
    }
    (view, trouble)
}

fn held_by(holder: &MemberName, view: &View) -> Leader {
    let timeline = view.members.get(holder).and_then(|member| member.record.timeline);
    let create_revision = timeline.map_or(0, |timeline| i64::from(timeline.0));
    Leader {
        epoch: Epoch {
            holder: holder.clone(),
            create_revision,
        },
        lease: 0,
        mod_revision: create_revision,
    }
}

fn member(name: &MemberName, host: &Address, told: Option<&Told>, earlier: Option<&Member>) -> Member {
    let mut record = MemberRecord::new(format!("postgres://{host}/postgres"), String::new());
    record.tags = Map::new();
    match told {
        Some(told) => {
            record.state = PgState::Running;
            record.role = if told.is_writable() {
                Role::Primary
            } else {
                Role::Replica
            };
            record.xlog_location = told.position.max(told.replayed);
            record.replay_lsn = told.replayed.filter(|_| told.in_recovery);
            record.receive_lsn = told.position.filter(|_| told.in_recovery);
            record.replication_state = told.receiver.clone();
            record.timeline = told.timeline;
        }
        None => {
            record.role = earlier.map_or(Role::Unknown, |earlier| earlier.record.role);
            record.timeline = earlier.and_then(|earlier| earlier.record.timeline);
        }
    }
    let timeline = record.timeline.map_or(0, |timeline| i64::from(timeline.0));
    Member {
        name: name.clone(),
        record,
        mod_revision: timeline.saturating_add(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts() -> Vec<Address> {
        let host = |number: u8| Address {
            host: format!("10.0.0.{number}"),
            port: 5432,
        };
        vec![host(1), host(2), host(3)]
    }

    fn empty() -> View {
        View::empty(Scope::new("c").expect("a plain name"))
    }

    fn primary(timeline: u32) -> Told {
        Told {
            in_recovery: false,
            read_only: false,
            position: Some(Lsn(100)),
            replayed: None,
            timeline: Some(Timeline(timeline)),
            system_id: "7".to_owned(),
            receiver: None,
        }
    }

    fn replica() -> Told {
        Told {
            in_recovery: true,
            position: Some(Lsn(90)),
            replayed: Some(Lsn(80)),
            receiver: Some("streaming".to_owned()),
            ..primary(1)
        }
    }

    fn of(told: [Option<Told>; 3], before: &View) -> (View, Trouble) {
        let told = told.into_iter().enumerate();
        let told = told.filter_map(|(index, told)| Some((index, told?))).collect();
        view(&hosts(), &told, Some("7"), before)
    }

    fn leader(view: &View) -> Option<&str> {
        view.epoch().map(|epoch| epoch.holder.as_str())
    }

    #[test]
    fn the_one_that_takes_writes_leads_and_of_two_nobody_does() {
        let (one, trouble) = of([Some(primary(1)), Some(replica()), None], &empty());
        assert_eq!((leader(&one), trouble.writable.len()), (Some("10.0.0.1:5432"), 1));
        assert!(one.writable_leader().is_some());
        assert_eq!(one.status.optime, Some(Lsn(100)));
        let second = &one.members[&MemberName::new("10.0.0.2:5432").expect("a name")];
        assert_eq!(
            (second.record.replication_state.as_deref(), second.record.replay_lsn),
            (Some("streaming"), Some(Lsn(80)))
        );
        let (two, trouble) = of([Some(primary(1)), Some(primary(2)), None], &one);
        assert_eq!((leader(&two), trouble.writable.len()), (None, 2));
        let read_only = Told {
            read_only: true,
            ..primary(1)
        };
        let (fenced, _) = of([Some(read_only), Some(primary(2)), None], &two);
        assert_eq!(leader(&fenced), Some("10.0.0.2:5432"));
    }

    #[test]
    fn of_two_clusters_neither_is_taken_for_the_right_one() {
        let other = Told {
            system_id: "8".to_owned(),
            ..primary(1)
        };
        let of = |told: &[Told]| own_system_id(&told.iter().cloned().enumerate().collect());
        assert_eq!(of(&[replica(), primary(1)]).as_deref(), Some("7"));
        assert_eq!(of(&[primary(1), primary(2)]).as_deref(), Some("7"));
        assert_eq!(of(&[primary(1), other]), None);
        assert_eq!(of(&[replica()]), None);
    }

    #[test]
    fn a_host_that_is_written_twice_is_not_two_that_take_writes() {
        let mut hosts = hosts();
        hosts[1] = hosts[0].clone();
        let told = [(0, primary(1)), (1, primary(1))].into_iter().collect();
        let (view, trouble) = view(&hosts, &told, Some("7"), &empty());
        assert_eq!((leader(&view), trouble.writable.len()), (Some("10.0.0.1:5432"), 1));
    }

    #[test]
    fn a_leader_that_says_nothing_leads_by_its_last_word_and_takes_nobody_new() {
        let (one, _) = of([Some(primary(1)), Some(replica()), None], &empty());
        let (silent, _) = of([None, Some(replica()), None], &one);
        assert_eq!(silent.epoch(), one.epoch());
        assert!(silent.writable_leader().is_none());
        let (back, _) = of([Some(primary(1)), Some(replica()), None], &silent);
        assert_eq!(back.epoch(), one.epoch());
        let (demoted, _) = of([Some(replica()), Some(replica()), None], &one);
        assert_eq!(leader(&demoted), None);
        let (promoted, _) = of([None, Some(primary(2)), None], &one);
        assert_ne!(promoted.epoch(), one.epoch());
    }

    #[test]
    fn a_host_of_another_cluster_gets_nobody() {
        let stranger = Told {
            system_id: "8".to_owned(),
            ..primary(1)
        };
        let (view, trouble) = of([Some(primary(1)), Some(stranger), None], &empty());
        assert_eq!((leader(&view), trouble.strangers.len()), (Some("10.0.0.1:5432"), 1));
        let other = &view.members[&MemberName::new("10.0.0.2:5432").expect("a name")];
        assert_eq!(other.record.state, PgState::Unknown);
    }
}
