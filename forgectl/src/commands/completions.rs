//! `forgectl completions`.

use clap::CommandFactory;

use crate::cli::{Cli, CompletionsArgs};
use crate::failure::Result;
use crate::output::print_text;

/// Prints a shell's script for the name by which the program was called.
///
/// # Errors
/// If standard output cannot be written.
pub fn completions(args: &CompletionsArgs, program: &str) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), program, &mut script);
    print_text(&String::from_utf8_lossy(&script))
}
