//! One session on the console: simple and extended queries, in bounds.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::yield_now;
use tokio::time::timeout;
use tracing::info;

use super::command::{self, Command};
use super::login::{Guest, ReadError};
use super::show::{Row, Rows, Show};
use crate::connection::farewell;
use crate::refusal;
use crate::shared::Shared;
use crate::wire::console::{Answers, Asked, Block, Cell, Column, Kind, Of};
use crate::wire::error_response::Fatal;

/// A scraper comes more often, and a terminal that was forgotten gives its place back.
const IDLE_MAX: Duration = Duration::from_secs(3600);
/// For the rest of a message, once its first byte has come.
const MESSAGE_MAX: Duration = Duration::from_secs(10);
/// For the client to take what it asked for, so much at a time.
const WRITE_MAX: Duration = Duration::from_secs(10);
const WRITE_BYTES: usize = 64 * 1024;
/// Rows that are made before others on this thread have their turn: their sessions must not feel a long answer.
const ROWS_AT_A_TIME: usize = 64;
/// Prepared statements, and portals, that a client may have.
const NAMED_MAX: usize = 64;

const SYNTAX_ERROR: &str = "42601";
const NO_SUCH_STATEMENT: &str = "26000";
const NO_SUCH_PORTAL: &str = "34000";
const NOT_HERE: &str = "0A000";
const NO_PRIVILEGE: &str = "42501";
const TOO_MANY: &str = "54000";
const IN_FAILED_BLOCK: &str = "25P02";
const CONFIG_FILE_ERROR: &str = "F0000";

/// A command that failed.
struct Failed {
    sqlstate: &'static str,
    message: String,
    hint: Option<&'static str>,
}

impl Failed {
    fn new(sqlstate: &'static str, message: impl Into<String>) -> Self {
        Self {
            sqlstate,
            message: message.into(),
            hint: None,
        }
    }
}

/// Why a session ends.
enum End {
    /// The client has gone, or takes nothing any more.
    Gone,
    Told(Fatal),
}

impl From<io::Error> for End {
    fn from(_: io::Error) -> Self {
        Self::Gone
    }
}

/// A portal: a command, the formats of its columns, and what of its rows has not been sent.
struct Portal {
    command: Command,
    formats: Vec<i16>,
    rows: Option<Rows>,
}

/// Of an answer with rows.
const PARAMETER_KIND: Kind = Kind::Text;

pub(super) struct Session<'a> {
    shared: &'a Arc<Shared>,
    guest: Guest,
    may_reload: bool,
    answers: Answers,
    block: Block,
    statements: BTreeMap<String, Command>,
    portals: BTreeMap<String, Portal>,
    /// Part of an answer may have been sent: nothing else may be said before the rest.
    sends: bool,
    /// An error in a sequence of extended messages: what comes before the next Sync is not looked at.
    skips: bool,
}

impl<'a> Session<'a> {
    pub(super) fn new(shared: &'a Arc<Shared>, guest: Guest, may_reload: bool) -> Self {
        Self {
            shared,
            guest,
            may_reload,
            answers: Answers::default(),
            block: Block::None,
            statements: BTreeMap::new(),
            portals: BTreeMap::new(),
            sends: false,
            skips: false,
        }
    }

    /// Until the client goes, is sent away, or the proxy stops.
    pub(super) async fn run(mut self) {
        let shared = Arc::clone(self.shared);
        let end = tokio::select! {
            end = self.converse() => end,
            () = shared.stopping.cancelled() => End::Told(refusal::stopping()),
        };
        if let End::Told(fatal) = end
            && !self.sends
        {
            farewell(self.guest.into_stream(), &fatal).await;
        }
    }

    async fn converse(&mut self) -> End {
        if !matches!(timeout(WRITE_MAX, self.guest.welcome()).await, Ok(Ok(()))) {
            return End::Gone;
        }
        loop {
            match self.turn().await {
                Ok(true) => {}
                Ok(false) => return End::Gone,
                Err(end) => return end,
            }
        }
    }

    /// One message and its answer; false when it was the last.
    async fn turn(&mut self) -> Result<bool, End> {
        let idle = || Fatal::new("57P05", "terminating console session due to idle-session timeout");
        match timeout(IDLE_MAX, self.guest.something()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Ok(false),
            Err(_) => return Err(End::Told(idle())),
        }
        let asked = match timeout(MESSAGE_MAX, self.guest.message()).await {
            Ok(Ok(asked)) => asked,
            Ok(Err(ReadError::Bad(bad))) => return Err(End::Told(Fatal::new("08P01", bad.to_string()))),
            Ok(Err(ReadError::Gone)) | Err(_) => return Ok(false),
        };
        match asked {
            Asked::Terminate => return Ok(false),
            Asked::Query(text) => {
                self.skips = false;
                self.query(&text).await?;
                self.answers.ready(self.block);
                self.flush().await?;
            }
            Asked::Sync => {
                self.skips = false;
                // A portal lives as long as the transaction that there is not.
                if self.block == Block::None {
                    self.portals.clear();
                }
                self.answers.ready(self.block);
                self.flush().await?;
            }
            Asked::Flush => self.flush().await?,
            Asked::Password(_) => return Err(End::Told(Fatal::new("08P01", "nobody asked for a password"))),
            _ if self.skips => {}
            asked => {
                if let Err(failed) = self.extended(asked).await? {
                    self.fail(&failed);
                    self.skips = true;
                }
                // Whoever never asks for the answers has them sent all the same, and is waited for only so long.
                self.flush_if_long().await?;
            }
        }
        // One that sends without an end must not keep others on this thread from their turn.
        yield_now().await;
        Ok(true)
    }

    async fn flush(&mut self) -> Result<(), End> {
        if self.answers.is_empty() {
            return Ok(());
        }
        self.sends = true;
        match timeout(WRITE_MAX, self.guest.send(&mut self.answers)).await {
            Ok(sent) => sent?,
            Err(_) => return Err(End::Gone),
        }
        self.sends = false;
        Ok(())
    }

    async fn flush_if_long(&mut self) -> Result<(), End> {
        if self.answers.len() < WRITE_BYTES {
            return Ok(());
        }
        self.flush().await
    }

    fn fail(&mut self, failed: &Failed) {
        self.answers.error(failed.sqlstate, &failed.message, failed.hint);
        if self.block == Block::Open {
            self.block = Block::Failed;
        }
    }

    async fn query(&mut self, text: &str) -> Result<(), End> {
        let statements = match command::statements(text) {
            Ok(statements) => statements,
            Err(most) => {
                self.fail(&Failed::new(
                    TOO_MANY,
                    format!("more than {most} statements in one query"),
                ));
                return Ok(());
            }
        };
        if statements.is_empty() {
            self.answers.empty();
        }
        for statement in statements {
            let command = command::read(statement);
            if let Err(failed) = self.admit(&command, statement) {
                self.fail(&failed);
                break;
            }
            let mut portal = Portal {
                command,
                formats: Vec::new(),
                rows: None,
            };
            let columns = columns(&portal.command);
            if !columns.is_empty() {
                self.answers.columns(&columns, &[]);
            }
            if let Err(failed) = self.execute(&mut portal, 0).await? {
                self.fail(&failed);
                break;
            }
        }
        Ok(())
    }

    async fn extended(&mut self, asked: Asked) -> Result<Result<(), Failed>, End> {
        Ok(match asked {
            Asked::Parse { name, text } => self.parse(name, &text),
            Asked::Bind {
                portal,
                statement,
                values,
                formats,
            } => self.bind(portal, &statement, values, formats),
            Asked::Describe(of) => self.describe(&of),
            Asked::Execute { portal, rows } => match self.portals.remove(&portal) {
                Some(mut found) => {
                    let done = self.execute(&mut found, rows).await?;
                    self.portals.insert(portal, found);
                    done
                }
                None => Err(no_portal(&portal)),
            },
            Asked::Close(of) => {
                match of {
                    Of::Statement(name) => drop(self.statements.remove(&name)),
                    Of::Portal(name) => drop(self.portals.remove(&name)),
                }
                self.answers.closed();
                Ok(())
            }
            Asked::Query(_) | Asked::Sync | Asked::Flush | Asked::Terminate | Asked::Password(_) => Ok(()),
        })
    }

    fn parse(&mut self, name: String, text: &str) -> Result<(), Failed> {
        let statements = match command::statements(text) {
            Ok(statements) if statements.len() <= 1 => statements,
            Ok(_) | Err(_) => {
                let message = "cannot insert multiple commands into a prepared statement";
                return Err(Failed::new(SYNTAX_ERROR, message));
            }
        };
        let text = statements.first().copied().unwrap_or_default();
        let command = command::read(text);
        self.admit(&command, text)?;
        if self.statements.len() >= NAMED_MAX && !self.statements.contains_key(&name) {
            return Err(Failed::new(
                TOO_MANY,
                format!("{NAMED_MAX} statements are prepared already"),
            ));
        }
        self.statements.insert(name, command);
        self.answers.parsed();
        Ok(())
    }

    fn bind(&mut self, portal: String, statement: &str, values: usize, formats: Vec<i16>) -> Result<(), Failed> {
        let Some(command) = self.statements.get(statement).cloned() else {
            let message = format!("prepared statement \"{statement}\" does not exist");
            return Err(Failed::new(NO_SUCH_STATEMENT, message));
        };
        if values > 0 {
            return Err(Failed::new(NOT_HERE, "no command of the console takes values"));
        }
        if self.portals.len() >= NAMED_MAX && !self.portals.contains_key(&portal) {
            return Err(Failed::new(TOO_MANY, format!("{NAMED_MAX} portals are open already")));
        }
        let bound = Portal {
            command,
            formats,
            rows: None,
        };
        self.portals.insert(portal, bound);
        self.answers.bound();
        Ok(())
    }

    fn describe(&mut self, of: &Of) -> Result<(), Failed> {
        match of {
            Of::Statement(name) => {
                let Some(command) = self.statements.get(name) else {
                    let message = format!("prepared statement \"{name}\" does not exist");
                    return Err(Failed::new(NO_SUCH_STATEMENT, message));
                };
                self.answers.no_parameters();
                self.answers.columns(&columns(command), &[]);
            }
            Of::Portal(name) => {
                let portal = self.portals.get(name).ok_or_else(|| no_portal(name))?;
                self.answers.columns(&columns(&portal.command), &portal.formats);
            }
        }
        Ok(())
    }

    /// Whether the command is one that can be run at all.
    fn admit(&self, command: &Command, text: &str) -> Result<(), Failed> {
        match command {
            Command::Instead { word, instead } => Err(Failed {
                hint: Some(instead),
                ..Failed::new(
                    NOT_HERE,
                    format!("{} is not a command of this console", word.to_uppercase()),
                )
            }),
            Command::Unknown => {
                let shown: String = text.trim().chars().take(80).collect();
                Err(Failed {
                    hint: Some("SHOW HELP tells what there is."),
                    ..Failed::new(SYNTAX_ERROR, format!("invalid command '{shown}'"))
                })
            }
            Command::Reload if !self.may_reload => {
                Err(Failed::new(NO_PRIVILEGE, "only a user with admin: true may reload"))
            }
            Command::End(_) => Ok(()),
            _ if self.block == Block::Failed => Err(Failed::new(
                IN_FAILED_BLOCK,
                "current transaction is aborted, commands ignored until end of transaction block",
            )),
            _ => Ok(()),
        }
    }

    /// Runs a portal, or goes on with it, for `most` rows or all.
    async fn execute(&mut self, portal: &mut Portal, most: usize) -> Result<Result<(), Failed>, End> {
        match &portal.command {
            Command::Show(show) => {
                let columns = show.columns();
                let mut rows = portal.rows.take().unwrap_or_else(|| show.rows(self.shared));
                if self.rows(&mut rows, columns, &portal.formats, most).await? {
                    self.answers.complete("SHOW");
                } else {
                    self.answers.suspended();
                }
                portal.rows = Some(rows);
            }
            Command::Parameter(name, value) => {
                let columns = [parameter(name)];
                let cell = Cell::Text((*value).to_owned());
                self.answers.row(&columns, &portal.formats, &[cell]);
                self.answers.complete("SHOW");
            }
            Command::Help => {
                self.answers.notice("Console usage", Some(&help()));
                self.answers.complete("SHOW");
            }
            Command::Empty => self.answers.empty(),
            Command::Nothing(tag) => self.answers.complete(tag),
            Command::Begin => {
                self.block = Block::Open;
                self.answers.complete("BEGIN");
            }
            Command::End(tag) => {
                // As PostgreSQL tells whoever commits what has failed.
                let tag = if self.block == Block::Failed { "ROLLBACK" } else { *tag };
                self.block = Block::None;
                self.answers.complete(tag);
            }
            Command::Reload => {
                info!("RELOAD was asked for on the console");
                match self.shared.console.reload().await {
                    Ok(()) => self.answers.complete("RELOAD"),
                    Err(why) => return Ok(Err(Failed::new(CONFIG_FILE_ERROR, format!("RELOAD failed: {why}")))),
                }
            }
            Command::Instead { .. } | Command::Unknown => {} // Refused before.
        }
        Ok(Ok(()))
    }

    /// Sends rows; whether these were the last.
    async fn rows(&mut self, rows: &mut Rows, columns: &[Column], formats: &[i16], most: usize) -> Result<bool, End> {
        let mut sent = 0;
        loop {
            if most > 0 && sent == most {
                return Ok(false);
            }
            let Some(row): Option<Row> = rows.next() else {
                return Ok(true);
            };
            self.answers.row(columns, formats, &row);
            sent += 1;
            if sent.is_multiple_of(ROWS_AT_A_TIME) {
                self.flush_if_long().await?;
                yield_now().await;
            }
        }
    }
}

fn no_portal(name: &str) -> Failed {
    Failed::new(NO_SUCH_PORTAL, format!("portal \"{name}\" does not exist"))
}

const fn parameter(name: &'static str) -> Column {
    Column {
        name,
        kind: PARAMETER_KIND,
    }
}

/// None for what has no rows.
fn columns(command: &Command) -> Vec<Column> {
    match command {
        Command::Show(show) => show.columns().to_vec(),
        Command::Parameter(name, _) => vec![parameter(name)],
        Command::Empty
        | Command::Help
        | Command::Nothing(_)
        | Command::Begin
        | Command::End(_)
        | Command::Reload
        | Command::Instead { .. }
        | Command::Unknown => Vec::new(),
    }
}

fn help() -> String {
    let words: Vec<String> = Show::ALL.iter().map(|(word, _)| word.to_uppercase()).collect();
    let lines: Vec<String> = words
        .chunks(6)
        .map(|words| format!("\tSHOW {}", words.join("|")))
        .collect();
    format!("\n{}\n\tRELOAD", lines.join("\n"))
}
