//! Making a data directory.

use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::StandbyCluster;

use super::{JobError, Outcome};
use crate::context::Context;
use crate::decide::upstream_address;
use crate::postgres::programs::file_error;
use crate::postgres::{ToolError, Upstream, bootstrap, clone, rewind};

pub(super) async fn initdb(context: &Context) -> Result<Outcome, JobError> {
    bootstrap::initdb(&context.programs, &context.config).await?;
    Ok(Outcome::Done)
}

/// Clones while an old data directory, if there is one, stays where it is until the copy is whole.
pub(super) async fn clone(context: &Context, from: &MemberName, remove: bool) -> Result<Outcome, JobError> {
    let source = upstream_address(&context.view(), from).ok_or_else(|| JobError::NoSuchMember(from.clone()))?;
    replace(context, Upstream::Member(source), remove).await
}

/// The same from the cluster that this one follows.
pub(super) async fn clone_remote(context: &Context, section: StandbyCluster) -> Result<Outcome, JobError> {
    replace(context, Upstream::Remote(section), false).await
}

async fn replace(context: &Context, source: Upstream, remove: bool) -> Result<Outcome, JobError> {
    clone::refuse_unmovable(&context.config.postgresql.data_dir)?;
    // What is to be replaced must not run; a former leader's server has ended long before, a standby's has not.
    context.keeper.end().await?;
    context.keeper.disarm().await?;
    rewind::retire(&context.config.postgresql.data_dir)?;
    if remove {
        remove_data(&context.config.postgresql.data_dir).await?;
    }
    if let Some(aside) = clone::clone_from(&context.programs, &context.config, &source).await? {
        tracing::warn!(aside = %aside.display(), "the former data directory was moved aside");
    }
    Ok(Outcome::Done)
}

/// What the configuration orders: no copy of data that diverged is kept.
async fn remove_data(data_dir: &std::path::Path) -> Result<(), ToolError> {
    tracing::warn!(data_dir = %data_dir.display(), "removing the data directory, as postgresql.remove_data_directory_on_* orders");
    match tokio::fs::remove_dir_all(data_dir).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(file_error("removing the data directory", data_dir)(error))
        }
        _ => Ok(()),
    }
}
