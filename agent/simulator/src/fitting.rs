//! Schedules that fit a planted bug: the mode and the run of faults in which it does harm. What is drawn for everybody would
//! find most of them too, only later.

use std::time::Duration;

use serde_json::{Value, json};

use crate::faults::{Fault, Planned};
use crate::random::Random;
use crate::run::{Planted, Setup};
use crate::time::Time;

impl Setup {
    /// The same seed with the mode, the members and the faults that a bug needs.
    #[must_use]
    pub fn fitting(mut self, planted: Planted) -> Self {
        let mut set = |name: &str, value: Value| self.config.insert(name.to_owned(), value);
        for (name, time) in [("ttl", 5), ("loop_wait", 1), ("retry_timeout", 2)] {
            set(name, json!(time));
        }
        let vouches = matches!(planted, Planted::VouchWhileBidding | Planted::KeepaliveProves);
        set("failsafe_mode", json!(vouches));
        set("synchronous_node_count", json!(1));
        match planted {
            Planted::SyncOrderSwapped | Planted::TakenOverAtOnce => set("synchronous_mode", json!(true)),
            Planted::StaleSync => {
                set("synchronous_node_count", json!(2));
                set("synchronous_mode", json!(true))
            }
            Planted::NoTimelineCheck => set("synchronous_mode", json!("quorum")),
            Planted::DeadlineFromReply
            | Planted::KeepaliveProves
            | Planted::PassedDeadlineExtended
            | Planted::VouchWhileBidding
            | Planted::ReleaseWhileBackendLives => None,
        };
        self.members = 3;
        self.exists = true;
        self.favours = Some(planted);
        self
    }
}

/// One fault of a run: after so many milliseconds, for so long.
fn step(from: Time, after: u64, lasts: u64, fault: Fault) -> Planned {
    Planned {
        at: from + Duration::from_millis(after),
        lasts: Duration::from_millis(lasts),
        fault,
    }
}

/// A run of faults that begins at `from`, against the member that leads at the beginning of a run that nothing has
/// disturbed before.
pub(crate) fn pattern(planted: Planted, random: &mut Random, from: Time) -> Vec<Planned> {
    let mut near = |middle: u64, spread: u64| random.between(middle - spread, middle + spread);
    match planted {
        // An answer is under way or unread while the agent stands still, and the next renewals fail.
        Planted::DeadlineFromReply => {
            let freeze = near(2000, 1500);
            vec![
                step(from, 0, 20_000, Fault::Degrade(0)),
                step(from, freeze, near(3500, 1000), Fault::FreezeAgent(0)),
                step(from, freeze + near(500, 300), 12_000, Fault::CutFromEtcd(0)),
            ]
        }
        Planted::PassedDeadlineExtended => vec![step(from, near(1000, 900), near(9000, 2000), Fault::CutFromEtcd(0))],
        // A standby comes back, is listed before commits wait for it, and is lost again together with the leader.
        // No commit waits for it, or not yet.
        Planted::SyncOrderSwapped | Planted::TakenOverAtOnce => {
            let back = near(4000, 1000);
            let cut = back + near(1400, 1100);
            vec![
                step(from, 0, back, Fault::PowerOff(1)),
                step(from, 0, back, Fault::PowerOff(2)),
                step(from, cut, 20_000, Fault::CutPair(0, 1)),
                step(from, cut, 20_000, Fault::CutPair(0, 2)),
                step(from, cut + near(1000, 500), 20_000, Fault::PowerOff(0)),
            ]
        }
        // One that was taken off the list bids by the old one, against one that is on it.
        Planted::StaleSync => vec![
            step(from, 0, 25_000, Fault::CutPair(0, 1)),
            step(from, 0, 25_000, Fault::CutPair(1, 2)),
            step(from, near(8500, 1500), 20_000, Fault::PowerOff(0)),
        ],
        // One with a long tail on the old timeline comes back when the new one has hardly begun.
        Planted::NoTimelineCheck => vec![
            step(from, 0, near(8000, 500), Fault::CutFromEtcd(0)),
            step(from, 0, near(12_000, 500), Fault::CutPair(0, 1)),
            step(from, 0, near(12_000, 500), Fault::CutPair(0, 2)),
            step(from, near(5600, 500), 25_000, Fault::PowerOff(1)),
            step(from, near(5800, 500), 25_000, Fault::CutFromEtcd(2)),
        ],
        // A leader that lives by vouches while its key is free.
        Planted::VouchWhileBidding => {
            let cut = near(1500, 1400);
            vec![
                step(from, cut, near(12_000, 2000), Fault::CutFromEtcd(0)),
                step(from, cut + near(5500, 1000), 9000, Fault::CutPair(0, 1)),
                step(from, cut + near(5500, 1000), 9000, Fault::CutPair(0, 2)),
            ]
        }
        // A leader that lived by vouches has a new lease, and no key on it.
        Planted::KeepaliveProves => vec![step(from, near(1500, 1400), near(9000, 2000), Fault::CutFromEtcd(0))],
        // A stop finds the postmaster dead and a backend alive.
        Planted::ReleaseWhileBackendLives => {
            let asked = near(1000, 900);
            vec![
                step(from, asked, 6000, Fault::StopService(0)),
                step(from, asked + near(10, 10), 300, Fault::StuckBackend(0)),
            ]
        }
    }
}
