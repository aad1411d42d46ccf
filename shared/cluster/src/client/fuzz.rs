//! Entry points for fuzzing what coordinators answer and tell: taken or refused in words, and what is taken comes back the
//! same.

use forge_proto::cluster::{ErrorDetail, ExecuteReply, LoadsReply, PlanReply, ReadReply, StatusReply, WatchBatch};
use forge_proto::node::SessionDown;
use forge_shared::cluster::command::Applied;
use forge_shared::cluster::event::Object;
use forge_shared::cluster::session::NodeDown;
use prost::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::streams::{Position, watch_items};
use super::{from_json, to_json};
use crate::api::{ClusterError, ClusterLoads, GroupStatus, PlannedService, WatchItem};
use crate::status::{from_status, to_status};

/// An answer or a message: a letter that says which (`e`xecute, `r`ead, `p`lan, `s`tatus, `l`oads, `d`own a session,
/// `x`: an error's details), and its bytes.
///
/// # Panics
/// On a defect.
pub fn coordinator_reply(bytes: &[u8]) {
    let Some((which, message)) = bytes.split_first() else { return };
    match which {
        b'e' => take::<Applied>(ExecuteReply::decode(message).map(|reply| reply.applied_json)),
        b'r' => {
            let Ok(reply) = ReadReply::decode(message) else { return };
            reply.objects_json.into_iter().take(64).for_each(|object| take::<Object>(Ok(object)));
        }
        b'p' => take::<PlannedService>(PlanReply::decode(message).map(|reply| reply.planned_json)),
        b's' => take::<GroupStatus>(StatusReply::decode(message).map(|reply| reply.status_json)),
        b'l' => take::<ClusterLoads>(LoadsReply::decode(message).map(|reply| reply.loads_json)),
        b'd' => take::<NodeDown>(SessionDown::decode(message).map(|message| message.message_json)),
        b'x' => error_detail(message),
        _ => {}
    }
}

fn take<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(json: Result<bytes::Bytes, prost::DecodeError>) {
    let Ok(json) = json else { return };
    match from_json::<T>("message", &json) {
        Ok(taken) => {
            let written = to_json(&taken).expect("what was read can be written");
            let again = from_json::<T>("message", &written).expect("what was written can be read");
            assert_eq!(again, taken, "a message changed on its way");
        }
        Err(ClusterError::Protocol { reason }) => assert!(reason.contains("cannot be read"), "{reason}"),
        Err(other) => panic!("unreadable bytes are {other:?}"),
    }
}

/// The details of an error: whatever they say, the caller gets an error, and a coordinator's error is itself again.
fn error_detail(bytes: &[u8]) {
    for code in 0..=16 {
        let status = tonic::Status::with_details(tonic::Code::from(code), "words", bytes.to_vec().into());
        let failure = from_status(&status, "coordinator.forge");
        if ErrorDetail::decode(bytes).is_ok_and(|detail| !detail.error_json.is_empty()) && !bytes.is_empty() {
            let again = from_status(&to_status(&failure.error, None), "coordinator.forge");
            assert_eq!(again.error, failure.error, "an error changed on its way");
        }
    }
}

/// A watch: batches, each after its length (u16, little-endian). What they say, up to the first that cannot be read.
pub fn watch(mut bytes: &[u8]) -> Vec<WatchItem> {
    let mut items = Vec::new();
    let mut position = Position { after: 0, in_listing: false };
    while let Some((len, rest)) = bytes.split_first_chunk::<2>() {
        let (batch, rest) = rest.split_at(usize::from(u16::from_le_bytes(*len)).min(rest.len()));
        let taken = WatchBatch::decode(batch).map(|batch| watch_items(batch, &mut position));
        let Ok(Ok(told)) = taken else { break };
        items.extend(told);
        bytes = rest;
    }
    items
}
