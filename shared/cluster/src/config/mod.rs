//! Configuration files of the cluster's processes: one document per process, the same layers and errors for all.
//!
//! What it is not: what is served is a `ModelService`, applied with `forgectl apply`; here stands only what a process
//! must know before it can ask the coordinators.
//!
//! Invariant: every file under `cluster-configs/` is one of these, and is loaded by a test.

mod context;
mod coordinator;
mod entry;
mod gateway;
#[cfg(test)]
mod tests;
mod worker;

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use forge_shared::config::{ConfigError, Format, ProcessConfig, ProcessLayers};
use serde::{Deserialize, Serialize};

use crate::tracing::{LogFormat, TelemetryOptions};

pub use context::ContextFile;
pub use coordinator::CoordinatorConfig;
pub use entry::Entry;
pub use gateway::GatewayFile;
pub use worker::{DataPlaneConfig, DeclaredDevice, WorkerConfig};

/// Largest configuration file.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// How a process gets in: certificates on disk, or a token for its first start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct Membership {
    /// Folder of `node.pem` and `ca.pem` (a coordinator's also `ca.key`). Made at the first start, by joining.
    pub directory: PathBuf,
    /// Join token of `forgectl cluster join-token`, for the first start.
    pub token: Option<String>,
    /// File with the join token.
    pub token_file: Option<PathBuf>,
}

impl Default for Membership {
    fn default() -> Self {
        Membership { directory: PathBuf::from("tls"), token: None, token_file: None }
    }
}

/// Logs and traces.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct TelemetryConfig {
    /// Level or list such as `info,forge_worker=debug`.
    pub log: String,
    /// Log lines as JSON objects.
    pub is_json: bool,
    /// `http://host:4317` of an OTLP receiver for traces; absent: none are sent.
    pub otlp_endpoint: Option<String>,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        TelemetryConfig { log: "info".into(), is_json: false, otlp_endpoint: None }
    }
}

impl TelemetryConfig {
    /// For [`crate::tracing::start`]. `service` is the program's name, `instance` the process's name in the cluster.
    pub fn options(&self, service: &str, instance: &str) -> TelemetryOptions {
        TelemetryOptions {
            service: service.into(),
            instance: instance.into(),
            otlp_endpoint: self.otlp_endpoint.clone(),
            log_filter: self.log.clone(),
            log_format: if self.is_json { LogFormat::Json } else { LogFormat::Text },
        }
    }
}

impl Membership {
    /// The join token, from wherever it is given.
    ///
    /// # Errors
    /// A file that cannot be read, or that everybody can, in words.
    pub fn read_token(&self) -> Result<Option<String>, String> {
        if let Some(token) = &self.token {
            return Ok(Some(token.clone()));
        }
        let Some(path) = &self.token_file else { return Ok(None) };
        let shown = path.display();
        let failed = |error: std::io::Error| format!("tokenFile {shown}: {error}");
        let mode = std::fs::metadata(path).map_err(failed)?.permissions().mode();
        if mode & 0o007 != 0 {
            let mode = mode & 0o777;
            return Err(format!(
                "tokenFile {shown}: its mode is {mode:o}, so that any user of this machine can join with it: `chmod 600 {shown}`"
            ));
        }
        read_bounded(path).map(|text| Some(text.trim().to_owned())).map_err(failed)
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        if self.token.is_some() && self.token_file.is_some() {
            return Err(("membership.token", "a token is given in membership.tokenFile too: keep one of the two".into()));
        }
        Ok(())
    }
}

/// Reads a process's configuration: the file, this process's `FORGE_<ROLE>_*` variables, then `key=value` assignments.
///
/// # Errors
/// [`ConfigError`] naming the layer and the key.
pub fn load<T: ProcessConfig>(file: Option<&std::path::Path>, assignments: &[String]) -> Result<T, ConfigError> {
    let file = match file {
        None => None,
        Some(path) => {
            let origin = path.display().to_string();
            let text = read_bounded(path)
                .map_err(|error| ConfigError::Document { origin: origin.clone(), reason: format!("cannot be read: {error}") })?;
            Some((text.clone(), Format::detect(&origin, &text), origin))
        }
    };
    let environment = std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    ProcessLayers { file, environment: environment.collect(), assignments: assignments.to_vec() }.resolve()
}

fn read_bounded(path: &std::path::Path) -> std::io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_FILE_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

/// That an address has the form `host:port`.
///
/// # Errors
/// What to write instead.
pub fn check_host_port(address: &str) -> Result<(), String> {
    let (host, port) = address.rsplit_once(':').unwrap_or_default();
    if host.is_empty() || port.parse::<u16>().is_err() || address.contains(['/', ' ']) {
        return Err(format!("{address:?} is no address: write host:port, such as 10.0.0.1:7000"));
    }
    Ok(())
}

/// As [`check_host_port`]; `key` is named where it is not.
fn check_address(key: &'static str, address: &str) -> Result<(), (&'static str, String)> {
    check_host_port(address).map_err(|reason| (key, reason))
}

/// What a process says that fails and was given no file: its defaults are seldom what is meant.
pub fn no_file_help<T: ProcessConfig>() -> String {
    format!(
        "no --config FILE was given, so all settings are defaults, FORGE_{}_* variables and --set; `kind: {}` files are in docs/cluster.md",
        T::KIND.to_ascii_uppercase(),
        T::KIND
    )
}

/// That the address where others reach a process is one that they can dial; absent, it is the address it listens at.
fn check_advertise(listen: &str, advertise: Option<&str>) -> Result<(), (&'static str, String)> {
    let address = advertise.unwrap_or(listen);
    check_address("advertise", address)?;
    match (is_everywhere(address), advertise) {
        (false, _) => Ok(()),
        (true, None) => Err(("advertise", "is missing: with a listen address of all interfaces, say where other hosts reach it".into())),
        (true, Some(_)) => Err(("advertise", format!("{address:?} is no address to dial: say where other hosts reach it"))),
    }
}

/// Whether an address is that of all interfaces, which nobody can dial.
fn is_everywhere(address: &str) -> bool {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    matches!(host.trim_matches(['[', ']']).parse::<std::net::IpAddr>(), Ok(ip) if ip.is_unspecified())
}

fn check_name(name: &str) -> Result<(), (&'static str, String)> {
    crate::tls::check_name("name", name).map_err(|error| ("name", error.to_string()))
}
