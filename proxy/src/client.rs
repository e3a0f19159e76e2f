//! A client that may have a session: who it is, its places under the limits, and the lines about it in the log.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use tracing::{Level, debug, enabled, info};

use crate::admission::{Places, Who};
use crate::listener::Admission;
use crate::peer::Peer;

/// Who has a session or waits for one, as far as the proxy was told. For people who ask; nothing is decided by it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct About {
    pub(crate) peer: Peer,
    pub(crate) who: Who,
    /// As the startup message had it; nothing for one without, and where the startup message is the server's alone to read.
    pub(crate) application_name: Option<Box<str>>,
    /// Its listener's number.
    pub(crate) listener: usize,
    /// It speaks TLS, with us or with its server.
    pub(crate) by_tls: bool,
    /// When its startup had been read.
    pub(crate) since: Boottime,
}

/// A client on its way to a session.
pub(crate) struct Client {
    pub(crate) about: Arc<About>,
    /// Kept while the session goes on.
    pub(crate) places: Places,
    /// The same, among all connections.
    pub(crate) admission: Option<Admission>,
}

/// What a client occupies while its session goes on.
pub(crate) struct ClientPlaces {
    _places: Places,
    _admission: Option<Admission>,
}

impl Client {
    /// Forgets what only a client on its way needs: there may be very many sessions that do nothing.
    pub(crate) fn into_places(self) -> ClientPlaces {
        ClientPlaces {
            _places: self.places,
            _admission: self.admission,
        }
    }

    /// Whether it is here on a place that is kept for operators, beyond all limits.
    pub(crate) const fn has_reserved_place(&self) -> bool {
        self.places.reserved.is_some()
    }
}

/// What the log says of one session: what joins the client that the proxy knows with the process that the server knows.
#[derive(Debug)]
pub(crate) struct SessionLine {
    about: Arc<About>,
    listener: String,
    member: MemberName,
    began: Boottime,
    /// At the level that is shown unasked.
    shown: bool,
    /// 0 until the server has told it.
    server_pid: AtomicI32,
}

impl SessionLine {
    /// Nothing when nobody would read it.
    pub(crate) fn new(client: &Client, listener: &str, member: &MemberName, shown: bool) -> Option<Arc<Self>> {
        if !shown && !enabled!(Level::DEBUG) {
            return None;
        }
        Some(Arc::new(Self {
            about: Arc::clone(&client.about),
            listener: listener.to_owned(),
            member: member.clone(),
            began: Boottime::now(),
            shown,
            server_pid: AtomicI32::new(0),
        }))
    }

    /// The server has let the client in.
    pub(crate) fn begins(&self, server_pid: i32) {
        self.server_pid.store(server_pid, Ordering::Relaxed);
        let line = self.line();
        if self.shown {
            info!("session begins: {line}");
        } else {
            debug!("session begins: {line}");
        }
    }

    pub(crate) fn ends(&self, reason: &str) {
        let (line, seconds) = (self.line(), Boottime::now().since(self.began).as_secs_f64());
        if self.shown {
            info!("session ended: {line} reason={reason} seconds={seconds:.3}");
        } else {
            debug!("session ended: {line} reason={reason} seconds={seconds:.3}");
        }
    }

    /// Names are the client's own words, so they are quoted.
    fn line(&self) -> String {
        let Self {
            about,
            listener,
            member,
            ..
        } = self;
        let About { peer, who, .. } = &**about;
        let quoted = |name: &Option<String>| format!("{:?}", name.as_deref().unwrap_or_default());
        let (user, database) = (quoted(&who.user), quoted(&who.database));
        let line = format!("client={peer} listener={listener} member={member} user={user} database={database}");
        match self.server_pid.load(Ordering::Relaxed) {
            0 => line,
            pid => format!("{line} server_pid={pid}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::name;

    #[test]
    fn a_line_joins_client_and_server_and_is_one_line() {
        let about = About {
            peer: Peer::Ip("10.1.1.1:5".parse().expect("an address")),
            who: Who {
                user: Some("ann\nsession begins: client=".to_owned()),
                database: None,
                address: None,
            },
            application_name: None,
            listener: 0,
            by_tls: false,
            since: Boottime::from_nanos(0),
        };
        let client = Client {
            about: Arc::new(about),
            places: Places::default(),
            admission: None,
        };
        let line = SessionLine::new(&client, "0.0.0.0:5432", &name("n1"), true).expect("it is shown");
        line.begins(4711);
        let text = line.line();
        assert!(text.starts_with("client=10.1.1.1:5 listener=0.0.0.0:5432 member=n1 user=\"ann\\nsession"));
        assert!(
            text.ends_with("database=\"\" server_pid=4711") && !text.contains('\n'),
            "{text}"
        );
    }
}
