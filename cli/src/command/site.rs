//! One cluster as an operator reaches it: its keys in etcd, and its members' REST interfaces.

use std::time::Duration;

use pgherd_agent::config::Credentials;
use pgherd_cluster::etcd::{Budget, Etcd};
use pgherd_cluster::http::{Access, Answer, Ask, Endpoint, HttpError, ask_at};
use pgherd_cluster::key::Keys;
use pgherd_cluster::view::{Member, View};
use serde_json::Value;

use super::prompt::Prompter;
use super::{ETCD_TIMEOUT, Tool, list, read_view, store_failure};
use crate::args::{Group, Reach};
use crate::config::operator::Said;
use crate::config::{ClusterConfig, Document};
use crate::failure::Failure;
use crate::terminal::say;

/// For an answer to a question that needs no work.
pub(crate) const ANSWER_MAX: Duration = Duration::from_secs(10);

/// For a member to say that it is there.
const THERE_MAX: Duration = Duration::from_secs(4);

/// How a command was called.
#[derive(Clone, Debug)]
pub(crate) struct Scene {
    pub(crate) reach: Reach,
    pub(crate) tool: Tool,
}

impl Scene {
    /// Reads the configuration.
    ///
    /// # Errors
    /// When there is none, or it cannot be read.
    pub(crate) fn document(&self) -> Result<Document, Failure> {
        Document::for_operator(Said {
            file: self.reach.config.as_ref(),
            dcs_url: self.reach.dcs_url.as_deref(),
            insecure: self.reach.insecure,
            as_patronictl: self.tool == Tool::Patronictl,
        })
    }

    /// The cluster of this name, or the configuration's own.
    ///
    /// # Errors
    /// Bad configuration.
    pub(crate) fn site(&self, cluster: Option<&str>, group: Group) -> Result<Site, Failure> {
        Site::new(&self.document()?, cluster, group)
    }

    /// Asks at the terminal; `instead` is what else can be said.
    pub(crate) fn prompter(&self, instead: &'static str) -> Prompter<'static> {
        Prompter::of_terminal(self.tool, instead)
    }
}

/// One cluster.
pub(crate) struct Site {
    pub(crate) cluster: ClusterConfig,
    pub(crate) etcd: Etcd,
    pub(crate) superuser: Option<Credentials>,
    /// Where the REST interface of the member is whose configuration this is.
    own_agent: Option<Endpoint>,
    access: Access,
}

/// Why a member did not answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NoAnswer {
    /// Whether it may have heard the question all the same.
    pub(crate) heard: bool,
    pub(crate) why: String,
}

impl Site {
    /// The cluster of this name, or the configuration's own.
    ///
    /// # Errors
    /// Bad configuration.
    pub(crate) fn new(document: &Document, cluster: Option<&str>, group: Group) -> Result<Self, Failure> {
        if let Some(group) = group.group {
            return Err(Failure::configuration(format!(
                "--group {group}: pgherd does not run Citus clusters; leave it out"
            )));
        }
        let superuser = document.superuser();
        let own_agent = document.own_agent();
        let access = document.operator_access();
        let cluster = document.finish(document.cluster(cluster))?;
        let access = access
            .load()
            .map_err(|error| Failure::configuration(format!("ctl: {error}; write files that this user may read")))?;
        Ok(Self {
            etcd: Etcd::new(cluster.etcd.clone()),
            cluster,
            superuser,
            own_agent,
            access,
        })
    }

    /// The cluster as etcd has it now.
    ///
    /// # Errors
    /// When etcd does not answer, or refuses us.
    pub(crate) async fn view(&self) -> Result<View, Failure> {
        read_view(&self.etcd, &self.cluster).await
    }

    /// Where the REST interface of this host's member is, where the configuration is a member's.
    pub(crate) fn own_agent(&self) -> Option<Endpoint> {
        self.own_agent.clone()
    }

    /// How members' REST interfaces are reached.
    pub(crate) fn access(&self) -> Access {
        self.access.clone()
    }

    pub(crate) fn keys(&self) -> Keys {
        self.cluster.keys()
    }

    pub(crate) fn name(&self) -> &str {
        self.cluster.scope.as_str()
    }

    /// For one operation on etcd.
    pub(crate) fn budget(&self) -> Budget {
        Budget::new(ETCD_TIMEOUT, self.etcd.endpoint_count())
    }

    /// What an error of etcd's means.
    pub(crate) fn store_failure(&self, error: &pgherd_cluster::etcd::StoreError) -> Failure {
        store_failure(&self.cluster, error)
    }

    /// Asks a member's REST interface.
    ///
    /// # Errors
    /// When it gives no answer; an HTTP status of any kind is one.
    pub(crate) async fn ask(&self, member: &Member, ask: Ask, limit: Duration) -> Result<Answer, NoAnswer> {
        let Some(endpoint) = member.record.api_endpoint() else {
            return Err(NoAnswer {
                heard: false,
                why: format!("{} publishes no REST address", member.name),
            });
        };
        let path = ask.path.clone();
        let no_answer = |error: HttpError| NoAnswer {
            heard: !matches!(error, HttpError::Connect { .. }),
            why: why(&error, &format!("{endpoint}{path}")),
        };
        ask_at(&endpoint, ask, limit, &self.access).await.map_err(no_answer)
    }

    /// Orders what takes long. A member that is not there is found out soon, and has not heard the order.
    ///
    /// # Errors
    /// As for [`Self::ask`].
    pub(crate) async fn order(&self, member: &Member, ask: Ask, limit: Duration) -> Result<Answer, NoAnswer> {
        if let Err(NoAnswer { why, .. }) = self.ask(member, Ask::get("/liveness"), THERE_MAX).await {
            return Err(NoAnswer { heard: false, why });
        }
        self.ask(member, ask, limit).await
    }

    /// GET, for a JSON document.
    pub(crate) async fn get(&self, member: &Member, path: &str, limit: Duration) -> Option<Value> {
        self.ask(member, Ask::get(path), limit).await.ok()?.json()
    }

    /// Prints the members, as patronictl does before it asks.
    pub(crate) fn show(view: &View) {
        say(list::render(view, crate::args::Format::Pretty, false).trim_end());
    }
}

/// A request that changes something.
pub(crate) fn order(method: hyper::Method, path: &str, json: Value) -> Ask {
    Ask {
        method,
        path: path.to_owned(),
        json: Some(json),
        authorization: None,
    }
}

fn why(error: &HttpError, whom: &str) -> String {
    match error {
        HttpError::Timeout(limit) => format!("{whom} gave no answer within {} s", limit.as_secs()),
        HttpError::Connect { source, .. } => format!("connecting to {whom}: {source}"),
        HttpError::Protocol(what) if what.contains("nothing says whom to believe") => {
            format!("{what}: write ctl.cacert, the file of the CAs of members' certificates, or say --insecure")
        }
        HttpError::Protocol(what) => format!("{whom}: {what}"),
    }
}
