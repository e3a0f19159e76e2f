//! Which ports the demo uses. Pure, but for the question whether a port is free.

use std::collections::BTreeSet;

/// Where everything listens, all of it on loopback: the passwords are on the screen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) etcd_client: u16,
    pub(crate) etcd_peer: u16,
    pub(crate) write: u16,
    pub(crate) read: u16,
    pub(crate) stats: u16,
    pub(crate) members: Vec<MemberPlan>,
    /// A sentence for each port that is not the usual one.
    pub(crate) moved: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MemberPlan {
    pub(crate) name: String,
    pub(crate) postgresql: u16,
    pub(crate) rest: u16,
}

/// Chooses ports for `members`, the usual ones where they are free. `taken` says by whom a port is taken, if it is.
///
/// # Errors
/// Names what there is no port for.
pub(crate) fn choose(members: u16, taken: impl Fn(u16) -> Option<String>) -> Result<Plan, String> {
    let mut wishes: Vec<(String, u16)> = vec![
        ("etcd".to_owned(), 2379),
        ("etcd's peer port".to_owned(), 2380),
        ("the write port".to_owned(), 5432),
        ("the read port".to_owned(), 5433),
        ("the page".to_owned(), 8080),
    ];
    for number in 1..=members {
        wishes.push((format!("PostgreSQL of n{number}"), 5440 + number));
    }
    for number in 1..=members {
        wishes.push((format!("REST of n{number}"), 8007 + number));
    }
    let mut moved = Vec::new();
    let ports = allocate(&wishes, taken, &mut moved)?;
    let count = usize::from(members);
    let [etcd_client, etcd_peer, write, read, stats, rest @ ..] = ports.as_slice() else {
        return Err("no ports were chosen".to_owned());
    };
    let (postgresql, apis) = rest.split_at(count.min(rest.len()));
    let members = postgresql.iter().zip(apis).enumerate();
    let members = members.map(|(index, (postgresql, rest))| MemberPlan {
        name: format!("n{}", index + 1),
        postgresql: *postgresql,
        rest: *rest,
    });
    Ok(Plan {
        etcd_client: *etcd_client,
        etcd_peer: *etcd_peer,
        write: *write,
        read: *read,
        stats: *stats,
        members: members.collect(),
        moved,
    })
}

/// Gives each its wish where that is free, and otherwise the next port that is free and that nobody wished for.
fn allocate(
    wishes: &[(String, u16)],
    taken: impl Fn(u16) -> Option<String>,
    moved: &mut Vec<String>,
) -> Result<Vec<u16>, String> {
    let mut used: BTreeSet<u16> = wishes.iter().map(|(_, port)| *port).collect();
    wishes
        .iter()
        .map(|(what, wish)| {
            let Some(by) = taken(*wish) else { return Ok(*wish) };
            let next = (*wish..=u16::MAX).find(|port| !used.contains(port) && taken(*port).is_none());
            let port = next.ok_or_else(|| format!("no free port from {wish} up for {what}"))?;
            used.insert(port);
            moved.push(format!("port {wish} is taken by {by}; {what} is on {port}"));
            Ok(port)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_ports_are_taken_when_they_are_free() {
        let plan = choose(3, |_| None).expect("all free");
        assert_eq!((plan.etcd_client, plan.etcd_peer), (2379, 2380));
        assert_eq!((plan.write, plan.read, plan.stats), (5432, 5433, 8080));
        let members: Vec<_> = plan
            .members
            .iter()
            .map(|member| (member.name.as_str(), member.postgresql, member.rest))
            .collect();
        assert_eq!(members, [("n1", 5441, 8008), ("n2", 5442, 8009), ("n3", 5443, 8010)]);
        assert!(plan.moved.is_empty());
    }

    #[test]
    fn a_busy_port_gives_way_without_taking_anothers() {
        let plan = choose(2, |port| {
            [5432, 5434, 8008]
                .contains(&port)
                .then(|| "pid 7 (postgres)".to_owned())
        })
        .expect("enough");
        assert_eq!((plan.write, plan.read), (5435, 5433));
        assert_eq!((plan.members[0].rest, plan.members[1].rest), (8010, 8009));
        assert_eq!(
            plan.moved,
            [
                "port 5432 is taken by pid 7 (postgres); the write port is on 5435",
                "port 8008 is taken by pid 7 (postgres); REST of n1 is on 8010",
            ]
        );
    }

    #[test]
    fn no_two_things_share_a_port_whatever_is_busy() {
        for busy in [0, 1, 2, 3, 7] {
            let plan = choose(9, |port| (busy > 0 && port % 8 < busy).then(|| "x".to_owned())).expect("enough");
            let mut ports = vec![plan.etcd_client, plan.etcd_peer, plan.write, plan.read, plan.stats];
            ports.extend(plan.members.iter().flat_map(|member| [member.postgresql, member.rest]));
            let distinct: BTreeSet<u16> = ports.iter().copied().collect();
            assert_eq!(distinct.len(), ports.len(), "{busy}");
        }
    }

    #[test]
    fn without_any_port_it_is_said_for_what() {
        assert_eq!(
            choose(1, |_| Some("x".to_owned())),
            Err("no free port from 2379 up for etcd".to_owned())
        );
    }
}
