//! Operators' own programs: how their lines are read, how they are run, and when callbacks are called.

mod callbacks;
mod methods;
mod run;
mod told;
mod words;

pub use self::callbacks::{Callbacks, Executor};
pub use self::methods::{
    BASEBACKUP_RESERVED, BootstrapMethod, CustomMethod, Finding, INITDB_RESERVED, ReplicaMethod, Scripts, ToolOption,
    tool_options,
};
pub(crate) use self::run::keep_to_ourselves;
pub use self::run::{Run, RunError};
pub use self::told::{Event, Facts, Server, Told};
pub use self::words::{NotACommand, Words};
