//! Connections that stand: whose certificate is at the other end of each, and the way to cut them.
//!
//! Invariant: a connection whose peer is not believed any more passes no byte after [`Connections::sweep`] has returned,
//! whichever of its ends this process is.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use futures::task::AtomicWaker;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tonic::transport::server::Connected;

use super::clock::CertificateClock;
use super::listener::Seat;
use super::peer::PeerCertificate;

/// Certificates that are remembered of connections that have ended.
const MAX_SEEN: usize = 4_096;

/// What the server's calls learn of a connection.
#[derive(Debug, Clone, Default)]
pub struct Caller {
    /// Of the client; absent where it showed none.
    pub(super) certificate: Option<Arc<PeerCertificate>>,
    /// By which it begins and ends.
    pub(super) clock: CertificateClock,
}

/// All connections of one process.
#[derive(Debug, Default)]
pub(super) struct Connections(Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    next: u64,
    open: HashMap<u64, Open>,
    /// By serial number: most of an operator's connections end before anybody looks.
    seen: HashMap<String, Arc<PeerCertificate>>,
}

#[derive(Debug)]
struct Open {
    peer: Arc<PeerCertificate>,
    cut: Arc<Cut>,
}

#[derive(Debug, Default)]
struct Cut {
    is_cut: AtomicBool,
    reader: AtomicWaker,
}

impl Cut {
    fn now(&self) {
        self.is_cut.store(true, Ordering::Release);
        self.reader.wake();
    }

    fn check(&self) -> io::Result<()> {
        if self.is_cut.load(Ordering::Acquire) {
            return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the other side's certificate is not believed any more"));
        }
        Ok(())
    }
}

impl Connections {
    /// Puts a connection into the table for as long as it stands.
    pub(super) fn guard<S>(self: &Arc<Self>, stream: S, caller: Caller) -> Guarded<S> {
        let cut = Arc::new(Cut::default());
        let place = caller.certificate.clone().map(|peer| {
            let mut table = self.0.lock();
            let number = table.next;
            table.next += 1;
            if table.seen.len() < MAX_SEEN {
                table.seen.insert(peer.serial.clone(), peer.clone());
            }
            table.open.insert(number, Open { peer, cut: cut.clone() });
            Place { number, connections: self.clone() }
        });
        Guarded { stream, caller, cut, place, seat: None }
    }

    /// Cuts those whose peer is not `believed`; whose they were.
    pub(super) fn sweep(&self, believed: impl Fn(&PeerCertificate) -> bool) -> Vec<Arc<PeerCertificate>> {
        let table = self.0.lock();
        let over = table.open.values().filter(|open| !open.cut.is_cut.load(Ordering::Acquire) && !believed(&open.peer));
        over.map(|open| {
            open.cut.now();
            open.peer.clone()
        })
        .collect()
    }

    /// Certificates at the other ends, and those that were there since somebody asked last; each once.
    pub(super) fn peers(&self) -> Vec<Arc<PeerCertificate>> {
        let mut table = self.0.lock();
        let seen = std::mem::take(&mut table.seen);
        let mut peers: Vec<_> = table.open.values().map(|open| open.peer.clone()).chain(seen.into_values()).collect();
        peers.sort_by(|a, b| a.serial.cmp(&b.serial));
        peers.dedup_by(|a, b| a.serial == b.serial);
        peers
    }
}

#[derive(Debug)]
struct Place {
    number: u64,
    connections: Arc<Connections>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.connections.0.lock().open.remove(&self.number);
    }
}

/// A connection that can be cut.
#[derive(Debug)]
pub struct Guarded<S> {
    stream: S,
    caller: Caller,
    cut: Arc<Cut>,
    /// Held for its end.
    #[expect(dead_code, reason = "dropping it takes the connection out of the table")]
    place: Option<Place>,
    /// Likewise, of one without a certificate.
    seat: Option<Seat>,
}

impl<S> Guarded<S> {
    /// Cuts this one when `over` ends; `seat` is held as long as it stands.
    pub(super) fn cut_after(&mut self, over: impl Future<Output = ()> + Send + 'static, seat: Seat) {
        self.seat = Some(seat);
        let cut = self.cut.clone();
        tokio::spawn(async move {
            over.await;
            cut.now();
        });
    }

    /// Cuts this one if its peer is not `believed`.
    pub(super) fn check(&self, believed: impl Fn(&PeerCertificate) -> bool) {
        if self.caller.certificate.as_ref().is_some_and(|peer| !believed(peer)) {
            self.cut.now();
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Guarded<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        // Registered before it is looked at: a cut in between wakes.
        self.cut.reader.register(context.waker());
        self.cut.check()?;
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Guarded<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.cut.check()?;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[io::IoSlice<'_>]) -> Poll<io::Result<usize>> {
        self.cut.check()?;
        Pin::new(&mut self.stream).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.cut.check()?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl<S> Connected for Guarded<S> {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}
