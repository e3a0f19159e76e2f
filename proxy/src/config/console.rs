//! The pseudo-database that a proxy answers itself.

use crate::console::Verifier;

/// Who may log in to the console, and under which name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleConfig {
    /// The database that clients ask for. One of this name on the servers cannot be reached through this proxy.
    pub database: String,
    /// Who may log in with a password.
    pub users: Vec<ConsoleUser>,
    /// Whether processes of root and of the proxy's own user may come in through a unix socket without a password.
    pub peers: bool,
}

/// One who may log in with a password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleUser {
    /// The name in the startup message.
    pub name: String,
    /// What its password is compared with.
    pub verifier: Verifier,
    /// Whether it may do more than look.
    pub admin: bool,
}
