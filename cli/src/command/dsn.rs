//! `pgherd dsn`: where a member's PostgreSQL is.

use pgherd_cluster::view::{Member, View};

use super::members::{in_role, word};
use super::site::Scene;
use crate::args::{DsnArgs, RoleArg};
use crate::failure::Failure;
use crate::terminal::say;

/// Runs the command.
///
/// # Errors
/// When there is no such member.
pub(crate) async fn run(scene: &Scene, args: &DsnArgs) -> Result<(), Failure> {
    let site = scene.site(args.cluster.cluster.as_deref(), args.cluster.group)?;
    let view = site.view().await?;
    say(dsn(one(&view, args.member.as_deref(), args.role)?)?);
    Ok(())
}

/// The member named, or the first in a role; the leader where neither is said.
///
/// # Errors
/// When there is none.
pub(crate) fn one<'a>(view: &'a View, name: Option<&str>, role: Option<RoleArg>) -> Result<&'a Member, Failure> {
    let role = role.unwrap_or(if name.is_some() { RoleArg::Any } else { RoleArg::Leader });
    let mut members = in_role(view, role).into_iter();
    let found = match name {
        Some(name) => members.find(|member| member.name.as_str() == name),
        None => members.next(),
    };
    found.ok_or_else(|| {
        Failure::Refused(match name {
            Some(name) => format!("{name} is not a member of cluster {}", view.scope),
            None => format!(
                "Can not find a suitable member: cluster {} has no {}",
                view.scope,
                word(role)
            ),
        })
    })
}

fn dsn(member: &Member) -> Result<String, Failure> {
    let address = member.record.postgres_address();
    let address = address.ok_or_else(|| Failure::Refused(format!("{} publishes no address", member.name)))?;
    Ok(format!("host={} port={}", address.host, address.port))
}

#[cfg(test)]
mod tests {
    use super::super::members::tests::view_with;
    use super::*;

    #[test]
    fn it_is_the_leaders_unless_another_is_asked_for() {
        let view = view_with(Some("node2"), &[]);
        let name = |name, role| one(&view, name, role).map(|member| member.name.to_string()).ok();
        assert_eq!(name(None, None).as_deref(), Some("node2"));
        assert_eq!(name(None, Some(RoleArg::Replica)).as_deref(), Some("node1"));
        assert_eq!(name(Some("node3"), None).as_deref(), Some("node3"));
        assert_eq!(name(Some("x"), None), None);
        assert_eq!(
            dsn(view.leader_member().expect("it leads")),
            Ok("host=h port=1".to_owned())
        );
        assert!(one(&view_with(None, &[]), None, None).is_err());
    }
}
