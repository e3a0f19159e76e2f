//! What an agent leaves with the keeper for the one after it.

use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::view::Epoch;

/// What an earlier agent of this member left with the keeper.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resumed {
    /// Its lease.
    pub lease: Option<i64>,
    /// How long that lease lives without renewal.
    pub lease_ttl: Duration,
    /// Its holding of the leader key.
    pub epoch: Option<Epoch>,
    /// The keeper's name for that holding, when it is not the create revision.
    pub term: Option<u64>,
    /// Whether PostgreSQL had been proven to take writes under it.
    pub proven: bool,
    /// The deadline that the keeper still has from it, as the keeper says; no part of what was left.
    pub armed_until: Option<Boottime>,
}

impl Resumed {
    /// The bytes that the keeper remembers.
    #[must_use]
    pub fn to_memo(&self) -> Vec<u8> {
        let epoch = self
            .epoch
            .as_ref()
            .map(|epoch| (epoch.holder.as_str(), epoch.create_revision));
        let ttl = self.lease_ttl.as_secs();
        serde_json::json!({ "lease": self.lease, "ttl": ttl, "epoch": epoch, "term": self.term,
            "proven": self.proven })
        .to_string()
        .into_bytes()
    }

    /// Reads them back; what is not understood is nothing.
    #[must_use]
    pub fn from_memo(memo: &[u8]) -> Self {
        let memo: serde_json::Value = serde_json::from_slice(memo).unwrap_or_default();
        let epoch = || {
            let holder = MemberName::new(memo.get("epoch")?.get(0)?.as_str()?).ok()?;
            Some(Epoch {
                holder,
                create_revision: memo.get("epoch")?.get(1)?.as_i64()?,
            })
        };
        // Without its length a lease proves no deadline, and is not resumed.
        let ttl = memo.get("ttl").and_then(serde_json::Value::as_u64).unwrap_or_default();
        let lease = memo.get("lease").and_then(serde_json::Value::as_i64);
        Self {
            lease: lease.filter(|_| ttl > 0),
            lease_ttl: Duration::from_secs(ttl),
            epoch: epoch(),
            term: memo.get("term").and_then(serde_json::Value::as_u64),
            proven: memo
                .get("proven")
                .and_then(serde_json::Value::as_bool)
                .unwrap_or_default(),
            armed_until: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memo_survives_and_rubbish_is_nothing() {
        let holder = MemberName::new("n1").expect("a plain name");
        let resumed = Resumed {
            lease: Some(77),
            lease_ttl: Duration::from_secs(5),
            epoch: Some(Epoch {
                holder,
                create_revision: 9,
            }),
            term: Some(8),
            proven: true,
            armed_until: None,
        };
        assert_eq!(Resumed::from_memo(&resumed.to_memo()), resumed);
        for memo in [&b""[..], b"x", b"{}", b"[1]", br#"{"lease":"x","epoch":[]}"#] {
            assert_eq!(Resumed::from_memo(memo), Resumed::default());
        }
    }
}
