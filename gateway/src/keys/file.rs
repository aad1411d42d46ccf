//! The key file: JSON, readable by its owner only, replaced as a whole under a lock.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use fs4::fs_std::FileExt;
use serde::{Deserialize, Serialize};

use super::{CreatedKey, KeyLimits, KeyRecord};
use crate::error::GatewayError;

const VERSION: u32 = 1;
/// Ten thousand keys fit in 4 MiB; anything larger is not a key file.
const MAX_FILE_BYTES: u64 = 16 << 20;

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Contents {
    version: u32,
    keys: Vec<KeyRecord>,
}

/// The keys of one `FORGE_HOME`, as `forgectl keys` manages them. Each call reads the file anew.
#[derive(Debug, Clone)]
pub struct KeyStore {
    path: PathBuf,
}

impl KeyStore {
    /// The store at `path`; the file need not exist yet.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        KeyStore { path: path.into() }
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a key and stores its hash.
    ///
    /// # Errors
    /// A name that is taken or not allowed, a limit of zero, or the file's error.
    pub fn create(&self, name: &str, limits: KeyLimits, now_unix_s: u64) -> Result<CreatedKey, GatewayError> {
        let created = KeyRecord::generate(name, limits, now_unix_s)?;
        self.change(|keys| {
            if keys.iter().any(|key| key.name == name && key.revoked_s.is_none()) {
                return Err(GatewayError::KeyExists { name: name.to_owned() });
            }
            keys.push(created.record.clone());
            Ok(created)
        })
    }

    /// Revokes the active key of this name or id. Revoked keys stay listed.
    ///
    /// # Errors
    /// [`GatewayError::UnknownKey`], or the file's error.
    pub fn revoke(&self, name_or_id: &str, now_unix_s: u64) -> Result<KeyRecord, GatewayError> {
        self.change(|keys| {
            let key = keys
                .iter_mut()
                .find(|key| key.revoked_s.is_none() && (key.name == name_or_id || key.id == name_or_id))
                .ok_or_else(|| GatewayError::UnknownKey { name: name_or_id.to_owned() })?;
            key.revoked_s = Some(now_unix_s);
            Ok(key.clone())
        })
    }

    /// All keys, revoked ones included, oldest first. No file means no keys.
    ///
    /// # Errors
    /// The file cannot be read or is not a key file.
    pub fn list(&self) -> Result<Vec<KeyRecord>, GatewayError> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(self.io(error)),
        };
        let mut text = String::new();
        file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text).map_err(|error| self.io(error))?;
        if text.len() as u64 > MAX_FILE_BYTES {
            return Err(self.invalid(format!("it is larger than {MAX_FILE_BYTES} bytes")));
        }
        let contents: Contents = serde_json::from_str(&text).map_err(|error| self.invalid(error.to_string()))?;
        if contents.version != VERSION {
            return Err(self.invalid(format!("version {} is not {VERSION}", contents.version)));
        }
        Ok(contents.keys)
    }

    /// Reads, changes and replaces the file while holding a lock beside it, so that two `forgectl` at once lose
    /// nothing; a reader sees the old file or the new one.
    fn change<T>(&self, change: impl FnOnce(&mut Vec<KeyRecord>) -> Result<T, GatewayError>) -> Result<T, GatewayError> {
        if let Some(folder) = self.path.parent() {
            std::fs::create_dir_all(folder).map_err(|error| self.io(error))?;
        }
        let lock = private_file(&self.path.with_extension("lock"), false).map_err(|error| self.io(error))?;
        lock.lock_exclusive().map_err(|error| self.io(error))?;
        let mut keys = self.list()?;
        let result = change(&mut keys)?;
        self.save(keys).map_err(|error| self.io(error))?;
        Ok(result)
    }

    fn save(&self, keys: Vec<KeyRecord>) -> std::io::Result<()> {
        let text = serde_json::to_string_pretty(&Contents { version: VERSION, keys })?;
        let new = self.path.with_extension("new");
        let mut file = private_file(&new, true)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, &self.path)
    }

    fn io(&self, source: std::io::Error) -> GatewayError {
        GatewayError::KeyFile { path: self.path.clone(), source }
    }

    fn invalid(&self, reason: String) -> GatewayError {
        GatewayError::KeyFileInvalid { path: self.path.clone(), reason }
    }
}

/// Opens a file that only its owner may read, from the first moment on.
fn private_file(path: &Path, truncate: bool) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).write(true).truncate(truncate);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(0o600);
    }
    options.open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, KeyStore) {
        let folder = tempfile::tempdir().unwrap();
        let store = KeyStore::new(folder.path().join("home").join("keys.json"));
        (folder, store)
    }

    #[test]
    fn file_never_holds_the_plaintext_and_is_private() {
        let (_folder, store) = store();
        let created = store.create("ci", KeyLimits { rpm: Some(3), tpm: None }, 7).unwrap();
        let text = std::fs::read_to_string(store.path()).unwrap();
        assert!(!text.contains(&created.plaintext));
        assert!(!text.contains(&created.plaintext[created.plaintext.len() - 64..]));
        assert_eq!(store.list().unwrap(), [created.record]);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(std::fs::metadata(store.path()).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn a_revoked_name_can_be_used_again() {
        let (_folder, store) = store();
        store.create("ci", KeyLimits::default(), 1).unwrap();
        assert!(matches!(store.create("ci", KeyLimits::default(), 2), Err(GatewayError::KeyExists { .. })));
        store.revoke("ci", 3).unwrap();
        assert!(matches!(store.revoke("ci", 4), Err(GatewayError::UnknownKey { .. })));
        store.create("ci", KeyLimits::default(), 5).unwrap();
        let revoked: Vec<_> = store.list().unwrap().iter().map(|key| key.revoked_s).collect();
        assert_eq!(revoked, [Some(3), None]);
    }

    #[test]
    fn concurrent_creators_lose_nothing() {
        let (_folder, store) = store();
        std::thread::scope(|scope| {
            for i in 0..8 {
                let store = &store;
                scope.spawn(move || store.create(&format!("key-{i}"), KeyLimits::default(), i).unwrap());
            }
        });
        assert_eq!(store.list().unwrap().len(), 8);
    }

    #[test]
    fn broken_files_and_bad_names_are_named() {
        let (_folder, store) = store();
        for name in ["", " a", "a/b", "a\nb"] {
            assert!(matches!(store.create(name, KeyLimits::default(), 1), Err(GatewayError::KeyInvalid { field: "name", .. })));
        }
        assert!(matches!(store.create("a", KeyLimits { rpm: Some(0), tpm: None }, 1), Err(GatewayError::KeyInvalid { field: "rpm", .. })));
        std::fs::create_dir_all(store.path().parent().unwrap()).unwrap();
        for text in ["", "[]", r#"{"version":1,"keys":[],"extra":0}"#, r#"{"version":2,"keys":[]}"#] {
            std::fs::write(store.path(), text).unwrap();
            assert!(matches!(store.list(), Err(GatewayError::KeyFileInvalid { .. })), "{text}");
        }
    }
}
