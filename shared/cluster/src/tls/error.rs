//! What is wrong with a certificate, key or token, and what to do about it.

use std::error::Error;

use forge_shared::cluster::node::Role;
use rustls::{AlertDescription, CertificateError};

/// A certificate, key or token that does not do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TlsError {
    /// A name that cannot stand in a certificate.
    #[error("{what} {name:?}: write 1 to 63 of a-z, 0-9 and '-', not beginning or ending with '-'")]
    Name {
        /// Which name.
        what: &'static str,
        /// What was given.
        name: String,
    },
    /// A file that cannot be read or written.
    #[error("{path}: {reason}")]
    File {
        /// Which.
        path: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A certificate, key or signing request that cannot be used.
    #[error("certificate: {reason}")]
    Certificate {
        /// What is wrong with it.
        reason: String,
    },
    /// Signed by somebody else.
    #[error(
        "the certificate of {whose} is not of this cluster's CA: check that both sides belong to one cluster (same ca.pem); \
         a process of another cluster, or one that was away while the CA was rotated, joins with `forgectl cluster join-token`"
    )]
    WrongCa {
        /// `the server`, `this process`, …
        whose: String,
    },
    /// Taken back by an operator.
    #[error(
        "the certificate of {whose} was revoked (`forgectl cluster certs list`): if that was meant, stop that process; to let it in \
         again, delete its node.pem and join it with a new token"
    )]
    Revoked {
        /// Whose.
        whose: String,
    },
    /// Past its end.
    #[error("the certificate of {whose} has expired: check the clock; if it is right, delete the certificate and join again with a token")]
    Expired {
        /// Whose.
        whose: String,
    },
    /// Before its beginning.
    #[error("the certificate of {whose} is not valid yet: one of the two clocks is wrong, set it")]
    NotYetValid {
        /// Whose.
        whose: String,
    },
    /// Another process answered.
    #[error("the server is not {expected}: the address belongs to another process, check it")]
    WrongPeer {
        /// The name its certificate should carry.
        expected: String,
    },
    /// The caller showed none.
    #[error("a client certificate is needed: join the cluster with a token, or use a context (`forgectl context add`)")]
    NoCertificate,
    /// The caller's role may not do this.
    #[error("{found} may not do this: it takes a certificate of role {allowed}")]
    WrongRole {
        /// Who called.
        found: String,
        /// Who may.
        allowed: String,
    },
    /// A join token that cannot be used.
    #[error("join token: {reason}")]
    Token {
        /// What is wrong and how to get a good one.
        reason: String,
    },
    /// TLS did not come about for another reason.
    #[error("tls: {reason}")]
    Handshake {
        /// What happened.
        reason: String,
    },
}

impl TlsError {
    /// Names who called and who may.
    pub(super) fn wrong_role(found: impl std::fmt::Display, allowed: &[Role]) -> Self {
        let allowed: Vec<&str> = allowed.iter().map(|role| role.as_str()).collect();
        TlsError::WrongRole { found: found.to_string(), allowed: allowed.join(" or ") }
    }

    /// Reads rustls's words. `whose` is the other side, `expected` the name it should have.
    pub(super) fn from_rustls(error: &rustls::Error, whose: &str, expected: &str) -> Self {
        let ours = || "this process".to_owned();
        match error {
            rustls::Error::InvalidCertificate(reason) => match reason {
                CertificateError::Expired | CertificateError::ExpiredContext { .. } => TlsError::Expired { whose: whose.into() },
                CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                    TlsError::NotYetValid { whose: whose.into() }
                }
                CertificateError::Revoked => TlsError::Revoked { whose: whose.into() },
                CertificateError::UnknownIssuer | CertificateError::BadSignature => TlsError::WrongCa { whose: whose.into() },
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                    TlsError::WrongPeer { expected: expected.into() }
                }
                other => TlsError::Certificate { reason: format!("of {whose}: {other}") },
            },
            rustls::Error::NoCertificatesPresented => TlsError::NoCertificate,
            rustls::Error::AlertReceived(alert) => match alert {
                AlertDescription::CertificateExpired => TlsError::Expired { whose: ours() },
                AlertDescription::CertificateRevoked => TlsError::Revoked { whose: ours() },
                AlertDescription::UnknownCA | AlertDescription::DecryptError => TlsError::WrongCa { whose: ours() },
                AlertDescription::CertificateRequired => TlsError::NoCertificate,
                AlertDescription::BadCertificate | AlertDescription::CertificateUnknown | AlertDescription::UnsupportedCertificate => {
                    TlsError::Certificate { reason: format!("of this process was refused by the other side ({alert:?})") }
                }
                other => TlsError::Handshake { reason: format!("the other side ended it: {other:?}") },
            },
            other => TlsError::Handshake { reason: other.to_string() },
        }
    }
}

impl From<TlsError> for tonic::Status {
    fn from(error: TlsError) -> Self {
        match error {
            TlsError::NoCertificate | TlsError::Expired { .. } | TlsError::NotYetValid { .. } | TlsError::Revoked { .. } => {
                tonic::Status::unauthenticated(error.to_string())
            }
            TlsError::Token { .. } | TlsError::WrongRole { .. } => tonic::Status::permission_denied(error.to_string()),
            _ => tonic::Status::invalid_argument(error.to_string()),
        }
    }
}

/// The certificate's fault behind a failed call or connection, if there is one: looks through the chain of causes.
/// `expected` is the name the server should have.
pub fn diagnose(error: &(dyn Error + 'static), expected: &str) -> Option<TlsError> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<rustls::Error>() {
            return Some(TlsError::from_rustls(found, "the server", expected));
        }
        if let Some(found) = error.downcast_ref::<TlsError>() {
            return Some(found.clone());
        }
        if let Some(io) = error.downcast_ref::<std::io::Error>()
            && let Some(inner) = io.get_ref()
            && let Some(found) = diagnose(inner, expected)
        {
            return Some(found);
        }
        // HTTP/2 keeps only the words of what its connection died of.
        if let Some(alert) = alert_in_words(&error.to_string()) {
            return Some(TlsError::from_rustls(&rustls::Error::AlertReceived(alert), "the server", expected));
        }
        next = error.source();
    }
    None
}

fn alert_in_words(text: &str) -> Option<AlertDescription> {
    let (_, alert) = text.split_once("received fatal alert: ")?;
    [
        AlertDescription::CertificateExpired,
        AlertDescription::CertificateRevoked,
        AlertDescription::UnknownCA,
        AlertDescription::DecryptError,
        AlertDescription::CertificateRequired,
        AlertDescription::BadCertificate,
        AlertDescription::CertificateUnknown,
        AlertDescription::UnsupportedCertificate,
    ]
    .into_iter()
    // The words are either the name of the number or, in newer versions, its description with the same letters.
    .find(|known| letters(alert).starts_with(&letters(&format!("{known:?}"))))
}

fn letters(text: &str) -> String {
    text.chars().filter(char::is_ascii_alphanumeric).map(|letter| letter.to_ascii_lowercase()).collect()
}
