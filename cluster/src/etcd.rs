//! Our store on etcd v3: the sole user of the client crate, which serves as an RPC stub only.
//!
//! That client balances over all of its endpoints, keeps dead ones in the set, and retries nothing, so each call here goes
//! to one *pinned* endpoint, with its own deadline, and an endpoint that fails is left for the next at once. Every call is
//! made of forms that may be repeated: a repeated guarded write finds its own first try, and callers recognise that.

mod discovery;
mod error;
mod txn;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use etcd_client::{
    Certificate, Client, ConnectOptions, DeleteOptions, GetOptions, Identity, TlsOptions, WatchOptions, WatchStream,
};
use tokio::time::{Instant, timeout, timeout_at};

pub use self::discovery::Discovery;
pub use self::error::StoreError;
pub use self::txn::{Compare, Op, Txn, TxnOutcome};
use crate::view::{Change, Entry};

/// How to reach etcd.
#[derive(Clone, Default)]
pub struct EtcdConfig {
    /// `http(s)://host:port`, at least one where they are not looked up.
    pub endpoints: Vec<String>,
    /// Where they are looked up, instead.
    pub discovery: Option<Discovery>,
    /// User and password, when etcd asks for them.
    pub credentials: Option<(String, String)>,
    /// For `https` endpoints.
    pub tls: EtcdTls,
}

/// Files for TLS to etcd.
#[derive(Clone, Debug, Default)]
pub struct EtcdTls {
    /// The authority that signed etcd's certificates.
    pub cacert: Option<PathBuf>,
    /// Our certificate.
    pub cert: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
}

impl std::fmt::Debug for EtcdConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdConfig")
            .field("endpoints", &self.endpoints)
            .field("discovery", &self.discovery)
            .field("user", &self.credentials.as_ref().map(|(user, _)| user)) // Never the password.
            .field("tls", &self.tls)
            .finish()
    }
}

impl EtcdConfig {
    /// Where etcd is, as the operator has written it.
    #[must_use]
    pub fn named(&self) -> String {
        match &self.discovery {
            Some(discovery) => format!("the endpoints that DNS knows under {}", discovery.domain),
            None => self.endpoints.join(", "),
        }
    }
}

/// How long a call may take: in all, and on one endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// When to give up.
    pub deadline: Instant,
    /// The longest that one endpoint may take.
    pub attempt: Duration,
}

impl Budget {
    /// `total` from now, shared out so that each of `endpoints` can be tried once; at least 300 ms each.
    #[must_use]
    pub fn new(total: Duration, endpoints: usize) -> Self {
        let share = total / u32::try_from(endpoints.max(1)).unwrap_or(1);
        Self {
            deadline: Instant::now() + total,
            attempt: share.max(Duration::from_millis(300)),
        }
    }
}

/// The entries under a prefix at one revision.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The entries, in key order.
    pub entries: Vec<Entry>,
    /// The store's revision when it answered.
    pub revision: i64,
}

/// A message of a watch.
#[derive(Debug)]
pub struct WatchMessage {
    /// Changes, oldest first; empty for an answer to a progress request.
    pub changes: Vec<Change>,
    /// The store's revision.
    pub revision: i64,
}

/// An open watch of a prefix. A dropped one ends on the server too.
pub struct Watch {
    stream: WatchStream,
}

impl Watch {
    /// Asks the server to say where it is; the answer comes as an empty message and proves that the stream lives.
    ///
    /// # Errors
    /// When the stream is broken.
    pub async fn request_progress(&mut self) -> Result<(), StoreError> {
        self.stream.request_progress().await.map_err(StoreError::from)
    }

    /// The next message. Cancel safe.
    ///
    /// # Errors
    /// When the stream ended, was cancelled by the server (compaction, authentication), or broke. An etcd that cancels a
    /// watch leaves the stream open and silent, so the flag itself is the end.
    pub async fn message(&mut self) -> Result<WatchMessage, StoreError> {
        let Some(response) = self.stream.message().await? else {
            return Err(StoreError::Unreachable {
                what: "the watch was closed by the server".to_owned(),
            });
        };
        if response.canceled() {
            if response.compact_revision() > 0 {
                return Err(StoreError::Compacted);
            }
            return Err(StoreError::Protocol {
                what: format!("watch cancelled: {}", response.cancel_reason()),
            });
        }
        let changes = response.events().iter().filter_map(txn::change_of).collect();
        Ok(WatchMessage {
            changes,
            revision: response.header().map_or(0, etcd_client::ResponseHeader::revision),
        })
    }
}

#[derive(Clone)]
struct Pinned {
    index: usize,
    client: Client,
}

struct Shared {
    config: EtcdConfig,
    /// Those in force, which may change while the others do not. Handles of one configuration share them.
    credentials: Arc<Mutex<Option<(String, String)>>>,
    /// The endpoints: those that are configured, or that were last found. Shared likewise.
    endpoints: Arc<Mutex<Vec<String>>>,
    pinned: Mutex<Option<Pinned>>,
    next: Mutex<usize>,
}

/// A handle on etcd; clones share the pinned endpoint.
#[derive(Clone)]
pub struct Etcd {
    shared: Arc<Shared>,
}

impl Etcd {
    /// A handle that connects when first used.
    #[must_use]
    pub fn new(config: EtcdConfig) -> Self {
        Self {
            shared: Arc::new(Shared {
                credentials: Arc::new(Mutex::new(config.credentials.clone())),
                endpoints: Arc::new(Mutex::new(config.endpoints.clone())),
                config,
                pinned: Mutex::new(None),
                next: Mutex::new(0),
            }),
        }
    }

    /// A handle with the same configuration and connections of its own, for a caller that must not wait behind others.
    #[must_use]
    pub fn separate(&self) -> Self {
        Self {
            shared: Arc::new(Shared {
                config: self.shared.config.clone(),
                credentials: Arc::clone(&self.shared.credentials),
                endpoints: Arc::clone(&self.shared.endpoints),
                pinned: Mutex::new(None),
                next: Mutex::new(0),
            }),
        }
    }

    /// Presents these from the next connection on, as do the handles that were made of this one. What is connected stays so.
    pub fn set_credentials(&self, credentials: Option<(String, String)>) {
        *lock(&self.shared.credentials) = credentials;
    }

    /// How many endpoints there are: as configured, or as last found, none before the first lookup.
    #[must_use]
    pub fn endpoint_count(&self) -> usize {
        lock(&self.shared.endpoints).len()
    }

    /// The endpoints. Those that are looked up are so anew where `afresh` asks for it, as after all of them have failed.
    async fn endpoints(&self, afresh: bool) -> Result<Vec<String>, StoreError> {
        let known = lock(&self.shared.endpoints).clone();
        let Some(discovery) = &self.shared.config.discovery else {
            return Ok(known);
        };
        if !afresh && !known.is_empty() {
            return Ok(known);
        }
        let found = discovery.find(known, &self.shared.config.tls).await?;
        lock(&self.shared.endpoints).clone_from(&found);
        Ok(found)
    }

    /// Everything under `prefix`, read linearizably.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn list(&self, prefix: &str, budget: Budget) -> Result<Snapshot, StoreError> {
        let options = GetOptions::new().with_prefix();
        self.get(prefix, options, budget).await
    }

    /// One key, read linearizably; the snapshot is empty when there is none.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn read(&self, key: &str, budget: Budget) -> Result<Snapshot, StoreError> {
        self.get(key, GetOptions::new(), budget).await
    }

    async fn get(&self, key: &str, options: GetOptions, budget: Budget) -> Result<Snapshot, StoreError> {
        let call = |mut client: Client| {
            let (key, options) = (key.to_owned(), options.clone());
            async move { client.get(key, Some(options)).await }
        };
        let response = self.call(budget, call).await?;
        let revision = response.header().map_or(0, etcd_client::ResponseHeader::revision);
        Ok(Snapshot {
            entries: response.kvs().iter().map(txn::entry_of).collect(),
            revision,
        })
    }

    /// A guarded write.
    ///
    /// # Errors
    /// See [`StoreError`]. After [`StoreError::Unreachable`] the write may have happened.
    pub async fn txn(&self, txn: &Txn, budget: Budget) -> Result<TxnOutcome, StoreError> {
        let call = |mut client: Client| {
            let txn = txn.to_wire();
            async move { client.txn(txn).await }
        };
        Ok(txn::outcome_of(&self.call(budget, call).await?))
    }

    /// An unguarded write, bound to `lease` unless that is 0.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn put(&self, key: &str, value: &str, lease: i64, budget: Budget) -> Result<(), StoreError> {
        let txn = Txn::new().then(Op::Put {
            key: key.to_owned(),
            value: value.to_owned(),
            lease,
        });
        self.txn(&txn, budget).await.map(|_| ())
    }

    /// Removes everything under `prefix`, in one step.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn remove(&self, prefix: &str, budget: Budget) -> Result<(), StoreError> {
        let call = |mut client: Client| {
            let prefix = prefix.to_owned();
            async move { client.delete(prefix, Some(DeleteOptions::new().with_prefix())).await }
        };
        self.call(budget, call).await.map(|_| ())
    }

    /// Grants a lease of at least `ttl`; etcd raises what is below its own minimum.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn grant(&self, ttl: Duration, budget: Budget) -> Result<i64, StoreError> {
        let seconds = i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX);
        let call = |mut client: Client| async move { client.lease_grant(seconds, None).await };
        self.call(budget, call).await.map(|response| response.id())
    }

    /// Renews a lease once. Proves the lease only, never the key that is bound to it.
    ///
    /// # Errors
    /// [`StoreError::LeaseGone`] when etcd does not know it any more; otherwise see [`StoreError`].
    pub async fn keep_alive(&self, lease: i64, budget: Budget) -> Result<(), StoreError> {
        let call = |mut client: Client| async move { client.lease_keep_alive(lease).await.map(|_| ()) };
        self.call(budget, call).await
    }

    /// Opens a watch of `prefix` from `revision` on, with the previous values of nothing.
    ///
    /// # Errors
    /// See [`StoreError`].
    pub async fn watch(&self, prefix: &str, revision: i64, budget: Budget) -> Result<Watch, StoreError> {
        let call = |mut client: Client| {
            let options = WatchOptions::new().with_prefix().with_start_revision(revision);
            let prefix = prefix.to_owned();
            async move { client.watch(prefix, Some(options)).await }
        };
        self.call(budget, call).await.map(|stream| Watch { stream })
    }

    /// How many of the configured endpoints answer within `attempt`, asked all at once.
    pub async fn answering(&self, attempt: Duration) -> usize {
        let mut asked = tokio::task::JoinSet::new();
        let found = timeout(attempt, self.endpoints(false)).await;
        for index in 0..found.map_or(0, |found| found.map_or(0, |found| found.len())) {
            let this = self.clone();
            asked.spawn(async move {
                let asking = async {
                    let mut client = this.connect(index, attempt).await?;
                    client.status().await.map_err(StoreError::from)
                };
                matches!(timeout(attempt, asking).await, Ok(Ok(_)))
            });
        }
        asked.join_all().await.into_iter().filter(|answered| *answered).count()
    }

    /// Leaves the pinned endpoint: for a caller that has seen it misbehave in a way that no error shows.
    pub fn rotate(&self) {
        let pinned = lock(&self.shared.pinned).take();
        if let Some(pinned) = pinned {
            *lock(&self.shared.next) = (pinned.index + 1) % self.endpoint_count().max(1);
        }
    }

    async fn call<T, F, Fut>(&self, budget: Budget, op: F) -> Result<T, StoreError>
    where
        F: Fn(Client) -> Fut,
        Fut: Future<Output = Result<T, etcd_client::Error>>,
    {
        let mut backoff = Duration::from_millis(20);
        loop {
            let attempt = async {
                let client = self.pinned(budget.attempt).await?;
                op(client).await.map_err(StoreError::from)
            };
            let attempt_end = (Instant::now() + budget.attempt).min(budget.deadline);
            let error = match timeout_at(attempt_end, attempt).await {
                Ok(Ok(done)) => return Ok(done),
                Ok(Err(error)) if !error.is_transient() => return Err(error),
                Ok(Err(error)) => error,
                Err(_) => StoreError::Unreachable {
                    what: format!("no answer within {:?}", budget.attempt),
                },
            };
            self.rotate();
            if Instant::now() + backoff >= budget.deadline {
                return Err(error);
            }
            tokio::time::sleep(backoff).await; // A refused connection answers at once; do not spin on it.
            backoff = (backoff * 2).min(Duration::from_millis(250));
        }
    }

    async fn pinned(&self, attempt: Duration) -> Result<Client, StoreError> {
        if let Some(pinned) = lock(&self.shared.pinned).as_ref() {
            return Ok(pinned.client.clone());
        }
        let index = *lock(&self.shared.next);
        let client = match self.connect(index, attempt).await {
            Ok(client) => client,
            Err(error) => {
                *lock(&self.shared.next) = (index + 1) % self.endpoint_count().max(1);
                return Err(error);
            }
        };
        *lock(&self.shared.pinned) = Some(Pinned {
            index,
            client: client.clone(),
        });
        Ok(client)
    }

    async fn connect(&self, index: usize, attempt: Duration) -> Result<Client, StoreError> {
        let config = &self.shared.config;
        let endpoints = self.endpoints(index == 0).await?;
        // The list may have become shorter; the first of it stands for what is not there any more.
        let Some(endpoint) = endpoints.get(index).or(endpoints.first()) else {
            return Err(StoreError::Protocol {
                what: "no etcd endpoint is configured".to_owned(),
            });
        };
        let mut options = ConnectOptions::new()
            .with_connect_timeout(attempt)
            .with_keep_alive(Duration::from_secs(1), Duration::from_secs(1))
            .with_keep_alive_while_idle(true)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        let credentials = lock(&self.shared.credentials).clone();
        if let Some((user, password)) = credentials {
            options = options.with_user(user, password);
        }
        if endpoint.starts_with("https://") {
            options = options.with_tls(tls_options(&config.tls).await?);
        }
        Client::connect([endpoint], Some(options))
            .await
            .map_err(StoreError::from)
    }
}

async fn tls_options(files: &EtcdTls) -> Result<TlsOptions, StoreError> {
    let read = async |path: &PathBuf| {
        tokio::fs::read(path).await.map_err(|error| StoreError::Protocol {
            what: format!("reading {} for TLS to etcd: {error}", path.display()),
        })
    };
    let mut options = TlsOptions::new();
    if let Some(cacert) = &files.cacert {
        options = options.ca_certificate(Certificate::from_pem(read(cacert).await?));
    }
    if let (Some(cert), Some(key)) = (&files.cert, &files.key) {
        options = options.identity(Identity::from_pem(read(cert).await?, read(key).await?));
    }
    Ok(options)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // Nothing panics while one of these is held; should it, the value is still whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
