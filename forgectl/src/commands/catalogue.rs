//! `forgectl catalogue`.

use forge_store::CatalogueEntry;
use indicatif::HumanBytes;
use serde::Serialize;

use crate::cli::ListArgs;
use crate::context::Context;
use crate::failure::Result;
use crate::output::{column, print_list, short_count, wide};
use crate::support;

/// An entry as listed.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Listed<'a> {
    name: &'a str,
    default: bool,
    runs: bool,
    description: &'a str,
    parameters: u64,
    download_bytes: u64,
    quantization: &'a str,
    context_length: u32,
    architecture: &'a str,
    licence: &'a str,
    aliases: &'a [String],
    sources: Vec<&'a str>,
}

/// Lists what can be pulled by a short name.
///
/// # Errors
/// If the user's own catalogue is wrong.
pub fn catalogue(args: &ListArgs) -> Result<()> {
    let context = Context::open()?;
    let catalogue = context.store.catalogue();
    let entries: Vec<Listed<'_>> =
        catalogue.entries().map(|(name, entry)| listed(name, entry, name == catalogue.default_alias())).collect();
    let columns = [
        column("NAME"),
        column("PARAMETERS"),
        column("DOWNLOAD"),
        column("TYPE"),
        column("CONTEXT"),
        column("RUNS"),
        column("LICENCE"),
        wide("ARCHITECTURE"),
        wide("ALIASES"),
        wide("SOURCES"),
        column("DESCRIPTION"),
    ];
    print_list(args.output, &entries, &columns, |entry| {
        vec![
            entry.name.to_owned(),
            short_count(entry.parameters),
            HumanBytes(entry.download_bytes).to_string(),
            entry.quantization.to_owned(),
            entry.context_length.to_string(),
            if entry.runs { "yes" } else { "not yet" }.to_owned(),
            entry.licence.to_owned(),
            entry.architecture.to_owned(),
            entry.aliases.join(","),
            entry.sources.join(","),
            format!("{}{}", entry.description, if entry.default { " (default)" } else { "" }),
        ]
    })
}

fn listed<'a>(name: &'a str, entry: &'a CatalogueEntry, default: bool) -> Listed<'a> {
    // The catalogue refuses an entry without sources; the first is what a pull tries first.
    let first = entry.sources.first();
    Listed {
        name,
        default,
        runs: support::runs(&entry.architecture),
        description: &entry.description,
        parameters: entry.parameters,
        download_bytes: first.map_or(0, |source| source.size_bytes),
        quantization: first.map_or("", |source| &source.quantization),
        context_length: entry.context_length,
        architecture: &entry.architecture,
        licence: &entry.licence,
        aliases: &entry.aliases,
        sources: entry.sources.iter().map(|source| source.from.as_str()).collect(),
    }
}
