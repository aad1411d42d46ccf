//! `forge-worker`: a worker as a process of a cluster. It reads its configuration, joins where it has no certificate yet,
//! and runs until a signal ends it; the parts are the library's.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use forge_cluster::config::{self, WorkerConfig};
use forge_cluster::signals;
use forge_cluster::tls::SharedCredentials;
use forge_cluster::tracing::start_with;
use forge_shared::cluster::node::Role;
use forge_store::ForgeHome;
use forge_worker::logs::LogRing;
use forge_worker::process::{WorkerOptions, run};

/// A join may have to wait for a group that is just being set up.
const JOIN_TIMEOUT: Duration = Duration::from_secs(60);

/// Owns this machine's devices and runs replicas of models on them, as the cluster's coordinators say.
#[derive(Debug, Parser)]
#[command(name = "forge-worker", version)]
struct Arguments {
    /// Configuration file (kind: Worker); docs/cluster.md explains its keys.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Sets a key, over file and environment.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    assignments: Vec<String>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let config: WorkerConfig = match config::load(arguments.config.as_deref(), &arguments.assignments) {
        Ok(config) => config,
        Err(error) => {
            let help = error.help().map(|help| format!("\n  {help}")).unwrap_or_default();
            eprintln!("error: {error}{help}");
            return ExitCode::from(2);
        }
    };
    match start(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            if arguments.config.is_none() {
                eprintln!("  {}", config::no_file_help::<WorkerConfig>());
            }
            ExitCode::FAILURE
        }
    }
}

fn start(config: WorkerConfig) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start threads")?;
    let ended = runtime.block_on(work(config));
    // Blocking work that is left (a pull that was cancelled) must not hold the process, whatever ended it.
    runtime.shutdown_timeout(Duration::from_secs(2));
    ended
}

async fn work(config: WorkerConfig) -> Result<()> {
    // From here on a signal drains, also while it joins.
    let mut stop = std::pin::pin!(signals::first_of_two().context("signals")?);
    let logs = Arc::new(LogRing::default());
    let _telemetry = start_with(&config.telemetry.options("forge-worker", &config.name), Box::new(logs.layer()))?;
    std::fs::create_dir_all(&config.data_dir).with_context(|| format!("dataDir: cannot make {}", config.data_dir.display()))?;
    let entry = tokio::select! {
        entry = config.membership.enter(Role::Worker, &config.name, &config.coordinators, JOIN_TIMEOUT) => entry.map_err(|reason| anyhow!(reason))?,
        () = &mut stop => return Ok(()),
    };
    let mut coordinators = config.coordinators.clone();
    coordinators.extend(entry.coordinators.into_iter().filter(|address| !config.coordinators.contains(address)));
    let home = match &config.models_dir {
        Some(folder) => ForgeHome::at(folder),
        None => ForgeHome::discover()?,
    };
    let options = WorkerOptions {
        name: config.name.clone(),
        data_dir: config.data_dir.clone(),
        credentials_dir: config.membership.directory.clone(),
        home,
        is_offline: config.is_offline,
        listen: address("listen", &config.listen)?,
        advertise: config.advertise.clone(),
        metrics_listen: address("metricsListen", &config.metrics_listen)?,
        data_plane: config.data_plane.clone(),
        coordinators,
        credentials: SharedCredentials::new(entry.credentials),
        devices: config.devices.clone(),
        reserve_bytes: config.reserve.0,
        drain_timeout: Duration::from_secs(config.drain_timeout_s),
    };
    run(options, logs, stop).await.map_err(anyhow::Error::from)
}

fn address(key: &str, text: &str) -> Result<SocketAddr> {
    let mut found = text.to_socket_addrs().with_context(|| format!("{key}: {text:?} is no address of this machine"))?;
    found.next().with_context(|| format!("{key}: {text:?} has no address"))
}
