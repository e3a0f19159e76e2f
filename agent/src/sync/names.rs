//! The value of `synchronous_standby_names`: read as PostgreSQL reads it, written as Patroni writes it.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fmt;
use std::hash::{Hash, Hasher};

use pgherd_cluster::name::MemberName;

/// A standby's name. PostgreSQL compares application names without case, so this does: `Node1` equals `node1`.
#[derive(Clone, Debug)]
pub struct StandbyName(String);

impl StandbyName {
    /// Stands for every standby that is not named.
    pub const STAR: &str = "*";

    /// Wraps a name as it was written.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into())
    }

    /// The name as it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it stands for everybody. PostgreSQL makes no difference between `*` and `"*"`.
    #[must_use]
    pub fn is_star(&self) -> bool {
        self.0 == Self::STAR
    }

    /// Whether it can be an entry of `/sync`, whose names are joined by commas, and mean one member only.
    #[must_use]
    pub fn is_listable(&self) -> bool {
        !self.0.is_empty() && !self.is_star() && !self.0.contains(',') && self.0.trim() == self.0
    }

    fn folded(&self) -> impl Iterator<Item = u8> + '_ {
        self.0.bytes().map(|byte| byte.to_ascii_lowercase())
    }
}

impl PartialEq for StandbyName {
    fn eq(&self, other: &Self) -> bool {
        self.0.eq_ignore_ascii_case(&other.0)
    }
}

impl Eq for StandbyName {}

impl Ord for StandbyName {
    fn cmp(&self, other: &Self) -> Ordering {
        self.folded().cmp(other.folded())
    }
}

impl PartialOrd for StandbyName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Hash for StandbyName {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.folded().for_each(|byte| byte.hash(state));
    }
}

impl From<&MemberName> for StandbyName {
    fn from(name: &MemberName) -> Self {
        Self(name.as_str().to_owned())
    }
}

impl From<&str> for StandbyName {
    fn from(name: &str) -> Self {
        Self(name.to_owned())
    }
}

impl fmt::Display for StandbyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names without order, each once.
pub type NameSet = BTreeSet<StandbyName>;

/// Whom PostgreSQL makes commits wait for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SyncNames {
    /// Nobody.
    #[default]
    Off,
    /// The first `count` of `names` that stream, in this order.
    First {
        /// How many; at least 1.
        count: u32,
        /// At least one; [`StandbyName::STAR`] stands for all others.
        names: Vec<StandbyName>,
    },
    /// Any `count` of `names`.
    Any {
        /// How many; at least 1.
        count: u32,
        /// At least one; [`StandbyName::STAR`] stands for all others.
        names: Vec<StandbyName>,
    },
}

impl SyncNames {
    /// All of `names`, in priority mode's form; nobody when there are none.
    #[must_use]
    pub fn all_of(names: &NameSet) -> Self {
        Self::first(u32::try_from(names.len()).unwrap_or(u32::MAX), sorted(names))
    }

    /// The first `count` of `names`; nobody when either is nothing.
    #[must_use]
    pub fn first(count: u32, names: Vec<StandbyName>) -> Self {
        if count == 0 || names.is_empty() {
            return Self::Off;
        }
        Self::First { count, names }
    }

    /// Any `count` of `names`; nobody when either is nothing.
    #[must_use]
    pub fn any_of(count: u32, names: &NameSet) -> Self {
        if count == 0 || names.is_empty() {
            return Self::Off;
        }
        Self::Any {
            count,
            names: sorted(names),
        }
    }

    /// One standby, whoever it is: what strict modes ask for while nobody streams.
    #[must_use]
    pub fn anybody(quorum: bool) -> Self {
        let names = vec![StandbyName::from(StandbyName::STAR)];
        if quorum {
            Self::Any { count: 1, names }
        } else {
            Self::First { count: 1, names }
        }
    }

    fn parts(&self) -> (u32, &[StandbyName]) {
        match self {
            Self::Off => (0, &[]),
            Self::First { count, names } | Self::Any { count, names } => (*count, names),
        }
    }

    /// What every acknowledged commit is on, beside the primary: at least so many of these. Nobody when a `*` lets in
    /// standbys that are not named.
    #[must_use]
    pub fn guarantee(&self) -> (usize, NameSet) {
        let (count, names) = self.parts();
        if names.iter().any(StandbyName::is_star) {
            return (0, NameSet::new());
        }
        let names: NameSet = names.iter().cloned().collect();
        (names.len().min(usize::try_from(count).unwrap_or(usize::MAX)), names)
    }

    /// The names that every acknowledged commit is on: all, if all are asked for, or else nobody.
    #[must_use]
    pub fn required(&self) -> NameSet {
        let (count, names) = self.guarantee();
        if count == names.len() { names } else { NameSet::new() }
    }

    /// Whether `name` is named, or covered by a `*`.
    #[must_use]
    pub fn covers(&self, name: &StandbyName) -> bool {
        self.parts().1.iter().any(|listed| listed.is_star() || listed == name)
    }

    /// Whether both make commits wait in the same form for the same standbys. The order counts only where PostgreSQL
    /// chooses by it.
    #[must_use]
    pub fn same_as(&self, other: &Self) -> bool {
        let same_set = || {
            let ((count, names), (other_count, other_names)) = (self.guarantee(), other.guarantee());
            !names.is_empty() && count == other_count && names == other_names
        };
        match (self, other) {
            (Self::Any { .. }, Self::Any { .. }) => self == other || same_set(),
            (Self::First { .. }, Self::First { .. }) => self == other || (same_set() && !self.required().is_empty()),
            _ => self == other,
        }
    }

    /// Reads what PostgreSQL accepts.
    ///
    /// # Errors
    /// When PostgreSQL would refuse it.
    pub fn parse(text: &str) -> Result<Self, SyncNamesError> {
        if text.is_empty() {
            return Ok(Self::Off);
        }
        value_of(&lex(text)?)
    }
}

fn sorted(names: &NameSet) -> Vec<StandbyName> {
    let mut names: Vec<_> = names.iter().cloned().collect();
    names.sort_by(|a, b| a.0.cmp(&b.0));
    names
}

/// As Patroni writes it, so that the two kinds of agents do not rewrite each other's value.
impl fmt::Display for SyncNames {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, names) = self.parts();
        let list = names.iter().map(quoted).collect::<Vec<_>>().join(",");
        match self {
            Self::Off => Ok(()),
            Self::First { count: 1, names } if names.len() == 1 => f.write_str(&list),
            Self::First { .. } => write!(f, "{count} ({list})"),
            Self::Any { .. } => write!(f, "ANY {count} ({list})"),
        }
    }
}

fn quoted(name: &StandbyName) -> String {
    let text = name.as_str();
    let mut chars = text.chars();
    let plain = chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '$'));
    let keyword = text.eq_ignore_ascii_case("first") || text.eq_ignore_ascii_case("any");
    if name.is_star() || (plain && !keyword) {
        text.to_owned()
    } else {
        format!("\"{}\"", text.replace('"', "\"\""))
    }
}

/// Why PostgreSQL would refuse a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SyncNamesError {
    /// A quoted name has no end.
    #[error("a quoted name is not closed")]
    Unclosed,
    /// A character that has no meaning here.
    #[error("{0:?} has no meaning here")]
    Stray(char),
    /// The pieces do not form a list.
    #[error("it is not a list of names, FIRST n (names) or ANY n (names)")]
    Malformed,
    /// Not a number of standbys.
    #[error("{0:?} is not a number of standbys")]
    Count(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    Any,
    First,
    Name(String),
    Number(String),
    Comma,
    Open,
    Close,
}

/// Splits by the rules of PostgreSQL's `syncrep_scanner`: the longest match wins, bytes above ASCII belong to identifiers.
fn lex(text: &str) -> Result<Vec<Token>, SyncNamesError> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let is_start = |c: char| c.is_ascii_alphabetic() || c == '_' || !c.is_ascii();
        let taken = match first {
            ' ' | '\t' | '\n' | '\r' | '\u{b}' | '\u{c}' => 1,
            '"' => {
                let (name, taken) = quoted_name(rest)?;
                tokens.push(Token::Name(name));
                taken
            }
            '*' | ',' | '(' | ')' => {
                tokens.push(match first {
                    '*' => Token::Name(StandbyName::STAR.to_owned()),
                    ',' => Token::Comma,
                    '(' => Token::Open,
                    _ => Token::Close,
                });
                1
            }
            c if c.is_ascii_digit() => {
                let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
                let taken = digits.len();
                tokens.push(Token::Number(digits));
                taken
            }
            c if is_start(c) => {
                let goes_on = |c: &char| is_start(*c) || c.is_ascii_digit() || *c == '$';
                let word: String = rest.chars().take_while(goes_on).collect();
                let taken = word.len();
                tokens.push(match word.to_ascii_lowercase().as_str() {
                    "any" => Token::Any,
                    "first" => Token::First,
                    _ => Token::Name(word),
                });
                taken
            }
            other => return Err(SyncNamesError::Stray(other)),
        };
        rest = rest.get(taken..).unwrap_or_default();
    }
    Ok(tokens)
}

/// The name that begins with the quote at the start of `text`, and how many bytes it takes; two quotes stand for one.
fn quoted_name(text: &str) -> Result<(String, usize), SyncNamesError> {
    let mut name = String::new();
    let mut chars = text.char_indices().skip(1).peekable();
    while let Some((at, c)) = chars.next() {
        if c != '"' {
            name.push(c);
        } else if chars.next_if(|(_, next)| *next == '"').is_some() {
            name.push('"');
        } else {
            return Ok((name, at + 1));
        }
    }
    Err(SyncNamesError::Unclosed)
}

fn value_of(tokens: &[Token]) -> Result<SyncNames, SyncNamesError> {
    match tokens {
        [Token::Any, Token::Number(count), Token::Open, list @ .., Token::Close] => Ok(SyncNames::Any {
            count: positive(count)?,
            names: names_of(list)?,
        }),
        [Token::First, Token::Number(count), Token::Open, list @ .., Token::Close]
        | [Token::Number(count), Token::Open, list @ .., Token::Close] => Ok(SyncNames::First {
            count: positive(count)?,
            names: names_of(list)?,
        }),
        list => Ok(SyncNames::First {
            count: 1,
            names: names_of(list)?,
        }),
    }
}

fn positive(digits: &str) -> Result<u32, SyncNamesError> {
    let count = digits.parse::<i32>().ok().filter(|count| *count > 0);
    count
        .and_then(|count| u32::try_from(count).ok())
        .ok_or_else(|| SyncNamesError::Count(digits.to_owned()))
}

/// Names with commas between; a number may be a name.
fn names_of(tokens: &[Token]) -> Result<Vec<StandbyName>, SyncNamesError> {
    tokens
        .split(|token| *token == Token::Comma)
        .map(|between| match between {
            [Token::Name(name) | Token::Number(name)] => Ok(StandbyName::new(name.as_str())),
            _ => Err(SyncNamesError::Malformed),
        })
        .collect()
}
