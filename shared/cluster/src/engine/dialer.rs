//! Makes clients of replicas on other hosts; replicas of one worker share its connection.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use forge_shared::cluster::node::Role;
use parking_lot::Mutex;

use super::remote::RemoteReplica;
use super::{EngineDialer, EngineTarget, ReplicaClient};
use crate::tls::{PeerName, RenewedChannel, SharedCredentials};

/// Dials workers with mTLS. Call it within a tokio runtime.
#[derive(Debug)]
pub struct RemoteDialer {
    credentials: SharedCredentials,
    request_timeout: Duration,
    workers: Mutex<HashMap<(String, String), Weak<RenewedChannel>>>,
}

impl RemoteDialer {
    /// `request_timeout` is what a worker may take for one request at most, should its gateway vanish without a word.
    pub fn new(credentials: SharedCredentials, request_timeout: Duration) -> Self {
        RemoteDialer { credentials, request_timeout, workers: Mutex::default() }
    }

    fn worker(&self, target: &EngineTarget) -> Arc<RenewedChannel> {
        let mut workers = self.workers.lock();
        workers.retain(|_, worker| worker.strong_count() > 0);
        let key = (target.node.0.clone(), target.address.clone());
        if let Some(worker) = workers.get(&key).and_then(Weak::upgrade) {
            return worker;
        }
        let peer = PeerName::One(Role::Worker, target.node.0.clone());
        // A target that cannot be dialed is a client that is never ready and says why.
        let worker = Arc::new(RenewedChannel::new(&target.address, peer, &self.credentials));
        workers.insert(key, Arc::downgrade(&worker));
        worker
    }
}

impl EngineDialer for RemoteDialer {
    fn dial(&self, target: EngineTarget) -> Arc<dyn ReplicaClient> {
        let worker = self.worker(&target);
        Arc::new(RemoteReplica::new(target, worker, self.request_timeout))
    }
}
