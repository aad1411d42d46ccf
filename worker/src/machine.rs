//! What this machine offers: cores and free memory, within the limits of its control group.
//!
//! It reads the system's own files once; it measures nothing (forge-kernels does) and reserves nothing.

use std::path::Path;

use forge_shared::ids::NodeId;
use forge_shared::plan::DeviceView;
use forge_shared::spec::ByteSize;

/// Left to the system and to everything that is not planned.
const RESERVE_BYTES: u64 = 256 << 20;

/// The CPU of this machine as a device for placement.
pub fn cpu_device(node: NodeId) -> DeviceView {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    DeviceView { node, device: 0, free_bytes: ByteSize(free_bytes().saturating_sub(RESERVE_BYTES)), threads }
}

/// Memory that can be had without swapping: the system's estimate, and no more than the control group leaves.
pub fn free_bytes() -> u64 {
    let system = read_meminfo(Path::new("/proc/meminfo"), "MemAvailable:");
    let group = control_group_left(Path::new("/sys/fs/cgroup"));
    match (system, group) {
        (Some(system), Some(group)) => system.min(group),
        (Some(bytes), None) | (None, Some(bytes)) => bytes,
        (None, None) => fallback_bytes(),
    }
}

fn read_meminfo(path: &Path, key: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    parse_meminfo(&text, key)
}

fn parse_meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    let kib: u64 = line[key.len()..].trim().trim_end_matches("kB").trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Bytes left in this process's control group (version 2 at its root, as inside a container); `None` without a limit.
fn control_group_left(root: &Path) -> Option<u64> {
    let limit: u64 = std::fs::read_to_string(root.join("memory.max")).ok()?.trim().parse().ok()?;
    let used: u64 = std::fs::read_to_string(root.join("memory.current")).ok()?.trim().parse().ok()?;
    // Page cache counts as used but is given back on demand.
    let stat = std::fs::read_to_string(root.join("memory.stat")).unwrap_or_default();
    let reclaimable = stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.trim().parse::<u64>().ok()).unwrap_or(0);
    Some(limit.saturating_sub(used.saturating_sub(reclaimable)))
}

/// Systems without `/proc/meminfo`: half of physical memory.
fn fallback_bytes() -> u64 {
    // SAFETY: sysconf reads a system constant and touches no memory of ours.
    let (pages, page_bytes) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    let pages = u64::try_from(pages).unwrap_or(0);
    let page_bytes = u64::try_from(page_bytes).unwrap_or(0);
    pages.saturating_mul(page_bytes) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_bytes() {
        let text = "MemTotal:       24105140 kB\nMemAvailable:   22105140 kB\n";
        assert_eq!(parse_meminfo(text, "MemAvailable:"), Some(22_105_140 * 1024));
        assert_eq!(parse_meminfo("MemAvailable: lots\n", "MemAvailable:"), None);
        assert_eq!(parse_meminfo("", "MemAvailable:"), None);
    }

    #[test]
    fn a_control_group_limit_is_respected() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).expect("writable");
        write("memory.max", "1000000\n");
        write("memory.current", "700000\n");
        write("memory.stat", "anon 5\ninactive_file 200000\n");
        assert_eq!(control_group_left(folder.path()), Some(500_000));
        write("memory.max", "max\n");
        assert_eq!(control_group_left(folder.path()), None);
    }

    #[test]
    fn this_machine_has_memory_and_cores() {
        let device = cpu_device(NodeId::from("here"));
        assert!(device.threads >= 1);
        assert!(device.free_bytes.0 > 0);
    }
}
