//! Making a data directory.

use pgherd_cluster::name::MemberName;

use super::{JobError, Outcome};
use crate::context::Context;
use crate::decide::upstream_address;
use crate::postgres::{bootstrap, clone};

pub(super) async fn initdb(context: &Context) -> Result<Outcome, JobError> {
    bootstrap::initdb(&context.programs, &context.live()).await?;
    Ok(Outcome::Done)
}

/// Clones while an old data directory, if there is one, stays where it is until the copy is whole.
pub(super) async fn clone(context: &Context, from: &MemberName) -> Result<Outcome, JobError> {
    let source = upstream_address(&context.view(), from).ok_or_else(|| JobError::NoSuchMember(from.clone()))?;
    clone::refuse_unmovable(&context.config.postgresql.data_dir)?;
    // What is to be replaced must not run; a former leader's server has ended long before, a standby's has not.
    context.keeper.end().await?;
    context.keeper.disarm().await?;
    if let Some(aside) = clone::clone_from(&context.programs, &context.live(), &source).await? {
        tracing::warn!(aside = %aside.display(), "the former data directory was moved aside");
    }
    Ok(Outcome::Done)
}
