//! `/stats`: complete without a script, refreshed in place with one.

use std::fmt::Write;

use super::state::{EventRow, ListenerRow, MemberState, State, span};

const STYLE: &str = "
:root { color-scheme: light dark; --good: #0a6b2d; --bad: #b00020; --wait: #8a5200; --line: #8886; }
@media (prefers-color-scheme: dark) { :root { --good: #5fd38a; --bad: #ff8a80; --wait: #ffc46b; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1rem; margin: 0; } h2 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
.verdict { border: 2px solid; border-radius: .4rem; padding: .5rem .8rem; margin: .6rem 0; font-size: 1.1rem; }
.verdict b { margin-right: .5rem; }
.good { color: var(--good); } .bad { color: var(--bad); } .wait { color: var(--wait); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .15rem .6rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
time, .mono { font-family: ui-monospace, monospace; font-size: .9em; white-space: nowrap; }
footer { margin-top: 1.4rem; font-size: .9em; }
";

const SCRIPT: &str = "
const main = document.querySelector('main'), live = document.getElementById('live');
let busy = false;
const source = new EventSource('/api/v1/stream');
source.addEventListener('state', async () => {
  if (busy) return;
  busy = true;
  try {
    const answer = await fetch('/stats?fragment');
    if (answer.ok) { main.innerHTML = await answer.text(); live.textContent = 'live'; live.className = 'good'; }
  } catch { } finally { busy = false; }
});
source.onerror = () => { live.textContent = 'not live: this proxy does not answer'; live.className = 'bad'; };
";

/// Text as it may stand between tags and in quoted attributes.
struct Escaped<'a>(&'a str);

impl std::fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for c in self.0.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&#39;")?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

fn escaped(text: &str) -> Escaped<'_> {
    Escaped(text)
}

/// A number, or a dash for one that is not known.
fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// The whole page. `nonce` lets its own style and script in.
pub(crate) fn whole(state: &State, nonce: &str) -> String {
    let scope = escaped(&state.scope);
    let body = fragment(state);
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <noscript><meta http-equiv=\"refresh\" content=\"5\"></noscript>\
         <title>{scope} - pgherd proxy</title><style nonce=\"{nonce}\">{STYLE}</style></head>\n\
         <body><h1>{scope} <small>pgherd proxy, <span id=\"live\">as of loading</span></small></h1>\n\
         <main>{body}</main>\n\
         <footer><a href=\"/stats.json\">JSON</a> | <a href=\"/metrics\">metrics</a> | \
         <a href=\"/healthz\">health</a></footer>\n\
         <script nonce=\"{nonce}\">{SCRIPT}</script></body></html>\n"
    )
}

/// What changes.
pub(crate) fn fragment(state: &State) -> String {
    let class = match state.verdict.word {
        "WRITABLE" => "good",
        "HOLDING" | "STARTING" | "STANDBY CLUSTER" => "wait",
        _ => "bad",
    };
    let mut html = format!(
        "<p class=\"verdict {class}\" role=\"status\"><b>{}</b> {}</p>\n",
        escaped(state.verdict.word),
        escaped(&state.verdict.sentence)
    );
    if state.paused {
        html.push_str(
            "<p class=\"wait\"><b>PAUSED</b> the cluster is in maintenance: nothing fails over by itself</p>\n",
        );
    }
    if state.panics > 0 {
        let _ = writeln!(
            html,
            "<p class=\"bad\"><b>DEFECT</b> this proxy has failed {} times within itself: its log says where</p>",
            state.panics
        );
    }
    html.push_str(&view_line(state));
    html.push_str(&members(&state.members));
    html.push_str(&listeners(&state.listeners));
    html.push_str(&events(&state.events));
    html
}

fn view_line(state: &State) -> String {
    let view = &state.view;
    let (class, store) = match view.store {
        "following" => ("good", "the store answers".to_owned()),
        "starting" => ("wait", "the store has not answered yet".to_owned()),
        _ => {
            let error = view.store_error.as_deref().unwrap_or("no reason known");
            ("bad", format!("the store does not answer: {error}"))
        }
    };
    let proof = match view.age_seconds {
        Some(age) => format!("leader confirmed {} ago", span(age)),
        None => "leader never confirmed".to_owned(),
    };
    format!(
        "<p><span class=\"{class}\">{}</span>; {}; revision {}; proxy {} up for {}</p>\n",
        escaped(&store),
        escaped(&proof),
        view.revision,
        escaped(state.version),
        span(state.uptime_seconds)
    )
}

/// A heading and a table; columns that start with `#` are numbers.
fn table(heading: &str, columns: &[&str], rows: impl Iterator<Item = String>) -> String {
    let mut html = format!("<h2>{heading}</h2>\n<div class=\"scroll\"><table><thead><tr>");
    for column in columns {
        match column.strip_prefix('#') {
            Some(column) => html.push_str(&format!("<th class=\"n\" scope=\"col\">{column}</th>")),
            None => html.push_str(&format!("<th scope=\"col\">{column}</th>")),
        }
    }
    html.push_str("</tr></thead><tbody>\n");
    html.extend(rows);
    html.push_str("</tbody></table></div>\n");
    html
}

fn members(members: &[MemberState]) -> String {
    let row = |member: &MemberState| {
        let (class, takes) = match (member.takes, &member.left_out) {
            (Some(takes), _) => ("good", takes),
            (None, Some(why)) => ("bad", why.as_str()),
            (None, None) => ("wait", "-"),
        };
        format!(
            "<tr><td>{}</td><td>{}</td><td>{}</td><td class=\"n\">{}</td><td class=\"n mono\">{}</td>\
             <td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td>\
             <td class=\"n\">{}</td><td class=\"{class}\">{}</td></tr>\n",
            escaped(&member.name),
            escaped(member.role),
            escaped(&member.state),
            or_dash(member.timeline),
            or_dash(member.lsn.as_deref().map(escaped)),
            or_dash(member.lag_bytes),
            or_dash(member.lag_seconds.map(|seconds| format!("{seconds:.1}"))),
            member.sessions_write,
            member.sessions_read,
            format_args!("{:.0} %", member.weight * 100.0),
            escaped(takes)
        )
    };
    let columns = [
        "member", "role", "state", "#TL", "#LSN", "#lag B", "#lag s", "#write", "#read", "#weight", "takes",
    ];
    table("Members", &columns, members.iter().map(row))
}

fn listeners(listeners: &[ListenerRow]) -> String {
    let row = |listener: &ListenerRow| {
        format!(
            "<tr><td class=\"mono\">{}</td><td>{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td>\
             <td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td><td class=\"n\">{}</td></tr>\n",
            escaped(&listener.name),
            escaped(listener.role),
            listener.connections,
            listener.held,
            listener.sessions,
            listener.sessions_total,
            listener.refused_total,
            listener.ended_total
        )
    };
    let columns = [
        "listener",
        "role",
        "#open",
        "#held",
        "#sessions",
        "#total",
        "#refused",
        "#ended by us",
    ];
    table("Listeners", &columns, listeners.iter().map(row))
}

fn events(events: &[EventRow]) -> String {
    let row = |event: &EventRow| {
        let times = if event.count > 1 {
            format!(" ({} times)", event.count)
        } else {
            String::new()
        };
        format!(
            "<tr><td><time>{}</time></td><td class=\"n\">{} ago</td><td>{}{times}</td></tr>\n",
            escaped(&event.at),
            span(event.age_seconds),
            escaped(&event.text)
        )
    };
    table("Last events", &["UTC", "#age", "what"], events.iter().map(row))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn no_text_gets_out_of_its_place(text in "[<>&\"'a-z\\PC]*") {
            let escaped = escaped(&text).to_string();
            prop_assert!(!escaped.contains(['<', '>', '"', '\'']));
            let back = escaped.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", "\"").replace("&#39;", "'").replace("&amp;", "&");
            prop_assert_eq!(back, text);
        }
    }
}
