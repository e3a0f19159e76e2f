//! One client's life: startup, then a cancellation or a session; what it is told at the end, and how its sockets close.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use pgherd_cluster::clock::Boottime;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::admission::{Of, Places, Reached, Who};
use crate::cancel;
use crate::carrier::{Carried, Carrier};
use crate::client::{About, Client, ClientPlaces, SessionLine};
use crate::config::ListenerConfig;
use crate::connect::{Connected, Connector, Denied};
use crate::console;
use crate::counters::{Counted, OpenRoute};
use crate::entrance::{Opening, OpeningError, STARTUPS, Starting};
use crate::events::EventKind;
use crate::handshake::{Arrived, HandshakeError, Offer, Wish};
use crate::listener::{Accepted, Admission};
use crate::peer::Peer;
use crate::refusal;
use crate::relay::{Outcome, Relay};
use crate::route::Outlived;
use crate::secure::common_name;
use crate::sessions::Ending;
use crate::shared::{ListenerState, Shared, count};
use crate::stream::Stream;
use crate::stream::socket::Socket;
use crate::turn::Place;
use crate::wire::error_response::Fatal;
use crate::wire::startup::{FirstPacket, application_name};

/// For everything that a client says before it is routed.
const STARTUP_MAX: Duration = Duration::from_secs(10);
/// For a client beyond the connection limit, which only waits for its refusal.
const STARTUP_OVER_LIMIT_MAX: Duration = Duration::from_secs(1);
/// For a client to take its last message and close.
const FAREWELL_MAX: Duration = Duration::from_secs(1);

/// What a worker gives each of its connections.
pub(crate) struct Connection {
    pub(crate) shared: Arc<Shared>,
    pub(crate) worker: usize,
    pub(crate) carrier: Arc<Carrier>,
    /// Cancelled when the grace period of a stop is over.
    pub(crate) cut: CancellationToken,
}

impl Connection {
    /// Serves until the connection has ended, whatever comes. What a session needs at its beginning and at its end is in
    /// boxes that are gone while it goes on: there may be very many that do nothing.
    pub(crate) async fn serve(self, accepted: Box<Accepted>) {
        let listener = Arc::clone(&accepted.listener);
        let _counted = listener.connections.enter();
        let Some(mut begun) = Box::pin(self.begin(accepted)).await else {
            return;
        };
        let asked = self.shared.config.load().carried_after;
        let moved = begun.route.0.moved(self.worker);
        let outcome = begun.relay.run_until_settled(moved, asked).await;
        Box::pin(self.go_on(begun, outcome, &listener)).await;
    }

    /// Goes on to the end: with the carrier, while there is no outcome yet.
    async fn go_on(&self, mut begun: Begun, outcome: Option<Outcome>, listener: &ListenerState) {
        let outcome = match outcome {
            Some(outcome) => outcome,
            None => match self.carrier.carry(begun.relay, &begun.route.0).await {
                Carried::Ended(relay, outcome) => {
                    begun.relay = relay;
                    outcome
                }
                Carried::Stays(relay) => {
                    begun.relay = relay;
                    begun.relay.run(begun.route.0.moved(self.worker)).await
                }
                Carried::Lost => return count(&self.shared.panics),
            },
        };
        Box::pin(self.end(begun, outcome, listener)).await;
    }

    /// Whatever comes before the first byte is relayed; nothing when it does not come so far.
    async fn begin(&self, accepted: Box<Accepted>) -> Option<Begun> {
        let accepted = *accepted;
        let listener = &*accepted.listener;
        let client = accepted.stream.arrive().ok()?;
        let tls = self.shared.tls.load_full();
        let offer = Offer {
            tls: listener.config.load().tls,
            accept: tls.accept.clone(),
        };
        let over_limit = accepted.admission.over_limit;
        let startup_max = if over_limit {
            STARTUP_OVER_LIMIT_MAX
        } else {
            STARTUP_MAX
        };
        let mut opening = Opening {
            shared: Arc::clone(&self.shared),
            config: listener.config.load_full(),
            peer: accepted.peer,
            starting: accepted.starting,
        };
        let read = tokio::select! {
            read = timeout(startup_max, Box::pin(opening.read(client, offer))) => read,
            () = self.cut.cancelled() => return None,
        };
        let Opening {
            peer, config, starting, ..
        } = opening;
        match read {
            Ok(Ok(arrived)) => {
                let arrival = Arrival {
                    peer,
                    config,
                    index: accepted.index,
                    admission: accepted.admission,
                    map_users: tls.map_users,
                };
                drop(tls);
                let arrived = match self.console(arrived, &arrival, starting).await {
                    Some(arrived) => arrived,
                    None => return None,
                };
                self.answer(arrived, arrival, listener, accepted.load).await
            }
            Ok(Err(error)) => {
                self.opened_badly(listener, &peer, &error);
                None
            }
            Err(_) => None, // It said too little in time: a check of the port, most likely.
        }
    }

    /// Serves whoever asked for the console; anybody else goes on, and its places among those that have not said what they
    /// come for are free again.
    async fn console(&self, arrived: Arrived, arrival: &Arrival, starting: Starting) -> Option<Arrived> {
        let Wish::Packet(FirstPacket::Startup { user, database, bytes }) = &arrived.wish else {
            return Some(arrived);
        };
        if !console::answers_for(&self.shared, database.as_deref()) {
            return Some(arrived);
        }
        let (who, startup) = (arrival.who(user.clone(), database.clone()), bytes.clone());
        let Arrived { stream, more, .. } = arrived;
        let certified = arrival.certified(&stream, who.user.as_deref());
        match certified.and_then(|()| self.admit_to_console(arrival, &who)) {
            Ok(_place) => {
                let caller = console::Caller {
                    stream,
                    peer: arrival.peer,
                    who,
                    startup,
                    more,
                    starting,
                };
                Box::pin(console::serve(&self.shared, caller)).await;
            }
            Err(fatal) => farewell(stream, &fatal).await,
        }
        None
    }

    /// Beyond the limit on connections the console is for those who are known by name; one of them may well come to see why
    /// there are so many. Who it really is, is asked then.
    fn admit_to_console(&self, arrival: &Arrival, who: &Who) -> Result<Option<Counted>, Fatal> {
        if !arrival.is_allowed() {
            self.shared.limited.count("allow", "");
            return Err(refusal::not_allowed(who));
        }
        if !arrival.admission.over_limit {
            return Ok(None);
        }
        let reserved = self.shared.reserve(who.user.as_deref());
        reserved.map(Some).ok_or_else(|| {
            self.shared.limited.count("connections", "");
            refusal::limit_reached(&Reached {
                of: Of::Connections,
                open: self.shared.admitted.get(),
                limit: self.shared.config.load().limits.connections,
            })
        })
    }

    /// Does what a client came for, or says why not.
    async fn answer(
        &self,
        arrived: Arrived,
        arrival: Arrival,
        listener: &ListenerState,
        load: Counted,
    ) -> Option<Begun> {
        let Arrived {
            stream: mut client,
            wish,
            more,
        } = arrived;
        match wish {
            Wish::Packet(FirstPacket::Cancel { key, bytes }) if arrival.is_allowed() => {
                cancel::forward(&self.shared, &arrival.config, &key, &bytes).await;
                // Inside TLS the end has to be said: libpq takes a mere close for the failure of the cancel.
                let _ = timeout(FAREWELL_MAX, client.finish()).await;
            }
            // Answered when they were read; and whoever may not connect may not cancel.
            Wish::Packet(FirstPacket::Ssl | FirstPacket::GssEnc | FirstPacket::Cancel { .. }) => {}
            Wish::Packet(FirstPacket::Startup { user, database, bytes }) => {
                let who = arrival.who(user, database);
                debug!(peer = %arrival.peer, ?who, "a session is asked for");
                let certified = arrival.certified(&client, who.user.as_deref());
                match certified.and_then(|()| self.admit(&arrival, &who)) {
                    Ok(places) => {
                        let by_tls = matches!(client, Stream::Tls(_));
                        let client_is = arrival.admitted(who, places, (application_name(&bytes), by_tls));
                        return self
                            .session(client, listener, client_is, (&bytes, more, true), load)
                            .await;
                    }
                    Err(fatal) => {
                        count(&listener.refused);
                        farewell(client, &fatal).await;
                    }
                }
            }
            Wish::Passthrough(bytes) => {
                debug!(peer = %arrival.peer, "a session by TLS with the server is asked for");
                // Who they are is the server's to learn: only their number and their address can be limited.
                let who = arrival.who(None, None);
                match self.admit(&arrival, &who) {
                    Ok(places) => {
                        let client_is = arrival.admitted(who, places, (None, true));
                        return self
                            .session(client, listener, client_is, (&bytes, more, false), load)
                            .await;
                    }
                    Err(_) => {
                        count(&listener.refused);
                        client.reset();
                    }
                }
            }
            Wish::Refused(why) => {
                debug!(peer = %arrival.peer, %why, "a connection is refused");
                count(&listener.refused);
                if let Some(fatal) = refusal::unwelcome(&why) {
                    farewell(client, &fatal).await;
                }
            }
        }
        None
    }

    /// What cannot be answered is counted, and closed.
    fn opened_badly(&self, listener: &ListenerState, peer: &Peer, error: &OpeningError) {
        let label = match error {
            OpeningError::Handshake(HandshakeError::Tls(_)) => "tls",
            OpeningError::Handshake(_) => return, // It left: a check of the port, most likely.
            OpeningError::Header(_) => "proxy_protocol",
            OpeningError::TooMany(_) => STARTUPS,
        };
        debug!(%peer, listener = listener.name, %error, "a connection is refused");
        count(&listener.refused);
        self.shared.limited.count(label, "");
    }

    /// Places for whoever wants a session, or what it is told.
    fn admit(&self, arrival: &Arrival, who: &Who) -> Result<Places, Fatal> {
        if !arrival.is_allowed() {
            self.shared.limited.count("allow", "");
            return Err(refusal::not_allowed(who));
        }
        let limits = &self.shared.config.load().limits;
        let admitted = if arrival.admission.over_limit {
            Err(Reached {
                of: Of::Connections,
                open: self.shared.admitted.get(),
                limit: limits.connections,
            })
        } else {
            self.shared.occupancy.enter(who, limits)
        };
        admitted.or_else(|reached| {
            if let Some(reserved) = self.shared.reserve(who.user.as_deref()) {
                return Ok(Places::reserved(reserved));
            }
            let limit = reached.of.key();
            self.shared.limited.count(limit, "");
            self.shared.events.record(EventKind::Limited { limit });
            Err(refusal::limit_reached(&reached))
        })
    }

    async fn session(
        &self,
        mut client: Stream,
        listener: &ListenerState,
        client_is: Client,
        (startup, more, in_clear): (&Bytes, Vec<u8>, bool),
        load: Counted,
    ) -> Option<Begun> {
        let config = self.shared.config.load();
        let written = config.application_name.as_ref().filter(|_| in_clear);
        let written = written.map(|name| name.write(startup, &client_is.about.peer, &listener.name));
        drop(config);
        let connected = {
            let connector = Connector {
                shared: &self.shared,
                worker: self.worker,
                index: client_is.about.listener,
                listener,
                config: &listener.config.load_full(),
                client_by_tls: matches!(client, Stream::Tls(_)),
                client: Mutex::new(&mut client),
                startup: written.as_ref().unwrap_or(startup),
                client_is: &client_is,
                in_clear,
                cut: &self.cut,
            };
            connector.connect().await
        };
        match connected {
            Ok(connected) => return Some(self.begun(client, listener, client_is, (connected, more, in_clear), load)),
            // Who waits for the beginning of TLS with a server takes one byte only; closing says as much.
            Err(Denied::Refused(_) | Denied::Stopping) if !in_clear => client.reset(),
            Err(Denied::Refused(fatal)) => {
                debug!(client = %client_is.about.peer, why = fatal.message(), "a client is refused");
                farewell(client, &fatal).await;
            }
            Err(Denied::Stopping) => farewell(client, &refusal::stopping()).await,
            Err(Denied::ClientGone) => {}
        }
        None
    }

    fn begun(
        &self,
        client: Stream,
        listener: &ListenerState,
        client_is: Client,
        (connected, more, in_clear): (Connected, Vec<u8>, bool),
        load: Counted,
    ) -> Begun {
        let Connected {
            server,
            early,
            target,
            mut registration,
            ended,
            route,
            place,
            dialled_at: _,
        } = connected;
        let shown = self.shared.config.load().log_sessions;
        let line = SessionLine::new(&client_is, &listener.name, &target.member, shown);
        registration.describe(line);
        Begun {
            relay: Box::new(Relay::new(client, server, (early, more), registration, ended, in_clear)),
            route,
            _counted: Box::new((client_is.into_places(), place, load)),
        }
    }

    /// Closes both sides as the outcome wants it.
    async fn end(&self, begun: Begun, outcome: Outcome, listener: &ListenerState) {
        let Begun {
            relay,
            route: _route,
            _counted,
        } = begun;
        let (can_speak, line) = (relay.can_speak(), relay.line());
        let Relay { client, server, .. } = *relay;
        let (reason, sqlstate) = match outcome {
            Outcome::Finished => ("finished", ""),
            Outcome::ClientStayed => ("client_stayed", ""),
            Outcome::ClientBroke => {
                server.reset();
                ("client_broke", "")
            }
            Outcome::ServerBroke => {
                client.reset();
                ("server_broke", "")
            }
            Outcome::Ended(ending) => {
                // The server goes first and at once: nothing more may reach it.
                server.reset();
                count(&listener.ended);
                let reason = ending.label();
                self.shared.events.record(EventKind::SessionsEnded { reason });
                (reason, end_client(client, &ending, can_speak, &self.shared).await)
            }
        };
        self.shared.ended.count(reason, sqlstate);
        if let Some(line) = line {
            line.ends(reason);
        }
    }
}

/// A session that has begun.
struct Begun {
    /// In a box, which a carrier takes as it is.
    relay: Box<Relay>,
    route: OpenRoute,
    /// Where it counts, while it goes on.
    _counted: Box<(ClientPlaces, Place, Counted)>,
}

/// What is known of a client before it is served.
struct Arrival {
    peer: Peer,
    /// Its listener as it was when the client came, and the listener's number.
    config: Arc<ListenerConfig>,
    index: usize,
    admission: Admission,
    /// A certificate is for the user only whom it names.
    map_users: bool,
}

impl Arrival {
    fn who(&self, user: Option<String>, database: Option<String>) -> Who {
        Who {
            user,
            database,
            address: self.peer.address(),
        }
    }

    fn is_allowed(&self) -> bool {
        self.peer.is_allowed(&self.config.allow)
    }

    /// It gets a session. A place among those that are only told why they are refused is free for the next.
    fn admitted(self, who: Who, places: Places, (application_name, by_tls): (Option<Box<str>>, bool)) -> Client {
        let about = About {
            peer: self.peer,
            who,
            application_name,
            listener: self.index,
            by_tls,
            since: Boottime::now(),
        };
        Client {
            about: Arc::new(about),
            places,
            admission: Some(self.admission).filter(|admission| !admission.over_limit),
        }
    }

    /// Whether the client may be this user, as far as its certificate says.
    fn certified(&self, client: &Stream, user: Option<&str>) -> Result<(), Fatal> {
        let Stream::Tls(tls) = client else { return Ok(()) };
        let Some(certificate) = tls.peer_certificate().filter(|_| self.map_users) else {
            return Ok(());
        };
        let name = common_name(certificate);
        if name.is_some() && name.as_deref() == user {
            Ok(())
        } else {
            Err(refusal::not_your_certificate(name.as_deref(), user))
        }
    }
}

/// Ends a client's session by a message where one can be understood, otherwise by a reset without a word. Answers with the
/// SQLSTATE that was sent.
async fn end_client(client: Stream, ending: &Ending, can_speak: bool, shared: &Shared) -> &'static str {
    if !can_speak {
        client.reset();
        return "";
    }
    let fatal = match ending {
        Ending::Outlived(why @ (Outlived::EpochOver { .. } | Outlived::WarrantLapsed)) => {
            refusal::told_by(refusal::outlived(why), shared.event_behind())
        }
        Ending::Outlived(why) => refusal::outlived(why),
        Ending::Stopping => refusal::stopping(),
    };
    farewell(client, &fatal).await;
    fatal.sqlstate()
}

/// Sends a last message and closes so that it arrives: closing with something unread would reset the connection, and the
/// message with it.
pub(crate) async fn farewell(client: Stream, fatal: &Fatal) {
    // Its carrier has done with it.
    let Ok(mut client) = client.with(Socket::unsettle) else {
        return;
    };
    let said = async {
        client.write_all(&fatal.encode()).await?;
        client.finish().await?;
        let mut ignored = [0; 1024];
        while client.read(&mut ignored).await? > 0 {}
        Ok::<(), std::io::Error>(())
    };
    // Whether it was heard changes nothing: the connection ends here.
    let _ = timeout(FAREWELL_MAX, said).await;
}
