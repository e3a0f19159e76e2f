//! Can our data follow the leader? Its history file tells where each timeline ended.

use std::time::Duration;

use pgherd_cluster::name::{Lsn, MemberName, Timeline};
use pgherd_cluster::record::{Address, StandbyCluster};
use pgherd_cluster::view::Epoch;

use super::{JobError, Outcome, slot};
use crate::config::PostgresConfig;
use crate::context::Context;
use crate::decide::upstream_address;
use crate::observation::Rejoin;
use crate::postgres::control::inspect;
use crate::postgres::place::Place;
use crate::postgres::settings::{recovery_conf, value_text};
use crate::postgres::sql::{Target, Walsender, ask_once};
use crate::postgres::{Control, ControlState, DataDir, Programs, ToolError, Upstream, rewind};
use crate::status::WalStatus;

const ANSWER_MAX: Duration = Duration::from_secs(5);
const NO_PRIMARY: JobError = JobError::Unclear("who was asked for the leader's history is no primary");

/// Asks the leader for its timeline and history, and compares them with what is here.
pub(super) async fn check(context: &Context, leader: Epoch) -> Result<Outcome, JobError> {
    let address = upstream_address(&context.view(), &leader.holder)
        .ok_or_else(|| JobError::NoSuchMember(leader.holder.clone()))?;
    // The leader of a standby cluster is a standby itself, and tells by the replication protocol what SQL does not.
    if context.dynamic().is_standby_cluster() {
        return check_upstream(context, leader, &Upstream::Member(address)).await;
    }
    let live = context.live();
    let history = match history_by_sql(&live.postgresql, &address).await {
        // A superuser may be let in on its own machine only; who streams is let in by every member.
        Err(JobError::Tool(error)) => {
            tracing::info!("{}; asking by the replication protocol", error.chain());
            history_by_streaming(&context.programs, &live.postgresql, address).await?
        }
        asked => asked?,
    };
    compare(context, leader, &history).await
}

/// The history of a primary, asked as pg_rewind asks.
async fn history_by_sql(postgresql: &PostgresConfig, address: &Address) -> Result<History, JobError> {
    let (user, options) = postgresql.rewinds_as();
    let target = Target::new(address, &postgresql.database, user).with_options(&options.preferring_tls());
    // A standby that is asked by mistake answers with no row, and nothing is decided on that.
    let sql = "WITH now AS (SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) AS timeline WHERE NOT pg_is_in_recovery()) \
               SELECT timeline, convert_from(pg_read_binary_file('pg_wal/' || timeline || '.history', 0, 1048576, true), 'UTF8') \
               FROM now";
    let rows = ask_once(&target, "asking the leader for its history", sql, ANSWER_MAX).await?;
    let row = rows.into_iter().next().ok_or(NO_PRIMARY)?;
    let text = |index: usize| row.get(index).and_then(Option::as_deref).unwrap_or_default();
    let timeline = u32::from_str_radix(text(0), 16).map_err(|_| NO_PRIMARY)?;
    if timeline > 1 && text(1).is_empty() {
        return Err(JobError::Unclear("the leader's history file cannot be read yet"));
    }
    Ok(History::parse(Timeline(timeline), text(1)))
}

/// The same by what a standby is let in with.
async fn history_by_streaming(
    programs: &Programs,
    postgresql: &PostgresConfig,
    address: Address,
) -> Result<History, JobError> {
    let place = Upstream::Member(address).place().ok_or(NO_PRIMARY)?;
    let asked = Walsender {
        programs,
        place: &place,
        user: &postgresql.replication,
        options: &postgresql.connections.replication,
    };
    // Asked first: a primary that becomes a standby stays on its timeline, a standby that is promoted does not.
    if !asked.takes_writes().await? {
        return Err(NO_PRIMARY);
    }
    let theirs = asked.identify().await?;
    let file = asked.history_file(theirs.timeline).await?;
    Ok(History::parse(theirs.timeline, &file))
}

/// Asks the cluster that this one follows, as far as the replication protocol tells.
pub(super) async fn check_remote(context: &Context, own: Epoch, section: StandbyCluster) -> Result<Outcome, JobError> {
    check_upstream(context, own, &Upstream::Remote(section)).await
}

async fn check_upstream(context: &Context, asked_as: Epoch, upstream: &Upstream) -> Result<Outcome, JobError> {
    let Some(place) = upstream.place() else {
        return Err(JobError::Unclear("nobody is streamed from who could be asked"));
    };
    let (programs, live) = (&context.programs, context.live());
    let asked = Walsender {
        programs,
        place: &place,
        user: &live.postgresql.replication,
        options: &live.postgresql.connections.replication,
    };
    let theirs = asked.identify().await?;
    if let DataDir::Cluster { control, .. } = inspect(programs, &context.config.postgresql.data_dir).await?
        && control.system_id != theirs.system_id
    {
        return Err(JobError::AnotherSystem {
            place,
            theirs: theirs.system_id,
            ours: control.system_id,
        });
    }
    let file = asked.history_file(theirs.timeline).await?;
    compare(context, asked_as, &History::parse(theirs.timeline, &file)).await
}

/// Takes back what the leader has not. What is left of a failure is copied anew; the configuration may order that it is
/// removed, so a source that does not answer is told from a rewind that cannot be done.
pub(super) async fn rewind(context: &Context, leader: &MemberName) -> Result<Outcome, JobError> {
    let source = upstream_address(&context.view(), leader).ok_or_else(|| JobError::NoSuchMember(leader.clone()))?;
    let (programs, config) = (&context.programs, &*context.live());
    let data_dir = &config.postgresql.data_dir;
    if !answers(&config.postgresql, &source).await? {
        return Ok(Outcome::RewindPutOff);
    }
    Place::of(data_dir)?
        .require_movable("pg_rewind's work, which needs a data directory that can be moved meanwhile: copying anew")?;
    if context.keeper.instance().borrow().postmaster.is_some() {
        super::handover::stop(context).await?;
    }
    context.keeper.disarm().await?;
    rewind::recover(programs, &config.postgresql).await?;
    let (dynamic, local) = (context.dynamic().parameters(), &config.postgresql.parameters);
    let says = |name: &str| {
        local
            .get(name)
            .or_else(|| dynamic.get(name))
            .map(value_text)
            .unwrap_or_default()
    };
    let command = says("archive_command");
    if matches!(says("archive_mode").as_str(), "on" | "always" | "true" | "yes" | "1") && !command.is_empty() {
        rewind::archive_ready(data_dir, &command).await;
    }
    let recovery = recovery_conf(&config.postgresql, &context.dynamic());
    let restores = recovery
        .get("restore_command")
        .map_or_else(|| says("restore_command"), value_text);
    match rewind::rewind(programs, config, &source, !restores.is_empty()).await {
        Ok(rewound) => {
            tracing::info!(%leader, rewound, "our data fits the leader's");
            Ok(Outcome::Done)
        }
        Err(error @ ToolError::Failed { .. }) => {
            tracing::error!("{}", error.chain());
            Ok(match answers(&config.postgresql, &source).await? {
                true => Outcome::RewindRefused,
                false => Outcome::RewindPutOff,
            })
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether pg_rewind would be let in now. Whom the source does not know, or not from here, it does not know in a moment
/// either, and that is an error.
async fn answers(postgresql: &PostgresConfig, source: &Address) -> Result<bool, ToolError> {
    let (user, options) = postgresql.rewinds_as();
    let target = Target::new(source, &postgresql.database, user).with_options(&options.preferring_tls());
    match ask_once(
        &target,
        "asking whether there is anything to rewind to",
        "SELECT 1",
        ANSWER_MAX,
    )
    .await
    {
        Ok(_) => Ok(true),
        // The class of errors of authorization, <https://www.postgresql.org/docs/current/errcodes-appendix.html>.
        Err(error) if error.sqlstate().is_some_and(|code| code.starts_with("28")) => Err(error),
        Err(error) => {
            tracing::warn!("{}", error.chain());
            Ok(false)
        }
    }
}

/// Compares what is here with a history.
async fn compare(context: &Context, leader: Epoch, history: &History) -> Result<Outcome, JobError> {
    let postgresql = &context.config.postgresql;
    let ours = match inspect(&context.programs, &postgresql.data_dir).await? {
        DataDir::Cluster { control, standby } => our_end(context, &control, standby).await,
        DataDir::Empty | DataDir::Foreign(_) => OurEnd::Unknown,
    };
    let own_history = own_history(&postgresql.data_dir, history.current);
    let verdict = match history.judge(&ours, own_history.as_ref()) {
        Rejoin::Follows if waits_for_more(context).await && slot::can_be_had(context, &leader.holder).await => {
            Rejoin::Waits
        }
        verdict => verdict,
    };
    tracing::info!(leader = %leader, ?verdict, ?ours, "compared our data with the leader's history");
    Ok(Outcome::Rejoin(leader, verdict))
}

/// Whether our standby has replayed all that it has and is allowed to, and asks for more: the start-up process says what
/// it waits for.
async fn waits_for_more(context: &Context) -> bool {
    let sql = "SELECT 1 FROM pg_stat_activity WHERE backend_type = 'startup' \
               AND wait_event IN ('RecoveryRetrieveRetryInterval', 'RecoveryWalStream', 'RecoveryWalAll') \
               AND NOT pg_is_wal_replay_paused()";
    let asked = context.sql.ask("asking what the standby waits for", sql, ANSWER_MAX);
    asked.await.is_ok_and(|rows| !rows.is_empty())
}

/// How far what we have reaches.
#[derive(Clone, Debug, PartialEq, Eq)]
enum OurEnd {
    /// A standby: replayed this far, on this timeline.
    Replayed { timeline: Timeline, lsn: Lsn },
    /// A primary that was stopped in order: its last record begins here.
    ShutDownAt { timeline: Timeline, checkpoint: Lsn },
    /// A primary that was ended, or anything else: it may reach further than can be told.
    Unknown,
}

async fn our_end(context: &Context, control: &Control, standby: bool) -> OurEnd {
    if standby || control.state == ControlState::InArchiveRecovery {
        return match context.sql.status().await {
            Ok(server) => match (server.timeline, server.wal) {
                (Some(timeline), WalStatus::Standby { replayed, .. }) => OurEnd::Replayed {
                    timeline,
                    lsn: replayed,
                },
                _ => OurEnd::Unknown,
            },
            // Not up yet: its checkpoint is the least that it has, and following will show the rest.
            Err(_) => OurEnd::Replayed {
                timeline: control.timeline,
                lsn: control.checkpoint,
            },
        };
    }
    match control.state {
        ControlState::ShutDown => OurEnd::ShutDownAt {
            timeline: control.timeline,
            checkpoint: control.checkpoint,
        },
        _ => OurEnd::Unknown,
    }
}

/// Where timelines ended on the way to the leader's.
#[derive(Clone, Debug, PartialEq, Eq)]
struct History {
    current: Timeline,
    ended: Vec<(Timeline, Lsn)>,
}

/// Our own history of a timeline; nothing when there is no file of it.
fn own_history(data_dir: &std::path::Path, timeline: Timeline) -> Option<History> {
    let path = data_dir.join("pg_wal").join(format!("{:08X}.history", timeline.0));
    let text = std::fs::read_to_string(path).ok()?;
    Some(History::parse(timeline, &text))
}

impl History {
    /// Reads a history file: a timeline, the position where it ended, and a reason, on each line.
    fn parse(current: Timeline, text: &str) -> Self {
        let line = |line: &str| {
            let mut words = line.split_whitespace();
            let timeline = words.next()?.parse().ok()?;
            Some((Timeline(timeline), words.next()?.parse().ok()?))
        };
        Self {
            current,
            ended: text.lines().filter_map(line).collect(),
        }
    }

    fn end_of(&self, timeline: Timeline) -> Option<Lsn> {
        self.ended
            .iter()
            .find(|(ended, _)| *ended == timeline)
            .map(|(_, lsn)| *lsn)
    }

    /// `own` is our own history of the leader's timeline, when we have one.
    fn judge(&self, ours: &OurEnd, own: Option<&Self>) -> Rejoin {
        let follows = match *ours {
            // The same number is the same timeline, unless two members that did not know of each other took it.
            OurEnd::Replayed { timeline, .. } if timeline == self.current => {
                own.is_none_or(|own| own.ended == self.ended)
            }
            OurEnd::Replayed { timeline, lsn } => self.end_of(timeline).is_some_and(|end| lsn <= end),
            // The last record begins before the end of the timeline, which is a record's end: it is in the history.
            OurEnd::ShutDownAt { timeline, checkpoint } => self.end_of(timeline).is_some_and(|end| checkpoint < end),
            OurEnd::Unknown => false,
        };
        if follows { Rejoin::Follows } else { Rejoin::Diverged }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::config::tests::agent;

    #[tokio::test]
    async fn a_leader_that_lets_in_no_superuser_tells_its_history_to_who_streams() {
        let dir = tempfile::tempdir().expect("a directory");
        let psql = |read_only: &str| {
            let script = format!(
                "#!/bin/sh\ncase \"$*\" in\n*'user=replicator '*'SHOW transaction_read_only') echo {read_only};;\n\
                 *IDENTIFY_SYSTEM) echo '7000000000000000001|3|0/9000000|';;\n\
                 *'TIMELINE_HISTORY 3') printf '00000003.history|1\\t0/3000000\\tx\\n2\\t0/5000000\\tx\\n';;\n*) exit 2;;\nesac\n"
            );
            let path = dir.path().join("psql");
            std::fs::write(&path, script).expect("written");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("made a program");
        };
        let programs = Programs::new(Some(dir.path().to_owned()));
        let postgresql = agent().postgresql;
        let address = postgresql.connect_address.clone();
        psql("off");
        let told = history_by_streaming(&programs, &postgresql, address.clone()).await;
        assert_eq!(told.expect("it tells"), history());
        psql("on");
        let told = history_by_streaming(&programs, &postgresql, address).await;
        assert!(told.is_err(), "a standby that is asked by mistake");
    }

    fn history() -> History {
        History::parse(
            Timeline(3),
            "1\t0/3000000\tno recovery target specified\n\n2\t0/5000000\tno recovery target specified\n",
        )
    }

    #[test]
    fn a_standby_follows_while_it_has_not_replayed_past_the_fork() {
        let at = |timeline, lsn| OurEnd::Replayed {
            timeline: Timeline(timeline),
            lsn: Lsn(lsn),
        };
        for (ours, verdict) in [
            (at(2, 0x500_0000), Rejoin::Follows),
            (at(2, 0x500_0001), Rejoin::Diverged),
            (at(1, 0x200_0000), Rejoin::Follows),
            (at(3, 0x900_0000), Rejoin::Follows),
            (at(4, 0x100_0000), Rejoin::Diverged),
        ] {
            assert_eq!(history().judge(&ours, None), verdict, "{ours:?}");
        }
    }

    #[test]
    fn a_leader_that_was_stopped_in_order_follows_when_its_last_record_was_taken_over() {
        let at = |checkpoint| OurEnd::ShutDownAt {
            timeline: Timeline(2),
            checkpoint: Lsn(checkpoint),
        };
        assert_eq!(history().judge(&at(0x4FF_FF88), None), Rejoin::Follows);
        assert_eq!(history().judge(&at(0x500_0000), None), Rejoin::Diverged);
    }

    #[test]
    fn two_histories_of_one_timeline_are_told_apart() {
        let ours = OurEnd::Replayed {
            timeline: Timeline(3),
            lsn: Lsn(0x900_0000),
        };
        assert_eq!(history().judge(&ours, Some(&history())), Rejoin::Follows);
        let other = History::parse(Timeline(3), "1\t0/3000000\tx\n2\t0/4000000\tx\n");
        assert_eq!(history().judge(&ours, Some(&other)), Rejoin::Diverged);
    }

    #[test]
    fn a_leader_that_was_ended_has_to_be_cloned() {
        assert_eq!(history().judge(&OurEnd::Unknown, None), Rejoin::Diverged);
    }
}
