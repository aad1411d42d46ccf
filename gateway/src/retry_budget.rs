//! How many second tries a gateway may make, as a core without a clock.
//!
//! When replicas refuse or fail, retries multiply the load just when it is too high. They are therefore paid for: every
//! request earns a share of a retry, and a small flow comes with time, so that a quiet gateway can still retry. Requests
//! that were accepted do not pay: they are owed an answer. Invariant: over any span of `t` seconds with `n` requests at
//! most `CAPACITY + PER_REQUEST · n + PER_SECOND · t` retries are granted.

use std::time::Duration;

/// Retries that can be saved up.
pub const CAPACITY: f64 = 32.0;
/// Retries that one request earns.
pub const PER_REQUEST: f64 = 0.2;
/// Retries that a second brings.
pub const PER_SECOND: f64 = 5.0;

/// See the module documentation. Time is given as time since the gateway began.
#[derive(Debug, Clone)]
pub struct RetryBudget {
    level: f64,
    updated: Duration,
}

impl Default for RetryBudget {
    fn default() -> Self {
        RetryBudget { level: CAPACITY, updated: Duration::ZERO }
    }
}

impl RetryBudget {
    /// A request came.
    pub fn earn(&mut self) {
        self.level = (self.level + PER_REQUEST).min(CAPACITY);
    }

    /// Whether one more retry may be made; it is then paid.
    pub fn spend(&mut self, now: Duration) -> bool {
        let elapsed_s = now.saturating_sub(self.updated).as_secs_f64();
        self.updated = self.updated.max(now);
        self.level = (self.level + elapsed_s * PER_SECOND).min(CAPACITY);
        if self.level < 1.0 {
            return false;
        }
        self.level -= 1.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn retries_stay_within_the_budget(steps in prop::collection::vec((0u64..2000, 0u32..20, 0u32..40), 1..50)) {
            let mut budget = RetryBudget::default();
            let (mut now, mut requests, mut granted) = (Duration::ZERO, 0u32, 0u32);
            for (wait_ms, arrivals, tries) in steps {
                now += Duration::from_millis(wait_ms);
                for _ in 0..arrivals {
                    budget.earn();
                    requests += 1;
                }
                granted += (0..tries).filter(|_| budget.spend(now)).count() as u32;
                let most = CAPACITY + PER_REQUEST * f64::from(requests) + PER_SECOND * now.as_secs_f64();
                prop_assert!(f64::from(granted) <= most + 1e-6);
            }
        }
    }

    #[test]
    fn a_quiet_gateway_can_retry_again() {
        let mut budget = RetryBudget::default();
        while budget.spend(Duration::ZERO) {}
        assert!(!budget.spend(Duration::from_millis(100)));
        assert!(budget.spend(Duration::from_millis(300)));
    }
}
