//! Who may change things: Basic credentials, when any are configured. Pure.

use hyper::header::HeaderValue;

use crate::config::Credentials;

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// What an unsafe request must present.
pub(super) struct Guard {
    /// The only text after `Basic ` that opens; nothing when everybody may.
    token: Option<String>,
}

impl Guard {
    pub(super) fn new(credentials: Option<&Credentials>) -> Self {
        Self {
            token: credentials.map(token),
        }
    }

    /// Whether a request with this `Authorization` header may pass; if not, what it is told.
    pub(super) fn check(&self, header: Option<&HeaderValue>) -> Result<(), &'static str> {
        let Some(token) = &self.token else { return Ok(()) };
        let Some(header) = header else {
            return Err("no auth header received");
        };
        let (scheme, given) = header.as_bytes().split_at_checked(6).unwrap_or_default();
        if scheme.eq_ignore_ascii_case(b"basic ") && equals(token.as_bytes(), given) {
            Ok(())
        } else {
            Err("not authenticated")
        }
    }
}

fn token(Credentials { username, password }: &Credentials) -> String {
    let password = password.as_deref().unwrap_or_default();
    base64(format!("{username}:{password}").as_bytes())
}

/// The `Authorization` header for another member's guarded requests: members of a cluster share their credentials.
#[must_use]
pub fn authorization(credentials: Option<&Credentials>) -> Option<String> {
    credentials.map(|credentials| format!("Basic {}", token(credentials)))
}

/// Compares in a time that tells nothing but whether the lengths are equal.
fn equals(expected: &[u8], given: &[u8]) -> bool {
    let differences = expected
        .iter()
        .zip(given)
        .fold(0, |all, (a, b)| std::hint::black_box(all | (a ^ b)));
    expected.len() == given.len() && differences == 0
}

fn base64(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let at = |index: usize| u32::from(chunk.get(index).copied().unwrap_or_default());
        let bits = at(0) << 16 | at(1) << 8 | at(2);
        for position in 0..4_usize {
            let index = bits >> (18 - 6 * position) & 63;
            let digit = usize::try_from(index).ok().and_then(|index| ALPHABET.get(index));
            let used = position <= chunk.len();
            text.push(digit.filter(|_| used).map_or('=', |digit| char::from(*digit)));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_is_that_of_rfc_4648() {
        for (plain, encoded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }

    #[test]
    fn only_the_right_credentials_open() {
        let credentials = Credentials {
            username: "patroni".into(),
            password: Some("secret".into()),
        };
        let guard = Guard::new(Some(&credentials));
        let check = |header: &'static str| guard.check(Some(&HeaderValue::from_static(header)));
        assert_eq!(guard.check(None), Err("no auth header received"));
        assert_eq!(check("Basic cGF0cm9uaTpzZWNyZXQ="), Ok(()));
        assert_eq!(check("basic cGF0cm9uaTpzZWNyZXQ="), Ok(()));
        for wrong in [
            "",
            "Basic",
            "Basic ",
            "Basic cGF0cm9uaTpzZWNyZXQ",
            "Basic cGF0cm9uaTpzZWNyZXU=",
            "Basic cGF0cm9uaTpzZWNyZXQ=x",
            "Bearer cGF0cm9uaTpzZWNyZXQ=",
        ] {
            assert_eq!(check(wrong), Err("not authenticated"), "{wrong}");
        }
        assert_eq!(Guard::new(None).check(None), Ok(()));
    }
}
