//! What may I safely do: links to forms, each of which says first what it would do.

use maud::{Markup, html};

use super::{Acting, Page};
use crate::acting::Action;

pub(super) fn actions(page: &Page<'_>) -> Markup {
    html! {
        h2 { "What may I safely do?" }
        @match page.acting {
            Acting::Refused(why) => p { (why) },
            Acting::Allowed => (links(page)),
        }
    }
}

fn links(page: &Page<'_>) -> Markup {
    let state = page.state;
    let of_the_cluster = if state.paused { Action::Resume } else { Action::Pause };
    let link = |action: Action, member: Option<&str>| {
        let query = form_urlencoded::Serializer::new(String::new())
            .append_pair("do", action.word())
            .extend_pairs(member.map(|member| ("member", member)))
            .finish();
        html! { a href={ (page.paths.of("act")) "?" (query) } { (action.label()) } }
    };
    html! {
        p { "Each asks first, says what it would meet, and changes nothing until you have typed a name." }
        table.actions {
            @for member in &state.members {
                tr {
                    th scope="row" { (member.name) }
                    td {
                        @for (index, action) in Action::of_member(state.leads(&member.name)).iter().enumerate() {
                            @if index > 0 { " " }
                            (link(*action, Some(&member.name)))
                        }
                    }
                }
            }
            tr {
                th scope="row" { (state.scope) }
                td { (link(of_the_cluster, None)) }
            }
        }
    }
}
