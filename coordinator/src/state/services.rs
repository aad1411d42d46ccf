//! Services: wishes, their generations, and what is known of their models.
//!
//! Invariant: a changed wish is a new generation (but for the number of replicas and the
//! strategy of rollouts, which change no replica), and facts
//! belong to one generation; an older wish is kept exactly as long as a replica carries it out.

use forge_shared::cluster::command::CommandError;
use forge_shared::cluster::event::{Change, Kind, Object};
use forge_shared::cluster::service::{Facts, LeavingReplica, OlderWish, ReplicaPhase, ReplicaRecord, ServiceRecord};
use forge_shared::ids::ServiceName;
use forge_shared::plan::ModelFacts;
use forge_shared::spec::ModelService;

use super::notices::Weight;
use super::{
    ClusterState, Effect, MAX_OLDER_WISHES, MAX_REASON_BYTES, MAX_REPLICAS, MAX_REPLICAS_TOTAL, MAX_SERVICE_BYTES, MAX_SERVICES, Step,
    checks, runs,
};

/// Layers a model may have.
const MAX_LAYERS: usize = 4_096;

impl ClusterState {
    pub(super) fn apply_service(&mut self, wish: &ModelService, step: &mut Step) -> Result<Effect, CommandError> {
        check_wish(wish)?;
        let name = ServiceName(wish.metadata.name.clone());
        self.check_client_names(wish)?;
        let Some(known) = self.services.get(&name) else {
            checks::bounded("services", self.services.len(), MAX_SERVICES)?;
            self.check_total(&name, wish.spec.replicas)?;
            let record = ServiceRecord {
                service: wish.clone(),
                generation: 1,
                revision: step.index,
                created: step.index,
                facts: Facts::NEW,
                replicas: Vec::new(),
                leaving: Vec::new(),
                older: Vec::new(),
                history: Vec::new(),
                changed_ms: self.wish_time_ms(),
                stuck: None,
                is_deleted: false,
                refusal: None,
                last_epoch: self.epoch_floor,
                longest_len: None,
            };
            self.put_service(name.clone(), record, step);
            self.notice(step, Weight::Normal, "ServiceCreated", about(&name), format!("service {name} was created"));
            self.note_shared_model(&name, step);
            return Ok(Effect::CHANGED);
        };
        // To wish the same again after a worker could not use the model is to try again.
        let tries_again = matches!(known.facts, Facts::Failed { .. });
        if known.service == *wish && !known.is_deleted && !tries_again {
            return Ok(Effect::NONE);
        }
        self.check_total(&name, wish.spec.replicas)?;
        let mut record = known.clone();
        let is_other_model = record.service.spec.model != wish.spec.model;
        if changes_replicas(&record.service, wish) {
            let carried = record.replicas.iter().chain(record.leaving.iter().map(|leaving| &leaving.replica));
            if carried.clone().any(|replica| replica.generation == record.generation) {
                checks::bounded("changes of a service that are being rolled out", record.older.len(), MAX_OLDER_WISHES)?;
                let weights_digest = match &record.facts {
                    Facts::Known { facts } => facts.weights_digest.clone(),
                    Facts::Unknown { .. } | Facts::Failed { .. } => String::new(),
                };
                record.older.push(OlderWish { generation: record.generation, service: record.service.clone(), weights_digest });
            }
            self.remember_wish(&mut record, wish);
            record.generation += 1;
            record.longest_len = None;
            record.facts = Facts::NEW;
            record.refusal = None;
        } else if tries_again {
            record.facts = Facts::NEW;
        }
        record.service = wish.clone();
        record.revision = step.index;
        record.is_deleted = false;
        let message = format!("service {name} was changed, generation {}", record.generation);
        self.put_service(name.clone(), record, step);
        self.notice(step, Weight::Normal, "ServiceChanged", about(&name), message);
        if is_other_model {
            self.note_shared_model(&name, step);
        }
        Ok(Effect::CHANGED)
    }

    pub(super) fn scale_service(&mut self, name: &ServiceName, replicas: u32, step: &mut Step) -> Result<Effect, CommandError> {
        let known = self.living_service(name)?;
        let mut wish = known.service.clone();
        wish.spec.replicas = replicas;
        check_wish(&wish)?;
        if known.service == wish {
            return Ok(Effect::NONE);
        }
        self.check_total(name, replicas)?;
        let mut record = self.living_service(name)?.clone();
        let message = format!("service {name} was scaled from {} to {replicas} replicas", record.service.spec.replicas);
        record.service = wish;
        record.revision = step.index;
        self.put_service(name.clone(), record, step);
        self.notice(step, Weight::Normal, "ServiceScaled", about(name), message);
        Ok(Effect::CHANGED)
    }

    pub(super) fn delete_service(&mut self, name: &ServiceName, step: &mut Step) -> Result<Effect, CommandError> {
        let mut record = self.living_service(name)?.clone();
        record.is_deleted = true;
        record.refusal = None;
        for replica in std::mem::take(&mut record.replicas) {
            leave(&mut record, replica, true);
        }
        record.leaving.iter_mut().for_each(|leaving| leaving.is_draining = true);
        self.put_service(name.clone(), record, step);
        self.notice(step, Weight::Normal, "ServiceDeleted", about(name), format!("service {name} was deleted"));
        Ok(Effect::CHANGED)
    }

    pub(super) fn record_facts(
        &mut self,
        name: &ServiceName,
        generation: u64,
        facts: Result<&ModelFacts, &String>,
        step: &mut Step,
    ) -> Result<Effect, CommandError> {
        if let Ok(facts) = facts {
            check_facts(facts)?;
        }
        let known = self.living_service(name)?;
        if known.generation != generation || matches!(known.facts, Facts::Known { .. }) {
            return Ok(Effect::NONE);
        }
        let found = match facts {
            Ok(facts) => Facts::Known { facts: Box::new(facts.clone()) },
            Err(reason) => Facts::Failed { reason: checks::cut(reason, MAX_REASON_BYTES) },
        };
        if known.facts == found {
            return Ok(Effect::NONE);
        }
        let mut record = known.clone();
        record.facts = found;
        let failure = if let Facts::Failed { reason } = &record.facts { Some(reason.clone()) } else { None };
        self.put_service(name.clone(), record, step);
        if let Some(reason) = failure {
            let message = format!("the model of {name} cannot be used: {reason}");
            self.notice(step, Weight::Warning, "ModelUnusable", about(name), message);
        }
        Ok(Effect::CHANGED)
    }

    pub(super) fn record_wait(
        &mut self,
        name: &ServiceName,
        generation: u64,
        waits_for: &str,
        step: &mut Step,
    ) -> Result<Effect, CommandError> {
        let known = self.living_service(name)?;
        let waits_for = checks::cut(waits_for, MAX_REASON_BYTES);
        let is_new = matches!(&known.facts, Facts::Unknown { waits_for: said } if *said != waits_for);
        if known.generation != generation || !is_new {
            return Ok(Effect::NONE);
        }
        let mut record = known.clone();
        record.facts = Facts::Unknown { waits_for };
        // Placement does not depend on it.
        step.changes.push(Change::Put { object: Object::Service(Box::new(record.clone())) });
        self.services.insert(name.clone(), record);
        Ok(Effect::CHANGED)
    }

    /// A service that was not deleted.
    pub(super) fn living_service(&self, name: &ServiceName) -> Result<&ServiceRecord, CommandError> {
        let living = || self.services.iter().filter(|(_, service)| !service.is_deleted).map(|(name, _)| name.0.as_str());
        self.services.get(name).filter(|service| !service.is_deleted).ok_or_else(|| checks::not_found("service", &name.0, living()))
    }

    /// Writes a service back: forgets wishes that nobody carries out any more, and the service itself once it was
    /// deleted and nothing of it is left.
    pub(super) fn put_service(&mut self, name: ServiceName, mut record: ServiceRecord, step: &mut Step) {
        step.moves = true;
        let (replicas, leaving) = (&record.replicas, &record.leaving);
        record.older.retain(|older| {
            replicas.iter().chain(leaving.iter().map(|leaving| &leaving.replica)).any(|replica| replica.generation == older.generation)
        });
        if record.is_deleted && record.leaving.is_empty() {
            self.epoch_floor = self.epoch_floor.max(record.last_epoch);
            self.services.remove(&name);
            step.changes.push(Change::Deleted { kind: Kind::Service, name: name.0 });
            return;
        }
        step.changes.push(Change::Put { object: Object::Service(Box::new(record.clone())) });
        self.services.insert(name, record);
    }

    /// Refuses a wish whose own names for clients are another service's already: gateways could not tell which is meant.
    pub(crate) fn check_client_names(&self, wish: &ModelService) -> Result<(), CommandError> {
        let living = self.services.values().filter(|other| !other.is_deleted).map(|other| &other.service);
        for other in living.filter(|other| other.metadata.name != wish.metadata.name) {
            let Some(taken) = client_names(wish).into_iter().flatten().find(|name| client_names(other).contains(&Some(*name))) else {
                continue;
            };
            let field = if wish.spec.model_name.as_deref() == Some(taken) { "spec.modelName" } else { "metadata.name" };
            let reason = format!("{taken:?} is what clients call the service {:?}: choose another name", other.metadata.name);
            return checks::invalid(field, reason);
        }
        Ok(())
    }

    /// Says that the name of a service's model, which clients may use too, stands for an older service.
    fn note_shared_model(&mut self, name: &ServiceName, step: &mut Step) {
        let model = |record: &ServiceRecord| record.service.spec.model.clone();
        let Some(shared) = self.services.get(name).map(model) else { return };
        let sharing = self.services.iter().filter(|(_, record)| !record.is_deleted && model(record) == shared);
        let holder = sharing.min_by_key(|(name, record)| (record.created, (*name).clone())).map(|(name, _)| name.clone());
        let Some(holder) = holder.filter(|holder| holder != name) else { return };
        let message = format!(
            "{holder} and {name} serve {shared:?}: requests by that name go to {holder}, the older; ask for {name} by its own name"
        );
        self.notice(step, Weight::Warning, "ModelNameShared", about(name), message);
    }

    fn check_total(&self, name: &ServiceName, replicas: u32) -> Result<(), CommandError> {
        let others = self.services.iter().filter(|(other, _)| *other != name);
        let wished: u64 = others.map(|(_, service)| u64::from(service.service.spec.replicas)).sum();
        let total = usize::try_from(wished + u64::from(replicas)).unwrap_or(usize::MAX);
        if total > MAX_REPLICAS_TOTAL {
            return Err(CommandError::TooMany { kind: "replicas of all services".into(), limit: MAX_REPLICAS_TOTAL });
        }
        Ok(())
    }
}

/// A replica that is wanted no more: one that answers requests finishes them, any other is gone.
pub(super) fn leave(record: &mut ServiceRecord, replica: ReplicaRecord, is_draining: bool) {
    if matches!(replica.status.phase, ReplicaPhase::Ready | ReplicaPhase::Draining) && runs(&replica) {
        record.leaving.push(LeavingReplica { replica, is_draining });
    }
}

/// Whether replicas of the one wish cannot carry out the other.
pub fn changes_replicas(old: &ModelService, new: &ModelService) -> bool {
    let mut old = old.clone();
    (old.spec.replicas, old.spec.rollout) = (new.spec.replicas, new.spec.rollout);
    old != *new
}

/// What clients may call a service, beside its model's name.
fn client_names(wish: &ModelService) -> [Option<&str>; 2] {
    [Some(wish.metadata.name.as_str()), wish.spec.model_name.as_deref()]
}

pub(super) fn about(name: &ServiceName) -> String {
    format!("service/{name}")
}

/// Whether a wish may be written down.
///
/// # Errors
/// The first field that is wrong, and what it may be.
pub fn check_wish(wish: &ModelService) -> Result<(), CommandError> {
    checks::name("metadata.name", &wish.metadata.name)?;
    wish.check().or_else(|error| checks::invalid(error.field, error.reason))?;
    if wish.spec.replicas > MAX_REPLICAS {
        return checks::invalid("spec.replicas", format!("must be at most {MAX_REPLICAS}, got {}", wish.spec.replicas));
    }
    let bytes = serde_json::to_vec(wish).map_or(usize::MAX, |json| json.len());
    if bytes > MAX_SERVICE_BYTES {
        return checks::invalid("spec", format!("has {bytes} bytes as JSON, at most {MAX_SERVICE_BYTES}"));
    }
    Ok(())
}

fn check_facts(facts: &ModelFacts) -> Result<(), CommandError> {
    if !(1..=MAX_LAYERS).contains(&facts.layers) {
        return checks::invalid("facts.layers", format!("must be between 1 and {MAX_LAYERS}, got {}", facts.layers));
    }
    let shape = &facts.shape;
    if !shape.layer_bytes.is_empty() && shape.layer_bytes.len() != facts.layers {
        return checks::invalid("facts.shape.layerBytes", format!("has {} entries for {} layers", shape.layer_bytes.len(), facts.layers));
    }
    if !matches!(shape.tensor_extra_bytes.len(), 0 | 3) {
        let reason = format!("has {} entries, one each for 2, 4 and 8 ranks are known", shape.tensor_extra_bytes.len());
        return checks::invalid("facts.shape.tensorExtraBytes", reason);
    }
    if !shape.expert_bytes.is_empty() && shape.expert_bytes.len() != facts.layers {
        return checks::invalid("facts.shape.expertBytes", format!("has {} entries for {} layers", shape.expert_bytes.len(), facts.layers));
    }
    if !(1..=1 << 30).contains(&facts.context_length) {
        return checks::invalid("facts.contextLength", format!("must be between 1 and 2^30, got {}", facts.context_length));
    }
    let large = [facts.weights_bytes, facts.workspace_bytes, shape.embedding_bytes, shape.head_bytes];
    let parts = shape.layer_bytes.iter().chain(&shape.expert_bytes).chain(&shape.tensor_extra_bytes);
    if large.iter().chain(parts).any(|&bytes| bytes > 1 << 50) || facts.kv_slot_bytes > 1 << 40 {
        return checks::invalid("facts", "names more bytes than any memory has");
    }
    if [shape.heads, shape.kv_heads, shape.experts, shape.hidden_size, shape.vocab_size].iter().any(|&count| count > 1 << 30) {
        return checks::invalid("facts.shape", "has a count above 2^30");
    }
    checks::text("facts.weightsDigest", &facts.weights_digest, 256)
}
