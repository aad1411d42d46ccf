//! `forgectl show`: a model as a service that could be served, and what is known of it.
//!
//! Data forms are a `ModelService` whose `status` holds what was found, so that the output is a configuration too.

mod positions;

use forge_model::{Format, Model};
use forge_shared::config;
use forge_shared::plan::ModelFacts;
use forge_shared::spec::{ModelService, ModelServiceSpec};
use forge_store::{CatalogueEntry, HubSource, ModelSource, Preview, PullOptions, ResolvedModel, Silent};
use forge_worker::WorkerError;
use forge_worker::prepare::{PreparedModel, header_is_whole, model_facts, open_model};
use indicatif::HumanBytes;
use serde::Serialize;

use crate::cli::ShowArgs;
use crate::context::Context;
use crate::failure::{Failure, Result};
use crate::output::{print_facts, short_count};
use crate::progress::pull_progress;
use crate::{replica, runtime, support};
use positions::Positions;

/// What is known of a model; absent where it is not pulled yet.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Shown {
    name: String,
    pulled: bool,
    /// Where sizes and the like are from.
    known_from: KnownFrom,
    #[serde(skip_serializing_if = "Option::is_none")]
    description: Option<String>,
    architecture: String,
    parameters: u64,
    quantization: String,
    context_length: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    layout: Option<Layout>,
    #[serde(skip_serializing_if = "Option::is_none")]
    positions: Option<Positions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<Memory>,
    licence: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chat_template: Option<bool>,
    size_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    sources: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<String>,
}

/// What was read to know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
enum KnownFrom {
    /// The model's files.
    Files,
    /// Their beginnings, from the hub.
    Headers,
    /// The catalogue of this program alone.
    Catalogue,
}

/// Sizes of the decoder.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Layout {
    format: &'static str,
    layers: usize,
    hidden_size: usize,
    heads: usize,
    kv_heads: usize,
    vocab_size: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    experts: Option<usize>,
}

/// Bytes needed to serve it with these settings.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Memory {
    weights_bytes: u64,
    workspace_bytes: u64,
    kv_bytes_per_1000_tokens: u64,
}

impl Memory {
    fn of(facts: &ModelFacts) -> Self {
        Memory {
            weights_bytes: facts.weights_bytes,
            workspace_bytes: facts.workspace_bytes,
            kv_bytes_per_1000_tokens: facts.kv_slot_bytes * 1000,
        }
    }
}

/// Shows a model of the store, the catalogue, the hub or a path.
///
/// # Errors
/// A name nobody knows, or a model that cannot be read.
pub fn show(args: &ShowArgs) -> Result<()> {
    let context = Context::open()?;
    let service = context.service(&args.sources, args.model.as_deref(), &args.keys.settings)?;
    let (name, spec) = (service.spec.model.as_str(), &service.spec);
    let resolved = context.store.resolve(name, &Silent)?;
    if args.verify {
        verify(&context, name, resolved.is_some())?;
        eprintln!("verified: every file has the size and checksum it was pulled with");
    }
    let entry = context.store.catalogue().find(name);
    let shown = match (&resolved, entry) {
        (Some(resolved), entry) => of_model(resolved, entry.map(|(_, entry)| entry), spec)?,
        (None, Some((alias, entry))) => of_entry(alias, entry),
        (None, None) => match context.store.parse(name)? {
            ModelSource::Hub(hub) => of_hub(&hub, spec)?,
            _ => {
                return Err(Failure::new(format!("model '{name}' is not in the local store"))
                    .help(format!("`forgectl pull {name}` fetches it; `forgectl list` shows what is there")));
            }
        },
    };
    print_facts(args.list.output, &document(&service, &shown)?, &facts(&shown))
}

/// The service with what was found as its `status`.
fn document(service: &ModelService, shown: &Shown) -> Result<serde_json::Value> {
    let mut document = config::to_value(service)?;
    document["status"] = serde_json::to_value(shown).map_err(|error| Failure::of(&error))?;
    Ok(document)
}

fn verify(context: &Context, name: &str, stored: bool) -> Result<()> {
    if !stored {
        return Err(Failure::new(format!("model '{name}' is not in the local store, so there is nothing to verify")));
    }
    let store = forge_store::Store::open(&context.home)?;
    let name = name.to_owned();
    // Reading gigabytes takes a while: Ctrl-C ends the process as it should, since nothing is written.
    runtime::start()?.block_on(async {
        let work = tokio::task::spawn_blocking(move || store.verify(&name, &*pull_progress()));
        tokio::select! {
            joined = work => Ok(joined.map_err(|error| Failure::of(&error))??),
            () = runtime::stop_signal() => Err(Failure::new("stopped before all files were read")),
        }
    })
}

/// What a model's files say; name, size and place are still to be filled in.
fn of_files(model: &Model, facts: &ModelFacts) -> Shown {
    let summary = model.summary();
    Shown {
        name: String::new(),
        pulled: false,
        known_from: KnownFrom::Headers,
        description: None,
        architecture: summary.family.to_owned(),
        parameters: summary.parameters as u64,
        quantization: summary.quantization.main_type().to_owned(),
        context_length: summary.context_length as u64,
        layout: Some(layout(model, summary.format)),
        positions: Some(Positions::of(model.architecture())),
        memory: Some(Memory::of(facts)),
        licence: summary.license,
        chat_template: None,
        size_bytes: 0,
        digest: None,
        sources: Vec::new(),
        path: None,
    }
}

fn of_model(resolved: &ResolvedModel, entry: Option<&CatalogueEntry>, spec: &ModelServiceSpec) -> Result<Shown> {
    let digest = resolved.digest().to_string();
    let prepared = PreparedModel::open(resolved.path(), &digest, spec).map_err(|error| replica::unusable(error, resolved))?;
    support::tell_override(&prepared.model);
    let manifest = resolved.manifest();
    let shown = of_files(&prepared.model, &prepared.facts);
    Ok(Shown {
        name: resolved.name().to_owned(),
        pulled: true,
        known_from: KnownFrom::Files,
        description: entry.map(|entry| entry.description.clone()),
        licence: manifest.and_then(|manifest| manifest.licence.clone()).or(shown.licence),
        chat_template: Some(prepared.text.chat_template().is_ok()),
        size_bytes: resolved.size_bytes(),
        digest: Some(digest),
        sources: manifest.map(|manifest| manifest.source.clone()).into_iter().collect(),
        path: Some(resolved.path().display().to_string()),
        ..shown
    })
}

/// A hub repository by its configuration and the headers of its weights; nothing stays on disk.
fn of_hub(hub: &HubSource, spec: &ModelServiceSpec) -> Result<Shown> {
    let options = PullOptions::from_environment()?;
    let (cancel, hub, spec) = (options.cancel.clone(), hub.clone(), spec.clone());
    runtime::start()?.block_on(runtime::cancellable(cancel, move || {
        let preview = Context::open()?.store.preview(&hub, &options, header_is_whole)?;
        of_preview(&preview, &hub, &spec)
    }))
}

fn of_preview(preview: &Preview, hub: &HubSource, spec: &ModelServiceSpec) -> Result<Shown> {
    let name = hub.to_string();
    let unusable = |error: WorkerError| replica::failed(error).while_doing(&format!("{} cannot be used", preview.source()));
    let model = open_model(preview.path(), spec).map_err(unusable)?;
    support::tell_override(&model);
    let facts = model_facts(&model, spec).map_err(unusable)?;
    let shown = of_files(&model, &facts);
    Ok(Shown {
        licence: preview.licence().map(str::to_owned).or(shown.licence),
        size_bytes: preview.size_bytes(),
        sources: vec![preview.source().to_owned()],
        name,
        ..shown
    })
}

fn layout(model: &Model, format: Format) -> Layout {
    let architecture = model.architecture();
    Layout {
        format: match format {
            Format::Gguf => "GGUF",
            Format::HuggingFace => "Hugging Face",
        },
        layers: architecture.layers,
        hidden_size: architecture.hidden_size,
        heads: architecture.attention.heads,
        kv_heads: architecture.attention.kv_heads,
        vocab_size: architecture.vocab_size,
        experts: architecture.experts.as_ref().map(|experts| experts.count),
    }
}

fn of_entry(alias: &str, entry: &CatalogueEntry) -> Shown {
    let first = entry.sources.first();
    Shown {
        name: alias.to_owned(),
        pulled: false,
        known_from: KnownFrom::Catalogue,
        description: Some(entry.description.clone()),
        architecture: entry.architecture.clone(),
        parameters: entry.parameters,
        quantization: first.map(|source| source.quantization.clone()).unwrap_or_default(),
        context_length: entry.context_length.into(),
        layout: None,
        positions: None,
        memory: None,
        licence: Some(entry.licence.clone()),
        chat_template: None,
        size_bytes: first.map_or(0, |source| source.size_bytes),
        digest: None,
        sources: entry.sources.iter().map(|source| source.from.clone()).collect(),
        path: None,
    }
}

fn facts(shown: &Shown) -> Vec<(&'static str, String)> {
    let mut facts = vec![("name", shown.name.clone())];
    facts.extend(shown.description.clone().map(|description| ("description", description)));
    facts.push(("architecture", shown.architecture.clone()));
    if !support::runs(&shown.architecture) {
        facts.push(("runs", "not yet: this version does not have its architecture".to_owned()));
    }
    facts.push(("parameters", format!("{} ({})", short_count(shown.parameters), shown.parameters)));
    facts.push(("quantization", shown.quantization.clone()));
    facts.push(("context", format!("{} tokens", shown.context_length)));
    if let Some(layout) = &shown.layout {
        let Layout { format, layers, hidden_size, heads, kv_heads, vocab_size, experts } = layout;
        let experts = experts.map(|count| format!(", {count} experts")).unwrap_or_default();
        let text =
            format!("{format}: {layers} layers, width {hidden_size}, {heads} heads, {kv_heads} KV heads, {vocab_size} token ids{experts}");
        facts.push(("layout", text));
    }
    facts.extend(shown.positions.iter().flat_map(Positions::facts));
    if let Some(memory) = &shown.memory {
        let text = format!(
            "{} weights, {} workspace, {} keys and values per 1000 tokens",
            HumanBytes(memory.weights_bytes),
            HumanBytes(memory.workspace_bytes),
            HumanBytes(memory.kv_bytes_per_1000_tokens)
        );
        facts.push(("memory", text));
    }
    if let Some(has) = shown.chat_template {
        facts.push(("chat", if has { "yes" } else { "no: it has no usable chat template, and completes text" }.to_owned()));
    }
    facts.push(("licence", shown.licence.clone().unwrap_or("unknown: the source does not tell".into())));
    let size = HumanBytes(shown.size_bytes);
    facts.push(if shown.pulled { ("size", size.to_string()) } else { ("download", format!("about {size}")) });
    facts.extend(shown.digest.clone().map(|digest| ("digest", digest)));
    facts.extend(shown.sources.iter().map(|source| ("source", source.clone())));
    facts.extend(shown.path.clone().map(|path| ("path", path)));
    match shown.known_from {
        KnownFrom::Catalogue => facts.push(("known from", "the catalogue alone; more is told when the model is here".to_owned())),
        KnownFrom::Headers => facts.push(("known from", "the beginnings of its files on the hub".to_owned())),
        KnownFrom::Files => {}
    }
    if !shown.pulled {
        facts.push(("here", format!("no; `forgectl pull {}` fetches it", shown.name)));
    }
    facts
}
