//! Names of hosts to addresses. A resolver may be silent for half a minute, and nobody here waits for it that long: who asks again
//! meanwhile waits for the answer that is under way, so that a resolver in trouble holds one thread for each name, however
//! often it is asked for.

pub mod srv;

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;
use tokio::task::spawn_blocking;

use crate::record::Address;

/// What a resolver says; its error as text, since many hear it.
type Answer = Result<Vec<IpAddr>, String>;
type Awaited = watch::Receiver<Option<Answer>>;

static LOOKUPS: Lookups = Lookups {
    under_way: Mutex::new(BTreeMap::new()),
};

/// The addresses that `address` stands for. Literal ones are not looked up: a resolver may be slow exactly when the network is in
/// trouble. Cancel safe; has no limit in time of its own.
///
/// # Errors
/// When the name is not known, or nobody could be asked.
pub async fn resolve(address: &Address) -> io::Result<Vec<SocketAddr>> {
    let found = match address.host.parse::<IpAddr>() {
        Ok(ip) => vec![ip],
        Err(_) => LOOKUPS.find(&address.host, look_up).await?,
    };
    Ok(found.into_iter().map(|ip| SocketAddr::new(ip, address.port)).collect())
}

fn look_up(name: &str) -> Answer {
    let found = (name, 0).to_socket_addrs().map_err(|error| error.to_string())?;
    Ok(found.map(|address| address.ip()).collect())
}

struct Lookups {
    under_way: Mutex<BTreeMap<String, Awaited>>,
}

/// A lookup that is under way, until it is dropped: also by a runtime that ends before it has begun.
struct UnderWay {
    lookups: &'static Lookups,
    name: String,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let under_way = self.lookups.under_way.lock();
        under_way.unwrap_or_else(PoisonError::into_inner).remove(&self.name);
    }
}

impl Lookups {
    async fn find(
        &'static self,
        name: &str,
        look_up: impl FnOnce(&str) -> Answer + Send + 'static,
    ) -> io::Result<Vec<IpAddr>> {
        let mut awaited = self.begin(name, look_up);
        let answer = awaited.wait_for(Option::is_some).await;
        let answer = answer.map_err(|_| io::Error::other("the lookup was given up"))?;
        match &*answer {
            Some(Ok(found)) => Ok(found.clone()),
            Some(Err(what)) => Err(io::Error::other(what.clone())),
            None => Err(io::Error::other("the lookup was given up")),
        }
    }

    /// The answer that is under way, or the beginning of one.
    fn begin(&'static self, name: &str, look_up: impl FnOnce(&str) -> Answer + Send + 'static) -> Awaited {
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(awaited) = under_way.get(name) {
            return awaited.clone();
        }
        let (sender, awaited) = watch::channel(None);
        under_way.insert(name.to_owned(), awaited.clone());
        drop(under_way);
        let this = UnderWay {
            lookups: self,
            name: name.to_owned(),
        };
        // Nobody waits for its end: it cannot be broken off, and says all there is to say by the channel.
        drop(spawn_blocking(move || {
            let answer = look_up(&this.name);
            drop(this); // Who asks from now on wants a newer answer.
            sender.send_replace(Some(answer));
        }));
        awaited
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::sync_channel;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    fn address(host: &str) -> Address {
        Address {
            host: host.to_owned(),
            port: 5432,
        }
    }

    #[tokio::test]
    async fn names_and_literal_addresses_are_found() {
        let found = resolve(&address("::1")).await.expect("an address");
        assert_eq!(found, ["[::1]:5432".parse().expect("an address")]);
        let found = resolve(&address("localhost")).await.expect("a name");
        assert!(found.iter().all(|one| one.ip().is_loopback() && one.port() == 5432) && !found.is_empty());
        assert!(resolve(&address("no such name")).await.is_err());
    }

    #[tokio::test]
    async fn a_silent_resolver_is_asked_once_however_many_give_up() {
        static HUNG: Lookups = Lookups {
            under_way: Mutex::new(BTreeMap::new()),
        };
        static BEGUN: AtomicUsize = AtomicUsize::new(0);
        let (answer, answered) = sync_channel::<()>(1);
        let mut silent = Some(move |_: &str| {
            BEGUN.fetch_add(1, Ordering::SeqCst);
            answered.recv().map_err(|error| error.to_string())?;
            Ok(vec![IpAddr::from([10, 0, 0, 1])])
        });
        let again = |_: &str| {
            BEGUN.fetch_add(1, Ordering::SeqCst);
            Ok(Vec::new())
        };
        let short = Duration::from_millis(5);
        for _ in 0..20 {
            let found = match silent.take() {
                Some(silent) => timeout(short, HUNG.find("db", silent)).await,
                None => timeout(short, HUNG.find("db", again)).await,
            };
            assert!(found.is_err(), "nobody has answered");
        }
        let mut waiting = HUNG.begin("db", again);
        answer.send(()).expect("it waits");
        let found = waiting.wait_for(Option::is_some).await.expect("an answer").clone();
        assert_eq!(found, Some(Ok(vec![IpAddr::from([10, 0, 0, 1])])));
        assert_eq!(BEGUN.load(Ordering::SeqCst), 1);
        // The next question is a new one.
        assert_eq!(HUNG.find("db", again).await.expect("the answer"), Vec::<IpAddr>::new());
    }
}
