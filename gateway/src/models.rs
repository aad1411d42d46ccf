//! The models served, by every name they answer to, and the load of their replicas.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use forge_shared::link::{EngineLink, ModelCard};
use forge_shared::telemetry::{ModelLabel, model_label};
use forge_text::{ChatTemplate, Tokenizer};
use sha2::{Digest, Sha256};

use crate::error::{ApiError, GatewayError};
use crate::gateway::ServedModel;
use crate::router::{ReplicaLoad, pick};

/// A model and its replicas.
pub(crate) struct Model {
    pub(crate) card: Arc<ModelCard>,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) chat_template: Option<ChatTemplate>,
    pub(crate) label: ModelLabel,
    pub(crate) replicas: Vec<Replica>,
}

/// One replica, and how many requests this gateway has there.
pub(crate) struct Replica {
    pub(crate) link: Arc<dyn EngineLink>,
    in_flight: Arc<AtomicUsize>,
}

/// Counts a request at a replica until dropped.
pub(crate) struct ReplicaGuard(Arc<AtomicUsize>);

impl Drop for ReplicaGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Replica {
    pub(crate) fn occupy(&self) -> ReplicaGuard {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        ReplicaGuard(self.in_flight.clone())
    }

    /// Its numerics id in the form responses carry.
    pub(crate) fn fingerprint(&self) -> String {
        fingerprint(&self.link.card().numerics_id)
    }
}

impl Model {
    /// The replica for a request; `tried` ones are left out, and with `numerics_id` those of another.
    pub(crate) fn pick(&self, affinity: u64, tried: &[usize], numerics_id: Option<&str>) -> Option<usize> {
        let loads: Vec<ReplicaLoad> = self
            .replicas
            .iter()
            .enumerate()
            .map(|(index, replica)| {
                let status = replica.link.status();
                let same = numerics_id.is_none_or(|id| replica.link.card().numerics_id == id);
                ReplicaLoad {
                    eligible: status.ready && same && !tried.contains(&index),
                    load: replica.in_flight.load(Ordering::Relaxed).max(status.running + status.waiting),
                }
            })
            .collect();
        pick(&loads, affinity)
    }

    /// Why no replica can answer, if none can.
    pub(crate) fn unready_reason(&self) -> Option<String> {
        let mut reason = String::from("no replica");
        for replica in &self.replicas {
            let status = replica.link.status();
            if status.ready {
                return None;
            }
            reason = if status.reason.is_empty() { "not ready".into() } else { status.reason };
        }
        Some(reason)
    }
}

/// `fp_` and 12 digits of a hash: short, and equal exactly where the numerics id is.
pub(crate) fn fingerprint(numerics_id: &str) -> String {
    let digest = hex::encode(Sha256::digest(numerics_id));
    format!("fp_{}", &digest[..12])
}

/// All models served.
pub(crate) struct ModelTable {
    models: Vec<Arc<Model>>,
    by_name: HashMap<String, usize>,
}

impl ModelTable {
    pub(crate) fn new(served: Vec<ServedModel>) -> Result<Self, GatewayError> {
        let mut models: Vec<Model> = Vec::new();
        for ServedModel { link, tokenizer, chat_template } in served {
            let card = link.card();
            let replica = Replica { link, in_flight: Arc::default() };
            if let Some(model) = models.iter_mut().find(|model| model.card.name == card.name) {
                model.replicas.push(replica);
                continue;
            }
            let label = model_label(&card.name);
            models.push(Model { card, tokenizer, chat_template, label, replicas: vec![replica] });
        }
        if models.is_empty() {
            return Err(GatewayError::config("models", "at least one model is needed"));
        }
        let mut by_name = HashMap::new();
        for (index, model) in models.iter().enumerate() {
            for name in std::iter::once(&model.card.name).chain(&model.card.names) {
                if by_name.insert(name.clone(), index).is_some_and(|other| other != index) {
                    return Err(GatewayError::config("models", format!("two models answer to the name {name:?}")));
                }
            }
        }
        Ok(ModelTable { models: models.into_iter().map(Arc::new).collect(), by_name })
    }

    /// The model of a request; without a name, the first one.
    pub(crate) fn find(&self, name: Option<&str>) -> Result<&Arc<Model>, ApiError> {
        let Some(name) = name else {
            return Ok(&self.models[0]);
        };
        self.by_name.get(name).map(|index| &self.models[*index]).ok_or_else(|| ApiError::UnknownModel {
            model: name.chars().take(128).collect(),
            served: self.names().map(|(name, _)| name.to_owned()).collect(),
        })
    }

    /// Every name with its model; a model's own name first.
    pub(crate) fn names(&self) -> impl Iterator<Item = (&str, &Arc<Model>)> {
        self.models.iter().flat_map(|model| {
            let card = &model.card;
            let aliases = card.names.iter().filter(|name| **name != card.name);
            std::iter::once(&card.name).chain(aliases).map(move |name| (name.as_str(), model))
        })
    }

    /// The models themselves.
    pub(crate) fn models(&self) -> &[Arc<Model>] {
        &self.models
    }
}
