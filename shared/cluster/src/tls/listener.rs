//! The server's end: a stream of TLS connections for `tonic`'s `serve_with_incoming`.
//!
//! Invariant: a client that is slow, silent or breaks off during its handshake holds up nobody, and at most
//! [`MAX_HANDSHAKES`] of them take memory at once: where one more comes, the oldest ends of the address that has the most.
//! So do connections that show no certificate, of which there are at most [`MAX_ANONYMOUS`].

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use super::connections::Guarded;
use super::error::{TlsError, diagnose};
use super::peer::PeerCertificate;
use super::rustls_config::server_config;
use super::shared::SharedCredentials;

/// A connection after its handshake.
pub type TlsStream = Guarded<tokio_rustls::server::TlsStream<TcpStream>>;

/// Handshakes at once.
const MAX_HANDSHAKES: usize = 128;
/// Connections without a certificate: of those who have a join token, and of anybody.
const MAX_ANONYMOUS: usize = 256;
/// Longest handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after a failed accept: out of file descriptors, which others must give back first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Connections of one port. Dropping it closes the port.
pub struct TlsIncoming {
    ready: mpsc::Receiver<TlsStream>,
    accepting: JoinHandle<()>,
}

impl TlsIncoming {
    /// Begins to accept.
    ///
    /// # Errors
    /// [`TlsError::Handshake`] if the credentials cannot be used.
    pub fn new(listener: TcpListener, credentials: &SharedCredentials) -> Result<Self, TlsError> {
        let acceptor = TlsAcceptor::from(Arc::new(server_config(credentials)?));
        let (connections, ready) = mpsc::channel(16);
        Ok(TlsIncoming { ready, accepting: tokio::spawn(accept(listener, acceptor, credentials.clone(), connections)) })
    }
}

impl Drop for TlsIncoming {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Stream for TlsIncoming {
    type Item = std::io::Result<TlsStream>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.ready.poll_recv(context).map(|stream| stream.map(Ok))
    }
}

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, credentials: SharedCredentials, connections: mpsc::Sender<TlsStream>) {
    let handshakes = Crowd::of(MAX_HANDSHAKES);
    let anonymous = Crowd::of(MAX_ANONYMOUS);
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (acceptor, credentials, connections) = (acceptor.clone(), credentials.clone(), connections.clone());
        let (seat, pushed_out) = Crowd::seat(&handshakes, from.ip());
        let anonymous = anonymous.clone();
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            let handshake = tokio::select! {
                handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)) => handshake,
                _ = pushed_out => return tracing::debug!(%from, "a handshake made room for others"),
            };
            drop(seat);
            match handshake {
                Ok(Ok(stream)) => match client_of(&stream) {
                    Ok(peer) => {
                        let is_anonymous = peer.is_none();
                        let mut guarded = credentials.guard(stream, peer);
                        if is_anonymous {
                            let (seat, pushed_out) = Crowd::seat(&anonymous, from.ip());
                            guarded.cut_after(async move { drop(pushed_out.await) }, seat);
                        }
                        let _ = connections.send(guarded).await;
                    }
                    Err(reason) => tracing::warn!(%from, %reason, "refused a connection"),
                },
                Ok(Err(error)) => match refused(&error) {
                    Some(reason) => tracing::warn!(%from, %reason, "refused a connection"),
                    None => tracing::debug!(%from, %error, "a connection ended in its handshake"),
                },
                Err(_) => tracing::debug!(%from, "a connection did not finish its handshake in time"),
            }
        });
    }
}

/// The certificate that the client showed, if it did.
fn client_of(stream: &tokio_rustls::server::TlsStream<TcpStream>) -> Result<Option<PeerCertificate>, TlsError> {
    let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    shown.map(PeerCertificate::read).transpose()
}

/// Strangers who are let wait, so many at once, oldest first.
#[derive(Debug)]
struct Crowd {
    most: usize,
    next: u64,
    /// Of whom, and what ends it when dropped.
    open: BTreeMap<u64, (IpAddr, oneshot::Sender<()>)>,
}

impl Crowd {
    fn of(most: usize) -> Arc<Mutex<Crowd>> {
        Arc::new(Mutex::new(Crowd { most, next: 0, open: BTreeMap::new() }))
    }

    /// Takes one in; another makes room where there is none. The receiver ends when this one has to.
    fn seat(crowd: &Arc<Mutex<Crowd>>, from: IpAddr) -> (Seat, oneshot::Receiver<()>) {
        let (number, pushed_out) = crowd.lock().begin(from);
        (Seat { number, crowd: crowd.clone() }, pushed_out)
    }

    fn begin(&mut self, from: IpAddr) -> (u64, oneshot::Receiver<()>) {
        if self.open.len() >= self.most {
            let mut counts: HashMap<IpAddr, usize> = HashMap::new();
            self.open.values().for_each(|(from, _)| *counts.entry(*from).or_default() += 1);
            let most = counts.values().copied().max().unwrap_or_default();
            let oldest = self.open.iter().find(|(_, (from, _))| counts.get(from) == Some(&most)).map(|(number, _)| *number);
            oldest.map(|number| self.open.remove(&number));
        }
        let (keep, pushed_out) = oneshot::channel();
        let number = self.next;
        self.next += 1;
        self.open.insert(number, (from, keep));
        (number, pushed_out)
    }
}

/// A place among them, until it is dropped.
#[derive(Debug)]
pub(super) struct Seat {
    number: u64,
    crowd: Arc<Mutex<Crowd>>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.crowd.lock().open.remove(&self.number);
    }
}

/// What was wrong with the client's certificate, or what the client said of ours.
fn refused(error: &std::io::Error) -> Option<String> {
    let inner = error.get_ref()?;
    if let Some(rustls::Error::InvalidCertificate(_)) = inner.downcast_ref::<rustls::Error>() {
        let found = inner.downcast_ref::<rustls::Error>()?;
        return Some(TlsError::from_rustls(found, "the client", "a process of this cluster").to_string());
    }
    diagnose(inner, "a process of this cluster").map(|found| found.to_string())
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    fn ip(last: u8) -> IpAddr {
        Ipv4Addr::new(10, 0, 0, last).into()
    }

    #[test]
    fn whoever_has_the_most_handshakes_makes_room() {
        let crowd = Crowd::of(MAX_HANDSHAKES);
        let (_first, mut first) = Crowd::seat(&crowd, ip(1));
        let mut many: Vec<_> = (0..MAX_HANDSHAKES).map(|_| Crowd::seat(&crowd, ip(2))).collect();
        let mut is_over = |index: usize| many[index].1.try_recv() == Err(oneshot::error::TryRecvError::Closed);
        assert!(is_over(0) && !is_over(1), "the oldest of the one that has the most");
        assert_eq!(first.try_recv(), Err(oneshot::error::TryRecvError::Empty), "older, and alone");
        let (late, mut pushed_out) = Crowd::seat(&crowd, ip(3));
        assert!(is_over(1) && !is_over(2) && crowd.lock().open.len() == MAX_HANDSHAKES);
        assert_eq!(pushed_out.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        drop(late);
        assert_eq!(crowd.lock().open.len(), MAX_HANDSHAKES - 1);
    }
}
