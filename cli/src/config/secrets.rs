//! Secrets that lie in files of their own: `password_file` beside every `password`.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::section::Findings;

/// Where passwords are.
const SECTIONS: [&str; 7] = [
    "postgresql.authentication.superuser",
    "postgresql.authentication.replication",
    "postgresql.authentication.rewind",
    "restapi.authentication",
    "ctl.authentication",
    "etcd3",
    "etcd",
];

/// Puts the passwords that lie in files into the tree. Gives the files.
pub(super) fn apply(tree: &mut Map<String, Value>, findings: &Findings) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for path in SECTIONS {
        let Some(section) = section_of(tree, path) else {
            continue;
        };
        let Some(file) = section.shift_remove("password_file").filter(|file| !file.is_null()) else {
            continue;
        };
        let Some(file) = file.as_str().map(PathBuf::from) else {
            findings.error(format!(
                "{path}.password_file: not a path; write that of a file that holds the password"
            ));
            continue;
        };
        if section.get("password").is_some_and(|password| !password.is_null()) {
            findings.error(format!(
                "{path}.password_file: there is a password beside it; remove one of them"
            ));
            continue;
        }
        match read(&file) {
            Ok(password) => {
                section.insert("password".to_owned(), password.into());
            }
            Err(why) => findings.error(format!("{path}.password_file: {why}")),
        }
        files.push(file);
    }
    files
}

/// What a file holds, without the end of its line.
///
/// # Errors
/// A sentence that names the file.
pub(super) fn read(file: &Path) -> Result<String, String> {
    let text = fs::read_to_string(file).map_err(|error| {
        format!(
            "{:?} cannot be read ({error}); write the path of a file that holds the password",
            file.display().to_string()
        )
    })?;
    let secret = text.trim_end_matches(['\n', '\r']);
    if secret.is_empty() {
        return Err(format!(
            "{:?} is empty; write the password into it",
            file.display().to_string()
        ));
    }
    Ok(secret.to_owned())
}

fn section_of<'a>(tree: &'a mut Map<String, Value>, path: &str) -> Option<&'a mut Map<String, Value>> {
    let mut map = tree;
    for part in path.split('.') {
        map = map.get_mut(part)?.as_object_mut()?;
    }
    Some(map)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn applied(mut tree: Value) -> (Value, Vec<PathBuf>, Vec<String>) {
        let findings = Findings::default();
        let files = apply(tree.as_object_mut().expect("a map"), &findings);
        (tree, files, findings.errors())
    }

    #[test]
    fn a_password_in_a_file_is_one_and_its_file_is_known() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        fs::write(file.path(), "secret\n").expect("written");
        let (tree, files, errors) = applied(json!({"etcd3": {"username": "u", "password_file": file.path()}}));
        assert_eq!(errors, Vec::<String>::new());
        assert_eq!(tree, json!({"etcd3": {"username": "u", "password": "secret"}}));
        assert_eq!(files, [file.path()]);
    }

    #[test]
    fn two_passwords_an_empty_file_and_none_are_told_by_key() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let path = file.path().display().to_string();
        for (section, expected) in [
            (
                json!({"password": "x", "password_file": path}),
                "there is a password beside it; remove one of them".to_owned(),
            ),
            (
                json!({"password_file": path}),
                format!("{path:?} is empty; write the password into it"),
            ),
            (
                json!({"password_file": "/nowhere"}),
                "\"/nowhere\" cannot be read (".to_owned(),
            ),
            (json!({"password_file": 5}), "not a path;".to_owned()),
        ] {
            let (_, _, errors) = applied(json!({"restapi": {"authentication": section}}));
            let start = format!("restapi.authentication.password_file: {expected}");
            assert!(errors.len() == 1 && errors[0].starts_with(&start), "{errors:?}");
        }
    }
}
