//! Which processes are PostgreSQL's: what has to be gone before anybody may say that the instance has ended.

use std::collections::BTreeSet;
use std::path::PathBuf;

use rustix::io;
use rustix::process::{Pid, Signal, getpid};

use crate::child::Child;
use crate::directory::{DataDirectory, Sight};
use crate::lock_file::Segment;
use crate::postmaster::Postmaster;
use crate::process::{Process, ProcessTable};

/// The keeper's own children, by their numbers. What else descends from the keeper belongs to the instance: as a
/// subreaper it becomes the parent of every orphan.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Household {
    pub(crate) agent: Option<Pid>,
    pub(crate) proxy: Option<Pid>,
    pub(crate) sentinel: Option<Pid>,
    /// The dry start of an upgrade.
    pub(crate) dry_start: Option<Pid>,
    pub(crate) postmaster: Option<Pid>,
}

/// What one keeper knows of an instance and the next cannot find out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct InstanceRecord {
    /// Number and start of processes.
    pub(crate) known: Vec<(i32, u64)>,
    pub(crate) segment: Option<Segment>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kin {
    /// Agent, proxy, sentinel or dry start, something that descends from one of them, or the keeper itself.
    Staff,
    /// The postmaster, or something that descends from it.
    Postmaster,
    /// Descends from the keeper, and from none of its present children.
    Orphan,
    /// No descendant of ours.
    Stranger,
}

/// Finds the processes of one instance, and ends them.
pub(crate) struct Instance {
    table: ProcessTable,
    data_dir: DataDirectory,
    found: Vec<Process>,
    /// What was found since the end began, and below an adopted postmaster. A backend that has left the data directory
    /// and lost its parent is known by this alone.
    known: BTreeSet<(i32, u64)>,
    /// The shared memory of a server that is not the keeper's own.
    segment: Option<Segment>,
}

impl Instance {
    /// # Errors
    /// When /proc cannot be used, or no thread can be started.
    pub(crate) fn new(data_dir: PathBuf) -> std::io::Result<Self> {
        Ok(Self {
            table: ProcessTable::open()?,
            data_dir: DataDirectory::new(data_dir)?,
            found: Vec::new(),
            known: BTreeSet::new(),
            segment: None,
        })
    }

    /// Whether a process of the instance is left. What cannot be found out counts as left.
    pub(crate) fn is_left(&mut self, household: Option<&Household>) -> bool {
        let unseen = self.data_dir.look().is_none();
        unseen || self.find(household).map_or(true, |found| !found.is_empty()) || self.is_attached_to()
    }

    /// Whether the data directory's disk has yet to answer.
    pub(crate) fn disk_hangs(&mut self) -> bool {
        self.data_dir.hangs()
    }

    /// The postmaster that the data directory names, if it serves this very directory now.
    pub(crate) fn living_postmaster(&mut self) -> Option<Pid> {
        let Sight { id, lock } = self.data_dir.look()?;
        let (pid, data_dir) = (lock?.postmaster, id?);
        let lives = self.table.read(pid).ok()?.is_some_and(|process| !process.zombie);
        (lives && self.table.serves(pid, &data_dir)).then_some(pid)
    }

    /// Whether the data directory still names this postmaster, as it does after one that was killed. One that exits takes
    /// its file away.
    pub(crate) fn names(&mut self, postmaster: Pid) -> bool {
        let lock = self.data_dir.look().and_then(|sight| sight.lock);
        lock.is_some_and(|file| file.postmaster == postmaster)
    }

    /// Takes hold of that postmaster, by its pidfd first and by what it serves then.
    pub(crate) fn adopt(&mut self, pid: Pid) -> std::io::Result<Postmaster> {
        Child::open(pid, || self.living_postmaster() == Some(pid)).map(Postmaster::adopted)
    }

    /// Lists what belongs to an adopted postmaster, while it can still be found by its descent.
    pub(crate) fn list(&mut self, household: &Household) -> io::Result<()> {
        self.note_segment();
        self.find(Some(household))?;
        self.known.clear();
        self.remember();
        Ok(())
    }

    /// A server makes its shared memory anew after one of its processes has crashed.
    fn note_segment(&mut self) {
        let lock = self.data_dir.look().and_then(|sight| sight.lock);
        let segment = lock.and_then(|file| file.segment());
        self.segment = segment.or(self.segment);
    }

    /// Whether a process is attached to the noted shared memory, be it one that can be found or not.
    fn is_attached_to(&self) -> bool {
        self.segment.is_some_and(|segment| match segment.attachments() {
            Ok(attachments) => attachments.is_some_and(|count| count > 0),
            Err(_) => true,
        })
    }

    /// What a keeper has to tell the next in an upgrade.
    pub(crate) fn record(&self) -> InstanceRecord {
        InstanceRecord {
            known: self.known.iter().copied().collect(),
            segment: self.segment,
        }
    }

    /// Takes over what the keeper before an upgrade knew.
    pub(crate) fn take_over(mut self, record: InstanceRecord) -> Self {
        self.known.extend(record.known);
        self.segment = record.segment;
        self
    }

    /// The processes of the instance: descendants of the keeper that are not its staff, servers in the data directory
    /// that others have started, with all that descends from these or is attached to their shared memory, and what is
    /// known from before. The sentinel has no household, and looks for servers only. A server whose directory has been renamed or
    /// removed under it is found by its descent alone.
    fn find(&mut self, household: Option<&Household>) -> io::Result<&[Process]> {
        self.look(household)?;
        if self.found.is_empty() {
            // One picture may miss a process that changes its parent just then.
            self.look(household)?;
        }
        Ok(&self.found)
    }

    /// SIGQUIT to each postmaster of the instance that nobody holds a pidfd of. Returns whether there was one. What is
    /// found is remembered until `forget`.
    pub(crate) fn quit_strangers(&mut self, household: Option<&Household>) -> io::Result<bool> {
        self.note_segment();
        self.find(household)?;
        self.remember();
        let mut any = false;
        for process in &self.found {
            let head = !self.found.iter().any(|other| other.raw_pid() == process.parent);
            // A backend that lost its postmaster may have children too, but these are not servers.
            let table = &mut self.table;
            if head
                && self
                    .found
                    .iter()
                    .any(|other| other.parent == process.raw_pid() && table.is_server(other.pid))
            {
                process.signal(Signal::QUIT);
                any = true;
            }
        }
        Ok(any)
    }

    /// SIGKILL to every process of the instance. Returns how many were found; zero means that it has ended.
    pub(crate) fn kill(&mut self, household: Option<&Household>) -> io::Result<usize> {
        self.find(household)?;
        self.remember();
        for process in &self.found {
            process.signal(Signal::KILL);
        }
        // Somebody who holds on to the shared memory and cannot be found is left too.
        Ok(self.found.len().max(usize::from(self.is_attached_to())))
    }

    /// The end is over: later processes have nothing to do with those that were found.
    pub(crate) fn forget(&mut self) {
        self.known.clear();
        self.segment = None;
    }

    /// SIGKILL to what a dead agent left behind: orphans that the living postmaster is no ancestor of. Without a
    /// postmaster every orphan is meant, for then it belongs to a dead agent or to a dead instance. Returns how many
    /// were found.
    pub(crate) fn kill_orphans(&mut self, household: &Household) -> io::Result<usize> {
        // As in `find`, one picture without an orphan does not show that there is none.
        match self.kill_orphans_once(household)? {
            0 => self.kill_orphans_once(household),
            found => Ok(found),
        }
    }

    fn kill_orphans_once(&mut self, household: &Household) -> io::Result<usize> {
        self.table.take()?;
        let all = self.table.processes();
        let orphans = all
            .iter()
            .filter(|process| !process.zombie && kin(all, **process, household) == Kin::Orphan);
        Ok(orphans.inspect(|process| process.signal(Signal::KILL)).count())
    }

    fn look(&mut self, household: Option<&Household>) -> io::Result<()> {
        self.table.take()?;
        self.found.clear();
        let data_dir = self.data_dir.look().and_then(|sight| sight.id);
        // Below a living postmaster everybody is found by descent, and reading all mappings is not cheap.
        let bereft = household.is_none_or(|household| household.postmaster.is_none());
        let segment = self.segment.filter(|_| bereft && self.is_attached_to());
        let mut strangers = Vec::new();
        for index in 0..self.table.processes().len() {
            let process = self.table.processes()[index];
            let kin = household.map_or(Kin::Stranger, |household| {
                kin(self.table.processes(), process, household)
            });
            let ours = match kin {
                Kin::Staff => false,
                Kin::Postmaster | Kin::Orphan => true,
                Kin::Stranger => {
                    let serves = data_dir.is_some_and(|data_dir| self.table.serves(process.pid, &data_dir));
                    let ours = serves
                        || self.known.contains(&process.identity())
                        || segment.is_some_and(|segment| self.table.is_attached(process.pid, segment));
                    if ours {
                        strangers.push(process.raw_pid());
                    }
                    ours
                }
            };
            if ours {
                self.found.push(process);
            }
        }
        self.add_descendants(&strangers, household);
        self.found.retain(|process| !process.zombie);
        Ok(())
    }

    /// Adds what descends from these, ordered by number, and is not known to belong to the instance already.
    fn add_descendants(&mut self, heads: &[i32], household: Option<&Household>) {
        if heads.is_empty() {
            return;
        }
        let all = self.table.processes();
        for process in all {
            let is_head = |pid: i32| heads.binary_search(&pid).is_ok();
            let descends = !is_head(process.raw_pid()) && ancestors(all, *process).any(is_head);
            if descends && household.is_none_or(|household| kin(all, *process, household) == Kin::Stranger) {
                self.found.push(*process);
            }
        }
    }

    fn remember(&mut self) {
        self.known.extend(self.found.iter().map(|process| process.identity()));
    }
}

/// Parent, grandparent and so on, as far as the picture shows them.
fn ancestors(all: &[Process], of: Process) -> impl Iterator<Item = i32> {
    let parent_of = |pid: i32| {
        let index = all.binary_search_by_key(&pid, |process| process.raw_pid()).ok()?;
        Some(all[index].parent)
    };
    // The picture is not of one instant, and numbers come again: a line longer than the table is a circle.
    std::iter::successors(Some(of.parent), move |pid| parent_of(*pid)).take(all.len())
}

fn kin(all: &[Process], process: Process, household: &Household) -> Kin {
    let keeper = getpid().as_raw_nonzero().get();
    let is = |child: Option<Pid>, pid: i32| child.is_some_and(|child| child.as_raw_nonzero().get() == pid);
    if process.raw_pid() == keeper {
        return Kin::Staff;
    }
    for pid in std::iter::once(process.raw_pid()).chain(ancestors(all, process)) {
        if is(household.postmaster, pid) {
            return Kin::Postmaster;
        }
        let staff = [
            household.agent,
            household.proxy,
            household.sentinel,
            household.dry_start,
        ];
        if staff.into_iter().any(|child| is(child, pid)) {
            return Kin::Staff;
        }
        if pid == keeper {
            return Kin::Orphan;
        }
    }
    Kin::Stranger
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pid(raw: i32) -> Pid {
        Pid::from_raw(raw).expect("the numbers below are positive")
    }

    /// A picture made of numbers and parents, in the order of the numbers.
    fn picture(pairs: &[(i32, i32)]) -> Vec<Process> {
        let process = |&(number, parent)| Process {
            pid: pid(number),
            parent,
            started: 1,
            zombie: false,
        };
        pairs.iter().map(process).collect()
    }

    #[test]
    fn kinship_follows_the_nearest_child_of_the_keeper() {
        let me = getpid().as_raw_nonzero().get();
        // All numbers lie above ours, which keeps the picture ordered.
        let [
            agent,
            tool,
            proxy,
            sentinel,
            postmaster,
            backend,
            helper,
            orphan,
            child,
            stranger,
        ] = std::array::from_fn(|index| me + 1 + i32::try_from(index).expect("ten"));
        let all = picture(&[
            (me, 1),
            (agent, me),
            (tool, agent),
            (proxy, me),
            (sentinel, me),
            (postmaster, me),
            (backend, postmaster),
            (helper, backend),
            (orphan, me),
            (child, orphan),
            (stranger, 1),
        ]);
        let (agent_pid, proxy, sentinel) = (Some(pid(agent)), Some(pid(proxy)), Some(pid(sentinel)));
        let household = Household {
            agent: agent_pid,
            proxy,
            sentinel,
            dry_start: None,
            postmaster: Some(pid(postmaster)),
        };
        let kinship = |household| {
            all.iter()
                .map(|process| kin(&all, *process, household))
                .collect::<Vec<_>>()
        };
        let (staff, own) = (Kin::Staff, Kin::Postmaster);
        let orphans = [Kin::Orphan, Kin::Orphan, Kin::Stranger];
        let want = [&[staff, staff, staff, staff, staff, own, own, own][..], &orphans].concat();
        assert_eq!(kinship(&household), want);
        let bereft = Household {
            agent: None,
            ..household
        };
        assert_eq!(
            kinship(&bereft)[1..3],
            [Kin::Orphan, Kin::Orphan],
            "what a dead agent leaves behind"
        );
    }

    #[test]
    fn a_circle_in_the_picture_ends() {
        let all = picture(&[(10, 11), (11, 10)]);
        assert!(ancestors(&all, all[0]).count() <= 2);
    }
}
