//! One client's life: startup, then a cancellation or a session; what it is told at the end, and how its sockets close.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::debug;

use crate::cancel;
use crate::connect::{Connected, Connector, Denied};
use crate::events::EventKind;
use crate::handshake::{self, Arrived, HandshakeError, Offer, Wish};
use crate::listener::Accepted;
use crate::refusal;
use crate::relay::{Counters, Outcome, Relay};
use crate::secure::common_name;
use crate::sessions::Ending;
use crate::shared::{ListenerState, Shared, count};
use crate::stream::Stream;
use crate::stream::socket::Socket;
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
        let Ok(client) = TcpStream::from_std(accepted.stream).map(Socket::Tcp) else {
            return;
        };
        if client.tune().is_err() {
            return; // Reset before it was looked at.
        }
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
        let read = tokio::select! {
            read = timeout(startup_max, Box::pin(handshake::read(client, offer))) => read,
            () = self.cut.cancelled() => return,
        };
        match read {
            Ok(Ok(arrived)) => {
                let arrival = Arrival {
                    peer: accepted.peer,
                    index: accepted.index,
                    over_limit,
                    map_users: tls.map_users,
                };
                drop(tls);
                self.answer(arrived, &arrival, listener).await;
            }
            Ok(Err(error @ HandshakeError::Tls(_))) => {
                debug!(peer = %accepted.peer, %error, "a client and the proxy do not agree on TLS");
                count(&listener.refused);
                self.shared.limited.count("tls", "");
            }
            // It left, or said too little in time: a check of the port, most likely.
            Ok(Err(_)) | Err(_) => {}
        }
        drop((accepted.admission, accepted.load));
    }

    /// Does what a client came for, or says why not.
    async fn answer(&self, arrived: Arrived, arrival: &Arrival, listener: &ListenerState) {
        let Arrived { stream: client, wish } = arrived;
        match wish {
            Wish::Packet(FirstPacket::Cancel { key, bytes }) => {
                let role = listener.config.load().role;
                cancel::forward(&self.shared, role, &key, &bytes).await;
            }
            Wish::Packet(FirstPacket::Startup { .. }) | Wish::Passthrough(_) if arrival.over_limit => {
                self.shared.limited.count("connections", "");
                count(&listener.refused);
                let limit = self.shared.config.load().limits.connections;
                match wish {
                    // It waits for a byte of the server's.
                    Wish::Passthrough(_) => client.reset(),
                    _ => farewell(client, &refusal::too_many_connections(limit)).await,
                }
            }
            Wish::Packet(FirstPacket::Startup { user, bytes }) => {
                debug!(peer = %arrival.peer, user, "a session is asked for");
                match arrival.certified(&client, user.as_deref()) {
                    Ok(()) => self.session(client, arrival.index, listener, (&bytes, true)).await,
                    Err(fatal) => {
                        count(&listener.refused);
                        farewell(client, &fatal).await;
                    }
                }
            }
            Wish::Passthrough(bytes) => {
                debug!(peer = %arrival.peer, "a session by TLS with the server is asked for");
                self.session(client, arrival.index, listener, (&bytes, false)).await;
            }
            // Answered when they were read.
            Wish::Packet(FirstPacket::Ssl | FirstPacket::GssEnc) => {}
            Wish::Refused(why) => {
                debug!(peer = %arrival.peer, %why, "a connection is refused");
                count(&listener.refused);
                if let Some(fatal) = refusal::unwelcome(&why) {
                    farewell(client, &fatal).await;
                }
            }
        }
    }

    async fn session(
        &self,
        mut client: Stream,
        index: usize,
        listener: &ListenerState,
        (startup, in_clear): (&Bytes, bool),
    ) {
        // In a box of its own, which is gone while the session goes on.
        let connected = {
            let connector = Connector {
                shared: &self.shared,
                worker: self.worker,
                index,
                listener,
                config: &listener.config.load_full(),
                client_by_tls: matches!(client, Stream::Tls(_)),
                client: Mutex::new(&mut client),
                startup,
                in_clear,
                cut: &self.cut,
            };
            Box::pin(connector.connect()).await
        };
        match connected {
            Ok(connected) => self.relay(client, listener, connected, in_clear).await,
            // Who waits for the beginning of TLS with a server takes one byte only; closing says as much.
            Err(Denied::Refused(_) | Denied::Stopping) if !in_clear => client.reset(),
            Err(Denied::Refused(fatal)) => {
                debug!(why = fatal.message(), "a client is refused");
                farewell(client, &fatal).await;
            }
            Err(Denied::Stopping) => farewell(client, &refusal::stopping()).await,
            Err(Denied::ClientGone) => {}
        }
    }

    async fn relay(&self, client: Stream, listener: &ListenerState, connected: Connected, in_clear: bool) {
        let Connected {
            server,
            early,
            target,
            registration,
            ended,
            route,
        } = connected;
        debug!(member = %target.member, listener = listener.name, "a session begins");
        let counters = route.0.moved(self.worker).map(|moved| Counters {
            to_server: &moved.to_server,
            to_client: &moved.to_client,
        });
        let mut relay = Relay::new(client, server, early, registration, ended, counters, in_clear);
        let outcome = relay.run().await;
        let can_speak = relay.can_speak();
        let Relay { client, server, .. } = relay;
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
                (reason, end_client(client, &ending, can_speak).await)
            }
        };
        self.shared.ended.count(reason, sqlstate);
    }
}

/// What is known of a client before it is served.
struct Arrival {
    peer: SocketAddr,
    /// The listener's number.
    index: usize,
    over_limit: bool,
    /// A certificate is for the user only whom it names.
    map_users: bool,
}

impl Arrival {
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
async fn end_client(client: Stream, ending: &Ending, can_speak: bool) -> &'static str {
    if !can_speak {
        client.reset();
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
async fn farewell(mut client: Stream, fatal: &Fatal) {
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
