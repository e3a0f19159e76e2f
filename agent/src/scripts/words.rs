//! A command as operators write it: one line, taken apart into words as a POSIX shell would, without running one. Nothing is
//! expanded: `$HOME`, `*` and `|` are texts.

/// A command: the program, then its arguments. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Words(Vec<String>);

/// Why a line is no command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotACommand {
    /// Nothing is there.
    #[error("names no program")]
    Empty,
    /// A quotation does not end.
    #[error("has a quotation mark without a second one")]
    OpenQuote,
    /// The last character is a backslash, which quotes nothing.
    #[error("ends with a backslash")]
    OpenEscape,
}

impl Words {
    /// Takes a line apart as Patroni does: Python's `shlex.split`, which is POSIX quoting without comments.
    ///
    /// # Errors
    /// When there is no word, or a quotation does not end.
    pub fn parse(line: &str) -> Result<Self, NotACommand> {
        let mut words = Vec::new();
        let mut word: Option<String> = None;
        let mut characters = line.chars();
        while let Some(character) = characters.next() {
            match character {
                '\'' => quoted(&mut characters, word.get_or_insert_default())?,
                '"' => double_quoted(&mut characters, word.get_or_insert_default())?,
                '\\' => {
                    let next = characters.next().ok_or(NotACommand::OpenEscape)?;
                    word.get_or_insert_default().push(next);
                }
                blank if blank.is_ascii_whitespace() => words.extend(word.take()),
                other => word.get_or_insert_default().push(other),
            }
        }
        words.extend(word);
        if words.first().is_none_or(String::is_empty) {
            return Err(NotACommand::Empty);
        }
        Ok(Self(words))
    }

    /// The program: a name that is searched for on `PATH`, or a path.
    #[must_use]
    pub fn program(&self) -> &str {
        self.0.first().map_or("", String::as_str)
    }

    /// What the line itself passes to it.
    #[must_use]
    pub fn arguments(&self) -> &[String] {
        self.0.get(1..).unwrap_or_default()
    }

    /// What the log calls it: the program alone, as arguments may hold what a log must not.
    #[must_use]
    pub fn name(&self) -> &str {
        self.program().rsplit('/').next().unwrap_or_default()
    }
}

fn quoted(rest: &mut std::str::Chars<'_>, word: &mut String) -> Result<(), NotACommand> {
    for character in rest {
        match character {
            '\'' => return Ok(()),
            other => word.push(other),
        }
    }
    Err(NotACommand::OpenQuote)
}

/// Within double quotes a backslash quotes only itself and the mark; before anything else it is itself.
fn double_quoted(rest: &mut std::str::Chars<'_>, word: &mut String) -> Result<(), NotACommand> {
    while let Some(character) = rest.next() {
        match character {
            '"' => return Ok(()),
            '\\' => match rest.next().ok_or(NotACommand::OpenQuote)? {
                quoted @ ('"' | '\\') => word.push(quoted),
                other => word.extend(['\\', other]),
            },
            other => word.push(other),
        }
    }
    Err(NotACommand::OpenQuote)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_taken_apart_as_python_takes_it() {
        for (line, words) in [
            ("/bin/true", &["/bin/true"][..]),
            ("  a   b\tc ", &["a", "b", "c"]),
            ("a 'b c' \"d e\"", &["a", "b c", "d e"]),
            (r#"a b\ c "d\"e" "f\g" 'h\i'"#, &["a", "b c", "d\"e", "f\\g", "h\\i"]),
            ("a '' \"\"", &["a", "", ""]),
            ("a $HOME * | # x", &["a", "$HOME", "*", "|", "#", "x"]),
            ("pre'fi'x=\"1 2\"", &["prefix=1 2"]),
        ] {
            let parsed = Words::parse(line).expect("a command");
            assert_eq!(parsed.program(), words[0], "{line}");
            assert_eq!(parsed.arguments(), &words[1..], "{line}");
        }
        for (line, why) in [
            ("", NotACommand::Empty),
            ("  ", NotACommand::Empty),
            ("''", NotACommand::Empty),
            ("a 'b", NotACommand::OpenQuote),
            ("a \"b\\", NotACommand::OpenQuote),
            ("a \\", NotACommand::OpenEscape),
        ] {
            assert_eq!(Words::parse(line), Err(why), "{line}");
        }
        assert_eq!(
            Words::parse("/opt/x/hook.sh --secret=1").map(|words| words.name().to_owned()),
            Ok("hook.sh".to_owned())
        );
    }
}
