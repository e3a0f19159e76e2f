//! Directed links between machines: delay, loss, and cuts, which may be of one direction only.

use std::time::Duration;

use crate::random::Random;

/// A place on the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Site {
    /// A member's machine.
    Member(usize),
    /// A machine of etcd.
    Etcd(usize),
}

/// The state of one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    /// How many faults cut it. They may overlap.
    cuts: u32,
    /// How many messages of a thousand are lost.
    loss: u64,
    /// How much longer than usual a message takes.
    slow: Duration,
}

const WHOLE: Link = Link {
    cuts: 0,
    loss: 0,
    slow: Duration::ZERO,
};

/// All links.
#[derive(Clone, Debug)]
pub(crate) struct Network {
    members: usize,
    size: usize,
    links: Vec<Link>,
}

impl Network {
    pub(crate) fn new(members: usize, etcd: usize) -> Self {
        let size = members + etcd;
        Self {
            members,
            size,
            links: vec![WHOLE; size * size],
        }
    }

    const fn place(&self, site: Site) -> usize {
        match site {
            Site::Member(member) => member,
            Site::Etcd(node) => self.members + node,
        }
    }

    fn link(&self, from: Site, to: Site) -> Link {
        let at = self.place(from) * self.size + self.place(to);
        self.links.get(at).copied().unwrap_or(WHOLE)
    }

    fn change(&mut self, from: Site, to: Site, change: impl FnOnce(&mut Link)) {
        let at = self.place(from) * self.size + self.place(to);
        if let Some(link) = self.links.get_mut(at) {
            change(link);
        }
    }

    /// Every place.
    pub(crate) fn sites(&self) -> Vec<Site> {
        let etcd = self.size - self.members;
        (0..self.members)
            .map(Site::Member)
            .chain((0..etcd).map(Site::Etcd))
            .collect()
    }

    /// Cuts one direction.
    pub(crate) fn cut(&mut self, from: Site, to: Site) {
        self.change(from, to, |link| link.cuts += 1);
    }

    /// Takes one cut of a direction back.
    pub(crate) fn mend(&mut self, from: Site, to: Site) {
        self.change(from, to, |link| link.cuts = link.cuts.saturating_sub(1));
    }

    /// Makes a direction lose messages and take longer.
    pub(crate) fn degrade(&mut self, from: Site, to: Site, loss: u64, slow: Duration) {
        self.change(from, to, |link| {
            link.loss = loss;
            link.slow = slow;
        });
    }

    /// Makes everything whole.
    pub(crate) fn heal(&mut self) {
        self.links.fill(WHOLE);
    }

    /// Whether messages pass from one place to another.
    pub(crate) fn passes(&self, from: Site, to: Site) -> bool {
        from == to || self.link(from, to).cuts == 0
    }

    /// Whether two places can talk.
    pub(crate) fn talks(&self, one: Site, other: Site) -> bool {
        self.passes(one, other) && self.passes(other, one)
    }

    /// Whether two places can talk and no message of theirs is lost.
    pub(crate) fn talks_surely(&self, one: Site, other: Site) -> bool {
        let sure = |from, to| self.link(from, to).loss == 0;
        self.talks(one, other) && (one == other || sure(one, other) && sure(other, one))
    }

    /// How long a message that is sent now is under way; nothing when it does not arrive.
    pub(crate) fn transit(&self, from: Site, to: Site, random: &mut Random) -> Option<Duration> {
        if from == to {
            return Some(Duration::from_micros(random.between(20, 60)));
        }
        let link = self.link(from, to);
        if link.cuts > 0 || random.chance(link.loss) {
            return None;
        }
        Some(Duration::from_micros(random.between(150, 900)) + link.slow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: Site = Site::Member(0);
    const TWO: Site = Site::Etcd(1);

    #[test]
    fn a_cut_is_of_one_direction_and_cuts_add_up() {
        let mut network = Network::new(3, 3);
        network.cut(ONE, TWO);
        network.cut(ONE, TWO);
        assert!(!network.passes(ONE, TWO) && network.passes(TWO, ONE) && !network.talks(ONE, TWO));
        network.mend(ONE, TWO);
        assert!(!network.passes(ONE, TWO));
        network.mend(ONE, TWO);
        assert!(network.talks(ONE, TWO));
    }

    #[test]
    fn messages_take_time_and_get_lost() {
        let mut network = Network::new(3, 3);
        let mut random = Random::new(1);
        assert!(
            network
                .transit(ONE, TWO, &mut random)
                .is_some_and(|delay| delay > Duration::ZERO)
        );
        network.degrade(ONE, TWO, 500, Duration::from_millis(5));
        let arrived: Vec<_> = (0..200)
            .filter_map(|_| network.transit(ONE, TWO, &mut random))
            .collect();
        assert!((50..150).contains(&arrived.len()));
        assert!(arrived.iter().all(|delay| *delay > Duration::from_millis(5)));
        network.heal();
        assert!((0..50).all(|_| network.transit(ONE, TWO, &mut random).is_some()));
    }
}
