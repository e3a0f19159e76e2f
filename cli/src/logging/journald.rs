//! Lines for journald with their fields, where systemd has connected standard error to it.
//!
//! By its native protocol (`systemd.io/JOURNAL_NATIVE_PROTOCOL`), which is a datagram of fields: few enough lines to have here,
//! with the socket's path an argument, so that a test reads what is sent. What cannot be sent goes to standard error, which
//! ends in the journal too.

use std::fmt::{self, Write};
use std::io::{self, Write as _};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer};

/// Where journald listens.
pub(super) const SOCKET: &str = "/run/systemd/journal/socket";
/// Set by systemd to the device and inode of what standard error is connected to.
const STREAM_VARIABLE: &str = "JOURNAL_STREAM";
/// A journald that takes nothing for so long is gone around.
const SEND_MAX: Duration = Duration::from_secs(1);
/// Larger than any line of ours, and smaller than what a datagram may be.
const TEXT_BYTES_MAX: usize = 32 << 10;

/// Whether standard error goes to journald, by systemd's word and by what it is connected to: a child may have inherited the
/// variable and been given another.
pub(super) fn has_stderr() -> bool {
    let Ok(told) = std::env::var(STREAM_VARIABLE) else {
        return false;
    };
    rustix::fs::fstat(io::stderr()).is_ok_and(|stat| is_stream(&told, stat.st_dev, stat.st_ino))
}

fn is_stream(told: &str, device: u64, inode: u64) -> bool {
    told.split_once(':')
        .is_some_and(|(one, other)| one.parse() == Ok(device) && other.parse() == Ok(inode))
}

/// Sends lines to journald.
pub(super) struct Journald {
    socket: UnixDatagram,
}

impl Journald {
    /// Connects.
    ///
    /// # Errors
    /// When nobody listens there.
    pub(super) fn connect(path: &Path) -> io::Result<Self> {
        let socket = UnixDatagram::unbound()?;
        socket.connect(path)?;
        socket.set_write_timeout(Some(SEND_MAX))?;
        Ok(Self { socket })
    }
}

impl<S: Subscriber> Layer<S> for Journald {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let entry = Entry::of(event);
        if self.socket.send(&entry.datagram(event)).is_err() {
            // Nobody is left to be told that this fails too.
            let _ = writeln!(io::stderr(), "{}", entry.message);
        }
    }
}

/// A line: its message with the other fields after it, for who reads, and each by itself, for who searches.
#[derive(Default)]
struct Entry {
    message: String,
    rest: String,
    fields: Vec<(String, String)>,
}

impl Visit for Entry {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message.push_str(value);
        } else {
            // Writing to a text cannot fail.
            let _ = write!(self.rest, " {}={value}", field.name());
            self.fields.push((name(field.name()), value.to_owned()));
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

impl Entry {
    fn of(event: &Event<'_>) -> Self {
        let mut entry = Self::default();
        event.record(&mut entry);
        let rest = std::mem::take(&mut entry.rest);
        entry.message.push_str(&rest);
        entry
    }

    fn datagram(&self, event: &Event<'_>) -> Vec<u8> {
        let meta = event.metadata();
        let priority = match *meta.level() {
            Level::ERROR => "3",
            Level::WARN => "4",
            Level::INFO => "6",
            Level::DEBUG | Level::TRACE => "7",
        };
        let mut bytes = Vec::with_capacity(256 + self.message.len());
        put(&mut bytes, "PRIORITY", priority);
        put(&mut bytes, "SYSLOG_IDENTIFIER", "pgherd");
        put(&mut bytes, "PGHERD_TARGET", meta.target());
        if let (Some(file), Some(line)) = (meta.file(), meta.line()) {
            put(&mut bytes, "CODE_FILE", file);
            put(&mut bytes, "CODE_LINE", &line.to_string());
        }
        for (name, value) in &self.fields {
            put(&mut bytes, name, value);
        }
        put(&mut bytes, "MESSAGE", &self.message);
        bytes
    }
}

/// journald takes capital letters, digits and underscores.
fn name(field: &str) -> String {
    let clean = |c: char| {
        if c.is_ascii_alphanumeric() {
            c.to_ascii_uppercase()
        } else {
            '_'
        }
    };
    format!("PGHERD_{}", field.chars().map(clean).collect::<String>())
}

/// A value of one line as `NAME=value`; another with its length before it.
fn put(bytes: &mut Vec<u8>, name: &str, value: &str) {
    let mut end = value.len().min(TEXT_BYTES_MAX);
    while !value.is_char_boundary(end) {
        end -= 1;
    }
    let value = value.get(..end).unwrap_or_default();
    bytes.extend_from_slice(name.as_bytes());
    if value.contains('\n') {
        bytes.push(b'\n');
        bytes.extend_from_slice(&u64::try_from(value.len()).unwrap_or_default().to_le_bytes());
    } else {
        bytes.push(b'=');
    }
    bytes.extend_from_slice(value.as_bytes());
    bytes.push(b'\n');
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[test]
    fn journald_gets_a_line_with_its_fields() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("socket");
        let listener = UnixDatagram::bind(&path).expect("a socket");
        listener
            .set_read_timeout(Some(Duration::from_secs(20)))
            .expect("a socket");
        let layer = Journald::connect(&path).expect("somebody listens");
        let subscriber = tracing_subscriber::registry().with(layer);
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(event = %"1m7tkqx2p-7f3d", lag_bytes = 17, "two\nlines");
        });
        let mut buffer = [0; 4096];
        let read = listener.recv(&mut buffer).expect("a datagram");
        let text = String::from_utf8_lossy(&buffer[..read]).into_owned();
        for line in [
            "PRIORITY=4\n",
            "SYSLOG_IDENTIFIER=pgherd\n",
            "PGHERD_EVENT=1m7tkqx2p-7f3d\n",
            "PGHERD_LAG_BYTES=17\n",
        ] {
            assert!(text.contains(line), "{line:?} {text:?}");
        }
        let message = "two\nlines event=1m7tkqx2p-7f3d lag_bytes=17";
        let length = u8::try_from(message.len()).expect("short");
        let framed = [
            b"MESSAGE\n".as_slice(),
            &[length, 0, 0, 0, 0, 0, 0, 0],
            message.as_bytes(),
            b"\n",
        ]
        .concat();
        assert!(buffer[..read].ends_with(&framed), "{text:?}");
    }

    #[test]
    fn a_variable_that_was_inherited_is_not_believed() {
        assert!(is_stream("9:4711", 9, 4711));
        for told in ["9:4712", "8:4711", "9", "", "x:y"] {
            assert!(!is_stream(told, 9, 4711), "{told:?}");
        }
    }
}
