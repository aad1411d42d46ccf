//! `forgectl bench`: speed of models and servers.

mod model;
pub mod serve;

use crate::cli::measure::{BenchArgs, BenchCommand};
use crate::failure::Result;

/// Runs a command of `bench`.
///
/// # Errors
/// What cannot be measured.
pub fn bench(args: &BenchArgs) -> Result<()> {
    match &args.command {
        BenchCommand::Model(args) => model::model(args),
        BenchCommand::Serve(args) => serve::serve(args),
    }
}
