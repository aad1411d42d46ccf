//! Idempotency keys as a core without a clock: a retry gets the same seed and the same template clock, hence the
//! same tokens.
//!
//! The seed is a hash of key and tenant, so it survives this process; the record adds what does not follow from the
//! request: the template's clock, and which body the key was used with. Answers are not kept: a replay computes them
//! again, which by P2 gives the same tokens.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::error::ApiError;

/// How long a key is remembered.
pub const KEEP: Duration = Duration::from_secs(600);
/// Longest key.
pub const MAX_KEY_BYTES: usize = 255;

/// What a key stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Idempotent {
    /// Seed of a request that gives none.
    pub seed: u64,
    /// Clock for the chat template, seconds since 1970.
    pub template_clock_s: u64,
}

struct Record {
    body: [u8; 32],
    template_clock_s: u64,
}

/// Remembered keys: bounded in number, forgotten after [`KEEP`].
pub struct IdempotencyRecords {
    most: usize,
    records: HashMap<[u8; 32], Record>,
    oldest_first: VecDeque<([u8; 32], Duration)>,
}

impl IdempotencyRecords {
    /// Remembers at most `most` keys.
    pub fn new(most: usize) -> Self {
        IdempotencyRecords { most, records: HashMap::new(), oldest_first: VecDeque::new() }
    }

    /// What a tenant's key stands for with this request (route and body).
    ///
    /// # Errors
    /// [`ApiError::IdempotencyMismatch`] for another body, [`ApiError::Invalid`] for a key that is empty or too long.
    pub fn lookup(&mut self, tenant: &str, key: &str, request: &[&[u8]], now: Duration, now_unix_s: u64) -> Result<Idempotent, ApiError> {
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            let message = format!("Idempotency-Key must have 1 to {MAX_KEY_BYTES} characters, got {}", key.len());
            return Err(ApiError::invalid("Idempotency-Key", message));
        }
        let id = hash("forge idempotency key", &[tenant.as_bytes(), key.as_bytes()]);
        let body = hash("forge idempotent body", request);
        self.forget(now);
        let seed = u64::from_le_bytes(id[..8].try_into().expect("a hash has 32 bytes"));
        if let Some(record) = self.records.get(&id) {
            if record.body != body {
                return Err(ApiError::IdempotencyMismatch);
            }
            return Ok(Idempotent { seed, template_clock_s: record.template_clock_s });
        }
        let expires = now + KEEP;
        self.records.insert(id, Record { body, template_clock_s: now_unix_s });
        self.oldest_first.push_back((id, expires));
        Ok(Idempotent { seed, template_clock_s: now_unix_s })
    }

    /// Drops what is expired, and the oldest if there is no room for one more.
    fn forget(&mut self, now: Duration) {
        while let Some((id, expires)) = self.oldest_first.front() {
            if *expires > now && self.oldest_first.len() < self.most {
                return;
            }
            self.records.remove(id);
            self.oldest_first.pop_front();
        }
    }

    /// Keys remembered.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether none is remembered.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }
}

/// SHA-256 over parts, each preceded by its length, so that no two lists of parts look alike.
fn hash(domain: &str, parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = Sha256::new();
    for part in std::iter::once(&domain.as_bytes()).chain(parts) {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZERO: Duration = Duration::ZERO;

    #[test]
    fn a_retry_keeps_seed_and_clock_and_another_body_is_refused() {
        let mut records = IdempotencyRecords::new(10);
        let first = records.lookup("a", "k", &[b"x"], ZERO, 100).unwrap();
        assert_eq!(records.lookup("a", "k", &[b"x"], Duration::from_secs(5), 105).unwrap(), first);
        assert_eq!(records.lookup("a", "k", &[b"y"], ZERO, 100), Err(ApiError::IdempotencyMismatch));
        let other = records.lookup("b", "k", &[b"y"], ZERO, 100).unwrap();
        assert_ne!(other.seed, first.seed, "tenants do not share");
        let later = records.lookup("a", "k", &[b"y"], KEEP, 700).unwrap();
        assert_eq!((later.seed, later.template_clock_s), (first.seed, 700), "forgotten, and the seed is the same");
        let mut restarted = IdempotencyRecords::new(10);
        assert_eq!(restarted.lookup("a", "k", &[b"x"], ZERO, 1).unwrap().seed, first.seed);
    }

    #[test]
    fn number_of_keys_is_bounded() {
        let mut records = IdempotencyRecords::new(3);
        for i in 0..50 {
            records.lookup("a", &i.to_string(), &[b"x"], ZERO, 0).unwrap();
            assert!(records.len() <= 3);
        }
        assert!(records.lookup("a", "49", &[b"y"], ZERO, 0).is_err(), "the newest is remembered");
        assert!(records.lookup("a", "", &[b""], ZERO, 0).is_err());
        assert!(records.lookup("a", &"k".repeat(256), &[b""], ZERO, 0).is_err());
    }
}
