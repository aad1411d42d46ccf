//! What clients call a model.
//!
//! It names and does not find: the store reads names. Invariant: no path of this machine is among the names that clients
//! are shown, unless the operator gives it as the model's name.

use forge_shared::config;
use forge_shared::spec::ModelService;
use forge_store::{ModelSource, ResolvedModel};
use forge_worker::models::ServedNames;

use crate::context::Context;
use crate::failure::Result;

/// Second name of the catalogue's default model.
pub const DEFAULT_NAME: &str = "forge";

/// Every name a service's model answers to: the operator's, its own, and what it was asked for by.
///
/// # Errors
/// A name that cannot be read.
pub fn served_names(context: &Context, service: &ModelService, model: &ResolvedModel) -> Result<ServedNames> {
    let spec = &service.spec;
    let source = context.store.parse(&spec.model)?;
    let path = model.path().display().to_string();
    let local = matches!(source, ModelSource::Local(_));
    let own = short_name(&source, if local { &path } else { model.name() });
    // A service that was given a name goes by it, here as in a cluster.
    let given = Some(service.metadata.name.clone()).filter(|name| name != config::DEFAULT_SERVICE_NAME);
    let mut listed: Vec<String> = spec.model_name.clone().into_iter().chain(given).chain([own]).collect();
    let mut unlisted = vec![model.name().to_owned(), spec.model.clone()];
    if local {
        unlisted.push(path);
    } else {
        listed.append(&mut unlisted);
    }
    let catalogue = context.store.catalogue();
    if catalogue.find(&spec.model).is_some_and(|(alias, _)| alias == catalogue.default_alias()) {
        listed.push(DEFAULT_NAME.to_owned());
    }
    let mut seen = std::collections::HashSet::new();
    for names in [&mut listed, &mut unlisted] {
        names.retain(|name| seen.insert(name.clone()));
    }
    Ok(ServedNames { listed, unlisted })
}

/// A name for clients: a path's or address's last part without extension and without the number of a part; other names
/// as they are.
fn short_name(source: &ModelSource, canonical: &str) -> String {
    if !matches!(source, ModelSource::Url(_) | ModelSource::Local(_)) {
        return canonical.to_owned();
    }
    let last = canonical.trim_end_matches('/').rsplit('/').next().unwrap_or(canonical);
    let stem = last.strip_suffix(".gguf").or_else(|| last.strip_suffix(".safetensors")).unwrap_or(last);
    let stem = stem.split_once("-00001-of-").map_or(stem, |(before, _)| before);
    if stem.is_empty() { canonical.to_owned() } else { stem.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_get_a_short_name_of_files_and_addresses() {
        let local = |path: &str| (ModelSource::Local(path.into()), path.to_owned());
        let remote = |text: &str| {
            let source = ModelSource::parse_remote(text).expect("well-formed").expect("has a prefix");
            (source, text.to_owned())
        };
        for ((source, canonical), short) in [
            (remote("hf:org/name"), "hf:org/name"),
            (local("/models/tiny.Q4_1.gguf"), "tiny.Q4_1"),
            (local("/models/big-Q4_K_M-00001-of-00003.gguf"), "big-Q4_K_M"),
            (local("models/folder/"), "folder"),
            (remote("https://example.org/a/b.gguf"), "b"),
            (local("/"), "/"),
        ] {
            assert_eq!(short_name(&source, &canonical), short);
        }
    }
}
