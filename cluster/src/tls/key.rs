//! Private keys in PEM, encrypted or not.

use std::path::PathBuf;

use pkcs8::{EncryptedPrivateKeyInfoRef, SecretDocument};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

use super::{TlsConfigError, in_file};

const BEGIN: &str = "-----BEGIN ENCRYPTED PRIVATE KEY-----";
const END: &str = "-----END ENCRYPTED PRIVATE KEY-----";
/// The header of a key that OpenSSL has encrypted in its own way, which has no standard and one round of MD5.
const TRADITIONAL: &str = "Proc-Type: 4,ENCRYPTED";

/// The file of a private key, and the password that it may be encrypted with.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct KeyFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its password; a key that is not encrypted needs none, and having one does no harm.
    pub password: Option<String>,
}

impl std::fmt::Debug for KeyFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.path.fmt(f) // Never the password.
    }
}

impl From<PathBuf> for KeyFile {
    fn from(path: PathBuf) -> Self {
        Self { path, password: None }
    }
}

impl KeyFile {
    /// The key in it.
    ///
    /// # Errors
    /// When the file cannot be read, has no key, or has one that the password does not open; names it.
    pub fn read(&self) -> Result<PrivateKeyDer<'static>, TlsConfigError> {
        let text = std::fs::read_to_string(&self.path).map_err(|error| self.wrong(&error.to_string()))?;
        let encrypted = text
            .split_once(BEGIN)
            .and_then(|(_, rest)| rest.split_once(END))
            .map(|(body, _)| format!("{BEGIN}{body}{END}\n"));
        let Some(encrypted) = encrypted else {
            if text.contains(TRADITIONAL) {
                return Err(self.wrong(
                    "its key is encrypted in OpenSSL's own old way, which is not read; convert it with: \
                     openssl pkcs8 -topk8 -v2 aes-256-cbc -in OLD -out NEW",
                ));
            }
            return PrivateKeyDer::from_pem_file(&self.path).map_err(|error| in_file(&self.path, &error));
        };
        let Some(password) = &self.password else {
            return Err(self.wrong("its key is encrypted, and no password is given; give it, or decrypt the key"));
        };
        let refused = |error: &dyn std::fmt::Display| {
            self.wrong(&format!(
                "its key cannot be decrypted ({error}): the password is another, or the cipher is none of PBES2 with \
                 AES; see openssl pkcs8 -topk8 -v2 aes-256-cbc"
            ))
        };
        let (_, sealed) = SecretDocument::from_pem(&encrypted).map_err(|error| refused(&error))?;
        let sealed = EncryptedPrivateKeyInfoRef::try_from(sealed.as_bytes()).map_err(|error| refused(&error))?;
        let opened = sealed.decrypt(password).map_err(|error| refused(&error))?;
        Ok(PrivatePkcs8KeyDer::from(opened.as_bytes().to_vec()).into())
    }

    fn wrong(&self, what: &str) -> TlsConfigError {
        TlsConfigError::File {
            path: self.path.clone(),
            what: what.to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both by OpenSSL 3, of one key: `openssl pkcs8 -topk8 -v2 aes-256-cbc` with the password "secret", and without one.
    const ENCRYPTED: &str = include_str!("encrypted.pem");
    const PLAIN: &str = include_str!("plain.pem");

    fn written(text: &str, password: Option<&str>) -> (tempfile::NamedTempFile, KeyFile) {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), text).expect("written");
        let key = KeyFile {
            path: file.path().to_owned(),
            password: password.map(str::to_owned),
        };
        (file, key)
    }

    #[test]
    fn a_key_is_the_same_encrypted_or_not_and_beside_a_certificate() {
        let (_plain, plain) = written(PLAIN, None);
        let expected = plain.read().expect("a key");
        let beside = format!("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n{ENCRYPTED}");
        for text in [ENCRYPTED, &beside] {
            let (_file, key) = written(text, Some("secret"));
            assert_eq!(key.read().expect("decrypted").secret_der(), expected.secret_der());
        }
        // A password too many does no harm.
        let (_file, key) = written(PLAIN, Some("secret"));
        assert_eq!(key.read().expect("a key").secret_der(), expected.secret_der());
    }

    #[test]
    fn what_cannot_be_decrypted_is_told_by_file_and_fix_and_without_the_password() {
        let old = "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-256-CBC,00\n\nAAAA\n\
                   -----END RSA PRIVATE KEY-----\n";
        for (text, password, expected) in [
            (ENCRYPTED, None, "its key is encrypted, and no password is given"),
            (ENCRYPTED, Some("hunter2"), "its key cannot be decrypted ("),
            (old, Some("hunter2"), "openssl pkcs8 -topk8"),
            ("nothing", Some("hunter2"), "no private key in PEM is in it"),
        ] {
            let (file, key) = written(text, password);
            let error = key.read().expect_err("refused").to_string();
            assert!(error.contains(expected), "{error}");
            assert!(error.starts_with(&file.path().display().to_string()), "{error}");
            assert!(!format!("{error}{key:?}").contains("hunter2"), "{error} {key:?}");
        }
    }
}
