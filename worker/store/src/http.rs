//! HTTP as the store needs it: bounded waits, credentials that stay with their host, TLS on every
//! hop, and errors a user can act on.
//!
//! Redirects are followed here and not in the library, so that every hop's scheme is checked and
//! an `Authorization` header never leaves the origin it was meant for.

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ureq::http::{HeaderMap, StatusCode, header};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, parse_pem};
use url::Url;

use crate::digest::Digest;
use crate::error::{Result, StoreError};
use crate::options::{PullOptions, Secret, Waits};
use crate::progress::CancelFlag;
use crate::source::{check_scheme, is_loopback};

const MAX_REDIRECTS: usize = 8;
/// Statuses that say "later", not "no".
pub(crate) const PASSING: [u16; 6] = [408, 429, 500, 502, 503, 504];
/// Longest `Retry-After` that is waited for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30);

/// An `Authorization` value bound to one origin.
#[derive(Debug, Clone)]
pub(crate) struct Authorization {
    origin: url::Origin,
    value: Secret,
}

impl Authorization {
    pub(crate) fn bearer(url: &Url, token: &Secret) -> Self {
        Self { origin: url.origin(), value: Secret::new(format!("Bearer {}", token.expose())) }
    }

    /// Takes user and password out of a URL, if it has any.
    pub(crate) fn take_from(url: &mut Url) -> Option<Self> {
        use base64::Engine as _;
        if url.username().is_empty() && url.password().is_none() {
            return None;
        }
        let decode = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
        let pair = format!("{}:{}", decode(url.username()), decode(url.password().unwrap_or("")));
        let encoded = base64::engine::general_purpose::STANDARD.encode(pair);
        // Both setters fail only for URLs that cannot have credentials, which this one has.
        let _ = url.set_username("");
        let _ = url.set_password(None);
        Some(Self { origin: url.origin(), value: Secret::new(format!("Basic {encoded}")) })
    }
}

/// One GET request.
#[derive(Debug, Clone)]
pub(crate) struct Get<'a> {
    pub(crate) url: &'a Url,
    /// What is asked for, for error messages.
    pub(crate) what: &'a str,
    pub(crate) authorization: Option<&'a Authorization>,
    pub(crate) accept: Option<&'a str>,
    /// Whether the bytes must arrive as they are stored, not compressed for the way.
    pub(crate) as_stored: bool,
    /// First byte wanted, and the entity tag it belongs to.
    pub(crate) range: Option<(u64, Option<&'a str>)>,
    /// Last byte wanted, where a range is; else all that follow.
    pub(crate) last_byte: Option<u64>,
}

impl<'a> Get<'a> {
    pub(crate) fn new(url: &'a Url, what: &'a str) -> Self {
        Self { url, what, authorization: None, accept: None, as_stored: false, range: None, last_byte: None }
    }
}

/// The head of an answer, and its body to be read.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) host: String,
    pub(crate) url: Url,
    /// Digest of the whole file as the host that was asked first names it, before redirecting to
    /// where the bytes are (`X-Linked-ETag` of the hub).
    pub(crate) linked_sha256: Option<Digest>,
    body: ureq::Body,
}

impl Answer {
    pub(crate) fn header(&self, name: header::HeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The body as a reader without size limit; the caller counts.
    pub(crate) fn into_reader(self) -> impl Read {
        self.body.into_with_config().limit(u64::MAX).reader()
    }
}

/// A client for the length of one pull. It remembers hosts that could not be reached, so that a
/// second source on the same dead host costs no second wait.
pub(crate) struct HttpClient {
    agent: ureq::Agent,
    waits: Waits,
    cancel: CancelFlag,
    hosts: Mutex<HashMap<String, Host>>,
}

/// What is known of a host from this pull.
enum Host {
    /// It answered once, so a later failure is passing.
    Answered,
    /// It could not be reached, for this reason.
    Unreachable(String),
}

impl HttpClient {
    /// `ca_bundle` is a file of certificates to trust instead of the system's.
    pub(crate) fn new(options: &PullOptions, ca_bundle: Option<&Path>) -> Result<Self> {
        let waits = options.waits;
        let roots = match ca_bundle {
            Some(path) => RootCerts::Specific(Arc::new(read_certificates(path)?)),
            None => RootCerts::PlatformVerifier,
        };
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .tls_config(TlsConfig::builder().root_certs(roots).build())
            .timeout_resolve(Some(waits.connect))
            .timeout_connect(Some(waits.connect))
            .timeout_per_read(Some(waits.stall))
            .timeout_per_write(Some(waits.stall))
            .timeout_recv_response(Some(waits.answer))
            .user_agent(concat!("forge/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Self { agent: config.into(), waits, cancel: options.cancel.clone(), hosts: Mutex::default() })
    }

    /// Interrupts requests in flight and refuses new ones.
    pub(crate) fn shutdown(&self) {
        self.agent.clone().shutdown();
    }

    /// Sends a GET and follows redirects; the status is the caller's to judge.
    pub(crate) fn send(&self, get: &Get<'_>) -> Result<Answer> {
        let mut url = get.url.clone();
        let mut linked_sha256 = None;
        for _ in 0..=MAX_REDIRECTS {
            self.cancel.check()?;
            check_scheme(&url).map_err(|reason| StoreError::BadAnswer {
                host: host_of(get.url),
                reason: format!("it leads to an address that is refused: {reason}"),
            })?;
            let answer = self.send_once(get, &url)?;
            if url.origin() == get.url.origin() {
                linked_sha256 = linked_sha256.or_else(|| linked_digest(&answer));
            }
            let target = match answer.status.as_u16() {
                301 | 302 | 303 | 307 | 308 => answer.header(header::LOCATION),
                _ => return Ok(Answer { linked_sha256, ..answer }),
            };
            url = target.and_then(|target| url.join(target).ok()).ok_or_else(|| StoreError::BadAnswer {
                host: answer.host.clone(),
                reason: "it redirects without saying where to".into(),
            })?;
        }
        Err(StoreError::BadAnswer { host: host_of(get.url), reason: format!("it redirects more than {MAX_REDIRECTS} times") })
    }

    /// Fetches a small document whole; passing errors of the server are retried twice.
    pub(crate) fn fetch_document(&self, get: &Get<'_>, limit_bytes: u64) -> Result<(Answer, Vec<u8>)> {
        let mut pause = Duration::from_millis(500);
        let mut retries_left = 2;
        loop {
            let answer = self.send(get)?;
            if answer.status.is_success() {
                return self.read_document(answer, get.what, limit_bytes);
            }
            if retries_left == 0 || !is_passing(&answer) {
                return Err(status_error(&answer, get.what));
            }
            self.cancel.sleep(retry_after(&answer).unwrap_or(pause))?;
            pause *= 2;
            retries_left -= 1;
        }
    }

    fn read_document(&self, mut answer: Answer, what: &str, limit_bytes: u64) -> Result<(Answer, Vec<u8>)> {
        let mut bytes = Vec::new();
        let mut reader = answer.body.as_reader().take(limit_bytes + 1);
        reader.read_to_end(&mut bytes).map_err(|error| self.broken(&answer.host, &error))?;
        if bytes.len() as u64 > limit_bytes {
            return Err(StoreError::BadAnswer { host: answer.host, reason: format!("{what} is larger than {limit_bytes} bytes") });
        }
        Ok((answer, bytes))
    }

    /// The error for a body that broke off while being read.
    pub(crate) fn broken(&self, host: &str, error: &std::io::Error) -> StoreError {
        if self.cancel.is_cancelled() {
            return StoreError::Cancelled;
        }
        let timed_out = error.kind() == std::io::ErrorKind::TimedOut
            || error
                .get_ref()
                .and_then(|inner| inner.downcast_ref::<ureq::Error>())
                .is_some_and(|inner| matches!(inner, ureq::Error::Timeout(_)));
        let reason = if timed_out {
            format!("sent nothing for {} s", self.waits.stall.as_secs_f32())
        } else {
            format!("broke the transfer off ({error})")
        };
        StoreError::Network { host: host.into(), reason }
    }

    fn send_once(&self, get: &Get<'_>, url: &Url) -> Result<Answer> {
        let host = host_of(url);
        if let Some(Host::Unreachable(reason)) = self.hosts().get(&host) {
            return Err(StoreError::Network { host, reason: format!("{reason} (a moment ago)") });
        }
        let mut request = self.agent.get(url.as_str());
        if let Some(authorization) = get.authorization.filter(|one| one.origin == url.origin()) {
            request = request.header(header::AUTHORIZATION, authorization.value.expose());
        }
        if let Some(accept) = get.accept {
            request = request.header(header::ACCEPT, accept);
        }
        if let Some((first, tag)) = get.range {
            let last = get.last_byte.map(|last| last.to_string()).unwrap_or_default();
            request = request.header(header::RANGE, format!("bytes={first}-{last}"));
            if let Some(tag) = tag {
                request = request.header(header::IF_RANGE, tag);
            }
        }
        if get.as_stored {
            request = request.header(header::ACCEPT_ENCODING, "identity");
        }
        let mut config = request.config();
        if is_loopback(url) {
            config = config.proxy(None);
        }
        match config.build().call() {
            Ok(response) => {
                self.hosts().insert(host.clone(), Host::Answered);
                let (parts, body) = response.into_parts();
                Ok(Answer { status: parts.status, headers: parts.headers, host, url: url.clone(), linked_sha256: None, body })
            }
            Err(error) => Err(self.request_error(host, error)),
        }
    }

    fn request_error(&self, host: String, error: ureq::Error) -> StoreError {
        if self.cancel.is_cancelled() {
            return StoreError::Cancelled;
        }
        let (reason, unreachable) = match error {
            ureq::Error::HostNotFound => ("could not be found (name lookup failed)".into(), true),
            ureq::Error::Timeout(ureq::Timeout::Resolve | ureq::Timeout::Connect) => {
                (format!("did not answer within {} s", self.waits.connect.as_secs_f32()), true)
            }
            ureq::Error::Timeout(kind) => {
                let per_read = matches!(kind, ureq::Timeout::PerRead);
                let waited = if per_read { self.waits.stall } else { self.waits.answer };
                (format!("did not answer within {} s", waited.as_secs_f32()), true)
            }
            ureq::Error::Io(error) => match error.kind() {
                std::io::ErrorKind::ConnectionRefused => ("refused the connection".into(), true),
                // What rustls finds wrong with a certificate arrives wrapped like this.
                std::io::ErrorKind::InvalidData => (untrusted(&error), true),
                _ => (format!("could not be reached ({error})"), true),
            },
            ureq::Error::Rustls(error) => (untrusted(&error), true),
            other => (format!("could not be asked ({other})"), false),
        };
        let mut hosts = self.hosts();
        if unreachable && !matches!(hosts.get(&host), Some(Host::Answered)) {
            hosts.insert(host.clone(), Host::Unreachable(reason.clone()));
        }
        drop(hosts);
        StoreError::Network { host, reason }
    }

    fn hosts(&self) -> MutexGuard<'_, HashMap<String, Host>> {
        // The map is whole even if another thread panicked while holding it.
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn untrusted(error: &dyn std::fmt::Display) -> String {
    format!("has a certificate that is not trusted ({error}); if your network has its own, set SSL_CERT_FILE")
}

fn linked_digest(answer: &Answer) -> Option<Digest> {
    let tag = answer.headers.get("x-linked-etag")?.to_str().ok()?;
    tag.trim_matches('"').parse().ok()
}

/// Host and port as they are shown to the user: never with credentials.
pub(crate) fn host_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or("?");
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

pub(crate) fn is_passing(answer: &Answer) -> bool {
    PASSING.contains(&answer.status.as_u16())
}

/// The pause a server asks for in seconds, bounded.
pub(crate) fn retry_after(answer: &Answer) -> Option<Duration> {
    let seconds = answer.header(header::RETRY_AFTER)?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds).min(MAX_RETRY_AFTER))
}

pub(crate) fn status_error(answer: &Answer, what: &str) -> StoreError {
    let hint = match answer.status.as_u16() {
        401 | 403 => {
            "access is refused; if the model is gated, accept its licence on its page \
                      and set HF_TOKEN to a token that may read it"
        }
        404 | 410 => "there is no such thing there; check the name, the revision and the file",
        429 => "too many requests; wait a while, or set HF_TOKEN",
        500..=599 => "the server has a fault; try again later",
        _ => "that was not expected",
    };
    StoreError::Http { host: answer.host.clone(), status: answer.status.as_u16(), what: what.into(), hint: hint.into() }
}

fn read_certificates(path: &Path) -> Result<Vec<Certificate<'static>>> {
    let wrong = |reason: String| StoreError::Setting { name: format!("certificates {}", path.display()), reason };
    let pem = std::fs::read(path).map_err(|error| wrong(format!("cannot be read ({error})")))?;
    let certificates: Vec<_> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(wrong("holds no certificate in PEM form".into()));
    }
    Ok(certificates)
}
