//! Entry points for fuzzing: bytes of a message, taken or refused, and what is taken comes back the same.

use forge_proto::engine as wire;
use prost::Message;

use super::{WireError, reply, request};

/// A `SubmitRequest`.
///
/// # Errors
/// [`WireError`] for bytes that are none.
///
/// # Panics
/// If what was taken does not come back unchanged.
pub fn submit_request(bytes: &[u8]) -> Result<(), WireError> {
    let taken = request::from_wire(decode(bytes)?)?;
    assert_eq!(request::from_wire(request::to_wire(&taken)).as_ref(), Ok(&taken), "a request changed on its way");
    Ok(())
}

/// An `EngineReply`.
///
/// # Errors
/// [`WireError`] for bytes that are none.
///
/// # Panics
/// If what was taken does not come back unchanged.
pub fn engine_reply(bytes: &[u8]) -> Result<(), WireError> {
    let message: wire::EngineReply = decode(bytes)?;
    for event in message.events {
        let taken = reply::reply_from_wire(event)?;
        assert_eq!(reply::reply_from_wire(reply::reply_to_wire(&taken)).as_ref(), Ok(&taken), "an event changed on its way");
    }
    Ok(())
}

/// A `ReplicaUpdate`.
///
/// # Errors
/// [`WireError`] for bytes that are none.
///
/// # Panics
/// If what was taken does not come back unchanged.
pub fn replica_update(bytes: &[u8]) -> Result<(), WireError> {
    let message: wire::ReplicaUpdate = decode(bytes)?;
    if let Some(card) = message.card {
        let taken = reply::card_from_wire(card)?;
        assert_eq!(reply::card_from_wire(reply::card_to_wire(&taken)).as_ref(), Ok(&taken), "a card changed on its way");
    }
    if let Some(status) = message.status {
        let taken = reply::status_from_wire(status)?;
        assert_eq!(reply::status_from_wire(reply::status_to_wire(&taken)).as_ref(), Ok(&taken), "a status changed on its way");
    }
    Ok(())
}

fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, WireError> {
    M::decode(bytes).map_err(|error| WireError::Decode { reason: error.to_string() })
}
