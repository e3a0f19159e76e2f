//! Who may see the page: everybody, or who presents a name and a password.

use std::fmt;

/// A name and a password, as a browser presents them. Neither is ever shown.
#[derive(Clone, PartialEq, Eq)]
pub struct PageLogin(String);

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
}

impl fmt::Debug for PageLogin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PageLogin")
    }
}

/// Compares in a time that tells nothing but whether the lengths are equal.
pub(crate) fn equals(expected: &[u8], given: &[u8]) -> bool {
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
    }
}
