//! Accepted requests with an idempotency key, so that any gateway can give their answers again.
//!
//! Invariant: a record is never changed, and not forgotten before its life is over; a tenant's records are bounded, so
//! that none pushes out another's.

use std::collections::BTreeMap;

use forge_shared::cluster::command::{CommandError, IdempotencyRecord};
use serde::{Deserialize, Serialize};

use super::clock::Clock;
use super::{ClusterState, Effect, IDEMPOTENCY_LIFE_MS, MAX_IDEMPOTENCY, MAX_IDEMPOTENCY_TENANT, checks};

/// Records by tenant and key.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Idempotency {
    by_tenant: BTreeMap<String, BTreeMap<String, Kept>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Kept {
    record: IdempotencyRecord,
    /// End of its life by the state's calm count.
    ends_calm_ms: u64,
}

impl Idempotency {
    pub fn get(&self, tenant: &str, key: &str, clock: &Clock) -> Option<&IdempotencyRecord> {
        let kept = self.by_tenant.get(tenant)?.get(key)?;
        (clock.calm_ms() < kept.ends_calm_ms).then_some(&kept.record)
    }

    pub fn len(&self) -> usize {
        self.by_tenant.values().map(BTreeMap::len).sum()
    }

    pub fn is_sound(&self) -> bool {
        self.len() <= MAX_IDEMPOTENCY
            && self.by_tenant.iter().all(|(tenant, records)| {
                !records.is_empty()
                    && records.len() <= MAX_IDEMPOTENCY_TENANT
                    && records.iter().all(|(key, kept)| kept.record.tenant == *tenant && kept.record.key == *key)
            })
    }

    fn clear(&mut self, clock: &Clock) {
        self.by_tenant.retain(|_, records| {
            records.retain(|_, kept| clock.calm_ms() < kept.ends_calm_ms);
            !records.is_empty()
        });
    }
}

impl ClusterState {
    pub(super) fn record_idempotency(&mut self, record: &IdempotencyRecord) -> Result<Effect, CommandError> {
        checks::name("record.tenant", &record.tenant)?;
        if record.key.is_empty() || record.key.len() > 255 || !record.key.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
            return checks::invalid("record.key", "must be 1 to 255 printable ASCII characters");
        }
        checks::hex("record.bodySha256", &record.body_sha256, 64)?;
        checks::text("record.numericsId", &record.numerics_id, 512)?;
        if record.numerics_id.is_empty() {
            return checks::invalid("record.numericsId", "is empty: record a key once a replica is ready, with its numerics");
        }
        if let Some(existing) = self.idempotency.get(&record.tenant, &record.key, &self.clock) {
            return Ok(Effect { changed: false, existing: Some(existing.clone()) });
        }
        let of_tenant = |idempotency: &Idempotency| idempotency.by_tenant.get(&record.tenant).map_or(0, BTreeMap::len);
        if self.idempotency.len() >= MAX_IDEMPOTENCY || of_tenant(&self.idempotency) >= MAX_IDEMPOTENCY_TENANT {
            // What has run out is no record any more, whether or not this one finds room.
            self.idempotency.clear(&self.clock);
            checks::bounded("idempotency records of one key", of_tenant(&self.idempotency), MAX_IDEMPOTENCY_TENANT)?;
            checks::bounded("idempotency records", self.idempotency.len(), MAX_IDEMPOTENCY)?;
        }
        // A gateway's clock may be off: a record is never born dead, and never stays for ever.
        let (shortest_ms, longest_ms) = IDEMPOTENCY_LIFE_MS;
        let life_ms = record.expires_ms.saturating_sub(self.clock.last_ms()).clamp(shortest_ms, longest_ms);
        let kept = Kept { record: record.clone(), ends_calm_ms: self.clock.calm_ms().saturating_add(life_ms) };
        self.idempotency.by_tenant.entry(record.tenant.clone()).or_default().insert(record.key.clone(), kept);
        Ok(Effect::CHANGED)
    }
}
