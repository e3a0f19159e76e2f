//! The judgement: from what clients were told, and what the last leader holds, to what was felt and lost. Pure.
//!
//! A *reign* is what one server acknowledged on one timeline. Of two reigns the earlier is the one whose first
//! acknowledgement came first. An acknowledgement of the earlier reign that came after the later one's first is an
//! acknowledgement by two writers. Where it had been sent before that moment and came soon after it, it may only have been
//! on its way: such are counted too, and told apart.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pgherd_cluster::clock::Boottime;

/// How late a client may be told of what is long done: a busy machine lets it wait for a processor.
const ON_ITS_WAY_MAX: Duration = Duration::from_millis(200);

/// Who wrote a row.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Writer {
    /// A client of the write port.
    Proxy(u8),
    /// A client on a member's own host, of that member's PostgreSQL.
    Local(String),
}

impl Writer {
    /// As it stands in the table.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Proxy(number) => format!("proxy-{number}"),
            Self::Local(member) => format!("local-{member}"),
        }
    }

    const fn is_local(&self) -> bool {
        matches!(self, Self::Local(_))
    }
}

/// A row that its writer was told of.
#[derive(Clone, Debug)]
pub struct Ack {
    /// Who wrote it.
    pub writer: Writer,
    /// Its number among this writer's rows.
    pub seq: u64,
    /// The server that said so.
    pub server: String,
    /// On which timeline, in the eight digits of a WAL file's name.
    pub timeline: String,
    /// When it was sent.
    pub sent: Boottime,
    /// When the answer had come.
    pub at: Boottime,
}

/// An answer to a client of the read port.
#[derive(Clone, Debug)]
pub struct Read {
    /// Who asked.
    pub reader: u8,
    /// Who answered.
    pub server: String,
    /// When the answer had come.
    pub at: Boottime,
}

/// What was felt and lost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// The longest time that one client of the write port went without an acknowledgement.
    pub write_gap: Duration,
    /// The longest time that one client of the read port went without an answer.
    pub read_gap: Duration,
    /// Rows acknowledged to clients of the write port.
    pub acknowledged: usize,
    /// Those of them that the last leader does not hold.
    pub lost: usize,
    /// Rows acknowledged to clients on the members' hosts that the last leader does not hold.
    pub orphans: usize,
    /// When the last of these was acknowledged, counted from the fault.
    pub last_orphan: Option<Duration>,
    /// When the server that led at the fault acknowledged its last row of that reign, counted from the fault.
    pub last_of_old: Duration,
    /// Acknowledgements of an earlier reign after the first of a later one.
    pub two_writers: usize,
    /// Those of them that had been sent before that first one, and may have been decided before it.
    pub two_writers_on_their_way: usize,
    /// Those of them that went through the proxy.
    pub two_writers_by_proxy: usize,
    /// For how long two took writes: from the later one's first acknowledgement to the earlier one's last.
    pub overlap: Duration,
}

/// What there is to judge.
#[derive(Clone, Copy, Debug)]
pub struct Evidence<'a> {
    /// In no order.
    pub acks: &'a [Ack],
    /// In no order.
    pub reads: &'a [Read],
    /// The last leader's rows by writer's name and number; nothing when it could not be asked.
    pub held: Option<&'a BTreeSet<(String, u64)>>,
    /// When the trouble began.
    pub fault: Boottime,
    /// When the clients were stopped.
    pub end: Boottime,
}

/// Judges.
#[must_use]
pub fn judge(evidence: &Evidence<'_>) -> Judgement {
    let Evidence {
        acks,
        reads,
        fault,
        end,
        ..
    } = *evidence;
    let through_proxy = acks.iter().filter(|ack| !ack.writer.is_local());
    let writes = by_client(through_proxy.clone().map(|ack| (&ack.writer, ack.at)));
    let answers = by_client(reads.iter().map(|read| (read.reader, read.at)));
    let mut judgement = Judgement {
        write_gap: longest(writes, fault, end),
        read_gap: longest(answers, fault, end),
        acknowledged: through_proxy.count(),
        last_of_old: last_of_old(acks, fault),
        ..Judgement::default()
    };
    count_missing(evidence, &mut judgement);
    count_two_writers(acks, &mut judgement);
    judgement
}

fn by_client<K: Ord>(times: impl Iterator<Item = (K, Boottime)>) -> BTreeMap<K, Vec<Boottime>> {
    let mut clients: BTreeMap<K, Vec<Boottime>> = BTreeMap::new();
    for (client, at) in times {
        clients.entry(client).or_default().push(at);
    }
    clients
}

fn longest<K>(clients: BTreeMap<K, Vec<Boottime>>, fault: Boottime, end: Boottime) -> Duration {
    let gaps = clients.into_values().map(|times| longest_gap(times, fault, end));
    gaps.max().unwrap_or_default()
}

/// The longest time between two neighbours, from the last one before `fault` to `end`: a client that was never
/// answered again has waited until then.
fn longest_gap(mut times: Vec<Boottime>, fault: Boottime, end: Boottime) -> Duration {
    times.push(end);
    times.sort_unstable();
    let first = times.partition_point(|time| *time <= fault).saturating_sub(1);
    let gaps = times[first..].windows(2).map(|pair| pair[1].since(pair[0]));
    gaps.max().unwrap_or_default()
}

fn last_of_old(acks: &[Ack], fault: Boottime) -> Duration {
    let before = acks.iter().filter(|ack| ack.at <= fault).max_by_key(|ack| ack.at);
    let Some(before) = before else { return Duration::ZERO };
    let same = acks
        .iter()
        .filter(|ack| ack.server == before.server && ack.timeline == before.timeline);
    same.map(|ack| ack.at.since(fault)).max().unwrap_or_default()
}

fn count_missing(evidence: &Evidence<'_>, judgement: &mut Judgement) {
    let Some(held) = evidence.held else { return };
    for ack in evidence.acks {
        if held.contains(&(ack.writer.name(), ack.seq)) {
            continue;
        }
        match ack.writer {
            Writer::Proxy(_) => judgement.lost += 1,
            Writer::Local(_) => {
                judgement.orphans += 1;
                let at = ack.at.since(evidence.fault);
                judgement.last_orphan = judgement.last_orphan.max(Some(at));
            }
        }
    }
}

fn count_two_writers(acks: &[Ack], judgement: &mut Judgement) {
    let mut reigns: BTreeMap<(&str, &str), Vec<&Ack>> = BTreeMap::new();
    for ack in acks {
        reigns.entry((&ack.server, &ack.timeline)).or_default().push(ack);
    }
    let first = |reign: &Vec<&Ack>| reign.iter().map(|ack| ack.at).min().unwrap_or_default();
    let mut reigns: Vec<Vec<&Ack>> = reigns.into_values().collect();
    reigns.sort_by_key(first);
    for (index, earlier) in reigns.iter().enumerate() {
        // The next reign's first acknowledgement is the earliest of all later ones.
        let Some(begun) = reigns.get(index + 1).map(first) else {
            return;
        };
        for late in earlier.iter().filter(|ack| ack.at > begun) {
            judgement.two_writers += 1;
            let on_its_way = late.sent <= begun && late.at.since(begun) <= ON_ITS_WAY_MAX;
            judgement.two_writers_on_their_way += usize::from(on_its_way);
            judgement.two_writers_by_proxy += usize::from(!late.writer.is_local());
            judgement.overlap = judgement.overlap.max(late.at.since(begun));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Boottime {
        Boottime::from_nanos((1000 + ms) * 1_000_000)
    }

    fn ack(writer: Writer, seq: u64, server: &str, timeline: &str, sent: u64, at: u64) -> Ack {
        Ack {
            writer,
            seq,
            server: server.to_owned(),
            timeline: timeline.to_owned(),
            sent: ms(sent),
            at: ms(at),
        }
    }

    fn judged(acks: &[Ack], held: &[(Writer, u64)], fault: u64, end: u64) -> Judgement {
        let held = held.iter().map(|(writer, seq)| (writer.name(), *seq)).collect();
        judge(&Evidence {
            acks,
            reads: &[],
            held: Some(&held),
            fault: ms(fault),
            end: ms(end),
        })
    }

    fn local(name: &str) -> Writer {
        Writer::Local(name.to_owned())
    }

    #[test]
    fn each_client_waits_for_itself_and_the_worst_counts() {
        let acks = [
            ack(Writer::Proxy(0), 1, "a", "1", 0, 10),
            ack(Writer::Proxy(1), 1, "a", "1", 0, 500),
            ack(Writer::Proxy(0), 2, "a", "1", 0, 900),
            ack(Writer::Proxy(1), 2, "a", "1", 0, 950),
        ];
        let held: Vec<_> = acks.iter().map(|ack| (ack.writer.clone(), ack.seq)).collect();
        let judgement = judged(&acks, &held, 600, 960);
        assert_eq!(judgement.write_gap, Duration::from_millis(890));
        assert_eq!(
            (judgement.acknowledged, judgement.lost, judgement.two_writers),
            (4, 0, 0)
        );
    }

    #[test]
    fn a_client_that_is_never_answered_again_has_waited_to_the_end() {
        let acks = [ack(Writer::Proxy(0), 1, "a", "1", 0, 10)];
        assert_eq!(judged(&acks, &[], 20, 5010).write_gap, Duration::from_secs(5));
    }

    #[test]
    fn acknowledgements_of_an_isolated_leader_are_orphans_with_an_end() {
        let acks = [
            ack(local("a"), 1, "a", "1", 90, 95),
            ack(local("a"), 2, "a", "1", 4000, 4100),
            ack(local("b"), 1, "b", "2", 5000, 5100),
        ];
        let judgement = judged(&acks, &[(local("a"), 1), (local("b"), 1)], 100, 6000);
        assert_eq!((judgement.orphans, judgement.two_writers), (1, 0));
        assert_eq!(judgement.last_orphan, Some(Duration::from_secs(4)));
        assert_eq!(judgement.last_of_old, Duration::from_secs(4));
    }

    #[test]
    fn two_writers_are_counted_and_those_on_their_way_told_apart() {
        let acks = [
            ack(local("a"), 1, "a", "1", 0, 5),
            ack(local("b"), 1, "b", "2", 90, 100),
            ack(local("a"), 2, "a", "1", 80, 110),
            ack(local("a"), 3, "a", "1", 120, 150),
            ack(Writer::Proxy(0), 9, "a", "1", 120, 140),
            ack(Writer::Proxy(1), 8, "a", "1", 50, 350),
            ack(local("a"), 4, "a", "3", 400, 410),
        ];
        let judgement = judged(&acks, &[], 10, 500);
        assert_eq!((judgement.two_writers, judgement.two_writers_on_their_way), (4, 1));
        assert_eq!(judgement.two_writers_by_proxy, 2);
        assert_eq!(judgement.overlap, Duration::from_millis(250));
    }
}
