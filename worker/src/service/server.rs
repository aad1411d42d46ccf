//! The gRPC side of the engine service.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use forge_cluster::engine::request::{from_wire, replica_from_wire};
use forge_cluster::tls::{Peer, SharedCredentials, TlsIncoming};
use forge_cluster::tracing::{set_attribute, set_error};
use forge_proto::engine as wire;
use forge_proto::engine::engine_server::{Engine, EngineServer};
use forge_shared::cluster::node::Role;
use forge_shared::generate::AdmitError;
use forge_shared::link::EngineLink;
use futures::{Stream, StreamExt};
use tokio::net::TcpListener;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};
use tracing::Instrument;

use super::replies::Replies;
use super::{find, watch};
use crate::WorkerError;
use crate::agent::RunId;
use crate::link::ReplicaBoard;
use crate::logs::{LogLine, LogRing};

/// Who may call.
const CALLERS: [Role; 2] = [Role::Gateway, Role::Coordinator];
/// Largest message that is read: a prompt of a million tokens with its answers so far.
const MAX_MESSAGE_BYTES: usize = 64 << 20;
/// Pieces in which a tokenizer goes.
const TEXT_CHUNK_BYTES: usize = 1 << 20;
/// Requests of one connection at once.
const MAX_STREAMS: u32 = 16_384;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// See the module documentation.
#[derive(Clone)]
pub struct EngineService {
    board: Arc<ReplicaBoard>,
    logs: Arc<LogRing>,
}

impl EngineService {
    /// Over a node's runs and its log.
    pub fn new(board: Arc<ReplicaBoard>, logs: Arc<LogRing>) -> Self {
        EngineService { board, logs }
    }
}

/// Serves on a port until `shutdown`, then ends what is left after the connections' own streams have ended.
///
/// # Errors
/// Credentials that cannot be used, or a listener that fails.
pub async fn serve(
    listener: TcpListener,
    credentials: &SharedCredentials,
    service: EngineService,
    shutdown: impl Future<Output = ()>,
) -> Result<(), WorkerError> {
    let failed = |reason: String| WorkerError::Service { reason };
    let incoming = TlsIncoming::new(listener, credentials).map_err(|error| failed(error.to_string()))?;
    let server = EngineServer::new(service).max_decoding_message_size(MAX_MESSAGE_BYTES);
    tonic::transport::Server::builder()
        .max_concurrent_streams(MAX_STREAMS)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .add_service(server)
        .serve_with_incoming_shutdown(incoming, shutdown)
        .await
        .map_err(|error| failed(error.to_string()))
}

type Messages<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Engine for EngineService {
    type SubmitStream = Messages<wire::EngineReply>;
    type WatchReplicaStream = ReceiverStream<Result<wire::ReplicaUpdate, Status>>;
    type ModelTextStream = Messages<wire::TextChunk>;
    type LogsStream = Messages<wire::EngineLogLine>;

    async fn submit(&self, request: Request<wire::SubmitRequest>) -> Result<Response<Self::SubmitStream>, Status> {
        Peer::require(&request, &CALLERS)?;
        let traceparent = forge_cluster::tracing::from_metadata(request.metadata());
        let submission = from_wire(request.into_inner())?;
        let span = tracing::info_span!("answer", request = %submission.request.id, replica = %submission.replica, otel.kind = "server");
        forge_cluster::tracing::set_parent(&span, &traceparent);
        set_attribute(&span, "gen_ai.provider.name", "forge");
        set_attribute(&span, "gen_ai.response.id", submission.request.id.0.clone());
        let begin = tokio::time::Instant::now();
        let link = match find(&self.board, &submission.replica, submission.epoch) {
            Ok(link) => link,
            Err(reason) => return Ok(Response::new(Replies::refused(AdmitError::Unavailable { reason }).boxed())),
        };
        let admitted = tokio::time::timeout(submission.timeout, link.submit(submission.request).instrument(span.clone())).await;
        let replies = match admitted {
            Ok(Ok(events)) => {
                let left = submission.timeout.saturating_sub(begin.elapsed());
                let card = link.card();
                set_attribute(&span, "gen_ai.response.model", card.name.clone());
                Replies::admitted(card.numerics_id.clone(), events, left, span)
            }
            Ok(Err(error)) => {
                set_error(&span, &error.to_string());
                Replies::refused(error)
            }
            Err(_) => Replies::refused(AdmitError::Unavailable { reason: "the request's time is over".into() }),
        };
        Ok(Response::new(replies.boxed()))
    }

    async fn watch_replica(&self, request: Request<wire::WatchReplicaRequest>) -> Result<Response<Self::WatchReplicaStream>, Status> {
        Peer::require(&request, &CALLERS)?;
        let (replica, epoch) = replica_from_wire(request.get_ref().replica.as_ref())?;
        let link = find(&self.board, &replica, epoch).map_err(Status::not_found)?;
        let run = RunId { replica: replica.to_string(), epoch };
        Ok(Response::new(ReceiverStream::new(watch::watch(self.board.clone(), run, link))))
    }

    async fn model_text(&self, request: Request<wire::ModelTextRequest>) -> Result<Response<Self::ModelTextStream>, Status> {
        Peer::require(&request, &CALLERS)?;
        let (replica, epoch) = replica_from_wire(request.get_ref().replica.as_ref())?;
        let link = find(&self.board, &replica, epoch).map_err(Status::not_found)?;
        let text = watch::portable(&link).await.map_err(Status::unavailable)?;
        let total_bytes = text.bytes.len() as u64;
        let chunk = move |start: usize| {
            let end = (start + TEXT_CHUNK_BYTES).min(text.bytes.len());
            Ok(wire::TextChunk { total_bytes, data: text.bytes.slice(start..end) })
        };
        let starts = (0..usize::try_from(total_bytes).unwrap_or(0)).step_by(TEXT_CHUNK_BYTES);
        Ok(Response::new(futures::stream::iter(starts.map(chunk)).boxed()))
    }

    async fn logs(&self, request: Request<wire::EngineLogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        Peer::require(&request, &CALLERS)?;
        let wire::EngineLogsRequest { replica, follow, tail } = request.into_inner();
        let line = |line: LogLine| {
            let LogLine { at_ms, level, replica, text } = line;
            Ok(wire::EngineLogLine { at_ms, level: level.to_owned(), replica, text })
        };
        let tail = usize::try_from(tail).unwrap_or(usize::MAX);
        if !follow {
            return Ok(Response::new(futures::stream::iter(self.logs.tail(&replica, tail)).map(line).boxed()));
        }
        Ok(Response::new(ReceiverStream::new(self.logs.follow(replica, tail)).map(line).boxed()))
    }
}
