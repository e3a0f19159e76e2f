//! One client's life: startup, then a cancellation or a session; what it is told at the end, and how its sockets close.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::admission::{Of, Places, Reached, Who};
use crate::cancel;
use crate::client::{Client, SessionLine};
use crate::config::ListenerConfig;
use crate::connect::{Connected, Connector, Denied};
use crate::entrance::{Opening, OpeningError, STARTUPS};
use crate::events::EventKind;
use crate::handshake::HandshakeError;
use crate::listener::Accepted;
use crate::peer::Peer;
use crate::refusal;
use crate::relay::{Counters, Outcome, Relay};
use crate::sessions::Ending;
use crate::shared::{ListenerState, Shared, count};
use crate::socket;
use crate::wire::error_response::Fatal;
use crate::wire::startup::FirstPacket;

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
    /// Cancelled when the grace period of a stop is over.
    pub(crate) cut: CancellationToken,
}

impl Connection {
    /// Serves until the connection has ended, whatever comes.
    pub(crate) async fn serve(self, accepted: Accepted) {
        let listener = &*accepted.listener;
        let _counted = listener.connections.enter();
        let Ok(mut client) = TcpStream::from_std(accepted.stream) else {
            return;
        };
        if socket::tune(&client).is_err() {
            return; // Reset before it was looked at.
        }
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
            read = timeout(startup_max, opening.read(&mut client)) => read,
            () = self.cut.cancelled() => return,
        };
        // Its places among those that have not said what they come for are free again.
        let Opening {
            peer, config, starting, ..
        } = opening;
        drop(starting);
        let mut admission = Some(accepted.admission);
        match read {
            Ok(Ok(FirstPacket::Startup { user, database, bytes })) => {
                let address = peer.address();
                let who = Who {
                    user,
                    database,
                    address,
                };
                debug!(%peer, ?who, "a session is asked for");
                match self.admit(&config, &peer, &who, over_limit) {
                    Ok(places) => {
                        // A place among those that are only told why they are refused is free for the next.
                        admission.take_if(|_| over_limit);
                        let client_is = Client { peer, who, places };
                        self.session(client, accepted.index, listener, &client_is, &bytes).await;
                    }
                    Err(fatal) => {
                        count(&listener.refused);
                        farewell(client, &fatal).await;
                    }
                }
            }
            Ok(Ok(FirstPacket::Cancel { key, bytes })) if peer.is_allowed(&config.allow) => {
                cancel::forward(&self.shared, config.role, &key, &bytes).await;
            }
            // Answered when they were read; and whoever may not connect may not cancel.
            Ok(Ok(FirstPacket::Ssl | FirstPacket::GssEnc | FirstPacket::Cancel { .. })) => {}
            Ok(Err(error)) => self.opened_badly(client, listener, &peer, error).await,
            Err(_) => {} // It said too little in time: a check of the port, most likely.
        }
        drop((admission, accepted.load));
    }

    /// What was not understood is answered, where its sender would understand the answer.
    async fn opened_badly(&self, client: TcpStream, listener: &ListenerState, peer: &Peer, error: OpeningError) {
        let fatal = match &error {
            OpeningError::Handshake(HandshakeError::Io(_)) => return, // It left.
            OpeningError::Handshake(HandshakeError::Malformed(what)) => refusal::malformed(what),
            OpeningError::Header(_) => {
                self.shared.limited.count("proxy_protocol", "");
                None
            }
            OpeningError::TooMany(_) => {
                self.shared.limited.count(STARTUPS, "");
                None
            }
        };
        debug!(%peer, listener = listener.name, %error, "a connection is refused");
        count(&listener.refused);
        if let Some(fatal) = fatal {
            farewell(client, &fatal).await;
        }
    }

    /// Places for whoever wants a session, or what it is told.
    fn admit(&self, listener: &ListenerConfig, peer: &Peer, who: &Who, over_limit: bool) -> Result<Places, Fatal> {
        if !peer.is_allowed(&listener.allow) {
            self.shared.limited.count("allow", "");
            return Err(refusal::not_allowed(who));
        }
        let limits = &self.shared.config.load().limits;
        let admitted = if over_limit {
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
        client: TcpStream,
        index: usize,
        listener: &ListenerState,
        client_is: &Client,
        startup: &Bytes,
    ) {
        let config = self.shared.config.load();
        let written = config.application_name.as_ref();
        let written = written.map(|name| name.write(startup, &client_is.peer, &listener.name));
        drop(config);
        let connector = Connector {
            shared: &self.shared,
            worker: self.worker,
            index,
            listener,
            config: &listener.config.load_full(),
            client: &client,
            startup: written.as_ref().unwrap_or(startup),
            client_is,
            cut: &self.cut,
        };
        // In a box of its own, which is gone while the session goes on.
        match Box::pin(connector.connect()).await {
            Ok(connected) => self.relay(client, listener, client_is, connected).await,
            Err(Denied::Refused(fatal)) => {
                debug!(client = %client_is.peer, why = fatal.message(), "a client is refused");
                farewell(client, &fatal).await;
            }
            Err(Denied::Stopping) => farewell(client, &refusal::stopping()).await,
            Err(Denied::ClientGone) => {}
        }
    }

    async fn relay(&self, client: TcpStream, listener: &ListenerState, client_is: &Client, connected: Connected) {
        let Connected {
            server,
            early,
            target,
            mut registration,
            ended,
            route,
            place: _place,
        } = connected;
        let shown = self.shared.config.load().log_sessions;
        let line = SessionLine::new(client_is, &listener.name, &target.member, shown);
        registration.describe(line.clone());
        let counters = route.0.moved(self.worker).map(|moved| Counters {
            to_server: &moved.to_server,
            to_client: &moved.to_client,
        });
        let mut relay = Relay::new(client, server, early, registration, ended, counters);
        let outcome = relay.run().await;
        let can_speak = relay.can_speak();
        let Relay { client, server, .. } = relay;
        let (reason, sqlstate) = match outcome {
            Outcome::Finished => ("finished", ""),
            Outcome::ClientStayed => ("client_stayed", ""),
            Outcome::ClientBroke => {
                socket::reset(server);
                ("client_broke", "")
            }
            Outcome::ServerBroke => {
                socket::reset(client);
                ("server_broke", "")
            }
            Outcome::Ended(ending) => {
                // The server goes first and at once: nothing more may reach it.
                socket::reset(server);
                count(&listener.ended);
                let reason = ending.label();
                self.shared.events.record(EventKind::SessionsEnded { reason });
                (reason, end_client(client, &ending, can_speak).await)
            }
        };
        self.shared.ended.count(reason, sqlstate);
        if let Some(line) = line {
            line.ends(reason);
        }
    }
}

/// Ends a client's session by a message where one can be understood, otherwise by a reset without a word. Answers with the
/// SQLSTATE that was sent.
async fn end_client(client: TcpStream, ending: &Ending, can_speak: bool) -> &'static str {
    if !can_speak {
        socket::reset(client);
        return "";
    }
    let fatal = match ending {
        Ending::Outlived(why) => refusal::outlived(why),
        Ending::Stopping => refusal::stopping(),
    };
    farewell(client, &fatal).await;
    fatal.sqlstate()
}

/// Sends a last message and closes so that it arrives: closing with something unread would reset the connection, and the
/// message with it.
async fn farewell(mut client: TcpStream, fatal: &Fatal) {
    let said = async {
        client.write_all(&fatal.encode()).await?;
        socket::finish_sending(&client)?;
        let mut ignored = [0; 1024];
        while client.read(&mut ignored).await? > 0 {}
        Ok::<(), std::io::Error>(())
    };
    // Whether it was heard changes nothing: the connection ends here.
    let _ = timeout(FAREWELL_MAX, said).await;
}
