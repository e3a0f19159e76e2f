//! Which callback follows from what is seen. Pure: what operators' callbacks were told last, and what PostgreSQL is now.
//!
//! They are told of what is so, not of what is being tried: a role once it is settled (a primary when a write has been
//! proven), a stop once PostgreSQL has ended. A demotion is `on_stop`, then `on_role_change replica`, as with Patroni.

use std::fmt;

use pgherd_cluster::record::Role;

use crate::decide::published_role;
use crate::memory::Memory;
use crate::observation::{JobKind, LeaseSeen, Observation, Postgres};

/// A callback, by the name of its key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// PostgreSQL has been started, or was found running.
    OnStart,
    /// It was stopped.
    OnStop,
    /// It was stopped and started in the same role, as asked.
    OnRestart,
    /// It was told to read its configuration again.
    OnReload,
    /// Its role is another.
    OnRoleChange,
}

impl Event {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::OnStart,
        Self::OnStop,
        Self::OnRestart,
        Self::OnReload,
        Self::OnRoleChange,
    ];

    /// The key, and the first argument of the callback.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::OnStart => "on_start",
            Self::OnStop => "on_stop",
            Self::OnRestart => "on_restart",
            Self::OnReload => "on_reload",
            Self::OnRoleChange => "on_role_change",
        }
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What callbacks depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    /// PostgreSQL, as far as it is settled; nothing in between.
    pub server: Option<Server>,
    /// Whether a restart that was asked for is under way.
    pub restarting: bool,
    /// Whether the leader key is this member's, or may be.
    pub holds: bool,
    /// Whether the keeper ended the primary because its deadline had passed.
    pub fenced: bool,
}

/// PostgreSQL, settled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Server {
    /// It runs in this role.
    Runs(Role),
    /// Nothing of it is left.
    Down,
}

impl Facts {
    /// Picks them from what is seen and remembered.
    #[must_use]
    pub fn of(seen: &Observation, memory: &Memory) -> Self {
        let (starts, makes) = match seen.job {
            Some(JobKind::StartPrimary | JobKind::StartStandby | JobKind::Promote) => (true, false),
            Some(JobKind::Initdb | JobKind::CustomBootstrap | JobKind::Clone | JobKind::Rewind) => (false, true),
            Some(
                JobKind::PrePromote
                | JobKind::Checkpoint
                | JobKind::Stop
                | JobKind::Confirm
                | JobKind::Poll
                | JobKind::CheckRejoin,
            )
            | None => (false, false),
        };
        let server = match &seen.postgres {
            _ if starts || seen.bootstrap_unfinished => None,
            Postgres::Down => Some(Server::Down),
            Postgres::Running(_) if !makes => match published_role(seen, memory) {
                role @ (Role::Primary | Role::Replica | Role::StandbyLeader) => Some(Server::Runs(role)),
                Role::Promoted | Role::Demoted | Role::Uninitialized | Role::Unknown => None,
            },
            Postgres::Running(_) | Postgres::Ending | Postgres::Silent { .. } => None,
        };
        Self {
            server,
            restarting: memory.restart.is_some(),
            holds: match &seen.lease {
                LeaseSeen::Mine(_) | LeaseSeen::MineUnproven(_) | LeaseSeen::Unknown => true,
                LeaseSeen::Stale { .. } | LeaseSeen::Theirs(_) | LeaseSeen::Free => false,
            },
            fenced: seen.fenced_term.is_some() && seen.fenced_term == memory.proven_term,
        }
    }
}

/// What callbacks were told last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Told {
    role: Option<Role>,
    down: Option<Down>,
    ordered: bool,
}

/// PostgreSQL was running, and is not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Down {
    /// For a restart.
    Restarting,
    /// By an order, which was told.
    Stopped,
    /// By itself.
    Died,
}

impl Told {
    /// PostgreSQL is about to be stopped or ended by this member's own decision.
    pub const fn order_stop(&mut self) {
        self.ordered = true;
    }

    /// The role that was told last, while PostgreSQL runs in it.
    #[must_use]
    pub fn running_role(&self) -> Option<Role> {
        self.role.filter(|_| self.down.is_none())
    }

    /// Takes the facts over, and says which callback is due.
    pub fn note(&mut self, facts: Facts) -> Option<(Event, Role)> {
        match facts.server? {
            Server::Runs(role) => self.runs(role),
            Server::Down => self.is_down(facts),
        }
    }

    fn runs(&mut self, role: Role) -> Option<(Event, Role)> {
        self.ordered = false;
        let (before, down) = (self.role.replace(role), self.down.take());
        let event = match (before, down) {
            (Some(before), Some(Down::Restarting)) if before == role => Event::OnRestart,
            // A replica never comes up as primary; what was made anew has begun anew.
            (None, _) | (Some(_), Some(_)) if before.is_none() || before == Some(role) || role == Role::Primary => {
                Event::OnStart
            }
            (Some(before), None) if before == role => return None,
            (_, _) => Event::OnRoleChange,
        };
        Some((event, role))
    }

    fn is_down(&mut self, facts: Facts) -> Option<(Event, Role)> {
        let role = self.role?;
        let was_primary = role == Role::Primary;
        match self.down {
            None if facts.restarting => {
                self.down = Some(Down::Restarting);
                None
            }
            None if self.ordered || (was_primary && facts.fenced) => {
                self.down = Some(Down::Stopped);
                Some((Event::OnStop, role))
            }
            None => {
                self.down = Some(Down::Died);
                self.given_up(was_primary && !facts.holds)
            }
            Some(Down::Died) => self.given_up(was_primary && !facts.holds),
            Some(Down::Restarting | Down::Stopped) => None,
        }
    }

    /// A leader that died and was not started again is none any more.
    fn given_up(&mut self, lost: bool) -> Option<(Event, Role)> {
        lost.then(|| {
            self.role = Some(Role::Demoted);
            self.down = Some(Down::Stopped);
            (Event::OnRoleChange, Role::Demoted)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOWN: Facts = Facts {
        server: Some(Server::Down),
        restarting: false,
        holds: false,
        fenced: false,
    };
    const HELD: Facts = Facts { holds: true, ..DOWN };
    const BETWEEN: Facts = Facts { server: None, ..DOWN };

    fn runs(role: Role) -> Facts {
        Facts {
            server: Some(Server::Runs(role)),
            ..HELD
        }
    }

    /// The lines that callbacks write, as scripts see them.
    fn lines(told: &mut Told, facts: &[Facts]) -> Vec<String> {
        let call = |facts: &Facts| {
            told.note(*facts)
                .map(|(event, role)| format!("{event} {}", role.as_str()))
        };
        facts.iter().filter_map(call).collect()
    }

    #[test]
    fn a_replica_that_is_promoted_and_stopped_tells_each_once() {
        let mut told = Told::default();
        let seen = [
            DOWN,
            BETWEEN,
            runs(Role::Replica),
            runs(Role::Replica),
            BETWEEN,
            runs(Role::Primary),
            runs(Role::Primary),
        ];
        assert_eq!(lines(&mut told, &seen), ["on_start replica", "on_role_change primary"]);
        assert_eq!(told.running_role(), Some(Role::Primary));
        told.order_stop();
        assert_eq!(lines(&mut told, &[runs(Role::Primary)]), [""; 0]);
        told.order_stop();
        assert_eq!(lines(&mut told, &[BETWEEN, HELD, DOWN]), ["on_stop primary"]);
        assert_eq!(
            lines(&mut told, &[BETWEEN, runs(Role::Replica)]),
            ["on_role_change replica"]
        );
    }

    #[test]
    fn a_leader_that_dies_and_comes_back_in_place_is_started() {
        let mut told = Told::default();
        let seen = [runs(Role::Primary), HELD, HELD, BETWEEN, runs(Role::Primary)];
        assert_eq!(lines(&mut told, &seen), ["on_start primary", "on_start primary"]);
    }

    #[test]
    fn a_leader_that_dies_and_cannot_come_back_is_demoted_before_it_is_a_replica() {
        let mut told = Told::default();
        let seen = [runs(Role::Primary), HELD, DOWN, DOWN, runs(Role::Replica)];
        assert_eq!(
            lines(&mut told, &seen),
            ["on_start primary", "on_role_change demoted", "on_role_change replica"]
        );
    }

    #[test]
    fn a_fenced_leader_was_stopped() {
        let mut told = Told::default();
        let fenced = Facts { fenced: true, ..DOWN };
        let seen = [runs(Role::Primary), fenced, fenced, runs(Role::Replica)];
        assert_eq!(
            lines(&mut told, &seen),
            ["on_start primary", "on_stop primary", "on_role_change replica"]
        );
    }

    #[test]
    fn a_restart_is_one_event_in_the_same_role_and_a_change_of_role_otherwise() {
        let restarting = Facts {
            restarting: true,
            ..HELD
        };
        let mut told = Told::default();
        let seen = [runs(Role::Replica), restarting, runs(Role::Replica)];
        assert_eq!(lines(&mut told, &seen), ["on_start replica", "on_restart replica"]);
        let mut told = Told::default();
        let seen = [runs(Role::Primary), restarting, runs(Role::Replica)];
        assert_eq!(lines(&mut told, &seen), ["on_start primary", "on_role_change replica"]);
    }

    #[test]
    fn the_leader_of_a_standby_cluster_changes_its_role_both_ways() {
        let mut told = Told::default();
        let seen = [
            runs(Role::Replica),
            runs(Role::StandbyLeader),
            runs(Role::Replica),
            runs(Role::StandbyLeader),
        ];
        assert_eq!(
            lines(&mut told, &seen),
            [
                "on_start replica",
                "on_role_change standby_leader",
                "on_role_change replica",
                "on_role_change standby_leader"
            ]
        );
    }

    #[test]
    fn a_replica_that_is_cloned_anew_stops_and_starts() {
        let mut told = Told::default();
        lines(&mut told, &[runs(Role::Replica)]);
        told.order_stop();
        assert_eq!(
            lines(&mut told, &[DOWN, BETWEEN, runs(Role::Replica)]),
            ["on_stop replica", "on_start replica"]
        );
    }
}
