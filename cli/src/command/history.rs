//! `pgherd history`: the timelines of a cluster, and how its changes of the leader went.

use pgherd_cluster::record::History;
use serde_json::Value;

use super::output::Rows;
use super::site::Scene;
use super::timings;
use crate::args::HistoryArgs;
use crate::failure::Failure;
use crate::terminal::print;

/// Runs the command.
///
/// # Errors
/// Bad configuration; etcd that does not answer.
pub(crate) async fn run(scene: &Scene, args: &HistoryArgs) -> Result<(), Failure> {
    let site = scene.site(args.cluster.cluster.as_deref(), args.cluster.group)?;
    if args.timings {
        return timings::run(&site, args.format, args.url.as_deref()).await;
    }
    let view = site.view().await?;
    let rows = rows(view.history.as_ref());
    print(&rows.render(args.format, "\t"));
    Ok(())
}

fn rows(history: Option<&History>) -> Rows {
    let headings = ["TL", "LSN", "Reason", "Timestamp", "New Leader"];
    let entries = history.map(|history| history.0.as_slice()).unwrap_or_default();
    let text = |text: &Option<String>| Value::from(text.clone().unwrap_or_default());
    Rows {
        headings: headings.map(str::to_owned).to_vec(),
        right: vec![true, true],
        rows: entries
            .iter()
            .map(|entry| {
                vec![
                    entry.timeline.0.into(),
                    entry.lsn.0.into(),
                    entry.reason.as_str().into(),
                    text(&entry.timestamp),
                    text(&entry.new_leader),
                ]
            })
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Format;

    const STORED: &str =
        r#"[[1,67533552,"no recovery target specified","2026-11-20T23:47:37.317976+00:00","node3"],[2,67562736,"x"]]"#;

    #[test]
    fn a_history_is_patronictls() {
        let history = History::parse(STORED);
        let rows = rows(Some(&history));
        let expected = "\
+----+----------+------------------------------+----------------------------------+------------+
| TL |      LSN | Reason                       | Timestamp                        | New Leader |
+----+----------+------------------------------+----------------------------------+------------+
|  1 | 67533552 | no recovery target specified | 2026-11-20T23:47:37.317976+00:00 | node3      |
|  2 | 67562736 | x                            |                                  |            |
+----+----------+------------------------------+----------------------------------+------------+
";
        assert_eq!(rows.render(Format::Pretty, "\t"), expected);
        assert_eq!(
            rows.render(Format::Json, "\t"),
            concat!(
                r#"[{"TL": 1, "LSN": 67533552, "Reason": "no recovery target specified", "#,
                r#""Timestamp": "2026-11-20T23:47:37.317976+00:00", "New Leader": "node3"}, "#,
                r#"{"TL": 2, "LSN": 67562736, "Reason": "x", "Timestamp": "", "New Leader": ""}]"#,
                "\n"
            )
        );
    }

    #[test]
    fn without_a_history_there_are_headings_alone() {
        assert_eq!(
            rows(None).render(Format::Tsv, "\t"),
            "TL\tLSN\tReason\tTimestamp\tNew Leader\n"
        );
        assert_eq!(rows(None).render(Format::Json, "\t"), "[]\n");
    }
}
