//! What the demo tells its user once the cluster is up. Pure.

use std::path::Path;

use super::files::Layout;
use super::plan::Plan;

/// How to connect, what to look at, what to break.
pub(crate) fn guide(plan: &Plan, layout: &Layout, pgherd: &Path, leader: &str, postmaster: Option<u32>) -> String {
    let connect = |port: u16| {
        format!(
            "psql \"host=127.0.0.1 port={port} user=postgres password={} dbname=postgres sslmode=disable\"",
            layout.passwords.superuser
        )
    };
    let first = plan
        .members
        .first()
        .map(|member| layout.member_file(&member.name))
        .unwrap_or_default();
    let pgherd = pgherd.display();
    let config = first.display();
    let mut text = format!(
        "
The cluster is up; {leader} leads.

  write, always to the leader   {write}
  read, from the replicas       {read}
  the proxy's page              http://127.0.0.1:{stats}/stats

Look at it
  {pgherd} list -c {config}

Break it, and watch what happens below
",
        write = connect(plan.write),
        read = connect(plan.read),
        stats = plan.stats,
    );
    if let Some(pid) = postmaster {
        text.push_str(&format!("  kill -9 {pid}   (the leader's PostgreSQL)\n"));
    }
    text.push_str(&format!(
        "  {pgherd} switchover -c {config} --force   (in good order)\n"
    ));
    text.push_str(&format!(
        "\nLogs, configurations and data are in {}. Ctrl-C ends it all.\n",
        layout.dir.display()
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::files::Passwords;
    use crate::demo::plan;

    #[test]
    fn every_line_can_be_copied() {
        let passwords = Passwords {
            superuser: "s3cret".to_owned(),
            replication: "other".to_owned(),
        };
        let layout = Layout {
            dir: "/tmp/d".into(),
            bin_dir: "/b".into(),
            passwords,
        };
        let plan = plan::choose(3, |_| None).expect("free");
        let text = guide(&plan, &layout, Path::new("/bin/pgherd"), "n1", Some(77));
        for part in [
            "psql \"host=127.0.0.1 port=5432 user=postgres password=s3cret dbname=postgres sslmode=disable\"",
            "port=5433",
            "http://127.0.0.1:8080/stats",
            "kill -9 77",
            "/bin/pgherd list -c /tmp/d/n1/patroni.yml",
            "/bin/pgherd switchover -c /tmp/d/n1/patroni.yml --force",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
        assert!(!text.contains("other"));
    }
}
