//! The server's end: a stream of TLS connections for `tonic`'s `serve_with_incoming`.
//!
//! Invariant: a client that is slow or breaks off during its handshake holds up nobody, and at most
//! [`MAX_HANDSHAKES`] of them take memory at once.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures::Stream;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use super::credentials::SharedCredentials;
use super::error::{TlsError, diagnose};
use super::rustls_config::server_config;

/// A connection after its handshake.
pub type TlsStream = tokio_rustls::server::TlsStream<TcpStream>;

/// Handshakes at once; more wait in the kernel's queue.
const MAX_HANDSHAKES: usize = 128;
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
        Ok(TlsIncoming { ready, accepting: tokio::spawn(accept(listener, acceptor, connections)) })
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

async fn accept(listener: TcpListener, acceptor: TlsAcceptor, connections: mpsc::Sender<TlsStream>) {
    let slots = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    loop {
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (acceptor, connections) = (acceptor.clone(), connections.clone());
        tokio::spawn(async move {
            let _ = stream.set_nodelay(true);
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                Ok(Ok(stream)) => {
                    drop(slot);
                    let _ = connections.send(stream).await;
                }
                Ok(Err(error)) => match refused(&error) {
                    Some(reason) => tracing::warn!(%from, %reason, "refused a connection"),
                    None => tracing::debug!(%from, %error, "a connection ended in its handshake"),
                },
                Err(_) => tracing::debug!(%from, "a connection did not finish its handshake in time"),
            }
        });
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
