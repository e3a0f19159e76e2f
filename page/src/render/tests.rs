use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::acting::Order;
use crate::fixtures;
use crate::render::sheet::Sheet;

#[test]
fn the_questions_are_answered_in_the_order_in_which_they_are_asked() {
    let (state, ring) = (fixtures::state(), Ring::default());
    let html = fixtures::page(&state, &ring).whole();
    let places: Vec<Option<usize>> = [
        "WRITABLE",
        "Who is suffering?",
        "What happened?",
        "What may I safely do?",
        "Members",
    ]
    .iter()
    .map(|text| html.find(&format!(">{text}<")))
    .collect();
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{places:?}");
    assert!(html.contains("0.750 s") && html.contains("Nobody, as far as this page can see."));
}

#[test]
fn nothing_in_the_markup_needs_more_than_the_policy_lets_in() {
    let (state, ring) = (fixtures::state(), Ring::default());
    let html = fixtures::page(&state, &ring).whole();
    for forbidden in [
        "style=",
        "<style",
        " onclick",
        " onload",
        "javascript:",
        "http://",
        "https://",
        "src=\"//",
    ] {
        assert!(!html.contains(forbidden), "{forbidden} in {html}");
    }
    assert_eq!(html.matches("<script").count(), 1);
}

#[test]
fn every_link_to_an_action_leads_to_its_order() {
    let (state, ring) = (fixtures::state(), Ring::default());
    let html = fixtures::page(&state, &ring).whole();
    let links = html
        .split("href=\"/stats/act?")
        .skip(1)
        .filter_map(|rest| rest.split('"').next());
    let orders: Vec<_> = links
        .map(|query| Order::of_query(&query.replace("&amp;", "&")))
        .collect();
    assert!(
        orders.len() == 2 + 4 + 4 + 1 && orders.iter().all(Option::is_some),
        "{orders:?}"
    );
    let refused = Page {
        acting: &Acting::Refused("no password".to_owned()),
        ..fixtures::page(&state, &ring)
    };
    assert!(!refused.whole().contains("/stats/act"));
}

#[test]
fn the_last_hour_is_drawn_from_what_was_sampled() {
    let mut state = fixtures::state();
    let mut ring = Ring::default();
    for step in 0..400_u64 {
        let at = fixtures::NOW - Duration::from_secs(10 * (400 - step));
        assert!(ring.is_due(at));
        state.members[0].bytes_total = step * 1000;
        state.members[2].lag_bytes = Some(step);
        ring.sample(&state, at);
        assert!(!ring.is_due(at + Duration::from_secs(9)));
    }
    assert_eq!(ring.points().len(), 360);
    let html = fixtures::page(&state, &ring).whole();
    assert!(
        html.contains("class=\"line line0\"") && html.contains("class=\"line line2\""),
        "{html}"
    );
    assert!(!html.contains("NaN") && !html.contains("inf"));
}

#[test]
fn a_form_carries_what_it_was_made_for() {
    let state = fixtures::state();
    let order = Order::of_query("do=switchover&member=n2").expect("whole");
    let forecast = [("log to receive".to_owned(), "<0 B>".to_owned())];
    let sheet = Sheet {
        order: &order,
        state: &state,
        paths: Paths { root: "/stats" },
        forecast: &forecast,
        token: "t0",
    };
    let html = sheet.html();
    for part in [
        "value=\"t0\"",
        "value=\"n1@33 watching -\"",
        "method=\"post\"",
        "&lt;0 B&gt;",
    ] {
        assert!(html.contains(part), "{part} in {html}");
    }
    // It must not be replaced under the hands of who types.
    assert!(!html.contains("<script") && !html.contains("http-equiv"));
}

proptest! {
    #[test]
    fn no_text_gets_out_of_its_place(text in "[<>&\"'a-z\\PC]*") {
        let mut state = fixtures::state();
        state.verdict.sentence.clone_from(&text);
        state.members[1].name.clone_from(&text);
        state.members[2].left_out = Some(text.clone());
        state.listeners[0].name.clone_from(&text);
        state.events[0].text.clone_from(&text);
        let ring = Ring::default();
        let html = fixtures::page(&state, &ring).whole();
        let plain = fixtures::page(&fixtures::state(), &ring).whole();
        let tags = |html: &str, tag: &str| html.matches(tag).count();
        prop_assert_eq!(tags(&html, "<script"), tags(&plain, "<script"));
        for piece in html.split('<').skip(1) {
            let known = ["!", "/", "a ", "b>", "b ", "body", "br", "code", "defs", "div", "fig", "g ", "h1", "h2", "h3", "head", "html",
                "li", "link", "main", "marker", "meta", "nos", "ol", "p>", "p ", "path", "rect", "script", "section", "small", "span",
                "svg", "t", "ul"];
            prop_assert!(known.iter().any(|tag| piece.starts_with(tag)), "<{}", piece);
        }
    }
}
