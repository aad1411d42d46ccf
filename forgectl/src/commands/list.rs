//! `forgectl list`.

use forge_store::Manifest;
use indicatif::HumanBytes;
use serde::Serialize;

use crate::cli::ListArgs;
use crate::context::Context;
use crate::failure::Result;
use crate::output::{OutputFormat, column, print_list, print_text, wide};
use crate::time::{Utc, ago};

/// A stored model as listed.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Stored {
    name: String,
    size_bytes: u64,
    source: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    licence: Option<String>,
    digest: String,
    pulled_at: Utc,
}

impl From<&Manifest> for Stored {
    fn from(manifest: &Manifest) -> Self {
        Stored {
            name: manifest.name.clone(),
            size_bytes: manifest.size_bytes(),
            source: manifest.source.clone(),
            licence: manifest.licence.clone(),
            digest: format!("sha256:{}", manifest.digest()),
            pulled_at: Utc(manifest.created_unix_s),
        }
    }
}

/// Lists the local store.
///
/// # Errors
/// If it cannot be read.
pub fn list(args: &ListArgs) -> Result<()> {
    let context = Context::open()?;
    let models: Vec<Stored> = context.store.list()?.iter().map(Stored::from).collect();
    if models.is_empty() && matches!(args.output, OutputFormat::Table | OutputFormat::Wide) {
        return print_text("No models here yet. `forgectl pull` fetches one; `forgectl catalogue` lists what can be had.\n");
    }
    let columns = [column("NAME"), column("SIZE"), column("LICENCE"), column("PULLED"), wide("SOURCE"), wide("DIGEST")];
    print_list(args.output, &models, &columns, |model| {
        vec![
            model.name.clone(),
            HumanBytes(model.size_bytes).to_string(),
            model.licence.clone().unwrap_or("unknown".into()),
            ago(model.pulled_at),
            model.source.clone(),
            model.digest.clone(),
        ]
    })
}
