//! How the other members' REST interfaces are asked: by TLS or not, and with what they want to see.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use pgherd_cluster::http::{Access, Answer, Ask, Endpoint, HttpError, ask_at};

use crate::config::RestConfig;
use crate::rest::authorization;

/// What members' interfaces are shown, and whom we believe to be one. Cheap to copy; all copies see a change at once.
#[derive(Clone, Default)]
pub struct Peers(Arc<ArcSwap<Shown>>);

#[derive(Default)]
struct Shown {
    access: Access,
    /// For requests that change something: members share their credentials.
    authorization: Option<String>,
}

impl Peers {
    /// Reads the files that the configuration names; what cannot be read is told, and goes without.
    pub fn set(&self, config: &RestConfig) {
        let access = config.peers.load().unwrap_or_else(|error| {
            tracing::warn!("ctl: other members cannot be asked by TLS: {error}");
            Access::default()
        });
        self.0.store(Arc::new(Shown {
            access,
            authorization: authorization(config.credentials.as_ref()),
        }));
    }

    /// The header of a request that changes something.
    #[must_use]
    pub fn authorization(&self) -> Option<String> {
        self.0.load().authorization.clone()
    }

    /// Asks a member within `limit`.
    ///
    /// # Errors
    /// See [`HttpError`]; an HTTP status of any kind is an answer.
    pub async fn ask(&self, endpoint: &Endpoint, ask: Ask, limit: Duration) -> Result<Answer, HttpError> {
        let access = self.0.load().access.clone();
        ask_at(endpoint, ask, limit, &access).await
    }
}
