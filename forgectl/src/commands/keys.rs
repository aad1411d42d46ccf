//! `forgectl keys`.

use forge_gateway::KeyLimits;
use forge_gateway::keys::{CreatedKey, KeyRecord};
use serde::Serialize;

use crate::cli::{KeysArgs, KeysCommand, ListArgs};
use crate::context::Context;
use crate::failure::{Failure, Result};
use crate::output::{OutputFormat, column, print_list, print_text};
use crate::time::{Utc, ago};

/// A key as listed, of this machine or of a cluster: neither its secret nor its hash.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ShownKey {
    name: String,
    id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    requests_per_minute: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens_per_minute: Option<u32>,
    created_at: Utc,
    #[serde(skip_serializing_if = "Option::is_none")]
    revoked_at: Option<Utc>,
    /// Right after it was made, this once.
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<String>,
}

impl ShownKey {
    /// Right after it was made, with the key itself.
    pub fn created(created: &CreatedKey) -> Self {
        ShownKey { key: Some(created.plaintext.clone()), ..ShownKey::from(&created.record) }
    }
}

impl From<&KeyRecord> for ShownKey {
    fn from(record: &KeyRecord) -> Self {
        ShownKey {
            name: record.name.clone(),
            id: record.id.clone(),
            requests_per_minute: record.limits.rpm,
            tokens_per_minute: record.limits.tpm,
            created_at: Utc(record.created_s),
            revoked_at: record.revoked_s.map(Utc),
            key: None,
        }
    }
}

/// Manages API keys.
///
/// # Errors
/// A name that is taken, unknown or not allowed; a key file that cannot be used.
pub fn keys(args: &KeysArgs) -> Result<()> {
    let store = Context::open()?.keys();
    match &args.command {
        KeysCommand::Create { name, rpm, tpm, list } => {
            let created = store.create(name, KeyLimits { rpm: *rpm, tpm: *tpm }, Utc::now().0)?;
            print_created(ShownKey::created(&created), list.output)
        }
        KeysCommand::List(ListArgs { output }) => {
            let records: Vec<ShownKey> = store.list()?.iter().map(ShownKey::from).collect();
            print_keys(&records, *output)
        }
        KeysCommand::Revoke { name } => {
            let record = store.revoke(name, Utc::now().0)?;
            print_text(&format!("revoked {} ({}); running servers notice within a second\n", record.name, record.id))
        }
    }
}

fn print_created(created: ShownKey, output: OutputFormat) -> Result<()> {
    let key = created.key.clone().unwrap_or_default();
    match output {
        OutputFormat::Table | OutputFormat::Wide => {
            eprintln!("Key {:?}. It is shown this once and stored only as a hash:", created.name);
            print_text(&format!("{key}\n"))
        }
        OutputFormat::Json => {
            let text = serde_json::to_string_pretty(&created).map_err(|error| Failure::of(&error))?;
            print_text(&(text + "\n"))
        }
        OutputFormat::Yaml => print_text(&serde_yaml_ng::to_string(&created).map_err(|error| Failure::of(&error))?),
    }
}

fn print_keys(records: &[ShownKey], output: OutputFormat) -> Result<()> {
    if records.is_empty() && matches!(output, OutputFormat::Table | OutputFormat::Wide) {
        return print_text("No keys: any key is accepted, on loopback only. `forgectl keys create NAME` makes one.\n");
    }
    let columns = [column("NAME"), column("ID"), column("RPM"), column("TPM"), column("CREATED"), column("STATE")];
    let limit = |limit: Option<u32>| limit.map_or("-".to_owned(), |count| count.to_string());
    print_list(output, records, &columns, |record| {
        vec![
            record.name.clone(),
            record.id.clone(),
            limit(record.requests_per_minute),
            limit(record.tokens_per_minute),
            ago(record.created_at),
            record.revoked_at.map_or("active".into(), |moment| format!("revoked {}", ago(moment))),
        ]
    })
}
