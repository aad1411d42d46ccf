//! Entry points for fuzzing what comes from peers and disks: taken or refused, never a panic.

use bytes::Bytes;
use forge_proto::raft as wire;
use prost::Message as _;
use raft::eraftpb::Entry;

use super::log::{Identity, LogStore, MemoryDisk, segment_name, snapshot_name};
use super::member::{Answer, Member, RequestId, Sink};
use super::transport::Arriving;
use super::{RaftLimits, RaftOptions, StateMachine, convert};

struct Nothing;

impl StateMachine for Nothing {
    fn apply(&mut self, _: u64, _: &[u8]) -> Vec<u8> {
        Vec::new()
    }

    fn snapshot(&self) -> Vec<u8> {
        Vec::new()
    }

    fn restore(&mut self, _: u64, _: &[u8]) -> Result<(), String> {
        Ok(())
    }
}

impl Sink for Nothing {
    fn send(&mut self, _: Vec<wire::Message>) {}
    fn send_snapshot(&mut self, _: u64, _: wire::Message, _: Bytes) {}
    fn answer(&mut self, _: RequestId, _: Answer) {}
}

/// A batch of messages from peers, stepped by a member of three that has some entries, in turn with its ticks.
///
/// # Panics
/// On a defect.
pub fn messages(bytes: &[u8]) {
    let Ok(batch) = wire::MessageBatch::decode(bytes) else { return };
    for is_leader in [false, true] {
        let mut options = RaftOptions::new(1, "fuzz", "unused");
        options.bootstrap = Some(if is_leader { vec![1] } else { vec![1, 2, 3] });
        let Ok(mut member) = Member::open(options, 7, MemoryDisk::new(), Box::new(Nothing)) else { return };
        for _ in 0..if is_leader { 25 } else { 1 } {
            member.tick(&mut Nothing).expect("the disk in memory does not fail");
        }
        member.propose(vec![(1, Bytes::from_static(b"one")), (2, Bytes::from_static(b"two"))], &mut Nothing);
        for message in batch.messages.iter().take(32).cloned() {
            let taken = if message.kind == 7 { convert::snapshot_in(message, Bytes::new(), 1) } else { convert::message_in(message, 1) };
            let Ok(message) = taken else { continue };
            // A peer may always send what makes the group disagree; it may not make a member panic.
            if member.receive(message, &mut Nothing).and_then(|()| member.tick(&mut Nothing)).is_err() {
                return;
            }
        }
        drop(member.turn(&mut Nothing));
    }
}

/// A snapshot's chunks, one after the other: each a length (u16, little-endian) and so many bytes.
pub fn chunks(mut bytes: &[u8]) {
    let mut arriving = Arriving::new(1 << 16);
    while let Some((len, rest)) = bytes.split_first_chunk::<2>() {
        let (chunk, rest) = rest.split_at(usize::from(u16::from_le_bytes(*len)).min(rest.len()));
        let Ok(chunk) = wire::SnapshotChunk::decode(chunk) else { return };
        match arriving.take(chunk) {
            Ok(Some((message, data))) => return drop(convert::snapshot_in(message, data, 1)),
            Ok(None) => {}
            Err(_) => return,
        }
        bytes = rest;
    }
}

/// A data directory with these two files: read or refused. What is read can be written on and read again.
///
/// # Panics
/// On a defect.
pub fn folder(log: &[u8], snapshot: &[u8]) {
    let disk = MemoryDisk::new();
    disk.put(&segment_name(1), log.to_vec());
    if !snapshot.is_empty() {
        disk.put(&snapshot_name(1), snapshot.to_vec());
    }
    let identity = Identity { cluster_id: "fuzz".into(), member_id: 1 };
    let limits = RaftLimits::default();
    let Ok(mut opened) = LogStore::open(disk.clone(), identity.clone(), &limits, None) else { return };
    let next = opened.persisted.base_index + opened.persisted.entries.len() as u64 + 1;
    let entry = Entry { index: next, term: convert::MAX_NUMBER, ..Entry::default() };
    if next <= convert::MAX_NUMBER && opened.store.write(&[entry], None, true).is_ok() {
        let again = LogStore::open(disk, identity, &limits, None).map(|opened| opened.persisted);
        assert!(again.is_ok_and(|again| again.entries.len() == opened.persisted.entries.len() + 1), "what was written is not read");
    }
}

/// A data directory as one input: the length of the log's file (u16, little-endian), that file, and the snapshot's.
pub fn folder_bytes(bytes: &[u8]) {
    let Some((len, rest)) = bytes.split_first_chunk::<2>() else { return };
    let (log, snapshot) = rest.split_at(usize::from(u16::from_le_bytes(*len)).min(rest.len()));
    folder(log, snapshot);
}
