//! `pgherd check`: says what would run, or everything that is wrong.

use crate::args::CheckArgs;
use crate::config::Document;
use crate::failure::Failure;
use crate::open_files;
use crate::preflight::{self, Preflight};
use crate::takeover;
use crate::terminal::say;

/// Runs the command; what it says goes to standard output.
///
/// # Errors
/// All findings.
pub(crate) fn run(args: &CheckArgs) -> Result<(), Failure> {
    let document = Document::load(args.file.clone())?;
    document.lint();
    document.log(); // For its findings.
    // A file without a member's sections is a proxy's; one without anything is told what a member needs.
    let is_member = ["postgresql", "restapi", "name"].iter().any(|key| document.has(key)) || !document.has("proxy");
    let is_proxy = document.has("proxy");
    let agent = if is_member { document.agent() } else { None };
    let proxy = if is_proxy { document.proxy() } else { None };
    let cluster = if is_member {
        document.cluster(None)
    } else {
        document.cluster_of(proxy.as_ref())
    };
    if let (Some(agent), Some(proxy)) = (&agent, &proxy) {
        preflight::clashes(agent, proxy)
            .into_iter()
            .for_each(|clash| document.error(clash));
    }
    let _ = takeover::path_in(&document, proxy.clone().zip(cluster.clone()).as_ref());
    let mut in_use = Vec::new();
    if !args.file_only {
        let mut note = |found: Preflight| {
            found.errors.into_iter().for_each(|finding| document.error(finding));
            in_use.extend(found.in_use);
        };
        if let Some(agent) = &agent {
            note(preflight::member(&mut agent.clone()));
        }
        if let (Some(proxy), Some(cluster)) = (&proxy, &cluster) {
            note(preflight::proxy(proxy, &cluster.etcd.tls));
        }
    }
    let files = open_files::most();
    let shortage = proxy.as_ref().and_then(|proxy| open_files::shortage(proxy, files));
    let shortage = shortage.filter(|_| !args.file_only).map(as_here);
    for warning in document
        .warnings()
        .into_iter()
        .chain(in_use.into_iter().map(own))
        .chain(shortage)
    {
        say(format!("warning: {warning}"));
    }
    let cluster = document.finish(cluster)?;
    if let Some(agent) = &agent {
        say(format!(
            "configuration of member {} of cluster {}: ok",
            agent.name, cluster.scope
        ));
    }
    if let Some(proxy) = &proxy {
        let listeners: Vec<String> = proxy
            .listeners
            .iter()
            .map(|listener| listener.address.to_string())
            .collect();
        say(format!(
            "configuration of a proxy for cluster {} on {}: ok",
            cluster.scope,
            listeners.join(", ")
        ));
        say(open_files::told(proxy, files));
    }
    Ok(())
}

/// A service may have more files open than the shell that the check is made in, or fewer.
fn as_here(shortage: String) -> String {
    format!("{shortage}; what counts is what the service may have")
}

/// The service that a file is for may well be running while the file is checked.
fn own(in_use: String) -> String {
    format!("{in_use} (nothing is wrong if that is what this file runs)")
}
