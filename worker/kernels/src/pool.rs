//! The thread pool: a fixed set of workers that join the caller in one region at a time.
//!
//! A region is `tasks` calls of one function, handed out one by one. The caller works too and waits only for
//! workers that have entered, so a worker the system has not scheduled costs nothing. Between regions workers
//! spin briefly, then sleep.
//!
//! What it is not: it decides no result. Which thread runs which task never shows in the numbers.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker spins before it sleeps: longer than the serial work between two regions of a step.
const SPIN: Duration = Duration::from_micros(50);
/// Set in `Shared::gate` while workers may enter the region; the lower bits count those inside.
const OPEN: usize = 1 << (usize::BITS - 1);

type Task<'a> = dyn Fn(usize) + Sync + 'a;

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// What the caller publishes for one region. The references live as long as the region is open or occupied.
#[derive(Clone, Copy)]
struct Job {
    function: *const Task<'static>,
    tasks: usize,
}

struct Shared {
    job: UnsafeCell<Option<Job>>,
    next_task: AtomicUsize,
    gate: AtomicUsize,
    regions: AtomicU64,
    sleepers: AtomicUsize,
    stop: AtomicBool,
    sleep: Mutex<()>,
    wake: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written by the caller only while the gate is closed and empty, and read by workers only
// between entering and leaving; the other fields are Sync.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` refers to a Sync function, and is used only while the caller waits for it.
unsafe impl Send for Shared {}

/// A pool of `threads - 1` workers; see the module documentation.
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    region: Mutex<()>,
}

impl ThreadPool {
    /// Starts `threads - 1` workers (none for 0 or 1).
    ///
    /// # Errors
    /// The system's, where it cannot start a thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            job: UnsafeCell::new(None),
            next_task: AtomicUsize::new(0),
            gate: AtomicUsize::new(0),
            regions: AtomicU64::new(0),
            sleepers: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            panic: Mutex::new(None),
        });
        let mut pool = ThreadPool { shared, workers: Vec::new(), region: Mutex::new(()) };
        for index in 1..threads.max(1) {
            let shared = Arc::clone(&pool.shared);
            // An error here drops the pool, which stops the workers already started.
            let worker = std::thread::Builder::new().name(format!("kernel-{index}")).spawn(move || work(&shared))?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads that compute, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `function(0..tasks)`, each index once, on the pool's threads and the caller's, and waits for all.
    /// Regions from several threads take turns; a region begun inside a task runs on that task's thread.
    ///
    /// # Panics
    /// With the first panic of a task, after all tasks that had begun have ended. The pool stays usable.
    pub fn run<F: Fn(usize) + Sync>(&self, tasks: usize, function: F) {
        if self.workers.is_empty() || tasks <= 1 || INSIDE.get() {
            (0..tasks).for_each(function);
            return;
        }
        let _turn = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        let function: &Task<'_> = &function;
        let shared = &*self.shared;
        // SAFETY: the gate is closed and empty here, so no worker reads `job`. The lifetime is extended only
        // until this function returns: it does so after the gate is closed and empty again.
        unsafe {
            let function = std::mem::transmute::<*const Task<'_>, *const Task<'static>>(function);
            *shared.job.get() = Some(Job { function, tasks });
        }
        shared.next_task.store(0, Ordering::Relaxed);
        shared.gate.store(OPEN, Ordering::Release);
        shared.regions.fetch_add(1, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = shared.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            shared.wake.notify_all();
        }
        shared.take_tasks(function, tasks);
        shared.gate.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0_u32;
        while shared.gate.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins < 2_000 {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(payload) = panic {
            drop(_turn);
            resume_unwind(payload);
        }
    }
}

impl ThreadPool {
    /// As [`ThreadPool::run`], for tasks that are quickest one after the other (they read neighbouring memory):
    /// each thread begins with its own run of consecutive tasks, and helps with the others' when that is done.
    ///
    /// # Panics
    /// As [`ThreadPool::run`].
    pub fn run_in_order<F: Fn(usize) + Sync>(&self, tasks: usize, function: F) {
        let threads = self.threads();
        let next: Vec<AtomicUsize> = (0..threads).map(|thread| AtomicUsize::new(tasks * thread / threads)).collect();
        self.run(threads, |own| {
            for offset in 0..threads {
                let thread = (own + offset) % threads;
                let end = tasks * (thread + 1) / threads;
                loop {
                    let task = next[thread].fetch_add(1, Ordering::Relaxed);
                    if task >= end {
                        break;
                    }
                    function(task);
                }
            }
        });
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.regions.fetch_add(1, Ordering::SeqCst);
        {
            let _guard = self.shared.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            self.shared.wake.notify_all();
        }
        for worker in self.workers.drain(..) {
            // A worker catches its tasks' panics, so it cannot have died of one.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Runs tasks until none is left; a panic is kept for the caller and ends the handing out.
    fn take_tasks(&self, function: &Task<'_>, tasks: usize) {
        INSIDE.set(true);
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let task = self.next_task.fetch_add(1, Ordering::Relaxed);
                if task >= tasks {
                    break;
                }
                function(task);
            }
        }));
        INSIDE.set(false);
        if let Err(payload) = result {
            self.next_task.store(tasks, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(payload);
        }
    }

    /// Enters the region if it is open.
    fn enter(&self) -> bool {
        self.gate.fetch_update(Ordering::AcqRel, Ordering::Acquire, |gate| (gate & OPEN != 0).then_some(gate + 1)).is_ok()
    }

    /// Waits for the region after number `seen`; returns its number.
    fn wait_for_region(&self, seen: u64) -> u64 {
        let start = Instant::now();
        loop {
            for _ in 0..64 {
                let current = self.regions.load(Ordering::Acquire);
                if current != seen {
                    return current;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() > SPIN {
                break;
            }
        }
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        let current = loop {
            let current = self.regions.load(Ordering::SeqCst);
            if current != seen {
                break current;
            }
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        };
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        current
    }
}

/// A worker's life.
fn work(shared: &Shared) {
    let mut seen = 0;
    loop {
        seen = shared.wait_for_region(seen);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        if !shared.enter() {
            continue;
        }
        // SAFETY: inside the gate, so the caller keeps `job` and what it points to until we leave.
        let job = unsafe { *shared.job.get() };
        if let Some(job) = job {
            // SAFETY: as above.
            let function = unsafe { &*job.function };
            shared.take_tasks(function, job.tasks);
        }
        shared.gate.fetch_sub(1, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 3, 5] {
            let pool = ThreadPool::new(threads).unwrap();
            for tasks in [0, 1, 2, 7, 100] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, |task| {
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                pool.run_in_order(tasks, |task| {
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 2));
            }
        }
    }

    #[test]
    fn regions_follow_each_other_and_sleep_between() {
        let pool = ThreadPool::new(3).unwrap();
        let total = AtomicUsize::new(0);
        for round in 0..2_000 {
            pool.run(8, |task| {
                total.fetch_add(task, Ordering::Relaxed);
            });
            if round % 500 == 0 {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        assert_eq!(total.load(Ordering::Relaxed), 2_000 * 28);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = ThreadPool::new(3).unwrap();
        for round in 0..20 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(10, |task| assert!(task != round % 10, "task {task} fails"));
            }));
            let payload = result.expect_err("the panic must come through");
            let message = payload.downcast_ref::<String>().expect("a formatted message");
            assert_eq!(*message, format!("task {} fails", round % 10));
        }
        let done = AtomicUsize::new(0);
        pool.run(10, |_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.load(Ordering::Relaxed), 10);
    }

    #[test]
    fn nested_and_concurrent_regions_complete() {
        let pool = ThreadPool::new(2).unwrap();
        let done = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        pool.run(4, |_| {
                            pool.run(3, |_| {
                                done.fetch_add(1, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(done.load(Ordering::Relaxed), 3 * 50 * 12);
    }
}
