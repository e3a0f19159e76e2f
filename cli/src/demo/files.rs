//! The files that the demo writes: ordinary configurations, for the demo's user to read and to copy from.

use std::path::{Path, PathBuf};

use super::plan::{MemberPlan, Plan};

/// Where the demo keeps things, and what it needs to write its files.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub(crate) dir: PathBuf,
    pub(crate) bin_dir: PathBuf,
    pub(crate) passwords: Passwords,
}

/// Made anew for each demo; shown to its user on purpose, and to nobody else.
#[derive(Clone)]
pub(crate) struct Passwords {
    pub(crate) superuser: String,
    pub(crate) replication: String,
}

impl std::fmt::Debug for Passwords {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passwords(..)")
    }
}

/// PostgreSQL refuses a longer path of a socket, `/.s.PGSQL.65535` included.
const SOCKET_DIR_BYTES_MAX: usize = 107 - 16;

impl Layout {
    /// The directory of one member.
    pub(crate) fn member_dir(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The configuration of one member.
    pub(crate) fn member_file(&self, name: &str) -> PathBuf {
        self.member_dir(name).join("patroni.yml")
    }

    /// The data directory of one member.
    pub(crate) fn data_dir(&self, name: &str) -> PathBuf {
        self.member_dir(name).join("data")
    }

    /// The configuration of the proxy.
    pub(crate) fn proxy_file(&self) -> PathBuf {
        self.dir.join("proxy.yml")
    }

    /// Where `who` logs to.
    pub(crate) fn log_file(&self, who: &str) -> PathBuf {
        self.dir.join(format!("{who}.log"))
    }

    /// The text of one member's configuration.
    pub(crate) fn member_yaml(&self, plan: &Plan, member: &MemberPlan) -> String {
        let MemberPlan { name, postgresql, rest } = member;
        let dir = self.member_dir(name);
        let sockets = if dir.as_os_str().len() <= SOCKET_DIR_BYTES_MAX {
            quoted(&dir)
        } else {
            "\"\"".to_owned()
        };
        format!(
            "\
# One member of the demo, in Patroni's own form.
scope: demo
name: {name}
etcd3:
  hosts: [\"127.0.0.1:{etcd}\"]
restapi:
  listen: 127.0.0.1:{rest}
postgresql:
  listen: 127.0.0.1:{postgresql}
  data_dir: {data_dir}
  bin_dir: {bin_dir}
  authentication:
    superuser: {{username: postgres, password: \"{superuser}\"}}
    replication: {{username: replicator, password: \"{replication}\"}}
  parameters:
    shared_buffers: 32MB
    unix_socket_directories: {sockets}
  pg_hba:
    - local all all scram-sha-256
    - host all all 127.0.0.1/32 scram-sha-256
    - host replication replicator 127.0.0.1/32 scram-sha-256
bootstrap:
  dcs:
    postgresql:
      parameters:
        max_connections: 50
  initdb:
    - encoding: UTF8
    - data-checksums
pgherd:
  runtime_dir: {runtime_dir}
",
            etcd = plan.etcd_client,
            data_dir = quoted(&self.data_dir(name)),
            bin_dir = quoted(&self.bin_dir),
            superuser = self.passwords.superuser,
            replication = self.passwords.replication,
            runtime_dir = quoted(&dir.join("run")),
        )
    }

    /// The text of the proxy's configuration.
    pub(crate) fn proxy_yaml(&self, plan: &Plan) -> String {
        format!(
            "\
# The demo's proxy.
scope: demo
etcd3:
  hosts: [\"127.0.0.1:{etcd}\"]
proxy:
  listeners:
    - {{address: \"127.0.0.1:{write}\", role: write}}
    - {{address: \"127.0.0.1:{read}\", role: read, max_lag: 16MB, fallback: leader}}
  stats: {{address: \"127.0.0.1:{stats}\"}}
  workers: 1
  drain: 2s
",
            etcd = plan.etcd_client,
            write = plan.write,
            read = plan.read,
            stats = plan.stats,
        )
    }
}

/// A path as a YAML text in double quotes, whose escapes are JSON's.
fn quoted(path: &Path) -> String {
    serde_json::Value::from(path.display().to_string()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Document;
    use crate::demo::plan;

    fn layout(dir: &Path) -> Layout {
        let passwords = Passwords {
            superuser: "s3cret".to_owned(),
            replication: "r3plica".to_owned(),
        };
        Layout {
            dir: dir.to_owned(),
            bin_dir: "/usr/lib/postgresql/17/bin".into(),
            passwords,
        }
    }

    #[test]
    fn the_files_are_configurations_without_a_word_of_complaint() {
        let dir = tempfile::tempdir().expect("a directory");
        let layout = layout(&dir.path().join("with \"quotes\" and spaces"));
        let plan = plan::choose(2, |_| None).expect("free");
        let file = dir.path().join("x.yml");

        std::fs::write(&file, layout.member_yaml(&plan, &plan.members[1])).expect("written");
        let document = Document::load(Some(file.clone())).expect("readable");
        document.lint();
        let agent = document.finish(document.agent()).expect("valid");
        assert_eq!(document.warnings(), Vec::<String>::new());
        assert_eq!((agent.name.as_str(), agent.postgresql.port), ("n2", 5442));
        assert_eq!(agent.postgresql.data_dir, layout.data_dir("n2"));
        assert_eq!(agent.postgresql.superuser.password.as_deref(), Some("s3cret"));
        assert!(agent.bootstrap.dcs.get("ttl").is_none());

        std::fs::write(&file, layout.proxy_yaml(&plan)).expect("written");
        let document = Document::load(Some(file)).expect("readable");
        document.lint();
        let proxy = document
            .finish(document.proxy().zip(document.cluster(None)))
            .expect("valid");
        assert_eq!(document.warnings(), Vec::<String>::new());
        assert_eq!(proxy.0.listeners.len(), 2);
    }

    #[test]
    fn a_path_too_long_for_a_socket_goes_without() {
        let plan = plan::choose(1, |_| None).expect("free");
        let long = layout(Path::new(&format!("/{}", "x".repeat(100))));
        assert!(
            long.member_yaml(&plan, &plan.members[0])
                .contains("unix_socket_directories: \"\"\n")
        );
    }

    #[test]
    fn passwords_are_never_formatted() {
        assert!(!format!("{:?}", layout(Path::new("/x"))).contains("s3cret"));
    }
}
