//! `pgherd demo`: up with one command, gone with Ctrl-C.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use pgherd_testkit::process::{self, Signal};
use pgherd_testkit::{Site, eventually, program};

const UP_MAX: Duration = Duration::from_secs(90);
const GONE_MAX: Duration = Duration::from_secs(30);

#[tokio::test]
async fn a_demo_says_how_to_connect_and_leaves_nothing_behind() -> Result<()> {
    let site = Site::new()?;
    let temporary = site.make_dir("tmp")?;
    let mut command = site.command(site.reachable(&program::pgherd()?)?);
    command.env("TMPDIR", &temporary).args(["demo", "--members", "2"]);
    let mut demo = site.start("demo", command)?;

    let how = eventually("the demo says how to connect, or ends", UP_MAX, async || {
        let output = demo.output();
        if let Some(status) = demo.ended()? {
            return Ok(Err(anyhow!("it ended with {status}: {output}")));
        }
        let line = output
            .lines()
            .find(|line| line.contains("psql") && line.contains("postgres"));
        line.map(|line| Ok(line.to_owned())).with_context(|| output.clone())
    });
    let how = how.await??;
    let psql = how
        .split_once("psql")
        .map(|(_, rest)| format!("psql{rest}"))
        .unwrap_or_default();
    let mut shell = site.client_command("sh");
    shell.args(["-c", &format!("{psql} -AtX -c 'SELECT 6 * 7'")]);
    let answer = site
        .run(shell, UP_MAX)
        .await?
        .success()
        .with_context(|| format!("the line says {how:?}"))?;
    ensure!(answer.trim() == "42", "{answer}");

    process::signal(demo.pid(), Signal::INT)?;
    let status = demo.end(GONE_MAX).await?;
    ensure!(status.success(), "it ended with {status}: {}", demo.output());
    let left = site.processes();
    ensure!(left.is_empty(), "processes are left: {left:?}");
    let files: Vec<_> = fs::read_dir(temporary)?.flatten().map(|entry| entry.path()).collect();
    ensure!(files.is_empty(), "files are left: {files:?}");
    site.pass();
    Ok(())
}
