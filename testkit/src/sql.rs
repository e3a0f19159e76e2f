//! Connections to PostgreSQL, with a deadline on everything.

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage, SimpleQueryRow};

/// The superuser of every test cluster.
pub const SUPERUSER: &str = "postgres";
/// Its password.
pub const SUPERUSER_PASSWORD: &str = "super-secret-of-tests";
/// The database that the tests use.
pub const DATABASE: &str = "postgres";

/// Why a statement has no result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SqlFailure {
    /// PostgreSQL, or a proxy in its name, said why.
    Told {
        /// The SQLSTATE, such as `57P01`.
        code: String,
        /// The message, with detail and hint.
        message: String,
    },
    /// The connection could not be made, or ended without a word.
    Cut(String),
    /// Nothing came in time.
    Silent(Duration),
}

impl SqlFailure {
    /// One word for counting: the SQLSTATE, `cut` or `silent`.
    #[must_use]
    pub fn code(&self) -> &str {
        match self {
            Self::Told { code, .. } => code,
            Self::Cut(_) => "cut",
            Self::Silent(_) => "silent",
        }
    }
}

impl fmt::Display for SqlFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Told { code, message } => write!(f, "{code}: {message}"),
            Self::Cut(how) => write!(f, "connection cut: {how}"),
            Self::Silent(limit) => write!(f, "no answer within {limit:?}"),
        }
    }
}

impl std::error::Error for SqlFailure {}

impl From<tokio_postgres::Error> for SqlFailure {
    fn from(error: tokio_postgres::Error) -> Self {
        match error.as_db_error() {
            Some(told) => {
                let parts = [Some(told.message()), told.detail(), told.hint()];
                let message = parts.into_iter().flatten().collect::<Vec<_>>().join("; ");
                Self::Told {
                    code: told.code().code().to_owned(),
                    message,
                }
            }
            None => Self::Cut(format!("{:#}", anyhow::Error::from(error))),
        }
    }
}

/// One open connection. It is closed when this is dropped.
pub struct Sql {
    client: Client,
    ended: Arc<OnceLock<(SqlFailure, Instant)>>,
    _connection: JoinSet<()>,
}

impl Sql {
    /// Connects as the superuser.
    ///
    /// # Errors
    /// When it cannot be done within `limit`.
    pub async fn connect(address: SocketAddr, limit: Duration) -> Result<Self, SqlFailure> {
        let mut config = Config::new();
        config.host(address.ip().to_string()).port(address.port());
        config
            .user(SUPERUSER)
            .password(SUPERUSER_PASSWORD)
            .dbname(DATABASE)
            .application_name("pgherd-testkit");
        let connected = timeout(limit, config.connect(NoTls)).await;
        let (client, connection) = connected.map_err(|_| SqlFailure::Silent(limit))??;
        let ended = Arc::new(OnceLock::new());
        let end = Arc::clone(&ended);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let how = match connection.await {
                Ok(()) => SqlFailure::Cut("closed".to_owned()),
                Err(error) => error.into(),
            };
            let _ = end.set((how, Instant::now())); // It is set once.
        });
        Ok(Self {
            client,
            ended,
            _connection: tasks,
        })
    }

    /// Sends `text` as one simple query, several statements perhaps, and returns the rows of all.
    ///
    /// # Errors
    /// When it fails or is not answered within `limit`.
    pub async fn rows(&self, text: &str, limit: Duration) -> Result<Vec<SimpleQueryRow>, SqlFailure> {
        let messages = timeout(limit, self.client.simple_query(text))
            .await
            .map_err(|_| SqlFailure::Silent(limit))??;
        let rows = messages.into_iter().filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        Ok(rows.collect())
    }

    /// Sends `text` as one simple query, and returns the first column of the first row, or nothing.
    ///
    /// # Errors
    /// As [`Sql::rows`].
    pub async fn value(&self, text: &str, limit: Duration) -> Result<String, SqlFailure> {
        let rows = self.rows(text, limit).await?;
        Ok(rows.first().and_then(|row| row.get(0)).unwrap_or_default().to_owned())
    }

    /// How the connection ended, if it has: what the other side said last, between statements perhaps.
    #[must_use]
    pub fn ended(&self) -> Option<&SqlFailure> {
        self.ended.get().map(|(how, _)| how)
    }

    /// When the connection was seen to end, if it has.
    #[must_use]
    pub fn ended_at(&self) -> Option<Instant> {
        self.ended.get().map(|(_, at)| *at)
    }
}

/// Connects, asks once, and returns the first column of the first row.
///
/// # Errors
/// When it cannot be done within twice `limit`.
pub async fn value(address: SocketAddr, text: &str, limit: Duration) -> Result<String, SqlFailure> {
    Sql::connect(address, limit).await?.value(text, limit).await
}
