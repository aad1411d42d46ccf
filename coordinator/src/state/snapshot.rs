//! The state as bytes: one line that says what follows, then JSON.
//!
//! `forge-cluster-state LEVEL CRC32C LENGTH` and a line feed; the CRC (hex) and the length are of the JSON. The format is
//! that of the state's level; one that this build does not know is refused by number before anything else is read.
//!
//! Invariant: equal states have equal bytes, and what is decoded encodes to the bytes it came from.

use super::{
    ClusterState, MAX_ASKED_REPLIES, MAX_HISTORY, MAX_KEYS, MAX_MEMBERS, MAX_NODES, MAX_REMOVED_NODES, MAX_REPORTED_REPLIES, MAX_SERVICES,
    MAX_TOKENS, StateError, check_rules,
};

use forge_shared::version::LEVEL;

const MAGIC: &str = "forge-cluster-state";
/// The newest level this build reads.
const KNOWN: u64 = LEVEL as u64;
/// The longest first line.
const MAX_HEADER: usize = 96;

impl ClusterState {
    /// The whole state as bytes.
    pub fn encode(&self) -> Vec<u8> {
        // Maps have text or numbers as keys, and no number is a float: this cannot fail.
        let json = serde_json::to_vec(self).unwrap_or_default();
        debug_assert!(!json.is_empty());
        with_header(self.level, &json)
    }

    /// A state from its bytes.
    ///
    /// # Errors
    /// [`StateError::Newer`] for a newer format, [`StateError::Damaged`] for anything that [`ClusterState::encode`] did not
    /// write.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let damaged = |reason: &str| StateError::Damaged { reason: reason.to_owned() };
        let end = bytes.iter().take(MAX_HEADER).position(|&byte| byte == b'\n').ok_or_else(|| damaged("it has no first line"))?;
        let header = std::str::from_utf8(&bytes[..end]).map_err(|_| damaged("its first line is no text"))?;
        let json = &bytes[end + 1..];
        let words: Vec<&str> = header.split(' ').collect();
        let [MAGIC, level, rest @ ..] = words.as_slice() else { return Err(damaged("it is no snapshot of a cluster")) };
        let found: u64 = level.parse().map_err(|_| damaged("its level is no number"))?;
        if found > KNOWN {
            return Err(StateError::Newer { found, known: KNOWN });
        }
        let [crc, length] = rest else { return Err(damaged("its first line has other fields")) };
        if length.parse() != Ok(json.len()) {
            return Err(damaged(&format!("its first line says {length} bytes, and {} follow", json.len())));
        }
        if *crc != format!("{:08x}", crc32c::crc32c(json)) {
            return Err(damaged("its checksum does not match"));
        }
        let state: ClusterState = serde_json::from_slice(json).map_err(|error| damaged(&error.to_string()))?;
        if u64::from(state.level) != found {
            return Err(damaged(&format!("its first line says level {found}, and it is at level {}", state.level)));
        }
        state.check().map_err(damaged)?;
        check_rules(&state).map_err(|reason| damaged(&reason))?;
        Ok(state)
    }

    /// Whether collections are within their bounds and named by what they hold.
    fn check(&self) -> Result<(), &'static str> {
        let rules = [
            (self.revision <= self.applied && self.placement_revision <= self.revision, "its revisions are out of order"),
            (self.nodes.len() <= MAX_NODES && self.nodes.iter().all(|(id, node)| *id == node.spec.id), "its nodes"),
            (self.removed_nodes.len() <= MAX_REMOVED_NODES, "its removed nodes"),
            (
                self.services.len() <= MAX_SERVICES && self.services.iter().all(|(name, service)| name.0 == service.service.metadata.name),
                "its services",
            ),
            (self.keys.len() <= MAX_KEYS && self.keys.iter().all(|(name, key)| *name == key.name), "its keys"),
            (self.tokens.len() <= MAX_TOKENS && self.tokens.iter().all(|(id, kept)| *id == kept.token.id), "its join tokens"),
            (self.services.values().all(|service| service.history.len() <= MAX_HISTORY), "its earlier wishes"),
            (self.members.len() <= MAX_MEMBERS && self.members.iter().all(|(id, member)| *id == member.id), "its members"),
            (self.removed_members.is_sound(), "its removed members"),
            (self.certificates.is_sound(), "its certificates"),
            (self.idempotency.is_sound(), "its idempotency records"),
            (self.notices.is_sound(), "its notices"),
            (self.asked.is_sound(MAX_ASKED_REPLIES) && self.reported.is_sound(MAX_REPORTED_REPLIES), "its remembered replies"),
        ];
        rules.iter().find(|(holds, _)| !holds).map_or(Ok(()), |(_, what)| Err(*what))
    }
}

pub(super) fn with_header(level: u32, json: &[u8]) -> Vec<u8> {
    let mut bytes = format!("{MAGIC} {level} {:08x} {}\n", crc32c::crc32c(json), json.len()).into_bytes();
    bytes.extend_from_slice(json);
    bytes
}
