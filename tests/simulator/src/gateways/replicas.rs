//! The replicas that a gateway has dialed: what they say of themselves, over lost connections.

use std::sync::Arc;

use forge_cluster::engine::EngineTarget;
use forge_gateway::cluster::{Dialed, version};
use forge_gateway::{ServedModel, ServedReplica};
use forge_shared::generate::{AdmitError, GenerateRequest};
use forge_shared::link::{EngineLink, EngineStatus, EventStream, ModelCard};
use forge_worker::agent::RunId;
use futures::FutureExt;
use futures::future::BoxFuture;
use parking_lot::Mutex;

use super::{GatewayTimer, Process, Purpose};
use crate::host::Host;
use crate::message::CallId;
use crate::streams::Wire;
use crate::stub;
use crate::world::World;

/// Between two tries to hear of a replica, the first and the longest, milliseconds.
const PAUSE_MS: (u64, u64) = (50, 1_000);

/// What is known of a replica, as the gateway's cores ask for it.
struct Link {
    card: Arc<ModelCard>,
    status: Mutex<EngineStatus>,
}

impl EngineLink for Link {
    /// The simulated gateway submits by its world.
    fn submit(&self, _: GenerateRequest) -> BoxFuture<'_, Result<EventStream, AdmitError>> {
        async { Err(AdmitError::Unavailable { reason: "it is simulated".into() }) }.boxed()
    }

    fn card(&self) -> Arc<ModelCard> {
        self.card.clone()
    }

    fn status(&self) -> EngineStatus {
        self.status.lock().clone()
    }
}

/// See the module.
pub(super) struct DialedReplica {
    key: String,
    run: RunId,
    worker: Host,
    target: EngineTarget,
    link: Arc<Link>,
    /// It was ready once, so its card and text are known.
    is_known: bool,
    /// The call by which it tells.
    call: Option<CallId>,
    pause_ms: u64,
    number: u64,
}

impl Dialed for DialedReplica {
    fn served(&self) -> Option<ServedReplica> {
        let model = ServedModel { link: self.link.clone(), tokenizer: stub::tokenizer(), chat_template: None };
        let served = ServedReplica {
            model,
            service: self.target.replica.service.0.clone(),
            key: self.key.clone(),
            version: version("text", &self.link.card),
            epoch: self.target.epoch,
            prefixes: None,
        };
        self.is_known.then_some(served)
    }
}

fn dial(key: &str, target: &EngineTarget) -> DialedReplica {
    let card = ModelCard {
        name: target.replica.service.0.clone(),
        names: vec![target.replica.service.0.clone()],
        unlisted_names: Vec::new(),
        max_model_len: stub::MAX_LEN,
        vocab_size: stub::VOCAB as usize,
        numerics_id: stub::NUMERICS.into(),
        created_s: 0,
        default_sampling: Default::default(),
    };
    let status = EngineStatus { reason: "connecting".into(), ..EngineStatus::default() };
    DialedReplica {
        key: key.to_owned(),
        run: RunId { replica: target.replica.to_string(), epoch: target.epoch },
        // Nodes are called as their hosts.
        worker: Host::Worker(target.node.0.trim_start_matches('w').parse().unwrap_or(u16::MAX)),
        target: target.clone(),
        link: Arc::new(Link { card: Arc::new(card), status: Mutex::new(status) }),
        is_known: false,
        call: None,
        pause_ms: 0,
        number: 0,
    }
}

impl Process {
    /// Dials what is wanted, and lets go of the rest.
    pub(super) fn reconcile(&mut self, world: &mut World) {
        self.roster.reconcile(&self.directory.wanted(), |wanted| dial(&wanted.key, &wanted.target));
        let new: Vec<String> =
            self.roster.dialed_mut().filter(|(.., it)| it.call.is_none() && it.number == 0).map(|(key, ..)| key.to_owned()).collect();
        for key in new {
            self.watch_replica(world, &key);
        }
        let dialed: Vec<CallId> = self.roster.dialed_mut().filter_map(|(.., it)| it.call).collect();
        let gone = |(call, (_, purpose)): (&CallId, &(Host, Purpose))| {
            (matches!(purpose, Purpose::Replica(_)) && !dialed.contains(call)).then_some(*call)
        };
        let gone: Vec<CallId> = self.calls.iter().filter_map(gone).collect();
        gone.into_iter().for_each(|call| self.cancel(world, call));
    }

    fn dialed(&mut self, key: &str) -> Option<&mut DialedReplica> {
        self.roster.dialed_mut().find(|(known, ..)| *known == key).map(|(.., it)| it)
    }

    /// Where a dialed replica is.
    pub(super) fn place_of(&mut self, key: &str) -> Option<(Host, RunId)> {
        self.dialed(key).map(|it| (it.worker, it.run.clone()))
    }

    fn watch_replica(&mut self, world: &mut World, key: &str) {
        let Some((worker, run)) = self.place_of(key) else { return };
        let call = self.call(world, worker, Purpose::Replica(key.to_owned()));
        if let Some(dialed) = self.dialed(key) {
            dialed.call = Some(call);
        }
        self.tell_worker(world, worker, Wire::WatchReplica { call, run });
    }

    /// The pause after a lost watch is over.
    pub(super) fn watch_again(&mut self, world: &mut World, key: &str, number: u64) {
        if self.dialed(key).is_some_and(|it| it.number == number && it.call.is_none()) {
            self.watch_replica(world, key);
        }
    }

    /// A replica does not tell of itself any more, and cannot answer until it does.
    pub(super) fn replica_lost(&mut self, world: &mut World, key: &str, call: CallId, reason: &str) {
        self.calls.remove(&call);
        let number = world.number();
        let Some(dialed) = self.dialed(key).filter(|it| it.call == Some(call)) else { return };
        let mut status = dialed.link.status.lock();
        (status.ready, status.reason) = (false, reason.to_owned());
        drop(status);
        dialed.call = None;
        dialed.number = number;
        dialed.pause_ms = (dialed.pause_ms * 2).clamp(PAUSE_MS.0, PAUSE_MS.1);
        let pause_ms = dialed.pause_ms;
        let pause_ms = self.random.between(pause_ms / 2, pause_ms);
        self.remind(world, pause_ms, GatewayTimer::Replica { key: key.to_owned(), number });
    }

    /// A replica tells of itself.
    pub(super) fn replica_hears(&mut self, world: &mut World, key: &str, call: CallId, wire: Wire) {
        match wire {
            Wire::Update { status, .. } => {
                let Some(dialed) = self.dialed(key).filter(|it| it.call == Some(call)) else { return };
                dialed.pause_ms = 0;
                let is_new = status.ready && !dialed.is_known;
                dialed.is_known |= status.ready;
                *dialed.link.status.lock() = status;
                if is_new {
                    self.publish(world);
                }
            }
            Wire::NotFound { .. } => self.replica_lost(world, key, call, "it does not run there"),
            _ => {}
        }
    }
}
