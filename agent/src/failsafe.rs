//! The failsafe list: the members whose vouches a leader needs while etcd does not answer, and who alone may be elected. Pure.

use std::collections::BTreeMap;

use pgherd_cluster::etcd::{Compare, Op, Txn};
use pgherd_cluster::key::{Key, Keys};
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

/// The list that should stand: every member that has a key.
#[must_use]
pub fn wanted(view: &View) -> List {
    let entry = |member: &pgherd_cluster::view::Member| (member.name.to_string(), vec![member.record.api_url.clone()]);
    view.members.values().map(entry).collect()
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
    let name = |text: &String| pgherd_cluster::name::MemberName::new(text.clone()).ok();
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
