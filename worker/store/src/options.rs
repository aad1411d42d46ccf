//! What the caller, or the environment, says about how to pull. Everything downstream takes these
//! values; no other file of this crate but the pip lookup reads the environment.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Result, StoreError};
use crate::progress::CancelFlag;

/// The public hub, used where `HF_ENDPOINT` names no mirror.
const PUBLIC_HUB: &str = "https://huggingface.co";

/// A secret that is never printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a secret.
    pub fn new(value: impl Into<String>) -> Self {
        Self(value.into())
    }

    pub(crate) fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Secret(…)")
    }
}

/// How to pull a model.
#[derive(Debug, Clone)]
pub struct PullOptions {
    /// Refuse the network, by name (`FORGE_OFFLINE`).
    pub offline: bool,
    /// Ask the source again even if the model is in the store, and update it.
    pub refresh: bool,
    /// Address of the hub or its mirror (`HF_ENDPOINT`).
    pub hub_endpoint: String,
    /// Access token for the hub (`HF_TOKEN`, or the token file of its tools).
    pub hub_token: Option<Secret>,
    /// Revision for hub ids that name none (`FORGE_HF_REVISION`).
    pub hub_revision: Option<String>,
    /// Address of the Python package index; `None` asks pip's configuration.
    pub package_index: Option<String>,
    /// File of certificates to trust; `None` trusts what the system trusts.
    pub ca_bundle: Option<PathBuf>,
    /// Raised by the caller to stop.
    pub cancel: CancelFlag,
    /// Bounds of each wait.
    pub waits: Waits,
}

/// Bounds of each wait of a pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waits {
    /// For name lookup and connection, each.
    pub connect: Duration,
    /// For the head of an answer.
    pub answer: Duration,
    /// For the next byte of its body.
    pub stall: Duration,
    /// Number of times a broken transfer is resumed without any progress in between.
    pub retries: u32,
    /// Pause before the first retry; it doubles, up to 30 s.
    pub first_pause: Duration,
    /// For another process that pulls the same model.
    pub lock: Duration,
}

impl Default for Waits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            answer: Duration::from_secs(10),
            stall: Duration::from_secs(30),
            retries: 5,
            first_pause: Duration::from_millis(500),
            lock: Duration::from_secs(3600),
        }
    }
}

impl Default for PullOptions {
    fn default() -> Self {
        Self {
            offline: false,
            refresh: false,
            hub_endpoint: PUBLIC_HUB.into(),
            hub_token: None,
            hub_revision: None,
            package_index: None,
            ca_bundle: None,
            cancel: CancelFlag::default(),
            waits: Waits::default(),
        }
    }
}

impl PullOptions {
    /// Options as the environment sets them: `FORGE_OFFLINE` (or `HF_HUB_OFFLINE`), `HF_ENDPOINT`,
    /// `HF_TOKEN` (or the token file under `HF_TOKEN_PATH`, `HF_HOME`), `FORGE_HF_REVISION`, and
    /// for certificates `SSL_CERT_FILE`, `REQUESTS_CA_BUNDLE`, the first that is set. (`PIP_CERT`
    /// and pip's other settings are read when a package index is asked.)
    ///
    /// # Errors
    /// [`StoreError::Setting`] for a value that cannot be read.
    pub fn from_environment() -> Result<Self> {
        Self::from_variables(&|name| std::env::var(name).ok())
    }

    fn from_variables(variable: &dyn Fn(&str) -> Option<String>) -> Result<Self> {
        let set = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let ca_bundle = ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"].iter().find_map(|name| set(name)).map(PathBuf::from);
        Ok(Self {
            offline: switch(&set, "FORGE_OFFLINE")? || switch(&set, "HF_HUB_OFFLINE")?,
            hub_endpoint: set("HF_ENDPOINT").unwrap_or_else(|| PUBLIC_HUB.into()),
            hub_token: hub_token(&set),
            hub_revision: set("FORGE_HF_REVISION"),
            ca_bundle,
            ..Self::default()
        })
    }
}

fn switch(set: &dyn Fn(&str) -> Option<String>, name: &str) -> Result<bool> {
    match set(name).map(|value| value.to_ascii_lowercase()).as_deref() {
        None | Some("0" | "false" | "no" | "off") => Ok(false),
        Some("1" | "true" | "yes" | "on") => Ok(true),
        Some(other) => Err(StoreError::Setting { name: name.into(), reason: format!("'{other}' is neither 1 nor 0") }),
    }
}

fn hub_token(set: &dyn Fn(&str) -> Option<String>) -> Option<Secret> {
    if let Some(token) = set("HF_TOKEN") {
        return Some(Secret::new(token.trim()));
    }
    let file = set("HF_TOKEN_PATH")
        .map(PathBuf::from)
        .or_else(|| set("HF_HOME").map(|home| PathBuf::from(home).join("token")))
        .or_else(|| etcetera::home_dir().ok().map(|home| home.join(".cache/huggingface/token")))?;
    let token = std::fs::read_to_string(file).ok()?;
    Some(token.trim()).filter(|token| !token.is_empty()).map(Secret::new)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_is_read_and_wrong_values_are_named() {
        let options = PullOptions::from_variables(&|name| match name {
            "FORGE_OFFLINE" => Some("1".into()),
            "HF_ENDPOINT" => Some("https://mirror.example".into()),
            "HF_TOKEN" => Some("hf_secret\n".into()),
            "SSL_CERT_FILE" => Some("/ca.pem".into()),
            _ => None,
        })
        .unwrap();
        assert!(options.offline);
        assert_eq!(options.hub_endpoint, "https://mirror.example");
        assert_eq!(options.hub_token.as_ref().unwrap().expose(), "hf_secret");
        assert_eq!(options.ca_bundle, Some(PathBuf::from("/ca.pem")));
        assert!(!format!("{options:?}").contains("hf_secret"));

        let wrong = |name: &str| (name == "FORGE_OFFLINE").then(|| "maybe".to_owned());
        let message = PullOptions::from_variables(&wrong).unwrap_err().to_string();
        assert!(message.contains("FORGE_OFFLINE: 'maybe'"), "{message}");
    }
}
