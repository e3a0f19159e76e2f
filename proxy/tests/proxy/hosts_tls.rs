//! Hosts that are asked by SQL, with TLS and without.

use pgherd_cluster::name::Scope;
use pgherd_cluster::record::Address;
use pgherd_cluster::source::{HostsConfig, HostsSource, SourceHealth};
use pgherd_cluster::tls::{ServerTlsConfig, ServerTlsMode};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::certificates::*;

/// Whether a member is asked by TLS, or else why it is not asked.
async fn is_asked_by_tls(member: &mut Member, mode: ServerTlsMode, ca: Option<&Authority>) -> Result<bool, String> {
    let config = HostsConfig {
        hosts: vec![Address {
            host: member.address.ip().to_string(),
            port: member.address.port(),
        }],
        user: "ann".to_owned(),
        database: "postgres".to_owned(),
        passwords: Vec::new(),
        tls: ServerTlsConfig {
            mode,
            ca: ca.map(Authority::ca),
            identity: None,
        },
    };
    let (source, view) = HostsSource::new(config, Scope::new("c").expect("a plain name"));
    let mut running = JoinSet::new();
    running.spawn(source.run(CancellationToken::new()));
    let mut health = view.health();
    let failed = async {
        let failing = |health: &SourceHealth| matches!(health, SourceHealth::Failing(_));
        let failing = health.wait_for(failing).await.expect("the source runs");
        match &*failing {
            SourceHealth::Failing(why) => why.to_string(),
            other => panic!("{other:?}"),
        }
    };
    tokio::select! {
        // Whoever comes and is let in is here before the question that this member does not answer has failed.
        biased;
        came = member.came() => {
            let startup = String::from_utf8_lossy(&came.session.startup).into_owned();
            assert!(startup.contains("user\0ann\0"), "{startup}");
            Ok(came.by_tls)
        }
        why = failed => Err(why),
    }
}

#[tokio::test]
async fn hosts_are_asked_by_tls_as_configured_and_where_they_take_nobody_without() {
    use ServerTlsMode::{Disable, Prefer, Require, VerifyCa, VerifyFull};
    let (authority, strangers) = (Authority::new(), Authority::new());
    let right = authority.issue("127.0.0.1");
    let mut plain = Member::start(None).await;
    let mut offering = Member::start(Some(&right)).await;
    let mut demanding = Member::demanding_tls(&right).await;
    let mut misnamed = Member::start(Some(&authority.issue("elsewhere.test"))).await;
    let (known, unknown) = (Some(&authority), Some(&strangers));

    assert_eq!(is_asked_by_tls(&mut plain, Disable, None).await, Ok(false));
    assert_eq!(is_asked_by_tls(&mut plain, Prefer, None).await, Ok(false));
    assert_eq!(is_asked_by_tls(&mut offering, Disable, None).await, Ok(false));
    assert_eq!(is_asked_by_tls(&mut offering, Prefer, None).await, Ok(true));
    assert_eq!(is_asked_by_tls(&mut offering, VerifyFull, known).await, Ok(true));
    assert_eq!(is_asked_by_tls(&mut misnamed, VerifyCa, known).await, Ok(true));
    for mode in [Disable, Prefer, Require] {
        assert_eq!(is_asked_by_tls(&mut demanding, mode, None).await, Ok(true), "{mode:?}");
    }
    for (member, mode, ca, says) in [
        (&mut plain, Require, None, "it does not offer TLS, which is required"),
        (
            &mut offering,
            VerifyCa,
            unknown,
            "signed by another CA than the one of that name",
        ),
        (
            &mut misnamed,
            VerifyFull,
            known,
            "its certificate is made out to another name",
        ),
        // A CA that is given is used, and what the host said first is what is told.
        (&mut demanding, Disable, unknown, "no pg_hba.conf entry, no encryption"),
    ] {
        let why = is_asked_by_tls(member, mode, ca).await.expect_err("refused");
        assert!(why.contains(says), "{mode:?}: {why}");
    }
}
