//! SCRAM-SHA-256 from the server's side, RFC 5802 and 7677, as PostgreSQL speaks it. Pure but for the random numbers.
//!
//! Whoever knows a verifier cannot log in with it, and who asks for a user that does not exist learns nothing from that.

use std::fmt;
use std::num::NonZeroU32;
use std::sync::LazyLock;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use pgherd_page::login::equals;
use ring::rand::{SecureRandom, SystemRandom};
use ring::{digest, hmac, pbkdf2};

const KEY_BYTES: usize = digest::SHA256_OUTPUT_LEN;
/// PostgreSQL's own, `SCRAM_SHA_256_DEFAULT_ITERATIONS`.
const ITERATIONS: NonZeroU32 = NonZeroU32::new(4096).expect("not zero");
/// A verifier that asks for more would keep clients busy for minutes.
const ITERATIONS_MAX: u32 = 10_000_000;
const SALT_BYTES: usize = 16;
const NONCE_BYTES: usize = 18;
/// How a verifier begins, in `pg_authid` and in PgBouncer's `userlist.txt`.
const PREFIX: &str = "SCRAM-SHA-256$";

/// What salts are made of: the same for a user while this process runs, so that a configuration that was read again is the
/// same, and that users who do not exist have one as well.
static PROCESS_KEY: LazyLock<hmac::Key> = LazyLock::new(|| {
    let mut bytes = [0; KEY_BYTES];
    // Without random numbers no TLS handshake succeeds either; a constant would only make salts guessable.
    let _ = SystemRandom::new().fill(&mut bytes);
    hmac::Key::new(hmac::HMAC_SHA256, &bytes)
});

/// What proves that a client knows a password.
#[derive(Clone, PartialEq, Eq)]
pub struct Verifier {
    iterations: NonZeroU32,
    salt: Vec<u8>,
    stored_key: [u8; KEY_BYTES],
    server_key: [u8; KEY_BYTES],
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Verifier")
    }
}

impl Verifier {
    /// Of a user's password, or, where that begins as a verifier does, as `pg_authid` has it, the verifier itself.
    ///
    /// # Errors
    /// When it begins as a verifier and is none.
    pub fn new(user: &str, password: &str) -> Result<Self, BadVerifier> {
        match password.strip_prefix(PREFIX) {
            Some(rest) => Self::parse(rest).ok_or(BadVerifier),
            None => Ok(Self::of_password(user, password)),
        }
    }

    fn of_password(user: &str, password: &str) -> Self {
        let salt = salt_of(user);
        // As PostgreSQL does: what cannot be prepared is taken as it is.
        let prepared = stringprep::saslprep(password).unwrap_or(password.into());
        let mut salted = [0; KEY_BYTES];
        let prf = pbkdf2::PBKDF2_HMAC_SHA256;
        pbkdf2::derive(prf, ITERATIONS, &salt, prepared.as_bytes(), &mut salted);
        let client_key = keyed(&salted, b"Client Key");
        Self {
            iterations: ITERATIONS,
            salt,
            stored_key: hashed(&client_key),
            server_key: keyed(&salted, b"Server Key"),
        }
    }

    /// Of a user that does not exist: nobody's proof fits.
    pub(crate) fn of_nobody(user: &str) -> Self {
        let key = |what: &[u8]| -> [u8; KEY_BYTES] { tag(&hmac::sign(&PROCESS_KEY, what)) };
        Self {
            iterations: ITERATIONS,
            salt: salt_of(user),
            stored_key: key(b"nobody's stored key"),
            server_key: key(b"nobody's server key"),
        }
    }

    /// `ITERATIONS:SALT$STORED_KEY:SERVER_KEY`.
    fn parse(text: &str) -> Option<Self> {
        let (first, keys) = text.split_once('$')?;
        let (iterations, salt) = first.split_once(':')?;
        let (stored, server) = keys.split_once(':')?;
        let key = |text: &str| <[u8; KEY_BYTES]>::try_from(STANDARD.decode(text).ok()?).ok();
        Some(Self {
            iterations: iterations
                .parse()
                .ok()
                .filter(|count: &NonZeroU32| count.get() <= ITERATIONS_MAX)?,
            salt: STANDARD.decode(salt).ok().filter(|salt| !salt.is_empty())?,
            stored_key: key(stored)?,
            server_key: key(server)?,
        })
    }
}

/// A text that begins as a verifier and is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it begins as a verifier of SCRAM does and is none")]
pub struct BadVerifier;

fn salt_of(user: &str) -> Vec<u8> {
    let signed = hmac::sign(&PROCESS_KEY, user.as_bytes());
    signed.as_ref().iter().take(SALT_BYTES).copied().collect()
}

fn tag(tag: &hmac::Tag) -> [u8; KEY_BYTES] {
    tag.as_ref().try_into().unwrap_or_default()
}

fn keyed(key: &[u8], text: &[u8]) -> [u8; KEY_BYTES] {
    tag(&hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), text))
}

fn hashed(bytes: &[u8]) -> [u8; KEY_BYTES] {
    digest::digest(&digest::SHA256, bytes)
        .as_ref()
        .try_into()
        .unwrap_or_default()
}

/// Printable random bytes; nothing when the system gives none.
pub(crate) fn nonce() -> Option<String> {
    let mut bytes = [0; NONCE_BYTES];
    SystemRandom::new().fill(&mut bytes).ok()?;
    Some(STANDARD.encode(bytes))
}

/// Why a client is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failed {
    /// It does not speak SCRAM, or asks for what is not offered.
    Malformed,
    /// It does not know the password.
    Proof,
}

/// An exchange that has begun.
pub(crate) struct Exchange {
    verifier: Verifier,
    /// The client's first word without what goes before `n=`, and what goes before.
    bare: String,
    gs2_header: String,
    server_first: String,
    nonce: String,
}

impl Exchange {
    /// Takes the client's first word. What the server says to it is [`Self::server_first`].
    pub(crate) fn begin(client_first: &[u8], verifier: Verifier, own_nonce: &str) -> Result<Self, Failed> {
        let text = std::str::from_utf8(client_first).map_err(|_| Failed::Malformed)?;
        let mut parts = text.splitn(3, ',');
        let (Some(binding), Some(identity), Some(bare)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(Failed::Malformed);
        };
        // Nothing is bound to the channel here, and nobody acts for another.
        if !matches!(binding, "n" | "y") || !identity.is_empty() {
            return Err(Failed::Malformed);
        }
        // The name within is ignored, as in PostgreSQL: the startup message has said it.
        let (user, rest) = bare.split_once(',').ok_or(Failed::Malformed)?;
        let client_nonce = rest.split(',').next().and_then(|word| word.strip_prefix("r="));
        let client_nonce = client_nonce.filter(|nonce| !nonce.is_empty() && user.starts_with("n="));
        let nonce = format!("{}{own_nonce}", client_nonce.ok_or(Failed::Malformed)?);
        let (salt, iterations) = (STANDARD.encode(&verifier.salt), verifier.iterations);
        Ok(Self {
            bare: bare.to_owned(),
            gs2_header: format!("{binding},,"),
            server_first: format!("r={nonce},s={salt},i={iterations}"),
            verifier,
            nonce,
        })
    }

    pub(crate) fn server_first(&self) -> String {
        self.server_first.clone()
    }

    /// Takes the client's last word; answers with the server's, which proves that it has the verifier.
    pub(crate) fn finish(&self, client_final: &[u8]) -> Result<String, Failed> {
        let text = std::str::from_utf8(client_final).map_err(|_| Failed::Malformed)?;
        let (without_proof, proof) = text.rsplit_once(",p=").ok_or(Failed::Malformed)?;
        let mut words = without_proof.split(',');
        let bound = words.next().and_then(|word| word.strip_prefix("c="));
        let nonce = words.next().and_then(|word| word.strip_prefix("r="));
        let bound = bound.and_then(|text| STANDARD.decode(text).ok());
        if bound.as_deref() != Some(self.gs2_header.as_bytes()) || nonce != Some(self.nonce.as_str()) {
            return Err(Failed::Malformed);
        }
        let proof = STANDARD.decode(proof).map_err(|_| Failed::Malformed)?;
        let message = format!("{},{},{without_proof}", self.bare, self.server_first);
        let signature = keyed(&self.verifier.stored_key, message.as_bytes());
        let client_key: Vec<u8> = proof.iter().zip(signature).map(|(a, b)| a ^ b).collect();
        if proof.len() != KEY_BYTES || !equals(&self.verifier.stored_key, &hashed(&client_key)) {
            return Err(Failed::Proof);
        }
        let signature = keyed(&self.verifier.server_key, message.as_bytes());
        Ok(format!("v={}", STANDARD.encode(signature)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 7677, section 3: user `user`, password `pencil`.
    const SALT: &str = "W22ZaJ0SNY7soEsUEjb6gQ==";
    const CLIENT_NONCE: &str = "rOprNGfwEbeRWgbNEkqO";
    const SERVER_NONCE: &str = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
    const PROOF: &str = "dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
    const SIGNATURE: &str = "6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=";

    fn verifier() -> Verifier {
        let mut salted = [0; KEY_BYTES];
        let salt = STANDARD.decode(SALT).expect("base64");
        pbkdf2::derive(pbkdf2::PBKDF2_HMAC_SHA256, ITERATIONS, &salt, b"pencil", &mut salted);
        Verifier {
            iterations: ITERATIONS,
            salt,
            stored_key: hashed(&keyed(&salted, b"Client Key")),
            server_key: keyed(&salted, b"Server Key"),
        }
    }

    fn exchange(verifier: Verifier) -> Exchange {
        let first = format!("n,,n=user,r={CLIENT_NONCE}");
        Exchange::begin(first.as_bytes(), verifier, SERVER_NONCE).expect("it speaks SCRAM")
    }

    fn last(proof: &str) -> String {
        format!("c=biws,r={CLIENT_NONCE}{SERVER_NONCE},p={proof}")
    }

    #[test]
    fn the_example_of_the_standard_is_let_in_and_one_bit_less_is_not() {
        let exchange = exchange(verifier());
        assert_eq!(
            exchange.server_first(),
            format!("r={CLIENT_NONCE}{SERVER_NONCE},s={SALT},i=4096")
        );
        let signature = exchange.finish(last(PROOF).as_bytes());
        assert_eq!(signature, Ok(format!("v={SIGNATURE}")));
        let wrong = PROOF.replace("dHzb", "dHzc");
        assert_eq!(exchange.finish(last(&wrong).as_bytes()), Err(Failed::Proof));
        assert_eq!(exchange.finish(last("").as_bytes()), Err(Failed::Proof));
    }

    #[test]
    fn another_nonce_and_another_binding_are_refused_before_the_proof() {
        let exchange = exchange(verifier());
        for last in [
            last(PROOF).replace(",r=r", ",r=s"),
            last(PROOF).replace("c=biws", "c=eSws"),
            last(PROOF).replace(",p=", ",q="),
        ] {
            assert_eq!(exchange.finish(last.as_bytes()), Err(Failed::Malformed), "{last}");
        }
        for first in [
            "",
            "n,,",
            "p=tls-server-end-point,,n=,r=x",
            "n,a=root,n=,r=x",
            "n,,n=,r=",
            "n,,m=x,n=,r=x",
        ] {
            let begun = Exchange::begin(first.as_bytes(), verifier(), "x");
            assert_eq!(begun.err(), Some(Failed::Malformed), "{first}");
        }
    }

    #[test]
    fn a_verifier_as_postgresql_keeps_it_is_taken_and_the_same_password_is_the_same_verifier() {
        let Verifier {
            stored_key, server_key, ..
        } = verifier();
        let keys = [stored_key, server_key].map(|key| STANDARD.encode(key)).join(":");
        let kept = format!("SCRAM-SHA-256$4096:{SALT}${keys}");
        assert_eq!(Verifier::new("user", &kept), Ok(verifier()));
        assert_eq!(Verifier::new("user", &kept.replace("$4096", "$0")), Err(BadVerifier));
        assert_eq!(Verifier::new("user", "SCRAM-SHA-256$"), Err(BadVerifier));
        let one = |password| Verifier::new("ann", password).expect("a password");
        assert!(one("secret") == one("secret") && one("secret") != one("other"));
        // RFC 4013: a soft hyphen is nothing.
        assert!(one("I\u{AD}X") == one("IX"));
        assert_eq!(format!("{:?}", one("secret")), "Verifier");
    }

    #[test]
    fn nobody_looks_like_somebody_and_is_never_let_in() {
        let (nobody, again) = (Verifier::of_nobody("eve"), Verifier::of_nobody("eve"));
        assert!(nobody == again && nobody.salt != Verifier::of_nobody("mallory").salt);
        assert_eq!(nobody.salt.len(), SALT_BYTES);
        assert_eq!(exchange(nobody).finish(last(PROOF).as_bytes()), Err(Failed::Proof));
    }
}
