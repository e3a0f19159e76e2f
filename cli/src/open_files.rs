//! How many files the proxy may have open, and how many its limits ask for.

use pgherd_proxy::LimitsConfig;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The page's connections, listeners, etcd, agents that are asked, the runtimes' own, and clients that are only told why they
/// are refused.
const SPARE: u64 = 512;

/// Files that a proxy has open when all its places are taken: a client's socket and a server's for each.
pub(crate) fn needed(limits: &LimitsConfig) -> u64 {
    let sessions = limits.connections.saturating_add(limits.reserved);
    u64::try_from(sessions)
        .unwrap_or(u64::MAX)
        .saturating_mul(2)
        .saturating_add(SPARE)
}

/// Files that this process may have open at the most; nothing for any number.
pub(crate) fn most() -> Option<u64> {
    getrlimit(Resource::Nofile).maximum
}

/// Raises what this process may have open to the most that it may give itself, and answers with what is in force.
pub(crate) fn raise() -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: maximum,
        maximum,
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => maximum,
        Err(_) => current,
    }
}

/// What is wrong when a process that may have `most` files open takes on `limits`.
pub(crate) fn shortage(limits: &LimitsConfig, most: Option<u64>) -> Option<String> {
    let (needed, most) = (needed(limits), most?);
    if needed <= most {
        return None;
    }
    let sessions = most.saturating_sub(SPARE) / 2;
    let connections = sessions.saturating_sub(u64::try_from(limits.reserved).unwrap_or(u64::MAX));
    let lower = if connections == 0 {
        String::new()
    } else {
        format!("write {connections} at most, or ")
    };
    Some(format!(
        "proxy.limits.connections: {} need {needed} open files, and this process may have {most}; {lower}allow it {needed} \
         (LimitNOFILE= in its systemd unit, --ulimit nofile= for a container, ulimit -Hn in a shell)",
        limits.connections
    ))
}

/// The sum, for people.
pub(crate) fn told(limits: &LimitsConfig, most: Option<u64>) -> String {
    let reserved = match limits.reserved {
        0 => String::new(),
        reserved => format!(" and {reserved} reserved"),
    };
    let most = most.map_or_else(|| "any number".to_owned(), |most| most.to_string());
    format!(
        "open files: {} are needed for {} connections{reserved} (2 each, and {SPARE}); {most} may be open",
        needed(limits),
        limits.connections
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_names_key_numbers_and_both_ways_out() {
        let mut limits = LimitsConfig::of(10_000);
        assert_eq!(shortage(&limits, Some(20_512)), None);
        assert_eq!(shortage(&limits, None), None);
        let finding = shortage(&limits, Some(4096)).expect("too few");
        assert!(
            finding.starts_with("proxy.limits.connections: 10000 need 20512 open files, and this process may have 4096; write 1792 at most, or allow it 20512 (LimitNOFILE="),
            "{finding}"
        );
        limits.reserved = 3;
        assert_eq!(
            told(&limits, Some(1_048_576)),
            "open files: 20518 are needed for 10000 connections and 3 reserved (2 each, and 512); 1048576 may be open"
        );
        assert!(shortage(&limits, Some(4096)).is_some_and(|finding| finding.contains("write 1789 at most")));
        let hopeless = shortage(&limits, Some(64)).expect("too few");
        assert!(hopeless.contains("may have 64; allow it 20518"), "{hopeless}");
        limits.connections = usize::MAX;
        assert!(shortage(&limits, Some(u64::MAX - 1)).is_some());
    }

    #[test]
    fn what_is_raised_is_what_may_be() {
        let most = most();
        assert_eq!(raise(), most);
        assert_eq!(getrlimit(Resource::Nofile).current, most);
    }
}
