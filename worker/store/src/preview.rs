//! A model of the hub looked at without fetching its weights: configuration files whole, of every weight file the
//! beginning that says what is in it.
//!
//! The beginnings are put into files as long as the real ones, whose rest is a hole, so that a loader that reads
//! headers alone can open them as if the model were here. They lie in a temporary folder, which goes with the value.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ureq::http::{StatusCode, header};

use crate::download::RemoteFile;
use crate::error::{Result, StoreError};
use crate::http::{Answer, Get, HttpClient, PASSING, host_of, status_error};
use crate::hub::{HubClient, SHARD_INDEX};
use crate::options::PullOptions;
use crate::source::HubSource;
use crate::store::Store;

/// Configuration files that say what the weights are.
const DOCUMENTS: [&str; 3] = ["config.json", "generation_config.json", SHARD_INDEX];
const MAX_DOCUMENT_BYTES: u64 = 64 << 20;
/// Fetched of a weight file at first: most safetensors headers are shorter.
const FIRST_BYTES: u64 = 128 << 10;
/// Longest beginning: a vocabulary of a million tokens is a third of this.
const MAX_HEADER_BYTES: u64 = 100 << 20;

/// See the module documentation.
#[derive(Debug)]
pub struct Preview {
    /// Deleted with the value.
    _folder: tempfile::TempDir,
    path: PathBuf,
    source: String,
    licence: Option<String>,
    size_bytes: u64,
    fetched_bytes: u64,
}

impl Preview {
    /// A folder in Hugging Face layout, or a single GGUF file; beyond their headers, weights read as zeros.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The source with its commit, as one would write it.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Licence, where the hub names one.
    pub fn licence(&self) -> Option<&str> {
        self.licence.as_deref()
    }

    /// Size of all files a pull would fetch, where the hub tells it.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes that were fetched for this.
    pub fn fetched_bytes(&self) -> u64 {
        self.fetched_bytes
    }
}

impl Store {
    /// Fetches what says what a model of the hub is. How long the header of a GGUF file is only its loader knows:
    /// `enough` is asked with the file and the number of its bytes that are there, until it is content.
    ///
    /// # Errors
    /// As a pull's; [`StoreError::BadAnswer`] for a header that does not end.
    pub fn preview(&self, hub: &HubSource, options: &PullOptions, enough: impl Fn(&Path, u64) -> bool) -> Result<Preview> {
        if options.offline {
            return Err(StoreError::Offline { what: format!("model {hub}") });
        }
        let hub = HubSource { revision: hub.revision.clone().or_else(|| options.hub_revision.clone()), ..hub.clone() };
        let http = HttpClient::new(options, options.ca_bundle.as_deref())?;
        let plan = HubClient::new(&http, options)?.plan(&hub)?;
        if !plan.files.iter().any(|(name, _)| name.ends_with(".safetensors") || name.ends_with(".gguf")) {
            let reason = format!(
                "its weights are PyTorch files, which have no header that could be read alone; `forgectl pull {}` fetches them, then \
                 they can be shown",
                plan.source
            );
            return Err(StoreError::NoUsableWeights { place: plan.source.to_string(), reason });
        }
        let folder = tempfile::tempdir().map_err(StoreError::io("make", std::env::temp_dir()))?;
        let mut preview = Preview {
            path: folder.path().to_owned(),
            _folder: folder,
            source: plan.source.to_string(),
            licence: plan.licence,
            size_bytes: plan.files.iter().filter_map(|(_, file)| file.size_bytes).sum(),
            fetched_bytes: 0,
        };
        let root = preview.path.clone();
        for (name, remote) in &plan.files {
            let local = root.join(name);
            if DOCUMENTS.contains(&name.as_str()) {
                let get = Get { authorization: remote.authorization.as_ref(), ..Get::new(&remote.url, name) };
                let (_, bytes) = http.fetch_document(&get, MAX_DOCUMENT_BYTES)?;
                preview.fetched_bytes += bytes.len() as u64;
                std::fs::write(&local, &bytes).map_err(StoreError::io("write", &local))?;
            } else if name.ends_with(".safetensors") || name.ends_with(".gguf") {
                let mut beginning = Beginning::open(&http, options, remote, &local)?;
                if name.ends_with(".gguf") {
                    beginning.extend_until(|bytes| enough(&local, bytes))?;
                    preview.path = local.clone();
                } else {
                    beginning.safetensors_header()?;
                }
                preview.fetched_bytes += beginning.bytes;
            }
        }
        Ok(preview)
    }
}

/// The beginning of a remote file, growing.
struct Beginning<'a> {
    http: &'a HttpClient,
    options: &'a PullOptions,
    remote: &'a RemoteFile,
    path: &'a Path,
    file: File,
    /// Bytes that are there.
    bytes: u64,
    /// Length of the remote file, known from the first answer on.
    total_bytes: Option<u64>,
}

impl<'a> Beginning<'a> {
    fn open(http: &'a HttpClient, options: &'a PullOptions, remote: &'a RemoteFile, path: &'a Path) -> Result<Self> {
        let file = File::options().read(true).write(true).create_new(true).open(path).map_err(StoreError::io("make", path))?;
        Ok(Beginning { http, options, remote, path, file, bytes: 0, total_bytes: None })
    }

    /// Brings the header of a safetensors file, whose length is its first eight bytes.
    fn safetensors_header(&mut self) -> Result<()> {
        self.extend_to(FIRST_BYTES)?;
        let mut length = [0; 8];
        self.file.seek(SeekFrom::Start(0)).map_err(StoreError::io("read", self.path))?;
        self.file.read_exact(&mut length).map_err(|_| self.bad("is too short for a safetensors file".into()))?;
        let end = u64::from_le_bytes(length).saturating_add(8);
        if end > MAX_HEADER_BYTES || self.total_bytes.is_some_and(|total| end > total) {
            return Err(self.bad(format!("is no safetensors file: its header would end at byte {end}")));
        }
        self.extend_to(end)
    }

    /// Doubles what is there until `enough` or the file's end.
    fn extend_until(&mut self, enough: impl Fn(u64) -> bool) -> Result<()> {
        let mut wanted = FIRST_BYTES;
        loop {
            self.extend_to(wanted)?;
            if enough(self.bytes) || self.total_bytes == Some(self.bytes) {
                return Ok(());
            }
            if wanted >= MAX_HEADER_BYTES {
                return Err(self.bad(format!("has a header that cannot be read from its first {MAX_HEADER_BYTES} bytes")));
            }
            wanted = (wanted * 2).min(MAX_HEADER_BYTES);
        }
    }

    /// Fetches up to byte `end`, or the file's end; what broke off is gone on with.
    fn extend_to(&mut self, end: u64) -> Result<()> {
        let mut pause = self.options.waits.first_pause;
        let mut retries_left = self.options.waits.retries;
        while self.bytes < end.min(self.total_bytes.unwrap_or(u64::MAX)) {
            let before = self.bytes;
            match self.fetch(end) {
                Ok(()) => {}
                Err(error) if retries_left == 0 || !passes(&error) => return Err(error),
                Err(_) => {
                    retries_left -= 1;
                    self.options.cancel.sleep(pause)?;
                    pause = (pause * 2).min(Duration::from_secs(10));
                }
            }
            if self.bytes == before && retries_left == 0 {
                return Err(self.bad("ends before its length".into()));
            }
        }
        let total = self.total_bytes.unwrap_or(self.bytes);
        self.file.set_len(total).map_err(StoreError::io("write", self.path))
    }

    fn fetch(&mut self, end: u64) -> Result<()> {
        let get = Get {
            authorization: self.remote.authorization.as_ref(),
            as_stored: true,
            range: Some((self.bytes, None)),
            last_byte: Some(end - 1),
            ..Get::new(&self.remote.url, &self.remote.name)
        };
        let answer = self.http.send(&get)?;
        let (first, total) = match answer.status {
            StatusCode::PARTIAL_CONTENT => content_range(&answer).ok_or_else(|| self.bad("came in an unknown part".into()))?,
            // A host that knows no ranges: what is there already is passed over.
            StatusCode::OK => (0, answer.header(header::CONTENT_LENGTH).and_then(|length| length.parse().ok())),
            _ => return Err(status_error(&answer, &self.remote.name)),
        };
        let total = total.or(self.remote.size_bytes).ok_or_else(|| self.bad("came without its length".into()))?;
        if first > self.bytes || self.total_bytes.is_some_and(|known| known != total) {
            return Err(self.bad("is not the file that was asked for".into()));
        }
        self.total_bytes = Some(total);
        let (passed_over, wanted) = (self.bytes - first, end.min(total).saturating_sub(self.bytes));
        self.read(answer, passed_over, wanted)
    }

    /// Appends `wanted` bytes of an answer after those that are there already.
    fn read(&mut self, answer: Answer, passed_over: u64, wanted: u64) -> Result<()> {
        let host = answer.host.clone();
        let mut reader = answer.into_reader();
        let mut chunk = vec![0; 64 << 10];
        let (mut to_pass, mut left) = (passed_over, wanted);
        self.file.seek(SeekFrom::Start(self.bytes)).map_err(StoreError::io("write", self.path))?;
        while left > 0 {
            let most = if to_pass > 0 { to_pass } else { left }.min(chunk.len() as u64) as usize;
            let count = reader.read(&mut chunk[..most]).map_err(|error| self.http.broken(&host, &error))?;
            if count == 0 {
                let reason = "broke the transfer off".to_owned();
                return Err(StoreError::Network { host, reason });
            }
            if to_pass > 0 {
                to_pass -= count as u64;
                continue;
            }
            self.file.write_all(&chunk[..count]).map_err(StoreError::io("write", self.path))?;
            self.bytes += count as u64;
            left -= count as u64;
        }
        Ok(())
    }

    fn bad(&self, reason: String) -> StoreError {
        StoreError::BadAnswer { host: host_of(&self.remote.url), reason: format!("{} {reason}", self.remote.name) }
    }
}

/// Whether asking again may help.
fn passes(error: &StoreError) -> bool {
    match error {
        StoreError::Network { .. } => true,
        StoreError::Http { status, .. } => PASSING.contains(status),
        _ => false,
    }
}

/// First byte and whole length of `bytes 0-99/1234`.
fn content_range(answer: &Answer) -> Option<(u64, Option<u64>)> {
    let (range, total) = answer.header(header::CONTENT_RANGE)?.strip_prefix("bytes ")?.split_once('/')?;
    let first = range.split('-').next()?.parse().ok()?;
    Some((first, total.parse().ok()))
}
