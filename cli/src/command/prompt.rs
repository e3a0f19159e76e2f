//! Questions to an operator.

use std::io::{BufRead, BufReader, IsTerminal, Write};

use super::Tool;
use crate::failure::Failure;

/// Asks, where somebody can answer.
pub(crate) struct Prompter<'a> {
    input: Box<dyn BufRead + 'a>,
    output: Box<dyn Write + 'a>,
    /// Whether there is anybody.
    can_ask: bool,
    /// What else can be said.
    instead: &'static str,
}

impl Prompter<'static> {
    /// At the terminal, or, as patronictl, whatever standard input is.
    pub(crate) fn of_terminal(tool: Tool, instead: &'static str) -> Self {
        let stdin = std::io::stdin();
        Self {
            can_ask: tool == Tool::Patronictl || stdin.is_terminal(),
            // Not locked: a configuration may come in by it, too.
            input: Box::new(BufReader::new(stdin)),
            output: Box::new(std::io::stdout()),
            instead,
        }
    }
}

impl<'a> Prompter<'a> {
    /// With these answers.
    #[cfg(test)]
    pub(crate) fn scripted(answers: &'a str, output: &'a mut Vec<u8>) -> Self {
        Self {
            input: Box::new(answers.as_bytes()),
            output: Box::new(output),
            can_ask: true,
            instead: "",
        }
    }

    /// One question; nothing for an empty answer.
    ///
    /// # Errors
    /// When nobody can answer, or the input ends.
    pub(crate) fn ask(&mut self, question: &str) -> Result<Option<String>, Failure> {
        self.ensure_somebody_answers()?;
        let aborted = |_| Failure::Refused("Aborted!".to_owned());
        write!(self.output, "{question}")
            .and_then(|()| self.output.flush())
            .map_err(aborted)?;
        let mut line = String::new();
        if self.input.read_line(&mut line).map_err(aborted)? == 0 {
            return Err(Failure::Refused("Aborted!".to_owned()));
        }
        Ok(Some(line.trim().to_owned()).filter(|answer| !answer.is_empty()))
    }

    /// A question for yes or no, which is no unless yes.
    ///
    /// # Errors
    /// As for [`Self::ask`].
    pub(crate) fn confirms(&mut self, question: &str) -> Result<bool, Failure> {
        let answer = self.ask(&format!("{question} [y/N]: "))?.unwrap_or_default();
        Ok(["y", "yes"].contains(&answer.to_lowercase().as_str()))
    }

    /// Says what else can be said when nobody can be asked: best before anything is printed.
    ///
    /// # Errors
    /// When nobody can.
    pub(crate) fn ensure_somebody_answers(&self) -> Result<(), Failure> {
        if self.can_ask {
            return Ok(());
        }
        Err(Failure::configuration(format!(
            "standard input is not a terminal, so nothing can be asked; say {}",
            self.instead
        )))
    }
}
