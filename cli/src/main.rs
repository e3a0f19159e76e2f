//! The binary: reads arguments and configuration, wires the parts together, and turns outcomes into exit codes.

mod agent_reload;
mod args;
mod command;
mod config;
mod demo;
mod failure;
mod logging;
mod open_files;
mod patroni;
mod preflight;
mod reload;
mod run;
mod source;
mod takeover;
mod terminal;

use std::ffi::{OsStr, OsString};
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::args::{Arguments, Command, Patronictl, Reach};
use crate::command::Tool;
use crate::failure::Failure;

fn main() -> ExitCode {
    // A keeper asks the program that is to replace it, and then becomes it. Neither may depend on arguments or on a
    // configuration, which an upgrade may find spoiled while PostgreSQL runs.
    if let Some(answer) = pgherd_keeper::dry_start() {
        return answer;
    }
    if let Some(ended) = pgherd_keeper::resume() {
        return report(run::keeper_ended(ended));
    }
    let words: Vec<OsString> = std::env::args_os().collect();
    if called(words.first()).is_some_and(|name| name == "patronictl") {
        return patronictl(words);
    }
    if patroni::is_called(words.iter().cloned()) {
        return match patroni::Arguments::try_parse_from(words) {
            Ok(arguments) => report(patroni::run(&arguments)),
            Err(error) => usage(&error, Failure::Configuration(Vec::new()).exit_code()),
        };
    }
    match Arguments::read(words) {
        Ok(arguments) => report(dispatch(&arguments.command)),
        Err(error) => usage(&error, Failure::Configuration(Vec::new()).exit_code()),
    }
}

/// The name that we were called by, without its directory.
fn called(word: Option<&OsString>) -> Option<&OsStr> {
    Path::new(word?).file_name()
}

/// Patronictl's command line, with its exit codes: 2 for a mistake in it, 1 for every other failure.
fn patronictl(words: Vec<OsString>) -> ExitCode {
    let Patronictl { reach, command } = match Patronictl::try_parse_from(words) {
        Ok(patronictl) => patronictl,
        Err(error) => return usage(&error, ExitCode::from(2)),
    };
    match run::in_foreground(command::run(&command, &reach, Tool::Patronictl)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            for (index, line) in failure.to_string().lines().enumerate() {
                let is_bare = index > 0 || line == "Aborted!";
                eprintln!("{}{line}", if is_bare { "" } else { "Error: " });
            }
            ExitCode::FAILURE
        }
    }
}

fn usage(error: &clap::Error, code: ExitCode) -> ExitCode {
    // Nothing is left to tell when the terminal is gone.
    let _ = error.print();
    let asked_for = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    if asked_for { ExitCode::SUCCESS } else { code }
}

fn report(result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            for line in failure.to_string().lines() {
                eprintln!("pgherd: {line}");
            }
            failure.exit_code()
        }
    }
}

fn dispatch(command: &Command) -> Result<(), Failure> {
    match command {
        Command::Agent(args) => run::member(args.path(), run::Beside::Nothing),
        Command::Node(args) => run::member(args.path(), run::Beside::Proxy),
        Command::Proxy(args) => run::proxy(args.config.path(), args.takeover),
        Command::Sentinel(args) => run::sentinel(&args.data_dir),
        Command::Demo(args) => run::in_foreground(demo::run(args)),
        Command::Operate(command) => run::in_foreground(command::run(command, &Reach::default(), Tool::Pgherd)),
        Command::Check(args) => command::check::run(args),
    }
}
