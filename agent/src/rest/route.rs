//! Which handler a request goes to. Pure.
//!
//! Patroni's rule: the first path element picks a handler per method; any other GET, and every OPTIONS and HEAD, is a
//! health check, so `OPTIONS /liveness` answers 503 where `GET /liveness` works.

use hyper::Method;

/// Where a request goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// The generic health check, for GET with the status as body.
    Health {
        with_body: bool,
    },
    Status,
    Cluster,
    History,
    Config,
    Metrics,
    Failsafe,
    Liveness,
    Readiness,
    Role,
    Warrant,
    Events,
    View,
    /// What happened.
    Journal,
    /// The operator's page and what it is made of.
    Page,
    Switchover,
    Failover,
    DropSwitchover,
    Restart,
    DropRestart,
    Reinitialize,
    Reload,
    /// Does nothing, as with Patroni everywhere but on Windows.
    Sigterm,
    /// What a switchover would meet.
    Forecast,
    /// Copies that are being made of this member's data.
    Backups,
    PatchConfig,
    PutConfig,
    /// Another member asks this one not to bid for a while.
    Vouch,
    /// Another member asks this one to delete its leader key.
    Release,
    /// Patroni has it, this version does not.
    NotInThisVersion {
        guarded: bool,
    },
    /// Nobody has it.
    Unsupported,
}

impl Route {
    pub(super) fn of(method: &Method, path: &str) -> Self {
        let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
        match *method {
            Method::GET => Self::of_get(path, first),
            Method::OPTIONS | Method::HEAD => Self::Health { with_body: false },
            Method::POST if path == "/api/v1/release" => Self::Release,
            Method::POST => match first {
                "failsafe" => Self::Vouch,
                "switchover" => Self::Switchover,
                "failover" => Self::Failover,
                "restart" => Self::Restart,
                "reinitialize" => Self::Reinitialize,
                "reload" => Self::Reload,
                "sigterm" => Self::Sigterm,
                "citus" => Self::NotInThisVersion { guarded: true },
                "mpp" => Self::NotInThisVersion { guarded: false },
                _ => Self::Unsupported,
            },
            Method::PATCH if first == "config" => Self::PatchConfig,
            Method::PUT if first == "config" => Self::PutConfig,
            Method::DELETE if first == "switchover" => Self::DropSwitchover,
            Method::DELETE if first == "restart" => Self::DropRestart,
            _ => Self::Unsupported,
        }
    }

    fn of_get(path: &str, first: &str) -> Self {
        match path {
            "/api/v1/warrant" => return Self::Warrant,
            "/api/v1/events" => return Self::Events,
            "/api/v1/view" => return Self::View,
            "/api/v1/journal" => return Self::Journal,
            "/api/v1/forecast" => return Self::Forecast,
            "/api/v1/backups" => return Self::Backups,
            _ => {}
        }
        match first {
            "patroni" => Self::Status,
            "cluster" => Self::Cluster,
            "history" => Self::History,
            "config" => Self::Config,
            "metrics" => Self::Metrics,
            "failsafe" => Self::Failsafe,
            "liveness" => Self::Liveness,
            "readiness" => Self::Readiness,
            "role" => Self::Role,
            "ui" => Self::Page,
            _ => Self::Health { with_body: true },
        }
    }

    /// What an operator asks for by it, for the journal; nothing for what is only read, or passes between members.
    pub(super) const fn action(self) -> Option<&'static str> {
        Some(match self {
            Self::Switchover => "a switchover",
            Self::Failover => "a failover",
            Self::DropSwitchover => "the end of a scheduled switchover",
            Self::Restart => "a restart",
            Self::DropRestart => "the end of a scheduled restart",
            Self::Reinitialize => "a new copy of the leader's data",
            Self::Reload => "a reload",
            Self::PatchConfig | Self::PutConfig => "a change of the dynamic configuration",
            Self::Health { .. }
            | Self::Status
            | Self::Cluster
            | Self::History
            | Self::Config
            | Self::Metrics
            | Self::Failsafe
            | Self::Liveness
            | Self::Readiness
            | Self::Role
            | Self::Warrant
            | Self::Events
            | Self::View
            | Self::Journal
            | Self::Page
            | Self::Sigterm
            | Self::Forecast
            | Self::Backups
            | Self::Vouch
            | Self::Release
            | Self::NotInThisVersion { .. }
            | Self::Unsupported => return None,
        })
    }

    /// Whether credentials are demanded, when any are configured.
    pub(super) const fn is_guarded(self) -> bool {
        match self {
            Self::Switchover
            | Self::Failover
            | Self::DropSwitchover
            | Self::Restart
            | Self::DropRestart
            | Self::Reinitialize
            | Self::Reload
            | Self::Sigterm
            // Who has been in a transaction for how long is nobody's business but an operator's.
            | Self::Forecast
            | Self::Backups
            | Self::PatchConfig
            | Self::PutConfig
            | Self::Vouch
            | Self::Release => true,
            Self::NotInThisVersion { guarded } => guarded,
            Self::Health { .. }
            | Self::Status
            | Self::Cluster
            | Self::History
            | Self::Config
            | Self::Metrics
            | Self::Failsafe
            | Self::Liveness
            | Self::Readiness
            | Self::Role
            | Self::Warrant
            | Self::Events
            | Self::View
            | Self::Journal
            | Self::Page
            | Self::Unsupported => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_path_element_picks_the_handler() {
        let check = Route::Health { with_body: false };
        let health = Route::Health { with_body: true };
        for (method, path, route) in [
            (Method::GET, "/", health),
            (Method::GET, "/patroni", Route::Status),
            (Method::GET, "/patroni/", Route::Status),
            (Method::GET, "//patroni", Route::Status),
            (Method::GET, "/config/extra", Route::Config),
            (Method::GET, "/nosuch", health),
            (Method::GET, "/switchover", health),
            (Method::GET, "/api/v1/warrant", Route::Warrant),
            (Method::GET, "/api/v1/journal", Route::Journal),
            (Method::GET, "/api/v1/other", health),
            (Method::GET, "/ui", Route::Page),
            (Method::GET, "/ui/live", Route::Page),
            (Method::HEAD, "/ui", check),
            (Method::POST, "/ui/act", Route::Unsupported),
            (Method::HEAD, "/patroni", check),
            (Method::OPTIONS, "/liveness", check),
            (Method::OPTIONS, "/api/v1/events", check),
            (Method::OPTIONS, "*", check),
            (Method::POST, "/switchover/", Route::Switchover),
            (Method::POST, "/failover", Route::Failover),
            (Method::POST, "/restart", Route::Restart),
            (Method::POST, "/reinitialize", Route::Reinitialize),
            (Method::POST, "/reload", Route::Reload),
            (Method::GET, "/api/v1/forecast", Route::Forecast),
            (Method::POST, "/mpp", Route::NotInThisVersion { guarded: false }),
            (Method::POST, "/", Route::Unsupported),
            (Method::POST, "/config", Route::Unsupported),
            (Method::PATCH, "/config", Route::PatchConfig),
            (Method::PUT, "/config", Route::PutConfig),
            (Method::DELETE, "/switchover", Route::DropSwitchover),
            (Method::DELETE, "/config", Route::Unsupported),
        ] {
            assert_eq!(Route::of(&method, path), route, "{method} {path}");
        }
    }
}
