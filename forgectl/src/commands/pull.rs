//! `forgectl pull`.

use indicatif::HumanBytes;

use crate::cli::PullArgs;
use crate::context;
use crate::failure::Result;
use crate::output::print_text;
use crate::runtime;

/// Fetches each model in turn.
///
/// # Errors
/// The first that could not be fetched.
pub fn pull(args: &PullArgs) -> Result<()> {
    let runtime = runtime::start()?;
    for name in &args.models {
        let model = runtime.block_on(context::pull(name, args.refresh))?;
        let size = HumanBytes(model.size_bytes());
        print_text(&format!("{}  {size}  {}\n", model.name(), model.digest()))?;
    }
    Ok(())
}
