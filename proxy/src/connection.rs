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
use crate::connect::{Connected, Connector, Denied};
use crate::events::EventKind;
use crate::handshake::{self, HandshakeError};
use crate::listener::Accepted;
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
        let read = tokio::select! {
            read = timeout(startup_max, handshake::read(&mut client)) => read,
            () = self.cut.cancelled() => return,
        };
        match read {
            Ok(Ok(FirstPacket::Startup { user, database, bytes })) => {
                let address = Some(accepted.peer.ip().to_canonical());
                let who = Who {
                    user,
                    database,
                    address,
                };
                debug!(peer = %accepted.peer, ?who, "a session is asked for");
                match self.admit(&who, over_limit) {
                    Ok(_places) => self.session(client, accepted.index, listener, &bytes).await,
                    Err(reached) => {
                        count(&listener.refused);
                        farewell(client, &refusal::limit_reached(&reached)).await;
                    }
                }
            }
            Ok(Ok(FirstPacket::Cancel { key, bytes })) => {
                let role = listener.config.load().role;
                cancel::forward(&self.shared, role, &key, &bytes).await;
            }
            // Answered when they were read.
            Ok(Ok(FirstPacket::Ssl | FirstPacket::GssEnc)) => {}
            Ok(Err(HandshakeError::Malformed(what))) => {
                debug!(peer = %accepted.peer, %what, "a connection is refused");
                count(&listener.refused);
                if let Some(fatal) = refusal::malformed(&what) {
                    farewell(client, &fatal).await;
                }
            }
            // It left, or said too little in time: a check of the port, most likely.
            Ok(Err(HandshakeError::Io(_))) | Err(_) => {}
        }
        drop((accepted.admission, accepted.load));
    }

    /// Places under the limits for whoever wants a session.
    fn admit(&self, who: &Who, over_limit: bool) -> Result<Places, Reached> {
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
        if let Err(reached) = &admitted {
            let limit = reached.of.key();
            self.shared.limited.count(limit, "");
            self.shared.events.record(EventKind::Limited { limit });
        }
        admitted
    }

    async fn session(&self, client: TcpStream, index: usize, listener: &ListenerState, startup: &Bytes) {
        let connector = Connector {
            shared: &self.shared,
            worker: self.worker,
            index,
            listener,
            config: &listener.config.load_full(),
            client: &client,
            startup,
            cut: &self.cut,
        };
        // In a box of its own, which is gone while the session goes on.
        match Box::pin(connector.connect()).await {
            Ok(connected) => self.relay(client, listener, connected).await,
            Err(Denied::Refused(fatal)) => {
                debug!(why = fatal.message(), "a client is refused");
                farewell(client, &fatal).await;
            }
            Err(Denied::Stopping) => farewell(client, &refusal::stopping()).await,
            Err(Denied::ClientGone) => {}
        }
    }

    async fn relay(&self, client: TcpStream, listener: &ListenerState, connected: Connected) {
        let Connected {
            server,
            early,
            target,
            registration,
            ended,
            route,
            place: _place,
        } = connected;
        debug!(member = %target.member, listener = listener.name, "a session begins");
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
