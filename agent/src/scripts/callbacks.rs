//! Calls operators' callbacks, beside everything else: nothing waits for one.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pgherd_cluster::record::Role;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::methods::Scripts;
use super::run::Run;
use super::told::Event;
use crate::context::Context;

/// A callback has no limit of its own but the next one. This one only keeps a stuck one from being there for ever.
const CALLBACK_MAX: Duration = Duration::from_secs(24 * 3600);
/// Calls that have not been begun; each is begun at once.
const QUEUE_MAX: usize = 64;

/// Where callbacks are asked for.
#[derive(Debug)]
pub struct Callbacks {
    calls: mpsc::Sender<(Event, Role)>,
    role: Mutex<Option<Role>>,
}

/// Runs them: one at a time, a newer one in place of an older one that still runs; those of reloads apart from the others,
/// so that a reload does not keep the change of a role from being told.
pub struct Executor {
    calls: mpsc::Receiver<(Event, Role)>,
    reload: JoinSet<()>,
    other: JoinSet<()>,
}

impl Callbacks {
    /// Both ends.
    #[must_use]
    pub fn new() -> (Self, Executor) {
        let (sender, receiver) = mpsc::channel(QUEUE_MAX);
        let callbacks = Self {
            calls: sender,
            role: Mutex::new(None),
        };
        let executor = Executor {
            calls: receiver,
            reload: JoinSet::new(),
            other: JoinSet::new(),
        };
        (callbacks, executor)
    }

    /// The role in which PostgreSQL runs; nothing while it does not, or that is not settled.
    pub fn set_role(&self, role: Option<Role>) {
        *self.role.lock().unwrap_or_else(PoisonError::into_inner) = role;
    }

    /// Has a callback called.
    pub fn call(&self, event: Event, role: Role) {
        if self.calls.try_send((event, role)).is_err() {
            tracing::warn!("{event} is not called: too many callbacks are waiting");
        }
    }

    /// PostgreSQL was told to read its configuration again.
    pub fn reloaded(&self) {
        let role = *self.role.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(role) = role {
            self.call(Event::OnReload, role);
        }
    }
}

impl Executor {
    /// Calls what is asked for until told to stop, and then what has been asked for by then. Ends when the last callback
    /// has; who does not want to wait for that drops it, and the callback is killed.
    pub async fn run(mut self, context: Arc<Context>, stop: CancellationToken) {
        loop {
            tokio::select! {
                biased;
                Some((event, role)) = self.calls.recv() => {
                    self.begin(&context.scripts(), context.config.scope.as_str(), event, role).await;
                }
                Some(_) = self.reload.join_next() => {}
                Some(_) = self.other.join_next() => {}
                () = stop.cancelled() => break,
            }
        }
        while let Some(ended) = self.other.join_next().await {
            drop(ended); // What went wrong was logged.
        }
    }

    async fn begin(&mut self, scripts: &Scripts, scope: &str, event: Event, role: Role) {
        let slot = match event {
            Event::OnReload => &mut self.reload,
            Event::OnStart | Event::OnStop | Event::OnRestart | Event::OnRoleChange => &mut self.other,
        };
        let Some(words) = scripts.callbacks.get(&event) else {
            return;
        };
        if slot.try_join_next().is_none() && !slot.is_empty() {
            tracing::warn!("{event}: the callback before it still runs, and is killed");
        }
        slot.shutdown().await;
        let run = Run::words(words).arg(event.as_str()).arg(role.as_str()).arg(scope);
        tracing::info!("calling {} {event} {} {scope}", run.name(), role.as_str());
        slot.spawn(async move {
            if let Err(error) = run.run(CALLBACK_MAX).await {
                tracing::warn!("{event}: {error}");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Waits until the file has this text.
    async fn wait_for(file: &std::path::Path, wanted: &str) {
        let arrived = async {
            while std::fs::read_to_string(file).unwrap_or_default() != wanted {
                tokio::task::yield_now().await;
            }
        };
        let arrived = tokio::time::timeout(Duration::from_secs(30), arrived).await;
        assert!(arrived.is_ok(), "{:?}, not {wanted:?}", std::fs::read_to_string(file));
    }

    #[tokio::test]
    async fn a_newer_callback_ends_an_older_one_and_those_of_reloads_are_apart() {
        let dir = tempfile::tempdir().expect("a directory");
        let log = dir.path().join("log");
        let hook = format!(
            "sh -c 'echo $* >> {0}; sleep 600; echo survived >> {0}' x",
            log.display()
        );
        let callbacks = json!({"callbacks": {
            "on_start": hook, "on_reload": hook, "on_role_change": hook,
        }});
        let (scripts, findings) = Scripts::read(callbacks.as_object().expect("a map"));
        assert!(findings.is_empty(), "{findings:?}");
        let (_callbacks, mut executor) = Callbacks::new();
        executor.begin(&scripts, "c", Event::OnStart, Role::Replica).await;
        wait_for(&log, "on_start replica c\n").await;
        executor.begin(&scripts, "c", Event::OnReload, Role::Replica).await;
        wait_for(&log, "on_start replica c\non_reload replica c\n").await;
        assert_eq!((executor.reload.len(), executor.other.len()), (1, 1));
        assert!(
            executor.other.try_join_next().is_none(),
            "a reload ended another's callback"
        );
        executor.begin(&scripts, "c", Event::OnRoleChange, Role::Primary).await;
        wait_for(
            &log,
            "on_start replica c\non_reload replica c\non_role_change primary c\n",
        )
        .await;
        assert_eq!((executor.reload.len(), executor.other.len()), (1, 1));
        // What is not configured changes nothing.
        executor.begin(&scripts, "c", Event::OnStop, Role::Primary).await;
        assert_eq!(executor.other.len(), 1);
    }
}
