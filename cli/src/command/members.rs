//! Which members an operator means.

use pgherd_cluster::record::Role;
use pgherd_cluster::view::{Member, View};

use super::prompt::Prompter;
use crate::args::RoleArg;
use crate::failure::Failure;

/// The members in a role, by name.
pub(crate) fn in_role(view: &View, role: RoleArg) -> Vec<&Member> {
    let holder = view.epoch().map(|epoch| &epoch.holder);
    let is = |member: &Member| {
        let leads = holder == Some(&member.name);
        match role {
            RoleArg::Any => true,
            RoleArg::Leader => leads,
            RoleArg::Primary => leads && member.record.role != Role::StandbyLeader,
            // As patronictl has it: whoever leads and is not a primary.
            RoleArg::StandbyLeader => leads && member.record.role != Role::Primary,
            RoleArg::Replica | RoleArg::Standby => !leads,
        }
    };
    view.members.values().filter(|member| is(member)).collect()
}

/// The role in a sentence.
pub(crate) fn word(role: RoleArg) -> &'static str {
    match role {
        RoleArg::Leader => "leader",
        RoleArg::Primary => "primary",
        RoleArg::StandbyLeader => "standby leader",
        RoleArg::Replica | RoleArg::Standby => "replica",
        RoleArg::Any => "member",
    }
}

/// The members named, all in a role where none is.
///
/// # Errors
/// When there is none, or one that is named is not there or in another role.
pub(crate) fn chosen<'a>(view: &'a View, names: &[String], role: RoleArg) -> Result<Vec<&'a Member>, Failure> {
    let all = in_role(view, role);
    let scope = &view.scope;
    if view.members.is_empty() {
        return Err(Failure::Refused(format!("{scope} cluster doesn't have any members")));
    }
    for name in names {
        let found = view.members.values().find(|member| member.name.as_str() == name);
        let Some(found) = found else {
            let known: Vec<&str> = view.members.keys().map(|name| name.as_str()).collect();
            return Err(Failure::Refused(format!(
                "{name} is not a member of cluster {scope}, whose members are {}",
                known.join(", ")
            )));
        };
        if !all.iter().any(|member| member.name == found.name) {
            return Err(Failure::Refused(format!(
                "{name} is no {} of cluster {scope}",
                word(role)
            )));
        }
    }
    let meant = |member: &&Member| names.is_empty() || names.iter().any(|name| name == member.name.as_str());
    let chosen: Vec<&Member> = all.into_iter().filter(meant).collect();
    if chosen.is_empty() {
        return Err(Failure::Refused(format!(
            "No {} among members of cluster {scope}",
            word(role)
        )));
    }
    Ok(chosen)
}

/// The names, for a sentence.
pub(crate) fn names(members: &[&Member]) -> String {
    let names: Vec<&str> = members.iter().map(|member| member.name.as_str()).collect();
    names.join(", ")
}

/// Asks whether it is meant so.
///
/// # Errors
/// When it is not, or nobody can say.
pub(crate) fn confirm(
    prompter: &mut Prompter<'_>,
    action: &str,
    members: &[&Member],
    at: Option<&str>,
) -> Result<(), Failure> {
    let names = names(members);
    let (question, aborted) = match at {
        Some(at) => (
            format!("Are you sure you want to schedule {action} of members {names} at {at}?"),
            format!("Aborted scheduled {action}"),
        ),
        None => (
            format!("Are you sure you want to {action} members {names}?"),
            format!("Aborted {action}"),
        ),
    };
    if prompter.confirms(&question)? {
        Ok(())
    } else {
        Err(Failure::Refused(aborted))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use pgherd_cluster::key::Keys;
    use pgherd_cluster::name::Scope;
    use pgherd_cluster::view::Entry;
    use serde_json::{Value, json};

    use super::*;

    /// node1 to node4, of which node4 may never lead, with these keys changed.
    pub(crate) fn view_with(leader: Option<&str>, keys: &[(&str, Value)]) -> View {
        let scope = Scope::new("batman").expect("a plain name");
        let prefix = Keys::new("service", &scope);
        let entry = |key: &str, value: String| Entry {
            key: format!("{}{key}", prefix.prefix()),
            value,
            create_revision: 1,
            mod_revision: 2,
            lease: 0,
        };
        let member = |name: &str, tags: Value| {
            let role = if Some(name) == leader { "primary" } else { "replica" };
            let record = json!({
                "conn_url": "postgres://h:1/p", "api_url": "http://h:2/patroni", "state": "running", "role": role,
                "tags": tags,
            });
            entry(&format!("members/{name}"), record.to_string())
        };
        let mut entries = vec![
            member("node2", json!({})),
            member("node1", json!({})),
            member("node3", json!({})),
            member("node4", json!({"nofailover": true})),
        ];
        entries.extend(leader.map(|leader| entry("leader", leader.to_owned())));
        entries.extend(keys.iter().map(|(key, value)| entry(key, value.to_string())));
        View::from_entries(scope.clone(), &prefix, entries, 1)
    }

    fn names_of(chosen: Result<Vec<&Member>, Failure>) -> Result<String, String> {
        chosen
            .map(|members| names(&members))
            .map_err(|failure| failure.to_string())
    }

    #[test]
    fn members_are_chosen_by_name_and_role() {
        let view = view_with(Some("node3"), &[]);
        let chosen = |names: &[&str], role| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            names_of(super::chosen(&view, &names, role))
        };
        for (names, role, expected) in [
            ([].as_slice(), RoleArg::Any, Ok("node1, node2, node3, node4")),
            (&[], RoleArg::Leader, Ok("node3")),
            (&[], RoleArg::Primary, Ok("node3")),
            (&[], RoleArg::Replica, Ok("node1, node2, node4")),
            (&["node4", "node1"], RoleArg::Standby, Ok("node1, node4")),
            (
                &["node3"],
                RoleArg::Replica,
                Err("node3 is no replica of cluster batman"),
            ),
            (
                &["x"],
                RoleArg::Any,
                Err("x is not a member of cluster batman, whose members are node1, node2, node3, node4"),
            ),
            (
                &[],
                RoleArg::StandbyLeader,
                Err("No standby leader among members of cluster batman"),
            ),
        ] {
            let expected = expected.map(str::to_owned).map_err(str::to_owned);
            assert_eq!(chosen(names, role), expected, "{names:?} {role:?}");
        }
        let leaderless = view_with(None, &[]);
        assert!(super::chosen(&leaderless, &[], RoleArg::Leader).is_err());
    }
}
