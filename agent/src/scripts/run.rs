//! Runs what operators configure: as a process group of its own that ends with the future, with its words in our log, in
//! lines of bounded length and number.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncBufRead, AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::words::Words;

/// A longer line is cut there.
const LINE_BYTES_MAX: usize = 1000;
/// After this many lines of one run the rest is read and dropped.
const LINES_MAX: usize = 2000;
/// What a program leaves running behind it may hold its output open; that is waited for no longer than this.
const LAST_WORDS_MAX: Duration = Duration::from_millis(500);
/// How many of its last lines an error quotes.
const QUOTED_LINES: usize = 4;

/// Why a program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It could not be started.
    #[error("{name} cannot be started: {source}")]
    Spawn {
        /// Which.
        name: String,
        /// Why.
        source: std::io::Error,
    },
    /// It ran for too long, and was killed.
    #[error("{name} did not finish within {} s and was killed", .limit.as_secs())]
    Timeout {
        /// Which.
        name: String,
        /// How long it had.
        limit: Duration,
    },
    /// It failed.
    #[error("{name} ended with {status}{}", said(.last))]
    Failed {
        /// Which.
        name: String,
        /// How.
        status: ExitStatus,
        /// The last that it wrote.
        last: Vec<String>,
    },
}

fn said(last: &[String]) -> String {
    if last.is_empty() {
        return String::new();
    }
    format!(": {}", last.join(" | "))
}

/// A program to run, with what it is told.
#[derive(Clone, Debug)]
pub struct Run {
    name: String,
    program: PathBuf,
    arguments: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
}

impl Run {
    /// `program`, called `name` in the log.
    #[must_use]
    pub fn program(name: &str, program: PathBuf) -> Self {
        Self {
            name: name.to_owned(),
            program,
            arguments: Vec::new(),
            env: Vec::new(),
        }
    }

    /// An operator's command with its own arguments. A relative path is one from the agent's working directory, which is the
    /// one that it was started in.
    #[must_use]
    pub fn words(words: &Words) -> Self {
        Self::program(words.name(), PathBuf::from(words.program())).args(words.arguments())
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<OsString>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments
            .extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// What the log calls it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs it to its end; every line that it writes goes to the log. Dropped midway, or too slow, it is killed with every
    /// process of its group.
    ///
    /// # Errors
    /// See [`RunError`].
    pub async fn run(&self, limit: Duration) -> Result<(), RunError> {
        let spawned = |source| RunError::Spawn {
            name: self.name.clone(),
            source,
        };
        let mut command = Command::new(&self.program);
        keep_to_ourselves(&mut command);
        let mut child = command
            .args(&self.arguments)
            .envs(self.env.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(spawned)?;
        let mut group = Group::of(&child);
        let mut words = Listener::of(&mut child, &self.name);
        let ended = timeout(limit, child.wait()).await;
        let status = match ended {
            Ok(status) => status.map_err(spawned)?,
            Err(_) => {
                return Err(RunError::Timeout {
                    name: self.name.clone(),
                    limit,
                });
            }
        };
        group.0 = None; // Its number may be another's from now on.
        let last = words.finish().await;
        if status.success() {
            return Ok(());
        }
        Err(RunError::Failed {
            name: self.name.clone(),
            status,
            last,
        })
    }
}

/// What is meant for us is neither a program's nor that of what it starts: passwords are among it, and the way to the keeper.
pub(crate) fn keep_to_ourselves(command: &mut Command) {
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_ours(name)) {
        command.env_remove(name);
    }
}

/// Variables that configure pgherd itself, or its supervisor's view of it.
fn is_ours(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    ["PATRONI_", "PGHERD_"].iter().any(|prefix| name.starts_with(prefix)) || name == "NOTIFY_SOCKET"
}

/// The group of a child that has not been waited for: until then its number is its own.
struct Group(Option<Pid>);

impl Group {
    fn of(child: &Child) -> Self {
        let pid = child.id().and_then(|id| i32::try_from(id).ok());
        Self(pid.and_then(Pid::from_raw))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            let _ = kill_process_group(group, Signal::KILL); // One that has just ended is as good.
        }
    }
}

/// Reads what a child writes while it runs.
struct Listener {
    readers: JoinSet<Vec<String>>,
}

impl Listener {
    fn of(child: &mut Child, name: &str) -> Self {
        let mut readers = JoinSet::new();
        if let Some(stdout) = child.stdout.take() {
            readers.spawn(log_lines(BufReader::new(stdout), name.to_owned()));
        }
        if let Some(stderr) = child.stderr.take() {
            readers.spawn(log_lines(BufReader::new(stderr), name.to_owned()));
        }
        Self { readers }
    }

    /// Waits a moment for what is still in the pipes; says what came last.
    async fn finish(&mut self) -> Vec<String> {
        let mut last = Vec::new();
        let all = async {
            while let Some(read) = self.readers.join_next().await {
                last.extend(read.unwrap_or_default());
            }
        };
        let _ = timeout(LAST_WORDS_MAX, all).await; // Whoever holds them open still may write on, to nobody.
        self.readers.abort_all();
        last.split_off(last.len().saturating_sub(QUOTED_LINES))
    }
}

async fn log_lines<R: AsyncBufRead + Unpin>(mut source: R, name: String) -> Vec<String> {
    let mut last: Vec<String> = Vec::new();
    let mut count = 0_usize;
    while let Some(line) = next_line(&mut source).await {
        let line = line.trim_end();
        if line.is_empty() {
            continue;
        }
        count += 1;
        if count <= LINES_MAX {
            tracing::info!("{name}: {line}");
        } else if count == LINES_MAX + 1 {
            tracing::warn!("{name}: writes more than {LINES_MAX} lines; the rest is not logged");
        }
        if last.len() == QUOTED_LINES {
            last.remove(0);
        }
        last.push(line.to_owned());
    }
    last
}

/// The next line, cut where it is too long; nothing at the end. What is not printable is replaced, lest it move a terminal's
/// cursor.
async fn next_line<R: AsyncBufRead + Unpin>(source: &mut R) -> Option<String> {
    let mut line = Vec::new();
    let mut any = false;
    loop {
        let buffer = source.fill_buf().await.ok()?;
        if buffer.is_empty() {
            break;
        }
        any = true;
        let end = buffer.iter().position(|byte| *byte == b'\n');
        let part = end.map_or(buffer.len(), |end| end + 1);
        let room = LINE_BYTES_MAX.saturating_sub(line.len());
        line.extend_from_slice(buffer.get(..part.min(room)).unwrap_or_default());
        source.consume(part);
        if end.is_some() {
            break;
        }
    }
    let printable = |text: &str| -> String {
        let shown = |c: char| {
            if c.is_control() && c != '\t' && c != '\n' {
                '?'
            } else {
                c
            }
        };
        text.chars().map(shown).collect()
    };
    any.then(|| printable(&String::from_utf8_lossy(&line)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Run {
        Run::program("hook", PathBuf::from("/bin/sh")).arg("-c").arg(script)
    }

    const LONG: Duration = Duration::from_secs(30);

    #[tokio::test]
    async fn a_failure_tells_how_it_ended_and_what_it_said_last() {
        let failed = sh("echo one; echo two >&2; exit 3").run(LONG).await;
        let text = failed.expect_err("it fails").to_string();
        assert!(text.starts_with("hook ended with exit status: 3: "), "{text}");
        assert!(text.contains("one") && text.contains("two"), "{text}");
        let missing = Run::program("hook", PathBuf::from("/nonexistent/hook")).run(LONG).await;
        let text = missing.expect_err("there is none").to_string();
        assert!(text.starts_with("hook cannot be started: "), "{text}");
        sh("exit 0").run(LONG).await.expect("it succeeds");
    }

    #[tokio::test]
    async fn what_is_too_slow_is_killed_with_all_that_it_started() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("child");
        let run = sh(&format!("sleep 1000 & echo $! > {}; wait", file.display()));
        let limit = Duration::from_millis(800);
        let text = run.run(limit).await.expect_err("too slow").to_string();
        assert!(text.contains("did not finish within 0 s"), "{text}");
        let pid = std::fs::read_to_string(&file).expect("written");
        let gone = async {
            loop {
                let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
                if stat.is_empty() || stat.contains(") Z ") {
                    return;
                }
                tokio::task::yield_now().await;
            }
        };
        timeout(LONG, gone).await.expect("the grandchild has ended");
    }

    #[tokio::test]
    async fn what_is_left_running_does_not_hold_us_up() {
        let begun = std::time::Instant::now();
        sh("sleep 20 & exit 0")
            .run(LONG)
            .await
            .expect("the script itself is done");
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn lines_are_cut_and_made_printable() {
        let text = format!("{}\n\u{1b}[2Jx\nlast", "y".repeat(5000));
        let mut source = BufReader::new(text.as_bytes());
        assert_eq!(
            next_line(&mut source).await.map(|line| line.len()),
            Some(LINE_BYTES_MAX)
        );
        assert_eq!(next_line(&mut source).await.as_deref(), Some("?[2Jx\n"));
        assert_eq!(next_line(&mut source).await.as_deref(), Some("last"));
        assert_eq!(next_line(&mut source).await, None);
    }
}
