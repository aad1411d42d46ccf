//! The running gateway's view of the keys: looked up per request, read again when the file changes.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;

use super::{KeyLimits, KeyRecord, KeyStore, split};
use crate::cluster::Shares;
use crate::error::{ApiError, GatewayError};

/// How often the file is looked at.
const CHECK_EVERY: Duration = Duration::from_millis(500);

/// Whose request it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// The key's id; `None` where no keys are configured.
    pub key_id: Option<String>,
    /// Its limits.
    pub limits: KeyLimits,
}

impl Tenant {
    fn anonymous() -> Self {
        Tenant { key_id: None, limits: KeyLimits::default() }
    }

    /// What separates this tenant from the others: the key's id.
    pub fn name(&self) -> &str {
        self.key_id.as_deref().unwrap_or("anonymous")
    }
}

/// The keys a gateway accepts: of a file that it watches, and as the coordinators tell. Clones share one view.
///
/// Invariants: a gateway that once saw a key stays closed to requests without one, even if the file vanishes; neither
/// source takes away what the other gave.
#[derive(Debug, Clone)]
pub struct KeyRing {
    store: Option<KeyStore>,
    view: Arc<Mutex<View>>,
    /// Limits of told keys are split among gateways.
    shares: Option<Arc<Shares>>,
}

#[derive(Debug)]
struct View {
    /// Of the file.
    keys: HashMap<String, KeyRecord>,
    told: HashMap<String, KeyRecord>,
    closed: bool,
    stamp: Stamp,
    checked: Instant,
}

/// Changes when the file does: every save is a new file.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    bytes: u64,
    inode: u64,
}

impl Stamp {
    fn of(path: &Path) -> Stamp {
        let Ok(data) = std::fs::metadata(path) else {
            return Stamp::default();
        };
        #[cfg(unix)]
        let inode = std::os::unix::fs::MetadataExt::ino(&data);
        #[cfg(not(unix))]
        let inode = 0;
        Stamp { modified: data.modified().ok(), bytes: data.len(), inode }
    }
}

impl KeyRing {
    /// No keys and no file to watch: everybody is let in.
    pub fn none() -> Self {
        Self::with(None, HashMap::new(), Stamp::default())
    }

    /// The keys of a file, which need not exist yet.
    ///
    /// # Errors
    /// The file cannot be read or is not a key file.
    pub fn open(path: impl Into<std::path::PathBuf>) -> Result<Self, GatewayError> {
        let store = KeyStore::new(path);
        let stamp = Stamp::of(store.path());
        let keys = by_id(store.list()?);
        Ok(Self::with(Some(store), keys, stamp))
    }

    /// Keys that are told by [`KeyRing::replace`], with limits of which this gateway has a share.
    pub fn told(shares: Arc<Shares>) -> Self {
        Self::none().and_told(shares)
    }

    /// These keys, with their own limits, and besides them keys that are told as to [`KeyRing::told`].
    #[must_use]
    pub fn and_told(self, shares: Arc<Shares>) -> Self {
        KeyRing { shares: Some(shares), ..self }
    }

    /// Takes the told keys of now. Once there was one, none being left lets nobody in.
    pub fn replace(&self, keys: Vec<KeyRecord>) {
        let mut view = self.view.lock();
        view.told = by_id(keys);
        view.closed |= !view.told.is_empty();
    }

    /// Counts an admitted request of a key's budget.
    pub(crate) fn count_request(&self, tenant: &Tenant) {
        if let (Some(shares), Some(id)) = (&self.shares, &tenant.key_id) {
            shares.count_request(id);
        }
    }

    /// Counts tokens of a key's budget.
    pub(crate) fn count_tokens(&self, tenant: &Tenant, tokens: u64) {
        if let (Some(shares), Some(id)) = (&self.shares, &tenant.key_id) {
            shares.count_tokens(id, tokens);
        }
    }

    /// Counts a refusal for want of budget.
    pub(crate) fn count_refused(&self, tenant: &Tenant) {
        if let (Some(shares), Some(id)) = (&self.shares, &tenant.key_id) {
            shares.count_refused(id);
        }
    }

    /// Ids of the told keys that are good and have limits.
    pub fn limited(&self) -> Vec<String> {
        let view = self.view.lock();
        let limited = |key: &&KeyRecord| key.revoked_s.is_none() && key.limits != KeyLimits::default();
        view.told.values().filter(limited).map(|key| key.id.clone()).collect()
    }

    fn with(store: Option<KeyStore>, keys: HashMap<String, KeyRecord>, stamp: Stamp) -> Self {
        let view = View { closed: !keys.is_empty(), keys, told: HashMap::new(), stamp, checked: Instant::now() };
        KeyRing { store, view: Arc::new(Mutex::new(view)), shares: None }
    }

    /// Whether a key is needed: one is, or was, configured (revoked ones count).
    pub fn required(&self) -> bool {
        let mut view = self.view.lock();
        self.refresh(&mut view);
        view.closed
    }

    /// Whose request carries this `Authorization` header.
    ///
    /// # Errors
    /// [`ApiError::Unauthorized`] where keys are configured and the header holds none of them.
    pub fn authenticate(&self, authorization: Option<&str>) -> Result<Tenant, ApiError> {
        let mut view = self.view.lock();
        self.refresh(&mut view);
        if !view.closed {
            return Ok(Tenant::anonymous());
        }
        let key = authorization
            .and_then(bearer)
            .ok_or(ApiError::Unauthorized("no API key: send it as the header Authorization: Bearer sk-forge-…"))?;
        let is_good = |record: &&KeyRecord, secret: &str| record.matches(secret) && record.revoked_s.is_none();
        let wrong = ApiError::Unauthorized("the API key is wrong or revoked; ask the operator for one (forgectl keys create NAME)");
        let Some((id, secret)) = split(key) else { return Err(wrong) };
        let limits = if let Some(record) = view.keys.get(id).filter(|record| is_good(record, secret)) {
            record.limits
        } else if let Some(record) = view.told.get(id).filter(|record| is_good(record, secret)) {
            self.share(record)?
        } else {
            return Err(wrong);
        };
        Ok(Tenant { key_id: Some(id.to_owned()), limits })
    }

    /// What a told key may use at this gateway.
    fn share(&self, record: &KeyRecord) -> Result<KeyLimits, ApiError> {
        let Some(shares) = &self.shares else { return Ok(record.limits) };
        shares.limits(&record.id, record.limits).ok_or_else(|| {
            // It is demand all the same: a gateway that nobody asks for a key is lent least of it.
            shares.count_refused(&record.id);
            let message = "this gateway has not been given its share of the key's limits yet; send the request again".into();
            ApiError::Unavailable { message, retry_after_s: 1 }
        })
    }

    /// Reads the file again if it changed. A file that cannot be read leaves the keys as they were, and is read again
    /// at the next look: what was missed may be a revocation.
    fn refresh(&self, view: &mut View) {
        let Some(store) = self.store.as_ref().filter(|_| view.checked.elapsed() >= CHECK_EVERY) else {
            return;
        };
        view.checked = Instant::now();
        let stamp = Stamp::of(store.path());
        if stamp == view.stamp {
            return;
        }
        match store.list() {
            Ok(keys) => {
                view.keys = by_id(keys);
                view.closed |= !view.keys.is_empty();
                view.stamp = stamp;
                tracing::info!(keys = view.keys.len(), "key file read again");
            }
            Err(error) => tracing::error!(%error, "key file not read; the keys stay as they were"),
        }
    }
}

fn by_id(keys: Vec<KeyRecord>) -> HashMap<String, KeyRecord> {
    keys.into_iter().map(|key| (key.id.clone(), key)).collect()
}

fn bearer(header: &str) -> Option<&str> {
    let (scheme, key) = header.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| key.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_secret_opens_and_revoking_closes_within_a_second() {
        let folder = tempfile::tempdir().unwrap();
        let store = KeyStore::new(folder.path().join("keys.json"));
        let ring = KeyRing::open(store.path()).unwrap();
        assert_eq!(ring.authenticate(None).unwrap(), Tenant::anonymous());

        let created = store.create("a", KeyLimits { rpm: Some(5), tpm: None }, 0).unwrap();
        std::thread::sleep(Duration::from_millis(600));
        let good = format!("Bearer {}", created.plaintext);
        let tenant = ring.authenticate(Some(&good)).unwrap();
        assert_eq!((tenant.key_id.as_deref(), tenant.limits.rpm), (Some(created.record.id.as_str()), Some(5)));
        assert!(ring.authenticate(Some(&good.replace("Bearer", "bearer"))).is_ok());

        let last = if good.ends_with('0') { '1' } else { '0' };
        let mut wrong = good.clone();
        wrong.pop();
        for header in [format!("{wrong}{last}"), wrong, "Bearer ".into(), "Basic x".into(), created.plaintext.clone()] {
            assert!(ring.authenticate(Some(&header)).is_err(), "{header}");
        }
        assert!(ring.authenticate(None).is_err());

        store.revoke("a", 1).unwrap();
        std::thread::sleep(Duration::from_millis(600));
        assert!(ring.authenticate(Some(&good)).is_err());
        std::fs::remove_file(store.path()).unwrap();
        std::thread::sleep(Duration::from_millis(600));
        assert!(ring.authenticate(None).is_err(), "a vanished file opens nothing");
    }

    #[test]
    fn keys_of_the_file_and_told_ones_stand_side_by_side() {
        let folder = tempfile::tempdir().unwrap();
        let store = KeyStore::new(folder.path().join("keys.json"));
        let own = store.create("own", KeyLimits { rpm: Some(5), tpm: None }, 0).unwrap();
        let elsewhere = KeyStore::new(folder.path().join("elsewhere.json"));
        let told = elsewhere.create("told", KeyLimits { rpm: Some(60), tpm: None }, 0).unwrap();
        let shares = Arc::new(Shares::default());
        let ring = KeyRing::open(store.path()).unwrap().and_told(shares.clone());
        let limits = |key: &str| ring.authenticate(Some(&format!("Bearer {key}"))).map(|tenant| tenant.limits.rpm);
        ring.replace(Vec::new());
        assert_eq!(limits(&own.plaintext).unwrap(), Some(5), "nothing told takes nothing away, and its limits need no share");
        assert!(limits(&told.plaintext).is_err());
        ring.replace(vec![told.record.clone()]);
        assert_eq!(ring.limited(), std::slice::from_ref(&told.record.id));
        assert!(matches!(limits(&told.plaintext), Err(ApiError::Unavailable { .. })), "its share is not known yet");
        shares.grant(vec![forge_shared::cluster::session::KeyShare { key_id: told.record.id.clone(), rpm: Some(20), tpm: None }]);
        assert_eq!((limits(&told.plaintext).unwrap(), limits(&own.plaintext).unwrap()), (Some(20), Some(5)));
        store.revoke("own", 1).unwrap();
        std::thread::sleep(Duration::from_millis(600));
        assert!(limits(&own.plaintext).is_err() && limits(&told.plaintext).is_ok());
    }

    #[test]
    fn a_revocation_that_could_not_be_read_at_first_is_read_later() {
        let folder = tempfile::tempdir().unwrap();
        let store = KeyStore::new(folder.path().join("keys.json"));
        let created = store.create("a", KeyLimits::default(), 0).unwrap();
        let ring = KeyRing::open(store.path()).unwrap();
        let good = format!("Bearer {}", created.plaintext);
        store.revoke("a", 1).unwrap();
        let revoked = std::fs::read_to_string(store.path()).unwrap();
        // As if reading failed for a moment: the file's size, inode and time stay the same throughout.
        let written = SystemTime::now();
        let write = |text: &str| {
            std::fs::write(store.path(), text).unwrap();
            std::fs::File::options().append(true).open(store.path()).unwrap().set_modified(written).unwrap();
            Stamp::of(store.path())
        };
        let unreadable = write(&"?".repeat(revoked.len()));
        std::thread::sleep(Duration::from_millis(600));
        assert!(ring.authenticate(Some(&good)).is_ok(), "the keys stay as they were");
        assert_eq!(write(&revoked), unreadable);
        std::thread::sleep(Duration::from_millis(600));
        assert!(ring.authenticate(Some(&good)).is_err());
    }
}
