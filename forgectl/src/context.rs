//! What every command begins with: the home folder, the store, and the specification put together from its layers.

use std::io::Read;
use std::path::Path;

use forge_gateway::KeyStore;
use forge_shared::config::{self, Document, Format, Layers, Setting};
use forge_shared::spec::ModelService;
use forge_store::{ForgeHome, PullOptions, PullProgress, ResolvedModel, Store};

use crate::cli::SpecSources;
use crate::failure::{Failure, Result};
use crate::progress::pull_progress;
use crate::runtime;

/// Largest specification read from a file.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Home folder and store of this user.
pub struct Context {
    /// Where models and state live.
    pub home: ForgeHome,
    /// Models.
    pub store: Store,
}

impl Context {
    /// Opens the store under `FORGE_HOME`.
    ///
    /// # Errors
    /// If the folder cannot be used or the user's catalogue is wrong.
    pub fn open() -> Result<Self> {
        let home = ForgeHome::discover()?;
        let store = Store::open(&home)?;
        Ok(Context { home, store })
    }

    /// The API keys of this home.
    pub fn keys(&self) -> KeyStore {
        KeyStore::new(self.home.root().join("keys.json"))
    }

    /// The specification from all layers; `model` and `flags` come from the command line.
    ///
    /// # Errors
    /// A file that cannot be read, an unknown key, a value out of range.
    pub fn service(&self, sources: &SpecSources, model: Option<&str>, flags: &[Setting]) -> Result<ModelService> {
        let mut layers = Layers {
            file: sources.file.as_deref().map(read_document).transpose()?,
            environment: config::from_environment(variables())?,
            flags: flags.to_vec(),
            assignments: Vec::new(),
            default_model: self.store.catalogue().default_alias().to_owned(),
        };
        if let (Some(model), Some(key)) = (model, config::Key::by_path("model")) {
            let setting = Setting::flag(key, model).map_err(|reason| Failure::usage(format!("MODEL: {reason}")))?;
            layers.flags.push(setting);
        }
        for text in &sources.assignments {
            layers.assignments.push(Setting::assignment(text)?);
        }
        Ok(layers.resolve()?)
    }
}

/// Variables whose name and value are text; others cannot be Forge's.
fn variables() -> impl Iterator<Item = (String, String)> {
    std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
}

/// Reads a ModelService file; `-` is standard input.
///
/// # Errors
/// A file that cannot be read, an unknown key, a value of the wrong type.
pub fn read_document(path: &Path) -> Result<Document> {
    let origin = path.display().to_string();
    let failed = |error: std::io::Error| {
        Failure::of(&error)
            .while_doing(&format!("cannot read {origin}"))
            .help("-f takes a ModelService file; docs/configuration.md has one to start from")
            .exit(crate::failure::Exit::Usage)
    };
    let mut text = String::new();
    if origin == "-" {
        std::io::stdin().take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    } else {
        let file = std::fs::File::open(path).map_err(failed)?;
        file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
    }
    Ok(config::parse_document(&text, Format::detect(&origin, &text), &origin)?)
}

/// Brings a model into the store where it is not there, showing progress; Ctrl-C stops it and keeps what arrived.
///
/// # Errors
/// The store's: every source with its reason.
pub async fn pull(name: &str, refresh: bool) -> Result<ResolvedModel> {
    let options = PullOptions { refresh, ..PullOptions::from_environment()? };
    let cancel = options.cancel.clone();
    let name = name.to_owned();
    runtime::cancellable(cancel, move || {
        let context = Context::open()?;
        let progress: Box<dyn PullProgress + Send> = pull_progress();
        Ok(context.store.pull(&name, &options, &*progress)?)
    })
    .await
}
