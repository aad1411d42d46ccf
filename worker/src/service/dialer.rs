//! `LocalDialer`: replicas of a node in this process, the same to a gateway as those behind a wire.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forge_cluster::api::ClusterError;
use forge_cluster::engine::{EngineDialer, EngineTarget, ReplicaClient, STATUS_POLL};
use forge_shared::generate::{AdmitError, GenerateRequest};
use forge_shared::link::{EngineLink, EngineStatus, EventStream, ModelCard, PrefixUpdate};
use forge_text::ModelText;
use futures::future::BoxFuture;
use tokio::sync::mpsc;

use super::{feed, find, watch};
use crate::link::{ReplicaBoard, ReplicaLink};

/// See the module documentation.
#[derive(Clone)]
pub struct LocalDialer {
    board: Arc<ReplicaBoard>,
}

impl LocalDialer {
    /// Over a node's runs.
    pub fn new(board: Arc<ReplicaBoard>) -> Self {
        LocalDialer { board }
    }

    /// Text parts of a replica that runs here, as they were built for it.
    pub fn text(&self, target: &EngineTarget) -> Option<ModelText> {
        Some(find(&self.board, &target.replica, target.epoch).ok()?.text()?.text.clone())
    }
}

impl EngineDialer for LocalDialer {
    fn dial(&self, target: EngineTarget) -> Arc<dyn ReplicaClient> {
        Arc::new(LocalReplica { board: self.board.clone(), target })
    }
}

struct LocalReplica {
    board: Arc<ReplicaBoard>,
    target: EngineTarget,
}

impl LocalReplica {
    fn link(&self) -> Result<Arc<ReplicaLink>, String> {
        find(&self.board, &self.target.replica, self.target.epoch)
    }
}

impl EngineLink for LocalReplica {
    fn submit(&self, request: GenerateRequest) -> BoxFuture<'_, Result<EventStream, AdmitError>> {
        let link = self.link();
        Box::pin(async move {
            let link = link.map_err(|reason| AdmitError::Unavailable { reason })?;
            link.submit(request).await
        })
    }

    fn card(&self) -> Arc<ModelCard> {
        match self.link() {
            Ok(link) => link.card(),
            Err(_) => Arc::new(ModelCard {
                name: self.target.replica.service.0.clone(),
                names: Vec::new(),
                unlisted_names: Vec::new(),
                max_model_len: 0,
                vocab_size: 0,
                numerics_id: String::new(),
                created_s: 0,
                default_sampling: Default::default(),
            }),
        }
    }

    fn status(&self) -> EngineStatus {
        match self.link() {
            Ok(link) => link.status(),
            Err(reason) => EngineStatus { reason, ..EngineStatus::default() },
        }
    }
}

impl ReplicaClient for LocalReplica {
    fn model_text(&self, timeout: Duration) -> BoxFuture<'_, Result<Bytes, ClusterError>> {
        let link = self.link();
        Box::pin(async move {
            let unavailable = |reason: String, waited: Duration| ClusterError::Unavailable {
                waited_ms: u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
                reason,
            };
            let link = link.map_err(|reason| unavailable(reason, Duration::ZERO))?;
            match tokio::time::timeout(timeout, watch::portable(&link)).await {
                Ok(text) => text.map(|text| text.bytes.clone()).map_err(|reason| unavailable(reason, Duration::ZERO)),
                Err(_) => Err(unavailable("the tokenizer was not ready in time".into(), timeout)),
            }
        })
    }

    fn prefixes(&self) -> mpsc::Receiver<PrefixUpdate> {
        match self.link() {
            Ok(link) => feed::prefixes(link),
            // Closed at once: the replica is gone.
            Err(_) => mpsc::channel(1).1,
        }
    }

    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            // The wait is bounded as others' are: a change just before it is seen then.
            let _ = tokio::time::timeout(STATUS_POLL, self.board.changed()).await;
        })
    }

    fn block_size(&self) -> usize {
        self.link().map_or(0, |link| link.block_size())
    }
}
