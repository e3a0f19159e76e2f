//! Lines for whoever started the command. A reader that has gone, as in `pgherd list | head`, is no failure of ours.

use std::io::Write;

/// Writes one line, or several, to standard output.
pub(crate) fn say(text: impl AsRef<str>) {
    let mut out = std::io::stdout().lock();
    let _ = writeln!(out, "{}", text.as_ref()).and_then(|()| out.flush());
}
