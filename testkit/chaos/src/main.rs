//! `pgherd-chaos`: runs the table, or a part of it. See `scripts/chaos.sh`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use pgherd_chaos::case::{Case, Mode};
use pgherd_chaos::record::{Line, Records, Run, Subject};
use pgherd_chaos::stage::{SIZE, Shown, Stage};
use pgherd_chaos::{cost, table, verdict};
use pgherd_testkit::{Network, program};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};

/// Until what ends by itself ends: four ttl.
const SPAN: Duration = Duration::from_secs(20);
/// More than a ttl, an election and a promotion.
const SPAN_SHORT: Duration = Duration::from_secs(8);
/// So many runs in a row that measure nothing end a mode: no cluster gets well in it.
const IN_VAIN_MAX: u32 = 3;
const COST_SPAN: Duration = Duration::from_secs(60);
const COST_SPAN_SHORT: Duration = Duration::from_secs(15);

/// What clients feel when processes, hosts and networks fail, measured on real parts in network namespaces.
#[derive(Parser)]
struct Arguments {
    /// Only the cases whose names contain this
    #[arg(long, env = "CASE", default_value = "")]
    case: String,
    /// Only this mode
    #[arg(long, env = "MODE")]
    mode: Option<Mode>,
    /// How often each case runs in each mode; 5 asynchronously and 2 in the others unless set
    #[arg(long, env = "RUNS")]
    runs: Option<u32>,
    /// Each case once, asynchronously, on one cluster
    #[arg(long)]
    once: bool,
    /// Let what lasts 20 seconds last 8; do not keep the records. Fails on lost safety, only reports times
    #[arg(long)]
    short: bool,
    /// JSON to put over the first dynamic configuration
    #[arg(long, value_name = "JSON", default_value = "{}", value_parser = json)]
    dcs: Value,
    /// Run nothing; print the table of what has been run
    #[arg(long)]
    table: bool,
    /// Name the cases
    #[arg(long)]
    list: bool,
    /// Where the records are
    #[arg(long, default_value = "target/chaos")]
    dir: PathBuf,
}

fn json(text: &str) -> Result<Value, serde_json::Error> {
    serde_json::from_str(text)
}

impl Arguments {
    fn cases(&self) -> Vec<Case> {
        let named = |case: &&Case| case.name().contains(&self.case);
        let exact = Case::named(&self.case);
        exact.map_or_else(|| Case::ALL.iter().filter(named).copied().collect(), |case| vec![case])
    }

    fn modes(&self) -> Vec<Mode> {
        match self.mode {
            Some(mode) => vec![mode],
            None if self.once => vec![Mode::Asynchronous],
            None => Mode::ALL.to_vec(),
        }
    }

    fn runs_in(&self, mode: Mode) -> u32 {
        match (self.runs, self.once, mode) {
            (_, true, _) => 1,
            (Some(runs), false, _) => runs,
            (None, false, Mode::Asynchronous) => 5,
            (None, false, Mode::Synchronous | Mode::Quorum) => 2,
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match carry_out(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("chaos: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns whether everything that must be kept was.
fn carry_out(arguments: &Arguments) -> Result<bool> {
    if arguments.list {
        for case in Case::ALL {
            println!("{case}");
        }
        return Ok(true);
    }
    let etcd = program::etcd();
    let subject = Subject::now(&program::pgherd()?, &etcd, arguments.short, &arguments.dcs)?;
    let file = arguments.dir.join(if arguments.short {
        "short.jsonl"
    } else {
        "results.jsonl"
    });
    if arguments.short && file.exists() && !arguments.table {
        std::fs::remove_file(&file)?;
    }
    let records = Records::read(file)?;
    let mut chaos = Chaos {
        arguments,
        subject,
        records,
        stage: None,
        is_safe: true,
        in_vain: 0,
    };
    let outcome = if arguments.table { Ok(()) } else { chaos.on_hosts() };
    let command: Vec<String> = std::env::args().collect();
    println!("{}", table::render(&chaos.records, &chaos.subject, &command.join(" ")));
    outcome?;
    Ok(chaos.is_safe)
}

struct Chaos<'a> {
    arguments: &'a Arguments,
    subject: Subject,
    records: Records,
    stage: Option<Stage>,
    is_safe: bool,
    /// How many runs one after the other have measured nothing.
    in_vain: u32,
}

impl Chaos<'_> {
    /// Makes the hosts, and runs everything from the clients'.
    fn on_hosts(&mut self) -> Result<()> {
        let network = Arc::new(Network::new(SIZE, SIZE)?);
        // The threads of the runtime are started by this one, and so are the operator's commands.
        network.enter(network.client())?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let outcome = tokio::select! {
                outcome = self.run_all(&network) => outcome,
                stopped = stop_signal() => stopped.and_then(|()| anyhow::bail!("stopped by a signal")),
            };
            // Its processes end here, before their hosts do.
            self.stage = None;
            outcome
        })
    }

    async fn run_all(&mut self, network: &Arc<Network>) -> Result<()> {
        let cases = self.arguments.cases();
        ensure!(
            !cases.is_empty(),
            "no case's name contains {:?} (--list)",
            self.arguments.case
        );
        for mode in self.arguments.modes() {
            if let Err(error) = self.run_mode(network, &cases, mode).await {
                println!("{mode}: {error:#}");
                self.is_safe = false;
            }
        }
        if self.arguments.case.is_empty() && self.records.cost(&self.subject).is_none() {
            self.measure_cost(network).await?;
        }
        Ok(())
    }

    async fn run_mode(&mut self, network: &Arc<Network>, cases: &[Case], mode: Mode) -> Result<()> {
        self.in_vain = 0;
        for case in cases.iter().filter(|case| case.applies_in(mode)) {
            for run in 1..=self.arguments.runs_in(mode) {
                if !self.records.has(&self.subject, *case, mode, run) {
                    self.run_once(network, *case, mode, run).await?;
                }
            }
            if !self.arguments.once {
                // What one case has left must not help or hinder the next.
                self.stage = None;
            }
        }
        Ok(())
    }

    async fn set(&mut self, network: &Arc<Network>, mode: Mode) -> Result<()> {
        if self.stage.as_ref().is_none_or(|stage| stage.mode() != mode) {
            self.stage = None;
            let logs = self.arguments.dir.join("logs").join(format!("start-{mode}"));
            self.stage = Some(Stage::set(network, mode, &self.arguments.dcs, &logs).await?);
        }
        Ok(())
    }

    async fn run_once(&mut self, network: &Arc<Network>, case: Case, mode: Mode, run: u32) -> Result<()> {
        let shown = match self.set(network, mode).await {
            Ok(()) => self.on_stage(case, mode, run).await,
            Err(error) => Err(error),
        };
        let shown = shown.unwrap_or_else(|error| Shown {
            judgement: Default::default(),
            errors: Default::default(),
            trouble: Some(error.context("nothing was measured")),
        });
        let mut record = Run::new(&self.subject, case, mode, run, &shown.judgement);
        record.errors = shown.errors;
        record.trouble = shown.trouble.map(|error| format!("{error:#}"));
        let misses = verdict::misses(case, &record, self.records.quiet(&self.subject, mode));
        self.is_safe &= misses.safety.is_empty();
        println!(
            "{case}, {mode}, run {run}: {:.3} s (reads {:.3}), lost {} of {}, orphans {} until {:.3}, last of the old \
             {:.3}, two writers {} ({} on their way); {:?}; {}",
            record.write_gap,
            record.read_gap,
            record.lost,
            record.acknowledged,
            record.orphans,
            record.last_orphan.unwrap_or_default(),
            record.last_of_old,
            record.two_writers,
            record.two_writers_on_their_way,
            record.errors,
            if misses.is_empty() {
                "held".to_owned()
            } else {
                format!("NOT HELD: {}", misses.text())
            },
        );
        if record.trouble.is_some() {
            self.stage = None;
        }
        self.in_vain = if record.measured() { 0 } else { self.in_vain + 1 };
        self.records.append(Line::Run(record))?;
        ensure!(
            self.in_vain < IN_VAIN_MAX,
            "{} runs in a row have measured nothing",
            self.in_vain
        );
        Ok(())
    }

    /// Runs on the stage that is set, and saves the logs where something was not kept.
    async fn on_stage(&mut self, case: Case, mode: Mode, run: u32) -> Result<Shown> {
        let stage = self.stage.as_ref().context("a stage is set")?;
        let lengths = stage.log_lengths();
        let shown = stage.run(case, self.span()).await;
        let quiet = self.records.quiet(&self.subject, mode);
        let kept = shown.as_ref().is_ok_and(|shown| {
            let record = Run::new(&self.subject, case, mode, run, &shown.judgement);
            shown.trouble.is_none() && verdict::misses(case, &record, quiet).is_empty()
        });
        if !kept {
            let name = format!("{}-{mode}-{run}", case.name().replace(' ', "-"));
            stage.save_logs(&lengths, &self.arguments.dir.join("logs").join(name))?;
        }
        shown
    }

    const fn span(&self) -> Duration {
        if self.arguments.short { SPAN_SHORT } else { SPAN }
    }

    async fn measure_cost(&mut self, network: &Arc<Network>) -> Result<()> {
        let span = if self.arguments.short {
            COST_SPAN_SHORT
        } else {
            COST_SPAN
        };
        self.set(network, Mode::Asynchronous).await?;
        let stage = self.stage.as_ref().context("a stage is set")?;
        let cost = cost::measure(stage.cluster(), &self.subject, span).await?;
        self.records.append(Line::Cost(cost))
    }
}

async fn stop_signal() -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
    }
    Ok(())
}
