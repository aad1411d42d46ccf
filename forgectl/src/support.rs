//! Which models of the catalogue this build can run, before anything is pulled.

use forge_model::Model;
use forge_model::arch::families::FAMILIES;
use forge_store::CatalogueEntry;

use crate::context::Context;
use crate::failure::{Exit, Failure, Result};

/// Whether this build runs models of an architecture, as the model's own config names it.
pub fn runs(architecture: &str) -> bool {
    FAMILIES.iter().any(|family| family.model_types.contains(&architecture))
}

/// Refuses a catalogue model that could be pulled but not run. Other names are judged by their files, later.
///
/// # Errors
/// The architecture, with where to find others.
pub fn check(context: &Context, model: &str) -> Result<()> {
    match context.store.catalogue().find(model) {
        Some((alias, entry)) if !runs(&entry.architecture) => {
            Err(Failure::new(unsupported(alias, entry)).help("`forgectl catalogue` shows which models run").exit(Exit::Failed))
        }
        _ => Ok(()),
    }
}

/// Says so where a model's files name another family than the one they are read as.
pub fn tell_override(model: &Model) {
    if let Some(said) = model.overridden_family() {
        let family = model.architecture().family;
        eprintln!("note: the files say {said}, and --arch has them read as {family}; answers are wrong if they are none");
    }
}

/// The sentence about a model that does not run.
pub fn unsupported(alias: &str, entry: &CatalogueEntry) -> String {
    format!("this version does not run {alias} yet: its architecture is {}", entry.architecture)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_runs_and_a_made_up_architecture_does_not() {
        let catalogue = forge_store::Catalogue::built_in().expect("tested there");
        let (_, default) = catalogue.find(catalogue.default_alias()).expect("named by the catalogue");
        assert!(runs(&default.architecture));
        assert!(runs("gpt2") && runs("qwen2") && !runs("abacus"));
    }

    #[test]
    fn the_manual_lists_the_catalogue() {
        let manual = include_str!("../../docs/models.md");
        for (alias, entry) in forge_store::Catalogue::built_in().expect("tested there").entries() {
            let runs = if runs(&entry.architecture) { "yes" } else { "not yet" };
            let row = format!("| `{alias}` | {} | {runs} |", entry.architecture);
            assert!(manual.contains(&row), "docs/models.md lacks this row: {row}");
        }
    }
}
