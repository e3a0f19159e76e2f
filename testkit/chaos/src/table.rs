//! The table: all runs of a case and a mode in one line.

use std::fmt::Write;

use crate::case::{Bound, Case, Mode, TTL};
use crate::record::{Cost, Records, Run, Subject};
use crate::verdict::{gap, misses};

/// What a quiet leader's keeper and agent may cost.
const CPU_PERCENT_MAX: f64 = 0.5;
const RSS_MIB_MAX: f64 = 30.0;

/// The whole table, the reasons for what was not held, and the costs.
#[must_use]
pub fn render(records: &Records, subject: &Subject, command: &str) -> String {
    let mut text = format!(
        "\n$ {command}\nbinary {}, etcd {}, ttl {} s; seconds\n",
        subject.binary,
        subject.etcd,
        TTL.as_secs()
    );
    // Writing to a string cannot fail.
    let _ = writeln!(
        text,
        "{:<39}{:<13}{:>4} {:>8} {:>8} {:>8}  {:<5}{:>5} {:>8} {:>9}",
        "case", "mode", "runs", "median", "worst", "bound", "held", "lost", "orphans", "2 writers"
    );
    let mut reasons = String::new();
    for case in Case::ALL {
        for mode in Mode::ALL {
            let runs = records.runs(subject).into_iter();
            let runs: Vec<&Run> = runs.filter(|run| run.case == case.name() && run.mode == mode).collect();
            if !runs.is_empty() {
                line(records, subject, (*case, mode), &runs, &mut text, &mut reasons);
            }
        }
    }
    if !reasons.is_empty() {
        let _ = writeln!(text, "\nnot held:\n{reasons}");
    }
    text.push_str(&after_thaw(records, subject));
    if let Some(cost) = records.cost(subject) {
        text.push_str(&costs(cost));
    }
    text
}

fn line(
    records: &Records,
    subject: &Subject,
    (case, mode): (Case, Mode),
    runs: &[&Run],
    text: &mut String,
    reasons: &mut String,
) {
    let quiet = records.quiet(subject, mode);
    let mut gaps: Vec<f64> = runs
        .iter()
        .filter(|run| run.measured())
        .map(|run| gap(case, run))
        .collect();
    gaps.sort_by(f64::total_cmp);
    let shown = |gap: Option<&f64>| gap.map_or("-".to_owned(), |gap| format!("{gap:.3}"));
    let (median, worst) = (shown(gaps.get(gaps.len() / 2)), shown(gaps.last()));
    let mut held = true;
    for run in runs {
        let misses = misses(case, run, quiet);
        if !misses.is_empty() {
            held = false;
            let _ = writeln!(reasons, "  {case}, {mode}, run {}: {}", run.run, misses.text());
        }
    }
    let bound = match (case.bound(), case.bound().limit(quiet)) {
        (Bound::Unnoticed, Some(limit)) => format!("0 ({:.2})", limit.as_secs_f64()),
        (_, Some(limit)) => format!("{:.1}", limit.as_secs_f64()),
        (_, None) => "-".to_owned(),
    };
    let sum = |of: fn(&Run) -> usize| runs.iter().map(|run| of(run)).sum::<usize>();
    let _ = writeln!(
        text,
        "{case:<39}{mode:<13}{:>4} {median:>8} {worst:>8} {bound:>8}  {:<5}{:>5} {:>8} {:>9}",
        runs.len(),
        if held { "yes" } else { "NO" },
        sum(|run| run.lost),
        sum(|run| run.orphans),
        sum(|run| run.two_writers),
    );
}

/// Why some acknowledgements by two writers are counted, and are nobody's failure.
fn after_thaw(records: &Records, subject: &Subject) -> String {
    let runs = records.runs(subject).into_iter();
    let forgiven = |run: &&Run| {
        let case = Case::named(&run.case);
        case.is_some_and(Case::may_answer_after_thaw) && run.two_writers > 0
    };
    let runs: Vec<&Run> = runs.filter(forgiven).collect();
    if runs.is_empty() {
        return String::new();
    }
    let answers: usize = runs.iter().map(|run| run.two_writers).sum();
    let longest = runs.iter().map(|run| run.overlap).fold(0.0, f64::max);
    let proxied: usize = runs.iter().map(|run| run.two_writers_by_proxy).sum();
    format!(
        "\na member that was frozen whole: its backends go on at the same moment as keeper and sentinel, and answered {answers}\n\
         statements of clients on its own host, in {} runs, {longest:.3} s at the latest after the other leader's first; \
         {proxied} through the proxy\n",
        runs.len()
    )
}

/// What a quiet cluster costs, beside what it may.
#[must_use]
pub fn costs(cost: &Cost) -> String {
    let mut text = format!("\na quiet cluster, etcd {}:\n", cost.subject.etcd);
    let total: f64 = cost.etcd_per_member_minute.values().sum();
    let by_method: Vec<String> = cost
        .etcd_per_member_minute
        .iter()
        .map(|(method, count)| format!("{method} {count:.1}"))
        .collect();
    let _ = writeln!(
        text,
        "  etcd received {total:.1} messages per member and minute: {}",
        by_method.join(", ")
    );
    let held = |value: f64, most: f64| if value <= most { "held" } else { "NOT HELD" };
    let _ = writeln!(
        text,
        "  the leader's keeper and agent took {:.2} % of a core (at most {CPU_PERCENT_MAX}: {})",
        cost.cpu_percent,
        held(cost.cpu_percent, CPU_PERCENT_MAX)
    );
    let [keeper, agent, sentinel] = cost.rss_mib;
    let [keeper_own, agent_own, sentinel_own] = cost.pss_mib;
    let _ = writeln!(
        text,
        "  resident: keeper {keeper:.1} + agent {agent:.1} = {:.1} MiB (at most {RSS_MIB_MAX}: {}), sentinel {sentinel:.1}; \
         with shared pages divided: {keeper_own:.1}, {agent_own:.1}, {sentinel_own:.1}",
        keeper + agent,
        held(keeper + agent, RSS_MIB_MAX)
    );
    text
}
