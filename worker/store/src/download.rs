//! Brings one file from an address onto the disk, whatever happens on the way: a cut or stalled
//! connection is resumed where it broke, in this run or the next, and nothing is called complete
//! before its size and digest agree.
//!
//! The bytes lie in a partial file; beside it a note keeps the entity tag they belong to. A resume
//! is asked for with that tag (`If-Range`), so that a changed file is fetched anew instead of being
//! glued together from two versions.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use ureq::http::header;
use url::Url;

use crate::digest::{Digest, Hasher};
use crate::disk::{self, Disk};
use crate::error::{Result, StoreError};
use crate::http::{self, Answer, Authorization, Get, HttpClient};
use crate::options::Waits;
use crate::progress::{CancelFlag, PullEvent, PullProgress};

const CHUNK_BYTES: usize = 256 << 10;
const MAX_PAUSE: Duration = Duration::from_secs(30);

/// What is to be fetched.
pub(crate) struct RemoteFile {
    pub(crate) url: Url,
    /// Name shown to the user.
    pub(crate) name: String,
    pub(crate) authorization: Option<Authorization>,
    pub(crate) sha256: Option<Digest>,
    pub(crate) size_bytes: Option<u64>,
}

/// What every transfer of one pull shares.
pub(crate) struct Downloader<'a> {
    pub(crate) http: &'a HttpClient,
    pub(crate) disk: &'a dyn Disk,
    pub(crate) progress: &'a dyn PullProgress,
    pub(crate) cancel: &'a CancelFlag,
    pub(crate) waits: Waits,
}

/// A complete, synced file whose digest agrees with what was published, if anything was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fetched {
    pub(crate) sha256: Digest,
    pub(crate) size_bytes: u64,
}

/// Note beside a partial file.
#[derive(Debug, Default, Serialize, Deserialize)]
struct PartialNote {
    etag: Option<String>,
}

/// How one connection ended.
enum Ended {
    Complete,
    /// Worth another connection.
    Broken {
        error: StoreError,
        pause: Option<Duration>,
    },
}

/// A file while it arrives.
struct Transfer<'a> {
    file: &'a RemoteFile,
    path: &'a Path,
    out: File,
    hasher: Hasher,
    etag: Option<String>,
    sha256: Option<Digest>,
    total_bytes: Option<u64>,
}

impl Downloader<'_> {
    /// Fetches `file` into `path`, resuming what lies there.
    ///
    /// # Errors
    /// Network and server errors after bounded retries; [`StoreError::Mismatch`] (the partial file
    /// is deleted); [`StoreError::DiskFull`] and [`StoreError::Cancelled`] (it is kept).
    pub(crate) fn fetch(&self, file: &RemoteFile, path: &Path) -> Result<Fetched> {
        let mut transfer = Transfer::open(file, path, self)?;
        self.progress.event(PullEvent::FileStarted {
            name: file.name.clone(),
            total_bytes: file.size_bytes,
            resumed_at_bytes: transfer.hasher.bytes,
        });
        self.run(&mut transfer)?;
        transfer.finish()
    }

    /// Connects until the file is complete or the retries are used up. Only new bytes count as
    /// progress: a server that starts over and breaks at the same place is given up on.
    fn run(&self, transfer: &mut Transfer<'_>) -> Result<()> {
        let mut furthest = transfer.hasher.bytes;
        let mut received = false;
        let mut retries = 0;
        let mut pause = self.waits.first_pause;
        loop {
            if transfer.is_complete() {
                return Ok(());
            }
            let ended = self.connect_and_copy(transfer, received);
            received |= transfer.hasher.bytes > furthest;
            let (error, asked) = match ended? {
                Ended::Complete => return Ok(()),
                Ended::Broken { error, pause } => (error, pause),
            };
            if transfer.hasher.bytes > furthest {
                furthest = transfer.hasher.bytes;
                retries = 0;
                pause = self.waits.first_pause;
            }
            retries += 1;
            if retries > self.waits.retries {
                return Err(error);
            }
            let wait = asked.unwrap_or(pause);
            self.progress.event(PullEvent::Retrying {
                name: transfer.file.name.clone(),
                reason: error.to_string(),
                attempt: retries,
                pause: wait,
            });
            self.cancel.sleep(wait)?;
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }

    fn connect_and_copy(&self, transfer: &mut Transfer<'_>, received: bool) -> Result<Ended> {
        let have = transfer.hasher.bytes;
        let etag = transfer.etag.clone();
        let get = Get {
            authorization: transfer.file.authorization.as_ref(),
            as_stored: true,
            range: (have > 0).then_some((have, etag.as_deref())),
            ..Get::new(&transfer.file.url, &transfer.file.name)
        };
        let answer = match self.http.send(&get) {
            Ok(answer) => answer,
            // Before the first byte another source is the better retry.
            Err(error @ StoreError::Network { .. }) if received => {
                return Ok(Ended::Broken { error, pause: None });
            }
            Err(error) => return Err(error),
        };
        if http::is_passing(&answer) {
            let pause = http::retry_after(&answer);
            let error = http::status_error(&answer, &transfer.file.name);
            return Ok(Ended::Broken { error, pause });
        }
        if !transfer.accept(&answer)? {
            return Ok(Ended::Complete);
        }
        self.copy(transfer, answer)
    }

    fn copy(&self, transfer: &mut Transfer<'_>, answer: Answer) -> Result<Ended> {
        let folder = transfer.path.parent().unwrap_or(transfer.path);
        let kept = transfer.hasher.bytes > 0;
        disk::check_room(self.disk, folder, transfer.left_bytes(), kept)?;
        let host = answer.host.clone();
        let mut reader = answer.into_reader();
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            self.cancel.check()?;
            let count = match reader.read(&mut buffer) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => match self.http.broken(&host, &error) {
                    StoreError::Cancelled => return Err(StoreError::Cancelled),
                    error => return Ok(Ended::Broken { error, pause: None }),
                },
            };
            if count == 0 {
                return Ok(transfer.at_end(&host));
            }
            transfer.append(self.disk, &buffer[..count])?;
            self.progress.event(PullEvent::FileBytes {
                name: transfer.file.name.clone(),
                bytes: transfer.hasher.bytes,
                total_bytes: transfer.total_bytes,
            });
        }
    }
}

impl<'a> Transfer<'a> {
    /// Opens the partial file and hashes what it holds. Bytes that cannot be told to belong to the
    /// file asked for (no published digest, no entity tag) are dropped.
    fn open(file: &'a RemoteFile, path: &'a Path, downloader: &Downloader<'_>) -> Result<Self> {
        let mut out =
            OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path).map_err(StoreError::io("open", path))?;
        let note = read_note(path);
        let length = out.metadata().map_err(StoreError::io("read", path))?.len();
        let identified = file.sha256.is_some() || note.etag.is_some();
        let hasher = if identified && file.size_bytes.is_none_or(|size| length <= size) {
            hash_partial(&mut out, length, &file.name, downloader).map_err(|error| {
                if downloader.cancel.is_cancelled() { StoreError::Cancelled } else { StoreError::io("read", path)(error) }
            })?
        } else {
            out.set_len(0).map_err(StoreError::io("write", path))?;
            Hasher::default()
        };
        Ok(Self { file, path, out, hasher, etag: note.etag, sha256: file.sha256, total_bytes: file.size_bytes })
    }

    /// Whether everything is here already: by size, or where the size is not known by digest.
    fn is_complete(&self) -> bool {
        match (self.file.size_bytes, self.sha256) {
            (Some(size), _) => size == self.hasher.bytes,
            (None, Some(sha256)) => self.hasher.clone().finish().0 == sha256,
            (None, None) => false,
        }
    }

    fn left_bytes(&self) -> u64 {
        self.total_bytes.map_or(0, |total| total.saturating_sub(self.hasher.bytes))
    }

    /// Takes over what an answer's head says. False if there is nothing left to read.
    fn accept(&mut self, answer: &Answer) -> Result<bool> {
        let have = self.hasher.bytes;
        let total = match answer.status.as_u16() {
            200 => {
                self.restart()?;
                content_length(answer)
            }
            206 => match content_range(answer) {
                Some((first, total)) if first == have => total,
                _ => {
                    self.restart()?;
                    return Err(StoreError::BadAnswer {
                        host: answer.host.clone(),
                        reason: format!("it sent another part of {} than was asked for", self.file.name),
                    });
                }
            },
            // Asked for the byte after the last one: what is here is already everything.
            416 if content_range_total(answer) == Some(have) => {
                self.total_bytes = Some(have);
                return Ok(false);
            }
            416 => {
                self.restart()?;
                return Err(StoreError::BadAnswer {
                    host: answer.host.clone(),
                    reason: format!("{} is shorter there than what had arrived; pull again", self.file.name),
                });
            }
            _ => return Err(http::status_error(answer, &self.file.name)),
        };
        if let (Some(expected), Some(found)) = (self.file.size_bytes, total)
            && expected != found
        {
            return Err(self.mismatch("size", expected.to_string(), found.to_string()));
        }
        self.total_bytes = self.file.size_bytes.or(total);
        self.sha256 = self.sha256.or(answer.linked_sha256);
        // A weak tag may cover different bytes, so it cannot guard a resume.
        self.etag = answer.header(header::ETAG).filter(|tag| !tag.starts_with("W/")).map(Into::into);
        write_note(self.path, &PartialNote { etag: self.etag.clone() })?;
        Ok(true)
    }

    fn restart(&mut self) -> Result<()> {
        use std::io::Seek as _;
        self.hasher = Hasher::default();
        self.etag = None;
        self.out.set_len(0).and_then(|()| self.out.rewind()).map_err(StoreError::io("write", self.path))
    }

    fn append(&mut self, disk: &dyn Disk, chunk: &[u8]) -> Result<()> {
        let after = self.hasher.bytes + chunk.len() as u64;
        if let Some(total) = self.total_bytes.filter(|total| after > *total) {
            return Err(self.mismatch("size", total.to_string(), format!("at least {after}")));
        }
        if let Err(error) = disk.write(&mut self.out, chunk) {
            // A failed write may have written a part that was not hashed.
            let kept = self.out.set_len(self.hasher.bytes).is_ok();
            return Err(disk::write_error(error, self.path, self.left_bytes(), kept));
        }
        self.hasher.update(chunk);
        Ok(())
    }

    fn at_end(&self, host: &str) -> Ended {
        match self.total_bytes {
            Some(total) if self.hasher.bytes < total => Ended::Broken {
                error: StoreError::Network {
                    host: host.into(),
                    reason: format!("closed the connection after {} of {total} bytes", self.hasher.bytes),
                },
                pause: None,
            },
            _ => Ended::Complete,
        }
    }

    fn finish(self) -> Result<Fetched> {
        self.out.sync_all().map_err(|error| disk::write_error(error, self.path, 0, true))?;
        let _ = std::fs::remove_file(note_path(self.path));
        let (sha256, size_bytes) = self.hasher.clone().finish();
        match self.sha256 {
            Some(expected) if expected != sha256 => Err(self.mismatch("sha256", expected.to_string(), sha256.to_string())),
            _ => Ok(Fetched { sha256, size_bytes }),
        }
    }

    /// Discards what arrived: bytes that are wrong must not be resumed from.
    fn mismatch(&self, what: &'static str, expected: String, found: String) -> StoreError {
        let _ = std::fs::remove_file(self.path);
        let _ = std::fs::remove_file(note_path(self.path));
        StoreError::Mismatch { file: self.file.name.clone(), what, expected, found }
    }
}

/// Hashes what an earlier pull left, to its end.
fn hash_partial(out: &mut File, length: u64, name: &str, downloader: &Downloader<'_>) -> io::Result<Hasher> {
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        downloader.cancel.check().map_err(io::Error::other)?;
        match out.read(&mut buffer)? {
            0 => return Ok(hasher),
            count => hasher.update(&buffer[..count]),
        }
        downloader.progress.event(PullEvent::Verifying { name: name.to_owned(), bytes: hasher.bytes, total_bytes: length });
    }
}

fn note_path(partial: &Path) -> PathBuf {
    let mut name = partial.as_os_str().to_owned();
    name.push(".json");
    PathBuf::from(name)
}

/// A missing or unreadable note only means that the bytes have no tag.
fn read_note(partial: &Path) -> PartialNote {
    std::fs::read(note_path(partial)).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
}

fn write_note(partial: &Path, note: &PartialNote) -> Result<()> {
    let path = note_path(partial);
    let text = serde_json::to_vec(note).expect("a struct of strings is JSON");
    std::fs::write(&path, text).map_err(|error| disk::write_error(error, &path, 0, true))
}

fn content_length(answer: &Answer) -> Option<u64> {
    // With a content encoding the length is of the encoded bytes.
    if answer.header(header::CONTENT_ENCODING).is_some() {
        return None;
    }
    answer.header(header::CONTENT_LENGTH)?.parse().ok()
}

/// First byte and whole size from `Content-Range: bytes FIRST-LAST/TOTAL`.
fn content_range(answer: &Answer) -> Option<(u64, Option<u64>)> {
    let value = answer.header(header::CONTENT_RANGE)?.strip_prefix("bytes ")?;
    let (range, total) = value.split_once('/')?;
    let (first, _) = range.split_once('-')?;
    Some((first.parse().ok()?, total.parse().ok()))
}

fn content_range_total(answer: &Answer) -> Option<u64> {
    answer.header(header::CONTENT_RANGE)?.strip_prefix("bytes */")?.parse().ok()
}
