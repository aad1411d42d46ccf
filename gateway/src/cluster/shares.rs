//! This gateway's shares of the keys' budgets, and what it used of them.
//!
//! The leader splits a key's limits among gateways and renews the split with every heartbeat; the last one is kept while
//! no leader answers. Invariant: a limited key without a share yet is not let through, so all gateways together never
//! admit more than the key's limit and the one share that a gateway which is thought dead may still hold.

use std::collections::HashMap;

use forge_shared::cluster::session::{KeyShare, KeyUsage};
use parking_lot::Mutex;

use crate::keys::KeyLimits;

/// See the module documentation.
#[derive(Debug, Default)]
pub struct Shares {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    shares: HashMap<String, KeyLimits>,
    used: HashMap<String, Used>,
}

#[derive(Debug, Default, Clone, Copy)]
struct Used {
    requests: u64,
    tokens: u64,
    refused: u64,
}

impl Shares {
    /// What the leader granted; keys that are not in it keep what they had.
    pub fn grant(&self, shares: Vec<KeyShare>) {
        let mut inner = self.inner.lock();
        for share in shares {
            inner.shares.insert(share.key_id, KeyLimits { rpm: share.rpm, tpm: share.tpm });
        }
    }

    /// What a key with these limits may use here: `None` where it is limited and its share is not known yet. A share may
    /// be nothing.
    pub fn limits(&self, key_id: &str, limits: KeyLimits) -> Option<KeyLimits> {
        if limits == KeyLimits::default() {
            return Some(limits);
        }
        let share = *self.inner.lock().shares.get(key_id)?;
        // The operator may have lowered the key's limits since the share was granted, or limited what was not.
        let least = |share: Option<u32>, whole: Option<u32>| match (share, whole) {
            (_, None) => Some(None),
            (Some(share), Some(whole)) => Some(Some(share.min(whole))),
            (None, Some(_)) => None,
        };
        Some(KeyLimits { rpm: least(share.rpm, limits.rpm)?, tpm: least(share.tpm, limits.tpm)? })
    }

    /// Counts an admitted request.
    pub fn count_request(&self, key_id: &str) {
        self.count(key_id, |used| used.requests += 1);
    }

    /// Counts tokens that were used.
    pub fn count_tokens(&self, key_id: &str, tokens: u64) {
        self.count(key_id, |used| used.tokens += tokens);
    }

    /// Counts a refusal for want of budget.
    pub fn count_refused(&self, key_id: &str) {
        self.count(key_id, |used| used.refused += 1);
    }

    fn count(&self, key_id: &str, change: impl FnOnce(&mut Used)) {
        change(self.inner.lock().used.entry(key_id.to_owned()).or_default());
    }

    /// What was used since the last call, of every limited key, and the share held of it: the leader grants shares of the
    /// keys it hears of, and a new leader learns what the last one lent.
    pub fn take_usage(&self, limited: &[String]) -> Vec<KeyUsage> {
        let mut inner = self.inner.lock();
        let mut used = std::mem::take(&mut inner.used);
        let of = |key_id: &String| {
            let Used { requests, tokens, refused } = used.remove(key_id).unwrap_or_default();
            let held = inner.shares.get(key_id).copied().unwrap_or_default();
            KeyUsage { key_id: key_id.clone(), requests, tokens, refused, held_rpm: held.rpm, held_tpm: held.tpm }
        };
        limited.iter().map(of).collect()
    }

    /// Forgets keys that are gone.
    pub fn retain(&self, exists: impl Fn(&str) -> bool) {
        self.inner.lock().shares.retain(|key_id, _| exists(key_id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limited_key_waits_for_its_share_and_never_exceeds_its_limit() {
        let shares = Shares::default();
        let limits = KeyLimits { rpm: Some(60), tpm: None };
        assert_eq!(shares.limits("k", KeyLimits::default()), Some(KeyLimits::default()));
        assert_eq!(shares.limits("k", limits), None);
        shares.grant(vec![KeyShare { key_id: "k".into(), rpm: Some(40), tpm: None }]);
        assert_eq!(shares.limits("k", limits), Some(KeyLimits { rpm: Some(40), tpm: None }));
        assert_eq!(shares.limits("k", KeyLimits { rpm: Some(10), tpm: None }), Some(KeyLimits { rpm: Some(10), tpm: None }));
        let more = KeyLimits { rpm: Some(60), tpm: Some(900) };
        assert_eq!(shares.limits("k", more), None, "of a limit that is new, no share was lent yet");
        shares.grant(vec![KeyShare { key_id: "k".into(), rpm: Some(40), tpm: Some(0) }]);
        assert_eq!(shares.limits("k", more), Some(KeyLimits { rpm: Some(40), tpm: Some(0) }));
        shares.retain(|key| key != "k");
        assert_eq!(shares.limits("k", limits), None);
    }

    #[test]
    fn usage_is_told_once_and_names_every_limited_key() {
        let shares = Shares::default();
        shares.count_request("b");
        shares.count_tokens("b", 30);
        shares.count_refused("b");
        shares.grant(vec![KeyShare { key_id: "b".into(), rpm: Some(7), tpm: None }]);
        let usage = shares.take_usage(&["a".to_owned(), "b".to_owned()]);
        let unused = KeyUsage { key_id: "a".into(), requests: 0, tokens: 0, refused: 0, held_rpm: None, held_tpm: None };
        let used = KeyUsage { key_id: "b".into(), requests: 1, tokens: 30, refused: 1, held_rpm: Some(7), held_tpm: None };
        assert_eq!(usage, [unused, used]);
        assert_eq!(shares.take_usage(&["b".to_owned()])[0].requests, 0);
    }
}
