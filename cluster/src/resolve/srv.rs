//! Services by name: SRV records (RFC 2782), which the system's own resolver gives nobody. A stub that asks the servers of
//! `/etc/resolv.conf` in their order, by UDP, and by TCP where the answer is too long for that.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use simple_dns::rdata::RData;
use simple_dns::{CLASS, Name, Packet, PacketFlag, QCLASS, QTYPE, Question, RCODE, TYPE};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

use crate::record::Address;

/// Where a system says which servers know names.
pub const RESOLV_CONF: &str = "/etc/resolv.conf";
const DNS_PORT: u16 = 53;
/// How many servers of the file count, as for the C library.
const SERVERS_MAX: usize = 3;
/// How long one server is waited for.
const ANSWER_MAX: Duration = Duration::from_secs(1);
/// How often each server is asked: a datagram may be lost.
const ROUNDS: usize = 2;
/// The longest answer that fits a datagram without more being agreed on (RFC 1035, section 4.2.1), and then some.
const DATAGRAM_BYTES_MAX: usize = 4096;

/// One host of a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Lower ones are tried first.
    pub priority: u16,
    /// Among those of one priority, higher ones are tried first.
    pub weight: u16,
    /// Where it is.
    pub address: Address,
}

/// The servers that this system asks.
///
/// # Errors
/// When the file is there and cannot be read.
pub async fn servers(resolv_conf: &Path) -> io::Result<Vec<SocketAddr>> {
    let text = match tokio::fs::read_to_string(resolv_conf).await {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        Err(error) => return Err(error),
    };
    Ok(servers_in(&text))
}

/// As resolv.conf(5): the server on this machine where none is named.
fn servers_in(text: &str) -> Vec<SocketAddr> {
    let named = text.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let address = words.next().filter(|word| *word == "nameserver").and(words.next())?;
        Some(SocketAddr::new(address.parse::<IpAddr>().ok()?, DNS_PORT))
    });
    let mut found: Vec<SocketAddr> = named.take(SERVERS_MAX).collect();
    if found.is_empty() {
        found.push((Ipv4Addr::LOCALHOST, DNS_PORT).into());
    }
    found
}

/// The hosts of the service `name`, such as `_etcd-client._tcp.example.com`, the first to be tried first; none where there is no
/// such name. Takes two seconds per server at most.
///
/// # Errors
/// When no server gave an answer; says what the last one said.
pub async fn services(name: &str, servers: &[SocketAddr]) -> io::Result<Vec<Service>> {
    let mut last = io::Error::other("no name server is configured");
    for _ in 0..ROUNDS {
        for server in servers {
            match timeout(ANSWER_MAX, ask(name, *server)).await {
                Ok(Ok(found)) => return Ok(found),
                Ok(Err(error)) => last = io::Error::new(error.kind(), format!("the name server {server}: {error}")),
                Err(_) => last = io::Error::other(format!("the name server {server} is silent")),
            }
        }
    }
    Err(last)
}

async fn ask(name: &str, server: SocketAddr) -> io::Result<Vec<Service>> {
    // Who cannot see the question cannot guess it: the port is the kernel's choice, and nobody else's datagrams come in.
    let bits = RandomState::new().build_hasher().finish().to_be_bytes();
    let id = u16::from_be_bytes([bits[0], bits[1]]);
    let question = question(name, id)?;
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(&question).await?;
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        let length = socket.recv(&mut buffer).await?;
        match read(buffer.get(..length).unwrap_or_default(), id) {
            Reading::NotOurs => {}
            Reading::Cut => return ask_by_tcp(&question, id, server).await,
            Reading::Answer(answer) => return answer,
        }
    }
}

/// In a stream each message has its length before it (RFC 1035, section 4.2.2).
async fn ask_by_tcp(question: &[u8], id: u16, server: SocketAddr) -> io::Result<Vec<Service>> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(question.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), question].concat()).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    match read(&answer, id) {
        Reading::Answer(answer) => answer,
        Reading::NotOurs | Reading::Cut => Err(io::Error::other("not an answer to what was asked")),
    }
}

fn question(name: &str, id: u16) -> io::Result<Vec<u8>> {
    let mut packet = Packet::new_query(id);
    packet.set_flags(PacketFlag::RECURSION_DESIRED);
    let name = Name::new(name).map_err(io::Error::other)?;
    packet.questions.push(Question::new(
        name,
        QTYPE::TYPE(TYPE::SRV),
        QCLASS::CLASS(CLASS::IN),
        false,
    ));
    packet.build_bytes_vec().map_err(io::Error::other)
}

/// What a message is to us.
enum Reading {
    /// Late, or somebody else's.
    NotOurs,
    /// It goes on by TCP.
    Cut,
    Answer(io::Result<Vec<Service>>),
}

fn read(message: &[u8], id: u16) -> Reading {
    let Ok(packet) = Packet::parse(message) else {
        return Reading::NotOurs;
    };
    if packet.id() != id || !packet.has_flags(PacketFlag::RESPONSE) {
        return Reading::NotOurs;
    }
    if packet.has_flags(PacketFlag::TRUNCATION) {
        return Reading::Cut;
    }
    match packet.rcode() {
        RCODE::NoError | RCODE::NameError => {}
        code => return Reading::Answer(Err(io::Error::other(format!("it says {code:?}")))),
    }
    let mut found: Vec<Service> = packet
        .answers
        .iter()
        .filter_map(|record| service(&record.rdata))
        .collect();
    found.sort_by_key(|service| (service.priority, u16::MAX - service.weight));
    Reading::Answer(Ok(found))
}

fn service(data: &RData<'_>) -> Option<Service> {
    let RData::SRV(record) = data else { return None };
    let host = record.target.to_string();
    // The root as a target says that the service is not offered.
    let host = host.trim_end_matches('.').to_owned();
    (!host.is_empty()).then_some(Service {
        priority: record.priority,
        weight: record.weight,
        address: Address {
            host,
            port: record.port,
        },
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use simple_dns::ResourceRecord;
    use simple_dns::rdata::SRV;
    use tokio::net::TcpListener;
    use tokio::task::JoinSet;

    use super::*;

    /// A name server on loopback. Names it does not know do not exist.
    pub(crate) struct NameServer {
        pub(crate) address: SocketAddr,
        _tasks: JoinSet<()>,
    }

    pub(crate) type Zone = BTreeMap<String, Vec<(u16, u16, u16, String)>>;

    impl NameServer {
        /// One that answers by UDP as far as an answer has at most `by_udp` records, and by TCP.
        pub(crate) async fn start(zone: Zone, by_udp: usize) -> Self {
            let stream = TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let address = stream.local_addr().expect("an address");
            let socket = UdpSocket::bind(address).await.expect("the same port");
            let mut tasks = JoinSet::new();
            let zone_of_tcp = zone.clone();
            tasks.spawn(async move {
                let mut buffer = vec![0; 512];
                while let Ok((length, client)) = socket.recv_from(&mut buffer).await {
                    let whole = answer(&zone, &buffer[..length], usize::MAX);
                    // A stray datagram comes first, as from a question of before.
                    let mut stray = whole.clone();
                    stray[0] ^= 0xff;
                    socket.send_to(&stray, client).await.expect("sent");
                    let cut = answer(&zone, &buffer[..length], by_udp);
                    socket.send_to(&cut, client).await.expect("sent");
                }
            });
            tasks.spawn(async move {
                while let Ok((mut client, _)) = stream.accept().await {
                    let mut question = vec![0; client.read_u16().await.expect("a length").into()];
                    client.read_exact(&mut question).await.expect("a question");
                    let answer = answer(&zone_of_tcp, &question, usize::MAX);
                    client
                        .write_u16(u16::try_from(answer.len()).expect("short"))
                        .await
                        .expect("sent");
                    client.write_all(&answer).await.expect("sent");
                }
            });
            Self { address, _tasks: tasks }
        }
    }

    fn answer(zone: &Zone, question: &[u8], records_max: usize) -> Vec<u8> {
        let asked = Packet::parse(question).expect("a question");
        let mut packet = Packet::new_reply(asked.id());
        let name = asked.questions[0].qname.to_string();
        let records = zone.get(&name);
        if records.is_none() {
            *packet.rcode_mut() = if name.starts_with("_broken") {
                RCODE::ServerFailure
            } else {
                RCODE::NameError
            };
        }
        let records = records.map(Vec::as_slice).unwrap_or_default();
        if records.len() > records_max {
            packet.set_flags(PacketFlag::TRUNCATION);
        }
        for (priority, weight, port, target) in records.iter().take(records_max) {
            let data = RData::SRV(SRV {
                priority: *priority,
                weight: *weight,
                port: *port,
                target: Name::new(target).expect("a name"),
            });
            let name = Name::new(&name).expect("a name").into_owned();
            packet.answers.push(ResourceRecord::new(name, CLASS::IN, 60, data));
        }
        packet.questions = asked.questions;
        packet.build_bytes_vec().expect("an answer")
    }

    fn hosts(found: &[Service]) -> Vec<String> {
        found.iter().map(|service| service.address.to_string()).collect()
    }

    #[tokio::test]
    async fn services_come_in_their_order_by_udp_or_tcp_and_strays_are_passed_over() {
        let records = [
            (20, 0, 2379, "c"),
            (10, 1, 2379, "b"),
            (10, 9, 4001, "a"),
            (1, 1, 1, "."),
        ];
        let records = records.map(|(priority, weight, port, name)| {
            let name = if name == "." {
                String::new()
            } else {
                format!("{name}.example.com")
            };
            (priority, weight, port, name)
        });
        let zone = Zone::from([("_etcd-client._tcp.example.com".to_owned(), records.to_vec())]);
        for by_udp in [usize::MAX, 1] {
            let server = NameServer::start(zone.clone(), by_udp).await;
            let found = services("_etcd-client._tcp.example.com", &[server.address]).await;
            let expected = ["a.example.com:4001", "b.example.com:2379", "c.example.com:2379"];
            assert_eq!(hosts(&found.expect("an answer")), expected);
            let none = services("_etcd._tcp.example.com", &[server.address]).await;
            assert_eq!(none.expect("an answer"), []);
        }
    }

    #[tokio::test]
    async fn the_next_server_is_asked_when_one_refuses_or_is_in_trouble() {
        let broken = NameServer::start(Zone::new(), usize::MAX).await;
        let good = Zone::from([("_broken._tcp.x".to_owned(), vec![(1, 1, 5, "h".to_owned())])]);
        let good = NameServer::start(good, usize::MAX).await;
        // Nobody listens here: the kernel refuses at once.
        let closed = UdpSocket::bind("127.0.0.1:0").await.expect("a port");
        let refusing = closed.local_addr().expect("an address");
        drop(closed);
        let found = services("_broken._tcp.x", &[refusing, broken.address, good.address]).await;
        assert_eq!(hosts(&found.expect("an answer")), ["h:5"]);
        let error = services("_broken._tcp.x", &[broken.address])
            .await
            .expect_err("refused");
        assert!(error.to_string().contains("ServerFailure"), "{error}");
    }

    #[test]
    fn name_servers_are_read_as_the_c_library_reads_them() {
        let read = |text: &str| {
            let found = servers_in(text);
            found.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let text =
            "# x\nsearch a b\nnameserver 10.0.0.1\n nameserver fd00::1 # y\nnameserver 10.0.0.3\nnameserver 10.0.0.4\n";
        assert_eq!(read(text), ["10.0.0.1:53", "[fd00::1]:53", "10.0.0.3:53"]);
        assert_eq!(read("options edns0\n"), ["127.0.0.1:53"]);
    }
}
