//! Lines for whoever started the command. A reader that has gone, as in `pgherd list | head`, is no failure of ours.

use std::io::{BufRead, BufReader, Write};

use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

use crate::failure::Failure;

/// Writes one line, or several, to standard output.
pub(crate) fn say(text: impl AsRef<str>) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{}", text.as_ref()).and_then(|()| out.flush());
}

/// Writes a text to standard output as it is.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Asks for a secret at the terminal, where it is not shown.
///
/// # Errors
/// When there is no terminal.
pub(crate) fn read_secret(question: &str) -> Result<String, Failure> {
    let no_terminal = |error: std::io::Error| {
        Failure::configuration(format!(
            "no terminal to ask for a password at ({error}); set PGPASSWORD or PGPASSFILE"
        ))
    };
    let mut terminal = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/tty")
        .map_err(no_terminal)?;
    let before = tcgetattr(&terminal).map_err(|error| no_terminal(error.into()))?;
    let mut quiet = before.clone();
    quiet.local_modes.remove(LocalModes::ECHO);
    write!(terminal, "{question}").map_err(no_terminal)?;
    tcsetattr(&terminal, OptionalActions::Flush, &quiet).map_err(|error| no_terminal(error.into()))?;
    let mut line = String::new();
    let read = BufReader::new(&terminal).read_line(&mut line);
    let restored = tcsetattr(&terminal, OptionalActions::Flush, &before);
    let _ = writeln!(terminal);
    read.map_err(no_terminal)?;
    restored.map_err(|error| no_terminal(error.into()))?;
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}
