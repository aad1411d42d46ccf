//! `forgectl rm`.

use indicatif::HumanBytes;

use crate::cli::RmArgs;
use crate::context::Context;
use crate::failure::Result;
use crate::output::print_text;

/// Removes each model.
///
/// # Errors
/// The first that is not there or in use; those before it are removed.
pub fn rm(args: &RmArgs) -> Result<()> {
    let context = Context::open()?;
    for name in &args.models {
        let removed = context.store.remove(name)?;
        print_text(&format!("removed {}, {} freed\n", removed.name, HumanBytes(removed.freed_bytes)))?;
    }
    Ok(())
}
