//! What a member said to an order, in patronictl's words.

use pgherd_cluster::http::Answer;

use super::site::NoAnswer;
use crate::failure::Failure;
use crate::terminal::say;

/// Orders to several members: every outcome is printed, and one that failed makes the whole fail.
#[derive(Debug, Default)]
pub(crate) struct Outcomes {
    failed: usize,
}

impl Outcomes {
    /// Notes a success.
    pub(crate) fn done(&mut self, text: impl AsRef<str>) {
        say(text);
    }

    /// Notes a failure.
    pub(crate) fn failed(&mut self, text: impl AsRef<str>) {
        self.failed += 1;
        say(text);
    }

    /// Notes what a member said to `action`; whether it did it.
    pub(crate) fn note(&mut self, action: &str, member: &str, answer: &Result<Answer, NoAnswer>) -> bool {
        let done = answer.as_ref().is_ok_and(|answer| answer.status == 200);
        if done {
            self.done(format!("Success: {action} {} member {member}", preposition(action)));
        } else {
            self.failed(failed(action, member, answer));
        }
        done
    }

    /// Whether all went well.
    ///
    /// # Errors
    /// When one did not. What has been printed says why.
    pub(crate) fn end(self) -> Result<(), Failure> {
        if self.failed == 0 {
            Ok(())
        } else {
            Err(Failure::Ended(1))
        }
    }
}

fn preposition(action: &str) -> &'static str {
    if action == "restart" { "on" } else { "for" }
}

/// Why it was not done.
pub(crate) fn failed(action: &str, member: &str, answer: &Result<Answer, NoAnswer>) -> String {
    match answer {
        Ok(answer) => format!(
            "Failed: {action} for member {member}, status code={}, ({})",
            answer.status,
            text_of(answer)
        ),
        Err(no_answer) => format!("Failed: {action} for member {member}: {}", no_answer.why),
    }
}

/// What a member said; of a page of HTML only its message.
pub(crate) fn text_of(answer: &Answer) -> String {
    let text = answer.text();
    let message = text.split_once("<p>Message: ").map(|(_, rest)| rest);
    match message.and_then(|rest| rest.split_once("</p>")) {
        Some((message, _)) => message.trim_end_matches('.').to_owned(),
        None => text.trim_end().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, text: &str) -> Answer {
        Answer {
            status,
            body: text.to_owned().into(),
        }
    }

    #[test]
    fn a_refusal_is_told_as_patronictl_tells_it() {
        let refused = Ok(answer(401, "no auth header received"));
        assert_eq!(
            failed("restart", "node3", &refused),
            "Failed: restart for member node3, status code=401, (no auth header received)"
        );
        let page = Ok(answer(
            501,
            "<html>\n<p>Error code: 501</p>\n<p>Message: not in this version.</p>\n</html>",
        ));
        assert_eq!(
            failed("reload", "n1", &page),
            "Failed: reload for member n1, status code=501, (not in this version)"
        );
        let mut outcomes = Outcomes::default();
        assert!(!outcomes.note("reinitialize", "n1", &refused));
        assert_eq!(outcomes.end(), Err(Failure::Ended(1)));
    }
}
