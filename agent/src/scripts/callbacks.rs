//! Calls operators' callbacks, beside everything else: nothing waits for one.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pgherd_cluster::record::Role;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

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
                Some((event, role)) = self.calls.recv() => self.begin(&context, event, role).await,
                Some(_) = self.reload.join_next() => {}
                Some(_) = self.other.join_next() => {}
                () = stop.cancelled() => break,
            }
        }
        while let Some(ended) = self.other.join_next().await {
            drop(ended); // What went wrong was logged.
        }
    }

    async fn begin(&mut self, context: &Context, event: Event, role: Role) {
        let slot = match event {
            Event::OnReload => &mut self.reload,
            Event::OnStart | Event::OnStop | Event::OnRestart | Event::OnRoleChange => &mut self.other,
        };
        let scripts = context.scripts();
        let Some(words) = scripts.callbacks.get(&event) else {
            return;
        };
        if slot.try_join_next().is_none() && !slot.is_empty() {
            tracing::warn!("{event}: the callback before it still runs, and is killed");
        }
        slot.shutdown().await;
        let run = Run::words(words)
            .arg(event.as_str())
            .arg(role.as_str())
            .arg(context.config.scope.as_str());
        tracing::info!(
            "calling {} {event} {} {}",
            run.name(),
            role.as_str(),
            context.config.scope
        );
        slot.spawn(async move {
            if let Err(error) = run.run(CALLBACK_MAX).await {
                tracing::warn!("{event}: {error}");
            }
        });
    }
}
