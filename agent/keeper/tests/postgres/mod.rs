//! Adoption of a real PostgreSQL, which others have started.

#![expect(
    clippy::unwrap_used,
    reason = "as in the tests themselves: what fails here ends the test"
)]

use std::ffi::OsString;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use pgherd_keeper::clock::Boottime;
use pgherd_keeper::protocol::{ExitKind, Report, Request, Start};
use rustix::process::{Pid, Signal, geteuid};

use crate::support::{Agent, World, is_alive, signal, wait_until, wait_until_dead};

/// A server that is nobody's child of ours, with a session that is busy.
struct Server {
    world: World,
    user: Option<(u32, u32)>,
    bin_dir: PathBuf,
}

impl Server {
    fn new() -> Self {
        let user = geteuid().is_root().then(postgres_user);
        let server = Self {
            world: World::of_user(user),
            user,
            bin_dir: bin_dir(),
        };
        let mut initdb = server.command("initdb");
        initdb.args(["--auth=trust", "--username=postgres", "--no-sync", "--locale=C"]);
        initdb
            .arg("--pgdata")
            .arg(server.world.path("data"))
            .stdout(Stdio::null());
        assert!(initdb.status().unwrap().success());
        server
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin_dir.join(program));
        command.current_dir(self.world.path("")).env("LC_ALL", "C");
        if let Some((uid, gid)) = self.user {
            command.uid(uid).gid(gid);
        }
        command
    }

    fn args(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = vec!["-D".into(), self.world.path("data").into()];
        for setting in ["listen_addresses=", "fsync=off", "logging_collector=on"] {
            args.extend(["-c".into(), setting.into()]);
        }
        args.extend(["-k".into(), self.world.path("").into()]);
        args
    }

    fn start_elsewhere(&self) -> Child {
        let server = self.command("postgres").args(self.args()).spawn().unwrap();
        self.wait_until_ready(Pid::from_child(&server));
        server
    }

    /// A keeper that has adopted such a server, and that.
    fn adopted(&self) -> (Agent, Child) {
        let (agent, _) = self.world.agent();
        let elsewhere = self.start_elsewhere();
        let pid = Pid::from_child(&elsewhere);
        assert_eq!(agent.recv(), Report::Stranger { pid: Some(pid) });
        assert_eq!(agent.adopted(), pid);
        (agent, elsewhere)
    }

    fn start(&self) -> Request {
        Request::Start(Start {
            writable: true,
            program: self.bin_dir.join("postgres"),
            args: self.args(),
            env: Vec::new(),
        })
    }

    /// The file of a postmaster that was killed stays until the next one has begun.
    fn wait_until_ready(&self, postmaster: Pid) {
        let number = postmaster.as_raw_nonzero().to_string();
        wait_until("PostgreSQL is ready", || {
            let file = fs::read_to_string(self.world.path("data/postmaster.pid"));
            let lines: Vec<String> = file.iter().flat_map(|file| file.lines().map(str::to_owned)).collect();
            lines.first() == Some(&number) && lines.get(7).is_some_and(|status| status.trim_end() == "ready")
        });
    }

    /// A client whose backend sleeps, and that backend.
    fn session(&self, postmaster: Pid) -> (Child, Pid) {
        let mut client = self.command("psql");
        client
            .arg("-h")
            .arg(self.world.path(""))
            .args(["-U", "postgres", "-c", "SELECT pg_sleep(600)"]);
        let client = client.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let mut backend = None;
        wait_until("the session is busy", || {
            backend = self
                .processes()
                .into_iter()
                .find(|pid| *pid != postmaster && title(*pid).contains("SELECT"));
            backend.is_some()
        });
        (client, backend.unwrap())
    }

    /// Everything that works in the data directory.
    fn processes(&self) -> Vec<Pid> {
        let data_dir = self.world.path("data");
        let all = fs::read_dir("/proc").unwrap().flatten();
        let inside = all.filter(|entry| fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == data_dir));
        inside
            .filter_map(|entry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?))
            .filter(|pid| is_alive(*pid))
            .collect()
    }

    /// How many processes are attached to the shared memory that this postmaster has made.
    fn attachments(postmaster: Pid) -> u64 {
        let creator = postmaster.as_raw_nonzero().to_string();
        let table = fs::read_to_string("/proc/sysvipc/shm").unwrap();
        let fields = table
            .lines()
            .map(|line| line.split_ascii_whitespace().collect::<Vec<_>>());
        let ours = fields.filter(|fields| fields.get(4) == Some(&creator.as_str()));
        ours.map(|fields| fields[6].parse::<u64>().unwrap()).sum()
    }
}

fn title(pid: Pid) -> String {
    fs::read_to_string(format!("/proc/{}/cmdline", pid.as_raw_nonzero())).unwrap_or_default()
}

/// PostgreSQL refuses to run as root.
fn postgres_user() -> (u32, u32) {
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let line = passwd
        .lines()
        .find(|line| line.starts_with("postgres:"))
        .expect("run this as an ordinary user");
    let mut fields = line.split(':').skip(2).map(|field| field.parse().unwrap());
    (fields.next().unwrap(), fields.next().unwrap())
}

fn bin_dir() -> PathBuf {
    if let Some(named) = std::env::var_os("PGHERD_TEST_PG_BIN") {
        return PathBuf::from(named);
    }
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let with_server = versions
        .map(|version| version.path().join("bin"))
        .filter(|bin| bin.join("postgres").is_file());
    with_server
        .max()
        .expect("the tests need PostgreSQL; name its programs in PGHERD_TEST_PG_BIN")
}

#[test]
fn a_postgres_that_others_have_started_is_adopted_and_ended_as_if_it_were_ours() {
    let server = Server::new();
    let (agent, mut elsewhere) = server.adopted();
    let pid = Pid::from_child(&elsewhere);
    agent.armed(7, 60_000, 1000);
    let (mut client, backend) = server.session(pid);
    assert!(Server::attachments(pid) > 1);

    signal(pid, Signal::KILL);

    agent.hears_the_end_of(pid, ExitKind::Unknown);
    assert!(!is_alive(backend));
    assert_eq!((server.processes(), Server::attachments(pid)), (vec![], 0));
    elsewhere.wait().unwrap();
    client.wait().unwrap();

    // It recovers as a child, and how that ends is known.
    let pid = agent.started(&server.start());
    server.wait_until_ready(pid);
    agent.send(&Request::Signal(pgherd_keeper::protocol::PostmasterSignal::StopFast));
    agent.hears_the_end_of(pid, ExitKind::Code(0));
}

#[test]
fn the_deadline_ends_an_adopted_postgres_with_all_its_sessions() {
    let server = Server::new();
    let (agent, mut elsewhere) = server.adopted();
    let pid = Pid::from_child(&elsewhere);
    let (mut client, backend) = server.session(pid);
    // One that does not hear SIGQUIT, and whose postmaster cannot wait for it.
    signal(backend, Signal::STOP);
    let deadline = agent.armed(7, 3000, 2000);

    wait_until_dead(backend);

    wait_until("nothing is left", || server.processes().is_empty());
    assert!(Boottime::now() < deadline);
    assert_eq!(agent.recv(), Report::Fenced { term: 7 });
    agent.recv_until(&Report::Ended);
    assert_eq!(Server::attachments(pid), 0);
    elsewhere.wait().unwrap();
    client.wait().unwrap();
}

#[test]
fn a_postgres_that_is_left_in_pause_is_adopted_by_the_next_keeper() {
    let mut server = Server::new();
    let (agent, _) = server.world.agent();
    agent.armed(7, 60_000, 1000);
    let pid = agent.started(&server.start());
    server.wait_until_ready(pid);
    let (mut client, backend) = server.session(pid);
    assert_eq!(agent.ask(&Request::Pause), Report::Paused);
    signal(server.world.keeper(), Signal::TERM);
    assert_eq!(agent.recv(), Report::Stop);
    agent.send(&Request::Leave {
        code: 0,
        keep_postgres: true,
    });
    agent.exit();
    assert_eq!(server.world.outcome().code(), Some(0));
    assert!(is_alive(backend) && is_alive(pid));

    server.world.replace_keeper_of(server.user);
    let (agent, hello) = server.world.agent();
    assert_eq!(
        (hello.stranger, hello.postmaster, hello.paused),
        (Some(pid), None, false)
    );
    assert_eq!(agent.adopted(), pid);
    agent.armed(8, 60_000, 1000);
    assert!(is_alive(backend));
    agent.send(&Request::End);
    agent.recv_until(&Report::Ended);
    assert!(server.processes().is_empty());
    client.wait().unwrap();
}
