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

/// Memory that can be had without swapping: the system's estimate, and no more than any control group leaves.
pub fn free_bytes() -> u64 {
    let system = read_meminfo(Path::new("/proc/meminfo"), "MemAvailable:");
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let group = control_groups_left(Path::new("/sys/fs/cgroup"), &groups);
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

/// File names of one version of control groups, and the key of reclaimable page cache in its statistics.
struct GroupFiles {
    limit: &'static str,
    used: &'static str,
    reclaimable: &'static str,
}

const VERSION_1: GroupFiles =
    GroupFiles { limit: "memory.limit_in_bytes", used: "memory.usage_in_bytes", reclaimable: "total_inactive_file " };
const VERSION_2: GroupFiles = GroupFiles { limit: "memory.max", used: "memory.current", reclaimable: "inactive_file " };

/// Bytes that this process's control groups leave, the least over the group and all above it; `None` without a
/// limit. `groups` is `/proc/self/cgroup`: lines of `number:controllers:path`, no controllers in version 2.
fn control_groups_left(root: &Path, groups: &str) -> Option<u64> {
    let mut least: Option<u64> = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (mount, files) = if controllers.is_empty() {
            (root.to_owned(), &VERSION_2)
        } else if controllers.split(',').any(|controller| controller == "memory") {
            (root.join("memory"), &VERSION_1)
        } else {
            continue;
        };
        // Inside a container the path may not exist under the mount, whose root is then the group itself: walking up
        // ends there in either case.
        let relative = Path::new(path.trim_start_matches('/'));
        for ancestor in relative.ancestors().filter(|ancestor| !ancestor.components().any(|part| part.as_os_str() == "..")) {
            if let Some(left) = group_left(&mount.join(ancestor), files) {
                least = Some(least.map_or(left, |least| least.min(left)));
            }
        }
    }
    least
}

fn group_left(folder: &Path, files: &GroupFiles) -> Option<u64> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    // `max`, the absence of a limit, is no number.
    let limit: u64 = read(files.limit)?.trim().parse().ok()?;
    let used: u64 = read(files.used)?.trim().parse().ok()?;
    // Page cache counts as used but is given back on demand.
    let statistics = read("memory.stat").unwrap_or_default();
    let reclaimable = statistics.lines().find_map(|line| line.strip_prefix(files.reclaimable)?.trim().parse::<u64>().ok()).unwrap_or(0);
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

    fn write(folder: &Path, files: [(&str, &str); 3]) {
        std::fs::create_dir_all(folder).expect("a temporary folder");
        for (name, text) in files {
            std::fs::write(folder.join(name), text).expect("writable");
        }
    }

    #[test]
    fn the_tightest_group_of_version_2_counts() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let statistics = ("memory.stat", "anon 5\ninactive_file 200000\n");
        let outer = root.path().join("user.slice");
        write(&outer, [("memory.max", "1000000\n"), ("memory.current", "700000\n"), statistics]);
        write(&outer.join("job.scope"), [("memory.max", "max\n"), ("memory.current", "600000\n"), statistics]);
        assert_eq!(control_groups_left(root.path(), "0::/user.slice/job.scope\n"), Some(500_000));
        assert_eq!(control_groups_left(root.path(), "0::/elsewhere\n"), None);
        assert_eq!(control_groups_left(root.path(), "0::/../user.slice\n"), None);
    }

    #[test]
    fn version_1_counts_also_where_the_mount_is_the_group() {
        let root = tempfile::tempdir().expect("a temporary folder");
        let files = [("memory.limit_in_bytes", "4096\n"), ("memory.usage_in_bytes", "1096\n"), ("memory.stat", "total_inactive_file 0\n")];
        write(&root.path().join("memory"), files);
        let groups = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/\n";
        assert_eq!(control_groups_left(root.path(), groups), Some(3000));
        assert_eq!(control_groups_left(root.path(), "not a line\n::\n"), None);
    }

    #[test]
    fn this_machine_has_memory_and_cores() {
        let device = cpu_device(NodeId::from("here"));
        assert!(device.threads >= 1);
        assert!(device.free_bytes.0 > 0);
    }
}
