//! A replica behind a wire: [`ReplicaClient`] over gRPC.
//!
//! Invariants: an admitted request's stream ends with `Done` or `Failed`, or without either, if the engine died in a worker
//! that lives or broke the protocol; where the way to the worker broke (it died, froze for 2 s, was cut off) the last is a
//! `Failed` that may be tried again; dropping the stream cancels the request at the worker; every wait is bounded.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forge_proto::engine as wire;
use forge_proto::engine::engine_client::EngineClient;
use forge_shared::generate::{AdmitError, EngineEvent, GenerateRequest, InvalidParam};
use forge_shared::link::{EngineLink, EngineStatus, EventStream, ModelCard};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use parking_lot::{Mutex, RwLock};
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

use super::prefixes::PrefixBoard;
use super::reply::{EngineReply, MAX_EVENTS, MAX_REPLY_BYTES, ReplicaCard, card_from_wire, reply_from_wire, status_from_wire};
use super::request::{Submission, replica_to_wire, to_wire};
use super::{EngineTarget, PrefixUpdate, ReplicaClient, WireError};
use crate::api::ClusterError;
use crate::status::{from_status, why_broken};
use crate::tls::{RenewedChannel, TlsError};
use crate::tracing::inject;

/// Longest wait for `admitted` or `refused`.
const ADMIT_TIMEOUT: Duration = Duration::from_secs(5);
/// Events that may lie unread before the worker is made to wait.
const EVENT_DEPTH: usize = 256;
/// Largest model text that is taken: tokenizers have tens of MiB.
const MAX_TEXT_BYTES: u64 = 512 << 20;
/// Longest words of a worker that are repeated.
const MAX_REASON_CHARS: usize = 500;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// One epoch of one replica.
#[derive(Debug)]
pub(super) struct RemoteReplica {
    shared: Arc<Shared>,
    watching: JoinHandle<()>,
}

#[derive(Debug)]
struct Shared {
    target: EngineTarget,
    /// The connection to its worker, shared by that one's replicas.
    worker: Arc<RenewedChannel>,
    request_timeout: Duration,
    card: RwLock<ReplicaCard>,
    status: RwLock<EngineStatus>,
    prefixes: Mutex<PrefixBoard>,
}

impl RemoteReplica {
    pub(super) fn new(target: EngineTarget, worker: Arc<RenewedChannel>, request_timeout: Duration) -> Self {
        let card = ModelCard {
            name: target.replica.service.0.clone(),
            names: vec![target.replica.service.0.clone()],
            unlisted_names: Vec::new(),
            max_model_len: 0,
            vocab_size: 0,
            numerics_id: String::new(),
            created_s: 0,
            default_sampling: Default::default(),
        };
        let shared = Arc::new(Shared {
            card: RwLock::new(ReplicaCard { card: Arc::new(card), text_digest: String::new(), block_size: 0 }),
            status: RwLock::new(EngineStatus { reason: "connecting".into(), ..EngineStatus::default() }),
            prefixes: Mutex::default(),
            target,
            worker,
            request_timeout,
        });
        RemoteReplica { watching: tokio::spawn(watch(shared.clone())), shared }
    }
}

impl Drop for RemoteReplica {
    fn drop(&mut self) {
        self.watching.abort();
    }
}

impl EngineLink for RemoteReplica {
    fn submit(&self, request: GenerateRequest) -> BoxFuture<'_, Result<EventStream, AdmitError>> {
        let shared = self.shared.clone();
        async move {
            let choices = request.choices.iter().map(|choice| choice.index).collect();
            let submission =
                Submission { replica: shared.target.replica.clone(), epoch: shared.target.epoch, request, timeout: shared.request_timeout };
            let mut call = Request::new(to_wire(&submission));
            inject(call.metadata_mut());
            let mut client = shared.client().map_err(|error| unavailable(error.to_string()))?;
            let admission = async {
                let mut replies = client.submit(call).await.map_err(|status| shared.lost(&status))?.into_inner();
                let first = replies.next().await.unwrap_or_else(|| Err(Status::unavailable("it ended before it was admitted")));
                Ok::<_, AdmitError>((first.map_err(|status| shared.lost(&status))?, replies))
            };
            let late = |_| shared.lost(&Status::unavailable(format!("nothing within {} ms", ADMIT_TIMEOUT.as_millis())));
            let (first, replies) = tokio::time::timeout(ADMIT_TIMEOUT, admission).await.map_err(late)??;
            let mut first = read_all(first).map_err(|error| unavailable(error.to_string()))?.into_iter();
            match first.next() {
                Some(EngineReply::Admitted { .. }) => {}
                Some(EngineReply::Refused(error)) => return Err(error),
                Some(EngineReply::Event(_)) | None => {
                    return Err(unavailable(format!("{} broke the protocol: events before admission", shared.target.node)));
                }
            }
            let (events, received) = mpsc::channel(EVENT_DEPTH);
            tokio::spawn(relay(Answer { choices, events, node: shared.target.node.0.clone() }, first.collect(), replies));
            Ok(received)
        }
        .boxed()
    }

    fn card(&self) -> Arc<ModelCard> {
        self.shared.card.read().card.clone()
    }

    fn status(&self) -> EngineStatus {
        self.shared.status.read().clone()
    }
}

impl ReplicaClient for RemoteReplica {
    fn model_text(&self, timeout: Duration) -> BoxFuture<'_, Result<Bytes, ClusterError>> {
        async move {
            let late =
                |_| ClusterError::Unavailable { waited_ms: timeout.as_millis() as u64, reason: "the model's text did not come".into() };
            tokio::time::timeout(timeout, self.shared.fetch_text()).await.map_err(late)?
        }
        .boxed()
    }

    fn prefixes(&self) -> mpsc::Receiver<PrefixUpdate> {
        self.shared.prefixes.lock().subscribe()
    }

    fn block_size(&self) -> usize {
        self.shared.card.read().block_size
    }
}

impl Shared {
    fn client(&self) -> Result<EngineClient<Channel>, TlsError> {
        Ok(EngineClient::new(self.worker.get()?).max_decoding_message_size(MAX_REPLY_BYTES))
    }

    /// A request that was not admitted, or whose admission is not known; either way nothing was sent to the client yet.
    /// What the worker cannot read says nothing of the worker: it would refuse the same again, and others too.
    fn lost(&self, status: &Status) -> AdmitError {
        if matches!(status.code(), Code::InvalidArgument | Code::OutOfRange) {
            let actual: String = status.message().chars().take(MAX_REASON_CHARS).collect();
            return AdmitError::Invalid(InvalidParam { field: "request", expected: "one that a worker can take".into(), actual });
        }
        unavailable(format!("{}; send the request again", self.unreached(status)))
    }

    /// What became of a call to the worker, for whoever reads why a replica does not answer. A call to a worker is no command,
    /// and no coordinator was asked.
    fn unreached(&self, status: &Status) -> String {
        let node = &self.target.node;
        match from_status(status, &self.worker.peer().dns_name()).error {
            error @ (ClusterError::Unavailable { .. } | ClusterError::Unknown { .. }) => {
                format!("worker {node} does not answer ({}): it is stopped, overloaded or cut off", why_broken(&error))
            }
            other => format!("worker {node}: {other}"),
        }
    }

    async fn fetch_text(&self) -> Result<Bytes, ClusterError> {
        let fault = |status: Status| from_status(&status, &self.worker.peer().dns_name()).error;
        let protocol = |reason: String| ClusterError::Protocol { reason };
        let replica = Some(replica_to_wire(&self.target.replica, self.target.epoch));
        let mut client = self.client().map_err(|error| ClusterError::Forbidden { reason: error.to_string() })?;
        let mut chunks = client.model_text(wire::ModelTextRequest { replica }).await.map_err(fault)?.into_inner();
        let mut text = Vec::new();
        let mut total = None;
        while let Some(chunk) = chunks.next().await {
            let chunk = chunk.map_err(fault)?;
            let total = *total.get_or_insert(chunk.total_bytes);
            if total > MAX_TEXT_BYTES || (text.len() + chunk.data.len()) as u64 > total {
                return Err(protocol(format!("a model text of {total} bytes that is larger; at most {MAX_TEXT_BYTES}")));
            }
            text.extend_from_slice(&chunk.data);
        }
        if total != Some(text.len() as u64) {
            return Err(ClusterError::Unavailable { waited_ms: 0, reason: "the model's text broke off".into() });
        }
        let expected = self.card.read().text_digest.clone();
        let found = hex::encode(Sha256::digest(&text));
        if !expected.is_empty() && found != expected {
            return Err(protocol(format!("the model's text has digest {found}, its card says {expected}")));
        }
        Ok(text.into())
    }

    fn not_ready(&self, reason: String) {
        let mut status = self.status.write();
        status.ready = false;
        status.reason = reason;
    }

    fn take(&self, update: wire::ReplicaUpdate) -> Result<(), WireError> {
        if let Some(card) = update.card {
            *self.card.write() = card_from_wire(card)?;
        }
        if let Some(status) = update.status {
            *self.status.write() = status_from_wire(status)?;
        }
        let mut prefixes = self.prefixes.lock();
        prefixes.catch_up();
        if update.blocks_reset || !update.blocks_stored.is_empty() || !update.blocks_removed.is_empty() {
            let update = PrefixUpdate { reset: update.blocks_reset, stored: update.blocks_stored, removed: update.blocks_removed };
            prefixes.apply(update)?;
        }
        Ok(())
    }
}

/// Keeps status, card and prefixes, over lost connections, for as long as the client lives.
async fn watch(shared: Arc<Shared>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let (got_any, reason) = watch_once(&shared).await;
        shared.not_ready(reason);
        // What the worker has cached is not known until it says so again.
        let _ = shared.prefixes.lock().apply(PrefixUpdate { reset: true, ..PrefixUpdate::default() });
        if got_any {
            pause = FIRST_PAUSE;
        }
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..=1.0))).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

async fn watch_once(shared: &Shared) -> (bool, String) {
    let mut client = match shared.client() {
        Ok(client) => client,
        Err(error) => return (false, error.to_string()),
    };
    let replica = Some(replica_to_wire(&shared.target.replica, shared.target.epoch));
    let opening = tokio::time::timeout(ADMIT_TIMEOUT, client.watch_replica(wire::WatchReplicaRequest { replica }));
    let mut updates = match opening.await {
        Ok(Ok(updates)) => updates.into_inner(),
        Ok(Err(status)) => return (false, shared.unreached(&status)),
        Err(_) => return (false, format!("worker {} does not answer", shared.target.node)),
    };
    let mut got_any = false;
    loop {
        match updates.next().await {
            Some(Ok(update)) => {
                if let Err(error) = shared.take(update) {
                    ::tracing::warn!(node = %shared.target.node, %error, "a worker broke the protocol");
                    return (false, error.to_string());
                }
                got_any = true;
            }
            Some(Err(status)) => return (got_any, shared.unreached(&status)),
            None => return (got_any, format!("worker {} ended the connection", shared.target.node)),
        }
    }
}

/// One admitted request.
struct Answer {
    choices: Vec<u32>,
    events: mpsc::Sender<EngineEvent>,
    node: String,
}

/// Gives events on. Returning drops both ends: the reader sees the end of its stream, the worker a cancelled call.
async fn relay(answer: Answer, first: Vec<EngineReply>, mut replies: Streaming<wire::EngineReply>) {
    let mut next = Ok(first);
    loop {
        let events = match next {
            Ok(events) => events,
            Err(error) => return ::tracing::warn!(node = answer.node, %error, "a worker broke the protocol; the request counts as lost"),
        };
        for event in events {
            let event = match answer.check(event) {
                Ok(event) => event,
                Err(error) => {
                    return ::tracing::warn!(node = answer.node, %error, "a worker broke the protocol; the request counts as lost");
                }
            };
            let is_last = matches!(event, EngineEvent::Done(_) | EngineEvent::Failed { .. });
            if answer.events.send(event).await.is_err() || is_last {
                return;
            }
        }
        let message = tokio::select! {
            message = replies.next() => message,
            () = answer.events.closed() => return,
        };
        next = match message {
            Some(Ok(message)) => read_all(message),
            Some(Err(status)) => {
                ::tracing::debug!(node = answer.node, %status, "a request's stream broke off");
                // A status with a source was made here, of what became of the connection; one without came from the worker.
                if std::error::Error::source(&status).is_none() {
                    return;
                }
                let failed = EngineEvent::Failed { reason: format!("the connection to {} broke", answer.node), retryable: true };
                // A reader that is gone needs no reason.
                let _ = answer.events.send(failed).await;
                return;
            }
            None => return ::tracing::debug!(node = answer.node, "a request's stream ended early"),
        };
    }
}

impl Answer {
    fn check(&self, reply: EngineReply) -> Result<EngineEvent, WireError> {
        let choice = match &reply {
            EngineReply::Event(EngineEvent::Token(token)) => Some(token.choice),
            EngineReply::Event(EngineEvent::Finished { choice, .. }) => Some(*choice),
            _ => None,
        };
        if let Some(choice) = choice.filter(|choice| !self.choices.contains(choice)) {
            return Err(WireError::Value { field: "choice", reason: format!("{choice} was not asked for") });
        }
        match reply {
            EngineReply::Event(event) => Ok(event),
            EngineReply::Admitted { .. } | EngineReply::Refused(_) => {
                Err(WireError::Value { field: "event", reason: "admission comes once and first".into() })
            }
        }
    }
}

fn read_all(message: wire::EngineReply) -> Result<Vec<EngineReply>, WireError> {
    super::request::at_most("events", message.events.len(), MAX_EVENTS)?;
    message.events.into_iter().map(reply_from_wire).collect()
}

fn unavailable(reason: String) -> AdmitError {
    AdmitError::Unavailable { reason }
}
