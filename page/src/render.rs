//! The page as HTML: sections that are complete without a script, and that a script replaces one by one.

mod actions;
mod cluster;
mod past;
mod sheet;
mod verdict;

pub use sheet::{Sheet, notice};

use maud::{DOCTYPE, Markup, PreEscaped, html};
use pgherd_cluster::clock::Boottime;

use crate::headers::Paths;
use crate::model::{Mood, State, Teller};
use crate::ring::Ring;

/// Whether somebody may act from the page, and if not, why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Acting {
    /// By links to forms.
    Allowed,
    /// Nothing can be changed from here, for this reason.
    Refused(String),
}

/// What a page is made of.
pub struct Page<'a> {
    /// What it shows.
    pub state: &'a State,
    /// The last hour.
    pub ring: &'a Ring,
    /// When.
    pub now: Boottime,
    /// Whether it offers to act.
    pub acting: &'a Acting,
    /// Where it is served.
    pub paths: Paths,
}

/// A part of the page that changes as one.
pub struct Section {
    /// Its `id` in the page.
    pub id: &'static str,
    /// What is in it.
    pub html: String,
}

impl Page<'_> {
    /// What changes, from top to bottom.
    #[must_use]
    pub fn sections(&self) -> Vec<Section> {
        let parts: [(&'static str, Markup); 8] = [
            ("verdict", verdict::verdict(self.state)),
            ("suffering", verdict::suffering(self)),
            ("picture", cluster::picture(self.state)),
            ("happened", past::happened(self.state)),
            ("actions", actions::actions(self)),
            ("members", cluster::members(self.state)),
            ("clients", cluster::clients(self.state)),
            ("hour", past::hour(self)),
        ];
        let mut sections: Vec<Section> = parts.into_iter().map(section).collect();
        sections.push(section(("events", past::events(self.state))));
        sections.push(section(("source", verdict::source(self.state))));
        sections
    }

    /// The whole page.
    #[must_use]
    pub fn whole(&self) -> String {
        let title = format!("{} {}", self.state.verdict.word, self.state.scope);
        let main = html! {
            @for section in self.sections() {
                section id=(section.id) { (PreEscaped(section.html)) }
            }
        };
        frame(&title, self.state, self.paths, Life::Follows, &main)
    }
}

fn section((id, html): (&'static str, Markup)) -> Section {
    let html = html.into_string();
    Section { id, html }
}

/// Whether a page follows the cluster.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    /// With a script by events, without one by being loaded again.
    Follows,
    /// It asks or tells something: it stays as it is.
    Stays,
}

fn frame(title: &str, state: &State, paths: Paths, life: Life, main: &Markup) -> String {
    let follows = life == Life::Follows;
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                @if follows { noscript { meta http-equiv="refresh" content="5"; } }
                title { (title) " - pgherd" }
                link rel="icon" type="image/svg+xml" href=(paths.of("icon.svg"));
                link rel="stylesheet" href=(paths.of("page.css"));
                @if follows { script src=(paths.of("page.js")) defer {} }
            }
            body data-live=[follows.then(|| paths.of("live"))] {
                header {
                    h1 { a href=(paths.root) { (state.scope) } }
                    p { (teller(&state.teller)) @if follows { " " span #live role="status" { "as of this moment" } } }
                }
                main { (main) }
            }
        }
    };
    page.into_string()
}

fn teller(teller: &Teller) -> String {
    match teller {
        Teller::Proxy => "as this proxy sees it".to_owned(),
        Teller::Agent { name, .. } => format!("as the agent of {name} sees it"),
    }
}

const fn mood(mood: Mood) -> &'static str {
    match mood {
        Mood::Good => "good",
        Mood::Wait => "wait",
        Mood::Bad => "bad",
    }
}

/// A moment: when, for machines and who wants it exactly, and how long ago.
fn moment(at: &str, age_seconds: f64) -> Markup {
    html! { time datetime=(at) title=(at) { (crate::words::ago(age_seconds)) } }
}

#[cfg(test)]
mod tests;
