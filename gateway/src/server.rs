//! Sockets: binding with errors that help, accepting within bounds, draining.

use std::future::Future;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::config::GatewayConfig;
use crate::error::GatewayError;
use crate::gateway::GatewayState;
use crate::routes;
use crate::write_stall::WriteStall;

/// Connections to the port of metrics and probes; a few scrapers need no more.
const PROBE_CONNECTIONS: usize = 128;
/// How long connections have at the end to send what is in their buffers.
const CLOSE_WITHIN: Duration = Duration::from_secs(2);
/// Headers of a request; hyper refuses more with 431.
const MAX_HEADERS: usize = 100;
/// Bytes of a request's head; hyper refuses more with 431.
const MAX_HEAD_BYTES: usize = 64 << 10;

/// The two ports, bound.
#[derive(Debug)]
pub struct Listeners {
    api: (TcpListener, SocketAddr),
    metrics: (TcpListener, SocketAddr),
}

impl Listeners {
    /// Binds both ports.
    ///
    /// # Errors
    /// [`GatewayError::PortInUse`] or [`GatewayError::Bind`], naming the flag that chooses another port.
    pub async fn bind(config: &GatewayConfig) -> Result<Listeners, GatewayError> {
        let api = bind(SocketAddr::new(config.host, config.port), "--port").await?;
        let metrics = bind(SocketAddr::new(config.metrics_host, config.metrics_port), "--metrics-port").await?;
        Ok(Listeners { api, metrics })
    }

    /// Where the API listens; the port is the one the system chose if 0 was asked for.
    pub fn api(&self) -> SocketAddr {
        self.api.1
    }

    /// Where metrics and probes listen.
    pub fn metrics(&self) -> SocketAddr {
        self.metrics.1
    }
}

async fn bind(address: SocketAddr, flag: &'static str) -> Result<(TcpListener, SocketAddr), GatewayError> {
    let failed = |source: std::io::Error| match source.kind() {
        ErrorKind::AddrInUse => GatewayError::PortInUse { address, flag },
        _ => GatewayError::Bind { address, flag, source },
    };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    Ok((listener, bound))
}

/// Serves both ports until `shutdown`, then drains; or until [`crate::Gateway::drain`] ended it.
pub(crate) async fn serve(
    state: Arc<GatewayState>,
    listeners: Listeners,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), GatewayError> {
    let port = |listener, router, connections| Port {
        listener,
        router,
        connections: Arc::new(Semaphore::new(connections)),
        state: state.clone(),
        tasks: TaskTracker::new(),
        abort: CancellationToken::new(),
    };
    let api = port(listeners.api.0, routes::api(state.clone()), state.config.limits.connections.min(Semaphore::MAX_PERMITS));
    let probes = port(listeners.metrics.0, routes::probes(state.clone()), PROBE_CONNECTIONS);
    let stopped = async {
        tokio::select! {
            () = shutdown => {
                state.lifecycle.drain(state.config.timeouts.drain()).await;
                state.lifecycle.end();
            }
            () = state.lifecycle.ended().cancelled() => {}
        }
    };
    tokio::join!(api.run(), probes.run(), stopped);
    Ok(())
}

/// A listener and its connections.
struct Port {
    listener: TcpListener,
    router: Router,
    connections: Arc<Semaphore>,
    state: Arc<GatewayState>,
    tasks: TaskTracker,
    abort: CancellationToken,
}

impl Port {
    /// Accepts until serving ends, then lets connections send what they have, within a bound.
    async fn run(self) {
        let ended = self.state.lifecycle.ended().clone();
        loop {
            tokio::select! {
                () = ended.cancelled() => break,
                accepted = self.accept() => {
                    let Some((stream, permit)) = accepted else { continue };
                    self.tasks.spawn(connection(self.state.clone(), self.router.clone(), stream, permit, self.abort.clone()));
                }
            }
        }
        drop(self.listener);
        self.tasks.close();
        if tokio::time::timeout(CLOSE_WITHIN, self.tasks.wait()).await.is_err() {
            self.abort.cancel();
            self.tasks.wait().await;
        }
    }

    /// The next connection, once there is room for one; `None` after an error that passes.
    async fn accept(&self) -> Option<(TcpStream, OwnedSemaphorePermit)> {
        let permit = self.connections.clone().acquire_owned().await.ok()?;
        match self.listener.accept().await {
            Ok((stream, _)) => Some((stream, permit)),
            Err(error) => {
                // A client that left, or no file descriptors: neither ends the server, the latter needs time.
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(Duration::from_millis(50)).await;
                None
            }
        }
    }
}

async fn connection(state: Arc<GatewayState>, router: Router, stream: TcpStream, _permit: OwnedSemaphorePermit, abort: CancellationToken) {
    // Tokens are small and must not wait for each other.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY not set");
    }
    let timeouts = &state.config.timeouts;
    let stream = WriteStall::new(stream, Duration::from_secs(timeouts.write_stall_s));
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_secs(timeouts.head_s))
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::pin!(served);
    let ended = state.lifecycle.ended();
    let result = tokio::select! {
        result = served.as_mut() => result,
        () = ended.cancelled() => {
            served.as_mut().graceful_shutdown();
            tokio::select! {
                result = served.as_mut() => result,
                () = abort.cancelled() => return,
            }
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "connection ended");
    }
}
