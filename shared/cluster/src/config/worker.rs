//! A worker's configuration.

use std::path::PathBuf;

use forge_shared::cluster::node::{DataTransport, DeviceInfo, DeviceKind};
use forge_shared::config::ProcessConfig;
use forge_shared::spec::ByteSize;
use serde::{Deserialize, Serialize};

use super::{Membership, TelemetryConfig, check_address, check_advertise, check_host_port, check_name, is_everywhere};

/// Devices a node may declare.
const MAX_DEVICES: usize = 64;
/// Longest time for requests under way.
const MAX_DRAIN_S: u64 = 3_600;

/// What a worker must know to start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct WorkerConfig {
    /// Its name, as in its certificate; the node's name in the cluster.
    pub name: String,
    /// `host:port` of coordinators; more are learned from them.
    pub coordinators: Vec<String>,
    /// Folder of state: incarnation, logs.
    pub data_dir: PathBuf,
    /// Folder of models, as `FORGE_HOME`; absent: `FORGE_HOME`.
    pub models_dir: Option<PathBuf>,
    /// Address of the engine service.
    pub listen: String,
    /// `host:port` where gateways reach it; absent: `listen`.
    pub advertise: Option<String>,
    /// Address of metrics and probes.
    pub metrics_listen: String,
    /// Where other workers reach this one to exchange activations.
    pub data_plane: DataPlaneConfig,
    /// Devices to offer instead of those that are found: shares of this machine, never exceeded. Empty: what is found.
    pub devices: Vec<DeclaredDevice>,
    /// Memory that is left to the system on each device that is found.
    pub reserve: ByteSize,
    /// Never fetch models: serve only what is in the store.
    pub is_offline: bool,
    /// Time running requests have after SIGTERM, seconds.
    pub drain_timeout_s: u64,
    /// Certificates and join token.
    pub membership: Membership,
    /// Logs and traces.
    pub telemetry: TelemetryConfig,
}

/// The port for what ranks on several workers say to each other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "camelCase", deny_unknown_fields)]
pub struct DataPlaneConfig {
    /// `host:port` to listen at; absent: with `quic` the UDP port of the same number as `listen`, with `tcp` any port of its host.
    pub listen: Option<String>,
    /// `host:port` where other workers reach it; absent: the host of `advertise` (or `listen`) and the port it listens at.
    pub advertise: Option<String>,
    /// `quic` (UDP), or `tcp` where UDP is blocked; the same on all workers.
    pub transport: DataTransport,
}

impl DataPlaneConfig {
    fn check(&self) -> Result<(), (&'static str, String)> {
        if let Some(listen) = &self.listen {
            check_host_port(listen).map_err(|reason| ("dataPlane.listen", reason))?;
        }
        if let Some(advertise) = &self.advertise {
            check_host_port(advertise).map_err(|reason| ("dataPlane.advertise", reason))?;
            if is_everywhere(advertise) {
                let reason = format!("{advertise:?} is no address to dial: say where other workers reach it");
                return Err(("dataPlane.advertise", reason));
            }
        }
        Ok(())
    }
}

/// A device that is declared rather than found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DeclaredDevice {
    /// `cpu`, `cuda` or `metal`.
    #[serde(default = "cpu")]
    pub kind: DeviceKind,
    /// Cores (CPU) or multiprocessors (GPU).
    pub cores: u32,
    /// Memory Forge may use.
    pub memory: ByteSize,
    /// NUMA node it belongs to.
    #[serde(default)]
    pub numa_node: Option<u32>,
}

fn cpu() -> DeviceKind {
    DeviceKind::Cpu
}

impl DeclaredDevice {
    /// As the node tells it to the cluster.
    pub fn info(&self, index: u32) -> DeviceInfo {
        DeviceInfo {
            index,
            kind: self.kind,
            name: "declared".into(),
            cores: self.cores,
            numa_node: self.numa_node,
            instruction_sets: Vec::new(),
            memory_bytes: self.memory.0,
            read_bandwidth_bytes_per_s: 0,
            matrix_flops: 0,
            is_virtual: true,
            cannot_run: None,
        }
    }
}

impl Default for WorkerConfig {
    fn default() -> Self {
        WorkerConfig {
            name: "w1".into(),
            coordinators: vec!["127.0.0.1:7000".into()],
            data_dir: PathBuf::from("worker"),
            models_dir: None,
            listen: "127.0.0.1:7100".into(),
            advertise: None,
            metrics_listen: "127.0.0.1:7101".into(),
            data_plane: DataPlaneConfig::default(),
            devices: Vec::new(),
            reserve: ByteSize(256 << 20),
            is_offline: false,
            drain_timeout_s: 30,
            membership: Membership::default(),
            telemetry: TelemetryConfig::default(),
        }
    }
}

impl WorkerConfig {
    /// `host:port` where gateways reach it.
    pub fn address(&self) -> &str {
        self.advertise.as_deref().unwrap_or(&self.listen)
    }

    /// The declared devices as the node tells them to the cluster.
    pub fn declared(&self) -> Vec<DeviceInfo> {
        self.devices.iter().zip(0..).map(|(device, index)| device.info(index)).collect()
    }
}

impl ProcessConfig for WorkerConfig {
    const KIND: &'static str = "Worker";

    fn example() -> Self {
        let device = DeclaredDevice { kind: DeviceKind::Cpu, cores: 1, memory: ByteSize(1), numa_node: None };
        let address = || Some("127.0.0.1:1".to_owned());
        let data_plane = DataPlaneConfig { listen: address(), advertise: address(), transport: DataTransport::Quic };
        WorkerConfig { devices: vec![device], data_plane, ..WorkerConfig::default() }
    }

    fn check(&self) -> Result<(), (&'static str, String)> {
        check_name(&self.name)?;
        if self.coordinators.is_empty() {
            return Err(("coordinators", "is empty: name at least one coordinator as host:port".into()));
        }
        self.coordinators.iter().try_for_each(|address| check_address("coordinators", address))?;
        check_address("listen", &self.listen)?;
        check_advertise(&self.listen, self.advertise.as_deref())?;
        check_address("metricsListen", &self.metrics_listen)?;
        self.data_plane.check()?;
        if self.devices.len() > MAX_DEVICES {
            return Err(("devices", format!("{} devices; at most {MAX_DEVICES}", self.devices.len())));
        }
        if self.devices.iter().any(|device| device.cores == 0 || device.memory.0 == 0) {
            return Err(("devices", "every device needs cores and memory of at least 1".into()));
        }
        if self.drain_timeout_s > MAX_DRAIN_S {
            return Err(("drainTimeoutS", format!("must be at most {MAX_DRAIN_S}: an hour")));
        }
        self.membership.check()
    }
}
