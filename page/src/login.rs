//! Who may see the page: everybody, or who presents a name and a password. Who may act needs a password worth the name.

use std::fmt;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;

/// A shorter password is guessed.
const PASSWORD_MIN: usize = 8;

/// Passwords of guides and examples: everybody knows them.
const KNOWN: [&str; 12] = [
    "admin123",
    "admin1234",
    "password",
    "password1",
    "changeme",
    "change-me",
    "change-me-too",
    "12345678",
    "123456789",
    "postgres",
    "patroni1",
    "yourpassword",
];

/// A name and a password, as a browser presents them. The password is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct PageLogin(String);

/// Why a password is good for looking and not for acting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Weak {
    /// Anybody tries these first.
    #[error("it is one that guides and examples use")]
    Known,
    /// The first that is tried.
    #[error("it is the user's name")]
    Name,
    /// It can be tried out.
    #[error("it has fewer than {PASSWORD_MIN} characters")]
    Short,
    /// The header is not what browsers make.
    #[error("it cannot be read")]
    Unreadable,
}

impl PageLogin {
    /// From what a request's `Authorization` header must be: `Basic` and what follows it.
    #[must_use]
    pub const fn new(authorization: String) -> Self {
        Self(authorization)
    }

    /// Whether a request with this header may pass.
    #[must_use]
    pub fn lets_in(&self, header: Option<&[u8]>) -> bool {
        let Some((scheme, given)) = header.and_then(|header| header.split_at_checked(6)) else {
            return false;
        };
        let expected = self.0.as_bytes().get(6..).unwrap_or_default();
        scheme.eq_ignore_ascii_case(b"basic ") && equals(expected, given)
    }

    /// The user's name, for events and the log.
    #[must_use]
    pub fn name(&self) -> String {
        self.parts().map(|(name, _)| name).unwrap_or_default()
    }

    /// Whether whoever knows it may be trusted to act.
    ///
    /// # Errors
    /// Why not.
    pub fn is_strong(&self) -> Result<(), Weak> {
        let (name, password) = self.parts().ok_or(Weak::Unreadable)?;
        if KNOWN.iter().any(|known| known.eq_ignore_ascii_case(&password)) {
            Err(Weak::Known)
        } else if password == name {
            Err(Weak::Name)
        } else if password.chars().count() < PASSWORD_MIN {
            Err(Weak::Short)
        } else {
            Ok(())
        }
    }

    fn parts(&self) -> Option<(String, String)> {
        let decoded = BASE64_STANDARD.decode(self.0.get(6..)?).ok()?;
        let text = String::from_utf8(decoded).ok()?;
        let (name, password) = text.split_once(':')?;
        Some((name.to_owned(), password.to_owned()))
    }
}

impl fmt::Debug for PageLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PageLogin")
    }
}

/// Compares in a time that tells nothing but whether the lengths are equal.
#[must_use]
pub fn equals(expected: &[u8], given: &[u8]) -> bool {
    let pairs = expected.iter().zip(given);
    let differences = pairs.fold(0, |all, (a, b)| std::hint::black_box(all | (a ^ b)));
    expected.len() == given.len() && differences == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_very_name_and_password_pass() {
        let login = PageLogin::new("Basic YWRtaW46c2VjcmV0".to_owned());
        assert!(login.lets_in(Some(b"Basic YWRtaW46c2VjcmV0")) && login.lets_in(Some(b"basic YWRtaW46c2VjcmV0")));
        for wrong in [
            "Basic YWRtaW46c2VjcmV1",
            "Basic YWRtaW46c2VjcmV",
            "Basic ",
            "Bearer YWRtaW46c2VjcmV0",
            "",
        ] {
            assert!(!login.lets_in(Some(wrong.as_bytes())), "{wrong}");
        }
        assert!(!login.lets_in(None));
        assert_eq!(format!("{login:?}"), "PageLogin");
        assert_eq!(login.name(), "admin");
    }

    #[test]
    fn a_password_that_everybody_knows_is_not_one() {
        let of = |name: &str, password: &str| {
            let encoded = BASE64_STANDARD.encode(format!("{name}:{password}"));
            PageLogin::new(format!("Basic {encoded}")).is_strong()
        };
        assert_eq!(of("admin", "admin123"), Err(Weak::Known));
        assert_eq!(of("admin", "CHANGEME"), Err(Weak::Known));
        assert_eq!(of("operations", "operations"), Err(Weak::Name));
        assert_eq!(of("admin", "secret"), Err(Weak::Short));
        assert_eq!(of("admin", "correct:horse"), Ok(()));
        assert_eq!(PageLogin::new("Basic ?".to_owned()).is_strong(), Err(Weak::Unreadable));
    }
}
