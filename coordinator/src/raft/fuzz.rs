//! Entry points for fuzzing what comes from peers and disks: taken or refused, never a panic.

use bytes::Bytes;
use forge_proto::raft as wire;
use prost::Message as _;
use raft::eraftpb::Entry;

use super::log::{Identity, LogStore, MemoryDisk, segment_name, snapshot_name};
use super::member::{Answer, Member, RequestId, Sink};
use super::transport::Arriving;
use super::{Frozen, RaftLimits, RaftOptions, StateMachine, convert};

struct Nothing;

impl StateMachine for Nothing {
    fn apply(&mut self, _: u64, _: &[u8]) -> Vec<u8> {
        Vec::new()
    }

    fn snapshot(&self) -> Frozen {
        Box::new(Vec::new)
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use raft::eraftpb::{ConfState, HardState, SnapshotMetadata};

    use super::*;
    use crate::raft::MemberChange;
    use crate::raft::log::Disk;

    fn batch(messages: Vec<wire::Message>) -> Vec<u8> {
        wire::MessageBatch { cluster_id: "fuzz".into(), messages }.encode_to_vec()
    }

    fn message(kind: u32) -> wire::Message {
        wire::Message { kind, to: 1, from: 2, term: 3, ..wire::Message::default() }
    }

    fn meta(index: u64, term: u64) -> wire::SnapshotMeta {
        let conf_state = wire::ConfState { voters: vec![1, 2, 3], learners: vec![4], ..wire::ConfState::default() };
        wire::SnapshotMeta { index, term, conf_state: Some(conf_state) }
    }

    fn message_seeds() -> Vec<(&'static str, Vec<u8>)> {
        let entry = |index, data| wire::Entry { kind: 0, term: 3, index, data, context: Bytes::new() };
        let change = wire::Entry { kind: 2, ..entry(3, convert::change_out(MemberChange::AddLearner(4))) };
        let entries = vec![entry(2, Bytes::from_static(b"data")), change];
        let append = wire::Message { log_term: 1, index: 1, commit: 3, entries, ..message(3) };
        let heartbeat = wire::Message { commit: 2, context: Bytes::from_static(b"context"), ..message(8) };
        let snapshot = wire::Message { snapshot: Some(meta(9, 2)), ..message(7) };
        let later = wire::Message { log_term: 2, index: 9, entries: vec![entry(10, Bytes::from_static(b"x"))], commit: 10, ..message(3) };
        let vote = |kind| wire::Message { log_term: 2, index: 5, commit: 1, commit_term: 1, term: 4, ..message(kind) };
        let context = wire::Entry { data: Bytes::from_static(b"question"), ..wire::Entry::default() };
        let read = wire::Message { term: 0, entries: vec![context.clone()], ..message(15) };
        let answer = |kind| wire::Message { term: 2, index: 3, commit: 1, ..message(kind) };
        let rejected = wire::Message { reject: true, reject_hint: 1, log_term: 1, ..answer(4) };
        vec![
            ("append", batch(vec![append, heartbeat])),
            ("snapshot", batch(vec![snapshot, later])),
            ("votes", batch(vec![vote(17), vote(5), vote(6), vote(18), message(14)])),
            ("reads", batch(vec![message(8), read, wire::Message { index: 1, entries: vec![context], ..message(16) }])),
            ("answers", batch(vec![answer(4), rejected, answer(9), answer(6)])),
        ]
    }

    fn chunk_seeds() -> Vec<(&'static str, Vec<u8>)> {
        let data = Bytes::from_static(b"a state of some bytes");
        let chunk = |from: usize, to: usize| wire::SnapshotChunk {
            cluster_id: "fuzz".into(),
            message: (from == 0).then(|| wire::Message { snapshot: Some(meta(9, 2)), ..message(7) }),
            total_bytes: data.len() as u64,
            offset: from as u64,
            data: data.slice(from..to),
            crc32c: crc32c::crc32c(&data),
            is_last: to == data.len(),
        };
        let joined = |chunks: &[wire::SnapshotChunk]| {
            let framed = chunks.iter().map(|chunk| chunk.encode_to_vec());
            framed.flat_map(|bytes| [(bytes.len() as u16).to_le_bytes().to_vec(), bytes].concat()).collect()
        };
        vec![
            ("one", joined(&[chunk(0, data.len())])),
            ("two", joined(&[chunk(0, 7), chunk(7, data.len())])),
            ("gap", joined(&[chunk(0, 7), chunk(8, data.len())])),
        ]
    }

    fn folder_seeds() -> Vec<(&'static str, Vec<u8>)> {
        let seed = |act: fn(&mut LogStore<MemoryDisk>)| {
            let mut disk = MemoryDisk::new();
            let identity = Identity { cluster_id: "fuzz".into(), member_id: 1 };
            let members = ConfState { voters: vec![1, 2, 3], ..ConfState::default() };
            let first = Some((members, b"state".to_vec()));
            let mut store = LogStore::open(disk.clone(), identity, &RaftLimits::default(), first).unwrap().store;
            act(&mut store);
            let log = disk.read(&segment_name(1), 1 << 20).unwrap();
            let snapshot = disk.read(&snapshot_name(1), 1 << 20).unwrap_or_default();
            [(log.len() as u16).to_le_bytes().to_vec(), log, snapshot].concat()
        };
        vec![
            ("begun", seed(|_| {})),
            (
                "entries",
                seed(|store| {
                    let entry = |index, term| Entry { index, term, data: Bytes::from_static(b"data"), ..Entry::default() };
                    let state = HardState { term: 2, vote: 3, commit: 2, ..HardState::default() };
                    store.write(&[entry(2, 1), entry(3, 1)], Some(&state), true).unwrap();
                    store.write(&[entry(3, 2)], None, true).unwrap();
                }),
            ),
            (
                "restarted",
                seed(|store| {
                    let mut meta = SnapshotMetadata { index: 1, term: 1, ..SnapshotMetadata::default() };
                    meta.set_conf_state(ConfState { voters: vec![1], ..ConfState::default() });
                    store.write_snapshot(&meta, b"another").unwrap();
                    store.restart_at(&meta, None).unwrap();
                }),
            ),
        ]
    }

    type Target = (&'static str, fn(&[u8]), Vec<(&'static str, Vec<u8>)>);

    fn targets() -> Vec<Target> {
        vec![
            ("raft_messages", messages, message_seeds()),
            ("raft_chunks", chunks, chunk_seeds()),
            ("raft_folder", folder_bytes, folder_seeds()),
        ]
    }

    /// `FORGE_WRITE_DOCS=1` writes them.
    #[test]
    fn the_seeds_are_those_of_this_format() {
        for (target, _, seeds) in targets() {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/seeds").join(target);
            for (name, bytes) in seeds {
                let path = folder.join(name);
                if std::env::var_os("FORGE_WRITE_DOCS").is_some() {
                    std::fs::create_dir_all(&folder).unwrap();
                    std::fs::write(&path, &bytes).unwrap();
                }
                assert_eq!(std::fs::read(&path).unwrap_or_default(), bytes, "{target}/{name}: run with FORGE_WRITE_DOCS=1");
            }
        }
    }

    /// A short form of `tests/fuzz_smoke.rs`, where the crate is.
    #[test]
    fn bytes_changed_here_and_there_are_taken_or_refused() {
        let mut random = 1_u64;
        let mut next = |bound: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as usize % bound
        };
        for (_, run, seeds) in targets() {
            for (_, seed) in seeds {
                run(&seed);
                for _ in 0..300 {
                    let mut bytes = seed.clone();
                    for _ in 0..1 + next(3) {
                        let at = next(bytes.len());
                        match next(3) {
                            0 => bytes[at] ^= 1 << next(8),
                            1 => bytes[at] = [0, 1, 127, 128, 255][next(5)],
                            _ => bytes.truncate(at.max(1)),
                        }
                    }
                    run(&bytes);
                }
            }
        }
    }
}
