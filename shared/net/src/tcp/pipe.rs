//! One TLS connection as a pipe of frames: written by whoever has a frame, read by one thread.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use forge_shared::ids::{Epoch, NodeId};
use parking_lot::{Condvar, Mutex};

use crate::frame::{FrameWriter, Head, Kind};
use crate::stream::{Failure, Inbox, Wire};
use crate::tls::{PeerVerifier, node_of_chain};

/// Plain bytes that are encrypted at a time.
const PIECE_BYTES: usize = 128 << 10;
/// Longest wait of a reader before it looks whether it is still wanted.
const READ: Duration = Duration::from_secs(1);
/// Longest wait of a writer for room before it looks whether its group was aborted.
const LOOK: Duration = Duration::from_millis(100);
/// Shortest wait: the system takes none for a wait without end.
const SHORTEST: Duration = Duration::from_millis(1);
/// How long a stream that a peer opened waits to be accepted.
const ACCEPTANCE: Duration = Duration::from_secs(120);

pub(crate) struct Pipe {
    socket: TcpStream,
    /// Never held while the socket is waited for, so that neither direction waits for the other.
    tls: Mutex<rustls::Connection>,
    /// Held while a frame is written, so that frames do not mix.
    out: Mutex<FrameWriter>,
    /// Nobody wants what is written any more.
    aborted: AtomicBool,
}

/// A socket until a certain time, however little comes at a time.
struct Until<'a>(&'a TcpStream, Instant);

impl Until<'_> {
    fn left(&self) -> io::Result<Duration> {
        let left = self.1.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left.max(SHORTEST)) }
    }
}

impl Read for Until<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.0.set_read_timeout(Some(self.left()?))?;
        self.0.read(bytes)
    }
}

impl Write for Until<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.set_write_timeout(Some(self.left()?))?;
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Pipe {
    /// Shakes hands, all of it until `until`.
    pub(super) fn new(socket: TcpStream, mut tls: rustls::Connection, until: Instant) -> io::Result<Arc<Self>> {
        socket.set_nodelay(true)?;
        tls.set_buffer_limit(None);
        while tls.is_handshaking() {
            tls.complete_io(&mut Until(&socket, until))?;
        }
        let (tls, out) = (Mutex::new(tls), Mutex::new(FrameWriter::new(Epoch(0))));
        Ok(Arc::new(Pipe { socket, tls, out, aborted: AtomicBool::new(false) }))
    }

    /// Whom the peer's certificate names.
    pub(super) fn peer(&self, verifier: &dyn PeerVerifier) -> Result<NodeId, String> {
        node_of_chain(verifier, self.tls.lock().peer_certificates())
    }

    /// Of all frames that are written from now on, the first of which has number 0.
    pub(super) fn set_epoch(&self, epoch: Epoch) {
        *self.out.lock() = FrameWriter::new(epoch);
    }

    pub(super) fn write(&self, head: Head, body: &[u8], until: Instant) -> Result<(), Failure> {
        let mut out = self.out.lock();
        let head = out.head(head, body.len()).map_err(Failure::Frame)?;
        let mut sealed = Vec::new();
        let mut pieces = body.chunks(PIECE_BYTES);
        // Head and first piece leave together.
        self.seal(&[&head, pieces.next().unwrap_or_default()], &mut sealed)?;
        self.push(&mut sealed, until)?;
        for piece in pieces {
            self.seal(&[piece], &mut sealed)?;
            self.push(&mut sealed, until)?;
        }
        Ok(())
    }

    fn seal(&self, pieces: &[&[u8]], sealed: &mut Vec<u8>) -> Result<(), Failure> {
        let mut tls = self.tls.lock();
        let lost = |error: io::Error| Failure::Lost(error.to_string());
        for piece in pieces {
            tls.writer().write_all(piece).map_err(lost)?;
        }
        while tls.wants_write() {
            tls.write_tls(sealed).map_err(lost)?;
        }
        Ok(())
    }

    fn push(&self, sealed: &mut Vec<u8>, until: Instant) -> Result<(), Failure> {
        let mut rest = sealed.as_slice();
        let mut tried = false;
        while !rest.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            // What there is room for goes out even where nobody waits for it.
            if left.is_zero() && tried {
                return Err(Failure::Timeout);
            }
            if self.aborted.load(Ordering::Acquire) {
                return Err(Failure::Left);
            }
            tried = true;
            let wait = left.clamp(SHORTEST, LOOK);
            let written = self.socket.set_write_timeout(Some(wait)).and_then(|()| (&self.socket).write(rest));
            match written {
                Ok(0) => return Err(Failure::Left),
                Ok(written) => rest = &rest[written..],
                Err(error) if is_timeout(&error) || error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Failure::Lost(error.to_string())),
            }
        }
        sealed.clear();
        Ok(())
    }

    /// Reads once into the inbox; false at the end of the stream, true also where nothing came in time.
    pub(super) fn read_into(&self, inbox: &Inbox, timeout: Duration) -> io::Result<bool> {
        if self.open(inbox)? {
            return Ok(true);
        }
        self.socket.set_read_timeout(Some(timeout.max(SHORTEST)))?;
        let mut bytes = [0; 32 << 10];
        let read = match (&self.socket).read(&mut bytes) {
            Ok(0) => return Ok(false),
            Ok(read) => read,
            Err(error) if is_timeout(&error) || error.kind() == io::ErrorKind::Interrupted => return Ok(true),
            Err(error) => return Err(error),
        };
        let mut rest = &bytes[..read];
        while !rest.is_empty() {
            let mut tls = self.tls.lock();
            tls.read_tls(&mut rest)?;
            let processed = tls.process_new_packets();
            drop(tls);
            self.open(inbox)?;
            processed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
        Ok(true)
    }

    /// Gives the inbox what is decrypted; whether there was any.
    fn open(&self, inbox: &Inbox) -> io::Result<bool> {
        let mut plain = [0; 32 << 10];
        let mut some = false;
        loop {
            let read = self.tls.lock().reader().read(&mut plain);
            match read {
                Ok(0) => return Ok(some),
                Ok(read) => {
                    some = true;
                    inbox.push(&plain[..read]).map_err(io::Error::other)?;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(some),
                Err(error) => return Err(error),
            }
        }
    }

    /// Reads until the stream ends or fails.
    pub(super) fn read_on(&self, inbox: &Inbox) {
        while inbox.wait_for_room() {
            match self.read_into(inbox, READ) {
                Ok(true) => {}
                Ok(false) => inbox.end(),
                Err(error) => inbox.fail(Failure::Lost(error.to_string())),
            }
        }
        self.close();
    }

    /// Says why the peer is not taken, and waits until it has read that: a connection that is closed over bytes that nobody
    /// read may lose it.
    pub(super) fn refuse(&self, reason: &str, until: Instant) {
        let _ = self.write(Head::bytes(Kind::Refuse), reason.as_bytes(), until);
        let _ = self.socket.shutdown(Shutdown::Write);
        let mut bytes = [0; 4 << 10];
        while Until(&self.socket, until).read(&mut bytes).is_ok_and(|read| read > 0) {}
    }

    /// Whether the peer has ended the connection and sent nothing that is still to be read. For a stream that nobody reads.
    fn is_over(&self) -> bool {
        let looked = self.socket.set_read_timeout(Some(SHORTEST)).and_then(|()| self.socket.peek(&mut [0]));
        match looked {
            Ok(read) => read == 0,
            Err(error) => !is_timeout(&error),
        }
    }

    pub(super) fn close(&self) {
        // Fails only for a connection that is closed.
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// The way out of a stream.
pub(super) struct PipeWire {
    pipe: Arc<Pipe>,
    /// Whether a stream that a peer opened is wanted; none while that is open.
    accepted: Mutex<Option<bool>>,
    decided: Condvar,
}

impl PipeWire {
    pub(super) fn new(pipe: Arc<Pipe>, accepted: bool) -> Arc<Self> {
        Arc::new(PipeWire { pipe, accepted: Mutex::new(accepted.then_some(true)), decided: Condvar::new() })
    }

    /// Waits until a group has taken the stream; false if none will.
    pub(super) fn wait_until_accepted(&self) -> bool {
        let mut accepted = self.accepted.lock();
        if accepted.is_none() {
            self.decided.wait_for(&mut accepted, ACCEPTANCE);
        }
        *accepted == Some(true)
    }

    fn decide(&self, accepted: bool) {
        self.accepted.lock().get_or_insert(accepted);
        self.decided.notify_all();
    }
}

impl Wire for PipeWire {
    fn write(&self, head: Head, body: &[u8], until: Instant) -> Result<(), Failure> {
        self.pipe.write(head, body, until)
    }

    fn resume(&self) {
        self.decide(true);
    }

    fn wait(&self, _until: Instant, _ready: &dyn Fn() -> bool, sleep: &dyn Fn()) {
        sleep();
    }

    fn is_over(&self) -> bool {
        self.pipe.is_over()
    }

    /// The connection stays: the notice goes another way and must come before its end.
    fn abort(&self, _reason: &str) {
        self.pipe.aborted.store(true, Ordering::Release);
    }

    fn close(&self) {
        self.decide(false);
        // What was written before, a refusal for example, still arrives.
        let _ = self.pipe.socket.shutdown(Shutdown::Write);
    }
}
