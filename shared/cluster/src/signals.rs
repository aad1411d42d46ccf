//! How a process of the cluster is told to end: by SIGTERM or SIGINT, once to end in order, twice to end at once.
//!
//! Invariant: the second signal ends the process wherever it is, also where nobody waits for the first.

use std::future::Future;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// Exit code of a process that was ended by a second signal.
pub const ENDED_AT_ONCE: i32 = 130;

/// From here on the first signal completes the future, and the second ends the process with [`ENDED_AT_ONCE`]. Call it
/// within a runtime, once.
///
/// # Errors
/// What the system said, if signals cannot be received.
pub fn first_of_two() -> std::io::Result<impl Future<Output = ()> + Send + 'static> {
    let mut signals = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (told, first) = oneshot::channel();
    tokio::spawn(async move {
        next(&mut signals).await;
        ::tracing::info!("ending in order; another signal ends at once");
        // Whoever does not wait any more is ending already.
        let _ = told.send(());
        next(&mut signals).await;
        ::tracing::warn!("ending at once");
        std::process::exit(ENDED_AT_ONCE);
    });
    Ok(async move {
        // The task above ends with the process alone.
        let _ = first.await;
    })
}

async fn next((terminate, interrupt): &mut (Signal, Signal)) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
