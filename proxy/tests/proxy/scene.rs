//! What most tests begin with: one server that leads, and a proxy before it.

use pgherd_proxy::ProxyConfig;
use tokio::net::TcpStream;

use crate::fake::*;

/// Named n1, and known to take writes.
pub(crate) struct Led {
    pub(crate) server: Server,
    pub(crate) cluster: Cluster,
    pub(crate) proxy: Running,
}

impl Led {
    /// Before it a listener for writers.
    pub(crate) async fn start() -> Self {
        Self::behind(config(vec![write_listener()])).await
    }

    /// Before it a proxy with this configuration.
    pub(crate) async fn behind(config: ProxyConfig) -> Self {
        let server = Server::start().await;
        let mut cluster = Cluster::new();
        cluster.writable("n1", server.address);
        let proxy = Running::start(config, &cluster);
        Self { server, cluster, proxy }
    }

    /// A client of the first listener that has been let in, and its session on the server.
    pub(crate) async fn session(&mut self) -> (TcpStream, ServerSession) {
        let mut client = self.proxy.client().await;
        let session = self.server.session().await;
        assert_eq!(expect_hello(&mut client).await, session.key);
        (client, session)
    }
}
