//! What this machine offers: its CPU with measured speeds, its GPUs, or the shares that the configuration declares.
//!
//! What it is not: it reserves nothing ([`crate::ledger`] does), and what cannot be found out is left at 0, never guessed.
//!
//! Invariant: it never fails and never hangs: a machine without some file, driver or permission has fewer facts.

mod cuda;
mod speeds;

use std::path::Path;

use forge_cluster::config::DeclaredDevice;
use forge_kernels::CpuPath;
use forge_shared::cluster::node::{DeviceInfo, DeviceKind};
use forge_shared::ids::NodeId;

use crate::ledger::LedgerDevice;
use crate::{machine, threads};

pub use cuda::{CudaDevice, cuda_devices};
pub use speeds::Speeds;

/// Kernels of a worker run this much below everything else of the machine's (`nice`).
const NICENESS: u8 = 5;

/// Instruction sets worth telling, as `/proc/cpuinfo` names them.
const INSTRUCTION_SETS: [&str; 14] = [
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512bw",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
    "sve",
    "i8mm",
];

/// What to look for.
#[derive(Debug, Clone, Copy, Default)]
pub struct ProbeWish<'a> {
    /// Shares of the machine instead of what is found; empty looks.
    pub declared: &'a [DeclaredDevice],
    /// Bytes that are left to the system where devices are found.
    pub reserve_bytes: u64,
    /// Folder for measured speeds, which are measured once for each CPU and number of threads; `None` leaves them at 0.
    pub cache: Option<&'a Path>,
}

/// A node's devices, as told to the cluster and as held to.
#[derive(Debug, Clone)]
pub struct NodeDevices {
    /// For the hello.
    pub infos: Vec<DeviceInfo>,
    /// For the ledger: those that this build can compute on.
    pub ledger: Vec<LedgerDevice>,
}

/// Finds the machine's devices, or makes those that are declared.
pub fn devices(node: &NodeId, wish: &ProbeWish<'_>) -> NodeDevices {
    let ProbeWish { declared, cache, .. } = *wish;
    let cores = threads::allowed_cores();
    let cpu = Cpu::read(Path::new("/proc/cpuinfo"), Path::new("/sys/devices/system/node"));
    if declared.is_empty() {
        return found(&cpu, &cores, wish);
    }
    let mut next = first_core(node, cores.len());
    let mut devices = NodeDevices { infos: Vec::new(), ledger: Vec::new() };
    for (index, device) in declared.iter().enumerate() {
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        let count = usize::try_from(device.cores).unwrap_or(usize::MAX).clamp(1, cores.len().max(1));
        if device.kind == DeviceKind::Cpu && count < device.cores as usize {
            tracing::warn!(device = index, declared = device.cores, cores = count, "this machine has fewer cores than are declared");
        }
        let is_cpu = device.kind == DeviceKind::Cpu;
        let speeds = if is_cpu { Speeds::of(&cpu.name, count, cache) } else { Speeds::default() };
        let mut info = device.info(index);
        if is_cpu {
            info.name.clone_from(&cpu.name);
            info.cores = u32::try_from(count).unwrap_or(u32::MAX);
            info.numa_node = info.numa_node.or(cpu.numa_node);
            info.instruction_sets.clone_from(&cpu.instruction_sets);
            info.read_bandwidth_bytes_per_s = speeds.read_bandwidth_bytes_per_s;
            info.matrix_flops = speeds.matrix_flops;
        } else {
            info.cannot_run = Some(no_kernels(device.kind));
        }
        if is_cpu {
            let own = (0..count).map(|offset| cores[(next + offset) % cores.len()]).collect();
            next += count;
            devices.ledger.push(LedgerDevice::of(&info, own, NICENESS));
        }
        devices.infos.push(info);
    }
    devices
}

/// The CPU of this machine with its free memory, for a node inside `forgectl`: measured speeds and GPUs, which take a while
/// to look at, are left out.
pub fn cpu_alone() -> DeviceInfo {
    let cpu = Cpu::read(Path::new("/proc/cpuinfo"), Path::new("/sys/devices/system/node"));
    let view = machine::cpu_device(NodeId::from("local"));
    cpu.info(view.threads, view.free_bytes.0, &Speeds::default())
}

fn found(cpu: &Cpu, cores: &[usize], wish: &ProbeWish<'_>) -> NodeDevices {
    let speeds = Speeds::of(&cpu.name, cores.len(), wish.cache);
    let info = cpu.info(cores.len(), machine::free_bytes().saturating_sub(wish.reserve_bytes), &speeds);
    // Its threads go where the system puts them: the whole machine is theirs.
    let ledger = vec![LedgerDevice::of(&info, Vec::new(), NICENESS)];
    let gpus = cuda_devices().into_iter().zip(1..).map(|(gpu, index)| DeviceInfo {
        index,
        kind: DeviceKind::Cuda,
        name: format!("{} ({} GiB)", gpu.name, gpu.memory_bytes >> 30),
        cores: gpu.multiprocessors,
        numa_node: None,
        instruction_sets: vec![format!("sm_{}{}", gpu.capability.0, gpu.capability.1)],
        // Told to operators, and never planned with.
        memory_bytes: 0,
        read_bandwidth_bytes_per_s: 0,
        matrix_flops: 0,
        is_virtual: false,
        cannot_run: Some(no_kernels(DeviceKind::Cuda)),
    });
    NodeDevices { infos: std::iter::once(info).chain(gpus).collect(), ledger }
}

/// Why nothing runs on a device of this kind.
fn no_kernels(kind: DeviceKind) -> String {
    format!("this build of forge-worker has no kernels for {}", format!("{kind:?}").to_lowercase())
}

/// Where a node's declared cores begin, so that workers of one host spread over it.
fn first_core(node: &NodeId, cores: usize) -> usize {
    let sum = node.0.bytes().fold(0_usize, |sum, byte| sum.wrapping_mul(31).wrapping_add(usize::from(byte)));
    sum % cores.max(1)
}

/// What the system says of the CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Cpu {
    name: String,
    instruction_sets: Vec<String>,
    /// Where the machine has but one.
    numa_node: Option<u32>,
}

impl Cpu {
    fn read(cpuinfo: &Path, nodes: &Path) -> Self {
        let text = std::fs::read_to_string(cpuinfo).unwrap_or_default();
        let numa_nodes: Vec<u32> = std::fs::read_dir(nodes)
            .into_iter()
            .flatten()
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("node")?.parse().ok())
            .collect();
        let numa_node = match numa_nodes.as_slice() {
            [only] => Some(*only),
            _ => None,
        };
        Cpu { numa_node, ..Cpu::parse(&text) }
    }

    /// All of it as a device.
    fn info(&self, cores: usize, memory_bytes: u64, speeds: &Speeds) -> DeviceInfo {
        DeviceInfo {
            index: 0,
            kind: DeviceKind::Cpu,
            name: self.name.clone(),
            cores: u32::try_from(cores).unwrap_or(u32::MAX),
            numa_node: self.numa_node,
            instruction_sets: self.instruction_sets.clone(),
            memory_bytes,
            read_bandwidth_bytes_per_s: speeds.read_bandwidth_bytes_per_s,
            matrix_flops: speeds.matrix_flops,
            is_virtual: false,
            cannot_run: None,
        }
    }

    fn parse(cpuinfo: &str) -> Self {
        let field = |names: &[&str]| {
            cpuinfo.lines().find_map(|line| {
                let (name, value) = line.split_once(':')?;
                names.contains(&name.trim()).then(|| value.trim().to_owned())
            })
        };
        let flags = field(&["flags", "Features"]).unwrap_or_default();
        let flags: std::collections::BTreeSet<&str> = flags.split_whitespace().collect();
        let mut instruction_sets: Vec<String> =
            INSTRUCTION_SETS.iter().filter(|name| flags.contains(**name)).map(|name| name.replace('_', "-")).collect();
        if flags.is_empty() {
            // Other systems do not have the file; the kernels' own choice is known everywhere.
            instruction_sets.push(format!("{:?}", CpuPath::fastest()).to_lowercase());
        }
        let name = field(&["model name", "Model", "CPU part"]).unwrap_or_else(|| std::env::consts::ARCH.to_owned());
        Cpu { name, instruction_sets, numa_node: None }
    }
}

#[cfg(test)]
mod tests {
    use forge_shared::spec::ByteSize;

    use super::*;

    #[test]
    fn cpuinfo_is_read_and_its_absence_is_no_failure() {
        let cpu = Cpu::parse("processor : 0\nmodel name\t: Some CPU @ 2 GHz\nflags : fpu avx2 fma avx512_vnni amx_bf16\n");
        assert_eq!(cpu.name, "Some CPU @ 2 GHz");
        assert_eq!(cpu.instruction_sets, ["avx2", "fma", "avx512-vnni", "amx-bf16"]);
        let missing = Cpu::read(Path::new("/does/not/exist"), Path::new("/does/not/exist"));
        assert_eq!((missing.name.as_str(), missing.numa_node), (std::env::consts::ARCH, None));
        assert!(!missing.instruction_sets.is_empty());
    }

    #[test]
    fn the_machine_itself_is_one_cpu_device_and_its_gpus() {
        let devices = devices(&NodeId::from("n"), &ProbeWish::default());
        assert_eq!((devices.infos[0].kind, devices.infos[0].index), (DeviceKind::Cpu, 0));
        assert!(devices.infos[0].memory_bytes > 0 && devices.infos[0].cores > 0);
        assert_eq!(devices.ledger.len(), 1);
        assert!(devices.infos[1..].iter().all(|gpu| gpu.kind == DeviceKind::Cuda && gpu.cannot_run.is_some()));
    }

    #[test]
    fn declared_devices_are_shares_on_cores_of_their_own() {
        let cores = threads::allowed_cores();
        let one = DeclaredDevice { kind: DeviceKind::Cpu, cores: 1, memory: ByteSize(1 << 30), numa_node: None };
        let gpu = DeclaredDevice { kind: DeviceKind::Cuda, cores: 132, memory: ByteSize(141 << 30), numa_node: Some(1) };
        let many = DeclaredDevice { cores: 100_000, ..one.clone() };
        let devices = devices(&NodeId::from("n"), &ProbeWish { declared: &[one.clone(), one, gpu, many], ..ProbeWish::default() });
        assert!(devices.infos.iter().all(|info| info.is_virtual));
        assert_eq!(devices.infos[2].memory_bytes, 141 << 30);
        let cannot: Vec<bool> = devices.infos.iter().map(|info| info.cannot_run.is_some()).collect();
        assert_eq!(cannot, [false, false, true, false], "there are no kernels for the GPU");
        assert_eq!(devices.infos[3].cores as usize, cores.len());
        let [first, second, third] = devices.ledger.as_slice() else { panic!("{:?}", devices.ledger) };
        assert_eq!((first.cores.len(), second.cores.len(), third.cores.len()), (1, 1, cores.len()));
        assert!(cores.len() < 2 || first.cores != second.cores);
        assert!(third.cores.iter().all(|core| cores.contains(core)));
    }
}
