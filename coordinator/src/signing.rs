//! The CAs that a coordinator can sign with: one, and two while one takes the other's place.
//!
//! Invariant: `ca.key` holds a key before its CA is believed, and until it is believed no more: a coordinator that starts in
//! the middle of a change finds every key it had.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forge_cluster::tls::{CA_KEY_FILE, ClusterCa, TlsError, read_keys, write_private};
use forge_shared::cluster::certificate::{CaRecord, Trust};
use parking_lot::{Mutex, RwLock};

use crate::error::CoordinatorError;

/// See the module.
#[derive(Debug)]
pub(crate) struct SigningCas {
    directory: PathBuf,
    held: RwLock<Vec<Arc<ClusterCa>>>,
    /// Digests of CAs that were made here and that the log may name at any moment. Locked after `held`.
    pending: Mutex<BTreeSet<String>>,
}

impl SigningCas {
    /// Of a coordinator's folder, which has at least one.
    ///
    /// # Errors
    /// Files that cannot be read or do not belong together.
    pub(crate) fn load(directory: &Path) -> Result<Self, TlsError> {
        let first = Arc::new(ClusterCa::load(directory)?);
        Ok(SigningCas { directory: directory.to_owned(), held: RwLock::new(vec![first]), pending: Mutex::default() })
    }

    /// The CA that signs now.
    ///
    /// # Errors
    /// [`CoordinatorError::Busy`] where its key has not come here yet.
    pub(crate) fn signing(&self, trust: &Trust) -> Result<Arc<ClusterCa>, CoordinatorError> {
        let held = self.held.read();
        let found = match trust.signing() {
            None => held.first(),
            Some(signing) => held.iter().find(|ca| ca.digest_text() == signing.sha256),
        };
        let busy = || CoordinatorError::Busy { reason: "this coordinator does not have the new CA's key yet: ask another".into() };
        found.cloned().ok_or_else(busy)
    }

    /// The key of a CA, if it is here.
    pub(crate) fn key_pem(&self, sha256: &str) -> Option<String> {
        self.held.read().iter().find(|ca| ca.digest_text() == sha256).map(|ca| ca.key_pem())
    }

    /// Keys of all CAs, for a coordinator that joins.
    pub(crate) fn keys_pem(&self) -> String {
        self.held.read().iter().map(|ca| ca.key_pem()).collect()
    }

    /// Keeps another CA's key, on disk first.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub(crate) fn add(&self, ca: ClusterCa) -> Result<(), TlsError> {
        self.keep(&mut self.held.write(), ca)
    }

    /// Keeps the key of a CA that was made here, and that nobody believes yet: it stays whatever is believed meanwhile.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub(crate) fn introduce(&self, ca: ClusterCa) -> Result<(), TlsError> {
        let mut held = self.held.write();
        let sha256 = ca.digest_text();
        self.keep(&mut held, ca)?;
        self.pending.lock().insert(sha256);
        Ok(())
    }

    /// The log does not take it: its key may go.
    pub(crate) fn give_up(&self, sha256: &str) {
        self.pending.lock().remove(sha256);
    }

    fn keep(&self, held: &mut Vec<Arc<ClusterCa>>, ca: ClusterCa) -> Result<(), TlsError> {
        if held.iter().all(|known| known.digest() != ca.digest()) {
            let keys: String = held.iter().map(|ca| ca.key_pem()).chain([ca.key_pem()]).collect();
            write_private(&self.directory.join(CA_KEY_FILE), &keys)?;
            held.push(Arc::new(ca));
        }
        Ok(())
    }

    /// Takes from the file what is believed; CAs whose keys are not there.
    ///
    /// # Errors
    /// Files that cannot be read.
    pub(crate) fn adopt(&self, trust: &Trust) -> Result<Vec<CaRecord>, TlsError> {
        self.pending.lock().retain(|sha256| trust.cas.iter().all(|known| known.sha256 != *sha256));
        let has = |ca: &CaRecord| self.key_pem(&ca.sha256).is_some();
        if !trust.cas.iter().all(has) {
            for ca in ClusterCa::all_from_pem(&trust.cas_pem(""), &read_keys(&self.directory)?)? {
                let mut held = self.held.write();
                if held.iter().all(|known| known.digest() != ca.digest()) {
                    held.push(Arc::new(ca));
                }
            }
        }
        Ok(trust.cas.iter().filter(|ca| !has(ca)).cloned().collect())
    }

    /// Forgets keys of CAs that are believed no more.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub(crate) fn retain(&self, trust: &Trust) -> Result<(), TlsError> {
        let mut held = self.held.write();
        let pending = self.pending.lock();
        let is_believed = |ca: &Arc<ClusterCa>| trust.cas.iter().any(|wanted| wanted.sha256 == ca.digest_text());
        let is_wanted = |ca: &Arc<ClusterCa>| is_believed(ca) || pending.contains(&ca.digest_text());
        if trust.cas.is_empty() || held.iter().all(is_wanted) || !held.iter().any(is_believed) {
            return Ok(());
        }
        let keys: String = held.iter().filter(|ca| is_wanted(ca)).map(|ca| ca.key_pem()).collect();
        write_private(&self.directory.join(CA_KEY_FILE), &keys)?;
        held.retain(is_wanted);
        Ok(())
    }
}

/// A CA as the log has it.
pub(crate) fn ca_record(ca: &ClusterCa) -> CaRecord {
    CaRecord { sha256: ca.digest_text(), certificate_pem: ca.certificate_pem().into() }
}

#[cfg(test)]
mod tests {
    use forge_shared::cluster::certificate::CaRotation;

    use super::*;

    #[test]
    fn a_key_stays_while_the_log_may_name_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let [old, new, other] = [(); 3].map(|()| ClusterCa::create("c", 1_700_000_000).expect("a CA"));
        old.save(folder.path()).expect("saved");
        let cas = SigningCas::load(folder.path()).expect("one");
        let (new_record, other_record) = (ca_record(&new), ca_record(&other));
        cas.introduce(new).expect("kept");
        cas.introduce(other).expect("kept");
        // Something else changes before the log has it: a revocation, or the end of the rotation before.
        let before = Trust { cas: vec![ca_record(&old)], ..Trust::default() };
        cas.retain(&before).expect("written");
        assert!(cas.key_pem(&new_record.sha256).is_some() && cas.key_pem(&other_record.sha256).is_some());
        cas.give_up(&other_record.sha256);
        let both = Trust { cas: vec![ca_record(&old), new_record.clone()], rotation: Some(CaRotation::Introduced), ..Trust::default() };
        assert_eq!(cas.adopt(&both).expect("read"), []);
        cas.retain(&both).expect("written");
        assert!(cas.key_pem(&other_record.sha256).is_none(), "refused");
        cas.retain(&before).expect("written");
        assert!(cas.key_pem(&new_record.sha256).is_none(), "taken back");
    }

    #[test]
    fn keys_are_found_again_in_the_middle_of_a_change_and_gone_after_it() {
        let folder = tempfile::tempdir().expect("a folder");
        let (old, new) = (ClusterCa::create("c", 1_700_000_000).expect("a CA"), ClusterCa::create("c", 1_700_000_000).expect("a CA"));
        old.save(folder.path()).expect("saved");
        let cas = SigningCas::load(folder.path()).expect("one");
        assert_eq!(cas.signing(&Trust::default()).expect("the only one").digest(), old.digest());
        let both = Trust { cas: vec![ca_record(&new), ca_record(&old)], rotation: Some(CaRotation::Switched), ..Trust::default() };
        assert_eq!(cas.adopt(&both).expect("read"), [ca_record(&new)], "its key is elsewhere");
        assert!(matches!(cas.signing(&both), Err(CoordinatorError::Busy { .. })));
        cas.add(ClusterCa::from_pem(new.certificate_pem(), &new.key_pem()).expect("itself")).expect("kept");
        assert_eq!(cas.signing(&both).expect("here").digest(), new.digest());

        // A crash before `ca.pem` was written.
        let again = SigningCas::load(folder.path()).expect("the old one");
        assert_eq!(again.adopt(&both).expect("read"), []);
        assert_eq!(again.signing(&both).expect("found in the file").digest(), new.digest());
        let after = Trust { cas: vec![ca_record(&new)], ..Trust::default() };
        again.retain(&after).expect("written");
        assert!(again.key_pem(&old.digest_text()).is_none());
        assert!(!read_keys(folder.path()).expect("read").contains(old.key_pem().trim()));
    }
}
