//! Making a data directory.

use pgherd_cluster::etcd::{Compare, Op, Txn};
use pgherd_cluster::key::Key;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::StandbyCluster;
use pgherd_cluster::view::Epoch;

use super::{JobError, Outcome, handover};
use crate::config::AgentConfig;
use crate::context::Context;
use crate::decide::upstream_address;
use crate::postgres::clone::{Making, make_replica};
use crate::postgres::place::Place;
use crate::postgres::sql::Walsender;
use crate::postgres::{DataDir, Programs, Upstream, bootstrap, control, rewind};

/// Runs initdb. When it fails, another member may be able to.
pub(super) async fn initdb(context: &Context) -> Result<Outcome, JobError> {
    if let Err(error) = bootstrap::initdb(&context.programs, &context.live()).await {
        if let Err(error) = withdraw(context).await {
            tracing::warn!("giving the initialize key up: {error}"); // It ends with our lease.
        }
        return Err(error.into());
    }
    Ok(Outcome::Done)
}

/// Runs the operator's own program.
pub(super) async fn custom_bootstrap(context: &Context) -> Result<Outcome, JobError> {
    let live = context.live();
    let Some(method) = &live.bootstrap.method else {
        return Err(JobError::Unclear("bootstrap.method is not configured"));
    };
    match bootstrap::by_program(&live, method).await {
        Ok(()) => Ok(Outcome::Done),
        Err(error) => Ok(Outcome::BootstrapFailed {
            why: error.chain(),
            for_good: true,
        }),
    }
}

/// Copies while an old data directory, if there is one, stays where it is until the copy is whole.
pub(super) async fn clone(context: &Context, from: Option<&MemberName>, remove: bool) -> Result<Outcome, JobError> {
    let source = match from {
        Some(from) => {
            let source = upstream_address(&context.view(), from);
            Some(Upstream::Member(
                source.ok_or_else(|| JobError::NoSuchMember(from.clone()))?,
            ))
        }
        None => None,
    };
    replace(context, source, remove).await
}

/// The same from the cluster that this one follows.
pub(super) async fn clone_remote(context: &Context, section: StandbyCluster) -> Result<Outcome, JobError> {
    replace(context, Some(Upstream::Remote(section)), false).await
}

async fn replace(context: &Context, source: Option<Upstream>, remove: bool) -> Result<Outcome, JobError> {
    // What is to be replaced must not run; a former leader's server has ended long before, a standby's has not.
    if context.keeper.instance().borrow().postmaster.is_some() {
        handover::before_stop(context).await;
    }
    context.keeper.end().await?;
    context.keeper.disarm().await?;
    let data_dir = &context.config.postgresql.data_dir;
    rewind::retire(data_dir)?;
    let live = context.live();
    if remove {
        remove_for(&context.programs, &live, source.as_ref()).await?;
    }
    let scripts = match &source {
        Some(Upstream::Remote(section)) => context.scripts_of(section),
        Some(Upstream::Member(_)) | None => context.scripts(),
    };
    let making = Making {
        programs: &context.programs,
        config: &live,
        scripts: &scripts,
        source: source.as_ref(),
    };
    if let Some(aside) = make_replica(making).await? {
        tracing::warn!(aside = %aside.display(), "the former data directory was moved aside");
    }
    Ok(Outcome::Done)
}

/// Removes the data directory, since the configuration orders that no copy of data that diverged is kept; once it is known
/// that there is a server to copy from.
async fn remove_for(programs: &Programs, config: &AgentConfig, source: Option<&Upstream>) -> Result<(), JobError> {
    let Some(place) = source.and_then(Upstream::place) else {
        return Err(JobError::Unclear(
            "nobody is there to copy from: the data directory is not removed",
        ));
    };
    let asked = Walsender {
        programs,
        place: &place,
        user: &config.postgresql.replication,
        options: &config.postgresql.connections.replication,
    };
    asked.identify().await?;
    let data_dir = &config.postgresql.data_dir;
    tracing::warn!(data_dir = %data_dir.display(), "removing the data directory, as postgresql.remove_data_directory_on_* orders");
    Ok(Place::of(data_dir)?.remove()?)
}

/// Gives up the initialize key of a cluster that this member has begun to make: until it is finished, that is bound to this
/// member's lease.
pub(crate) async fn withdraw(context: &Context) -> Result<(), JobError> {
    let Some(lease) = context.lease.state().borrow().lease else {
        return Ok(());
    };
    let key = context.key(&Key::Initialize);
    let txn = Txn::new()
        .when(Compare::Lease(key.clone(), lease))
        .then(Op::Delete(key));
    // One that is not there, or another's, stays as it is.
    context.etcd.txn(&txn, context.budget()).await?;
    Ok(())
}

/// Makes the initialize key of a cluster that is finished outlive this member's lease.
pub(super) async fn keep_key(context: &Context, epoch: &Epoch) -> Result<(), JobError> {
    let DataDir::Cluster { control, .. } =
        control::inspect(&context.programs, &context.config.postgresql.data_dir).await?
    else {
        return Err(JobError::Unclear("the data directory of the new cluster is gone"));
    };
    let (key, leader) = (context.key(&Key::Initialize), context.key(&Key::Leader));
    let value = control.system_id.to_string();
    // It may have ended with a lease of another length.
    for before in [Compare::Value(key.clone(), value.clone()), Compare::Absent(key.clone())] {
        let txn = Txn::new()
            .when(before)
            .when(Compare::CreateRevision(leader.clone(), epoch.create_revision))
            .then(Op::Put {
                key: key.clone(),
                value: value.clone(),
                lease: 0,
            });
        if context.etcd.txn(&txn, context.budget()).await?.succeeded {
            return Ok(());
        }
    }
    Err(JobError::Unclear(
        "the initialize key names another cluster, or the leader key is not ours",
    ))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::config::tests::agent;

    #[tokio::test]
    async fn nothing_is_removed_before_there_is_a_server_to_copy_from() {
        let dir = tempfile::tempdir().expect("a directory");
        let data = dir.path().join("data");
        std::fs::create_dir(&data).expect("made");
        let mut config = agent();
        config.postgresql.data_dir = data.clone();
        let source = Upstream::Member(config.postgresql.connect_address.clone());
        let psql = |script: &str| {
            let path = dir.path().join("psql");
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("written");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("made a program");
        };
        let programs = Programs::new(Some(dir.path().to_owned()));
        assert!(remove_for(&programs, &config, None).await.is_err());
        psql("exit 2");
        assert!(remove_for(&programs, &config, Some(&source)).await.is_err());
        assert!(data.exists(), "nobody answers");
        psql("echo '7000000000000000001|2|0/3000000|'");
        remove_for(&programs, &config, Some(&source)).await.expect("removed");
        assert!(!data.exists());
    }
}
