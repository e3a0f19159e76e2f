//! The console: a pseudo-database on the proxy's own ports, for `psql` and for what scrapes PgBouncer.
//!
//! Whoever comes is a stranger until it has logged in by SCRAM, or has been told by the kernel to be root or our own user:
//! until then it has a bounded time and a bounded message, and the place among the startups that it came with. A console
//! session has no server, and so nothing to fence: it ends when the proxy begins to stop.

mod columns;
mod command;
mod login;
mod ours;
mod scram;
mod session;
mod show;
mod totals;

use std::time::Duration;

use bytes::Bytes;
use pgherd_cluster::clock::Boottime;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::{info, warn};

use self::login::{Guest, LoginError};
pub use self::scram::{BadVerifier, Verifier};
use self::session::Session;
use self::totals::Snapshots;
use crate::admission::Who;
use crate::connection::farewell;
use crate::counters::{Gauge, Tally};
use crate::entrance::Starting;
use crate::peer::Peer;
use crate::seldom::Seldom;
use crate::shared::Shared;
use crate::stream::Stream;
use crate::wire::error_response::Fatal;

/// Sessions at a time: more than there are operators and scrapers, and few enough that their answers fit into memory.
const SESSIONS_MAX: usize = 32;
/// From the startup message until the client is let in.
const LOGIN_MAX: Duration = Duration::from_secs(10);
/// How long a configuration may take to be read again.
const RELOAD_MAX: Duration = Duration::from_secs(30);

static LOGIN_FAILED: Seldom = Seldom::new();

/// What all sessions of the console share.
#[derive(Default)]
pub(crate) struct ConsoleState {
    /// Those that have been let in.
    pub(crate) sessions: Gauge,
    /// By what came of them.
    pub(crate) logins: Tally,
    snapshots: Snapshots,
    reloads: std::sync::OnceLock<mpsc::Sender<ReloadAsked>>,
}

/// Somebody on the console wants the configuration to be read again, and hears here what became of it.
pub type ReloadAsked = oneshot::Sender<Result<(), String>>;

/// Where such wishes arrive.
pub type ReloadRequests = mpsc::Receiver<ReloadAsked>;

impl ConsoleState {
    /// Makes the console able to reload. For whoever reads configurations, once.
    pub(crate) fn reload_requests(&self) -> ReloadRequests {
        let (sender, receiver) = mpsc::channel(1);
        // A second one hears of nothing, since the first may listen still.
        let _ = self.reloads.set(sender);
        receiver
    }

    /// Has the configuration read again, and waits for what became of it.
    async fn reload(&self) -> Result<(), String> {
        let Some(reloads) = self.reloads.get() else {
            return Err("nobody here reads a configuration".to_owned());
        };
        let (done, answer) = oneshot::channel();
        let asked = async {
            reloads.send(done).await.map_err(|_| "the proxy stops".to_owned())?;
            answer.await.map_err(|_| "the proxy stops".to_owned())?
        };
        let late = || Err(format!("it was not read within {} s", RELOAD_MAX.as_secs()));
        timeout(RELOAD_MAX, asked).await.unwrap_or_else(|_| late())
    }
}

/// A client that has asked for the console.
pub(crate) struct Caller {
    pub(crate) stream: Stream,
    pub(crate) peer: Peer,
    pub(crate) who: Who,
    /// The startup message, and what came behind it.
    pub(crate) startup: Bytes,
    pub(crate) more: Vec<u8>,
    /// Given back once it is known who it is.
    pub(crate) starting: Starting,
}

/// Whether this proxy answers for `database` itself.
pub(crate) fn answers_for(shared: &Shared, database: Option<&str>) -> bool {
    let config = shared.config.load();
    let console = config.console.as_ref();
    console.is_some_and(|console| Some(console.database.as_str()) == database)
}

/// Serves one client until it goes, is sent away, or the proxy stops.
pub(crate) async fn serve(shared: &std::sync::Arc<Shared>, caller: Caller) {
    let Caller {
        stream,
        peer,
        who,
        startup,
        more,
        starting,
    } = caller;
    let user = who.user.unwrap_or_default();
    let mut guest = Guest::new(stream, more);
    let login = timeout(LOGIN_MAX, guest.log_in(shared, &user, &startup));
    let login = tokio::select! {
        login = login => login.unwrap_or(Err(LoginError::Gone)),
        () = shared.stopping.cancelled() => return,
    };
    let (refused, label) = match login {
        Ok(may_reload) => match shared.console.sessions.enter_below(SESSIONS_MAX) {
            Some(_place) => {
                drop(starting);
                shared.console.logins.count("let_in", "");
                info!(%peer, user, "an operator has come to the console");
                Session::new(shared, guest, may_reload).run().await;
                return;
            }
            None => (too_many(), "too_many"),
        },
        Err(LoginError::Gone) => {
            shared.console.logins.count("gone", "");
            return;
        }
        Err(LoginError::Refused(fatal)) => (fatal, "refused"),
    };
    shared.console.logins.count(label, "");
    if let Some(kept_back) = LOGIN_FAILED.admits(Boottime::now()) {
        warn!(%peer, user, kept_back, "not let in to the console: {}", refused.message());
    }
    farewell(guest.into_stream(), &refused).await;
}

/// What strangers reach of the parts that speak to nobody.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzzed {
    use super::command;
    use super::scram::{Exchange, Verifier};

    /// Reads a query's statements.
    pub(crate) fn statements(text: &str) {
        let cut = command::statements(text).unwrap_or_default();
        for statement in cut {
            assert!(
                command::read(statement) != command::Command::Empty,
                "nothing is a statement"
            );
        }
    }

    /// Takes both words of an exchange: nobody's verifier lets nobody in.
    pub(crate) fn log_in(first: &[u8], last: &[u8]) {
        if let Ok(exchange) = Exchange::begin(first, Verifier::of_nobody("x"), "nonce") {
            assert!(exchange.finish(last).is_err(), "somebody has been let in");
        }
    }
}

fn too_many() -> Fatal {
    Fatal::new(
        "53300",
        format!("too many sessions on the console: {SESSIONS_MAX} are open"),
    )
}
