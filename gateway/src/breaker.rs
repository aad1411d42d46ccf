//! A circuit breaker as a core without a clock: a replica that fails again and again is left alone for a while.
//!
//! Only failures of the way to it count (no connection, a stream that broke off); a refusal is an answer. Invariants: an
//! open breaker lets one attempt through at the end of each pause, and one success closes it; what fails during a pause was
//! begun before it and does not make it longer, so that a hundred streams that one cut breaks count as one failure.

use std::time::Duration;

/// Failures in a row that open it.
pub const FAILURES_TO_OPEN: u32 = 3;
/// First pause; doubles with every failure after it.
pub const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// Longest pause.
pub const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// See the module documentation. Time is given as time since the gateway began.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Breaker {
    failures: u32,
    /// No attempt before this.
    closed_from: Duration,
    /// The attempt that a pause's end allowed is under way.
    probing: bool,
}

impl Breaker {
    /// Whether an attempt may be made.
    pub fn allows(&self, now: Duration) -> bool {
        self.failures < FAILURES_TO_OPEN || (now >= self.closed_from && !self.probing)
    }

    /// An attempt begins; whether it is the one that a pause's end allowed. Such a one that is never concluded must be
    /// told with [`Breaker::abandoned`], or no other is ever allowed.
    #[must_use]
    pub fn begin(&mut self) -> bool {
        let is_probe = self.failures >= FAILURES_TO_OPEN;
        self.probing |= is_probe;
        is_probe
    }

    /// The replica answered.
    pub fn succeeded(&mut self) {
        *self = Breaker::default();
    }

    /// The attempt at the end of a pause was given up without saying anything of the replica.
    pub fn abandoned(&mut self) {
        self.probing = false;
    }

    /// The replica could not be reached or broke off.
    pub fn failed(&mut self, now: Duration) {
        if self.failures >= FAILURES_TO_OPEN && now < self.closed_from {
            return;
        }
        self.failures = self.failures.saturating_add(1);
        self.probing = false;
        if self.failures >= FAILURES_TO_OPEN {
            let doublings = (self.failures - FAILURES_TO_OPEN).min(10);
            self.closed_from = now + (FIRST_PAUSE * 2u32.pow(doublings)).min(LONGEST_PAUSE);
        }
    }

    /// Whether the attempt that a pause's end allowed is under way: it tells soon whether others may follow.
    pub fn is_probing(&self) -> bool {
        self.probing
    }

    /// Whether it keeps attempts away now.
    pub fn is_open(&self, now: Duration) -> bool {
        !self.allows(now)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn opens_after_failures_in_a_row_probes_once_and_closes() {
        let mut breaker = Breaker::default();
        for _ in 0..FAILURES_TO_OPEN {
            assert!(breaker.allows(ms(0)));
            assert!(!breaker.begin());
            breaker.failed(ms(0));
        }
        assert!(!breaker.allows(ms(499)));
        assert!(breaker.allows(ms(500)));
        assert!(breaker.begin());
        assert!(!breaker.allows(ms(501)), "one probe at a time");
        breaker.failed(ms(600));
        assert!(!breaker.allows(ms(1599)) && breaker.allows(ms(1600)), "the pause doubles");
        assert!(breaker.begin());
        breaker.abandoned();
        assert!(breaker.allows(ms(1600)), "a probe that told nothing is made again");
        assert!(breaker.begin());
        breaker.succeeded();
        assert_eq!(breaker, Breaker::default());
    }

    #[test]
    fn streams_that_break_together_are_one_failure() {
        let mut breaker = Breaker::default();
        for at_ms in 0..100 {
            breaker.failed(ms(at_ms));
        }
        assert!(!breaker.allows(ms(501)) && breaker.allows(ms(502)), "half a second after the third");
    }

    #[test]
    fn failures_apart_do_not_open_it() {
        let mut breaker = Breaker::default();
        for _ in 0..10 {
            breaker.failed(ms(0));
            breaker.failed(ms(0));
            breaker.succeeded();
        }
        assert!(breaker.allows(ms(0)));
    }

    proptest! {
        #[test]
        fn a_pause_ends(failures in 1u32..100, now_ms in 0u64..1_000_000) {
            let mut breaker = Breaker::default();
            for _ in 0..failures {
                breaker.failed(ms(now_ms));
            }
            prop_assert!(breaker.allows(ms(now_ms) + LONGEST_PAUSE));
        }
    }
}
