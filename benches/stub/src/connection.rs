//! One client.

use std::io::{self, Read, Write};
use std::net::TcpStream;

use crate::protocol::{Answers, Request, request, row};

const READ_BYTES: usize = 256 * 1024;
/// Of one stream, until others get their turn.
const BYTES_PER_TURN: usize = 1024 * 1024;
/// Whole rows, sent again and again.
const CHUNK_BYTES: usize = 256 * 1024;
/// Of a message that is not skipped over.
const MESSAGE_BYTES_MAX: usize = 64 * 1024;
const SSL_REQUEST: u32 = 80_877_103;
const GSSENC_REQUEST: u32 = 80_877_104;
const PROTOCOL_3: u32 = 3;

/// What all connections share.
pub(crate) struct Shared {
    answers: Answers,
    inbox: Vec<u8>,
    outbox: Vec<u8>,
}

impl Shared {
    pub(crate) fn new() -> Self {
        Self {
            answers: Answers::new(),
            inbox: vec![0; READ_BYTES],
            outbox: Vec::new(),
        }
    }

    /// Drops what a connection that broke was to be told.
    pub(crate) fn forget(&mut self) {
        self.outbox.clear();
    }
}

/// What a connection waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Waits {
    /// For the client to send.
    ToRead,
    /// For the client to take what it has asked for. Nothing is read from it meanwhile.
    ToWrite,
    /// It is over.
    Over,
}

/// One client and what it is owed.
pub(crate) struct Connection {
    pub(crate) stream: TcpStream,
    pub(crate) waits: Waits,
    started: bool,
    copying: bool,
    over: bool,
    /// The last statement that was parsed; there is one at a time, whatever its name.
    prepared: Request,
    /// What came and is not answered yet: the beginning of a message, or what stands behind rows that are being sent.
    input: Vec<u8>,
    /// What is still to come of a message that nobody looks at.
    skip: usize,
    output: Vec<u8>,
    bulk: Option<Bulk>,
    /// The input stands behind rows.
    behind_rows: bool,
}

struct Bulk {
    chunk: Vec<u8>,
    at: usize,
    left: usize,
    write: usize,
    ends_with_ready: bool,
}

impl Bulk {
    fn new(mebibytes: usize, size: usize, write: usize, ends_with_ready: bool) -> Self {
        let row = row(size);
        let chunk = row.repeat((CHUNK_BYTES / row.len()).max(1));
        let left = (mebibytes << 20).div_ceil(row.len()) * row.len();
        Self {
            chunk,
            at: 0,
            left,
            write,
            ends_with_ready,
        }
    }
}

impl Connection {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            waits: Waits::ToRead,
            started: false,
            copying: false,
            over: false,
            prepared: Request::Done,
            input: Vec::new(),
            skip: 0,
            output: Vec::new(),
            bulk: None,
            behind_rows: false,
        }
    }

    /// Does what can be done without waiting: at most one read.
    ///
    /// # Errors
    /// When the connection broke.
    pub(crate) fn turn(&mut self, shared: &mut Shared) -> io::Result<Waits> {
        let mut has_read = false;
        loop {
            if !self.flush(shared)? {
                return Ok(Waits::ToWrite);
            }
            if std::mem::take(&mut self.behind_rows) {
                let input = std::mem::take(&mut self.input);
                self.take(input, shared);
                continue;
            }
            if self.over {
                return Ok(Waits::Over);
            }
            if std::mem::replace(&mut has_read, true) {
                return Ok(Waits::ToRead);
            }
            match self.stream.read(&mut shared.inbox) {
                Ok(0) => return Ok(Waits::Over),
                Ok(count) => self.received(count, shared),
                Err(error) if is_transient(&error) => return Ok(Waits::ToRead),
                Err(error) => return Err(error),
            }
        }
    }

    fn received(&mut self, count: usize, shared: &mut Shared) {
        let skipped = self.skip.min(count);
        self.skip -= skipped;
        if self.input.is_empty() {
            let inbox = std::mem::take(&mut shared.inbox);
            let bytes = inbox.get(skipped..count).unwrap_or_default();
            let used = self.answer(bytes, shared);
            self.input.extend_from_slice(bytes.get(used..).unwrap_or_default());
            shared.inbox = inbox;
        } else {
            let mut input = std::mem::take(&mut self.input);
            input.extend_from_slice(shared.inbox.get(skipped..count).unwrap_or_default());
            self.take(input, shared);
        }
    }

    fn take(&mut self, mut input: Vec<u8>, shared: &mut Shared) {
        let used = self.answer(&input, shared);
        input.drain(..used);
        // A client without a message under way owns no buffer.
        self.input = if input.is_empty() { Vec::new() } else { input };
    }

    /// Answers whole messages until rows are to be sent; how many bytes that used up.
    fn answer(&mut self, bytes: &[u8], shared: &mut Shared) -> usize {
        let mut used = 0;
        while self.bulk.is_none() && !self.over {
            let rest = bytes.get(used..).unwrap_or_default();
            let head = usize::from(self.started);
            let Some(length) = rest.get(head..head + 4).and_then(|length| length.try_into().ok()) else {
                break;
            };
            let whole = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
            let whole = whole.saturating_add(head);
            let kind = rest.first().copied().filter(|_| self.started);
            if kind == Some(b'd') {
                let here = whole.min(rest.len());
                self.skip = whole - here;
                used += here;
                continue;
            }
            if whole > MESSAGE_BYTES_MAX || whole < head + 4 {
                self.over = true;
                break;
            }
            let Some(body) = rest.get(head + 4..whole) else { break };
            match kind {
                Some(kind) => self.message(kind, body, shared),
                None => self.first_packet(body, shared),
            }
            used += whole;
        }
        self.behind_rows = self.bulk.is_some();
        used
    }

    fn first_packet(&mut self, body: &[u8], shared: &mut Shared) {
        let code = body
            .get(..4)
            .and_then(|code| code.try_into().ok())
            .map(u32::from_be_bytes);
        match code {
            Some(SSL_REQUEST | GSSENC_REQUEST) => shared.outbox.push(b'N'),
            Some(code) if code >> 16 == PROTOCOL_3 => {
                self.started = true;
                shared.outbox.extend_from_slice(&shared.answers.welcome);
            }
            _ => self.over = true,
        }
    }

    fn message(&mut self, kind: u8, body: &[u8], shared: &mut Shared) {
        let answers = &shared.answers;
        let out = &mut shared.outbox;
        match kind {
            b'Q' => {
                let request = request(body.strip_suffix(b"\0").unwrap_or(body));
                if let Request::Row | Request::Bulk { .. } = request {
                    out.extend_from_slice(&answers.columns);
                }
                self.perform(request, true, answers, out);
            }
            b'P' => {
                // Its name, and then the text, each with a zero at its end.
                let text = body.split(|byte| *byte == 0).nth(1).unwrap_or_default();
                self.prepared = request(text);
                out.extend_from_slice(&answers.parsed);
            }
            b'B' => out.extend_from_slice(&answers.bound),
            b'D' => {
                if body.first() == Some(&b'S') {
                    out.extend_from_slice(&answers.no_parameters);
                }
                out.extend_from_slice(match self.prepared {
                    Request::Row | Request::Bulk { .. } => &answers.columns,
                    Request::CopyIn | Request::Done => &answers.no_columns,
                });
            }
            b'E' => self.perform(self.prepared, false, answers, out),
            b'C' => out.extend_from_slice(&answers.closed),
            b'S' if !self.copying => out.extend_from_slice(&answers.ready),
            b'c' if self.copying => {
                self.copying = false;
                out.extend_from_slice(&answers.copied);
                out.extend_from_slice(&answers.ready);
            }
            b'f' if self.copying => {
                self.copying = false;
                out.extend_from_slice(&answers.copy_failed);
                out.extend_from_slice(&answers.ready);
            }
            b'S' | b'H' => {}
            _ => self.over = true,
        }
    }

    fn perform(&mut self, request: Request, ready: bool, answers: &Answers, out: &mut Vec<u8>) {
        match request {
            Request::Row => {
                out.extend_from_slice(&answers.one);
                out.extend_from_slice(&answers.selected);
            }
            Request::Bulk { mebibytes, row, write } => {
                self.bulk = Some(Bulk::new(mebibytes, row, write, ready));
                return;
            }
            Request::CopyIn => {
                self.copying = true;
                out.extend_from_slice(&answers.send_copy);
                return;
            }
            Request::Done => out.extend_from_slice(&answers.done),
        }
        if ready {
            out.extend_from_slice(&answers.ready);
        }
    }

    /// Sends what is owed, as far as the client takes it. Whether all is sent.
    fn flush(&mut self, shared: &mut Shared) -> io::Result<bool> {
        if !self.flush_output(shared)? {
            return Ok(false);
        }
        let Some(bulk) = &mut self.bulk else { return Ok(true) };
        let mut turn = BYTES_PER_TURN;
        while bulk.left > 0 {
            if turn == 0 {
                return Ok(false);
            }
            let end = bulk.chunk.len().min(bulk.at + bulk.write.min(bulk.left));
            let bytes = bulk.chunk.get(bulk.at..end).unwrap_or_default();
            match self.stream.write(bytes) {
                Ok(count) => {
                    bulk.left -= count;
                    bulk.at = (bulk.at + count) % bulk.chunk.len();
                    turn = turn.saturating_sub(count);
                }
                Err(error) if is_transient(&error) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        shared.outbox.extend_from_slice(&shared.answers.selected);
        if bulk.ends_with_ready {
            shared.outbox.extend_from_slice(&shared.answers.ready);
        }
        self.bulk = None;
        self.flush_output(shared)
    }

    /// Sends what was kept and what has just been answered; keeps what the client does not take.
    fn flush_output(&mut self, shared: &mut Shared) -> io::Result<bool> {
        if self.output.is_empty() {
            let sent = send(&self.stream, &shared.outbox)?;
            self.output
                .extend_from_slice(shared.outbox.get(sent..).unwrap_or_default());
            shared.outbox.clear();
            return Ok(self.output.is_empty());
        }
        self.output.append(&mut shared.outbox);
        let sent = send(&self.stream, &self.output)?;
        self.output.drain(..sent);
        if self.output.is_empty() {
            self.output = Vec::new(); // An idle client owns no buffer.
        }
        Ok(self.output.is_empty())
    }
}

/// Sends as much as is taken; how much that was.
fn send(mut stream: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    let mut sent = 0;
    while let Some(rest) = bytes.get(sent..).filter(|rest| !rest.is_empty()) {
        match stream.write(rest) {
            Ok(count) => sent += count,
            Err(error) if is_transient(&error) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(sent)
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}
