//! The async runtime, and waits that Ctrl-C or SIGTERM can end.

use forge_store::CancelFlag;
use tokio::runtime::{Builder, Runtime};

use crate::failure::{Failure, Result};

/// A runtime with a few threads: computing has its own.
///
/// # Errors
/// If the system gives no threads.
pub fn start() -> Result<Runtime> {
    let runtime = Builder::new_multi_thread().enable_all().thread_name("forge-io").build();
    runtime.map_err(|error| Failure::of(&error).while_doing("could not start"))
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

/// Runs blocking work on a thread of its own. A stop signal raises the flag and waits for the work to notice.
///
/// # Errors
/// The work's own.
pub async fn cancellable<T: Send + 'static>(cancel: CancelFlag, work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let mut handle = tokio::task::spawn_blocking(work);
    let joined = tokio::select! {
        joined = &mut handle => joined,
        () = stop_signal() => {
            cancel.cancel();
            handle.await
        }
    };
    joined.map_err(|error| Failure::of(&error).while_doing("an internal task died"))?
}
