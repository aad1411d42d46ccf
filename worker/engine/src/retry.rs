//! When a refused client should come back, from how fast requests have been ending. Takes time as an argument.

use std::time::Duration;

/// Weight of the newest interval in the running mean.
const NEWEST: f64 = 0.1;
/// Bounds of the answer, in seconds.
const BOUNDS_S: (f64, f64) = (1.0, 120.0);

/// Running mean of the time between two ends of requests while the engine is busy.
#[derive(Debug, Default)]
pub(crate) struct RetryEstimate {
    mean_interval_s: Option<f64>,
    last: Duration,
}

impl RetryEstimate {
    /// The engine was idle until now: that time says nothing about its speed.
    pub(crate) fn busy_from(&mut self, now: Duration) {
        self.last = now;
    }

    /// A request ended.
    pub(crate) fn finished(&mut self, now: Duration) {
        let interval_s = now.saturating_sub(self.last).as_secs_f64();
        self.last = now;
        self.mean_interval_s = Some(match self.mean_interval_s {
            Some(mean) => mean + NEWEST * (interval_s - mean),
            None => interval_s,
        });
    }

    /// Seconds until about half of `waiting` requests will have left the queue.
    pub(crate) fn estimate_s(&self, waiting: usize) -> u32 {
        let seconds = self.mean_interval_s.unwrap_or(0.0) * waiting as f64 / 2.0;
        seconds.clamp(BOUNDS_S.0, BOUNDS_S.1).ceil() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_rate_and_stays_in_bounds() {
        let mut retry = RetryEstimate::default();
        assert_eq!(retry.estimate_s(1000), 1);
        retry.busy_from(Duration::from_secs(1000));
        for second in 1..=50 {
            retry.finished(Duration::from_secs(1000 + 2 * second));
        }
        assert_eq!(retry.estimate_s(20), 20);
        assert_eq!(retry.estimate_s(100_000), 120);
    }
}
