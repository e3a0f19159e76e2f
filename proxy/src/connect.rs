//! From a client that wants a session to a server that takes it: decide, dial, hold, again, until it is connected or its
//! patience is over.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::view::View;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::balance::Load;
use crate::client::Client;
use crate::config::{ListenerConfig, ListenerRole};
use crate::counters::OpenRoute;
use crate::dial::dial;
use crate::draw::draws;
use crate::events::EventKind;
use crate::gate::Pass;
use crate::look::look;
use crate::refusal;
use crate::route::{self, Decision, Footing, Policy, Target, Why};
use crate::secure::secure;
use crate::sessions::{Ending, Registration, Server, Told, Word};
use crate::shared::{ListenerState, Shared, count};
use crate::stream::Stream;
use crate::turn::{Entered, NoTurn, Place, STARTUP_MAX, Waits, keep_briefly};
use crate::waiting::Listed;
use crate::wire::error_response::Fatal;
use crate::wire::first_answer::FirstAnswer;
use crate::wire::startup::FirstPacket;

const RETRY_MIN: Duration = Duration::from_millis(20);
const RETRY_MAX: Duration = Duration::from_millis(500);
/// For how long other replicas are tried for a client that may not be held.
pub(crate) const TRY_OTHERS_MAX: Duration = Duration::from_secs(5);
/// The most that PostgreSQL's `authentication_timeout` can be: no server asks for a password later than this.
const AUTHENTICATION_MAX: Duration = Duration::from_secs(600);
/// A startup message fits in any socket buffer; a server that takes none of it is as good as absent.
const FORWARD_MAX: Duration = Duration::from_secs(2);

/// A server that has the client's startup message and did not turn it away.
pub(crate) struct Connected {
    pub(crate) server: Stream,
    /// What was received of its answer.
    pub(crate) early: Vec<u8>,
    pub(crate) target: Target,
    pub(crate) registration: Registration,
    pub(crate) ended: Told,
    pub(crate) route: OpenRoute,
    /// Kept while the session goes on.
    pub(crate) place: Place,
    pub(crate) dialled_at: Boottime,
}

/// Why there is none.
pub(crate) enum Denied {
    /// With what the client is told.
    Refused(Fatal),
    /// It went away before it was connected.
    ClientGone,
    /// The proxy stops.
    Stopping,
}

/// One client on its way.
pub(crate) struct Connector<'a> {
    pub(crate) shared: &'a Arc<Shared>,
    pub(crate) worker: usize,
    /// The listener's number, and itself.
    pub(crate) index: usize,
    pub(crate) listener: &'a ListenerState,
    /// As it was when the client came.
    pub(crate) config: &'a ListenerConfig,
    /// Locked by nobody else, and for no longer than a look takes.
    pub(crate) client: Mutex<&'a mut Stream>,
    /// The client speaks TLS with us.
    pub(crate) client_by_tls: bool,
    /// What the server gets first.
    pub(crate) startup: &'a Bytes,
    pub(crate) client_is: &'a Client,
    /// The startup message is in it, and not the client's request for TLS with the server.
    pub(crate) in_clear: bool,
    pub(crate) cut: &'a CancellationToken,
}

enum Dialled {
    Connected(Box<Connected>),
    /// The member does not answer, took nothing, or takes no connections now.
    Failed(Why),
    /// What the dial was decided on is no longer so.
    Overtaken,
    Denied(Denied),
}

impl From<NoTurn> for Dialled {
    fn from(why: NoTurn) -> Self {
        match why {
            NoTurn::Overtaken => Self::Overtaken,
            NoTurn::Denied(denied) => Self::Denied(denied),
        }
    }
}

impl Dialled {
    fn unreachable(target: &Target) -> Self {
        Self::Failed(Why::Unreachable {
            member: target.member.clone(),
        })
    }
}

impl Connector<'_> {
    /// Runs until the client is connected or sent away, and notes how long that took.
    pub(crate) async fn connect(&self) -> Result<Connected, Denied> {
        let started = Boottime::now();
        let mut waiting = self.shared.waiting.enter(self.worker, &self.client_is.about, started);
        let found = self.look_for_a_server(started, &mut waiting).await;
        let now = Boottime::now();
        if let Some(since) = waiting.held_since() {
            self.listener.hold_time.observe(now.since(since));
        }
        if let Ok(connected) = &found {
            self.listener.startup_time.observe(now.since(started));
            let member = &connected.target.member;
            self.shared
                .connect_times
                .observe(member, now.since(connected.dialled_at));
        }
        found
    }

    async fn look_for_a_server(&self, started: Boottime, waiting: &mut Listed) -> Result<Connected, Denied> {
        let policy = self.policy(started);
        let mut changes = self.shared.view.subscribe();
        let mut rechecks = self.shared.rechecks();
        let mut opened = self.shared.opened.subscribe();
        let tried_until = started + TRY_OTHERS_MAX;
        let mut place = None;
        let mut avoid = Vec::new();
        let mut retry = RETRY_MIN;
        let look_until = policy.hold_until.max(tried_until);
        let mut failed = None;
        let mut answered = None;
        let mut waits = Waits::new(started);
        loop {
            // Before the evidence is read, so that no change after it is missed.
            changes.mark_unchanged();
            rechecks.mark_unchanged();
            opened.mark_unchanged();
            let (why, last_chance) = match self.decide(policy, &avoid, &mut waits) {
                Decision::Refuse(why) => (why, true),
                Decision::Hold(why) => (why, false),
                Decision::To(target) => match self
                    .try_it(
                        policy,
                        &target,
                        &avoid,
                        (&mut changes, &mut rechecks),
                        (look_until, &mut waits),
                    )
                    .await
                {
                    Dialled::Connected(connected) => return Ok(*connected),
                    Dialled::Overtaken => continue,
                    Dialled::Denied(denied) => return Err(denied),
                    Dialled::Failed(why) if self.config.role.is_balanced() && Boottime::now() < look_until => {
                        avoid.push(target.member);
                        failed = Some(why);
                        continue;
                    }
                    Dialled::Failed(why) => (why, Boottime::now() >= policy.hold_until),
                },
            };
            if matches!(why, Why::NoReplica { .. } | Why::Unreachable { .. })
                && let Some(silent) = self.silent_leader(policy, &avoid, &mut answered).await
            {
                avoid.push(silent);
                continue;
            }
            // The route knows only that all were tried; what the last one said is worth more.
            let why = match (why, failed.take()) {
                (Why::Unreachable { .. } | Why::NoReplica { .. }, Some(failed)) => failed,
                (why, _) => why,
            };
            if last_chance {
                return Err(self.refuse(&why, started));
            }
            if place.is_none() {
                place = Some(self.shared.hold(self.listener).ok_or_else(|| self.refuse_hold(&why))?);
            }
            waiting.hold(&why, policy.hold_until);
            let pause = pause(&why, policy, &mut retry);
            avoid.clear(); // They may answer by then.
            tokio::select! {
                () = sleep(pause) => {}
                () = changed(&mut changes) => {}
                () = changed(&mut opened) => {}
                () = gone(&self.client) => return Err(Denied::ClientGone),
                () = self.cut.cancelled() => return Err(Denied::Stopping),
            }
        }
    }

    fn policy(&self, started: Boottime) -> Policy<'_> {
        let hold = self.shared.config.load().hold;
        let patience = if hold.clients == 0 {
            Duration::ZERO
        } else {
            hold.timeout
        };
        Policy {
            role: self.config.role,
            rules: &self.config.reads,
            hold_until: started + patience,
        }
    }

    /// Where a client goes; of members that are as good, to one that has room, if there is one.
    fn decide(&self, policy: Policy<'_>, avoid: &[MemberName], waits: &mut Waits) -> Decision {
        let leads_to = |target: &Target| route::still_leads_to(target, policy, self.shared.seen().evidence(), avoid);
        if let Some(target) = waits.called().filter(|target| leads_to(target)) {
            return Decision::To(target.clone());
        }
        let first = match self.route(policy, avoid) {
            Decision::To(target) => target,
            decision => {
                waits.leave();
                return decision;
            }
        };
        if !policy.role.is_balanced() {
            return Decision::To(first);
        }
        // The last resorts are for when the others do not answer, not for when they are full.
        let is_as_good = |next: &Target| (next.epoch.is_none() || policy.role == ListenerRole::Any) && leads_to(next);
        let (mut full, mut found) = (avoid.to_vec(), Vec::new());
        let mut next = Some(first.clone());
        while let Some(target) = next.take() {
            if self.enter_at_once(&target, waits) {
                return Decision::To(target);
            }
            full.push(target.member.clone());
            found.push(target);
            next = match self.route(policy, &full) {
                Decision::To(next) if !full.contains(&next.member) && is_as_good(&next) => Some(next),
                Decision::To(_) | Decision::Hold(_) | Decision::Refuse(_) => None,
            };
        }
        let chosen = self.wait_at_one_of(&found, waits).cloned();
        Decision::To(chosen.unwrap_or(first))
    }

    fn route(&self, policy: Policy<'_>, avoid: &[MemberName]) -> Decision {
        let seen = self.shared.seen();
        if !policy.role.is_balanced() {
            return route::route(policy, seen.evidence(), Load::IDLE); // There is nothing to choose.
        }
        let config = self.shared.config.load();
        let open = self.shared.routes.open_by_member();
        let experience = self.shared.experience();
        let load = Load {
            open: &|member| open.get(member).copied().unwrap_or_default(),
            of_listener: &|member| self.shared.routes.open_on(self.index, member),
            standing: &|member| experience.standing(member, seen.now, config.slow_start),
            zone: config.zone.as_deref(),
            draws: draws(),
            avoid,
        };
        route::route(policy, seen.evidence(), load)
    }

    /// Notes what came of connecting a reader.
    fn learn(&self, target: &Target, dialled: &Dialled) {
        if !self.config.role.is_balanced() {
            return;
        }
        let now = Boottime::now();
        let mut experience = self.shared.experience();
        match dialled {
            Dialled::Connected(connected) => {
                experience.answered(&target.member, now.since(connected.dialled_at), now);
            }
            Dialled::Failed(_) => experience.failed(&target.member, now),
            Dialled::Overtaken | Dialled::Denied(_) => {}
        }
    }

    /// The leader, if it cannot be connected to: nobody can stream from it then. One that answered is noted in `answered` and
    /// not asked again for this client, since each question costs it a connection.
    async fn silent_leader(
        &self,
        policy: Policy<'_>,
        avoid: &[MemberName],
        answered: &mut Option<MemberName>,
    ) -> Option<MemberName> {
        let seen = self.shared.seen();
        let leader = route::worth_asking(policy, seen.evidence(), avoid)?;
        if answered.as_ref() == Some(&leader.name) {
            return None;
        }
        let address = leader.record.postgres_address()?;
        let dialled = tokio::select! {
            dialled = dial(&address) => dialled,
            // Noticed again where it is waited.
            () = gone(&self.client) => return None,
            () = self.cut.cancelled() => return None,
        };
        if dialled.is_err() {
            return Some(leader.name.clone());
        }
        *answered = Some(leader.name.clone());
        None
    }

    /// Connects to `target`, and notes what came of it. A reader counts as a session of its member from here on: those who
    /// come at the same time must not all go to the same one.
    async fn try_it(
        &self,
        policy: Policy<'_>,
        target: &Target,
        avoid: &[MemberName],
        changes: (&mut watch::Receiver<Arc<View>>, &mut watch::Receiver<u64>),
        limits: (Boottime, &mut Waits),
    ) -> Dialled {
        let Some(route) = self.enter(policy, target) else {
            // Others took the last places on the leader: what it has there leads nowhere, and must not lead there again.
            limits.1.leave();
            return Dialled::Overtaken;
        };
        let dialled = self.dial(policy, target, avoid, changes, limits, route).await;
        self.learn(target, &dialled);
        dialled
    }

    /// Counts a session in, as far as its member takes that many.
    fn enter(&self, policy: Policy<'_>, target: &Target) -> Option<OpenRoute> {
        let is_last_resort = target.epoch.is_some() && policy.rules.fallback_to_leader;
        let limit = policy.rules.fallback_max.filter(|_| is_last_resort);
        let limit = limit.unwrap_or(usize::MAX);
        self.shared.routes.enter_below(self.index, &target.member, limit)
    }

    /// Dials while the route still leads there, and enters the session before its evidence is looked at for the last time:
    /// from then on the fence knows of it.
    async fn dial(
        &self,
        policy: Policy<'_>,
        target: &Target,
        avoid: &[MemberName],
        (changes, rechecks): (&mut watch::Receiver<Arc<View>>, &mut watch::Receiver<u64>),
        (look_until, waits): (Boottime, &mut Waits),
        route: OpenRoute,
    ) -> Dialled {
        let still_leads_there = || route::still_leads_to(target, policy, self.shared.seen().evidence(), avoid);
        let overtaken = async {
            loop {
                tokio::select! {
                    () = changed(changes) => {}
                    () = changed(rechecks) => {}
                }
                if !still_leads_there() {
                    break;
                }
            }
        };
        tokio::pin!(overtaken);
        let Entered { place, startup } = match self.turn(target, waits, overtaken.as_mut()).await {
            Ok(entered) => entered,
            Err(why) => return why.into(),
        };
        let dialled_at = Boottime::now(); // Waiting for its turn is not the member's slowness.
        if self.config.role.is_balanced() {
            self.shared.experience().chosen(&target.member, dialled_at);
        }
        let dialled = tokio::select! {
            dialled = self.reach(target) => dialled,
            () = overtaken => return Dialled::Overtaken,
            () = self.cut.cancelled() => return Dialled::Denied(Denied::Stopping),
        };
        let (server, address): (Stream, SocketAddr) = match dialled {
            Ok(connected) => connected,
            Err(error) => {
                debug!(member = %target.member, address = %target.address, %error, "cannot connect to a member");
                self.shared
                    .events
                    .record(EventKind::MemberUnreachable(target.member.clone()));
                return Dialled::unreachable(target);
            }
        };
        let footing = Footing {
            member: target.member.clone(),
            epoch: target.epoch.clone(),
            on_promoted: self.config.on_promoted(),
            listener: self.index,
            since: Boottime::now(),
            in_clear: self.in_clear,
        };
        let server_at = Server {
            at: address,
            host: target.address.host.clone(),
        };
        let (registration, ended) = self
            .shared
            .sessions
            .enter(self.worker, &self.client_is.about, footing, server_at);
        if !still_leads_there() {
            return Dialled::Overtaken;
        }
        let connected = Connected {
            server,
            early: Vec::new(),
            target: target.clone(),
            registration,
            ended,
            route,
            place,
            dialled_at,
        };
        self.ask(connected, startup, look_until).await
    }

    /// Connects, and speaks TLS where that is wanted.
    async fn reach(&self, target: &Target) -> io::Result<(Stream, SocketAddr)> {
        let (socket, address) = dial(&target.address).await?;
        let tls = self.shared.tls.load_full();
        let server = match self.in_clear {
            true => secure(socket, &target.address, &tls, self.client_by_tls).await?,
            false => Stream::Plain(socket),
        };
        Ok((server, address))
    }

    /// Forwards the startup message and looks at the first word of the answer: a server that takes no connections now is as
    /// good as one that does not answer. Nothing has been said to the client yet, so it can still go elsewhere.
    async fn ask(&self, mut connected: Connected, startup: Pass, look_until: Boottime) -> Dialled {
        let target = &connected.target;
        let forwarded = timeout(FORWARD_MAX, connected.server.write_all(self.startup)).await;
        if !matches!(forwarded, Ok(Ok(()))) {
            return Dialled::unreachable(target);
        }
        // Of a handshake that the client has begun without asking, the server has a few bytes: it says nothing to those.
        if !self.in_clear && *self.startup != FirstPacket::ssl_request() {
            connected.route = connected.route.begun();
            return Dialled::Connected(Box::new(connected));
        }
        // Who has waited for its turn has a moment to be looked after. What a server offers by TLS is not for a client without
        // it, so that such an answer is waited for in any case.
        let must_be_seen = connected.server.plain().is_none();
        let look_until = if must_be_seen {
            Boottime::now() + AUTHENTICATION_MAX
        } else {
            look_until.max(Boottime::now() + STARTUP_MAX)
        };
        let looked = tokio::select! {
            biased;
            ending = &mut connected.ended => {
                return match ending.map(|word| *word) {
                    Ok(Word::End(Ending::Stopping)) => Dialled::Denied(Denied::Stopping),
                    // One that should leave has not begun: it can go elsewhere at once.
                    Ok(Word::End(Ending::Outlived(_)) | Word::Leave(..)) | Err(_) => Dialled::Overtaken,
                };
            }
            looked = look(&mut connected.server, &mut connected.early) => looked,
            never = keep_briefly(startup) => match never {},
            () = gone(&self.client) => return Dialled::Denied(Denied::ClientGone),
            () = self.cut.cancelled() => return Dialled::Denied(Denied::Stopping),
            () = sleep(look_until.since(Boottime::now())) => match must_be_seen {
                true => Err(io::ErrorKind::TimedOut.into()),
                // A server may think for long before its first word; the relay waits on.
                false => Ok(FirstAnswer::ForTheClient),
            },
        };
        match looked {
            Ok(FirstAnswer::ForTheClient | FirstAnswer::Incomplete) => {
                connected.route = connected.route.begun();
                Dialled::Connected(Box::new(connected))
            }
            Ok(FirstAnswer::NotNow(said)) => {
                let member = target.member.clone();
                debug!(%member, said, "a member takes no connections now");
                let kind = EventKind::MemberNotNow {
                    member: member.clone(),
                    said: said.clone(),
                };
                self.shared.events.record(kind);
                Dialled::Failed(Why::NotNow { member, said })
            }
            Err(_) => Dialled::unreachable(target),
        }
    }

    fn refuse(&self, why: &Why, started: Boottime) -> Denied {
        let waited = Boottime::now().since(started);
        count(&self.listener.refused);
        if !matches!(why, Why::StandbyCluster { .. } | Why::NoStandbyCluster { .. }) {
            count(&self.listener.hold_expired);
            let listener = self.listener.name.clone();
            self.shared.events.record(EventKind::HoldExpired { listener });
        }
        let fatal = refusal::cannot_route(why, waited, self.shared.knowledge());
        let event = self.shared.event_behind().filter(|_| refusal::is_about_leader(why));
        Denied::Refused(refusal::told_by(fatal, event))
    }

    fn refuse_hold(&self, why: &Why) -> Denied {
        count(&self.listener.refused);
        self.shared.limited.count("hold", "");
        self.shared.events.record(EventKind::HoldFull);
        let limit = self.shared.config.load().hold.clients;
        Denied::Refused(refusal::hold_full(why, limit, self.shared.knowledge()))
    }
}

/// Until the next look, if nothing changes before. What the view does not tell of is looked for more and more rarely.
fn pause(why: &Why, policy: Policy, retry: &mut Duration) -> Duration {
    let pause = policy.hold_until.since(Boottime::now());
    if !matches!(
        why,
        Why::Unreachable { .. } | Why::NotNow { .. } | Why::LeaderFull { .. }
    ) {
        return pause;
    }
    let next = (*retry * 2).min(RETRY_MAX);
    pause.min(std::mem::replace(retry, next))
}

/// The next change; never, once nobody is left to make one.
async fn changed<T>(changes: &mut watch::Receiver<T>) {
    if changes.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Waits for the client to go away. One that sends something instead is there, and not listened to any further.
pub(crate) async fn gone(client: &Mutex<&mut Stream>) {
    let there = poll_fn(|cx| client.lock().unwrap_or_else(PoisonError::into_inner).poll_there(cx));
    if matches!(there.await, Ok(true)) {
        std::future::pending::<()>().await;
    }
}
