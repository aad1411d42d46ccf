//! API keys: the file an operator manages, and the view of it a running gateway has.
//!
//! A key is `sk-forge-` and 80 hexadecimal digits: 16 name the key, 64 are the secret. The file keeps a random
//! salt and SHA-256 of salt and secret. A fast hash is enough here: the secret is 256 random bits, not a
//! password, so there is nothing to guess that a slow hash would protect.
//!
//! Invariant: the plaintext leaves [`KeyStore::create`] once and is never stored; comparing takes the same time
//! whatever the difference.

mod file;
mod ring;

pub use file::KeyStore;
pub use ring::{KeyRing, Tenant};

use forge_shared::cluster::command::ApiKeyRecord;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::error::GatewayError;

/// What every key begins with.
pub const KEY_PREFIX: &str = "sk-forge-";
const ID_HEX: usize = 16;
const SECRET_HEX: usize = 64;

/// Rate limits of a key; absent means unlimited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyLimits {
    /// Requests per minute.
    #[serde(default)]
    pub rpm: Option<u32>,
    /// Tokens per minute, prompt and answer.
    #[serde(default)]
    pub tpm: Option<u32>,
}

/// A key as it is stored and listed; it does not contain the key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyRecord {
    /// First digits of the key; also its tenant.
    pub id: String,
    /// What the operator calls it.
    pub name: String,
    /// When it was made, seconds since 1970.
    pub created_s: u64,
    /// When it was revoked, if it was.
    #[serde(default)]
    pub revoked_s: Option<u64>,
    /// Its limits.
    #[serde(default)]
    pub limits: KeyLimits,
    /// Hex of 16 random bytes.
    salt: String,
    /// Hex of SHA-256 over salt and secret.
    hash: String,
}

/// A key that has just been made.
#[derive(Debug, Clone)]
pub struct CreatedKey {
    /// The key itself; shown once.
    pub plaintext: String,
    /// What is kept of it.
    pub record: KeyRecord,
}

impl From<ApiKeyRecord> for KeyRecord {
    fn from(key: ApiKeyRecord) -> Self {
        let ApiKeyRecord { id, name, created_s, revoked_s, rpm, tpm, salt, hash } = key;
        KeyRecord { id, name, created_s, revoked_s, limits: KeyLimits { rpm, tpm }, salt, hash }
    }
}

impl From<KeyRecord> for ApiKeyRecord {
    fn from(key: KeyRecord) -> Self {
        let KeyRecord { id, name, created_s, revoked_s, limits: KeyLimits { rpm, tpm }, salt, hash } = key;
        ApiKeyRecord { id, name, created_s, revoked_s, rpm, tpm, salt, hash }
    }
}

impl KeyRecord {
    /// Makes a key; the plaintext is in the answer and nowhere else.
    ///
    /// # Errors
    /// A name that is not allowed, or a limit of zero.
    pub fn generate(name: &str, limits: KeyLimits, created_s: u64) -> Result<CreatedKey, GatewayError> {
        check_name(name)?;
        for (field, limit) in [("rpm", limits.rpm), ("tpm", limits.tpm)] {
            if limit == Some(0) {
                return Err(GatewayError::KeyInvalid {
                    field,
                    reason: "must be at least 1; leave it out for no limit, or revoke the key".into(),
                });
            }
        }
        let id = random_hex::<{ ID_HEX / 2 }>()?;
        let secret = random_hex::<{ SECRET_HEX / 2 }>()?;
        let salt = random_hex::<16>()?;
        let hash = hex::encode(digest(&salt, &secret));
        let plaintext = format!("{KEY_PREFIX}{id}{secret}");
        let record = KeyRecord { id, name: name.to_owned(), created_s, revoked_s: None, limits, salt, hash };
        Ok(CreatedKey { plaintext, record })
    }

    /// Whether `secret` is this key's.
    fn matches(&self, secret: &str) -> bool {
        let Ok(expected) = hex::decode(&self.hash) else {
            return false;
        };
        digest(&self.salt, secret).as_slice().ct_eq(&expected).into()
    }
}

fn digest(salt: &str, secret: &str) -> [u8; 32] {
    Sha256::new().chain_update(salt).chain_update(secret).finalize().into()
}

/// Splits a key into id and secret; `None` if it does not look like one of ours.
fn split(key: &str) -> Option<(&str, &str)> {
    let digits = key.strip_prefix(KEY_PREFIX)?;
    let hexadecimal = digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    (digits.len() == ID_HEX + SECRET_HEX && hexadecimal).then(|| digits.split_at(ID_HEX))
}

fn random_hex<const BYTES: usize>() -> Result<String, GatewayError> {
    let mut bytes = [0u8; BYTES];
    getrandom::fill(&mut bytes).map_err(|error| GatewayError::Random(error.to_string()))?;
    Ok(hex::encode(bytes))
}

fn check_name(name: &str) -> Result<(), GatewayError> {
    let allowed = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '@' | ' ');
    if (1..=64).contains(&name.chars().count()) && name.chars().all(allowed) && name.trim() == name {
        return Ok(());
    }
    Err(GatewayError::KeyInvalid {
        field: "name",
        reason: format!("{name:?} must be 1 to 64 letters, digits or any of - _ . @ and inner spaces"),
    })
}
