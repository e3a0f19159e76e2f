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

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;

use crate::args::{Arguments, Command};
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
    if patroni::is_called(std::env::args_os()) {
        return match patroni::Arguments::try_parse() {
            Ok(arguments) => report(patroni::run(&arguments)),
            Err(error) => not_understood(&error),
        };
    }
    match Arguments::try_parse() {
        Ok(arguments) => report(dispatch(&arguments.command)),
        Err(error) => not_understood(&error),
    }
}

fn not_understood(error: &clap::Error) -> ExitCode {
    // Nothing is left to tell when the terminal is gone.
    let _ = error.print();
    let asked_for = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    if asked_for {
        ExitCode::SUCCESS
    } else {
        Failure::Configuration(Vec::new()).exit_code()
    }
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
        Command::List(args) => run::in_foreground(command::list::run(args)),
        Command::Switchover(args) => run::in_foreground(command::switchover::run(args)),
        Command::Check(args) => command::check::run(args),
    }
}
