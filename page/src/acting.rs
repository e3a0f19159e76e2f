//! Who may change something from the page, and what: forms that cannot be forged, repeated, or sent from a stale page.

mod desk;

pub use desk::{Desk, Refusal, Submission, may_act};

/// What can be done from the page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The member becomes the leader, in good order.
    Switchover,
    /// Nothing fails over by itself any more.
    Pause,
    /// It does again.
    Resume,
    /// PostgreSQL of the member is restarted.
    Restart,
    /// It reads its configuration again.
    Reload,
    /// The member's data is replaced by a new copy of the leader's.
    Reinitialize,
}

impl Action {
    const ALL: [Self; 6] = [
        Self::Switchover,
        Self::Pause,
        Self::Resume,
        Self::Restart,
        Self::Reload,
        Self::Reinitialize,
    ];

    /// As it stands in addresses and forms.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Switchover => "switchover",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Restart => "restart",
            Self::Reload => "reload",
            Self::Reinitialize => "reinit",
        }
    }

    /// The one that is called so.
    #[must_use]
    pub fn of_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|action| action.word() == word)
    }

    /// As people read it.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Switchover => "make it the leader",
            Self::Pause => "pause failover",
            Self::Resume => "resume failover",
            Self::Restart => "restart",
            Self::Reload => "reload",
            Self::Reinitialize => "copy anew",
        }
    }

    /// What it does, for who is about to do it.
    #[must_use]
    pub const fn consequence(self) -> &'static str {
        match self {
            Self::Switchover => {
                "The leader is stopped in good order and this member takes over. Writes stand still meanwhile: clients that come \
                 are held, sessions of writers end."
            }
            Self::Pause => {
                "Nothing fails over by itself until the cluster is resumed: a leader that dies stays dead until somebody acts."
            }
            Self::Resume => "The cluster looks after itself again.",
            Self::Restart => "PostgreSQL is stopped and started again in place: all of its sessions end.",
            Self::Reload => "Configuration files are read again. No session ends.",
            Self::Reinitialize => {
                "The member's data is replaced by a new copy of the leader's. What it has now is moved aside, not deleted."
            }
        }
    }

    /// Whether it is done to one member, or to the whole cluster.
    #[must_use]
    pub const fn is_of_a_member(self) -> bool {
        !matches!(self, Self::Pause | Self::Resume)
    }

    /// What may be done to a member.
    #[must_use]
    pub const fn of_member(leads: bool) -> &'static [Self] {
        if leads {
            &[Self::Restart, Self::Reload]
        } else {
            &[Self::Switchover, Self::Restart, Self::Reload, Self::Reinitialize]
        }
    }
}

/// Something to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// What.
    pub action: Action,
    /// To whom; nothing for the whole cluster.
    pub member: Option<String>,
}

impl Order {
    /// From the parts of an address or of a form; nothing when they make no sense.
    #[must_use]
    pub fn of<'a>(pairs: impl Iterator<Item = (&'a str, &'a str)>) -> Option<Self> {
        let (mut action, mut member) = (None, None);
        for (name, value) in pairs {
            match name {
                "do" => action = Action::of_word(value),
                "member" if !value.is_empty() => member = Some(value.to_owned()),
                _ => {}
            }
        }
        let action = action?;
        (action.is_of_a_member() == member.is_some()).then_some(Self { action, member })
    }

    /// From the query of an address.
    #[must_use]
    pub fn of_query(query: &str) -> Option<Self> {
        let pairs: Vec<_> = form_urlencoded::parse(query.as_bytes()).collect();
        Self::of(pairs.iter().map(|(name, value)| (&**name, &**value)))
    }

    /// What has to be typed so that it is done.
    #[must_use]
    pub fn to_type<'a>(&'a self, scope: &'a str) -> &'a str {
        self.member.as_deref().unwrap_or(scope)
    }
}

impl std::fmt::Display for Order {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.action.word())?;
        match &self.member {
            Some(member) => write!(f, " {member}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_names_a_member_exactly_when_it_is_about_one() {
        let restart = Order::of_query("do=restart&member=n2").expect("whole");
        assert_eq!(
            (restart.to_string().as_str(), restart.to_type("main")),
            ("restart n2", "n2")
        );
        assert_eq!(
            Order::of_query("do=pause").map(|order| order.to_type("main").to_owned()),
            Some("main".to_owned())
        );
        for none in ["", "do=restart", "do=pause&member=n1", "do=drop&member=n1", "member=n1"] {
            assert_eq!(Order::of_query(none), None, "{none}");
        }
        for action in Action::ALL {
            assert_eq!(Action::of_word(action.word()), Some(action));
        }
    }
}
