//! Messages and records between our own schema (`forge.raft.v1`) and raft-rs, checked on the way in.
//!
//! raft-rs panics on an unknown enum number, a gap between entries, a commit beyond the log and more: what comes from a
//! peer or a disk passes here first, and what depends on the member's state passes the core's `admit`.
//!
//! Invariant: what these functions return `Ok` for is a message that a raft-rs of this group could have sent; numbers
//! are below 2^62, so that no sum of two overflows.

use bytes::Bytes;
use forge_proto::raft as wire;
use prost::Message as _;
use raft::eraftpb::{self, ConfChangeSingle, ConfChangeType, ConfChangeV2, EntryType, MessageType};

use super::MemberChange;

/// The largest index, term or id.
pub const MAX_NUMBER: u64 = 1 << 62;
/// The largest entry.
pub const MAX_ENTRY_BYTES: usize = 2 << 20;
/// Entries of one message, together.
pub const MAX_MESSAGE_BYTES: usize = 4 << 20;
/// Entries in one message.
pub const MAX_MESSAGE_ENTRIES: usize = 65_536;
/// Voters and learners of a group.
pub const MAX_MEMBERS: usize = 64;
/// Of a message's or a read request's context.
pub const MAX_CONTEXT_BYTES: usize = 64;
/// Of a cluster's id.
pub const MAX_CLUSTER_ID_BYTES: usize = 256;

/// What is wrong with a message or a record.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConvertError {
    /// A number that names no kind.
    #[error("{field} is {number}, which this version does not know; do all members run versions that work together?")]
    Unknown {
        /// The field.
        field: &'static str,
        /// Its value.
        number: u32,
    },
    /// A kind that a member sends to itself only.
    #[error("a message of kind {kind} is never sent between members")]
    Local {
        /// Raft's number.
        kind: u32,
    },
    /// A field with a value that this kind cannot have.
    #[error("{field}: {why}")]
    Field {
        /// The field.
        field: &'static str,
        /// What is wrong and what is expected.
        why: String,
    },
}

fn refuse<T>(field: &'static str, why: impl Into<String>) -> Result<T, ConvertError> {
    Err(ConvertError::Field { field, why: why.into() })
}

fn number(field: &'static str, value: u64) -> Result<u64, ConvertError> {
    if value > MAX_NUMBER { refuse(field, format!("{value} is beyond 2^62")) } else { Ok(value) }
}

fn positive(field: &'static str, value: u64) -> Result<u64, ConvertError> {
    if value == 0 { refuse(field, "is 0") } else { number(field, value) }
}

/// The kinds that travel between members, as raft-rs names them.
fn kind_in(kind: u32) -> Result<MessageType, ConvertError> {
    Ok(match kind {
        3 => MessageType::MsgAppend,
        4 => MessageType::MsgAppendResponse,
        5 => MessageType::MsgRequestVote,
        6 => MessageType::MsgRequestVoteResponse,
        7 => MessageType::MsgSnapshot,
        8 => MessageType::MsgHeartbeat,
        9 => MessageType::MsgHeartbeatResponse,
        14 => MessageType::MsgTimeoutNow,
        15 => MessageType::MsgReadIndex,
        16 => MessageType::MsgReadIndexResp,
        17 => MessageType::MsgRequestPreVote,
        18 => MessageType::MsgRequestPreVoteResponse,
        0..=2 | 10..=13 => return Err(ConvertError::Local { kind }),
        number => return Err(ConvertError::Unknown { field: "message.kind", number }),
    })
}

/// Checks a message from a peer that is not a snapshot, and converts it.
///
/// # Errors
/// Names the field.
pub fn message_in(message: wire::Message, member_id: u64) -> Result<eraftpb::Message, ConvertError> {
    if message.kind == MessageType::MsgSnapshot as u32 {
        return refuse("message.kind", "a snapshot must come through InstallSnapshot");
    }
    convert(message, member_id)
}

/// Checks a message of kind MsgSnapshot, and converts it with its data.
///
/// # Errors
/// Names the field.
pub fn snapshot_in(message: wire::Message, data: Bytes, member_id: u64) -> Result<eraftpb::Message, ConvertError> {
    if message.kind != MessageType::MsgSnapshot as u32 {
        return refuse("message.kind", "InstallSnapshot takes snapshots only");
    }
    let mut converted = convert(message, member_id)?;
    converted.mut_snapshot().data = data;
    Ok(converted)
}

fn convert(message: wire::Message, member_id: u64) -> Result<eraftpb::Message, ConvertError> {
    let kind = kind_in(message.kind)?;
    check_header(&message, kind, member_id)?;
    check_entries(&message, kind)?;
    let mut converted = eraftpb::Message::default();
    match (kind, message.snapshot) {
        (MessageType::MsgSnapshot, Some(meta)) => {
            if meta.term > message.term {
                return refuse("message.snapshot.term", format!("{} is after the message's term {}", meta.term, message.term));
            }
            converted.mut_snapshot().set_metadata(meta_in(meta)?);
        }
        (MessageType::MsgSnapshot, None) => return refuse("message.snapshot", "is missing"),
        (_, Some(_)) => return refuse("message.snapshot", "belongs into snapshots only"),
        (_, None) => {}
    }
    converted.set_msg_type(kind);
    converted.to = message.to;
    converted.from = message.from;
    converted.term = message.term;
    converted.log_term = message.log_term;
    converted.index = message.index;
    converted.commit = message.commit;
    converted.commit_term = message.commit_term;
    converted.reject = message.reject;
    converted.reject_hint = message.reject_hint;
    converted.context = message.context;
    let entries: Result<Vec<_>, _> = message.entries.into_iter().map(entry_in).collect();
    converted.set_entries(entries?.into());
    Ok(converted)
}

fn check_header(message: &wire::Message, kind: MessageType, member_id: u64) -> Result<(), ConvertError> {
    positive("message.from", message.from)?;
    if message.to != member_id {
        return refuse("message.to", format!("{} is not this member, {member_id}: is a peer's address wrong?", message.to));
    }
    if message.from == member_id {
        return refuse("message.from", format!("{member_id} is this member itself: do two members have one id?"));
    }
    if kind == MessageType::MsgReadIndex {
        // Raft sends it as a local request that travels; a term would be compared with the leader's.
        if message.term != 0 {
            return refuse("message.term", "must be 0 in a read request");
        }
    } else {
        positive("message.term", message.term)?;
    }
    number("message.index", message.index)?;
    number("message.log_term", message.log_term)?;
    number("message.commit", message.commit)?;
    number("message.commit_term", message.commit_term)?;
    number("message.reject_hint", message.reject_hint)?;
    if message.request_snapshot != 0 {
        return refuse("message.request_snapshot", "is not used by Forge");
    }
    if message.priority != 0 {
        return refuse("message.priority", "is not used by Forge");
    }
    if message.context.len() > MAX_CONTEXT_BYTES {
        return refuse("message.context", format!("{} bytes; at most {MAX_CONTEXT_BYTES}", message.context.len()));
    }
    Ok(())
}

fn check_entries(message: &wire::Message, kind: MessageType) -> Result<(), ConvertError> {
    let entries = &message.entries;
    match kind {
        MessageType::MsgAppend => {
            if (message.index == 0) != (message.log_term == 0) {
                return refuse("message.log_term", format!("{} does not go with index {}", message.log_term, message.index));
            }
            if entries.len() > MAX_MESSAGE_ENTRIES {
                return refuse("message.entries", format!("{} entries; at most {MAX_MESSAGE_ENTRIES}", entries.len()));
            }
            let bytes: usize = entries.iter().map(|entry| entry.data.len() + entry.context.len()).sum();
            if bytes > MAX_MESSAGE_BYTES {
                return refuse("message.entries", format!("{bytes} bytes; at most {MAX_MESSAGE_BYTES}"));
            }
            let (mut index, mut term) = (message.index, message.log_term);
            for entry in entries {
                if entry.index != index + 1 {
                    return refuse("message.entries", format!("entry {} follows {index}", entry.index));
                }
                if entry.term < term || entry.term > message.term {
                    return refuse(
                        "message.entries",
                        format!("entry {index} has term {} after {term}, in term {}", entry.term, message.term),
                    );
                }
                (index, term) = (entry.index, entry.term);
            }
        }
        MessageType::MsgReadIndex | MessageType::MsgReadIndexResp => {
            let is_good = entries.len() == 1
                && entries[0].kind == 0
                && entries[0].term == 0
                && entries[0].index == 0
                && (1..=MAX_CONTEXT_BYTES).contains(&entries[0].data.len())
                && entries[0].context.is_empty();
            if !is_good {
                return refuse("message.entries", format!("a read request carries one entry of 1 to {MAX_CONTEXT_BYTES} bytes"));
            }
        }
        _ if !entries.is_empty() => return refuse("message.entries", "belong into appends and read requests only"),
        _ => {}
    }
    Ok(())
}

/// Checks an entry, and converts it.
///
/// # Errors
/// Names the field.
pub fn entry_in(entry: wire::Entry) -> Result<eraftpb::Entry, ConvertError> {
    number("entry.index", entry.index)?;
    number("entry.term", entry.term)?;
    if entry.data.len() > MAX_ENTRY_BYTES {
        return refuse("entry.data", format!("{} bytes; at most {MAX_ENTRY_BYTES}", entry.data.len()));
    }
    if !entry.context.is_empty() {
        return refuse("entry.context", "is not used by Forge");
    }
    let kind = match entry.kind {
        0 => EntryType::EntryNormal,
        1 => return refuse("entry.kind", "changes of members are of kind 2"),
        2 => {
            change_in(&entry.data)?;
            EntryType::EntryConfChangeV2
        }
        number => return Err(ConvertError::Unknown { field: "entry.kind", number }),
    };
    let mut converted = eraftpb::Entry::default();
    converted.set_entry_type(kind);
    converted.term = entry.term;
    converted.index = entry.index;
    converted.data = entry.data;
    Ok(converted)
}

/// An entry of raft-rs as the wire and the disk have it.
#[must_use]
pub fn entry_out(entry: &eraftpb::Entry) -> wire::Entry {
    wire::Entry {
        kind: entry.get_entry_type() as u32,
        term: entry.term,
        index: entry.index,
        data: entry.data.clone(),
        context: entry.context.clone(),
    }
}

/// A message of raft-rs as the wire has it, without a snapshot's data.
#[must_use]
pub fn message_out(message: &eraftpb::Message) -> wire::Message {
    let snapshot = (message.get_msg_type() == MessageType::MsgSnapshot).then(|| meta_out(message.get_snapshot().get_metadata()));
    wire::Message {
        kind: message.get_msg_type() as u32,
        to: message.to,
        from: message.from,
        term: message.term,
        log_term: message.log_term,
        index: message.index,
        entries: message.entries.iter().map(entry_out).collect(),
        commit: message.commit,
        commit_term: message.commit_term,
        snapshot,
        request_snapshot: message.request_snapshot,
        reject: message.reject,
        reject_hint: message.reject_hint,
        context: message.context.clone(),
        priority: message.priority,
    }
}

/// Checks what a snapshot says of itself, and converts it.
///
/// # Errors
/// Names the field.
pub fn meta_in(meta: wire::SnapshotMeta) -> Result<eraftpb::SnapshotMetadata, ConvertError> {
    let mut converted = eraftpb::SnapshotMetadata {
        index: positive("snapshot.index", meta.index)?,
        term: positive("snapshot.term", meta.term)?,
        ..eraftpb::SnapshotMetadata::default()
    };
    let Some(conf) = meta.conf_state else { return refuse("snapshot.conf_state", "is missing") };
    converted.set_conf_state(conf_in(conf)?);
    Ok(converted)
}

/// What a snapshot says of itself, as the wire and the disk have it.
#[must_use]
pub fn meta_out(meta: &eraftpb::SnapshotMetadata) -> wire::SnapshotMeta {
    wire::SnapshotMeta { index: meta.index, term: meta.term, conf_state: Some(conf_out(meta.get_conf_state())) }
}

/// Checks the list of a group's members, and converts it.
///
/// # Errors
/// Names the field.
pub fn conf_in(conf: wire::ConfState) -> Result<eraftpb::ConfState, ConvertError> {
    check_voters(&conf.voters, &conf.learners)?;
    // Forge changes one member at a time, which needs no joint configuration.
    if !conf.voters_outgoing.is_empty() || !conf.learners_next.is_empty() || conf.auto_leave {
        return refuse("conf_state.voters_outgoing", "joint configurations are not used by Forge");
    }
    Ok(eraftpb::ConfState { voters: conf.voters, learners: conf.learners, ..eraftpb::ConfState::default() })
}

/// The list of a group's members, as the wire and the disk have it.
#[must_use]
pub fn conf_out(conf: &eraftpb::ConfState) -> wire::ConfState {
    wire::ConfState { voters: conf.voters.clone(), learners: conf.learners.clone(), ..wire::ConfState::default() }
}

/// Refuses lists of members that raft-rs would panic on.
///
/// # Errors
/// Names the field.
pub fn check_voters(voters: &[u64], learners: &[u64]) -> Result<(), ConvertError> {
    if voters.is_empty() {
        return refuse("conf_state.voters", "a group needs a voter");
    }
    if voters.len() + learners.len() > MAX_MEMBERS {
        return refuse("conf_state.voters", format!("{} members; at most {MAX_MEMBERS}", voters.len() + learners.len()));
    }
    let mut seen = std::collections::BTreeSet::new();
    for &id in voters.iter().chain(learners) {
        positive("conf_state.voters", id)?;
        if !seen.insert(id) {
            return refuse("conf_state.voters", format!("member {id} is named twice"));
        }
    }
    Ok(())
}

/// Checks what must be persisted of term and vote, and converts it.
///
/// # Errors
/// Names the field.
pub fn hard_state_in(state: wire::HardState) -> Result<eraftpb::HardState, ConvertError> {
    Ok(eraftpb::HardState {
        term: number("hard_state.term", state.term)?,
        vote: number("hard_state.vote", state.vote)?,
        commit: number("hard_state.commit", state.commit)?,
        ..eraftpb::HardState::default()
    })
}

/// Term, vote and commit, as the disk has them.
#[must_use]
pub fn hard_state_out(state: &eraftpb::HardState) -> wire::HardState {
    wire::HardState { term: state.term, vote: state.vote, commit: state.commit }
}

/// The data of an entry that changes members, with raft's field numbers: raft-rs reads it when it is proposed.
#[derive(Clone, PartialEq, prost::Message)]
struct ChangeData {
    #[prost(uint32, tag = "1")]
    transition: u32,
    #[prost(message, repeated, tag = "2")]
    changes: Vec<SingleChange>,
    #[prost(bytes = "bytes", tag = "3")]
    context: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SingleChange {
    #[prost(uint32, tag = "1")]
    kind: u32,
    #[prost(uint64, tag = "2")]
    member_id: u64,
}

/// Reads the data of an entry that changes members.
///
/// # Errors
/// When it is anything else than one change of one member.
pub fn change_in(data: &[u8]) -> Result<MemberChange, ConvertError> {
    let read = ChangeData::decode(data).or_else(|error| refuse("entry.data", format!("no change of members: {error}")))?;
    let [change] = read.changes.as_slice() else {
        return refuse("entry.data", format!("{} changes of members in one entry; Forge makes one", read.changes.len()));
    };
    if read.transition != 0 || !read.context.is_empty() {
        return refuse("entry.data", "joint configurations are not used by Forge");
    }
    let id = positive("entry.data.member_id", change.member_id)?;
    match change.kind {
        0 => Ok(MemberChange::Promote(id)),
        1 => Ok(MemberChange::Remove(id)),
        2 => Ok(MemberChange::AddLearner(id)),
        number => Err(ConvertError::Unknown { field: "entry.data.kind", number }),
    }
}

/// The data of an entry that makes `change`.
#[must_use]
pub fn change_out(change: MemberChange) -> Bytes {
    let single = SingleChange { kind: change_kind(change) as u32, member_id: change.id() };
    Bytes::from(ChangeData { transition: 0, changes: vec![single], context: Bytes::new() }.encode_to_vec())
}

/// The change as raft-rs applies it.
#[must_use]
pub fn change_for_raft(change: MemberChange) -> ConfChangeV2 {
    let mut single = ConfChangeSingle::default();
    single.set_change_type(change_kind(change));
    single.node_id = change.id();
    let mut converted = ConfChangeV2::default();
    converted.set_changes(vec![single].into());
    converted
}

fn change_kind(change: MemberChange) -> ConfChangeType {
    match change {
        MemberChange::Promote(_) => ConfChangeType::AddNode,
        MemberChange::Remove(_) => ConfChangeType::RemoveNode,
        MemberChange::AddLearner(_) => ConfChangeType::AddLearnerNode,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entries(index: u64, term: u64, most_term: u64) -> impl Strategy<Value = Vec<wire::Entry>> {
        let one = (any::<bool>(), prop::collection::vec(any::<u8>(), 0..40), 0_u64..3);
        prop::collection::vec(one, 0..5).prop_map(move |items| {
            let mut at = term;
            let numbered = items.into_iter().zip(index + 1..);
            numbered
                .map(|((is_change, data, later), index)| {
                    at = (at + later).min(most_term);
                    let data = if is_change { change_out(MemberChange::AddLearner(index)) } else { Bytes::from(data) };
                    wire::Entry { kind: if is_change { 2 } else { 0 }, term: at, index, data, context: Bytes::new() }
                })
                .collect()
        })
    }

    /// Messages as members send them.
    fn messages() -> impl Strategy<Value = wire::Message> {
        let kinds = prop::sample::select(vec![3_u32, 4, 5, 6, 7, 8, 9, 14, 15, 16, 17, 18]);
        (kinds, 1_u64..1000, 1_u64..1000, 0_u64..1000, any::<bool>()).prop_flat_map(|(kind, term, index, commit, reject)| {
            let log_term = 1 + term / 2;
            let entries = match kind {
                3 => entries(index, log_term, term.max(log_term)).boxed(),
                15 | 16 => Just(vec![wire::Entry { data: Bytes::from_static(b"context"), ..wire::Entry::default() }]).boxed(),
                _ => Just(Vec::new()).boxed(),
            };
            entries.prop_map(move |entries| wire::Message {
                kind,
                to: 1,
                from: 2,
                term: if kind == 15 { 0 } else { term.max(log_term) },
                log_term,
                index,
                entries,
                commit,
                commit_term: 3,
                snapshot: (kind == 7).then(|| wire::SnapshotMeta {
                    index,
                    term,
                    conf_state: Some(wire::ConfState { voters: vec![1, 2], learners: vec![9], ..wire::ConfState::default() }),
                }),
                reject,
                reject_hint: index,
                context: Bytes::from_static(b"12345678"),
                ..wire::Message::default()
            })
        })
    }

    proptest! {
        #[test]
        fn what_members_send_survives_both_ways(message in messages()) {
            let converted = if message.kind == 7 {
                snapshot_in(message.clone(), Bytes::from_static(b"data"), 1)
            } else {
                message_in(message.clone(), 1)
            };
            prop_assert_eq!(message_out(&converted.unwrap()), message);
        }

        #[test]
        fn any_number_in_any_place_is_taken_or_refused(mut message in messages(), place in 0..14, value in prop_oneof![any::<u64>(), Just(0), Just(u64::MAX), Just(MAX_NUMBER + 1)]) {
            match place {
                0 => message.kind = value as u32,
                1 => message.to = value,
                2 => message.from = value,
                3 => message.term = value,
                4 => message.log_term = value,
                5 => message.index = value,
                6 => message.commit = value,
                7 => message.request_snapshot = value,
                8 => message.reject_hint = value,
                9 => message.priority = value as i64,
                10 => message.context = Bytes::from(vec![0; (value % 100) as usize]),
                11 => message.entries.push(wire::Entry { kind: value as u32, index: value, term: value, ..wire::Entry::default() }),
                12 => message.snapshot = Some(wire::SnapshotMeta { index: value, term: value, conf_state: None }),
                _ => message.commit_term = value,
            }
            if let Ok(taken) = message_in(message, 1) {
                prop_assert!(taken.term <= MAX_NUMBER && taken.index <= MAX_NUMBER && taken.to == 1 && taken.from != 1);
            }
        }

        #[test]
        fn lists_of_members_are_checked(voters in prop::collection::vec(0_u64..6, 0..5), learners in prop::collection::vec(0_u64..6, 0..3)) {
            let mut all: Vec<_> = voters.iter().chain(&learners).copied().collect();
            all.sort_unstable();
            let is_good = !voters.is_empty() && all.iter().all(|&id| id > 0) && all.windows(2).all(|pair| pair[0] != pair[1]);
            prop_assert_eq!(check_voters(&voters, &learners).is_ok(), is_good);
        }
    }

    #[test]
    fn changes_of_members_are_what_raft_reads() {
        for change in [MemberChange::AddLearner(5), MemberChange::Promote(6), MemberChange::Remove(u64::MAX >> 2)] {
            assert_eq!(change_in(&change_out(change)), Ok(change));
        }
        assert!(change_in(b"").is_err(), "leaving a joint configuration is not used");
        let two = ChangeData {
            changes: vec![SingleChange { kind: 0, member_id: 1 }, SingleChange { kind: 0, member_id: 2 }],
            ..ChangeData::default()
        };
        assert!(change_in(&two.encode_to_vec()).is_err());
        let unknown = ChangeData { changes: vec![SingleChange { kind: 3, member_id: 1 }], ..ChangeData::default() };
        assert!(matches!(change_in(&unknown.encode_to_vec()), Err(ConvertError::Unknown { number: 3, .. })));
    }
}
