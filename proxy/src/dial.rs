//! Connecting to a member.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use pgherd_cluster::record::Address;
use pgherd_cluster::resolve::resolve;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::stream::socket::{self, Socket};

/// How long one attempt may take: a lost SYN is sent again after one second.
const DIAL_MAX: Duration = Duration::from_millis(2500);

/// A connection to `address`, tuned, and where it leads.
///
/// # Errors
/// When no address that the name stands for can be connected to in time: the last one's error.
pub(crate) async fn dial(address: &Address) -> io::Result<(Socket, SocketAddr)> {
    let dialled = async {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name stands for no address");
        for socket_address in resolve(address).await? {
            match TcpStream::connect(socket_address).await {
                Ok(stream) => {
                    socket::tune_apart(&stream)?;
                    return Ok((Socket::Tcp(stream), socket_address));
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
