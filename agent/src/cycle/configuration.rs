//! What changes in a running agent: its configuration read anew, PostgreSQL's files, what waits for a restart, passwords.

use std::sync::Arc;
use std::time::Duration;

use pgherd_cluster::clock::Boottime;
use pgherd_keeper::protocol::PostmasterSignal;
use serde_json::{Map, Value};

use super::Cycle;
use crate::config::RestConfig;
use crate::jobs::reload_if_changed;
use crate::live::{Extent, Fresh, Reload};
use crate::observation::{LeaseSeen, Observation, Postgres};
use crate::postgres::passwords::Passwords;
use crate::postgres::{DataDir, pending};
use crate::rest::Doors;
use crate::scripts::Scripts;
use crate::topology::needs_feedback;

/// How long after its files were written a server may take to read them.
const READ_MAX: Duration = Duration::from_secs(3);
/// Between looks whether it has.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// After a password that could not be changed.
const AGAIN: Duration = Duration::from_secs(10);

/// What waits for a restart, and what of the server it was told from.
#[derive(Default)]
pub(super) struct Pending {
    pub(super) found: Map<String, Value>,
    /// The state of the server's parameters that `found` is of.
    seen: Option<String>,
    /// Until when the server may be about to read its files.
    reading_until: Option<Boottime>,
}

/// Passwords that the roles have, as far as this member knows.
pub(super) struct Roles {
    in_force: Passwords,
    failed_at: Option<Boottime>,
}

impl Roles {
    pub(super) fn new(configured: Passwords) -> Self {
        Self {
            in_force: configured,
            failed_at: None,
        }
    }
}

/// What the next configuration comes by. Cancel safe.
pub(super) async fn fresh(reload: &mut Reload) -> Fresh {
    match reload.fresh.recv().await {
        Some(fresh) => fresh,
        None => std::future::pending().await, // Nobody reads it any more; the agent goes on with what it has.
    }
}

impl Cycle {
    /// Somebody asked for the configuration to be read again: PostgreSQL's files are written at once, by what is in force,
    /// and once more when the YAML has been read.
    pub(super) fn reload(&mut self) {
        tracing::info!("asked to reload: the configuration is read again");
        self.reload.asked.send_modify(|asked| *asked += 1);
        self.upkeep.forget_configuration();
    }

    /// Puts what was read in force.
    pub(super) fn take_configuration(&mut self, fresh: Fresh) {
        let (extent, before) = (fresh.extent, self.context.live());
        for key in self.context.live.adopt(fresh) {
            tracing::warn!("{key}: cannot change while the agent runs; restart it for the new value");
        }
        let after = self.context.live();
        let password = |config: &crate::config::AgentConfig| config.postgresql.superuser.password.clone();
        // Until the leader has changed the role, the server asks for the one of before.
        let former = password(&before).filter(|former| password(&after).as_ref() != Some(former));
        if former.is_some() {
            self.former_password = former;
        }
        self.context.reach_server(self.former_password.clone());
        self.open_doors(&after.restapi);
        self.context.etcd.set_credentials(after.etcd.credentials.clone());
        self.upkeep.forget_configuration();
        self.upkeep.forget_timing();
        match extent {
            Extent::All => tracing::info!("the configuration was read again and is in force"),
            Extent::Secrets => tracing::info!("a file with a secret has changed and was read again"),
        }
    }

    /// Has the REST interface, and our own questions to others, by the configuration and its files as they are now.
    fn open_doors(&self, config: &RestConfig) {
        match Doors::new(config) {
            Ok(doors) => self.context.doors.store(Arc::new(doors)),
            Err(error) => tracing::error!("restapi: {error}; it goes on as before"),
        }
        self.context.peers.set(config);
    }

    /// Writes PostgreSQL's files when the configuration has changed, and has them read.
    pub(super) fn reload_configuration(&mut self, seen: &Observation) {
        let feedback = needs_feedback(&seen.view, &seen.me, &seen.place);
        let revision = (seen.view.config.mod_revision, feedback);
        let known = self.upkeep.config_revision() == Some(revision);
        let busy = seen.job.is_some() || !matches!(seen.postgres, Postgres::Running(_));
        if known || busy || !self.known.can_configure(&seen.view, &seen.lease) {
            return;
        }
        let (live, dynamic) = (self.context.live(), self.context.dynamic().postgresql());
        for finding in Scripts::in_force(&live.postgresql.scripts, &dynamic).1 {
            tracing::warn!(
                "the dynamic configuration's postgresql.{}: {}",
                finding.key,
                finding.text
            );
        }
        let floors = match &seen.data {
            DataDir::Cluster { control, .. } if !self.known.writable => Some(control),
            _ => None,
        };
        match reload_if_changed(&self.context, self.known.upstream.as_ref(), floors) {
            Ok(changed) => {
                // An operator may have changed files that we do not write.
                let read_anyway = !changed && self.upkeep.was_forgotten();
                if changed {
                    tracing::info!("PostgreSQL's configuration has changed and is read again");
                } else if read_anyway {
                    match self.context.keeper.signal(PostmasterSignal::Reload) {
                        Ok(()) => self.context.callbacks.reloaded(),
                        Err(error) => tracing::warn!("having PostgreSQL read its configuration: {error}"),
                    }
                }
                self.upkeep.configured(revision);
                self.context.reach_server(self.former_password.clone());
                if changed || read_anyway {
                    self.pending.reading_until = Some(Boottime::now() + READ_MAX);
                }
            }
            Err(error) => tracing::warn!("writing PostgreSQL's configuration: {error}"),
        }
    }

    /// Looks what waits for a restart, when the server has read its files or was started since the last look.
    pub(super) async fn look_for_pending(&mut self, seen: &Observation) {
        if !matches!(seen.postgres, Postgres::Running(_)) || seen.job.is_some() {
            self.pending.seen = None;
            return;
        }
        let print = match pending::print(&self.context.sql).await {
            Ok(print) => print,
            Err(error) => return tracing::debug!(error = error.chain(), "what waits for a restart is not known"),
        };
        if self.pending.seen.as_ref() == Some(&print) {
            let now = Boottime::now();
            self.pending.reading_until = self.pending.reading_until.filter(|until| now < *until);
            return;
        }
        match pending::ask(&self.context.sql, &self.context.wanted()).await {
            Ok(found) => {
                if found != self.pending.found {
                    tell(&found);
                    self.pending.found = found;
                }
                (self.pending.seen, self.pending.reading_until) = (Some(print), None);
            }
            Err(error) => tracing::warn!("{}", error.chain()),
        }
    }

    /// When to look again, while a server is about to read its files.
    pub(super) fn look_again_after(&self) -> Option<Duration> {
        self.pending.reading_until.map(|_| LOOK_EVERY)
    }

    /// The leader gives the roles the passwords that are configured, once they have changed.
    pub(super) async fn change_passwords(&mut self, seen: &Observation) {
        let LeaseSeen::Mine(epoch) = &seen.lease else { return };
        let wanted = Passwords::of(&self.context.live().postgresql);
        let changed = wanted.changed_since(&self.roles.in_force);
        let now = Boottime::now();
        let failed_lately = self.roles.failed_at.is_some_and(|at| now.since(at) < AGAIN);
        if changed.is_empty() || failed_lately || self.memory.proven.as_ref() != Some(epoch) {
            return;
        }
        match changed.set(&self.context.sql.target()).await {
            Ok(()) => {
                tracing::info!(
                    "changed the passwords of {} to those that are configured",
                    changed.users()
                );
                self.roles = Roles::new(wanted);
            }
            Err(error) => {
                tracing::warn!("{}", error.chain());
                self.roles.failed_at = Some(now);
            }
        }
    }
}

fn tell(found: &Map<String, Value>) {
    if found.is_empty() {
        return tracing::info!("nothing waits for a restart of PostgreSQL any more");
    }
    for (name, change) in found {
        let text = |key: &str| change.get(key).and_then(Value::as_str).unwrap_or_default();
        let (old, new) = (text("old_value"), text("new_value"));
        tracing::info!("{name} waits for a restart of PostgreSQL: it is {old:?} and is to be {new:?}");
    }
}
