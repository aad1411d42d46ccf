//! The async runtime, and waits that Ctrl-C or SIGTERM can end.
//!
//! Invariant: blocking work whose waiter is gone is told to stop, and the program does not wait for it without limit.

use std::ops::Deref;
use std::time::Duration;

use forge_store::CancelFlag;
use tokio::runtime::{Builder, Runtime};

use crate::failure::{Failure, Result};

/// How long blocking work that was told to stop may take to notice. A read from a silent server may take minutes.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// A runtime whose end is bounded: dropping it waits [`STOP_TIMEOUT`] at most for blocking work.
pub struct BoundedRuntime(Option<Runtime>);

impl Deref for BoundedRuntime {
    type Target = Runtime;

    fn deref(&self) -> &Runtime {
        self.0.as_ref().expect("taken by drop alone")
    }
}

impl Drop for BoundedRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_timeout(STOP_TIMEOUT);
        }
    }
}

/// A runtime with a few threads: computing has its own.
///
/// # Errors
/// If the system gives no threads.
pub fn start() -> Result<BoundedRuntime> {
    let runtime = Builder::new_multi_thread().enable_all().thread_name("forge-io").build();
    let runtime = runtime.map_err(|error| Failure::of(&error).while_doing("could not start"))?;
    Ok(BoundedRuntime(Some(runtime)))
}

/// Resolves at the next Ctrl-C. From the first call on, Ctrl-C does nothing else.
pub async fn interrupt() {
    // Where the system refuses this there is no signal to wait for: the process ends as it does without us.
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Resolves at the next SIGTERM. From the first call on, SIGTERM does nothing else.
pub async fn terminate() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            terminate.recv().await;
            return;
        }
    }
    std::future::pending::<()>().await;
}

/// Resolves at the next Ctrl-C or SIGTERM.
pub async fn stop_signal() {
    tokio::select! {
        () = interrupt() => {}
        () = terminate() => {}
    }
}

/// Raises the flag when its holder ends, whichever way.
struct CancelOnDrop(CancelFlag);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

/// Runs blocking work on a thread of its own. A stop signal raises the flag and waits a little for the work to
/// notice; dropping the future raises the flag too.
///
/// # Errors
/// The work's own, or that it was stopped.
pub async fn cancellable<T: Send + 'static>(cancel: CancelFlag, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let guard = CancelOnDrop(cancel);
    let mut handle = tokio::task::spawn_blocking(work);
    let joined = tokio::select! {
        joined = &mut handle => joined,
        () = stop_signal() => {
            guard.0.cancel();
            match tokio::time::timeout(STOP_TIMEOUT, handle).await {
                Ok(joined) => joined,
                Err(_) => return Err(Failure::new("stopped")),
            }
        }
    };
    joined.map_err(|error| Failure::of(&error).while_doing("an internal task died"))?
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn work_whose_waiter_is_gone_is_told_and_not_waited_for_without_limit() {
        let cancel = CancelFlag::default();
        let (seen, started) = (cancel.clone(), Instant::now());
        let runtime = start().expect("threads");
        runtime.block_on(async {
            let deaf = cancellable(cancel, || {
                std::thread::sleep(Duration::from_secs(60));
                Ok(())
            });
            assert!(tokio::time::timeout(Duration::from_millis(50), deaf).await.is_err());
        });
        assert!(seen.is_cancelled());
        drop(runtime);
        assert!(started.elapsed() < STOP_TIMEOUT + Duration::from_secs(10));
    }
}
