//! The port of metrics and probes of every process but the gateway, whose own server has them too.
//!
//! What it is not: an API. It answers `GET` of four paths: `/metrics`, `/livez`, `/readyz` and `/healthz` (as `/readyz`).
//!
//! Invariant: connections, their heads and their time are bounded, so that a scraper cannot become load.

use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A few scrapers need no more.
const MAX_CONNECTIONS: usize = 128;
/// Bytes of a request's head.
const MAX_HEAD_BYTES: usize = 16 << 10;
const MAX_HEADERS: usize = 64;
/// For a request's head to arrive.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection's whole life; a scraper then dials again.
const CONNECTION_LIFE: Duration = Duration::from_secs(600);

/// What the port tells.
#[derive(Clone)]
pub struct Probes {
    /// The Prometheus page (OpenMetrics text).
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
    /// Whether the process can do its work now, or why not, in a sentence.
    pub readiness: Arc<dyn Fn() -> Result<(), String> + Send + Sync>,
}

impl std::fmt::Debug for Probes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Probes")
    }
}

/// Binds the port; the error names `address`.
///
/// # Errors
/// What the system said, with the address.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, String> {
    TcpListener::bind(address).await.map_err(|error| format!("the port of metrics and probes, {address}: {error}"))
}

/// Answers until `shutdown`.
pub async fn serve(listener: TcpListener, probes: Probes, shutdown: impl Future<Output = ()> + Send) {
    let connections = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let accept = async {
        loop {
            let Ok(permit) = connections.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    tokio::spawn(connection(stream, probes.clone(), permit));
                }
                Err(error) => {
                    // A client that left, or no file descriptors: neither ends the port, the latter needs time.
                    tracing::warn!(%error, "accepting a connection to the probes failed");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    };
    tokio::select! {
        () = accept => {}
        () = shutdown => {}
    }
}

async fn connection(stream: TcpStream, probes: Probes, _permit: OwnedSemaphorePermit) {
    let service = service_fn(move |request: Request<_>| {
        let response = answer(&probes, request.method(), request.uri().path());
        async move { Ok::<_, Infallible>(response) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service);
    if let Ok(Err(error)) = tokio::time::timeout(CONNECTION_LIFE, served).await {
        tracing::debug!(%error, "a connection to the probes ended");
    }
}

fn answer(probes: &Probes, method: &Method, path: &str) -> Response<Full<Bytes>> {
    if method != Method::GET && method != Method::HEAD {
        return text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n".into());
    }
    match path {
        "/metrics" => {
            let mut response = text(StatusCode::OK, (probes.metrics)());
            let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
            response.headers_mut().insert(CONTENT_TYPE, kind);
            response
        }
        "/livez" => text(StatusCode::OK, "ok\n".into()),
        "/readyz" | "/healthz" => match (probes.readiness)() {
            Ok(()) => text(StatusCode::OK, "ok\n".into()),
            Err(reason) => {
                let mut response = text(StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n"));
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("2"));
                response
            }
        },
        _ => text(StatusCode::NOT_FOUND, "there are /metrics, /livez, /readyz and /healthz\n".into()),
    }
}

fn text(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn ask(address: SocketAddr, head: &str) -> String {
        let mut stream = TcpStream::connect(address).await.expect("the port is open");
        stream.write_all(format!("{head}\r\nhost: probes\r\nconnection: close\r\n\r\n").as_bytes()).await.expect("writes");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("reads");
        answer
    }

    #[tokio::test]
    async fn paths_answer_and_shutdown_closes_the_port() {
        let listener = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.expect("a free port");
        let address = listener.local_addr().expect("bound");
        let probes = Probes { metrics: Arc::new(|| "# EOF\n".into()), readiness: Arc::new(|| Err("no leader".into())) };
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let served = tokio::spawn(serve(listener, probes, async {
            stopped.await.expect("told to stop");
        }));
        assert!(ask(address, "GET /livez HTTP/1.1").await.starts_with("HTTP/1.1 200"));
        let unready = ask(address, "GET /readyz HTTP/1.1").await;
        assert!(unready.starts_with("HTTP/1.1 503") && unready.ends_with("no leader\n"), "{unready}");
        assert!(ask(address, "GET /metrics HTTP/1.1").await.ends_with("# EOF\n"));
        assert!(ask(address, "GET /else HTTP/1.1").await.starts_with("HTTP/1.1 404"));
        assert!(ask(address, "POST /livez HTTP/1.1").await.starts_with("HTTP/1.1 405"));
        stop.send(()).expect("it still serves");
        served.await.expect("it ends");
        assert!(TcpStream::connect(address).await.is_err(), "the port is closed");
    }

    #[tokio::test]
    async fn a_port_in_use_is_named() {
        let first = bind(SocketAddr::from(([127, 0, 0, 1], 0))).await.expect("a free port");
        let address = first.local_addr().expect("bound");
        let error = bind(address).await.expect_err("it is taken");
        assert!(error.contains(&address.to_string()), "{error}");
    }
}
