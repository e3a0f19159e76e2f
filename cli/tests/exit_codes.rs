//! The built binary: what it prints where, and with which code it ends.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

struct Ran {
    code: Option<i32>,
    out: String,
    err: String,
}

fn pgherd(arguments: &[&str], variables: &[(&str, &str)], dir: &Path) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgherd"));
    command
        .args(arguments)
        .env_clear()
        .envs(variables.iter().copied())
        .current_dir(dir);
    let Output { status, stdout, stderr } = command.output().expect("the binary runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    Ran {
        code: status.code(),
        out: text(stdout),
        err: text(stderr),
    }
}

fn data(name: &str) -> String {
    let path: PathBuf = [env!("CARGO_MANIFEST_DIR"), "tests/data", name].iter().collect();
    path.display().to_string()
}

fn with_file(text: &str) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("pgherd.yml");
    std::fs::write(&file, text).expect("written");
    let file = file.display().to_string();
    (dir, file)
}

fn here() -> &'static Path {
    Path::new("/")
}

#[test]
fn help_and_version_are_no_failures() {
    for (arguments, expected) in [
        (["--version"].as_slice(), concat!("pgherd ", env!("CARGO_PKG_VERSION"))),
        (&["--help"], "Start with `pgherd demo`"),
        (&["switchover", "--help"], "--candidate"),
    ] {
        let ran = pgherd(arguments, &[], here());
        assert_eq!(ran.code, Some(0), "{arguments:?}");
        assert!(ran.out.contains(expected) && ran.err.is_empty(), "{}", ran.out);
    }
}

#[test]
fn usage_errors_end_with_64() {
    for arguments in [
        [].as_slice(),
        &["bogus"],
        &["agent", "--bogus"],
        &["list", "-f", "xml"],
        &["demo", "--members", "0"],
    ] {
        let ran = pgherd(arguments, &[], here());
        assert_eq!(ran.code, Some(64), "{arguments:?}");
        assert!(ran.out.is_empty() && !ran.err.is_empty(), "{arguments:?}");
    }
}

#[test]
fn without_a_configuration_every_place_tried_is_named() {
    let dir = tempfile::tempdir().expect("a directory");
    let ran = pgherd(&["check"], &[], dir.path());
    assert_eq!(ran.code, Some(64));
    for place in [
        "PGHERD_CONFIG",
        "/etc/pgherd/pgherd.yml",
        "/etc/patroni.yml",
        "patroni.yml",
        "--config FILE",
    ] {
        assert!(ran.err.contains(place), "{}", ran.err);
    }
}

#[test]
fn a_file_in_the_working_directory_or_in_the_variable_is_found() {
    let (dir, file) = with_file(&std::fs::read_to_string(data("postgres0.yml")).expect("readable"));
    assert_eq!(pgherd(&["check", "--file-only"], &[], dir.path()).code, Some(0));
    assert_eq!(
        pgherd(&["check", "--file-only"], &[("PGHERD_CONFIG", &file)], here()).code,
        Some(0)
    );
}

#[test]
fn patronis_files_are_read_as_they_are() {
    for (name, expected, warnings) in [
        (
            "postgres0.yml",
            "configuration of member postgresql0 of cluster batman: ok",
            ["etcd: read as etcd's v3", "postgresql.data_dir: "].as_slice(),
        ),
        (
            "production.yml",
            "configuration of member pg1.example.com of cluster pg-cluster: ok",
            &[],
        ),
    ] {
        let ran = pgherd(&["check", "--file-only", &data(name)], &[], here());
        assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""), "{name}");
        assert!(ran.out.lines().any(|line| line == expected), "{}", ran.out);
        let found: Vec<&str> = ran
            .out
            .lines()
            .filter_map(|line| line.strip_prefix("warning: "))
            .collect();
        assert_eq!(found.len(), warnings.len(), "{found:?}");
        for (found, start) in found.iter().zip(warnings) {
            assert!(found.starts_with(start), "{found}");
        }
    }
}

#[test]
fn a_file_of_an_image_is_read_with_its_proxy() {
    let ran = pgherd(&["check", "--file-only", &data("container.yml")], &[], here());
    assert_eq!((ran.code, ran.err.as_str()), (Some(0), ""));
    for expected in [
        "configuration of member acid-0 of cluster acid: ok",
        "configuration of a proxy for cluster acid on 0.0.0.0:5432, 0.0.0.0:5433: ok",
        "warning: users: unknown key",
    ] {
        assert!(ran.out.contains(expected), "{expected} is not in {}", ran.out);
    }
    assert!(
        !ran.out.contains("wal_g: unknown")
            && !ran.out.contains("restore: unknown")
            && !ran.out.contains("no effect: "),
        "{}",
        ran.out
    );
}

#[test]
fn all_mistakes_are_told_at_once_one_per_line_and_no_secret() {
    let (_dir, file) = with_file(
        "scope: a/b\nname: n1\netcd3: {host: 'a:54x2', username: u, password: hunter2}\n\
         restapi: {listen: 'a:1', authentication: {password: hunter2}}\n\
         postgresql: {listen: '*:5432', data_dir: /d, authentication: {superuser: {password: [hunter2]}}}\n\
         proxy: {listners: []}\n",
    );
    let ran = pgherd(&["check", "--file-only", &file], &[], here());
    assert_eq!(ran.code, Some(64));
    let expected = [
        "proxy.listners: unknown key; did you mean listeners?",
        "scope: \"a/b\" cannot be used: it contains '/', which cannot be part of a key; write one such as main",
        "etcd3.host: \"a:54x2\" is not an endpoint; write HOST:2379",
        "restapi.authentication.username: missing; write the user that the password belongs to",
        "postgresql.connect_address: missing; write this machine's own address, such as 10.0.0.1:5432, since listen names every interface",
        "postgresql.authentication.superuser.password: YAML takes it for a list; put it in quotes",
    ];
    let mut found: Vec<String> = ran.err.lines().map(str::to_owned).collect();
    let mut expected: Vec<String> = expected.iter().map(|line| format!("pgherd: {file}: {line}")).collect();
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
    assert!(!ran.err.contains("hunter2") && !ran.out.contains("hunter2"));
}

#[test]
fn variables_go_over_the_file() {
    let variables = [("PATRONI_NAME", "from-env"), ("PATRONI_NAMEE", "x")];
    let ran = pgherd(&["check", "--file-only", &data("production.yml")], &variables, here());
    assert_eq!(ran.code, Some(0), "{}", ran.err);
    assert!(ran.out.contains("configuration of member from-env of"), "{}", ran.out);
    assert!(
        ran.out
            .contains("PATRONI_NAMEE: unknown environment variable; did you mean PATRONI_NAME?"),
        "{}",
        ran.out
    );
}

#[test]
fn variables_alone_are_enough() {
    let dir = tempfile::tempdir().expect("a directory");
    let variables = [
        ("PATRONI_SCOPE", "c"),
        ("PATRONI_NAME", "n1"),
        ("PATRONI_ETCD3_HOSTS", "'a:2379','b:2379'"),
        ("PATRONI_RESTAPI_LISTEN", "0.0.0.0:8008"),
        ("PATRONI_RESTAPI_CONNECT_ADDRESS", "10.0.0.1:8008"),
        ("PATRONI_POSTGRESQL_LISTEN", "0.0.0.0:5432"),
        ("PATRONI_POSTGRESQL_CONNECT_ADDRESS", "10.0.0.1:5432"),
        ("PATRONI_POSTGRESQL_DATA_DIR", "/data"),
    ];
    let ran = pgherd(&["check", "--file-only"], &variables, dir.path());
    assert_eq!(
        (ran.code, ran.out.as_str()),
        (Some(0), "configuration of member n1 of cluster c: ok\n"),
        "{}",
        ran.err
    );
}

#[test]
fn a_switchover_that_cannot_ask_says_so() {
    let ran = pgherd(&["switchover", "-c", &data("postgres0.yml")], &[], here());
    assert_eq!(
        (ran.code, ran.err.as_str()),
        (
            Some(64),
            "pgherd: standard input is not a terminal, so nothing can be asked; say --force\n"
        )
    );
}

#[test]
fn an_etcd_that_does_not_answer_ends_with_69() {
    let free = TcpListener::bind("127.0.0.1:0")
        .expect("a free port")
        .local_addr()
        .expect("bound")
        .port();
    let (_dir, file) = with_file(&format!("scope: c\netcd3: {{host: '127.0.0.1:{free}'}}\n"));
    let ran = pgherd(&["list", "-c", &file], &[], here());
    assert_eq!(ran.code, Some(69));
    assert!(
        ran.err.starts_with("pgherd: etcd does not answer: ") && ran.err.contains(&format!("http://127.0.0.1:{free}")),
        "{}",
        ran.err
    );
}

#[test]
fn a_taken_port_is_told_with_its_holder_before_anything_runs() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    let (_dir, file) = with_file(&format!(
        "scope: c\netcd3: {{host: '127.0.0.1:1'}}\nproxy:\n  listeners: [{{address: '127.0.0.1:{port}', role: write}}]\n  stats: {{address: '127.0.0.1:0'}}\n"
    ));
    let ran = pgherd(&["proxy", "--config", &file], &[], here());
    assert_eq!(ran.code, Some(64), "a page on port 0 is a mistake: {}", ran.err);
    let text = std::fs::read_to_string(&file)
        .expect("readable")
        .replace("127.0.0.1:0'", "127.0.0.1:2'");
    std::fs::write(&file, text).expect("written");
    let ran = pgherd(&["proxy", "--config", &file], &[], here());
    assert_eq!(ran.code, Some(69), "{}", ran.err);
    let expected = format!(
        "proxy.listeners[0].address: port {port} of \"127.0.0.1:{port}\" is taken by pid {} (",
        std::process::id()
    );
    assert!(ran.err.contains(&expected), "{}", ran.err);
}

#[test]
fn a_member_refuses_root() {
    if !rustix::process::geteuid().is_root() {
        return; // Only root can be refused as root.
    }
    for command in ["agent", "node"] {
        let ran = pgherd(
            &[command, &data("production.yml")],
            &[("PATRONI_POSTGRESQL_LISTEN", "127.0.0.1:5434")],
            here(),
        );
        assert_eq!(ran.code, Some(64), "{}", ran.err);
        assert!(
            ran.err.contains(&format!("runuser -u postgres -- pgherd {command}")),
            "{}",
            ran.err
        );
    }
}

#[test]
fn a_log_level_that_is_none_is_told() {
    let ran = pgherd(
        &["proxy", "--config", "/nowhere.yml"],
        &[("PGHERD_LOG", "proxy=loud")],
        here(),
    );
    assert_eq!(ran.code, Some(64));
    assert!(
        ran.err
            .starts_with("pgherd: PGHERD_LOG: \"proxy=loud\" is not a log level"),
        "{}",
        ran.err
    );
}

#[test]
fn a_path_on_which_no_socket_can_be_is_told_before_any_port_is_bound() {
    let port = TcpListener::bind("127.0.0.1:0")
        .expect("a port")
        .local_addr()
        .expect("bound")
        .port();
    let long = "d".repeat(100);
    let (_dir, file) = with_file(&format!(
        "scope: c\netcd3: {{hosts: [\"127.0.0.1:1\"]}}\nproxy:\n  takeover: /tmp/{long}/s\n  \
         listeners: [{{address: \"127.0.0.1:{port}\", role: write}}]\n"
    ));
    for arguments in [
        ["proxy", "--config", &file].as_slice(),
        &["check", "--file-only", &file],
    ] {
        let ran = pgherd(arguments, &[], here());
        assert_eq!(ran.code, Some(64), "{}", ran.err);
        assert!(
            ran.err.contains("proxy.takeover: \"/tmp/ddd") && !ran.err.contains("listens on"),
            "{}",
            ran.err
        );
    }
}

/// The same binary by another name.
fn patroni(arguments: &[&str], variables: &[(&str, &str)]) -> Ran {
    let dir = tempfile::tempdir().expect("a directory");
    let program = dir.path().join("patroni");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_pgherd"), &program).expect("linked");
    let mut command = Command::new(&program);
    command.args(arguments).env_clear().envs(variables.iter().copied());
    let Output { status, stdout, stderr } = command.output().expect("the binary runs");
    Ran {
        code: status.code(),
        out: String::from_utf8_lossy(&stdout).into_owned(),
        err: String::from_utf8_lossy(&stderr).into_owned(),
    }
}

#[test]
fn under_patronis_name_it_validates_and_writes_samples() {
    assert_eq!(patroni(&["--version"], &[]).out, "patroni 4.1.4\n");
    let sample = patroni(&["--generate-sample-config"], &[]);
    assert_eq!(sample.code, Some(0));
    assert!(
        sample.out.contains("\npostgresql:\n") && sample.out.contains("scope: '#FIXME'"),
        "{}",
        sample.out
    );

    let (_dir, file) = with_file("scope: c\nname: n1\nlog: {level: LOUD}\n");
    let refused = patroni(&["--validate-config", &file], &[]);
    assert_eq!((refused.code, refused.out.as_str()), (Some(1), ""));
    for finding in ["log.level: \"LOUD\"", "etcd3: missing", "postgresql.data_dir: missing"] {
        assert!(refused.err.contains(finding), "{finding} is not in {}", refused.err);
    }
    let (_dir, file) = with_file("scope: c\ncitus: {group: 0}\nconsul: {host: x}\n");
    let refused = patroni(&["--validate-config", &file], &[]);
    assert!(
        refused.err.contains("citus: ") && refused.err.contains("consul: "),
        "{}",
        refused.err
    );
}
