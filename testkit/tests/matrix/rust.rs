//! tokio-postgres, with rustls where TLS is spoken.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll};

use anyhow::{Context, Result, bail, ensure};
use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt, TryStreamExt};
use pgherd_testkit::eventually;
use pgherd_testkit::sql::{DATABASE, SUPERUSER, SUPERUSER_PASSWORD};
use rustls::crypto::ring::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_postgres::config::{ChannelBinding as Binding, SslMode, TargetSessionAttrs};
use tokio_postgres::tls::{ChannelBinding, MakeTlsConnect, TlsConnect, TlsStream};
use tokio_postgres::{AsyncMessage, Client, Config, Socket};
use tokio_rustls::{TlsConnector, client};

use super::{Field, SOON, Tls};

const LINES: u32 = 20_000;
const LARGE_BYTES: usize = 1 << 20;
const NOTIFICATIONS: usize = 20;
const AT_ONCE: i32 = 300;
/// Messages that nobody has looked at yet.
const MESSAGES_MAX: usize = 100;

/// A session, and what its server said unasked.
struct Session {
    client: Client,
    told: mpsc::Receiver<AsyncMessage>,
    _connection: JoinSet<()>,
}

fn config(field: &Field, address: std::net::SocketAddr) -> Config {
    let mut config = Config::new();
    config.host(address.ip().to_string()).port(address.port());
    config.user(SUPERUSER).password(SUPERUSER_PASSWORD).dbname(DATABASE);
    config.application_name("tokio-postgres").connect_timeout(SOON);
    config.options("-c statement_timeout=61s -c my.setting=a\\ b");
    config.ssl_mode(match field.tls {
        Tls::Nowhere => SslMode::Disable,
        Tls::Proxy | Tls::Server => SslMode::Require,
    });
    if field.tls == Tls::Server {
        config.channel_binding(Binding::Require);
    }
    config
}

async fn connect(field: &Field, config: &Config) -> Result<Session> {
    let (client, mut connection) = timeout(SOON, config.connect(Rustls::new(field)?)).await??;
    let (tell, told) = mpsc::channel(MESSAGES_MAX);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
            let _ = tell.send(message).await; // Nobody listens any more.
        }
    });
    Ok(Session {
        client,
        told,
        _connection: tasks,
    })
}

pub(super) async fn tokio_postgres(field: &Field) -> Result<()> {
    for (port, address) in field.ports() {
        let both = async {
            let session = connect(field, &config(field, address)).await?;
            tells(field, &session.client).await?;
            asks(&session.client).await?;
            cancels(field, &session.client).await
        };
        both.await.with_context(|| format!("on the {port} port"))?;
    }
    let mut session = connect(field, &config(field, field.write())).await?;
    transacts(&mut session.client).await?;
    copies(&session.client).await?;
    notified(field).await?;
    let read = connect(field, &config(field, field.read())).await?;
    let refused = read.client.batch_execute("CREATE TABLE not_here (n int)").await;
    is_told(refused, "25006")?;
    // Which of two addresses takes writes is found out by asking the servers.
    let mut config = config(field, field.read());
    config.host(field.write().ip().to_string()).port(field.write().port());
    config.target_session_attrs(TargetSessionAttrs::ReadWrite);
    let session = connect(field, &config).await?;
    let row = session.client.query_one("SELECT pg_is_in_recovery()", &[]).await?;
    ensure!(!row.get::<_, bool>(0), "a replica");
    Ok(())
}

fn is_told<T>(outcome: Result<T, tokio_postgres::Error>, code: &str) -> Result<()> {
    let error = outcome.err().with_context(|| format!("no {code}"))?;
    let said = error
        .as_db_error()
        .with_context(|| format!("not the server's: {error}"))?;
    ensure!(said.code().code() == code, "{said:?}");
    Ok(())
}

async fn tells(field: &Field, client: &Client) -> Result<()> {
    let question = "SELECT current_setting('statement_timeout'), current_setting('my.setting'), application_name, ssl \
                    FROM pg_stat_activity JOIN pg_stat_ssl USING (pid) WHERE pid = pg_backend_pid()";
    let row = client.query_one(question, &[]).await?;
    let texts: [&str; 3] = [row.get(0), row.get(1), row.get(2)];
    ensure!(texts == ["61s", "a b", "tokio-postgres"], "{texts:?}");
    ensure!(
        row.get::<_, bool>(3) == (field.tls == Tls::Server),
        "TLS ends elsewhere"
    );
    Ok(())
}

/// Prepared statements, many at once on one connection, and large values.
async fn asks(client: &Client) -> Result<()> {
    let statement = client.prepare("SELECT $1::int + 1, $2::bytea").await?;
    let content: Vec<u8> = (0_u32..).flat_map(u32::to_le_bytes).take(LARGE_BYTES).collect();
    for n in 0..20_i32 {
        let row = client.query_one(&statement, &[&n, &content]).await?;
        ensure!(row.get::<_, i32>(0) == n + 1 && row.get::<_, &[u8]>(1) == content);
    }
    let none: &[u8] = &[];
    let answers = (0..AT_ONCE).map(|n| {
        let statement = &statement;
        async move { Ok::<_, tokio_postgres::Error>(client.query_one(statement, &[&n, &none]).await?.get::<_, i32>(0)) }
    });
    let answers = futures_util::future::try_join_all(answers).await?;
    ensure!(answers.into_iter().eq(1..=AT_ONCE), "answers in another order");
    is_told(client.query_one("SELECT 1 / $1::int", &[&0]).await, "22012")?;
    Ok(())
}

async fn cancels(field: &Field, client: &Client) -> Result<()> {
    let token = client.cancel_token();
    let tls = Rustls::new(field)?;
    let pid: i32 = client.query_one("SELECT pg_backend_pid()", &[]).await?.get(0);
    let sleeps = format!("SELECT 1 FROM pg_stat_activity WHERE pid = {pid} AND wait_event = 'PgSleep'");
    let cancelling = async {
        let asleep = eventually("the statement sleeps", SOON, async || {
            for member in field.cluster.members() {
                if member.sql(&sleeps).await? == "1" {
                    return Ok(());
                }
            }
            bail!("on no member")
        });
        asleep.await?;
        anyhow::Ok(token.cancel_query(tls).await?)
    };
    let (slept, cancelled) = tokio::join!(client.batch_execute("SELECT pg_sleep(60)"), cancelling);
    cancelled?;
    is_told(slept, "57014")?;
    client.batch_execute("SELECT 1").await?;
    Ok(())
}

async fn transacts(client: &mut Client) -> Result<()> {
    client.batch_execute("CREATE TABLE rust (n int PRIMARY KEY)").await?;
    let mut transaction = client.transaction().await?;
    transaction.execute("INSERT INTO rust VALUES ($1)", &[&1]).await?;
    let inner = transaction.savepoint("later").await?;
    inner.execute("INSERT INTO rust VALUES (2)", &[]).await?;
    inner.rollback().await?;
    transaction.commit().await?;
    let transaction = client.transaction().await?;
    transaction.execute("DELETE FROM rust", &[]).await?;
    transaction.rollback().await?;
    let row = client.query_one("SELECT array_agg(n) FROM rust", &[]).await?;
    ensure!(row.get::<_, Vec<i32>>(0) == [1]);
    is_told(client.execute("INSERT INTO rust VALUES (1)", &[]).await, "23505")
}

async fn copies(client: &Client) -> Result<()> {
    let lines: String = (0..LINES)
        .map(|n| format!("{n}\t{}\n", n.to_string().repeat(30)))
        .collect();
    client.batch_execute("CREATE TEMP TABLE copied (n int, t text)").await?;
    let sink = client.copy_in("COPY copied FROM STDIN").await?;
    tokio::pin!(sink);
    for chunk in lines.as_bytes().chunks(50_000) {
        sink.send(Bytes::copy_from_slice(chunk)).await?;
    }
    ensure!(sink.finish().await? == u64::from(LINES));
    let stream = client
        .copy_out("COPY (SELECT * FROM copied ORDER BY n) TO STDOUT")
        .await?;
    let parts: Vec<Bytes> = stream.try_collect().await?;
    let mut back = BytesMut::new();
    parts.iter().for_each(|part| back.extend_from_slice(part));
    ensure!(back == lines.as_bytes(), "COPY brought back something else");
    Ok(())
}

async fn notified(field: &Field) -> Result<()> {
    let mut listener = connect(field, &config(field, field.write())).await?;
    let notifier = connect(field, &config(field, field.write())).await?;
    listener.client.batch_execute("LISTEN rust").await?;
    let notify = format!("SELECT pg_notify('rust', n::text) FROM generate_series(1, {NOTIFICATIONS}) n");
    notifier.client.batch_execute(&notify).await?;
    for n in 1..=NOTIFICATIONS {
        let message = timeout(SOON, listener.told.recv())
            .await?
            .context("the session ended")?;
        let AsyncMessage::Notification(heard) = message else {
            continue;
        };
        ensure!(heard.payload() == n.to_string(), "{heard:?} instead of {n}");
    }
    Ok(())
}

/// TLS by rustls, as one of the crates for it does it.
#[derive(Clone)]
struct Rustls {
    config: Arc<ClientConfig>,
    name: Option<ServerName<'static>>,
}

impl Rustls {
    fn new(field: &Field) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(field.authority.file())?)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self {
            config: Arc::new(config),
            name: None,
        })
    }
}

impl MakeTlsConnect<Socket> for Rustls {
    type Stream = RustlsStream;
    type TlsConnect = Self;
    type Error = rustls::pki_types::InvalidDnsNameError;

    fn make_tls_connect(&mut self, domain: &str) -> Result<Self, Self::Error> {
        Ok(Self {
            config: Arc::clone(&self.config),
            name: Some(ServerName::try_from(domain.to_owned())?),
        })
    }
}

impl TlsConnect<Socket> for Rustls {
    type Stream = RustlsStream;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<RustlsStream>> + Send>>;

    fn connect(self, stream: Socket) -> Self::Future {
        Box::pin(async move {
            let name = self.name.ok_or_else(|| io::Error::other("no name"))?;
            TlsConnector::from(self.config)
                .connect(name, stream)
                .await
                .map(|stream| RustlsStream(Box::new(stream)))
        })
    }
}

struct RustlsStream(Box<client::TlsStream<Socket>>);

impl TlsStream for RustlsStream {
    /// The certificates of the tests are signed with SHA-256, and so hashed with it (RFC 5929, tls-server-end-point).
    fn channel_binding(&self) -> ChannelBinding {
        let certificates = self.0.get_ref().1.peer_certificates();
        let suite = TLS13_AES_128_GCM_SHA256.tls13();
        match certificates.and_then(<[_]>::first).zip(suite) {
            Some((certificate, suite)) => {
                let hash = suite.common.hash_provider.hash(certificate);
                ChannelBinding::tls_server_end_point(hash.as_ref().to_vec())
            }
            None => ChannelBinding::none(),
        }
    }
}

impl AsyncRead for RustlsStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for RustlsStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut TaskContext<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0).poll_shutdown(cx)
    }
}
