//! What the store writes down about a model: where it came from and which files it consists of.
//!
//! Invariant: a manifest that parses has only relative, plain file names and well-formed digests,
//! so its fields may be joined to paths.

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::names;

/// One file of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestFile {
    /// Name within the model's folder, `/` between parts.
    pub path: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Digest of the content.
    pub sha256: Digest,
}

/// A stored model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this file's format.
    pub format: u32,
    /// The name by which the model is asked for.
    pub name: String,
    /// The source that delivered it, as the user would write it, with the resolved revision.
    pub source: String,
    /// Its files, sorted by path.
    pub files: Vec<ManifestFile>,
    /// Licence (SPDX id or name), where the source or the catalogue tells it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub licence: Option<String>,
    /// When it was pulled, seconds since 1970 UTC.
    pub created_unix_s: u64,
}

impl Manifest {
    /// The format this build reads and writes.
    pub const FORMAT: u32 = 1;

    /// Digest of the content: of one line `sha256 size path` per file, sorted by path. Two sources
    /// that deliver the same files under the same names give the same digest.
    pub fn digest(&self) -> Digest {
        let mut lines: Vec<String> = self.files.iter().map(|file| format!("{} {} {}\n", file.sha256, file.size_bytes, file.path)).collect();
        lines.sort_by(|left, right| left[65..].cmp(&right[65..]));
        Digest::of(lines.concat().as_bytes())
    }

    /// Size of all files in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size_bytes).sum()
    }

    /// Parses and checks a manifest.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let manifest: Self = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if manifest.format != Self::FORMAT {
            return Err(format!("format {} is not known to this version (it reads {})", manifest.format, Self::FORMAT));
        }
        if manifest.files.is_empty() {
            return Err("files is empty".into());
        }
        for file in &manifest.files {
            names::check_relative_path(&file.path).map_err(|reason| format!("files: '{}' {reason}", file.path))?;
        }
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(paths: &[&str]) -> Manifest {
        Manifest {
            format: Manifest::FORMAT,
            name: "a/b".into(),
            source: "hf:a/b".into(),
            files: paths
                .iter()
                .map(|path| ManifestFile { path: (*path).into(), size_bytes: 3, sha256: Digest::of(path.as_bytes()) })
                .collect(),
            licence: None,
            created_unix_s: 1,
        }
    }

    #[test]
    fn the_digest_is_of_content_alone() {
        let one = manifest(&["a.json", "b.gguf"]);
        let mut other = manifest(&["b.gguf", "a.json"]);
        other.name = "else".into();
        other.created_unix_s = 9;
        assert_eq!(one.digest(), other.digest());
        assert_ne!(one.digest(), manifest(&["a.json", "c.gguf"]).digest());
    }

    #[test]
    fn a_manifest_that_escapes_is_refused() {
        let good = serde_json::to_string(&manifest(&["a.json"])).unwrap();
        assert_eq!(Manifest::parse(&good).unwrap(), manifest(&["a.json"]));
        let cases = [
            (good.replace("a.json", "../a.json"), "'../a.json'"),
            (good.replace("a.json", "/etc/passwd"), "'/etc/passwd'"),
            (good.replace("\"format\":1", "\"format\":2"), "format 2"),
            (good.replace("\"name\"", "\"nom\""), "unknown field `nom`"),
        ];
        for (text, expected) in cases {
            let reason = Manifest::parse(&text).unwrap_err();
            assert!(reason.contains(expected), "{reason}");
        }
    }
}
