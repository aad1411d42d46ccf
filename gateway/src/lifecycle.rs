//! Whether requests are admitted, how many are in flight, and when everything ends.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

/// Serving, then draining, then broken off, then ended; never back.
#[derive(Default)]
pub(crate) struct Lifecycle {
    in_flight: AtomicUsize,
    idle: Notify,
    draining: CancellationToken,
    broken_off: CancellationToken,
    ended: CancellationToken,
}

impl Lifecycle {
    /// Counts a request in. Pairs with [`Lifecycle::leave`].
    pub(crate) fn enter(&self) {
        self.in_flight.fetch_add(1, Ordering::SeqCst);
    }

    /// Counts a request out.
    pub(crate) fn leave(&self) {
        if self.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.idle.notify_waiters();
        }
    }

    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Cancelled when requests in flight must end at once.
    pub(crate) fn broken_off(&self) -> &CancellationToken {
        &self.broken_off
    }

    /// Cancelled when connections must close.
    pub(crate) fn ended(&self) -> &CancellationToken {
        &self.ended
    }

    /// Stops admission and waits for requests in flight; at the deadline breaks them off and gives their
    /// connections a moment to say so.
    pub(crate) async fn drain(&self, deadline: Duration) {
        self.draining.cancel();
        if tokio::time::timeout(deadline, self.wait_idle()).await.is_err() {
            tracing::warn!(requests = self.in_flight(), "drain deadline reached: breaking off");
            self.broken_off.cancel();
            // Bounded: a client that reads nothing does not hold up the end.
            let _ = tokio::time::timeout(Duration::from_secs(1), self.wait_idle()).await;
        }
    }

    /// Ends serving.
    pub(crate) fn end(&self) {
        self.broken_off.cancel();
        self.ended.cancel();
    }

    async fn wait_idle(&self) {
        loop {
            let idle = self.idle.notified();
            tokio::pin!(idle);
            // Registered before the count is read, so a request leaving in between is not missed.
            idle.as_mut().enable();
            if self.in_flight() == 0 {
                return;
            }
            idle.await;
        }
    }
}
