//! Models that lie on this machine already: served in place, without a copy and without a manifest.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use crate::digest::{Digest, Hasher};
use crate::error::{Result, StoreError};
use crate::gguf_choice::is_split;
use crate::progress::CancelFlag;
use crate::resolved::{ContentDigest, ResolvedModel};
use crate::verify::Stamp;

const SAMPLE_BYTES: u64 = 1 << 20;
/// A model folder has tens of files; a home folder given by mistake has many more.
const MAX_FILES: usize = 10_000;
/// What a loader may read from a folder, by the end of its name.
const PARTS: [&str; 7] = [".safetensors", ".gguf", ".bin", ".json", ".jinja", ".model", ".txt"];

/// Resolves a file or folder.
///
/// # Errors
/// If there is nothing at the path, or the folder holds no weights or several GGUF files.
pub(crate) fn resolve(name: String, path: &Path) -> Result<ResolvedModel> {
    let path = fs::canonicalize(path).map_err(StoreError::io("find", path))?;
    let metadata = fs::metadata(&path).map_err(StoreError::io("read", &path))?;
    let (path, files) = if metadata.is_dir() { model_in_folder(path)? } else { (path.clone(), vec![path]) };
    let (digest, size_bytes) = sample(&files)?;
    Ok(ResolvedModel { name, path, digest: ContentDigest::Sampled(digest), size_bytes, manifest: None, _lease: None })
}

/// Digest of a local model's whole content, the same for a copy elsewhere: as [`crate::Manifest::digest`] over its files.
/// Every byte is read.
pub(crate) fn whole_digest(path: &Path, cancel: &CancelFlag) -> Result<Digest> {
    let files = if path.is_dir() { model_in_folder(path.to_owned())?.1 } else { parts_beside(path)? };
    let mut lines = Vec::with_capacity(files.len());
    for path in files {
        let io = |error| StoreError::Io { action: "read", path: path.clone(), error };
        let mut file = File::open(&path).map_err(io)?;
        let mut stop = |_| if cancel.is_cancelled() { Err(std::io::Error::other("cancelled")) } else { Ok(()) };
        let read = Digest::of_reader(&mut file, &mut stop);
        cancel.check()?;
        let (digest, size_bytes) = read.map_err(io)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        lines.push((name.clone(), format!("{digest} {size_bytes} {name}\n")));
    }
    lines.sort();
    Ok(Digest::of(lines.into_iter().map(|(_, line)| line).collect::<String>().as_bytes()))
}

/// A file, with the other parts of the same model where it is the first of several.
fn parts_beside(path: &Path) -> Result<Vec<PathBuf>> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if !is_split(&name) {
        return Ok(vec![path.to_owned()]);
    }
    let stem = &name[..name.len() - "-00001-of-00002.gguf".len()];
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut parts = Vec::new();
    for entry in fs::read_dir(folder).map_err(StoreError::io("read", folder))? {
        let entry = entry.map_err(StoreError::io("read", folder))?;
        let other = entry.file_name().to_string_lossy().into_owned();
        if is_split(&other) && other.starts_with(stem) && other.len() == name.len() {
            parts.push(entry.path());
        }
    }
    Ok(parts)
}

/// A folder in Hugging Face layout as it is; one with a single GGUF file and no config as that file.
fn model_in_folder(folder: PathBuf) -> Result<(PathBuf, Vec<PathBuf>)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(&folder).map_err(StoreError::io("read", &folder))? {
        let path = entry.map_err(StoreError::io("read", &folder))?.path();
        let is_part = path.file_name().is_some_and(|name| PARTS.iter().any(|end| name.to_string_lossy().ends_with(end)));
        if is_part && path.is_file() {
            files.push(path);
        }
        if files.len() > MAX_FILES {
            break;
        }
    }
    files.sort();
    let refuse = |reason: String| Err(StoreError::NoUsableWeights { place: folder.display().to_string(), reason });
    let ends = |end: &str| files.iter().filter(|path| path.to_string_lossy().ends_with(end)).count();
    if files.len() > MAX_FILES {
        return refuse(format!("it has more than {MAX_FILES} files, which is no model's folder"));
    }
    let torch = ends("/pytorch_model.bin") + ends("/pytorch_model.bin.index.json");
    if ends("/config.json") == 1 && (ends(".safetensors") > 0 || (torch > 0 && ends(".gguf") == 0)) {
        return Ok((folder, files));
    }
    match (ends(".gguf"), ends(".safetensors")) {
        (count, _) if count == 1 || (count > 1 && parts_of_one(&files)) => {
            // As they were counted: a file that is called `.gguf` has no extension to the system.
            files.retain(|path| path.to_string_lossy().ends_with(".gguf"));
            Ok((files[0].clone(), files))
        }
        // What it lacks, and what its files are, the loader says best: it looks into them.
        (0, safetensors) if safetensors + torch + ends("/config.json") > 0 => Ok((folder, files)),
        (0, _) => refuse("it holds neither config.json, safetensors, GGUF nor pytorch_model.bin files".into()),
        _ => refuse("it holds several GGUF files; name the one to use".into()),
    }
}

/// Whether all GGUF files of a folder are the parts of one split model: equal names but for the part's number.
fn parts_of_one(files: &[PathBuf]) -> bool {
    let names: Vec<String> = files.iter().filter_map(|path| path.file_name()?.to_str().map(str::to_owned)).collect();
    let mut stems = names.iter().filter(|name| name.ends_with(".gguf")).map(|name| {
        let stem = name.len().checked_sub("-00001-of-00002.gguf".len())?;
        is_split(name).then(|| (&name[..stem], &name[name.len() - "-of-00002.gguf".len()..]))
    });
    let first = stems.next().flatten();
    first.is_some() && stems.all(|stem| stem == first)
}

/// Digest over name, size, modification time, inode and the first and last MiB of each file, and the whole size.
/// Time and inode tell files apart that differ only between the two samples, such as two fine-tunes of one model;
/// so a copy of a file has a digest of its own.
fn sample(files: &[PathBuf]) -> Result<(Digest, u64)> {
    let mut hasher = Hasher::default();
    let mut total = 0;
    for path in files {
        let io = |error| StoreError::Io { action: "read", path: path.clone(), error };
        let mut file = File::open(path).map_err(io)?;
        let Stamp { size_bytes: size, modified_ns, inode } = Stamp::of(&file.metadata().map_err(io)?);
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        hasher.update(format!("{}:{name}:{size}:{modified_ns}:{inode}\n", name.len()).as_bytes());
        let mut part = Vec::new();
        (&mut file).take(SAMPLE_BYTES).read_to_end(&mut part).map_err(io)?;
        hasher.update(&part);
        part.clear();
        // Where the two samples would overlap, the rest is all there is.
        let last = size.saturating_sub(SAMPLE_BYTES).max(SAMPLE_BYTES.min(size));
        file.seek(SeekFrom::Start(last)).map_err(io)?;
        file.take(SAMPLE_BYTES).read_to_end(&mut part).map_err(io)?;
        hasher.update(&part);
        total += size;
    }
    Ok((hasher.finish().0, total))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::*;

    fn write(folder: &Path, name: &str, content: &[u8]) {
        fs::write(folder.join(name), content).unwrap();
    }

    #[test]
    fn a_copy_has_the_same_whole_digest_and_another_sampled_one() {
        let home = tempfile::tempdir().unwrap();
        let resolved = ["a", "b"].map(|name| {
            let folder = home.path().join(name);
            fs::create_dir(&folder).unwrap();
            write(&folder, "config.json", b"{}");
            write(&folder, "model.safetensors", b"weights");
            resolve(name.to_owned(), &folder).unwrap()
        });
        let whole = |model: &ResolvedModel| model.whole_digest(&CancelFlag::default()).unwrap();
        assert_ne!(resolved[0].digest(), resolved[1].digest());
        assert_eq!(whole(&resolved[0]), whole(&resolved[1]));
        write(&home.path().join("b"), "model.safetensors", b"Weights");
        assert_ne!(whole(&resolved[0]), whole(&resolved[1]));
        let cancel = CancelFlag::default();
        cancel.cancel();
        assert!(matches!(resolved[0].whole_digest(&cancel), Err(StoreError::Cancelled)));
    }

    #[test]
    fn folders_and_files_are_served_in_place() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path();
        write(folder, "model.gguf", b"GGUF....");
        write(folder, "README.md", b"x");
        let model = resolve("m".into(), folder).unwrap();
        assert!(model.path().ends_with("model.gguf"));
        assert_eq!(model.size_bytes(), 8);
        assert!(model.manifest().is_none());

        write(folder, "config.json", b"{}");
        write(folder, "model.safetensors", b"weights");
        assert_eq!(resolve("m".into(), folder).unwrap().path(), fs::canonicalize(folder).unwrap());
        assert!(resolve("m".into(), &folder.join("README.md")).unwrap().path().ends_with("README.md"));
    }

    #[test]
    fn pytorch_folders_and_split_files_are_models_too() {
        let torch = tempfile::tempdir().unwrap();
        write(torch.path(), "pytorch_model.bin", b"PK");
        write(torch.path(), "config.json", b"{}");
        let model = resolve("m".into(), torch.path()).unwrap();
        assert_eq!((model.path(), model.size_bytes()), (fs::canonicalize(torch.path()).unwrap().as_path(), 4));

        let split = tempfile::tempdir().unwrap();
        write(split.path(), "m-00002-of-00002.gguf", b"two");
        write(split.path(), "m-00001-of-00002.gguf", b"GGUF");
        let model = resolve("m".into(), split.path()).unwrap();
        assert!(model.path().ends_with("m-00001-of-00002.gguf"));
        assert_eq!(model.size_bytes(), 7);

        let nameless = tempfile::tempdir().unwrap();
        write(nameless.path(), ".gguf", b"GGUF");
        assert!(resolve("m".into(), nameless.path()).unwrap().path().ends_with(".gguf"));
    }

    #[test]
    fn folders_without_one_model_are_refused() {
        let home = tempfile::tempdir().unwrap();
        let refusal = || resolve("m".into(), home.path()).unwrap_err().to_string();
        assert!(refusal().contains("neither"));
        write(home.path(), "a.safetensors", b"x");
        assert!(resolve("m".into(), home.path()).is_ok(), "the loader says what is missing");
        write(home.path(), "a.gguf", b"x");
        write(home.path(), "b.gguf", b"x");
        assert!(refusal().contains("several GGUF"));
        write(home.path(), "b-00001-of-00002.gguf", b"x");
        assert!(refusal().contains("several GGUF"));
        assert!(resolve("m".into(), &home.path().join("absent")).is_err());
    }

    #[test]
    fn the_sampled_digest_sees_names_sizes_both_ends_times_and_inodes() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("m.gguf");
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let digest_at = |content: &[u8], time: SystemTime| {
            fs::write(&path, content).unwrap();
            File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
            resolve("m".into(), &path).unwrap().digest()
        };
        let digest = |content: &[u8]| digest_at(content, time);
        let mut content = vec![0u8; 3 << 20];
        let base = digest(&content);
        assert_eq!(base, digest(&content));
        for place in [0, (3 << 20) - 1] {
            content[place] = 1;
            assert_ne!(base, digest(&content));
            content[place] = 0;
        }
        assert_ne!(base, digest(&content[1..]));
        assert_ne!(digest(b"ab"), digest(b"ba"));

        assert_ne!(digest(b"ab"), digest_at(b"ab", time + Duration::from_nanos(1)));
        let before = digest(b"ab");
        let other = home.path().join("other");
        fs::write(&other, b"ab").unwrap();
        File::options().write(true).open(&other).unwrap().set_modified(time).unwrap();
        fs::rename(&other, &path).unwrap();
        assert_ne!(before, resolve("m".into(), &path).unwrap().digest());
    }
}
