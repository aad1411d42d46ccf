//! Commands about the change of a model service from one generation to the next.

use clap::{Args, Subcommand};

use super::cluster::ServerArgs;
use crate::output::OutputFormat;

/// `rollout`.
#[derive(Debug, Args)]
pub struct RolloutArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: RolloutCommand,
}

/// Commands of `rollout`.
#[derive(Debug, Subcommand)]
pub enum RolloutCommand {
    /// Show how far a change is, until it is done or stuck
    Status {
        /// Which, as model/NAME or NAME
        target: String,
        /// Show it once and end
        #[arg(long)]
        no_wait: bool,
        /// Longest wait, seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
        timeout: u64,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Go back to an earlier wish, as a new generation; the number of replicas and the strategy stay
    Undo {
        /// Which, as model/NAME or NAME
        target: String,
        /// Generation to go back to [default: the one before]
        #[arg(long, value_name = "N")]
        to_generation: Option<u64>,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// List the wishes there are to go back to
    History {
        /// Which, as model/NAME or NAME
        target: String,
        /// Show the document of this generation
        #[arg(long, value_name = "N")]
        generation: Option<u64>,
        /// Form of the output
        #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
        output: OutputFormat,
        #[command(flatten)]
        server: ServerArgs,
    },
}
