//! `forge-coordinator`: one member of the cluster's raft group.
//!
//! What it is not: it holds no logic; it reads the configuration, starts logs and traces, and turns signals into a stop.
//!
//! Invariant: the first SIGTERM or SIGINT hands leadership over and stops within a bound, the second stops at once.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use forge_cluster::config::{self, CoordinatorConfig};
use forge_cluster::signals;
use forge_coordinator::{CertificateOptions, CoordinatorError, MemberFile, RunOptions, Surroundings, prepare, restore};

/// A member of the cluster's raft group: holds the cluster's state and decides what runs where.
#[derive(Debug, Parser)]
#[command(name = "forge-coordinator", version)]
struct Arguments {
    /// Configuration file (`kind: Coordinator`), as `forgectl cluster init` writes it; docs/cluster.md explains its keys.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// One key of the configuration, over the file.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    assignments: Vec<String>,
    /// Found a new cluster, of which this is the first coordinator. For the first start; no effect on later ones.
    #[arg(long)]
    bootstrap: bool,
    /// Make the data folder a new group of one from a backup, and end. The folder must be empty.
    #[arg(long, value_name = "BACKUP", conflicts_with = "bootstrap")]
    restore: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config: CoordinatorConfig = match config::load(arguments.config.as_deref(), &arguments.assignments) {
        Ok(config) => config,
        Err(error) => {
            let help = error.help().map(|help| format!("\n  {help}")).unwrap_or_default();
            eprintln!("error: {error}{help}");
            return ExitCode::from(2);
        }
    };
    if let Some(backup) = &arguments.restore {
        return match restore(backup, &config.data_dir) {
            Ok(header) => {
                println!("{}", header.restored_into(&config.data_dir));
                ExitCode::SUCCESS
            }
            Err(error) => fail(&error),
        };
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&CoordinatorError::Start { reason: format!("no runtime: {error}") }),
    };
    let code = match runtime.block_on(run(&config, arguments.bootstrap)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = fail(&error);
            if arguments.config.is_none() {
                eprintln!("  {}", config::no_file_help::<CoordinatorConfig>());
            }
            code
        }
    };
    runtime.shutdown_timeout(Duration::from_secs(2));
    code
}

fn fail(error: &CoordinatorError) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::FAILURE
}

async fn run(config: &CoordinatorConfig, founds_group: bool) -> Result<(), CoordinatorError> {
    let start = |reason: String| CoordinatorError::Start { reason };
    let mut asked = std::pin::pin!(signals::first_of_two().map_err(|error| start(format!("signals: {error}")))?);
    // Kept to the end: it sends the last spans.
    let _telemetry = forge_cluster::tracing::start(&config.telemetry.options("forge-coordinator", &config.name))
        .map_err(|error| start(error.to_string()))?;
    // Who is a member needs no token any more: it may have been deleted.
    let is_member = MemberFile::load(&config.data_dir)?.is_some();
    let join_token = if is_member { None } else { config.membership.read_token().map_err(start)? };
    let options = RunOptions {
        name: config.name.clone(),
        listen: resolve("listen", &config.listen)?,
        address: config.address().to_owned(),
        metrics: Some(resolve("metricsListen", &config.metrics_listen)?),
        data_dir: config.data_dir.clone(),
        tls_dir: config.membership.directory.clone(),
        founds_group,
        join_token,
        lease: Duration::from_millis(config.lease_ms),
        heartbeat: Duration::from_millis(config.heartbeat_ms),
        surroundings: Surroundings::default(),
        certificates: CertificateOptions { life: Duration::from_secs(config.certificate_life_s), ..CertificateOptions::default() },
        build: forge_cluster::build::of_this_process().map_err(start)?,
    };
    let prepared = tokio::select! {
        prepared = prepare(options) => prepared?,
        () = &mut asked => return Ok(()),
    };
    prepared.run(asked).await
}

fn resolve(key: &str, address: &str) -> Result<SocketAddr, CoordinatorError> {
    let unknown = |reason: String| CoordinatorError::Start { reason: format!("{key}: {address:?}: {reason}") };
    let mut found = address.to_socket_addrs().map_err(|error| unknown(error.to_string()))?;
    found.next().ok_or_else(|| unknown("it names no address".into()))
}
