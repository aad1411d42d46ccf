//! What every call begins and ends with: its time, its place among the calls in work, its caller, its error as a status.

use std::sync::Arc;
use std::time::Duration;

use forge_cluster::api::ClusterError;
use forge_cluster::status::to_status;
use forge_cluster::tls::{Identity, Peer, TlsError};
use forge_shared::cluster::node::Role;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Request, Status};

use super::Shared;
use crate::error::CoordinatorError;

/// The time of a call that names none.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest time a call may name.
const MAX_TIMEOUT: Duration = Duration::from_secs(300);
/// Of the caller's time, what the answer's way needs: a tenth, within these bounds. Over a slow line, or from a busy machine,
/// the caller would else have given up a moment before it hears what was waited for.
const RETURN_TIME: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));

/// A coordinator's error as the wire has it.
pub(super) fn refuse(error: CoordinatorError) -> Status {
    let leader = match &error {
        CoordinatorError::NotLeader { leader } => leader.clone(),
        _ => None,
    };
    to_status(&ClusterError::from(error), leader.as_deref())
}

/// A caller who may not, or cannot be told.
pub(super) fn unknown_caller(error: TlsError) -> Status {
    match error {
        TlsError::NoCertificate => {
            refuse(CoordinatorError::Unauthenticated { reason: "this call takes a certificate of the cluster's CA".into() })
        }
        error => refuse(CoordinatorError::Forbidden { reason: error.to_string() }),
    }
}

impl Shared {
    /// The caller, if it has one of these roles.
    pub(super) fn caller<T>(&self, request: &Request<T>, roles: &[Role]) -> Result<Identity, Status> {
        Peer::require(request, roles).map_err(unknown_caller)
    }

    /// A place among the calls in work.
    pub(super) fn place(&self) -> Result<OwnedSemaphorePermit, Status> {
        place_among(&self.calls, "calls").map_err(refuse)
    }
}

/// A place among the `what` in work.
pub(super) fn place_among(places: &Arc<Semaphore>, what: &str) -> Result<OwnedSemaphorePermit, CoordinatorError> {
    let busy = |_| CoordinatorError::Busy { reason: format!("this coordinator works on as many {what} as it takes: try again") };
    places.clone().try_acquire_owned().map_err(busy)
}

/// The time a caller gives a call, by its `grpc-timeout`.
pub(super) fn timeout<T>(request: &Request<T>) -> Duration {
    let named = request.metadata().get("grpc-timeout").and_then(|value| value.to_str().ok()).and_then(parse_timeout);
    let timeout = named.unwrap_or(DEFAULT_TIMEOUT).min(MAX_TIMEOUT);
    let (least, most) = RETURN_TIME;
    timeout.saturating_sub((timeout / 10).clamp(least, most)).max(timeout / 2)
}

/// Up to eight digits and a unit.
fn parse_timeout(text: &str) -> Option<Duration> {
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
}

/// A field that must be JSON of a type. What cannot be read is another program's or version's, not a wrong setting.
pub(super) fn json<T: serde::de::DeserializeOwned>(field: &'static str, bytes: &[u8]) -> Result<T, Status> {
    let unreadable = |error| ClusterError::Protocol { reason: format!("{field}: it cannot be read: {error}") };
    serde_json::from_slice(bytes).map_err(|error| to_status(&unreadable(error), None))
}

/// An answer as JSON.
pub(super) fn to_json<T: serde::Serialize>(value: &T) -> Result<bytes::Bytes, Status> {
    // Plain data with string keys always has JSON; a defect here must not look like the caller's.
    serde_json::to_vec(value).map(Into::into).map_err(|error| Status::internal(format!("the answer has no JSON: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_and_bounded() {
        let with = |text: &'static str| {
            let mut request = Request::new(());
            request.metadata_mut().insert("grpc-timeout", text.parse().expect("ASCII"));
            timeout(&request)
        };
        assert_eq!(with("2S"), Duration::from_millis(1800));
        assert_eq!(with("300m"), Duration::from_millis(250));
        assert_eq!(with("80m"), Duration::from_millis(40), "a short time is not all return");
        assert_eq!(with("99999999H"), MAX_TIMEOUT - RETURN_TIME.1);
        for wrong in ["", "S", "123456789S", "1x", "-1S", "é"] {
            assert_eq!(parse_timeout(wrong), None, "{wrong:?}");
        }
        assert_eq!(timeout(&Request::new(())), DEFAULT_TIMEOUT - RETURN_TIME.1);
    }
}
