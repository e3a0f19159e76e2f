//! `pgherd switchover`: patronictl's conversation, then one request to the leader's REST interface.
//!
//! Departs from patronictl in one thing: a switchover that the member refused ends with exit code 1, so that scripts see it.

use std::io::{BufRead, IsTerminal, Write};
use std::time::Duration;

use pgherd_agent::config::Credentials;
use pgherd_cluster::etcd::Etcd;
use pgherd_cluster::http::{Answer, Ask, HttpError, ask};
use pgherd_cluster::record::Address;
use pgherd_cluster::view::{ShownRole, View};
use serde_json::{Map, Value};

use super::{list, read_view, utc_now};
use crate::args::{Format, SwitchoverArgs};
use crate::config::Document;
use crate::failure::Failure;
use crate::terminal::say;

/// The member answers when the switchover is over, or has failed, or after its own limit.
const REST_TIMEOUT: Duration = Duration::from_secs(30);

/// Who gives and who takes; an absent candidate leaves the choice to the members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) leader: String,
    pub(crate) candidate: Option<String>,
}

/// Runs the command.
///
/// # Errors
/// When it makes no sense, was not confirmed, could not be asked for, or was refused.
pub(crate) async fn run(args: &SwitchoverArgs) -> Result<(), Failure> {
    let stdin = std::io::stdin();
    if !args.force && !stdin.is_terminal() {
        return Err(Failure::configuration(
            "standard input is not a terminal, so nothing can be asked; say --force",
        ));
    }
    let document = Document::load(args.config.clone())?;
    let credentials = document.operator_credentials();
    let cluster = document.finish(document.cluster(args.cluster.as_deref()))?;
    let etcd = Etcd::new(cluster.etcd.clone());
    let view = read_view(&etcd, &cluster).await?;

    say("Current cluster topology");
    say(list::render(&view, Format::Pretty, false).trim_end());
    let request = converse(args, &view, &mut stdin.lock(), &mut std::io::stdout())?;
    let answer = ask_leader(&view, &request, credentials.as_ref()).await?;
    if !matches!(answer.status, 200 | 202) {
        return Err(Failure::Refused(format!(
            "Switchover failed, details: {}, {}",
            answer.status,
            answer.text()
        )));
    }
    // patronictl's time has five decimals.
    let time = utc_now("%Y-%m-%d %H:%M:%S.%6f");
    say(format!(
        "{} {}",
        time.get(..time.len().saturating_sub(1)).unwrap_or_default(),
        answer.text()
    ));
    let view = read_view(&etcd, &cluster).await?;
    say(list::render(&view, Format::Pretty, false).trim_end());
    Ok(())
}

/// Fills in what the arguments leave open, by asking, and checks the whole against the view.
pub(crate) fn converse(
    args: &SwitchoverArgs,
    view: &View,
    input: &mut impl BufRead,
    output: &mut impl Write,
) -> Result<Request, Failure> {
    let refused = |text: String| Failure::Refused(format!("Error: {text}"));
    let scope = &view.scope;
    let Some(current) = view.epoch().map(|epoch| epoch.holder.to_string()) else {
        return Err(refused("This cluster has no leader".to_owned()));
    };
    let word = match view.leader_member().map(|member| view.shown_role(member)) {
        Some(ShownRole::StandbyLeader) => "Standby Leader",
        _ => "Primary",
    };
    let leader = match &args.leader {
        Some(leader) => leader.clone(),
        None if args.force => current.clone(),
        None => prompt(&format!("{word} [{current}]: "), input, output)?.unwrap_or_else(|| current.clone()),
    };
    if leader != current {
        return Err(refused(format!("Member {leader} is not the leader of cluster {scope}")));
    }
    let candidates = candidates(view, &current);
    if candidates.is_empty() {
        return Err(refused("No candidates found to switchover to".to_owned()));
    }
    let candidate = match &args.candidate {
        Some(candidate) => Some(candidate.clone()),
        None if args.force => None,
        None => {
            let quoted: Vec<String> = candidates.iter().map(|name| format!("'{name}'")).collect();
            prompt(&format!("Candidate [{}] []: ", quoted.join(", ")), input, output)?
        }
    };
    match &candidate {
        Some(name) if *name == current => {
            return Err(refused(format!(
                "Member {name} is already the leader of cluster {scope}"
            )));
        }
        Some(name) if !candidates.contains(name) => {
            return Err(refused(format!(
                "Member {name} does not exist in cluster {scope} or is tagged as nofailover"
            )));
        }
        _ => {}
    }
    if !args.force {
        let question =
            format!("Are you sure you want to switchover cluster {scope}, demoting current leader {current}? [y/N]: ");
        let answer = prompt(&question, input, output)?.unwrap_or_default().to_lowercase();
        if answer != "y" && answer != "yes" {
            return Err(refused("Aborting switchover".to_owned()));
        }
    }
    Ok(Request { leader, candidate })
}

/// Who may be named: sorted, without the leader and without members that must not lead.
fn candidates(view: &View, leader: &str) -> Vec<String> {
    let others = view
        .members
        .values()
        .filter(|member| member.name.as_str() != leader && !member.record.nofailover());
    others.map(|member| member.name.to_string()).collect()
}

/// One question; nothing for an empty answer.
fn prompt(question: &str, input: &mut impl BufRead, output: &mut impl Write) -> Result<Option<String>, Failure> {
    let aborted = |_| Failure::Refused("Aborted!".to_owned());
    write!(output, "{question}")
        .and_then(|()| output.flush())
        .map_err(aborted)?;
    let mut line = String::new();
    if input.read_line(&mut line).map_err(aborted)? == 0 {
        return Err(Failure::Refused("Aborted!".to_owned()));
    }
    Ok(Some(line.trim().to_owned()).filter(|answer| !answer.is_empty()))
}

async fn ask_leader(view: &View, request: &Request, credentials: Option<&Credentials>) -> Result<Answer, Failure> {
    let record = view.leader_member().map(|member| &member.record);
    let Some(address) = record.and_then(|record| record.api_address()) else {
        return Err(Failure::Unavailable(format!(
            "leader {} publishes no REST address",
            request.leader
        )));
    };
    if record.is_some_and(|record| record.api_url.starts_with("https://")) {
        return Err(Failure::Unavailable(format!(
            "{address} speaks https, which this version does not; use patronictl there"
        )));
    }
    let mut body = Map::from_iter([("leader".to_owned(), Value::from(request.leader.as_str()))]);
    if let Some(candidate) = &request.candidate {
        body.insert("candidate".to_owned(), Value::from(candidate.as_str()));
    }
    let question = Ask {
        method: hyper::Method::POST,
        path: "/switchover".to_owned(),
        json: Some(Value::Object(body)),
        authorization: credentials.map(basic),
    };
    ask(&address, question, REST_TIMEOUT)
        .await
        .map_err(|error| http_failure(&address, &error))
}

fn http_failure(address: &Address, error: &HttpError) -> Failure {
    match error {
        HttpError::Timeout(limit) => Failure::TryAgain(format!(
            "{address} gave no answer within {} s; whether the switchover happened, `pgherd list` tells",
            limit.as_secs()
        )),
        HttpError::Connect { source, .. } => {
            Failure::Unavailable(format!("connecting to the leader's REST at {address}: {source}"))
        }
        HttpError::Protocol(_) => Failure::Unavailable(format!("{address}: {error}")),
    }
}

fn basic(credentials: &Credentials) -> String {
    let Credentials { username, password } = credentials;
    format!(
        "Basic {}",
        base64(format!("{username}:{}", password.as_deref().unwrap_or_default()).as_bytes())
    )
}

/// RFC 4648, section 4.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let byte = |index: usize| u32::from(chunk.get(index).copied().unwrap_or_default());
        let group = byte(0) << 16 | byte(1) << 8 | byte(2);
        for place in 0..4 {
            let sextet = group >> (18 - 6 * place) & 63;
            let letter = ALPHABET.get(sextet as usize).map_or('=', |letter| char::from(*letter));
            text.push(if place <= chunk.len() { letter } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::key::Keys;
    use pgherd_cluster::name::Scope;
    use pgherd_cluster::view::Entry;

    use super::*;

    fn view(leader: Option<&str>) -> View {
        let scope = Scope::new("batman").expect("a plain name");
        let keys = Keys::new("service", &scope);
        let entry = |key: &str, value: &str| Entry {
            key: format!("{}{key}", keys.prefix()),
            value: value.to_owned(),
            create_revision: 1,
            mod_revision: 1,
            lease: 0,
        };
        let plain = r#"{"conn_url":"postgres://h:1/p","api_url":"http://h:2/patroni"}"#;
        let never = r#"{"conn_url":"postgres://h:1/p","api_url":"http://h:2/patroni","tags":{"nofailover":true}}"#;
        let mut entries = vec![
            entry("members/node2", plain),
            entry("members/node1", plain),
            entry("members/node3", plain),
            entry("members/node4", never),
        ];
        entries.extend(leader.map(|leader| entry("leader", leader)));
        View::from_entries(scope.clone(), &keys, entries, 1)
    }

    fn args(leader: Option<&str>, candidate: Option<&str>, force: bool) -> SwitchoverArgs {
        SwitchoverArgs {
            config: None,
            leader: leader.map(Into::into),
            candidate: candidate.map(Into::into),
            force,
            cluster: None,
        }
    }

    fn talk(args: &SwitchoverArgs, view: &View, answers: &str) -> (String, Result<Request, Failure>) {
        let mut output = Vec::new();
        let result = converse(args, view, &mut answers.as_bytes(), &mut output);
        (String::from_utf8(output).expect("text"), result)
    }

    #[test]
    fn the_conversation_is_patronictls() {
        let (asked, result) = talk(&args(None, None, false), &view(Some("node3")), "\nnode2\ny\n");
        assert_eq!(
            asked,
            "Primary [node3]: Candidate ['node1', 'node2'] []: \
             Are you sure you want to switchover cluster batman, demoting current leader node3? [y/N]: "
        );
        assert_eq!(
            result,
            Ok(Request {
                leader: "node3".into(),
                candidate: Some("node2".into())
            })
        );
    }

    #[test]
    fn force_asks_nothing() {
        let (asked, result) = talk(&args(None, None, true), &view(Some("node3")), "");
        assert_eq!(
            (asked.as_str(), result),
            (
                "",
                Ok(Request {
                    leader: "node3".into(),
                    candidate: None
                })
            )
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let leads = || view(Some("node3"));
        for (args, view, answers, expected) in [
            (
                args(None, None, true),
                view(None),
                "",
                "Error: This cluster has no leader",
            ),
            (
                args(Some("node1"), None, true),
                leads(),
                "",
                "Error: Member node1 is not the leader of cluster batman",
            ),
            (
                args(None, Some("node3"), true),
                leads(),
                "",
                "Error: Member node3 is already the leader of cluster batman",
            ),
            (
                args(None, Some("node4"), true),
                leads(),
                "",
                "Error: Member node4 does not exist in cluster batman or is tagged as nofailover",
            ),
            (
                args(None, None, false),
                leads(),
                "\n\nn\n",
                "Error: Aborting switchover",
            ),
            (args(None, None, false), leads(), "\n\n\n", "Error: Aborting switchover"),
            (args(None, None, false), leads(), "\n", "Aborted!"),
        ] {
            assert_eq!(
                talk(&args, &view, answers).1,
                Err(Failure::Refused(expected.to_owned())),
                "{args:?}"
            );
        }
    }

    #[test]
    fn base64_is_rfc_4648s() {
        for (text, expected) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(text.as_bytes()), expected);
        }
    }
}
