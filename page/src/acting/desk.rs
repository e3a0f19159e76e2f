//! Where forms are given out and taken back.
//!
//! A token is a number that nobody can guess. It is kept here until it is used, which it is once, or too old; it belongs to
//! the login and the order that it was given out for.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use pgherd_cluster::clock::Boottime;

use super::Order;
use crate::login::{PageLogin, Weak, equals};
use crate::model::State;

/// For how long a form can be sent.
const FORM_MAX: Duration = Duration::from_secs(300);
/// Forms that are out at a time. Only who has the password gets any, and the oldest goes first.
const FORMS_MAX: usize = 256;
const TOKEN_BYTES: usize = 16;

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Why nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Everybody may look, so nobody may act.
    #[error(
        "nobody may act from here, since everybody may look: set proxy.stats.username and proxy.stats.password_file (or \
         HAPROXY_STATS_USER and HAPROXY_STATS_PASSWORD)"
    )]
    NoPassword,
    /// Everybody may guess it.
    #[error(
        "nobody may act from here with the password that the page has: {0}; set another one in proxy.stats.password_file"
    )]
    WeakPassword(Weak),
    /// A browser says that the form is of another site.
    #[error("the form does not come from this page")]
    FromElsewhere,
    /// Parts are missing, or are not what the page would send.
    #[error("this is not a form of this page")]
    NotAForm,
    /// Never given out, given out for something else or somebody else, used, or too old.
    #[error(
        "this form was not given out here for this, was used, or is older than five minutes: begin again from the page"
    )]
    Forged,
    /// The cluster has changed since.
    #[error("the cluster has changed since you looked (then: {then}; now: {now}): look again before you act")]
    Stale {
        /// As the form says.
        then: String,
        /// As it is.
        now: String,
    },
    /// The name was not typed as it is.
    #[error("to confirm, type {0:?} exactly")]
    NotTyped(String),
    /// There is no such member any more.
    #[error("there is no member {0:?}")]
    NoSuchMember(String),
}

struct Issued {
    token: [u8; TOKEN_BYTES],
    login: PageLogin,
    order: Order,
    expires: Boottime,
}

/// Gives forms out and takes them back.
#[derive(Default)]
pub struct Desk(Mutex<VecDeque<Issued>>);

/// A form that was sent back.
#[derive(Debug)]
pub struct Submission {
    order: Order,
    typed: String,
    token: String,
    decides: String,
}

impl Submission {
    /// Reads the body of a request.
    ///
    /// # Errors
    /// [`Refusal::NotAForm`].
    pub fn parse(headers: &HeaderMap, body: &[u8]) -> Result<Self, Refusal> {
        let content_type = headers
            .get(header::CONTENT_TYPE)
            .map(HeaderValue::as_bytes)
            .unwrap_or_default();
        if !content_type.starts_with(b"application/x-www-form-urlencoded") {
            return Err(Refusal::NotAForm);
        }
        let pairs: Vec<_> = form_urlencoded::parse(body).collect();
        let order = Order::of(pairs.iter().map(|(name, value)| (&**name, &**value))).ok_or(Refusal::NotAForm)?;
        let text = |wanted: &str| {
            let found = pairs.iter().find(|(name, _)| name == wanted);
            found
                .map(|(_, value)| value.clone().into_owned())
                .ok_or(Refusal::NotAForm)
        };
        Ok(Self {
            order,
            typed: text("typed")?,
            token: text("token")?,
            decides: text("decides")?,
        })
    }
}

/// Whether a login is good for acting.
///
/// # Errors
/// Why not.
pub fn may_act(login: Option<&PageLogin>) -> Result<&PageLogin, Refusal> {
    let login = login.ok_or(Refusal::NoPassword)?;
    login.is_strong().map_err(Refusal::WeakPassword)?;
    Ok(login)
}

impl Desk {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Issued>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A token for one form; nothing when the system gives no random number.
    #[must_use]
    pub fn issue(&self, login: &PageLogin, order: &Order, now: Boottime) -> Option<String> {
        let mut token = [0; TOKEN_BYTES];
        let random = rustls::crypto::ring::default_provider().secure_random;
        random.fill(&mut token).ok()?;
        let mut issued = self.lock();
        issued.retain(|issued| now < issued.expires);
        if issued.len() >= FORMS_MAX {
            issued.pop_front();
        }
        issued.push_back(Issued {
            token,
            login: login.clone(),
            order: order.clone(),
            expires: now + FORM_MAX,
        });
        Some(hex(&token))
    }

    /// Whether a form that was sent back by whoever presented `login` is to be obeyed, in the light of `state`.
    ///
    /// # Errors
    /// Why nothing is changed.
    pub fn judge(
        &self,
        login: &PageLogin,
        headers: &HeaderMap,
        submission: &Submission,
        state: &State,
        now: Boottime,
    ) -> Result<Order, Refusal> {
        comes_from_here(headers)?;
        let order = &submission.order;
        // Used up by whatever comes of it: nobody tries twice with one.
        self.redeem(login, order, &submission.token, now)?;
        let decides = state.decides();
        if submission.decides != decides {
            let then = submission.decides.clone();
            return Err(Refusal::Stale { then, now: decides });
        }
        if let Some(name) = &order.member
            && state.members.iter().all(|member| member.name != *name)
        {
            return Err(Refusal::NoSuchMember(name.clone()));
        }
        let to_type = order.to_type(&state.scope);
        if submission.typed.trim() != to_type {
            return Err(Refusal::NotTyped(to_type.to_owned()));
        }
        Ok(order.clone())
    }

    fn redeem(&self, login: &PageLogin, order: &Order, token: &str, now: Boottime) -> Result<(), Refusal> {
        let mut issued = self.lock();
        let found = issued
            .iter()
            .position(|issued| equals(hex(&issued.token).as_bytes(), token.as_bytes()));
        let issued = found.and_then(|index| issued.remove(index)).ok_or(Refusal::Forged)?;
        let good = now < issued.expires && issued.login == *login && issued.order == *order;
        good.then_some(()).ok_or(Refusal::Forged)
    }
}

/// Browsers say where a request comes from, and nobody else can make them say something else. What says nothing is none, and
/// has no token that it could have been made to send.
fn comes_from_here(headers: &HeaderMap) -> Result<(), Refusal> {
    if headers.get(SEC_FETCH_SITE).is_some_and(|site| site != "same-origin") {
        return Err(Refusal::FromElsewhere);
    }
    let Some(origin) = headers.get(header::ORIGIN) else {
        return Ok(());
    };
    let host = headers.get(header::HOST).map(HeaderValue::as_bytes).unwrap_or_default();
    let origin = origin.as_bytes();
    let of_origin = [b"http://".as_slice(), b"https://"]
        .iter()
        .find_map(|scheme| origin.strip_prefix(*scheme));
    if of_origin == Some(host) && !host.is_empty() {
        Ok(())
    } else {
        Err(Refusal::FromElsewhere)
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    const NOW: Boottime = Boottime::from_nanos(1_000_000_000_000);

    fn login(of: &str) -> PageLogin {
        PageLogin::new(format!("Basic {of}"))
    }

    fn headers(more: &[(&'static str, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let always = [
            ("host", "page:8080"),
            ("content-type", "application/x-www-form-urlencoded"),
        ];
        for (name, value) in always.iter().chain(more) {
            headers.insert(HeaderName::from_static(name), value.parse().expect("a header"));
        }
        headers
    }

    fn restart() -> Order {
        Order::of_query("do=restart&member=n2").expect("whole")
    }

    /// Sends a form as the page would, but for what `change` does to it.
    fn send(
        desk: &Desk,
        more: &[(&'static str, &str)],
        change: impl FnOnce(&mut Submission),
    ) -> Result<Order, Refusal> {
        let (ours, state) = (login("QQ=="), fixtures::state());
        let token = desk.issue(&ours, &restart(), NOW).expect("random numbers");
        let headers = headers(more);
        let body = form_urlencoded::Serializer::new(String::new())
            .extend_pairs([
                ("do", "restart"),
                ("member", "n2"),
                ("typed", " n2 "),
                ("token", &token),
            ])
            .append_pair("decides", &state.decides())
            .finish();
        let mut submission = Submission::parse(&headers, body.as_bytes()).expect("a form");
        change(&mut submission);
        desk.judge(&ours, &headers, &submission, &state, NOW)
    }

    #[test]
    fn a_form_of_the_page_is_obeyed() {
        assert_eq!(send(&Desk::default(), &[], |_| {}), Ok(restart()));
        let from_here = [("origin", "http://page:8080"), ("sec-fetch-site", "same-origin")];
        assert_eq!(send(&Desk::default(), &from_here, |_| {}), Ok(restart()));
    }

    #[test]
    fn what_another_site_has_a_browser_send_is_not() {
        for from in [
            [("origin", "http://evil:8080")].as_slice(),
            &[("origin", "null")],
            &[("origin", "http://page:8080.evil")],
            &[("sec-fetch-site", "cross-site")],
            &[("sec-fetch-site", "same-site")],
            &[("sec-fetch-site", "none")],
            &[("origin", "http://page:8080"), ("sec-fetch-site", "cross-site")],
        ] {
            assert_eq!(
                send(&Desk::default(), from, |_| {}),
                Err(Refusal::FromElsewhere),
                "{from:?}"
            );
        }
    }

    #[test]
    fn a_token_is_for_one_form_of_one_login_and_for_five_minutes() {
        let desk = Desk::default();
        assert_eq!(
            send(&desk, &[], |form| form.token = "00".repeat(16)),
            Err(Refusal::Forged)
        );
        assert_eq!(send(&desk, &[], |form| form.token.clear()), Err(Refusal::Forged));
        let other = Order::of_query("do=reinit&member=n2").expect("whole");
        assert_eq!(send(&desk, &[], |form| form.order = other), Err(Refusal::Forged));

        let ours = login("QQ==");
        let token = desk.issue(&ours, &restart(), NOW).expect("random numbers");
        let late = NOW + FORM_MAX;
        assert_eq!(desk.redeem(&ours, &restart(), &token, late), Err(Refusal::Forged));
        let token = desk.issue(&ours, &restart(), NOW).expect("random numbers");
        assert_eq!(
            desk.redeem(&login("Qg=="), &restart(), &token, NOW),
            Err(Refusal::Forged)
        );
        let token = desk.issue(&ours, &restart(), NOW).expect("random numbers");
        assert_eq!(desk.redeem(&ours, &restart(), &token, NOW), Ok(()));
        assert_eq!(
            desk.redeem(&ours, &restart(), &token, NOW),
            Err(Refusal::Forged),
            "once"
        );
    }

    #[test]
    fn a_stale_page_and_a_name_that_was_not_typed_change_nothing() {
        let stale = send(&Desk::default(), &[], |form| {
            form.decides = "n3@7 watching -".to_owned()
        });
        assert!(matches!(stale, Err(Refusal::Stale { .. })), "{stale:?}");
        let not_typed = send(&Desk::default(), &[], |form| form.typed = "N2".to_owned());
        assert_eq!(not_typed, Err(Refusal::NotTyped("n2".to_owned())));
    }

    #[test]
    fn forms_that_are_out_are_bounded() {
        let desk = Desk::default();
        for _ in 0..2 * FORMS_MAX {
            assert!(desk.issue(&login("QQ=="), &restart(), NOW).is_some());
        }
        assert_eq!(desk.lock().len(), FORMS_MAX);
    }

    #[test]
    fn who_may_act_has_a_password_worth_the_name() {
        assert_eq!(may_act(None), Err(Refusal::NoPassword));
        let known = login("YWRtaW46YWRtaW4xMjM="); // admin:admin123
        assert_eq!(may_act(Some(&known)), Err(Refusal::WeakPassword(Weak::Known)));
    }
}
