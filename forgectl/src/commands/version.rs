//! `forgectl version`.

use forge_store::ForgeHome;
use serde::Serialize;

use crate::cli::ListArgs;
use crate::failure::Result;
use crate::output::print_facts;

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Version {
    version: &'static str,
    target: String,
    home: String,
    api_version: &'static str,
}

/// Prints the version and where this installation keeps its state.
///
/// # Errors
/// If there is no usable home folder.
pub fn version(args: &ListArgs) -> Result<()> {
    let version = Version {
        version: env!("CARGO_PKG_VERSION"),
        target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
        home: ForgeHome::discover()?.root().display().to_string(),
        api_version: forge_shared::spec::API_VERSION,
    };
    let facts = [
        ("version", version.version.to_owned()),
        ("target", version.target.clone()),
        ("home", version.home.clone()),
        ("specification", version.api_version.to_owned()),
    ];
    print_facts(args.output, &version, &facts)
}
