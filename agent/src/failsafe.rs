//! The failsafe list: the members whose vouches a leader needs while etcd does not answer, and who alone may be elected. Pure.

use std::collections::BTreeMap;

use pgherd_cluster::etcd::{Compare, Op, Txn};
use pgherd_cluster::key::{Key, Keys};
use pgherd_cluster::name::MemberName;
use pgherd_cluster::view::{Epoch, View};

use crate::lease::Voucher;

/// A name and where its REST interface is, as often as it was told differently.
pub type List = BTreeMap<String, Vec<String>>;

/// The list that stands.
#[must_use]
pub fn stands(view: &View) -> List {
    let entry = |(name, url): (&String, &String)| (name.clone(), vec![url.clone()]);
    view.failsafe.iter().map(entry).collect()
}

/// A write of the list: its outcome is known only once the key is seen at another revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sent {
    /// The revision of the key that the write compared.
    pub compared: i64,
    /// What was written.
    pub list: List,
}

/// Every list that may stand: the one that is seen, and one that was written and that the view may not show yet.
#[must_use]
pub fn may_stand(view: &View, sent: Option<&Sent>) -> List {
    let seen = stands(view);
    match sent {
        Some(sent) if view.failsafe_revision <= sent.compared => united(&seen, &sent.list),
        Some(_) | None => seen,
    }
}

/// The list that should stand: every member that has a key, and the leader itself, whose key may just have ended with its
/// lease, by `own_url`.
#[must_use]
pub fn wanted(view: &View, leader: &MemberName, own_url: &str) -> List {
    let entry = |member: &pgherd_cluster::view::Member| (member.name.to_string(), vec![member.record.api_url.clone()]);
    let mut list: List = view.members.values().map(entry).collect();
    list.entry(leader.to_string())
        .or_insert_with(|| vec![own_url.to_owned()]);
    list
}

/// Both.
#[must_use]
pub fn united(one: &List, other: &List) -> List {
    let mut both = one.clone();
    for (name, urls) in other {
        let known = both.entry(name.clone()).or_default();
        for url in urls {
            if !known.contains(url) {
                known.push(url.clone());
            }
        }
    }
    both
}

/// Whom to ask. A name that could not be a member's can vouch for nothing, and nobody can be elected by it.
#[must_use]
pub fn vouchers(list: &List) -> Vec<Voucher> {
    let name = |text: &String| MemberName::new(text.clone()).ok();
    let one = |(text, urls): (&String, &Vec<String>)| {
        let name = name(text)?;
        Some(
            urls.iter()
                .map(move |url| Voucher {
                    name: name.clone(),
                    api_url: url.clone(),
                })
                .collect::<Vec<_>>(),
        )
    };
    list.iter().filter_map(one).flatten().collect()
}

/// Writes the list, if this holding of the leader key and the list that was seen still stand.
#[must_use]
pub fn write(keys: &Keys, view: &View, epoch: &Epoch, list: &List) -> Txn {
    let (leader, key) = (keys.of(&Key::Leader), keys.of(&Key::Failsafe));
    let value: serde_json::Map<String, serde_json::Value> = list
        .iter()
        .filter_map(|(name, urls)| Some((name.clone(), urls.first()?.as_str().into())))
        .collect();
    Txn::new()
        .when(Compare::CreateRevision(leader, epoch.create_revision))
        .when(Compare::ModRevision(key.clone(), view.failsafe_revision))
        .then(Op::Put {
            key,
            value: serde_json::Value::Object(value).to_string(),
            lease: 0,
        })
}

#[cfg(test)]
mod tests {
    use pgherd_cluster::name::Scope;

    use super::*;

    #[test]
    fn what_was_written_and_is_not_seen_yet_may_stand() {
        let list = |names: &[&str]| -> List {
            let entry = |name: &&str| ((*name).to_owned(), vec![format!("http://{name}")]);
            names.iter().map(entry).collect()
        };
        let mut view = View::empty(Scope::new("c").expect("a plain name"));
        view.failsafe = [("n1".to_owned(), "http://n1".to_owned())].into();
        view.failsafe_revision = 5;
        let sent = Sent {
            compared: 5,
            list: list(&["n1", "n2"]),
        };
        assert_eq!(may_stand(&view, None), list(&["n1"]));
        assert_eq!(may_stand(&view, Some(&sent)), list(&["n1", "n2"]), "it may be done");
        view.failsafe_revision = 6;
        assert_eq!(may_stand(&view, Some(&sent)), list(&["n1"]), "what is seen is newer");
    }

    #[test]
    fn a_leader_never_leaves_itself_out_of_the_list() {
        let view = View::empty(Scope::new("c").expect("a plain name"));
        let me = MemberName::new("n1").expect("a plain name");
        let list = wanted(&view, &me, "http://n1:8008/patroni");
        assert_eq!(list.get("n1"), Some(&vec!["http://n1:8008/patroni".to_owned()]));
    }
}
