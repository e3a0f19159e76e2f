//! Passwords that have changed in the configuration, given to the roles.

use std::time::Duration;

use super::bootstrap::QUIET;
use super::programs::ToolError;
use super::sql::{Target, identifier, literal, tell_in_order};
use crate::config::{Credentials, PostgresConfig};

const SET_MAX: Duration = Duration::from_secs(10);

/// The users of the configuration with their passwords.
#[derive(Clone, PartialEq, Eq)]
pub struct Passwords(Vec<Credentials>);

impl Passwords {
    /// Those that are configured. A role that two purposes share is there once.
    #[must_use]
    pub fn of(config: &PostgresConfig) -> Self {
        let mut all: Vec<Credentials> = Vec::new();
        for user in [
            Some(&config.superuser),
            Some(&config.replication),
            config.rewind.as_ref(),
        ]
        .into_iter()
        .flatten()
        {
            if user.password.is_some() && all.iter().all(|known| known.username != user.username) {
                all.push(user.clone());
            }
        }
        Self(all)
    }

    /// Those that are not in `before`: another password, or another user.
    #[must_use]
    pub fn changed_since(&self, before: &Self) -> Self {
        let changed = self.0.iter().filter(|user| !before.0.contains(user));
        Self(changed.cloned().collect())
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whose they are.
    #[must_use]
    pub fn users(&self) -> String {
        let names: Vec<&str> = self.0.iter().map(|user| user.username.as_str()).collect();
        names.join(", ")
    }

    /// Gives the roles these passwords, without a word of it in the server's log. A role that does not exist stays so. May
    /// be repeated.
    ///
    /// # Errors
    /// When a statement fails.
    pub async fn set(&self, target: &Target) -> Result<(), ToolError> {
        let statements: Vec<String> = self.0.iter().map(alteration).collect();
        let told: Vec<&str> = std::iter::once(QUIET)
            .chain(statements.iter().map(String::as_str))
            .collect();
        tell_in_order(target, "changing the members' passwords", &told, SET_MAX).await
    }
}

fn alteration(user: &Credentials) -> String {
    let exists = format!("SELECT 1 FROM pg_authid WHERE rolname = {}", literal(&user.username));
    let password = literal(user.password.as_deref().unwrap_or_default());
    let name = identifier(&user.username);
    let body = format!("BEGIN IF EXISTS ({exists}) THEN ALTER ROLE {name} PASSWORD {password}; END IF; END");
    format!("DO {}", literal(&body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::{agent, with_password};

    #[test]
    fn only_what_differs_is_set() {
        let before = Passwords::of(&agent().postgresql);
        assert!(Passwords::of(&agent().postgresql).changed_since(&before).is_empty());
        let after = Passwords::of(&with_password("new").postgresql);
        assert_eq!(after.changed_since(&before).users(), "postgres");
    }

    #[test]
    fn a_password_cannot_end_its_own_quotes() {
        let user = Credentials {
            username: "o\"x".to_owned(),
            password: Some("it's".to_owned()),
        };
        let body = "BEGIN IF EXISTS (SELECT 1 FROM pg_authid WHERE rolname = 'o\"x') THEN \
                    ALTER ROLE \"o\"\"x\" PASSWORD 'it''s'; END IF; END";
        assert_eq!(alteration(&user), format!("DO {}", literal(body)));
    }
}
