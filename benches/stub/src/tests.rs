use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use tokio_postgres::{NoTls, SimpleQueryMessage};

use crate::serve;

const PATIENCE: Duration = Duration::from_secs(20);

struct Running {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let told = Arc::clone(&stop);
        let thread = std::thread::spawn(move || serve(&listener, &told).unwrap());
        Self {
            address,
            stop,
            thread: Some(thread),
        }
    }

    /// A session that has been let in.
    fn client(&self) -> TcpStream {
        let mut client = TcpStream::connect(self.address).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(b"\0\0\0\x08\x04\xd2\x16\x2f").unwrap();
        let mut no = [0];
        client.read_exact(&mut no).unwrap();
        assert_eq!(&no, b"N");
        client.write_all(b"\0\0\0\x11\0\x03\0\0user\0me\0\0").unwrap();
        read_until_ready(&mut client);
        client
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn query(text: &str) -> Vec<u8> {
    let mut bytes = vec![b'Q'];
    bytes.extend_from_slice(&u32::try_from(text.len() + 5).unwrap().to_be_bytes());
    bytes.extend_from_slice(text.as_bytes());
    bytes.push(0);
    bytes
}

/// How many bytes came until the server was ready again, and the messages' kinds, without repetition.
fn read_until_ready(client: &mut TcpStream) -> (usize, String) {
    let (mut bytes, mut kinds) = (0, String::new());
    let mut body = Vec::new();
    loop {
        let mut head = [0; 5];
        client.read_exact(&mut head).unwrap();
        let length = u32::from_be_bytes(head[1..].try_into().unwrap()) as usize;
        body.resize(length - 4, 0);
        client.read_exact(&mut body).unwrap();
        bytes += length + 1;
        if !kinds.ends_with(char::from(head[0])) {
            kinds.push(char::from(head[0]));
        }
        if head[0] == b'Z' {
            return (bytes, kinds);
        }
    }
}

fn own_memory() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * 1024
}

#[tokio::test]
async fn a_client_library_gets_rows_simple_prepared_and_in_bulk() {
    let server = Running::start();
    let url = format!("postgres://me@{}/db", server.address);
    let (client, connection) = tokio_postgres::connect(&url, NoTls).await.unwrap();
    let talk = async {
        let rows = client.simple_query("select 1").await.unwrap();
        let row = rows.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        assert_eq!(row, Some("1"));
        for _ in 0..2 {
            let rows = client.query("select 1", &[]).await.unwrap();
            assert_eq!(rows[0].get::<_, &str>(0), "1");
        }
        let rows = client.query("bulk 3 5000", &[]).await.unwrap();
        assert_eq!(rows.len(), (3_usize << 20).div_ceil(5011));
        assert!(rows.iter().all(|row| row.get::<_, &str>(0).len() == 5000));
        client.batch_execute("SET a = b; DISCARD ALL").await.unwrap();
    };
    tokio::select! {
        ended = connection => panic!("{ended:?}"),
        () = talk => {}
    }
}

#[test]
fn a_copy_is_swallowed_however_it_is_cut() {
    let server = Running::start();
    let mut client = server.client();
    for chunk in [1, 7, 4096, 1 << 20] {
        client.write_all(&query("COPY t FROM STDIN")).unwrap();
        let mut head = [0; 10];
        client.read_exact(&mut head).unwrap();
        assert_eq!(head[0], b'G');
        let mut data = Vec::new();
        for size in [5_usize, 0, 70_000, 3] {
            data.push(b'd');
            data.extend_from_slice(&u32::try_from(size + 4).unwrap().to_be_bytes());
            data.resize(data.len() + size, b'Q');
        }
        data.extend_from_slice(b"c\0\0\0\x04");
        for part in data.chunks(chunk) {
            client.write_all(part).unwrap();
        }
        assert_eq!(read_until_ready(&mut client), (18, "CZ".to_owned()));
    }
}

#[test]
fn a_reader_that_is_slow_costs_little_and_hinders_nobody() {
    let server = Running::start();
    let (mut slow, mut other) = (server.client(), server.client());
    let before = own_memory();
    // What stands behind the rows is answered after them.
    let asked = [query("bulk 200"), query("bulk8k 2 100"), query("select 1")].concat();
    slow.write_all(&asked).unwrap();
    for _ in 0..1000 {
        other.write_all(&query("select 1")).unwrap();
        read_until_ready(&mut other);
    }
    let grown = own_memory().saturating_sub(before);
    assert!(grown < 8 << 20, "{grown} bytes for a client that does not read");
    let sizes = [
        read_until_ready(&mut slow),
        read_until_ready(&mut slow),
        read_until_ready(&mut slow),
    ];
    assert!(sizes.iter().all(|(_, kinds)| kinds == "TDCZ"), "{sizes:?}");
    assert!((200 << 20..201 << 20).contains(&sizes[0].0), "{sizes:?}");
    assert!((2 << 20..3 << 20).contains(&sizes[1].0), "{sizes:?}");
}

#[test]
fn a_client_that_only_asks_is_not_read_for_ever() {
    let server = Running::start();
    let client = server.client();
    client.set_nonblocking(true).unwrap();
    let before = own_memory();
    let many = query("select 1").repeat(1000);
    let (mut taken, mut refused) = (0, 0);
    while refused < 100 {
        match (&client).write(&many) {
            Ok(count) => taken += count,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                refused += 1;
                std::thread::park_timeout(Duration::from_millis(5));
            }
            Err(error) => panic!("{error}"),
        }
        assert!(
            taken < 64 << 20,
            "{taken} bytes were taken of a client that does not read"
        );
    }
    let grown = own_memory().saturating_sub(before);
    assert!(grown < 8 << 20, "{grown} bytes for a client that does not read");
}

#[test]
fn what_is_no_message_ends_the_connection() {
    let server = Running::start();
    for bytes in [&b"Q\0\0\0\x01"[..], b"Q\x7f\0\0\0", b"?\0\0\0\x04", b"X\0\0\0\x04"] {
        let mut client = server.client();
        client.write_all(bytes).unwrap();
        assert_eq!(client.read(&mut [0; 16]).unwrap_or(0), 0, "{bytes:?}");
    }
}
