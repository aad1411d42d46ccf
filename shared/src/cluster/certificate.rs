//! Certificates as the cluster knows them, and which CAs and certificates its processes believe.
//!
//! What it is not: keys. Those of nodes never leave them, and a CA's lies in the coordinators' folders.
//!
//! Invariant: what is believed is in the log: every process carries out the same [`Trust`].

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::Revision;
use super::node::Role;

/// Whose certificates.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Holder {
    /// As what.
    pub role: Role,
    /// Under which name.
    pub name: String,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.role, self.name)
    }
}

/// A certificate that was signed or seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CertificateRecord {
    /// Its serial number: hex digits without zeros before them; its name among objects.
    pub serial: String,
    /// Of whom.
    pub role: Role,
    /// Of whom.
    pub name: String,
    /// When it was issued, seconds since 1970.
    pub issued_s: u64,
    /// When it ends, seconds since 1970.
    pub expires_s: u64,
    /// Hex of SHA-256 over the certificate of the CA that signed it.
    pub ca_sha256: String,
    /// The CAs that its holder said it believes when it asked for it, likewise. Empty where it was made by hand.
    #[serde(default)]
    pub believes: Vec<String>,
    /// Whether its holder has shown it: one that was signed may never have come, or was not kept.
    #[serde(default)]
    pub is_used: bool,
    /// The entry of the log that wrote it down; 0 before that.
    #[serde(default)]
    pub written: Revision,
    /// When it was revoked, seconds since 1970, if it was.
    pub revoked_s: Option<u64>,
}

impl CertificateRecord {
    /// `role/name`.
    pub fn holder(&self) -> String {
        format!("{}/{}", self.role, self.name)
    }

    /// The newest of one holder's. Those that were asked for have the order of the log: clocks of those who sign differ. One
    /// that was made by hand is written down when it is seen, and has its time alone; in one second it is the older.
    pub fn newest<'a>(of_one: impl IntoIterator<Item = &'a CertificateRecord>) -> Option<&'a CertificateRecord> {
        let (asked, by_hand): (Vec<_>, Vec<_>) = of_one.into_iter().partition(|record| !record.believes.is_empty());
        let asked = asked.into_iter().max_by_key(|record| record.written);
        let by_hand = by_hand.into_iter().max_by_key(|record| (record.issued_s, record.written));
        match (asked, by_hand) {
            (Some(asked), Some(by_hand)) if by_hand.issued_s > asked.issued_s => Some(by_hand),
            (Some(asked), _) => Some(asked),
            (None, by_hand) => by_hand,
        }
    }

    /// From when on it should have been renewed: two thirds of its life, seconds since 1970.
    pub fn renew_at_s(&self) -> u64 {
        self.issued_s + self.expires_s.saturating_sub(self.issued_s) * 2 / 3
    }
}

/// A CA of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CaRecord {
    /// Hex of SHA-256 over its certificate's DER.
    pub sha256: String,
    /// Its certificate.
    pub certificate_pem: String,
}

/// How far one CA has taken another's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum CaRotation {
    /// Both are believed, and the old one signs: everybody learns of the new one.
    Introduced,
    /// Both are believed, and the new one signs: everybody gets a certificate of it.
    Switched,
}

/// What every process of the cluster believes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Trust {
    /// The CAs, the one that signs first. None as long as the CA of `cluster init` has never been rotated.
    #[serde(default)]
    pub cas: Vec<CaRecord>,
    /// Whether one takes the other's place, and how far.
    #[serde(default)]
    pub rotation: Option<CaRotation>,
    /// Serial numbers that are believed no more.
    #[serde(default)]
    pub revoked: BTreeSet<String>,
}

impl Trust {
    /// Its name among objects: there is one.
    pub const NAME: &str = "trust";

    /// The CA that signs, if it is not the only one there ever was.
    pub fn signing(&self) -> Option<&CaRecord> {
        self.cas.first()
    }

    /// Certificates of all CAs, one after the other; `only` where there is no other than that one.
    pub fn cas_pem(&self, only: &str) -> String {
        if self.cas.is_empty() { only.to_owned() } else { self.cas.iter().map(|ca| ca.certificate_pem.as_str()).collect() }
    }
}
