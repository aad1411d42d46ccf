//! The state's time, from the leaders' clocks as they stand in the log.
//!
//! Lives are counted by the differences between one entry's time and the next, so a clock that jumps ahead and back
//! costs its jump once and leaves nothing that never ends or is born dead. What must not end early through a jump (an
//! idempotency record) is counted by differences of at most a minute: such a record lives longer where nothing happens.
//!
//! Invariant: elapsed times never go back.

use serde::{Deserialize, Serialize};

/// The most that one entry moves the calm count.
const CALM_STEP_MS: u64 = 60_000;

/// Times of the entries applied so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Clock {
    /// Of the last entry, milliseconds since 1970.
    last_ms: u64,
    /// The largest seen.
    latest_ms: u64,
    /// Sum of all steps forward.
    elapsed_ms: u64,
    /// The same, of steps of at most a minute.
    calm_ms: u64,
}

impl Clock {
    pub fn advance(&mut self, proposed_ms: u64) {
        // The first entry begins the count.
        let step_ms = if self.latest_ms == 0 { 0 } else { proposed_ms.saturating_sub(self.last_ms) };
        self.last_ms = proposed_ms;
        self.latest_ms = self.latest_ms.max(proposed_ms);
        self.elapsed_ms = self.elapsed_ms.saturating_add(step_ms);
        self.calm_ms = self.calm_ms.saturating_add(step_ms.min(CALM_STEP_MS));
    }

    /// Time of the last entry, milliseconds since 1970.
    pub fn last_ms(&self) -> u64 {
        self.last_ms
    }

    /// Latest time seen, milliseconds since 1970: for display.
    pub fn latest_ms(&self) -> u64 {
        self.latest_ms
    }

    /// Time that has passed by the log, milliseconds.
    pub fn elapsed_ms(&self) -> u64 {
        self.elapsed_ms
    }

    /// Time that has surely passed, milliseconds.
    pub fn calm_ms(&self) -> u64 {
        self.calm_ms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jump_ahead_and_back_is_counted_once() {
        let mut clock = Clock::default();
        for time_ms in [1_000_000, 1_001_000, 4_601_000, 1_002_000, 1_003_000] {
            clock.advance(time_ms);
        }
        assert_eq!(clock.elapsed_ms(), 1_000 + 3_600_000 + 1_000);
        assert_eq!(clock.calm_ms(), 1_000 + 60_000 + 1_000);
        assert_eq!((clock.last_ms(), clock.latest_ms()), (1_003_000, 4_601_000));
    }
}
