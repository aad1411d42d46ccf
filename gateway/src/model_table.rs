//! [`ModelTable`]: which model a name stands for, at one moment.
//!
//! Models of several services may claim one name, and a service has several models of one name while a changed wish is
//! rolled out. Invariant: a name stands for the models of one service only, whatever is served; a claim that loses
//! costs its service that name and nothing else.

use std::collections::HashMap;
use std::sync::Arc;

use crate::error::ApiError;
use crate::models::Model;

/// The models served at one moment, those of the oldest service first.
#[derive(Default)]
pub(crate) struct ModelTable {
    models: Vec<Arc<Model>>,
    /// Models of one service, the one to prefer first.
    by_name: HashMap<String, Vec<usize>>,
    /// Services of which no replica ever answered: what their models are called is not known yet.
    waiting: Vec<String>,
}

/// A name that two services claim.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct NameClash {
    /// The name.
    pub name: String,
    /// The service that has it.
    pub holder: String,
    /// The service that does without.
    pub loser: String,
}

impl std::fmt::Display for NameClash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} and {} both answer to the name {:?}; {} has it", self.holder, self.loser, self.name, self.holder)
    }
}

impl ModelTable {
    /// Over models in order of preference. A model's own name goes before other models' further names; among claims of
    /// one kind the earlier model wins.
    pub(crate) fn new(models: Vec<Arc<Model>>) -> (Self, Vec<NameClash>) {
        let mut by_name: HashMap<String, Vec<usize>> = HashMap::new();
        let mut clashes = Vec::new();
        let kinds: [fn(&Model) -> Vec<&String>; 3] =
            [|model| vec![&model.card.name], |model| model.card.names.iter().collect(), |model| model.card.unlisted_names.iter().collect()];
        for names in kinds {
            for (index, model) in models.iter().enumerate() {
                for name in names(model) {
                    let holders = by_name.entry(name.clone()).or_default();
                    match holders.first().map(|&first| &models[first]) {
                        Some(holder) if holder.service() != model.service() => {
                            let (holder, loser) = (holder.service().to_owned(), model.service().to_owned());
                            clashes.push(NameClash { name: name.clone(), holder, loser });
                        }
                        _ if holders.contains(&index) => {}
                        _ => holders.push(index),
                    }
                }
            }
        }
        clashes.sort();
        clashes.dedup();
        (ModelTable { models, by_name, waiting: Vec::new() }, clashes)
    }

    /// Notes which of the services that are wanted have no model yet.
    pub(crate) fn await_services(&mut self, services: &[String]) {
        let has_model = |service: &String| self.models.iter().any(|model| model.service() == service);
        self.waiting = services.iter().filter(|service| !has_model(service)).cloned().collect();
    }

    /// Whether there is nothing to answer with yet, and something to wait for.
    pub(crate) fn is_awaited(&self) -> bool {
        self.models.is_empty() && !self.waiting.is_empty()
    }

    /// The model of a request: the first of that name with a replica that can answer, or the first. Without a name, one
    /// of the oldest service.
    pub(crate) fn find(&self, name: Option<&str>) -> Result<&Arc<Model>, ApiError> {
        let models = self.versions(name)?;
        let ready = models.iter().find(|model| model.unready_reason().is_none());
        let found = ready.or(models.first()).copied();
        found.ok_or_else(|| ApiError::Internal("a name without a model".into()))
    }

    /// The models of one service that a name stands for, at least one.
    pub(crate) fn versions(&self, name: Option<&str>) -> Result<Vec<&Arc<Model>>, ApiError> {
        match name {
            None => {
                let first = self.models.first();
                let first = first.ok_or(ApiError::Unavailable { message: "no model is served yet".into(), retry_after_s: 2 })?;
                Ok(self.models.iter().filter(|model| model.service() == first.service()).collect())
            }
            Some(name) => {
                let known = self.by_name.get(name).map(|indices| indices.iter().map(|&index| &self.models[index]).collect());
                known.ok_or_else(|| match self.waiting.as_slice() {
                    [] => ApiError::UnknownModel {
                        model: name.chars().take(128).collect(),
                        served: self.names().map(|(name, _)| name.to_owned()).collect(),
                    },
                    waiting => ApiError::Unavailable {
                        message: format!("this model is not served, or not yet: {} wait for a first replica", waiting.join(", ")),
                        retry_after_s: 2,
                    },
                })
            }
        }
    }

    /// Every name that is listed, with its first model; a model's own name first.
    pub(crate) fn names(&self) -> impl Iterator<Item = (&str, &Arc<Model>)> {
        self.models.iter().enumerate().flat_map(move |(index, model)| {
            let card = &model.card;
            let aliases = card.names.iter().filter(|name| **name != card.name);
            let is_held = move |name: &&String| self.by_name.get(*name).and_then(|holders| holders.first()) == Some(&index);
            std::iter::once(&card.name).chain(aliases).filter(is_held).map(move |name| (name.as_str(), model))
        })
    }

    /// The models by service, the oldest service first.
    pub(crate) fn by_service(&self) -> impl Iterator<Item = &[Arc<Model>]> {
        self.models.chunk_by(|a, b| a.service() == b.service())
    }
}
