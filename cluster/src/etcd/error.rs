//! What can go wrong with etcd, by what the caller does about it.

/// An error of a call to etcd.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// No endpoint answered in time, or none has a leader. Tried again by itself until the deadline; a write may have
    /// happened.
    #[error("etcd does not answer: {what}")]
    Unreachable {
        /// The last thing that was seen.
        what: String,
    },
    /// User or password are wrong, or missing.
    #[error("etcd refuses the credentials: {what}")]
    Auth {
        /// etcd's words.
        what: String,
    },
    /// The user may not do this.
    #[error("etcd denies access: {what}")]
    Denied {
        /// etcd's words.
        what: String,
    },
    /// The lease has expired or was revoked.
    #[error("the lease is gone")]
    LeaseGone,
    /// The revision asked for has been compacted away.
    #[error("the revision has been compacted")]
    Compacted,
    /// Anything else: a defect, here or there; or, where a view does not come from etcd, why there is none.
    #[error("{what}")]
    Protocol {
        /// What was seen.
        what: String,
    },
}

impl StoreError {
    /// Whether another endpoint, or the same one a little later, may do better.
    #[must_use]
    pub const fn is_transient(&self) -> bool {
        matches!(self, Self::Unreachable { .. })
    }
}

/// gRPC status codes, <https://grpc.io/docs/guides/status-codes/>.
mod code {
    pub(super) const INVALID_ARGUMENT: i32 = 3;
    pub(super) const NOT_FOUND: i32 = 5;
    pub(super) const PERMISSION_DENIED: i32 = 7;
    pub(super) const FAILED_PRECONDITION: i32 = 9;
    pub(super) const OUT_OF_RANGE: i32 = 11;
    pub(super) const UNAUTHENTICATED: i32 = 16;
}

impl From<etcd_client::Error> for StoreError {
    fn from(error: etcd_client::Error) -> Self {
        use etcd_client::Error;
        match error {
            Error::GRpcStatus(status) => of_status(status.code() as i32, status.message()),
            Error::LeaseKeepAliveError(what) if what.contains("lease not found") => Self::LeaseGone,
            Error::InvalidArgs(what) | Error::Internal(what) => Self::Protocol { what },
            Error::InvalidUri(error) => Self::Protocol {
                what: format!("the endpoint is not a URL: {error}"),
            },
            Error::TransportError(error) => {
                // The cause says more than "transport error".
                let cause = std::error::Error::source(&error).map(ToString::to_string);
                Self::Unreachable {
                    what: cause.unwrap_or_else(|| error.to_string()),
                }
            }
            other => Self::Unreachable {
                what: other.to_string(),
            },
        }
    }
}

fn of_status(code: i32, message: &str) -> StoreError {
    let what = message.to_owned();
    match code {
        code::NOT_FOUND if message.contains("lease") => StoreError::LeaseGone,
        code::OUT_OF_RANGE if message.contains("compacted") => StoreError::Compacted,
        code::INVALID_ARGUMENT if message.contains("auth") || message.contains("user name") => {
            StoreError::Auth { what }
        }
        code::FAILED_PRECONDITION if message.contains("authentication is not enabled") => StoreError::Auth { what },
        code::UNAUTHENTICATED if message.contains("invalid auth token") => StoreError::Unreachable { what },
        code::UNAUTHENTICATED => StoreError::Auth { what },
        code::PERMISSION_DENIED => StoreError::Denied { what },
        code::INVALID_ARGUMENT | code::NOT_FOUND | code::OUT_OF_RANGE | code::FAILED_PRECONDITION => {
            StoreError::Protocol { what }
        }
        // Unavailable, DeadlineExceeded, Unknown, Cancelled, Aborted, ResourceExhausted, Internal: elsewhere or later.
        _ => StoreError::Unreachable { what },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_status_is_sorted_by_what_the_caller_does() {
        let of = of_status;
        assert!(matches!(
            of(14, "etcdserver: no leader"),
            StoreError::Unreachable { .. }
        ));
        assert!(matches!(
            of(3, "etcdserver: authentication failed, invalid user ID or password"),
            StoreError::Auth { .. }
        ));
        assert!(matches!(
            of(3, "etcdserver: user name is empty"),
            StoreError::Auth { .. }
        ));
        assert!(matches!(
            of(16, "etcdserver: invalid auth token"),
            StoreError::Unreachable { .. }
        ));
        assert!(matches!(
            of(7, "etcdserver: permission denied"),
            StoreError::Denied { .. }
        ));
        assert_eq!(of(5, "etcdserver: requested lease not found"), StoreError::LeaseGone);
        assert_eq!(
            of(11, "etcdserver: mvcc: required revision has been compacted"),
            StoreError::Compacted
        );
        assert!(matches!(
            of(3, "etcdserver: duplicate key given in txn request"),
            StoreError::Protocol { .. }
        ));
    }
}
