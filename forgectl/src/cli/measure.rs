//! The commands that measure: `eval` and `bench`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use forge_shared::spec::KvCacheDtype;

use super::ListArgs;
use crate::commands::bench::serve::{Interface, Objectives, Range, parse_duration, parse_objectives};
use crate::spec_flags::{BenchKeys, MeasureKeys, SpecFlags};

/// `eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// What to measure.
    #[command(subcommand)]
    pub command: EvalCommand,
}

/// Commands of `eval`.
#[derive(Debug, Subcommand)]
pub enum EvalCommand {
    /// How well a model predicts a text
    Perplexity(PerplexityArgs),
    /// How far a model's predictions are from another's: Kullback-Leibler divergence of B from A
    Kld(KldArgs),
}

/// Which tokens are scored after which context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ProtocolName {
    /// As llama.cpp: chunks from an empty context, the second half of each scored
    Chunked,
    /// As the transformers guide: windows that advance by --stride, every token scored once
    #[value(alias = "strided")]
    Sliding,
    /// As lm-eval: disjoint windows, every token scored, also per word and byte
    Rolling,
}

/// How a text is cut.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Protocol")]
pub struct WindowFlags {
    /// Tokens of a window [default: 512 for chunked, else the model's context, at most 2048]
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// Windows to compute, at most [default: all]
    #[arg(long, value_name = "N")]
    pub chunks: Option<usize>,
    /// Tokens of the text to use, from its beginning [default: all]
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<usize>,
}

/// `eval perplexity`.
#[derive(Debug, Args)]
pub struct PerplexityArgs {
    /// Model: alias, hub id, URL or path
    pub model: String,
    /// Text in UTF-8; - reads standard input
    pub file: PathBuf,
    /// Which tokens are scored after which context; figures of different protocols cannot be compared
    #[arg(long, value_enum, default_value = "chunked", value_name = "NAME", help_heading = "Protocol")]
    pub protocol: ProtocolName,
    /// Tokens between the beginnings of sliding windows [default: a quarter of the context, at least 1]
    #[arg(long, value_name = "N", help_heading = "Protocol")]
    pub stride: Option<usize>,
    #[command(flatten)]
    pub windows: WindowFlags,
    #[command(flatten)]
    pub keys: SpecFlags<MeasureKeys>,
    #[command(flatten)]
    pub list: ListArgs,
}

/// `eval kld`.
#[derive(Debug, Args)]
pub struct KldArgs {
    /// The reference model A
    pub base: String,
    /// The model B whose divergence from A is measured; it must have the same tokenizer
    pub model: String,
    /// Text in UTF-8; - reads standard input [default: a text of 5 KB that is built in]
    pub file: Option<PathBuf>,
    /// Storage type of A's keys and values, where it is to differ from B's
    #[arg(long, value_name = "WORD", value_parser = parse_kv_cache_dtype)]
    pub base_kv_cache_dtype: Option<KvCacheDtype>,
    #[command(flatten)]
    pub windows: WindowFlags,
    #[command(flatten)]
    pub keys: SpecFlags<MeasureKeys>,
    #[command(flatten)]
    pub list: ListArgs,
}

/// A word of the key `kvCacheDtype`, checked by that key.
fn parse_kv_cache_dtype(text: &str) -> Result<KvCacheDtype, String> {
    let key = forge_shared::config::Key::by_path("kvCacheDtype").ok_or("there is no such key")?;
    serde_json::from_value(key.parse(text)?).map_err(|error| error.to_string())
}

/// `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure.
    #[command(subcommand)]
    pub command: BenchCommand,
}

/// Commands of `bench`.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Load time, prefill, decode and memory of a model, beside what this machine can do at most
    Model(BenchModelArgs),
    /// An OpenAI endpoint under load: latencies, throughput, goodput
    Serve(Box<BenchServeArgs>),
}

/// `bench serve`.
#[derive(Debug, Args)]
#[command(after_help = "Lists make a sweep: --concurrency 1,4,16 or --request-rate 0.5,1,2,4.")]
pub struct BenchServeArgs {
    /// Address of the API, up to /v1
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000/v1")]
    pub url: String,
    /// Model's name in requests [default: the first the server lists]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// API key
    #[arg(long, value_name = "KEY", env = "OPENAI_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Interface
    #[arg(long, value_enum, default_value = "completions", value_name = "NAME")]
    pub endpoint: Interface,
    /// Requests under way at once [default: 8]
    #[arg(long, value_name = "N[,N…]", value_delimiter = ',', conflicts_with = "request_rate", help_heading = "Load")]
    pub concurrency: Vec<usize>,
    /// Requests per second, arriving as a Poisson process
    #[arg(long, value_name = "R[,R…]", value_delimiter = ',', help_heading = "Load")]
    pub request_rate: Vec<f64>,
    /// Requests of each load
    #[arg(long, value_name = "N", default_value_t = 100, help_heading = "Load", value_parser = parse_count)]
    pub requests: usize,
    /// Requests before the measurement that do not count [default: as many as are under way at once]
    #[arg(long, value_name = "N", help_heading = "Load", value_parser = parse_warmup)]
    pub warmup: Option<usize>,
    /// Time a request has
    #[arg(long, value_name = "TIME", default_value = "600s", value_parser = parse_duration, help_heading = "Load")]
    pub timeout: Duration,
    /// Prompt tokens: 512, or 64-1024 for a uniform choice
    #[arg(long, value_name = "N[-N]", default_value = "512", help_heading = "Lengths")]
    pub input_tokens: Range,
    /// Answer tokens: 128, or 32-256
    #[arg(long, value_name = "N[-N]", default_value = "128", help_heading = "Lengths")]
    pub output_tokens: Range,
    /// Lengths as in conversations (ShareGPT): log-normal, means of 161 and 338 tokens
    #[arg(long, conflicts_with_all = ["input_tokens", "output_tokens"], help_heading = "Lengths")]
    pub conversations: bool,
    /// Prompts and lengths of answers from a ShareGPT JSON file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["input_tokens", "output_tokens", "conversations"], help_heading = "Lengths")]
    pub dataset: Option<PathBuf>,
    /// Let answers end where the model ends them
    #[arg(long, help_heading = "Lengths")]
    pub no_ignore_eos: bool,
    /// Seed of lengths, prompts and arrivals
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Lengths")]
    pub seed: u64,
    /// Objectives of goodput, such as ttft:200ms,itl:50ms,e2e:5s
    #[arg(long, value_name = "LIST", value_parser = parse_objectives)]
    pub slo: Option<Objectives>,
    /// Write a plot of the times
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
    #[command(flatten)]
    pub output: ListArgs,
}

/// Requests are drawn before the first is sent, so their number has an end.
const MOST_REQUESTS: usize = 1_000_000;

fn parse_count(text: &str) -> Result<usize, String> {
    count_from(1, text)
}

fn parse_warmup(text: &str) -> Result<usize, String> {
    count_from(0, text)
}

fn count_from(least: usize, text: &str) -> Result<usize, String> {
    let count = text.parse::<usize>().ok().filter(|count| (least..=MOST_REQUESTS).contains(count));
    count.ok_or_else(|| format!("{text:?} must be a whole number from {least} to {MOST_REQUESTS}"))
}

/// `bench model`.
#[derive(Debug, Args)]
pub struct BenchModelArgs {
    /// Model: alias, hub id, URL or path [default: the catalogue's default]
    pub model: Option<String>,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub prefill: usize,
    /// Tokens decoded after it
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub decode: usize,
    /// Sequences of the batch
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub batch: usize,
    /// Times everything is measured; medians are shown
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub rounds: usize,
    #[command(flatten)]
    pub keys: SpecFlags<BenchKeys>,
    #[command(flatten)]
    pub list: ListArgs,
}
