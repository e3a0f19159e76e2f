//! Records: one JSON object on one line for each run, kept so that a table that was interrupted goes on where it was.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::case::{Case, Mode};
use crate::judge::Judgement;

/// What was run. Runs of something else do not count as finished.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// A hash of the binary's bytes.
    pub binary: String,
    /// etcd's version.
    pub etcd: String,
    /// Whether what lasts was cut short.
    pub short: bool,
    /// What was put over the first dynamic configuration, in JSON.
    pub over: String,
}

impl Subject {
    /// What would be run now.
    ///
    /// # Errors
    /// When the binary or etcd cannot be read or run.
    pub fn now(binary: &Path, etcd: &Path, short: bool, over: &Value) -> Result<Self> {
        let bytes = fs::read(binary).with_context(|| format!("reading {}", binary.display()))?;
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        let said = Command::new(etcd).arg("--version").output();
        let said = said.with_context(|| format!("running {}", etcd.display()))?;
        let said = String::from_utf8_lossy(&said.stdout);
        let version = said.lines().next().unwrap_or_default();
        Ok(Self {
            binary: format!("{:016x}", hasher.finish()),
            etcd: version.trim_start_matches("etcd Version: ").to_owned(),
            short,
            over: over.to_string(),
        })
    }
}

/// One run of a case. Times are in seconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// What was run.
    pub subject: Subject,
    /// The case's name.
    pub case: String,
    /// The mode.
    pub mode: Mode,
    /// Which of the runs, counted from 1.
    pub run: u32,
    /// Why the run did not come to its end, if it did not.
    pub trouble: Option<String>,
    /// The longest gap of a client of the write port.
    pub write_gap: f64,
    /// The longest gap of a client of the read port.
    pub read_gap: f64,
    /// Rows acknowledged through the proxy.
    pub acknowledged: usize,
    /// Those that the last leader does not hold.
    pub lost: usize,
    /// Rows acknowledged to clients on the members' hosts that the last leader does not hold.
    pub orphans: usize,
    /// When the last of these was acknowledged, from the fault on.
    pub last_orphan: Option<f64>,
    /// When the leader at the fault acknowledged its last row, from the fault on.
    pub last_of_old: f64,
    /// Acknowledgements by a former leader after the next one's first.
    pub two_writers: usize,
    /// Those that had been sent before.
    pub two_writers_on_their_way: usize,
    /// Those that went through the proxy.
    pub two_writers_by_proxy: usize,
    /// For how long there were two.
    pub overlap: f64,
    /// The errors of the proxy's clients.
    pub errors: BTreeMap<String, usize>,
}

impl Run {
    /// A run's record.
    #[must_use]
    pub fn new(subject: &Subject, case: Case, mode: Mode, run: u32, judgement: &Judgement) -> Self {
        Self {
            subject: subject.clone(),
            case: case.name().to_owned(),
            mode,
            run,
            trouble: None,
            write_gap: judgement.write_gap.as_secs_f64(),
            read_gap: judgement.read_gap.as_secs_f64(),
            acknowledged: judgement.acknowledged,
            lost: judgement.lost,
            orphans: judgement.orphans,
            last_orphan: judgement.last_orphan.map(|at| at.as_secs_f64()),
            last_of_old: judgement.last_of_old.as_secs_f64(),
            two_writers: judgement.two_writers,
            two_writers_on_their_way: judgement.two_writers_on_their_way,
            two_writers_by_proxy: judgement.two_writers_by_proxy,
            overlap: judgement.overlap.as_secs_f64(),
            errors: BTreeMap::new(),
        }
    }

    /// Whether clients got to work at all.
    #[must_use]
    pub const fn measured(&self) -> bool {
        self.acknowledged > 0
    }
}

/// What a quiet cluster costs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cost {
    /// What was run.
    pub subject: Subject,
    /// Messages that etcd received from each member in a minute, by method.
    pub etcd_per_member_minute: BTreeMap<String, f64>,
    /// Of one core, in percent, by the leader's keeper and agent together.
    pub cpu_percent: f64,
    /// Resident, in MiB: keeper, agent, sentinel.
    pub rss_mib: [f64; 3],
    /// Their own share of it, with what they share divided among them.
    pub pss_mib: [f64; 3],
}

/// A line of the file.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Line {
    /// A run of a case.
    Run(Run),
    /// A measurement of costs.
    Cost(Cost),
}

/// The file of records.
pub struct Records {
    file: PathBuf,
    lines: Vec<Line>,
}

impl Records {
    /// Reads what is there.
    ///
    /// # Errors
    /// When a line is not one of ours.
    pub fn read(file: PathBuf) -> Result<Self> {
        let text = if file.exists() {
            fs::read_to_string(&file)?
        } else {
            String::new()
        };
        let mut lines = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            lines.push(serde_json::from_str(line).with_context(|| format!("{}:{number}", file.display()))?);
        }
        Ok(Self { file, lines })
    }

    /// Appends a line.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn append(&mut self, line: Line) -> Result<()> {
        if let Some(dir) = self.file.parent() {
            fs::create_dir_all(dir)?;
        }
        let mut file: File = OpenOptions::new().create(true).append(true).open(&self.file)?;
        writeln!(file, "{}", serde_json::to_string(&line)?)?;
        self.lines.push(line);
        Ok(())
    }

    /// The runs of `subject`; of one that was repeated, the last.
    #[must_use]
    pub fn runs(&self, subject: &Subject) -> Vec<&Run> {
        let mut runs: BTreeMap<(&str, Mode, u32), &Run> = BTreeMap::new();
        for line in &self.lines {
            match line {
                Line::Run(run) if run.subject == *subject => {
                    runs.insert((&run.case, run.mode, run.run), run);
                }
                Line::Run(_) | Line::Cost(_) => {}
            }
        }
        runs.into_values().collect()
    }

    /// The last measurement of the costs of `subject`.
    #[must_use]
    pub fn cost(&self, subject: &Subject) -> Option<&Cost> {
        self.lines.iter().rev().find_map(|line| match line {
            Line::Cost(cost) if cost.subject == *subject => Some(cost),
            Line::Cost(_) | Line::Run(_) => None,
        })
    }

    /// Whether this run is finished: one that measured nothing is not.
    #[must_use]
    pub fn has(&self, subject: &Subject, case: Case, mode: Mode, run: u32) -> bool {
        let same =
            |other: &&Run| other.case == case.name() && other.mode == mode && other.run == run && other.measured();
        self.runs(subject).iter().any(same)
    }

    /// The longest gap of the quiet runs in a mode; of any mode, where there are none in this one.
    #[must_use]
    pub fn quiet(&self, subject: &Subject, mode: Mode) -> Duration {
        let quiet = |wanted: Option<Mode>| {
            let runs = self.runs(subject).into_iter();
            let runs = runs.filter(|run| run.case == Case::Quiet.name() && wanted.is_none_or(|mode| run.mode == mode));
            runs.map(|run| run.write_gap).max_by(f64::total_cmp)
        };
        let seconds = quiet(Some(mode)).or_else(|| quiet(None)).unwrap_or_default();
        Duration::from_secs_f64(seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_that_measured_nothing_is_run_again_and_replaced() {
        let subject = Subject {
            binary: "1".to_owned(),
            etcd: "3.4".to_owned(),
            short: false,
            over: "{}".to_owned(),
        };
        let other = Subject {
            binary: "2".to_owned(),
            ..subject.clone()
        };
        let run = |acknowledged| {
            let judgement = Judgement {
                acknowledged,
                ..Judgement::default()
            };
            Line::Run(Run::new(&subject, Case::Quiet, Mode::Quorum, 1, &judgement))
        };
        let mut records = Records {
            file: PathBuf::new(),
            lines: vec![run(0)],
        };
        assert!(!records.has(&subject, Case::Quiet, Mode::Quorum, 1));
        records.lines.push(run(5));
        assert!(records.has(&subject, Case::Quiet, Mode::Quorum, 1));
        assert!(!records.has(&subject, Case::Quiet, Mode::Quorum, 2));
        assert!(!records.has(&other, Case::Quiet, Mode::Quorum, 1));
        assert_eq!(records.runs(&subject).len(), 1);
    }
}
