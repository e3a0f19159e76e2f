//! How a PostgreSQL is reached by SQL: address, user, passwords, TLS.

use std::time::Duration;

use pgherd_cluster::record::Address;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres::config::SslMode;
use tokio_postgres::error::SqlState;
use tokio_postgres::tls::{MakeTlsConnect, TlsConnect};
use tokio_postgres::{Client, NoTls, Socket};

use super::programs::ToolError;
use super::secure::{Connector, Mode};
use crate::config::{ConnectionOptions, Credentials};

const CONNECT_MAX: Duration = Duration::from_secs(3);

/// How to reach a server.
#[derive(Clone)]
pub struct Target {
    config: tokio_postgres::Config,
    tls: Result<Option<Connector>, String>,
    mode: Mode,
    /// Tried when the server takes the password for a wrong one: it may be about to change.
    former_password: Option<String>,
}

impl Target {
    /// As `user` to `database` at `address`.
    #[must_use]
    pub fn new(address: &Address, database: &str, user: &Credentials) -> Self {
        let mut config = tokio_postgres::Config::new();
        config
            .host(&address.host)
            .port(address.port)
            .dbname(database)
            .user(&user.username)
            .application_name("pgherd")
            .connect_timeout(CONNECT_MAX)
            .tcp_user_timeout(CONNECT_MAX)
            .options("-c statement_timeout=0 -c synchronous_commit=local -c search_path=pg_catalog");
        if let Some(password) = &user.password {
            config.password(password);
        }
        Self {
            config,
            tls: Ok(None),
            mode: Mode::Is(SslMode::Disable),
            former_password: None,
        }
    }

    /// With TLS as `options` say. Files that they name are read now.
    #[must_use]
    pub fn with_options(mut self, options: &ConnectionOptions) -> Self {
        let hosts = self.config.get_hosts();
        let by_socket = hosts
            .iter()
            .any(|host| matches!(host, tokio_postgres::config::Host::Unix(_)));
        // As for libpq, there is no TLS on a unix socket, whatever the options say.
        self.mode = if by_socket {
            Mode::Is(SslMode::Disable)
        } else {
            Mode::of(options)
        };
        self.tls = match self.mode {
            Mode::Is(SslMode::Disable) => Ok(None),
            _ => Connector::new(options).map(Some).map_err(|error| error.to_string()),
        };
        self
    }

    /// With a password of before, for as long as the server may still ask for it.
    #[must_use]
    pub fn with_former_password(mut self, password: Option<String>) -> Self {
        self.former_password = password;
        self
    }

    /// The same, with connections that are called `name`.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.config.application_name(name);
        self
    }

    /// The same server, in another database.
    #[must_use]
    pub fn to_database(mut self, database: &str) -> Self {
        self.config.dbname(database);
        self
    }

    pub(super) async fn connect(&self) -> Result<Kept, ToolError> {
        match self.connect_with(&self.config).await {
            Err(ToolError::Sql { source, .. })
                if source.code() == Some(&SqlState::INVALID_PASSWORD) && self.former_password.is_some() =>
            {
                let mut config = self.config.clone();
                config.password(self.former_password.as_deref().unwrap_or_default());
                self.connect_with(&config).await
            }
            connected => connected,
        }
    }

    async fn connect_with(&self, config: &tokio_postgres::Config) -> Result<Kept, ToolError> {
        let connector = match &self.tls {
            Ok(connector) => connector.clone(),
            Err(what) => {
                return Err(ToolError::Unexpected {
                    program: "TLS to PostgreSQL".to_owned(),
                    what: what.clone(),
                });
            }
        };
        let mut config = config.clone();
        match (connector, self.mode) {
            (None, _) => open(config.ssl_mode(SslMode::Disable), NoTls).await,
            (Some(connector), Mode::Is(mode)) => open(config.ssl_mode(mode), connector).await,
            (Some(connector), Mode::Unset) => match open(config.ssl_mode(SslMode::Disable), NoTls).await {
                // It may have refused only that nothing is encrypted.
                Err(ToolError::Sql { source, .. })
                    if source.code() == Some(&SqlState::INVALID_AUTHORIZATION_SPECIFICATION) =>
                {
                    open(config.ssl_mode(SslMode::Prefer), connector).await
                }
                opened => opened,
            },
        }
    }
}

async fn open<T>(config: &tokio_postgres::Config, tls: T) -> Result<Kept, ToolError>
where
    T: MakeTlsConnect<Socket, Stream: Send, TlsConnect: Send> + 'static,
    <T::TlsConnect as TlsConnect<Socket>>::Future: Send,
{
    let what = "connecting to PostgreSQL";
    let (client, connection) = timeout(CONNECT_MAX, config.connect(tls))
        .await
        .map_err(|_| ToolError::Timeout {
            program: what.to_owned(),
            limit: CONNECT_MAX,
        })?
        .map_err(|source| ToolError::Sql { what, source })?;
    let mut driver = JoinSet::new();
    driver.spawn(async move {
        // An error here is seen by whoever waits for an answer.
        let _ = connection.await;
    });
    Ok(Kept {
        client,
        _driver: driver,
    })
}

/// A connection that is kept.
pub(super) struct Kept {
    pub(super) client: Client,
    /// Drives the connection; dropping it closes the socket.
    _driver: JoinSet<()>,
}
