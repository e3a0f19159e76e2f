//! For the tests only: one program that plays every part that the keeper has to do with.
//!
//! The agent is a relay: it passes what the keeper reports to the test, and what the test sends to the keeper.

use std::env;
use std::error::Error;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, id};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use pgherd_keeper::clock::Boottime;
use pgherd_keeper::protocol::Request;
use pgherd_keeper::{
    KeeperConfig, KeeperLink, KeeperOutcome, dry_start, keeper_of_sentinel, resume, run, run_sentinel,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType, connect, recv, send, socket};
use rustix::process::setsid;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1};

type Outcome = Result<ExitCode, Box<dyn Error>>;

/// The exit code of a keeper that stopped without the agent's word.
const STOPPED: u8 = 100;
/// A message from the test that is for the agent itself: exit.
const EXIT: u8 = 255;
/// Start a tool, and write its number to the file `tool`.
const TOOL: u8 = 254;
/// Where PostgreSQL says who serves a data directory.
const LOCK_FILE: &str = "postmaster.pid";
const TICK: Duration = Duration::from_millis(5);

fn main() -> ExitCode {
    if let Some(code) = dry_start() {
        return code;
    }
    if let Some(outcome) = resume() {
        return conclude("resumed keeper", outcome.map(exit_code).map_err(Into::into));
    }
    let args: Vec<OsString> = env::args_os().skip(1).collect();
    let role = args.first().and_then(|role| role.to_str()).unwrap_or_default();
    let path = args.get(1).map(PathBuf::from).unwrap_or_default();
    let outcome = match role {
        "keeper" => keeper(&path, &args[2..]),
        "sentinel" => sentinel(&path),
        "agent" => agent(&path),
        "proxy" => proxy(&path),
        "postmaster" => postmaster(&path),
        "backend" => backend(),
        "idle" => idle(&path),
        _ => Err("unknown role".into()),
    };
    conclude(role, outcome)
}

fn conclude(role: &str, outcome: Outcome) -> ExitCode {
    outcome.unwrap_or_else(|error| {
        eprintln!("{role}: {error}");
        ExitCode::from(70)
    })
}

/// Arguments: the milliseconds that a stop may take, and perhaps `proxy`.
fn keeper(dir: &Path, args: &[OsString]) -> Outcome {
    let words = |words: &[&str], path: &Path| {
        words
            .iter()
            .map(OsString::from)
            .chain([path.as_os_str().to_owned()])
            .collect::<Vec<_>>()
    };
    let stop_millis = args
        .first()
        .and_then(|millis| millis.to_str())
        .ok_or("no stop timeout")?
        .parse()?;
    let config = KeeperConfig {
        program: dir.join("pgherd"),
        keeper_args: env::args_os().skip(1).collect(),
        agent_args: words(&["agent"], dir),
        proxy_args: (args.len() > 1).then(|| words(&["proxy"], dir)),
        sentinel_args: words(&["sentinel"], &dir.join("data")),
        data_dir: dir.join("data"),
        runtime_dir: dir.join("run"),
        stop_timeout: Duration::from_millis(stop_millis),
    };
    Ok(exit_code(run(config)?))
}

fn exit_code(outcome: KeeperOutcome) -> ExitCode {
    match outcome {
        KeeperOutcome::Stopped => ExitCode::from(STOPPED),
        KeeperOutcome::AgentLeft { code } => ExitCode::from(code),
    }
}

fn sentinel(data_dir: &Path) -> Outcome {
    run_sentinel(keeper_of_sentinel().ok_or("not started by a keeper")?, data_dir)?;
    Ok(ExitCode::SUCCESS)
}

fn agent(dir: &Path) -> Outcome {
    let link = KeeperLink::from_stdin()?.ok_or("not started by a keeper")?;
    let test = socket(AddressFamily::UNIX, SocketType::SEQPACKET, None)?;
    connect(&test, &SocketAddrUnix::new(dir.join("control"))?)?;
    send(&test, &id().to_ne_bytes(), SendFlags::NOSIGNAL)?;
    let mut message = Vec::new();
    loop {
        let mut fds = [PollFd::new(&link, PollFlags::IN), PollFd::new(&test, PollFlags::IN)];
        poll(&mut fds, None)?;
        while let Some(report) = link.try_recv()? {
            report.encode(&mut message)?;
            send(&test, &message, SendFlags::NOSIGNAL)?;
        }
        let mut buffer = vec![0; 70_000];
        match recv(&test, buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
            Err(Errno::AGAIN) => {}
            Err(error) => return Err(error.into()),
            Ok((length, _)) => match &buffer[..length] {
                [] | [EXIT] => return Ok(ExitCode::SUCCESS),
                [TOOL] => drop(spawn("idle", &dir.join("tool"))?),
                bytes => pass_on(&link, bytes)?,
            },
        }
    }
}

/// What is no request goes to the keeper as it is.
fn pass_on(link: &KeeperLink, bytes: &[u8]) -> Result<(), Box<dyn Error>> {
    match Request::decode(bytes) {
        Ok(request) => link.send(&request)?,
        Err(_) => drop(send(link.as_fd(), bytes, SendFlags::NOSIGNAL)?),
    }
    Ok(())
}

/// Writes its number to the file `proxy`.
fn proxy(dir: &Path) -> Outcome {
    let (reload, stop) = (caught(&[SIGHUP])?, caught(&[SIGTERM])?);
    write_pid(&dir.join("proxy"))?;
    loop {
        if reload.swap(false, Ordering::Relaxed) {
            File::create(dir.join("proxy-reloaded"))?;
        }
        if stop.load(Ordering::Relaxed) {
            File::create(dir.join("proxy-stopped"))?;
            return Ok(ExitCode::SUCCESS);
        }
        thread::park_timeout(TICK);
    }
}

/// Has one backend, and a lock file while it runs. SIGINT ends both; SIGQUIT ends the postmaster alone, as a backend that
/// is stuck would have it.
fn postmaster(data_dir: &Path) -> Outcome {
    let (fast, quit) = (caught(&[SIGINT])?, caught(&[SIGQUIT])?);
    let (reload, promote) = (caught(&[SIGHUP])?, caught(&[SIGUSR1])?);
    env::set_current_dir(data_dir)?;
    let mut backend = spawn("backend", data_dir)?;
    write_pid(Path::new(LOCK_FILE))?;
    write_pid(Path::new("postmaster"))?;
    loop {
        if reload.swap(false, Ordering::Relaxed) {
            File::create("reloaded")?;
        }
        if promote.swap(false, Ordering::Relaxed) {
            File::create("promoted")?;
        }
        if fast.load(Ordering::Relaxed) {
            backend.kill()?;
            backend.wait()?;
            fs::remove_file(LOCK_FILE)?;
            return Ok(ExitCode::SUCCESS);
        }
        if quit.load(Ordering::Relaxed) {
            fs::remove_file(LOCK_FILE)?;
            return Ok(ExitCode::from(2));
        }
        thread::park_timeout(TICK);
    }
}

/// Writes the time to the file `heartbeat` until SIGKILL ends it. Has left its postmaster's session, as backends do, and
/// the data directory, as a procedure in an untrusted language may.
fn backend() -> Outcome {
    setsid()?;
    let _ignored = caught(&[SIGQUIT, SIGTERM, SIGINT, SIGHUP])?;
    let heartbeat = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open("heartbeat")?;
    write_pid(Path::new("backend"))?;
    env::set_current_dir("/")?;
    loop {
        heartbeat.write_all_at(&Boottime::now().as_nanos().to_ne_bytes(), 0)?;
        thread::park_timeout(TICK);
    }
}

fn idle(pid_file: &Path) -> Outcome {
    write_pid(pid_file)?;
    loop {
        thread::park();
    }
}

fn spawn(role: &str, path: &Path) -> Result<Child, Box<dyn Error>> {
    Ok(Command::new(env::current_exe()?).arg(role).arg(path).spawn()?)
}

/// A file appears whole, or not at all.
fn write_pid(path: &Path) -> Result<(), Box<dyn Error>> {
    let beside = path.with_extension("new");
    fs::write(&beside, id().to_string())?;
    Ok(fs::rename(beside, path)?)
}

fn caught(signals: &[i32]) -> Result<Arc<AtomicBool>, Box<dyn Error>> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in signals {
        signal_hook::flag::register(*signal, Arc::clone(&flag))?;
    }
    Ok(flag)
}
