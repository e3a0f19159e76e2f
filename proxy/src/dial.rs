//! Connecting to a member.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use pgherd_cluster::record::Address;
use tokio::net::{TcpStream, lookup_host};
use tokio::time::timeout;

use crate::stream::socket::Socket;

/// How long one attempt may take: a lost SYN is sent again after one second.
const DIAL_MAX: Duration = Duration::from_millis(2500);

/// A connection to `address`, tuned.
///
/// # Errors
/// When no address that the name stands for can be connected to in time: the last one's error.
pub(crate) async fn dial(address: &Address) -> io::Result<Socket> {
    let dialled = async {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name stands for no address");
        for socket_address in resolve(address).await? {
            match TcpStream::connect(socket_address).await {
                Ok(stream) => {
                    let socket = Socket::Tcp(stream);
                    socket.tune()?;
                    return Ok(socket);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    };
    match timeout(DIAL_MAX, dialled).await {
        Ok(result) => result,
        Err(_) => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("no answer in {} s", DIAL_MAX.as_secs_f64()),
        )),
    }
}

/// Literal addresses are not looked up: a resolver may be slow exactly when the network is in trouble.
pub(crate) async fn resolve(address: &Address) -> io::Result<Vec<SocketAddr>> {
    if let Ok(ip) = address.host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(ip, address.port)]);
    }
    Ok(lookup_host((address.host.as_str(), address.port)).await?.collect())
}
