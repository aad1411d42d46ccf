//! Where and how urgently a thread computes.
//!
//! Kernel threads are begun by a thread that was told its cores and priority, and inherit both; so do the threads that
//! draw tokens. Heartbeats, the engine service and everything else stay at the process's own priority: a busy model does
//! not cost a node its lease.

/// Moves the calling thread, and the threads it will begin, to these cores and this priority. `cores` empty leaves them to
/// the system. What the system refuses is logged, and the thread goes on as it was.
pub(crate) fn settle(cores: &[usize], niceness: u8) {
    #[cfg(target_os = "linux")]
    {
        if niceness > 0 {
            // SAFETY: a system call on the calling thread (on Linux, 0 means the thread, not the process); no memory of
            // ours is touched.
            let failed = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, i32::from(niceness)) } != 0;
            if failed {
                tracing::warn!(niceness, error = %std::io::Error::last_os_error(), "kernel threads keep the process's priority");
            }
        }
        if !cores.is_empty() {
            pin(cores);
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (cores, niceness);
}

#[cfg(target_os = "linux")]
fn pin(cores: &[usize]) {
    // SAFETY: an all-zero cpu_set_t is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    let most = 8 * size_of::<libc::cpu_set_t>();
    for &core in cores.iter().filter(|core| **core < most) {
        // SAFETY: `core` is within the set, checked above.
        unsafe { libc::CPU_SET(core, &mut set) };
    }
    // SAFETY: the set is ours and as large as is said; 0 is the calling thread.
    let failed = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) } != 0;
    if failed {
        tracing::warn!(?cores, error = %std::io::Error::last_os_error(), "kernel threads run on any core");
    }
}

/// Cores this process may run on, in order.
pub fn allowed_cores() -> Vec<usize> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: an all-zero cpu_set_t is the empty set.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set is ours and as large as is said; 0 is the calling thread.
        let known = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) } == 0;
        if known {
            let most = 8 * size_of::<libc::cpu_set_t>();
            // SAFETY: every core asked for is within the set.
            return (0..most).filter(|&core| unsafe { libc::CPU_ISSET(core, &set) }).collect();
        }
    }
    (0..std::thread::available_parallelism().map_or(1, usize::from)).collect()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn threads_begun_by_a_settled_thread_inherit_its_cores_and_priority() {
        let all = allowed_cores();
        let core = all[0];
        std::thread::spawn(move || {
            settle(&[core], 5);
            std::thread::spawn(move || {
                assert_eq!(allowed_cores(), [core]);
                // SAFETY: reads the calling thread's priority.
                assert_eq!(unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }, 5);
            })
            .join()
            .expect("its assertions hold");
        })
        .join()
        .expect("its assertions hold");
        assert_eq!(allowed_cores(), all);
    }
}
