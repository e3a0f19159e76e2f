//! Starting and promoting PostgreSQL.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::Duration;

use pgherd_cluster::event::phase;
use pgherd_cluster::name::MemberName;
use pgherd_cluster::view::Epoch;
use pgherd_keeper::protocol::PostmasterSignal;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::{JobError, Outcome, make};
use crate::config::PostgresConfig;
use crate::context::{Context, SOCKET_DIRS};
use crate::decide::upstream_address;
use crate::keeper::Instance;
use crate::postgres::bootstrap::{Progress, UNFINISHED_MARKER, first_scripts, hba_text, make_roles, recovery_settings};
use crate::postgres::clone::write_pgpass;
use crate::postgres::control::inspect;
use crate::postgres::settings::{Inputs, READ_ONLY, Settings, differs_by_role, lines_of};
use crate::postgres::{Control, DataDir, ToolError, Upstream, files, libraries, locks, pending};
use crate::record::own_tags;
use crate::scripts::Run;
use crate::slots;
use crate::status::{ServerStatus, WalStatus};
use crate::topology::{Place, needs_feedback};

/// How often a standby that is being promoted is asked; every one of these is part of an outage.
const ASK_PROMOTED_EVERY: Duration = Duration::from_millis(10);
/// How often a server that starts is asked. It logs each refusal, so this is not shorter than it needs to be.
const ASK_STARTED_EVERY: Duration = Duration::from_millis(30);
/// A promotion that comes while the walreceiver is ending can sleep through a whole retry interval; a signal wakes it.
const NUDGE_EVERY: Duration = Duration::from_millis(50);
const PROMOTE_MAX: Duration = Duration::from_secs(60);
/// Where `primary_start_timeout` is 0: Patroni sets no limit, and a program that hangs would leave the cluster without a
/// leader for as long as its lease is renewed.
const PRE_PROMOTE_MAX: Duration = Duration::from_secs(300);
/// How long a restored cluster may recover.
const RESTORED_MAX: Duration = Duration::from_secs(24 * 3600);
const ASK_RECOVERING_EVERY: Duration = Duration::from_millis(250);
/// How long a question about a parameter may take.
const ASK_MAX: Duration = Duration::from_secs(2);
/// How long a server may take to read its files.
const READ_MAX: Duration = Duration::from_secs(3);

/// Writes the configuration files for the next start or reload. Says whether anything changed, and what was rendered.
///
/// # Errors
/// When a file cannot be read or written.
pub fn configure(
    context: &Context,
    upstream: Option<&Upstream>,
    floors: Option<&Control>,
) -> Result<(Settings, bool), ToolError> {
    let live = context.live();
    let postgresql = &live.postgresql;
    let dynamic = context.dynamic();
    let sync_names = context.sync_names();
    let place = Place::of(&own_tags(&live));
    let feeds = needs_feedback(&context.view(), &context.config.name, &place);
    let inputs = Inputs {
        sync_names: sync_names.as_ref(),
        // Without it PostgreSQL does not copy slots by itself either.
        feedback: feeds || slots::syncs_by_itself(&dynamic, postgresql),
        scope: &live.scope,
        name: &live.name,
        postgresql,
        by_role: &live.by_role,
        dynamic: &dynamic,
        upstream,
        floors,
    };
    let (mut settings, warnings) = Settings::render(inputs);
    settings.conf.push_str(&recovery_settings(&live));
    // What a server is told on its command line waits for its next start.
    settings.wanted.extend(context.live.next_listening().parameters());
    keep_originals(postgresql)?;
    let mut changed = files::write_whole(&postgresql.conf_file(), &settings.conf, 0o600)?;
    let written = |lines: Vec<String>| format!("# Written by pgherd from the configuration.\n{}\n", lines.join("\n"));
    let dir = &postgresql.config_dir;
    let hba = dir.join("pg_hba.conf");
    let text = lines_of(inputs, "pg_hba").map(written);
    if let Some(text) = text.or_else(|| std::fs::read_to_string(&hba).ok()) {
        changed |= files::write_whole(&hba, &hba_text(&live, &text), 0o600)?;
    }
    if let Some(lines) = lines_of(inputs, "pg_ident") {
        changed |= files::write_whole(&dir.join("pg_ident.conf"), &written(lines), 0o600)?;
    }
    context
        .wanted
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone_from(&settings.wanted);
    if let Some(upstream) = upstream {
        write_pgpass(postgresql, upstream)?;
    }
    if changed {
        for warning in warnings {
            tracing::warn!("{warning}");
        }
    }
    Ok((settings, changed))
}

/// What initdb or an administrator wrote stays in force under what is written here. Where the configuration has a directory
/// or a name of its own, that begins with what the data directory has.
fn keep_originals(postgresql: &PostgresConfig) -> Result<(), ToolError> {
    let (conf, dir) = (postgresql.conf_file(), &postgresql.config_dir);
    let base = dir.join(postgresql.base_conf_name());
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| ToolError::File {
            what: "keeping the original configuration",
            path,
            source,
        }
    };
    if !base.exists() && conf.exists() {
        std::fs::rename(&conf, &base).map_err(failed(&conf))?;
    }
    if *dir == postgresql.data_dir && postgresql.config_base_name == "postgresql" {
        return Ok(());
    }
    std::fs::create_dir_all(dir).map_err(failed(dir))?;
    let originals = [
        ("postgresql.base.conf", base.clone()),
        ("postgresql.conf", base),
        ("pg_hba.conf", dir.join("pg_hba.conf")),
        ("pg_ident.conf", dir.join("pg_ident.conf")),
    ];
    for (name, to) in originals {
        let from = postgresql.data_dir.join(name);
        if !to.exists() && from.exists() {
            std::fs::copy(&from, &to).map_err(failed(&to))?;
        }
    }
    Ok(())
}

/// Writes the configuration of a running server, and has it read when anything changed.
///
/// # Errors
/// When a file cannot be written or the keeper cannot be told.
pub fn reload_if_changed(
    context: &Context,
    upstream: Option<&Upstream>,
    floors: Option<&Control>,
) -> Result<bool, JobError> {
    let (_, changed) = configure(context, upstream, floors)?;
    if changed {
        context.keeper.signal(PostmasterSignal::Reload)?;
        context.callbacks.reloaded();
    }
    Ok(changed)
}

/// Starts as primary. The keeper refuses unless a deadline lies ahead.
pub(super) async fn start_primary(context: &Context, epoch: Epoch) -> Result<Outcome, JobError> {
    let dir = &context.config.postgresql.data_dir;
    if Progress::read(dir).is_some() {
        return start_new(context, epoch).await;
    }
    files::remove_if_there(&dir.join("standby.signal"))?;
    files::remove_if_there(&dir.join("promote"))?;
    launch(context, None, true).await?;
    let limit = primary_start_max(context);
    let what = "did not take writes";
    wait_until(context, what, ASK_STARTED_EVERY, limit, is_primary, Nudge::WhenUp).await?;
    settle(context, epoch).await
}

/// Starts the server of a cluster that is being made. One that was restored may recover for hours; what runs already, by an
/// agent before this one, goes on.
async fn start_new(context: &Context, epoch: Epoch) -> Result<Outcome, JobError> {
    let dir = &context.config.postgresql.data_dir;
    let live = context.live();
    let method = live.bootstrap.method.as_ref();
    if context.keeper.instance().borrow().postmaster.is_none() {
        if !method.is_some_and(|method| method.keep_existing_recovery_conf) {
            files::remove_if_there(&dir.join("standby.signal"))?;
        }
        files::remove_if_there(&dir.join("promote"))?;
        launch(context, None, true).await?;
    }
    let (limit, ask_every) = match method {
        Some(_) => (RESTORED_MAX, ASK_RECOVERING_EVERY),
        None => (live.postgresql.start_timeout, ASK_STARTED_EVERY),
    };
    wait_until(
        context,
        "did not take writes",
        ask_every,
        limit,
        is_primary,
        Nudge::Never,
    )
    .await?;
    settle(context, epoch).await
}

/// A leader that nobody can replace has the usual time even where it should be replaced at once.
fn primary_start_max(context: &Context) -> Duration {
    let limit = context.dynamic().primary_start_timeout();
    if limit.is_zero() {
        context.live().postgresql.start_timeout
    } else {
        limit
    }
}

/// Starts as standby, of nobody while nobody leads.
pub(super) async fn start_standby(context: &Context, upstream: Option<Upstream>) -> Result<Outcome, JobError> {
    let dir = &context.config.postgresql.data_dir;
    files::write_whole(&dir.join("standby.signal"), "", 0o600)?;
    files::remove_if_there(&dir.join("promote"))?;
    // A deadline that is still in force would end the standby when it passes.
    context.keeper.disarm().await?;
    let view = context.view();
    if let Some(leader) = view.epoch().filter(|_| matches!(upstream, Some(Upstream::Member(_)))) {
        slots::bring(context, &leader.holder).await;
    }
    launch(context, upstream.as_ref(), false).await?;
    let started = wait_until(
        context,
        "did not answer",
        ASK_STARTED_EVERY,
        context.live().postgresql.start_timeout,
        |_| true,
        Nudge::WhenUp,
    )
    .await;
    if let Err(JobError::ServerEnded) = started {
        context.slots.take_back(dir)?;
    }
    started?;
    Ok(Outcome::Done)
}

/// A member, to stream from; nobody while it does not say where.
pub(super) fn member(context: &Context, name: Option<MemberName>) -> Option<Upstream> {
    upstream_address(&context.view(), &name?).map(Upstream::Member)
}

async fn launch(context: &Context, upstream: Option<&Upstream>, writable: bool) -> Result<(), JobError> {
    context.sql.disconnect().await;
    let dir = &context.config.postgresql.data_dir;
    let floors = match inspect(&context.programs, dir).await? {
        DataDir::Cluster { control, .. } => Some(control),
        DataDir::Empty | DataDir::Foreign(_) => None,
    };
    context.slot_sql.disconnect().await;
    // What is restored recovers as a standby does, before it takes writes.
    let recovers = !writable || dir.join("recovery.signal").exists();
    let (settings, _) = configure(context, upstream, floors.as_ref().filter(|_| recovers))?;
    refuse_missing_libraries(context, &settings).await?;
    if !writable {
        context.slots.place(dir, &settings)?;
    }
    let environment = locks::clear(dir, &socket_dirs(&settings), context.live().postgresql.port)?;
    let conf = context.config.postgresql.conf_file();
    let arguments = settings.arguments(dir, &conf).into_iter().map(OsString::from).collect();
    context
        .keeper
        .start(writable, context.programs.path("postgres"), arguments, environment)
        .await?;
    Ok(())
}

/// Where the server will have its sockets.
fn socket_dirs(settings: &Settings) -> Vec<PathBuf> {
    match settings.wanted.get("unix_socket_directories") {
        Some(dirs) => dirs.split(',').map(|dir| dir.trim().into()).collect(),
        None => SOCKET_DIRS.iter().map(PathBuf::from).collect(),
    }
}

/// A server that misses a library that it is to preload ends at once, and says why in its own log only.
async fn refuse_missing_libraries(context: &Context, settings: &Settings) -> Result<(), JobError> {
    let (data_dir, conf) = (
        &context.config.postgresql.data_dir,
        context.config.postgresql.conf_file(),
    );
    let missing = libraries::missing(&context.programs, &settings.wanted, data_dir, &conf).await;
    if missing.is_empty() {
        return Ok(());
    }
    Err(JobError::MissingLibraries(missing.join(", ")))
}

/// Promotes a standby, or takes over a primary whose proof is still to come.
pub(super) async fn promote(context: &Context, epoch: Epoch) -> Result<Outcome, JobError> {
    let standby = context.sql.status().await.is_ok_and(|server| !is_primary(&server));
    if standby {
        let instance = context.keeper.instance().borrow().clone();
        if !instance.armed && !instance.paused {
            return Err(JobError::Unclear(
                "no deadline lies ahead, so that nothing may become writable",
            ));
        }
        // Any signal of this kind promotes while the file is there, so it must not outlive a promotion that is given up.
        if context.slots.is_at_work() {
            slots::end_work(&context.sql.target()).await;
        }
        let file = context.config.postgresql.data_dir.join("promote");
        files::write_whole(&file, "", 0o600)?;
        context.keeper.signal(PostmasterSignal::Promote)?;
        let what = "was not promoted";
        let promoted = wait_until(
            context,
            what,
            ASK_PROMOTED_EVERY,
            PROMOTE_MAX,
            is_primary,
            Nudge::WhenUp,
        )
        .await;
        if promoted.is_err() {
            files::remove_if_there(&file)?;
        }
        promoted?;
        context.journal.mark(phase::PROMOTED);
    }
    settle(context, epoch).await
}

/// What must be so before the route to a new primary opens: its role's parameters, the cluster finished, slots for the
/// others, and a write that went through.
async fn settle(context: &Context, epoch: Epoch) -> Result<Outcome, JobError> {
    take_over_parameters(context).await?;
    if let Some(progress) = Progress::read(&context.config.postgresql.data_dir)
        && let Some(failed) = finish_bootstrap(context, &epoch, progress).await?
    {
        return Ok(failed);
    }
    context.sql.prove_writable().await?;
    context.journal.mark(phase::WRITABLE);
    if let Err(error) = slots::round(context, slots::seat_of_new_leader(context, &epoch).await?).await {
        tracing::warn!(
            error = error.chain(),
            "not all slots could be made yet; the next round tries again"
        );
    }
    Ok(Outcome::Proven(epoch))
}

/// Roles, the operator's first scripts, and the initialize key for good. Says so when a script makes the new cluster unusable.
async fn finish_bootstrap(context: &Context, epoch: &Epoch, progress: Progress) -> Result<Option<Outcome>, JobError> {
    let live = context.live();
    let (config, dir) = (&*live, &live.postgresql.data_dir);
    make_roles(&context.sql.target(), config).await?;
    match progress {
        // A script that was begun is not begun again: half of its work may be there.
        Progress::ScriptsBegun => {
            return Ok(Some(Outcome::BootstrapFailed {
                why: "the first scripts of the new cluster were interrupted".to_owned(),
                for_good: false,
            }));
        }
        Progress::Made => {
            Progress::ScriptsBegun.write(dir)?;
            if let Err(error) = first_scripts(&context.programs, config).await {
                return Ok(Some(Outcome::BootstrapFailed {
                    why: error.chain(),
                    for_good: true,
                }));
            }
            Progress::ScriptsDone.write(dir)?;
        }
        Progress::ScriptsDone => {}
    }
    make::keep_key(context, epoch).await?;
    files::remove_if_there(&dir.join(UNFINISHED_MARKER))?;
    files::sync_dir(dir)?;
    reload_if_changed(context, None, None)?; // What was opened for the restore is closed.
    Ok(None)
}

/// Runs the operator's `pre_promote`. What does not let this member be promoted is its own failure, or that it cannot be run,
/// or that it takes longer than a leader's start may.
pub(super) async fn pre_promote(context: &Context, epoch: Epoch) -> Outcome {
    let scripts = context.scripts();
    let Some(words) = &scripts.pre_promote else {
        return Outcome::PrePromoted(epoch, true);
    };
    let limit = context.dynamic().primary_start_timeout();
    let limit = if limit.is_zero() { PRE_PROMOTE_MAX } else { limit };
    let run = Run::words(words);
    tracing::info!("running {} before the promotion", run.name());
    let ran = run.run(limit).await;
    if let Err(error) = &ran {
        tracing::warn!("pre_promote: {error}; this member is not promoted");
    }
    Outcome::PrePromoted(epoch, ran.is_ok())
}

/// A server that was promoted still has a standby's parameters. Where those of a primary are others, or where sessions would
/// be read-only, they are written, and the route waits until a session has them.
async fn take_over_parameters(context: &Context) -> Result<(), JobError> {
    let read_only = is_read_only(context).await?;
    if !read_only && !differs_by_role(&context.dynamic(), &context.live().by_role) {
        return Ok(());
    }
    let (settings, changed) = configure(context, None, None)?;
    let before = pending::print(&context.sql).await?;
    context.keeper.signal(PostmasterSignal::Reload)?;
    let deadline = Instant::now() + READ_MAX;
    let mut tick = interval(ASK_PROMOTED_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Another session than ours may read them a moment later than we do; so the question is asked on a new one.
    while changed && Instant::now() < deadline && pending::print_anew(&context.sql).await? == before {
        tick.tick().await;
    }
    let meant = settings.wanted.get(READ_ONLY).is_some_and(|value| value != "off");
    if is_read_only(context).await? && !meant {
        tracing::warn!(
            "{READ_ONLY} is on for the leader, and no configuration of pgherd's says so: sessions are read-only unless they \
             switch it off; look for it in postgresql.auto.conf (ALTER SYSTEM RESET {READ_ONLY})"
        );
    }
    Ok(())
}

async fn is_read_only(context: &Context) -> Result<bool, ToolError> {
    let sql = format!("SELECT reset_val FROM pg_settings WHERE name = '{READ_ONLY}'");
    let rows = context
        .sql
        .ask("asking whether sessions are read-only", &sql, ASK_MAX)
        .await?;
    Ok(rows.into_iter().flatten().flatten().any(|value| value == "on"))
}

fn is_primary(server: &ServerStatus) -> bool {
    matches!(server.wal, WalStatus::Primary { .. })
}

/// Resolves when the postmaster has gone.
async fn gone(instance: &mut watch::Receiver<Instance>) {
    // Keepers that are gone end the process elsewhere.
    let _ = instance.wait_for(|instance| instance.postmaster.is_none()).await;
}

/// Whether a server that is waited for is made to look up from its sleep.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Nudge {
    /// Once it answers.
    WhenUp,
    /// It replays a backup's log, and has no reason to sleep.
    Never,
}

/// Asks until the server is as wanted, nudging it meanwhile; ends when the server does.
async fn wait_until(
    context: &Context,
    what: &'static str,
    ask_every: Duration,
    limit: Duration,
    wanted: impl Fn(&ServerStatus) -> bool,
    nudged: Nudge,
) -> Result<(), JobError> {
    let deadline = Instant::now() + limit;
    let mut instance = context.keeper.instance();
    let mut ask = interval(ask_every);
    ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut nudge = interval(NUDGE_EVERY);
    nudge.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut answered = false;
    loop {
        tokio::select! {
            () = gone(&mut instance) => return Err(JobError::ServerEnded),
            _ = ask.tick() => {
                if let Ok(server) = context.sql.status().await {
                    answered = true;
                    if wanted(&server) {
                        return Ok(());
                    }
                }
            }
            // Only a server that is up is nudged: one that starts reads its configuration anyway.
            _ = nudge.tick(), if answered && nudged == Nudge::WhenUp => context.keeper.signal(PostmasterSignal::Reload)?,
        }
        if Instant::now() > deadline {
            return Err(JobError::TooSlow { what, limit });
        }
    }
}
