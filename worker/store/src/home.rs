//! Where Forge keeps models and state: `FORGE_HOME`, or the platform's data folder.
//!
//! This only names places; it creates nothing.

use std::path::{Path, PathBuf};

use etcetera::BaseStrategy;

use crate::error::{Result, StoreError};

/// The folder that holds everything Forge keeps on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForgeHome {
    root: PathBuf,
}

impl ForgeHome {
    /// `FORGE_HOME` where it is set, else `forge` in the platform's data folder
    /// (`~/.local/share/forge` on Linux,
    /// `~/Library/Application Support/forge` on macOS).
    ///
    /// # Errors
    /// [`StoreError::Setting`] if `FORGE_HOME` is relative, or if it is unset and the user has no
    /// home folder.
    pub fn discover() -> Result<Self> {
        match std::env::var_os("FORGE_HOME").filter(|value| !value.is_empty()) {
            Some(value) => Self::from_setting(PathBuf::from(value)),
            None => {
                let base = etcetera::base_strategy::choose_native_strategy().map_err(|_| StoreError::Setting {
                    name: "FORGE_HOME".into(),
                    reason: "is unset and this user has no home folder; set it to a folder for models".into(),
                })?;
                Ok(Self::at(base.data_dir().join("forge")))
            }
        }
    }

    fn from_setting(path: PathBuf) -> Result<Self> {
        if path.is_absolute() {
            return Ok(Self::at(path));
        }
        Err(StoreError::Setting {
            name: "FORGE_HOME".into(),
            reason: format!("'{}' is a relative path; write the full path, so that every command means the same folder", path.display()),
        })
    }

    /// A home at a given folder.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The folder itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where the model store lives.
    pub fn models(&self) -> PathBuf {
        self.root.join("models")
    }

    /// The user's own catalogue, merged over the built-in one.
    pub fn catalogue_file(&self) -> PathBuf {
        self.root.join("catalogue.yaml")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_home_is_refused_by_name() {
        let error = ForgeHome::from_setting(PathBuf::from("models")).unwrap_err();
        assert!(error.to_string().starts_with("FORGE_HOME: 'models'"), "{error}");
    }
}
