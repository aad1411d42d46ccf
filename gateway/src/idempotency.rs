//! Idempotency keys as a core without a clock: a retry gets the same seed and the same template clock, hence the
//! same tokens.
//!
//! The seed is a hash of key and tenant, so it survives this process; the record adds what does not follow from the
//! request: the template's clock, and which body the key was used with. Answers are not kept: a replay computes them
//! again, which by P2 gives the same tokens.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use forge_shared::cluster::command::IdempotencyRecord;
use sha2::{Digest, Sha256};

use crate::error::ApiError;

/// How long a key is remembered.
pub const KEEP: Duration = Duration::from_secs(600);
/// Longest key.
pub const MAX_KEY_BYTES: usize = 255;

/// What a key stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Idempotent {
    /// Seed of a request that gives none.
    pub seed: u64,
    /// Clock for the chat template, seconds since 1970.
    pub template_clock_s: u64,
    /// Numerics that answer it: only these give the same tokens again.
    pub numerics_id: Arc<str>,
}

/// A tenant's key with a request, as it is looked up and remembered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyedRequest {
    /// Of tenant and key.
    id: [u8; 32],
    /// Of route and body.
    body: [u8; 32],
}

struct Record {
    body: [u8; 32],
    template_clock_s: u64,
    numerics_id: Arc<str>,
}

impl KeyedRequest {
    /// A key with what was sent under it (route and body).
    ///
    /// # Errors
    /// [`ApiError::Invalid`] for a key that is empty or too long.
    pub fn new(tenant: &str, key: &str, request: &[&[u8]]) -> Result<Self, ApiError> {
        if key.is_empty() || key.len() > MAX_KEY_BYTES {
            let message = format!("Idempotency-Key must have 1 to {MAX_KEY_BYTES} characters, got {}", key.len());
            return Err(ApiError::invalid("Idempotency-Key", message));
        }
        let id = hash("forge idempotency key", &[tenant.as_bytes(), key.as_bytes()]);
        Ok(KeyedRequest { id, body: hash("forge idempotent body", request) })
    }

    /// Hex of the hash of route and body.
    fn body_sha256(&self) -> String {
        hex::encode(self.body)
    }

    /// What the cluster writes down of this key, used for the first time at `now_s` (seconds since 1970), as far as this
    /// gateway knows, with the numerics of a replica that is ready.
    pub fn record(&self, tenant: &str, key: &str, numerics_id: String, now_s: u64) -> IdempotencyRecord {
        IdempotencyRecord {
            tenant: tenant.to_owned(),
            key: key.to_owned(),
            body_sha256: self.body_sha256(),
            clock_s: now_s,
            numerics_id,
            expires_ms: now_s.saturating_add(KEEP.as_secs()).saturating_mul(1000),
        }
    }

    /// The seed of a request that gives none: it follows from tenant and key, so it survives this process.
    fn seed(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.id;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }
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

    /// What a key stands for, if it was used before.
    ///
    /// # Errors
    /// [`ApiError::IdempotencyMismatch`] where it was used with another body.
    pub fn find(&mut self, request: &KeyedRequest, now: Duration) -> Result<Option<Idempotent>, ApiError> {
        self.expire(now);
        match self.records.get(&request.id) {
            None => Ok(None),
            Some(record) if record.body != request.body => Err(ApiError::IdempotencyMismatch),
            Some(Record { template_clock_s, numerics_id, .. }) => {
                Ok(Some(Idempotent { seed: request.seed(), template_clock_s: *template_clock_s, numerics_id: numerics_id.clone() }))
            }
        }
    }

    /// Remembers a key that [`IdempotencyRecords::find`] did not know, with the clock its template is rendered with and
    /// the numerics that answer it.
    pub fn remember(&mut self, request: &KeyedRequest, now: Duration, template_clock_s: u64, numerics_id: Arc<str>) -> Idempotent {
        while self.oldest_first.len() >= self.most.max(1) {
            self.forget_oldest();
        }
        let record = Record { body: request.body, template_clock_s, numerics_id: numerics_id.clone() };
        if self.records.insert(request.id, record).is_none() {
            self.oldest_first.push_back((request.id, now + KEEP));
        }
        Idempotent { seed: request.seed(), template_clock_s, numerics_id }
    }

    /// Remembers a key by the record that counts: the cluster's, which may be of an earlier use at another gateway, or this
    /// gateway's own where no coordinator answered.
    ///
    /// # Errors
    /// [`ApiError::IdempotencyMismatch`] where it was used with another body.
    pub fn settle(&mut self, request: &KeyedRequest, record: IdempotencyRecord, now: Duration) -> Result<Idempotent, ApiError> {
        if record.body_sha256 != request.body_sha256() {
            return Err(ApiError::IdempotencyMismatch);
        }
        Ok(self.remember(request, now, record.clock_s, record.numerics_id.into()))
    }

    fn expire(&mut self, now: Duration) {
        while self.oldest_first.front().is_some_and(|(_, expires)| *expires <= now) {
            self.forget_oldest();
        }
    }

    fn forget_oldest(&mut self) {
        if let Some((id, _)) = self.oldest_first.pop_front() {
            self.records.remove(&id);
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

/// The id under which a record is proposed: the same for every gateway and every try, so that a retry that overtakes its
/// first is the same command.
pub fn command_id(record: &IdempotencyRecord) -> String {
    let id = Sha256::new().chain_update(&record.tenant).chain_update([0]).chain_update(&record.key).chain_update([0]);
    let id = id.chain_update(&record.body_sha256).chain_update(record.clock_s.to_le_bytes());
    format!("idempotency-{}", hex::encode(id.finalize()))
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

    fn request(tenant: &str, key: &str, body: &[u8]) -> KeyedRequest {
        KeyedRequest::new(tenant, key, &[body]).unwrap()
    }

    #[test]
    fn a_retry_keeps_seed_and_clock_and_another_body_is_refused() {
        let mut records = IdempotencyRecords::new(10);
        let first = request("a", "k", b"x");
        assert_eq!(records.find(&first, ZERO), Ok(None));
        let accepted = records.remember(&first, ZERO, 100, "n".into());
        assert_eq!(records.find(&first, Duration::from_secs(5)), Ok(Some(accepted.clone())));
        assert_eq!(records.find(&request("a", "k", b"y"), ZERO), Err(ApiError::IdempotencyMismatch));
        let other = request("b", "k", b"y");
        assert_eq!(records.find(&other, ZERO), Ok(None));
        assert_ne!(records.remember(&other, ZERO, 100, "n".into()).seed, accepted.seed, "tenants do not share");
        let later = request("a", "k", b"y");
        assert_eq!(records.find(&later, KEEP), Ok(None), "forgotten");
        assert_eq!(records.remember(&later, KEEP, 700, "n".into()).seed, accepted.seed, "and the seed is the same");
    }

    #[test]
    fn the_clusters_record_counts_and_not_this_gateways() {
        let mut records = IdempotencyRecords::new(10);
        let request = request("a", "k", b"x");
        let own = request.record("a", "k", "n2".into(), 700);
        let known = IdempotencyRecord { clock_s: 100, numerics_id: "n1".into(), ..own.clone() };
        assert_ne!(command_id(&own), command_id(&known));
        let settled = records.settle(&request, known, ZERO).unwrap();
        assert_eq!((settled.template_clock_s, &*settled.numerics_id), (100, "n1"));
        assert_eq!(records.find(&request, ZERO), Ok(Some(settled)));
        let other = IdempotencyRecord { body_sha256: "00".into(), ..own };
        assert_eq!(records.settle(&request, other, ZERO), Err(ApiError::IdempotencyMismatch));
    }

    #[test]
    fn number_of_keys_is_bounded() {
        let mut records = IdempotencyRecords::new(3);
        for i in 0..50 {
            records.remember(&request("a", &i.to_string(), b"x"), ZERO, 0, "n".into());
            assert!(records.len() <= 3);
        }
        assert!(records.find(&request("a", "49", b"y"), ZERO).is_err(), "the newest is remembered");
        assert!(KeyedRequest::new("a", "", &[b""]).is_err());
        assert!(KeyedRequest::new("a", &"k".repeat(256), &[b""]).is_err());
    }
}
