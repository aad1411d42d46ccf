//! What a service's model is, found for placement: from the store where it is there, else from the headers of a hub's
//! files, else after a pull.
//!
//! Invariant: facts name what every worker can hold its own files against: a digest of their content, or the hub's commit
//! they were read at.

use forge_shared::plan::ModelFacts;
use forge_shared::spec::ModelService;
use forge_store::{CancelFlag, HubSource, ModelSource, PullOptions, Silent};

use crate::WorkerError;
use crate::models::{SOURCE_DIGEST, StoredModels};
use crate::prepare::{PreparedModel, header_is_whole, model_facts, open_model};

/// Looks at a service's model. Blocking; may take as long as a pull for sources that have no headers to look at.
///
/// # Errors
/// What is wrong with the model or the wish, and what to do.
pub fn inspect(models: &StoredModels, service: &ModelService) -> Result<ModelFacts, String> {
    service.check().map_err(|error| error.to_string())?;
    look(models, service).map_err(|error| format!("{} cannot be used: {error}", service.spec.model))
}

fn look(models: &StoredModels, service: &ModelService) -> Result<ModelFacts, WorkerError> {
    let (spec, store) = (&service.spec, models.store()?);
    if let Some(resolved) = store.resolve(&spec.model, &Silent)? {
        let digest = models.digest(&resolved, &CancelFlag::default())?;
        return Ok(PreparedModel::open(resolved.path(), &digest, spec)?.facts);
    }
    let options = models.options(&CancelFlag::default())?;
    match store.parse(&spec.model)? {
        ModelSource::Hub(hub) => preview(models, &hub, &options, service),
        _ => {
            let resolved = store.pull(&spec.model, &options, &Silent)?;
            let digest = models.digest(&resolved, &CancelFlag::default())?;
            Ok(PreparedModel::open(resolved.path(), &digest, spec)?.facts)
        }
    }
}

fn preview(models: &StoredModels, hub: &HubSource, options: &PullOptions, service: &ModelService) -> Result<ModelFacts, WorkerError> {
    let preview = models.store()?.preview(hub, options, header_is_whole)?;
    let model = open_model(preview.path(), &service.spec)?;
    let weights_digest = format!("{SOURCE_DIGEST}{}", preview.source());
    Ok(ModelFacts { weights_digest, ..model_facts(&model, &service.spec)? })
}
