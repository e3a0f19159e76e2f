//! The binary under the name `patroni`: its options and its way to be started, so that units, images and scripts that call
//! it go on to work.

mod generate;
mod instance;
mod yaml;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Parser;
use pgherd_cluster::PATRONI_VERSION;

use crate::config::Document;
use crate::failure::Failure;
use crate::preflight;
use crate::run::{self, Beside};
use crate::terminal::say;

/// Our own commands, which a keeper starts its processes with, also where its program is a file named `patroni`.
const OUR_COMMANDS: [&str; 4] = ["agent", "node", "proxy", "sentinel"];

/// Runs one member, as `patroni FILE` does.
#[derive(Debug, Parser)]
#[command(
    name = "patroni",
    version = PATRONI_VERSION,
    about = "pgherd under Patroni's name: runs one member",
    after_help = "This is pgherd: `pgherd --help` shows all that it does."
)]
pub(crate) struct Arguments {
    /// The configuration file, or a directory of .yml files; the environment alone if there is none
    config: Option<PathBuf>,
    /// Check the configuration and this machine, and say nothing if all is well
    #[arg(long)]
    validate_config: bool,
    /// With --validate-config: do not mind ports that are in use
    #[arg(short, long, requires = "validate_config")]
    ignore_listen_port: bool,
    /// With --validate-config: print what was checked, environment included
    #[arg(short, long, requires = "validate_config")]
    print: bool,
    /// Print a configuration to begin with
    #[arg(long, conflicts_with_all = ["validate_config", "generate_config"])]
    generate_sample_config: bool,
    /// Print the configuration of a PostgreSQL that runs
    #[arg(long, conflicts_with = "validate_config")]
    generate_config: bool,
    /// With --generate-config: how to reach it, as "host=... port=... user=..."; $PGHOST, $PGPORT, $PGUSER otherwise
    #[arg(long, requires = "generate_config", value_name = "DSN")]
    dsn: Option<String>,
}

/// Whether the program was called by Patroni's name, and not by a keeper.
pub(crate) fn is_called(mut arguments: impl Iterator<Item = OsString>) -> bool {
    let program = arguments.next().map(PathBuf::from);
    let named = program
        .as_deref()
        .and_then(Path::file_name)
        .is_some_and(|name| name == "patroni");
    let ours = arguments
        .next()
        .is_some_and(|first| OUR_COMMANDS.iter().any(|command| first == *command));
    named && !ours
}

/// Does what the arguments say.
///
/// # Errors
/// What the member ends with; findings in the configuration end with code 1, as Patroni's do.
pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    if arguments.validate_config {
        return validate(arguments).map_err(as_refused);
    }
    // Patroni writes into the file that is named here, and prints without one.
    let put = |text: String| match &arguments.config {
        None => {
            say(text.trim_end());
            Ok(())
        }
        Some(file) => std::fs::write(file, text)
            .map_err(|error| Failure::Refused(format!("{}: cannot be written: {error}", file.display()))),
    };
    if arguments.generate_sample_config {
        return put(yaml::write(&generate::sample(&generate::local_address())));
    }
    if arguments.generate_config {
        let config = run::in_foreground_giving(instance::describe(arguments.dsn.as_deref()))?;
        return put(yaml::write(&config));
    }
    run::member(arguments.config.clone(), Beside::Nothing)
}

fn validate(arguments: &Arguments) -> Result<(), Failure> {
    let document = Document::load(arguments.config.clone())?;
    document.lint();
    document.log(); // For its findings.
    let agent = document.agent();
    let cluster = document.cluster(None);
    if let Some(agent) = &agent {
        let found = preflight::member(&mut agent.clone());
        let in_use = found.in_use.into_iter().filter(|_| !arguments.ignore_listen_port);
        found
            .errors
            .into_iter()
            .chain(in_use)
            .for_each(|finding| document.error(finding));
    }
    document.finish(agent.zip(cluster))?;
    if arguments.print {
        say(yaml::write(document.tree()).trim_end());
    }
    Ok(())
}

fn as_refused(failure: Failure) -> Failure {
    match failure {
        Failure::Configuration(findings) => Failure::Refused(findings.join("\n")),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_holds_together() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn the_name_counts_wherever_it_lies_and_a_keepers_commands_are_ours() {
        let called = |words: &[&str]| is_called(words.iter().map(OsString::from));
        assert!(called(&["patroni", "/etc/patroni.yml"]) && called(&["/usr/bin/patroni"]));
        assert!(!called(&["pgherd", "agent"]) && !called(&["/opt/patroni", "agent", "--config", "x"]));
        assert!(!called(&["/opt/patroni/pgherd"]) && !called(&[]));
    }

    #[test]
    fn options_are_patronis() {
        let parse = |words: &[&str]| Arguments::try_parse_from(std::iter::once(&"patroni").chain(words));
        let read = parse(&["--validate-config", "-i", "/etc/patroni.yml"]).expect("known");
        assert!(read.validate_config && read.ignore_listen_port);
        assert_eq!(read.config.as_deref(), Some(Path::new("/etc/patroni.yml")));
        assert!(parse(&["--generate-config", "--dsn", "host=a"]).is_ok());
        assert!(parse(&["-i"]).is_err() && parse(&["--dsn", "x"]).is_err());
    }
}
