//! Safety: whatever happens between two steps, whoever may win has all that a client was told of.

use std::collections::{HashSet, VecDeque};

use proptest::prelude::*;

use super::world::{Act, Performer, World};
use super::*;

fn settings(mode: SyncMode, node_count: u32) -> SyncSettings {
    SyncSettings {
        mode,
        node_count,
        ..SyncSettings::default()
    }
}

/// Every state that one leader can reach with `members` members and `entries` commits; the first violation, if any.
fn search(members: usize, entries: usize, settings: SyncSettings, performer: Performer) -> Result<usize, String> {
    let mut start = World::new(members, settings, performer);
    // Without patience a leader does nothing that it could not also leave undone.
    start.act(Act::Patience(true));
    let mut seen = HashSet::from([start.key()]);
    let mut open = VecDeque::from([start]);
    let mut acts = vec![Act::Commit, Act::Decide, Act::Perform];
    for member in 1..members {
        acts.extend([Act::Receive(member), Act::Connect(member), Act::Disconnect(member)]);
    }
    while let Some(world) = open.pop_front() {
        for act in &acts {
            if matches!(act, Act::Commit) && world.logs[0].len() >= entries {
                continue;
            }
            let mut next = world.clone();
            next.act(*act);
            next.loses_nothing()?;
            if performer == Performer::Faithful {
                next.agrees()?;
            }
            if seen.insert(next.key()) {
                open.push_back(next);
            }
        }
    }
    Ok(seen.len())
}

#[test]
fn no_state_that_a_leader_of_two_standbys_can_reach_loses_an_acknowledged_commit() {
    for mode in [SyncMode::Priority, SyncMode::Quorum] {
        for count in [1, 2] {
            let states =
                search(3, 2, settings(mode, count), Performer::Faithful).unwrap_or_else(|lost| panic!("{lost}"));
            assert!(states > 1000, "{mode:?} {count}: the search went nowhere: {states}");
        }
    }
}

#[test]
fn no_state_that_a_leader_of_three_standbys_can_reach_loses_an_acknowledged_commit() {
    for mode in [SyncMode::Priority, SyncMode::Quorum] {
        let states = search(4, 1, settings(mode, 1), Performer::Faithful).unwrap_or_else(|lost| panic!("{lost}"));
        assert!(states > 1000, "{mode:?}: the search went nowhere: {states}");
    }
}

#[test]
fn the_search_finds_what_the_other_order_loses() {
    for mode in [SyncMode::Priority, SyncMode::Quorum] {
        let lost = search(3, 2, settings(mode, 1), Performer::Swapped);
        assert!(
            lost.is_err(),
            "{mode:?}: the setting went before the record, and nothing was found"
        );
    }
}

fn any_act(members: usize) -> impl Strategy<Value = Act> {
    let member = move || 0..members;
    let mode = prop_oneof![Just(SyncMode::Priority), Just(SyncMode::Quorum)];
    prop_oneof![
        4 => Just(Act::Commit),
        8 => member().prop_map(Act::Receive),
        2 => member().prop_map(Act::Disconnect),
        5 => member().prop_map(Act::Connect),
        8 => Just(Act::Decide),
        8 => Just(Act::Perform),
        1 => Just(Act::AgentRestarts),
        2 => any::<bool>().prop_map(Act::Patience),
        2 => member().prop_map(Act::Elect),
        4 => Just(Act::Finish),
        1 => (member(), any::<bool>()).prop_map(|(member, nosync)| Act::Nosync(member, nosync)),
        1 => (mode, 1_u32..4, any::<bool>()).prop_map(|(mode, count, strict)| Act::Settings(mode, count, strict)),
    ]
}

/// Performs steps until there is none; how many there were.
fn settle(world: &mut World) -> Result<usize, String> {
    world.act(Act::AgentRestarts);
    for _ in 0..4 {
        world.act(Act::Perform);
        world.act(Act::Finish);
    }
    world.act(Act::Patience(true));
    for steps in 0..12 {
        for member in 0..world.size() {
            (0..40).for_each(|_| world.act(Act::Receive(member)));
        }
        if next_step(&world.inputs()).is_none() {
            return Ok(steps);
        }
        world.act(Act::Decide);
        world.act(Act::Perform);
        world.loses_nothing()?;
        world.agrees()?;
    }
    Err(format!("no end of steps: {world:?}"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Elections, promotions, standbys that come and go, changed tags and settings, lost steps, in any order.
    #[test]
    fn no_order_of_events_loses_an_acknowledged_commit_and_steps_come_to_an_end(
        members in 2_usize..5,
        mode in prop_oneof![Just(SyncMode::Priority), Just(SyncMode::Quorum)],
        acts in prop::collection::vec(any_act(4), 1..150),
    ) {
        let mut world = World::new(members, settings(mode, 1), Performer::Faithful);
        for act in acts {
            let (Act::Receive(member) | Act::Disconnect(member) | Act::Connect(member) | Act::Elect(member) | Act::Nosync(member, _)) = act else {
                world.act(act);
                continue;
            };
            if member < members {
                world.act(act);
                prop_assert_eq!(world.loses_nothing(), Ok(()));
                prop_assert_eq!(world.agrees(), Ok(()));
            }
        }
        prop_assert_eq!(world.loses_nothing(), Ok(()));
        prop_assert_eq!(world.agrees(), Ok(()));
        let ended = settle(&mut world);
        prop_assert!(ended.is_ok(), "{:?}", ended);

        // In order: whoever streams and may be waited for is in both records, in the numbers that were asked for.
        let able: NameSet = (0..members)
            .filter(|member| world.streaming[*member] && !world.nosync[*member] && *member != world.leader)
            .map(|member| StandbyName::from(super::world::NAMES[member]))
            .collect();
        let count = able.len().min(usize::try_from(world.settings.node_count).expect("small"));
        let (n, names) = world.setting.guarantee();
        let voters = listed(&world.state);
        prop_assert_eq!(n, count);
        prop_assert_eq!(&voters, &names);
        match world.settings.mode {
            SyncMode::Quorum => {
                prop_assert_eq!(&names, &able);
                prop_assert_eq!(usize::try_from(world.state.quorum).expect("small"), able.len() - count);
            }
            _ => prop_assert!(names.is_subset(&able) && names.len() == count && world.state.quorum == 0),
        }
    }
}
