//! The keeper: a small process that holds the fence. PostgreSQL may be writable only while a deadline lies ahead, and
//! the keeper ends it when that passes, whatever has become of the agent that set it.
//!
//! Four processes take part. The **keeper** ([`run`]) is the parent of the others and of the postmaster, has one thread
//! and never waits for any of them. The **agent** decides, and speaks to the keeper through a [`KeeperLink`]. The
//! **postmaster** is PostgreSQL; all that descends from it is the instance. The **sentinel** ([`run_sentinel`]) knows
//! the deadline too, for the case that the keeper itself is frozen or killed.
//!
//! All times are moments on CLOCK_BOOTTIME ([`clock::Boottime`]), which go on while the machine is suspended.
//!
//! # Watchdog
//!
//! Where neither keeper nor sentinel runs any more, the kernel's watchdog resets the machine, as far as there is one and
//! the agent asks for it ([`Request::Watchdog`](protocol::Request::Watchdog)). It is opened before a first deadline is
//! confirmed, and pinged whenever a later one is, by nothing else: a frozen keeper, a frozen agent and an etcd out of
//! reach all stop that. The fence then begins so early that PostgreSQL has ended when the watchdog would fire, and with
//! PostgreSQL ended, in pause and by a clean exit it is stopped. A keeper that is killed or frozen leaves it running.
//!
//! # Adoption
//!
//! A postmaster that somebody else has started in the data directory, such as the keeper before this one or Patroni, is
//! told to the agent, and no deadline is accepted beside it. It is ended, or adopted
//! ([`Request::Adopt`](protocol::Request::Adopt)): held by its pidfd, with its processes listed while it lives, so that
//! the fence ends it as it ends a child. When it is dead, whoever is still attached to its shared memory belongs to it
//! too. What starts after it is a child of the keeper again.
//!
//! # Upgrade
//!
//! On SIGUSR2 the keeper becomes the program that its [`KeeperConfig::program`] names by then, by an exec in place.
//! Process number, parenthood and children stay, so that agent, proxy, sentinel and PostgreSQL notice nothing.
//!
//! First the new program is started dry: it is given the state, and says by its exit code whether it could go on with it
//! ([`dry_start`]). If it cannot, or takes longer than five seconds, one line says so and nothing has happened. The
//! keeper goes on with its work meanwhile. Then the state and the descriptors pass through the exec, and the new program
//! goes on with them ([`resume`]) without reading arguments or configuration: the deadline in force, its margin and the
//! final terms, the memo, the children by number and start, the agent's socket with all that is under way on it in
//! either direction, the shared word, the watchdog, which runs on, and the lock, which is held throughout. The deadline is a moment of the machine's
//! clock and means the same afterwards. The sentinel watches it throughout; it stays the old program until it dies, as
//! do agent and proxy.
//!
//! Signals are blocked for the exec, so that one that comes meanwhile arrives afterwards. An upgrade waits while an end,
//! a fence or the clearing up after a dead agent is under way, while no sentinel runs, and shortly before the fence would
//! begin. A keeper that is stopping is not upgraded.
//!
//! A program that takes over and then cannot go on exits with an error, and the sentinel ends PostgreSQL as whenever a
//! keeper dies.
//!
//! # Pause
//!
//! For maintenance, [`Request::Pause`](protocol::Request::Pause) suspends the fence: no deadline is in force, and
//! PostgreSQL stays as it is, whatever becomes of the agent and of the keeper. An agent that leaves may have PostgreSQL stay behind. A keeper that is told to
//! stop leaves it behind unless the agent says otherwise, and so does the sentinel of a keeper that is killed. What would
//! make PostgreSQL writable is refused as it is without a deadline. What others start in place of a postmaster that has
//! exited is told to the agent, and not ended with what that one left. Arming the fence ends the pause.

pub mod clock;
pub mod fence;
pub mod protocol;

mod child;
mod directory;
mod ending;
mod error;
mod instance;
mod keeper;
mod leaving;
mod link;
mod lock_file;
mod log;
mod memo;
mod postmaster;
mod process;
mod requests;
mod seat;
mod sentinel;
mod signals;
mod state;
mod succession;
mod surroundings;
mod upgrade;
mod watchdog;
mod wire;
mod word;

pub use error::KeeperError;
pub use keeper::{KeeperConfig, KeeperOutcome, run};
pub use link::{KeeperLink, LINK_ENV};
pub use sentinel::{SENTINEL_ENV, keeper_of_sentinel, run_sentinel};
pub use upgrade::{dry_start, resume};
