//! [`ClusterError`] as a gRPC status and back, with `ErrorDetail` in its details.
//!
//! Invariant: an error that a coordinator means comes out at the client as the same error. A status without details is
//! not a coordinator's word but the transport's, and after it a command may or may not have been applied.

use forge_proto::cluster::ErrorDetail;
use forge_shared::cluster::command::CommandError;
use forge_shared::plan::Refusal;
use prost::Message;
use serde::{Deserialize, Serialize};
use tonic::{Code, Status};

use crate::api::ClusterError;
use crate::tls::diagnose;

/// Longest message of a foreign status that is repeated.
const MAX_MESSAGE_CHARS: usize = 500;

/// [`ClusterError::Away`] in a status: a detail without any field is none on the wire.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AwayDetail {
    away: String,
}

/// The status of an error. `leader` is `host:port` of who could do it, where this coordinator cannot.
pub fn to_status(error: &ClusterError, leader: Option<&str>) -> Status {
    let (code, is_retryable, error_json) = match error {
        ClusterError::Command(command) => {
            let code = match command {
                CommandError::Invalid { .. } => Code::InvalidArgument,
                CommandError::NotFound { .. } => Code::NotFound,
                CommandError::Conflict { .. } => Code::AlreadyExists,
                CommandError::Stale { .. } => Code::Aborted,
                CommandError::TooMany { .. } => Code::ResourceExhausted,
                CommandError::Level { .. } => Code::FailedPrecondition,
                CommandError::Token { .. } => Code::PermissionDenied,
                CommandError::Unsafe { .. } => Code::FailedPrecondition,
            };
            (code, false, serde_json::to_vec(command).unwrap_or_default())
        }
        ClusterError::NotPlaceable(refusal) => (Code::FailedPrecondition, false, serde_json::to_vec(refusal).unwrap_or_default()),
        ClusterError::Unavailable { .. } => (Code::Unavailable, true, Vec::new()),
        ClusterError::Unfinished { .. } => (Code::DeadlineExceeded, true, Vec::new()),
        ClusterError::Away { reason } => {
            (Code::FailedPrecondition, false, serde_json::to_vec(&AwayDetail { away: reason.clone() }).unwrap_or_default())
        }
        ClusterError::Unknown { .. } => (Code::Unknown, true, Vec::new()),
        ClusterError::Forbidden { .. } => (Code::PermissionDenied, false, Vec::new()),
        ClusterError::Protocol { .. } => (Code::InvalidArgument, false, Vec::new()),
    };
    let message = match error {
        ClusterError::Unavailable { reason, .. }
        | ClusterError::Unfinished { reason, .. }
        | ClusterError::Away { reason }
        | ClusterError::Unknown { reason }
        | ClusterError::Forbidden { reason }
        | ClusterError::Protocol { reason } => reason.clone(),
        ClusterError::Command(_) | ClusterError::NotPlaceable(_) => error.to_string(),
    };
    let detail = ErrorDetail { leader: leader.unwrap_or_default().into(), is_retryable, error_json: error_json.into() };
    Status::with_details(code, message, detail.encode_to_vec().into())
}

/// What a failed call means to its caller.
#[derive(Debug, Clone, PartialEq)]
pub struct Failure {
    /// The error.
    pub error: ClusterError,
    /// `host:port` of who leads, if the answering coordinator said so.
    pub leader: Option<String>,
    /// Whether the same call may succeed elsewhere or later.
    pub is_retryable: bool,
    /// Whether the request may have been carried out.
    pub may_have_happened: bool,
}

/// Reads a failed call's status. `expected` is the name the server should have.
pub fn from_status(status: &Status, expected: &str) -> Failure {
    let reason: String = status.message().chars().take(MAX_MESSAGE_CHARS).collect();
    if let Some(detail) = (!status.details().is_empty()).then(|| ErrorDetail::decode(status.details())).and_then(Result::ok) {
        return from_detail(status.code(), detail, reason);
    }
    let definite = |error| Failure { error, leader: None, is_retryable: false, may_have_happened: false };
    if let Some(fault) = diagnose(status, expected) {
        // Another address may have a process with a good certificate behind it.
        return Failure { is_retryable: true, ..definite(ClusterError::Forbidden { reason: fault.to_string() }) };
    }
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated => definite(ClusterError::Forbidden { reason }),
        Code::Unimplemented => definite(ClusterError::Protocol {
            reason: format!("the server does not know this call ({reason}): bring both sides to one version of Forge"),
        }),
        Code::InvalidArgument | Code::OutOfRange | Code::ResourceExhausted | Code::FailedPrecondition | Code::NotFound => {
            definite(ClusterError::Protocol { reason })
        }
        _ => {
            let never_sent = was_never_sent(status);
            let reason = if reason.is_empty() { format!("{:?}", status.code()) } else { causes(status, reason) };
            let error = if never_sent { ClusterError::Unavailable { waited_ms: 0, reason } } else { ClusterError::Unknown { reason } };
            Failure { error, leader: None, is_retryable: true, may_have_happened: !never_sent }
        }
    }
}

fn from_detail(code: Code, detail: ErrorDetail, reason: String) -> Failure {
    let leader = Some(detail.leader).filter(|leader| !leader.is_empty());
    let failure = |error| Failure { error, leader: leader.clone(), is_retryable: detail.is_retryable, may_have_happened: false };
    if !detail.error_json.is_empty() {
        if let Ok(error) = serde_json::from_slice::<CommandError>(&detail.error_json) {
            return failure(ClusterError::Command(error));
        }
        if let Ok(refusal) = serde_json::from_slice::<Refusal>(&detail.error_json) {
            return failure(ClusterError::NotPlaceable(Box::new(refusal)));
        }
        if let Ok(AwayDetail { away }) = serde_json::from_slice(&detail.error_json) {
            return failure(ClusterError::Away { reason: away });
        }
        return failure(ClusterError::Protocol { reason: format!("an error of a kind this version does not know: {reason}") });
    }
    match code {
        Code::Unavailable => failure(ClusterError::Unavailable { waited_ms: 0, reason }),
        Code::DeadlineExceeded => failure(ClusterError::Unfinished { waited_ms: 0, reason }),
        Code::PermissionDenied | Code::Unauthenticated => failure(ClusterError::Forbidden { reason }),
        Code::Unknown => Failure { may_have_happened: true, ..failure(ClusterError::Unknown { reason }) },
        _ => failure(ClusterError::Protocol { reason }),
    }
}

/// Why a call broke off that is no command: there is no outcome that could be asked for.
pub(crate) fn why_broken(error: &ClusterError) -> String {
    match error {
        ClusterError::Unavailable { reason, .. } | ClusterError::Unknown { reason } => reason.clone(),
        other => other.to_string(),
    }
}

/// Whether the connection did not come about, so that the server saw nothing.
fn was_never_sent(status: &Status) -> bool {
    let mut next = std::error::Error::source(status);
    while let Some(error) = next {
        if error.downcast_ref::<tonic::ConnectError>().is_some() {
            return true;
        }
        next = error.source();
    }
    false
}

/// The message with what caused it: tonic's own words alone are "transport error".
fn causes(status: &Status, mut text: String) -> String {
    let mut next = std::error::Error::source(status);
    while let Some(error) = next {
        let words = error.to_string();
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        next = error.source();
    }
    text.chars().take(MAX_MESSAGE_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_come_back_as_they_were() {
        let errors = [
            ClusterError::Command(CommandError::NotFound { kind: "node".into(), name: "a".into(), nearest: Some("b".into()) }),
            ClusterError::Command(CommandError::Token { reason: "used up".into() }),
            ClusterError::Unavailable { waited_ms: 0, reason: "no leader".into() },
            ClusterError::Unfinished { waited_ms: 0, reason: "a worker reads".into() },
            ClusterError::Away { reason: "the worker is lost".into() },
            ClusterError::Unknown { reason: "lost".into() },
            ClusterError::Forbidden { reason: "workers may not".into() },
            ClusterError::Protocol { reason: "what?".into() },
        ];
        for error in errors {
            let failure = from_status(&to_status(&error, Some("10.0.0.1:7000")), "coordinator.forge");
            assert_eq!(failure.error, error);
            assert_eq!(failure.leader.as_deref(), Some("10.0.0.1:7000"));
            let may_be_asked_again = [Code::Unavailable, Code::DeadlineExceeded, Code::Unknown];
            assert_eq!(failure.is_retryable, may_be_asked_again.contains(&to_status(&error, None).code()));
            assert_eq!(failure.may_have_happened, matches!(error, ClusterError::Unknown { .. }));
        }
    }

    #[test]
    fn a_lost_call_may_have_happened() {
        let failure = from_status(&Status::unavailable("broken pipe"), "coordinator.forge");
        assert!(failure.may_have_happened && failure.is_retryable);
        assert!(matches!(failure.error, ClusterError::Unknown { .. }));
    }

    #[test]
    fn details_of_another_version_are_said_to_be() {
        let detail = ErrorDetail { leader: String::new(), is_retryable: false, error_json: b"{\"error\":\"New\"}".as_slice().into() };
        let status = Status::with_details(Code::Internal, "new", detail.encode_to_vec().into());
        assert!(matches!(from_status(&status, "x").error, ClusterError::Protocol { .. }));
    }
}
