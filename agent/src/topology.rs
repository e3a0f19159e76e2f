//! Who streams from whom. Pure: every member computes the same from one view, so that a slot is made where its standby
//! will ask for it.

use pgherd_cluster::name::MemberName;
use pgherd_cluster::record::{MemberRecord, PermanentSlot, PgState};
use pgherd_cluster::view::View;

/// What a member's tags say of its place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// It takes its log from the archive only.
    pub nostream: bool,
    /// The member that it is to stream from.
    pub replicatefrom: Option<String>,
    /// Whether it may never lead.
    pub nofailover: bool,
}

impl Place {
    /// Of a member's record.
    #[must_use]
    pub fn of(record: &MemberRecord) -> Self {
        Self {
            nostream: record.tag("nostream"),
            replicatefrom: record.replicatefrom().map(str::to_owned),
            nofailover: record.nofailover(),
        }
    }
}

/// The member that `member` streams from while `leader` leads; nothing for one that does not stream. Whoever it is tagged
/// with counts only while that one runs, and does not itself hang on this member; else it is the leader.
#[must_use]
pub fn source(view: &View, member: &MemberName, place: &Place, leader: &MemberName) -> Option<MemberName> {
    if place.nostream || member == leader {
        return None;
    }
    let named = place.replicatefrom.as_deref();
    let named = named.and_then(|named| view.members.keys().find(|name| name.as_str() == named));
    let usable = |named: &&MemberName| runs(view, named) && !hangs_on(view, named, member, leader);
    Some(named.filter(usable).unwrap_or(leader).clone())
}

fn runs(view: &View, name: &MemberName) -> bool {
    view.members
        .get(name)
        .is_some_and(|member| member.record.state == PgState::Running)
}

/// Whether the tags lead from `from` to `member` before they lead to the leader. Two members that are tagged with each other
/// would wait for each other for ever.
fn hangs_on(view: &View, from: &MemberName, member: &MemberName, leader: &MemberName) -> bool {
    let mut at = from.clone();
    for _ in 0..=view.members.len() {
        if at == *member {
            return true;
        }
        if at == *leader {
            return false;
        }
        let next = view.members.get(&at).and_then(|found| found.record.replicatefrom());
        match next.and_then(|next| view.members.keys().find(|name| name.as_str() == next)) {
            Some(next) => at = next.clone(),
            None => return false,
        }
    }
    true
}

/// The members between `member` and the leader, beginning with the one that it streams from, and ending with the leader
/// unless somebody on the way does not stream.
#[must_use]
pub fn way_up(view: &View, member: &MemberName, place: &Place, leader: &MemberName) -> Vec<MemberName> {
    let mut way = Vec::new();
    let mut next = source(view, member, place, leader);
    while let Some(name) = next {
        if way.len() > view.members.len() {
            break; // The view may show a circle of members that are none of our own.
        }
        let place = view.members.get(&name).map(|found| Place::of(&found.record));
        next = source(view, &name, &place.unwrap_or_default(), leader);
        way.push(name);
    }
    way
}

/// Whether copies of the logical slots are kept on a member: not where it may never lead, nor where nothing tells the leader
/// which rows they still need.
#[must_use]
pub fn keeps_logical(view: &View, member: &MemberName, place: &Place, leader: &MemberName) -> bool {
    let reaches = member == leader || way_up(view, member, place, leader).last() == Some(leader);
    reaches && (member == leader || !place.nofailover)
}

/// Whether the standby of `member` must say which rows it still needs (`hot_standby_feedback`): for its own copies of
/// logical slots, or for those of members that stream from it.
#[must_use]
pub fn needs_feedback(view: &View, member: &MemberName, place: &Place) -> bool {
    let config = view.config.value.clone().unwrap_or_default();
    let is_logical = |slot: &PermanentSlot| matches!(slot, PermanentSlot::Logical { .. });
    if !config.use_slots() || config.is_standby_cluster() || !config.permanent_slots().slots.values().any(is_logical) {
        return false;
    }
    // A leader, and whoever knows of none, may feed anybody next.
    let Some(leader) = view
        .epoch()
        .map(|epoch| &epoch.holder)
        .filter(|leader| *leader != member)
    else {
        return !place.nostream;
    };
    let feeds = view.members.values().any(|other| {
        let place = Place::of(&other.record);
        other.name != *member
            && keeps_logical(view, &other.name, &place, leader)
            && way_up(view, &other.name, &place, leader).contains(member)
    });
    feeds || keeps_logical(view, member, place, leader)
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::name::Scope;
    use pgherd_cluster::record::DynamicConfig;
    use pgherd_cluster::view::{Epoch, Leader, Member, Revised};
    use serde_json::{Value, json};

    use super::*;

    fn name(text: &str) -> MemberName {
        MemberName::new(text).expect("a plain name")
    }

    /// Members with their tags; the first leads.
    fn view(members: &[(&str, Value)]) -> View {
        let mut view = View::empty(Scope::new("c").expect("a plain name"));
        for (text, tags) in members {
            let mut record = MemberRecord::new(String::new(), String::new());
            record.state = PgState::Running;
            record.tags = tags.as_object().cloned().unwrap_or_default();
            let (name, mod_revision) = (name(text), 1);
            view.members.insert(
                name.clone(),
                Member {
                    name,
                    record,
                    mod_revision,
                },
            );
        }
        let holder = name(members.first().expect("a leader").0);
        view.leader = Some(Leader {
            epoch: Epoch {
                holder,
                create_revision: 1,
            },
            lease: 1,
            mod_revision: 1,
        });
        view
    }

    fn source_of(view: &View, text: &str) -> Option<String> {
        let member = view.members.get(&name(text)).expect("a member");
        source(view, &member.name, &Place::of(&member.record), &name("n1")).map(|name| name.to_string())
    }

    fn from(source: &str) -> Value {
        json!({ "replicatefrom": source })
    }

    #[test]
    fn a_member_streams_from_whom_it_is_tagged_with_while_that_one_runs() {
        let mut view = view(&[
            ("n1", json!({})),
            ("n2", json!({})),
            ("n3", from("n2")),
            ("n4", from("gone")),
        ]);
        assert_eq!(source_of(&view, "n2").as_deref(), Some("n1"));
        assert_eq!(source_of(&view, "n3").as_deref(), Some("n2"));
        assert_eq!(source_of(&view, "n4").as_deref(), Some("n1"));
        assert_eq!(source_of(&view, "n1"), None, "the leader streams from nobody");
        view.members.get_mut(&name("n2")).expect("a member").record.state = PgState::Stopped;
        assert_eq!(source_of(&view, "n3").as_deref(), Some("n1"));
    }

    #[test]
    fn members_that_are_tagged_with_each_other_stream_from_the_leader() {
        let view = view(&[
            ("n1", json!({})),
            ("n2", from("n3")),
            ("n3", from("n2")),
            ("n4", from("n4")),
            ("n5", from("n2")),
        ]);
        for member in ["n2", "n3", "n4"] {
            assert_eq!(source_of(&view, member).as_deref(), Some("n1"), "{member}");
        }
        // Its source is in a circle that it is not part of, and which is cut elsewhere.
        assert!(way_up(&view, &name("n5"), &Place::default(), &name("n1")).len() <= 6);
    }

    #[test]
    fn copies_of_logical_slots_are_kept_where_the_leader_hears_of_them() {
        let members = [
            ("n1", json!({})),
            ("n2", json!({"nostream": true})),
            ("n3", from("n2")),
            ("n4", json!({"nofailover": true})),
            ("n5", from("n4")),
        ];
        let mut view = view(&members);
        let slots = r#"{"slots": {"a": {"type": "logical", "database": "d", "plugin": "p"}}}"#;
        view.config = Revised {
            value: Some(DynamicConfig::parse(slots)),
            mod_revision: 1,
        };
        let keeps = |text: &str| {
            let member = view.members.get(&name(text)).expect("a member");
            let place = Place::of(&member.record);
            let keeps = keeps_logical(&view, &member.name, &place, &name("n1"));
            (keeps, needs_feedback(&view, &member.name, &place))
        };
        assert_eq!(keeps("n2"), (false, false), "it does not stream");
        assert_eq!(keeps("n3"), (false, false), "nor does its source");
        assert_eq!(keeps("n4"), (false, true), "it may never lead, and feeds one that may");
        assert_eq!(keeps("n5"), (true, true));
    }
}
