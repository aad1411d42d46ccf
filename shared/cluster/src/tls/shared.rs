//! Credentials that can be replaced, and trust that can change, while connections use them.
//!
//! Invariants: new handshakes take the newest; connections that stand go on over a renewal, and are cut when their peer's
//! certificate is revoked or its CA dropped; a CA that was dropped does not come back with a renewal that began before; what
//! is in use is what is in the files, where there are any.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use forge_shared::cluster::certificate::Trust;
use parking_lot::{Mutex, RwLock};
use rustls_pki_types::CertificateDer;

use super::clock::CertificateClock;
use super::connections::{Caller, Connections, Guarded};
use super::credentials::{Credentials, certificates_of};
use super::error::TlsError;
use super::identity::Identity;
use super::peer::PeerCertificate;
use super::trusted::Trusted;

/// See the module. Clones are one.
#[derive(Debug, Clone)]
pub struct SharedCredentials(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    held: RwLock<Arc<Credentials>>,
    trusted: RwLock<Arc<Trusted>>,
    /// What the cluster said last is believed, where it has. Held over every change of the two above and of their files, so
    /// that none undoes another.
    told: Mutex<Option<Trust>>,
    /// Counts replacements.
    generation: AtomicU64,
    /// Counts wishes for a new certificate, and those that were fulfilled.
    wished: AtomicU64,
    fulfilled: AtomicU64,
    connections: Arc<Connections>,
    listeners: Listeners,
    clock: CertificateClock,
}

/// Told after what is believed has changed.
#[derive(Default)]
struct Listeners(Mutex<Vec<Box<dyn Fn() + Send + Sync>>>);

impl std::fmt::Debug for Listeners {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Listeners").field(&self.0.lock().len()).finish()
    }
}

impl SharedCredentials {
    /// Begins with these, by the machine's clock.
    pub fn new(credentials: Credentials) -> Self {
        SharedCredentials::with_clock(credentials, CertificateClock::default())
    }

    /// Begins with these, by this clock.
    pub fn with_clock(credentials: Credentials, clock: CertificateClock) -> Self {
        SharedCredentials(Arc::new(Inner {
            trusted: RwLock::new(credentials.trusted().clone()),
            held: RwLock::new(Arc::new(credentials)),
            told: Mutex::default(),
            generation: AtomicU64::new(0),
            wished: AtomicU64::new(0),
            fulfilled: AtomicU64::new(0),
            connections: Arc::default(),
            listeners: Listeners::default(),
            clock,
        }))
    }

    /// The newest.
    pub fn get(&self) -> Arc<Credentials> {
        self.0.held.read().clone()
    }

    /// From now on these, of the same process, and the CAs beside them; where the cluster has said which CAs are believed,
    /// those. What came beside a certificate may be older.
    ///
    /// # Errors
    /// [`TlsError::WrongPeer`] for another process's, [`TlsError::WrongCa`] for one of a CA that is believed no more.
    pub fn replace(&self, credentials: Credentials) -> Result<(), TlsError> {
        let told = self.0.told.lock();
        let credentials = self.beside(credentials, told.as_ref())?;
        self.put(credentials)
    }

    /// As [`SharedCredentials::replace`], in the files of a directory first.
    ///
    /// # Errors
    /// The same, and [`TlsError::File`]; then nothing changes.
    pub fn keep(&self, credentials: Credentials, directory: &Path) -> Result<(), TlsError> {
        let told = self.0.told.lock();
        let credentials = self.beside(credentials, told.as_ref())?;
        credentials.save(directory)?;
        self.put(credentials)
    }

    /// Carries out what the cluster believes: connections are cut at once, then the CAs are kept beside the certificate in
    /// the files of a directory. Gives whose connections were cut.
    ///
    /// # Errors
    /// CAs that cannot be used, files that cannot be written, or a certificate of a CA that is believed no more. What is
    /// said so is believed all the same, but for CAs that cannot be used.
    pub fn carry_out(&self, trust: &Trust, directory: &Path) -> Result<Vec<String>, TlsError> {
        let mut told = self.0.told.lock();
        let held = self.get();
        let cas_pem = trust.cas_pem(held.ca_pem());
        let cas = certificates_of(&cas_pem)?;
        super::ca::check_cluster(&cas, &held.identity().cluster_id)?;
        let cut = self.believe(Trusted::new(cas, trust.revoked.clone())?);
        *told = Some(trust.clone());
        if held.ca_pem() != cas_pem {
            let beside = held.with_cas(&cas_pem)?;
            beside.save(directory)?;
            self.put(beside)?;
        }
        Ok(cut)
    }

    /// From now on all serials but these are believed, of the same CAs. Gives whose connections were cut.
    ///
    /// # Errors
    /// None that was not one before.
    pub fn revoke(&self, revoked: BTreeSet<String>) -> Result<Vec<String>, TlsError> {
        let _told = self.0.told.lock();
        let cas = self.trusted().cas().to_vec();
        Ok(self.believe(Trusted::new(cas, revoked)?))
    }

    /// From now on these CAs (PEM, one after the other) and all serials but these are believed; connections that are not
    /// believed any more are cut. Gives whose they were.
    ///
    /// # Errors
    /// [`TlsError::Certificate`] for text that holds no CA of this cluster; then nothing changes.
    pub fn trust(&self, cas_pem: &str, revoked: BTreeSet<String>) -> Result<Vec<String>, TlsError> {
        let _told = self.0.told.lock();
        let cas = certificates_of(cas_pem)?;
        super::ca::check_cluster(&cas, &self.get().identity().cluster_id)?;
        Ok(self.believe(Trusted::new(cas, revoked)?))
    }

    /// New credentials of this process beside the CAs that are believed.
    fn beside(&self, credentials: Credentials, told: Option<&Trust>) -> Result<Credentials, TlsError> {
        let held = self.get();
        if held.identity() != credentials.identity() {
            return Err(TlsError::WrongPeer { expected: held.identity().to_string() });
        }
        let cas_pem = told.map_or(String::new(), |trust| trust.cas_pem(""));
        if cas_pem.is_empty() || cas_pem == credentials.ca_pem() { Ok(credentials) } else { credentials.with_cas(&cas_pem) }
    }

    /// Under the lock of `told`.
    fn put(&self, credentials: Credentials) -> Result<(), TlsError> {
        if self.get().ca_pem() != credentials.ca_pem() {
            let revoked = self.trusted().revoked().clone();
            self.believe(Trusted::new(credentials.trusted().cas().to_vec(), revoked)?);
        }
        *self.0.held.write() = Arc::new(credentials);
        self.0.generation.fetch_add(1, Ordering::Release);
        Ok(())
    }

    fn believe(&self, trusted: Trusted) -> Vec<String> {
        let trusted = Arc::new(trusted);
        *self.0.trusted.write() = trusted.clone();
        let cut = self.0.connections.sweep(|peer| trusted.believes(peer));
        self.0.listeners.0.lock().iter().for_each(|listener| listener());
        cut.iter().map(|peer| peer.identity.to_string()).collect()
    }

    /// Calls `listener` after each change of what is believed: for connections that do not stand in this process's table, and
    /// are looked at again with [`SharedCredentials::identify`].
    pub fn on_trust(&self, listener: impl Fn() + Send + Sync + 'static) {
        self.0.listeners.0.lock().push(Box::new(listener));
    }

    /// Whose certificate (DER) this is, if it is believed now. Its time is the handshake's matter.
    ///
    /// # Errors
    /// [`TlsError::Certificate`] for one that is none of Forge's, [`TlsError::Revoked`] for one that is not believed any more.
    pub fn identify(&self, certificate: &[u8]) -> Result<Identity, TlsError> {
        let peer = PeerCertificate::read(&CertificateDer::from(certificate))?;
        if !self.trusted().believes(&peer) {
            return Err(TlsError::Revoked { whose: peer.identity.to_string() });
        }
        Ok(peer.identity)
    }

    /// Certificates at the other ends of the connections that stand, each once.
    pub fn peers(&self) -> Vec<Arc<PeerCertificate>> {
        self.0.connections.peers()
    }

    /// By which certificates begin and end.
    pub fn clock(&self) -> &CertificateClock {
        &self.0.clock
    }

    /// Until the certificate ends, seconds; negative once it has.
    pub fn left_s(&self) -> i64 {
        let ends_s = i64::try_from(self.get().ends_s()).unwrap_or(i64::MAX);
        ends_s.saturating_sub(i64::try_from(self.0.clock.now_s()).unwrap_or(i64::MAX))
    }

    /// Grows with each replacement: a connection made before shows what was there before.
    pub fn generation(&self) -> u64 {
        self.0.generation.load(Ordering::Acquire)
    }

    /// Asks for a new certificate before it is time: the CA changes.
    pub fn renew_soon(&self) {
        self.0.wished.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether it was asked for, and the number to name when it has come.
    pub(crate) fn wish(&self) -> Option<u64> {
        let wished = self.0.wished.load(Ordering::Acquire);
        (wished != self.0.fulfilled.load(Ordering::Acquire)).then_some(wished)
    }

    /// A certificate came that was asked for after this wish.
    pub(crate) fn fulfil(&self, wish: u64) {
        self.0.fulfilled.fetch_max(wish, Ordering::AcqRel);
    }

    /// Hex of SHA-256 over the certificates of the CAs that are believed, and will be after a restart: those that are kept.
    pub fn believed_cas(&self) -> Vec<String> {
        self.get().trusted().cas().iter().map(|ca| super::ca::digest_text(ca)).collect()
    }

    pub(super) fn trusted(&self) -> Arc<Trusted> {
        self.0.trusted.read().clone()
    }

    /// A connection after its handshake, to be cut when its peer is not believed any more.
    pub(super) fn guard<S>(&self, stream: S, peer: Option<PeerCertificate>) -> Guarded<S> {
        let caller = Caller { certificate: peer.map(Arc::new), clock: self.0.clock.clone() };
        let guarded = self.0.connections.guard(stream, caller);
        // Trust that changed between the handshake and the table.
        let trusted = self.trusted();
        guarded.check(|peer| trusted.believes(peer));
        guarded
    }
}
