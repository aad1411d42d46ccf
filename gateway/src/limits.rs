//! Rate limits per key as a core without a clock: token buckets over requests and tokens per minute.
//!
//! A request reserves its prompt and its `max_tokens` when it is admitted and gives back at its end what it did not
//! use. Invariant: over any span of `t` minutes a key is granted at most `limit · (t + 1)`.

use std::collections::HashMap;
use std::time::Duration;

use crate::error::ApiError;
use crate::keys::KeyLimits;

/// Until a gateway whose share of a key's budget is nothing may have been lent some: it asks with each heartbeat.
const EMPTY_SHARE_WAIT: Duration = Duration::from_secs(2);

/// A bucket that holds one minute's worth and fills evenly. Time is given as time since the gateway began.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    per_minute: f64,
    level: f64,
    updated: Duration,
}

/// What a bucket holds, for the `x-ratelimit-*` headers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BucketState {
    /// Per minute.
    pub limit: u64,
    /// Available now.
    pub remaining: u64,
    /// Until it is full again.
    pub reset: Duration,
}

impl TokenBucket {
    /// A full bucket.
    pub fn new(per_minute: u32, now: Duration) -> Self {
        TokenBucket { per_minute: f64::from(per_minute), level: f64::from(per_minute), updated: now }
    }

    /// Takes another limit from now on. What is in the bucket stays, up to the new limit: a share that is renewed every
    /// second must not be filled every second.
    pub fn resize(&mut self, per_minute: u32, now: Duration) {
        self.refill(now);
        self.per_minute = f64::from(per_minute);
        self.level = self.level.min(self.per_minute);
    }

    fn refill(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.updated).as_secs_f64();
        self.level = (self.level + elapsed * self.per_minute / 60.0).min(self.per_minute);
        self.updated = self.updated.max(now);
    }

    /// Takes `amount`, or says how long until it is there. More than the bucket can hold counts as a full one; one that
    /// holds nothing gives nothing.
    ///
    /// # Errors
    /// The time to wait.
    pub fn take(&mut self, amount: u64, now: Duration) -> Result<u64, Duration> {
        self.refill(now);
        if self.per_minute <= 0.0 {
            return Err(EMPTY_SHARE_WAIT);
        }
        let amount = (amount as f64).min(self.per_minute);
        // Refilling in floating point may end a hair below; a thousandth of a unit is none.
        if self.level + 1e-3 < amount {
            return Err(Duration::from_secs_f64((amount - self.level) * 60.0 / self.per_minute));
        }
        self.level -= amount;
        Ok(amount as u64)
    }

    /// Replaces a reservation by what was used; using more leaves the bucket in debt.
    pub fn settle(&mut self, reserved: u64, used: u64, now: Duration) {
        self.refill(now);
        self.level = (self.level + reserved as f64 - used as f64).min(self.per_minute);
    }

    /// What it holds.
    pub fn state(&mut self, now: Duration) -> BucketState {
        self.refill(now);
        let reset = match self.per_minute <= 0.0 {
            true => EMPTY_SHARE_WAIT,
            false => Duration::from_secs_f64((self.per_minute - self.level).max(0.0) * 60.0 / self.per_minute),
        };
        BucketState { limit: self.per_minute as u64, remaining: (self.level + 1e-3).max(0.0) as u64, reset }
    }
}

#[derive(Debug, Default)]
struct KeyBuckets {
    limits: KeyLimits,
    requests: Option<TokenBucket>,
    tokens: Option<TokenBucket>,
}

/// What a key has left.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RateState {
    /// Requests, if limited.
    pub requests: Option<BucketState>,
    /// Tokens, if limited.
    pub tokens: Option<BucketState>,
}

/// The buckets of all keys. Only keys that exist reach it, so it is as large as the key file.
#[derive(Debug, Default)]
pub struct RateLimits {
    keys: HashMap<String, KeyBuckets>,
}

impl RateLimits {
    fn buckets(&mut self, key: &str, limits: KeyLimits, now: Duration) -> &mut KeyBuckets {
        let buckets = self.keys.entry(key.to_owned()).or_default();
        if buckets.limits != limits {
            resize(&mut buckets.requests, limits.rpm, now);
            resize(&mut buckets.tokens, limits.tpm, now);
            buckets.limits = limits;
        }
        buckets
    }

    /// Counts a request.
    ///
    /// # Errors
    /// [`ApiError::RateLimited`].
    pub fn take_request(&mut self, key: &str, limits: KeyLimits, now: Duration) -> Result<(), ApiError> {
        match &mut self.buckets(key, limits, now).requests {
            None => Ok(()),
            Some(bucket) => bucket.take(1, now).map(drop).map_err(|wait| limited(limits.rpm, "requests", wait)),
        }
    }

    /// Reserves tokens for a prompt and its answers; returns what was reserved.
    ///
    /// # Errors
    /// [`ApiError::RateLimited`].
    pub fn reserve(&mut self, key: &str, limits: KeyLimits, tokens: u64, now: Duration) -> Result<u64, ApiError> {
        match &mut self.buckets(key, limits, now).tokens {
            None => Ok(0),
            Some(bucket) => bucket.take(tokens, now).map_err(|wait| limited(limits.tpm, "tokens", wait)),
        }
    }

    /// Replaces a reservation by what was used.
    pub fn settle(&mut self, key: &str, reserved: u64, used: u64, now: Duration) {
        if let Some(bucket) = self.keys.get_mut(key).and_then(|buckets| buckets.tokens.as_mut()) {
            bucket.settle(reserved, used, now);
        }
    }

    /// What a key has left.
    pub fn state(&mut self, key: &str, limits: KeyLimits, now: Duration) -> RateState {
        let buckets = self.buckets(key, limits, now);
        RateState {
            requests: buckets.requests.as_mut().map(|bucket| bucket.state(now)),
            tokens: buckets.tokens.as_mut().map(|bucket| bucket.state(now)),
        }
    }
}

fn resize(bucket: &mut Option<TokenBucket>, limit: Option<u32>, now: Duration) {
    match (&mut *bucket, limit) {
        (Some(bucket), Some(limit)) => bucket.resize(limit, now),
        (_, limit) => *bucket = limit.map(|limit| TokenBucket::new(limit, now)),
    }
}

fn limited(limit: Option<u32>, unit: &'static str, wait: Duration) -> ApiError {
    ApiError::RateLimited { limit: u64::from(limit.unwrap_or(0)), unit, retry_after_s: (wait.as_secs_f64().ceil() as u32).max(1) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn requests_come_back_evenly() {
        let mut rates = RateLimits::default();
        let limits = KeyLimits { rpm: Some(2), tpm: None };
        assert!(rates.take_request("k", limits, at(0.0)).is_ok());
        assert!(rates.take_request("k", limits, at(0.0)).is_ok());
        let error = rates.take_request("k", limits, at(0.0)).unwrap_err();
        assert_eq!(error.retry_after_s(), Some(30));
        assert!(rates.take_request("k", limits, at(29.0)).is_err());
        assert!(rates.take_request("k", limits, at(30.0)).is_ok());
        assert!(rates.take_request("other", limits, at(30.0)).is_ok(), "keys do not share");
    }

    #[test]
    fn unused_tokens_come_back_and_a_large_reservation_waits_for_a_full_bucket() {
        let mut rates = RateLimits::default();
        let limits = KeyLimits { rpm: None, tpm: Some(600) };
        assert_eq!(rates.reserve("k", limits, 100_000, at(0.0)).unwrap(), 600);
        assert_eq!(rates.reserve("k", limits, 60, at(0.0)).unwrap_err().retry_after_s(), Some(6));
        rates.settle("k", 600, 100, at(0.0));
        let state = rates.state("k", limits, at(0.0)).tokens.unwrap();
        assert_eq!((state.limit, state.remaining, state.reset), (600, 500, at(10.0)));
        rates.settle("k", 0, 700, at(0.0));
        assert_eq!(rates.state("k", limits, at(0.0)).tokens.unwrap().remaining, 0, "debt shows as none left");
    }

    #[test]
    fn a_share_of_nothing_lets_nothing_through() {
        let mut rates = RateLimits::default();
        let nothing = KeyLimits { rpm: Some(0), tpm: Some(0) };
        assert_eq!(rates.take_request("k", nothing, at(0.0)).unwrap_err().retry_after_s(), Some(2));
        assert!(rates.reserve("k", nothing, 5, at(90.0)).is_err());
        rates.settle("k", 0, 7, at(90.0));
        let RateState { requests, tokens } = rates.state("k", nothing, at(90.0));
        assert_eq!(requests, Some(BucketState { limit: 0, remaining: 0, reset: EMPTY_SHARE_WAIT }));
        assert_eq!(tokens.map(|tokens| tokens.remaining), Some(0));
        let some = KeyLimits { rpm: Some(60), tpm: None };
        assert!(rates.take_request("k", some, at(90.0)).is_err(), "a larger share fills evenly, as ever");
        assert!(rates.take_request("k", some, at(91.0)).is_ok());
    }

    #[test]
    fn a_changed_limit_does_not_fill_the_bucket() {
        let mut rates = RateLimits::default();
        let limits = |rpm| KeyLimits { rpm: Some(rpm), tpm: None };
        for _ in 0..10 {
            assert!(rates.take_request("k", limits(10), at(0.0)).is_ok());
        }
        for rpm in [20, 10, 40] {
            assert!(rates.take_request("k", limits(rpm), at(0.0)).is_err(), "{rpm}");
        }
        assert!(rates.take_request("k", limits(60), at(2.0)).is_ok(), "what came in at the old rate stays");
    }

    proptest! {
        #[test]
        fn grants_stay_under_the_limit(steps in prop::collection::vec((0u64..20_000, 1u64..200), 1..60), per_minute in 0u32..5000) {
            let mut bucket = TokenBucket::new(per_minute, Duration::ZERO);
            let (mut now, mut granted) = (Duration::ZERO, 0u64);
            for (wait_ms, amount) in steps {
                now += Duration::from_millis(wait_ms);
                match bucket.take(amount, now) {
                    Ok(taken) => granted += taken,
                    Err(wait) => {
                        let mut later = bucket.clone();
                        prop_assert!(per_minute == 0 || later.take(amount, now + wait + Duration::from_millis(1)).is_ok(), "the wait told is enough");
                    }
                }
                let most = f64::from(per_minute) * (now.as_secs_f64() / 60.0 + 1.0);
                prop_assert!(granted as f64 <= most + 1.0 && (per_minute > 0 || granted == 0));
            }
        }
    }
}
