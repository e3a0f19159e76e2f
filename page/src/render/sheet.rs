//! Pages that ask or tell one thing: a form to confirm, and what came of it.

use maud::html;

use super::{Life, frame, mood};
use crate::acting::Order;
use crate::headers::Paths;
use crate::model::{Mood, State};

/// The form that confirms an order.
pub struct Sheet<'a> {
    /// What is to be done.
    pub order: &'a Order,
    /// The cluster as it is.
    pub state: &'a State,
    /// Where the page is.
    pub paths: Paths,
    /// What it would meet, as far as somebody could be asked: what, and how it is.
    pub forecast: &'a [(String, String)],
    /// From the desk.
    pub token: &'a str,
}

impl Sheet<'_> {
    /// As HTML.
    #[must_use]
    pub fn html(&self) -> String {
        let Self { order, state, .. } = self;
        let to_type = order.to_type(&state.scope);
        let title = format!(
            "{}: {}",
            order.member.as_deref().unwrap_or(&state.scope),
            order.action.label()
        );
        let main = html! {
            section #confirm {
                h2 { (title) "?" }
                p { (order.action.consequence()) }
                @if !self.forecast.is_empty() {
                    table.forecast { tbody { @for (what, how) in self.forecast {
                        tr { th scope="row" { (what) } td { (how) } }
                    } } }
                }
                form method="post" action=(self.paths.of("act")) autocomplete="off" {
                    input type="hidden" name="do" value=(order.action.word());
                    @if let Some(member) = &order.member { input type="hidden" name="member" value=(member); }
                    input type="hidden" name="token" value=(self.token);
                    input type="hidden" name="decides" value=(state.decides());
                    p {
                        label for="typed" { "Type " b { (to_type) } " to confirm" }
                        input #typed type="text" name="typed" required autofocus spellcheck="false" autocapitalize="off";
                        button type="submit" { (order.action.label()) }
                        " " a href=(self.paths.root) { "or leave it" }
                    }
                }
                p { small { "This form is good for five minutes, once, and only while the cluster stays as it is now: " code { (state.decides()) } "." } }
            }
        };
        frame(&title, state, self.paths, Life::Stays, &main)
    }
}

/// What came of something.
#[must_use]
pub fn notice(state: &State, paths: Paths, of: Mood, title: &str, text: &str) -> String {
    let main = html! {
        section #outcome {
            div.verdict.(mood(of)) role="status" {
                p.word { (title) }
                p.sentence { (text) }
            }
            p { a href=(paths.root) { "Back to the page" } }
        }
    };
    frame(title, state, paths, Life::Stays, &main)
}
