//! How many files the proxy may have open, and how many its limits ask for.

use std::thread::available_parallelism;

use pgherd_proxy::FILES_PER_WORKER;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::config::proxy::ProxySection;

/// The page's connections, listeners, etcd, agents that are asked, the first runtime's own, and clients that are only told
/// why they are refused.
const SPARE: u64 = 512;

/// Files that a proxy has open however many sessions there are.
fn base(proxy: &ProxySection) -> u64 {
    let workers = proxy.workers.or_else(|| available_parallelism().ok().map(usize::from));
    let workers = workers.unwrap_or(1).saturating_mul(FILES_PER_WORKER);
    u64::try_from(workers).unwrap_or(u64::MAX).saturating_add(SPARE)
}

/// Files that a proxy has open when all its places are taken: a client's socket and a server's for each.
fn needed(proxy: &ProxySection) -> u64 {
    let sessions = proxy.limits.connections.saturating_add(proxy.limits.reserved);
    u64::try_from(sessions)
        .unwrap_or(u64::MAX)
        .saturating_mul(2)
        .saturating_add(base(proxy))
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

/// What is wrong when a process that may have `most` files open takes on what this proxy's limits ask for.
pub(crate) fn shortage(proxy: &ProxySection, most: Option<u64>) -> Option<String> {
    let (needed, most) = (needed(proxy), most?);
    if needed <= most {
        return None;
    }
    let limits = &proxy.limits;
    let sessions = most.saturating_sub(base(proxy)) / 2;
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
pub(crate) fn told(proxy: &ProxySection, most: Option<u64>) -> String {
    let limits = &proxy.limits;
    let reserved = match limits.reserved {
        0 => String::new(),
        reserved => format!(" and {reserved} reserved"),
    };
    let most = most.map_or_else(|| "any number".to_owned(), |most| most.to_string());
    format!(
        "open files: {} are needed for {} connections{reserved} (2 each, and {}); {most} may be open",
        needed(proxy),
        limits.connections,
        base(proxy)
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::config::proxy::tests::read_from;

    #[test]
    fn a_shortage_names_key_numbers_and_both_ways_out() {
        let (read, _) = read_from(json!({"limits": {"connections": 10_000}, "workers": 2}));
        let mut proxy = read.expect("no errors");
        let base = 512 + 2 * u64::try_from(FILES_PER_WORKER).expect("a small number");
        let all = 20_000 + base;
        assert_eq!(shortage(&proxy, Some(all)), None);
        assert_eq!(shortage(&proxy, None), None);
        let finding = shortage(&proxy, Some(4096)).expect("too few");
        let most = (4096 - base) / 2;
        let expected = format!(
            "proxy.limits.connections: 10000 need {all} open files, and this process may have 4096; write {most} at most, or allow it {all} (LimitNOFILE="
        );
        assert!(finding.starts_with(&expected), "{finding}");
        proxy.limits.reserved = 3;
        assert_eq!(
            told(&proxy, Some(1_048_576)),
            format!(
                "open files: {} are needed for 10000 connections and 3 reserved (2 each, and {base}); 1048576 may be open",
                all + 6
            )
        );
        let fewer = format!("write {} at most", most - 3);
        assert!(shortage(&proxy, Some(4096)).is_some_and(|finding| finding.contains(&fewer)));
        let hopeless = shortage(&proxy, Some(64)).expect("too few");
        assert!(
            hopeless.contains(&format!("may have 64; allow it {}", all + 6)),
            "{hopeless}"
        );
        proxy.limits.connections = usize::MAX;
        assert!(shortage(&proxy, Some(u64::MAX - 1)).is_some());
    }

    #[test]
    fn what_is_raised_is_what_may_be() {
        let most = most();
        assert_eq!(raise(), most);
        assert_eq!(getrlimit(Resource::Nofile).current, most);
    }
}
