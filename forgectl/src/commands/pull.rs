//! `forgectl pull`.

use indicatif::HumanBytes;

use crate::cli::PullArgs;
use crate::context::{self, Context};
use crate::failure::Result;
use crate::output::print_text;
use crate::runtime;
use crate::support;

/// Fetches each model in turn.
///
/// # Errors
/// The first that could not be fetched.
pub fn pull(args: &PullArgs) -> Result<()> {
    let context = Context::open()?;
    let runtime = runtime::start()?;
    let default = [context.store.catalogue().default_alias().to_owned()];
    let models = if args.models.is_empty() { &default[..] } else { &args.models[..] };
    for name in models {
        if let Some((alias, entry)) = context.store.catalogue().find(name)
            && !support::runs(&entry.architecture)
        {
            eprintln!("note: {}", support::unsupported(alias, entry));
        }
        let model = runtime.block_on(context::pull(name, args.refresh))?;
        let size = HumanBytes(model.size_bytes());
        print_text(&format!("{}  {size}  {}\n", model.name(), model.digest()))?;
    }
    Ok(())
}
