//! `forge-gateway`: speaks the OpenAI API for a cluster.
//!
//! What it is not: it holds no logic; it reads the configuration, starts logs and traces, and turns signals into a stop.
//!
//! Invariant: the first SIGTERM or SIGINT drains within a bound, the second stops at once.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use forge_cluster::config::{self, GatewayFile};
use forge_cluster::signals;
use forge_gateway::{GatewayConfig, GatewayError, process};

/// Speaks the OpenAI API for a cluster: finds its models, keys and replicas through the coordinators.
#[derive(Debug, Parser)]
#[command(name = "forge-gateway", version)]
struct Arguments {
    /// Configuration file (`kind: Gateway`); docs/cluster.md explains its keys.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// One key of the configuration, over the file.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    assignments: Vec<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let file: GatewayFile<GatewayConfig> = match config::load(arguments.config.as_deref(), &arguments.assignments) {
        Ok(file) => file,
        Err(error) => {
            let help = error.help().map(|help| format!("\n  {help}")).unwrap_or_default();
            eprintln!("error: {error}{help}");
            return ExitCode::from(2);
        }
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("error: no threads: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = match runtime.block_on(run(file)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if arguments.config.is_none() {
                eprintln!("  {}", config::no_file_help::<GatewayFile<GatewayConfig>>());
            }
            ExitCode::FAILURE
        }
    };
    // A blocking task that hangs must not keep the process.
    runtime.shutdown_background();
    code
}

async fn run(file: GatewayFile<GatewayConfig>) -> Result<(), GatewayError> {
    let start = |reason: String| GatewayError::Cluster { reason };
    // From here on, so that a signal while joining is not lost.
    let shutdown = signals::first_of_two().map_err(|error| start(format!("no signals: {error}")))?;
    let telemetry = forge_cluster::tracing::start(&file.telemetry.options("forge-gateway", &file.name));
    let telemetry = telemetry.map_err(|error| start(error.to_string()))?;
    let result = process::run(file, shutdown).await;
    drop(telemetry);
    result
}
