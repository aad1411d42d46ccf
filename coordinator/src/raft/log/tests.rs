//! The data directory under crashes at every fsync, damage, and folders that are not ours.

use std::collections::BTreeMap;

use proptest::prelude::*;
use raft::eraftpb::{ConfState, Entry, HardState, SnapshotMetadata};

use super::{Disk, Folder, Identity, LogError, LogStore, MemoryDisk, Opened};
use crate::raft::RaftLimits;

fn identity() -> Identity {
    Identity { cluster_id: "test".into(), member_id: 1 }
}

fn limits() -> RaftLimits {
    RaftLimits { segment_bytes: 300, ..RaftLimits::default() }
}

fn members() -> ConfState {
    ConfState { voters: vec![1, 2, 3], ..ConfState::default() }
}

fn open(disk: &MemoryDisk) -> Result<Opened<MemoryDisk>, LogError> {
    LogStore::open(disk.clone(), identity(), &limits(), Some((members(), b"first".to_vec())))
}

fn entry(index: u64, term: u64) -> Entry {
    Entry { index, term, data: format!("entry {index} of term {term}").into(), ..Entry::default() }
}

fn state(term: u64, commit: u64) -> HardState {
    HardState { term, vote: 2, commit, ..HardState::default() }
}

fn meta(index: u64, term: u64) -> SnapshotMetadata {
    let mut meta = SnapshotMetadata { index, term, ..SnapshotMetadata::default() };
    meta.set_conf_state(members());
    meta
}

/// A folder with entries 2 to 30 over several segments.
fn filled() -> MemoryDisk {
    let disk = MemoryDisk::new();
    let mut store = open(&disk).unwrap().store;
    for index in 2..=30 {
        store.write(&[entry(index, 2)], Some(&state(2, index - 1)), true).unwrap();
    }
    disk
}

fn names(disk: &MemoryDisk, prefix: &str) -> Vec<String> {
    disk.clone().list().unwrap().into_iter().filter(|name| name.starts_with(prefix)).collect()
}

#[test]
fn entries_come_back_over_segments_and_conflicts_are_overwritten() {
    let disk = filled();
    assert!(names(&disk, "log-").len() > 3);
    let mut opened = open(&disk).unwrap();
    assert_eq!(opened.snapshot.as_deref(), Some(b"first".as_slice()));
    assert_eq!(opened.persisted.entries.len(), 29);
    opened.store.write(&[entry(20, 3), entry(21, 3)], Some(&state(3, 19)), true).unwrap();
    drop(opened);
    let persisted = open(&disk).unwrap().persisted;
    assert_eq!(persisted.entries.iter().map(|entry| (entry.index, entry.term)).next_back(), Some((21, 3)));
    assert_eq!((persisted.entries.len(), persisted.hard_state.term), (20, 3));
}

#[test]
fn compaction_removes_segments_and_what_is_left_is_whole() {
    let disk = filled();
    let mut store = open(&disk).unwrap().store;
    let before = names(&disk, "log-").len();
    store.write_snapshot(&meta(25, 2), b"state at 25").unwrap();
    store.compact(20, 2).unwrap();
    drop(store);
    assert!(names(&disk, "log-").len() < before);
    assert_eq!(names(&disk, "snapshot-").len(), 1);
    let opened = open(&disk).unwrap();
    assert_eq!(opened.snapshot.as_deref(), Some(b"state at 25".as_slice()));
    assert_eq!((opened.persisted.base_index, opened.persisted.base_term), (20, 2));
    assert_eq!(opened.persisted.entries.iter().map(|entry| entry.index).collect::<Vec<_>>(), (21..=30).collect::<Vec<_>>());
}

#[test]
fn a_leaders_snapshot_begins_the_log_anew() {
    let disk = filled();
    let mut store = open(&disk).unwrap().store;
    store.write_snapshot(&meta(100, 4), b"state at 100").unwrap();
    store.restart_at(&meta(100, 4), Some(&state(4, 100))).unwrap();
    store.write(&[entry(101, 4)], None, true).unwrap();
    drop(store);
    let opened = open(&disk).unwrap();
    assert_eq!((opened.persisted.base_index, opened.persisted.entries.len()), (100, 1));
    assert_eq!(opened.snapshot.as_deref(), Some(b"state at 100".as_slice()));
}

#[test]
fn half_written_snapshots_and_segments_do_not_count() {
    let disk = filled();
    disk.put("snapshot-00000000000000000099.tmp", b"half".to_vec());
    let last = names(&disk, "log-").pop().unwrap();
    let number: u64 = last.strip_prefix("log-").unwrap().parse().unwrap();
    let frames = super::frame::read(&disk.clone().read(&last, 1 << 20).unwrap(), number, true).unwrap().frames.len() as u64;
    disk.put(&super::segment_name(number + frames), vec![0; 40]);
    assert_eq!(open(&disk).unwrap().persisted.entries.len(), 29);
    assert!(names(&disk, "snapshot-").iter().all(|name| !name.ends_with(".tmp")));
}

#[test]
fn holes_and_damage_are_refused_with_the_remedy() {
    let text = |disk: &MemoryDisk| open(disk).err().expect("the folder is refused").to_string();
    for (number, name) in names(&filled(), "log-").into_iter().enumerate() {
        let disk = filled();
        let is_last = number + 1 == names(&disk, "log-").len();
        disk.tamper(&name, |bytes| bytes[70] ^= 1).unwrap();
        let text = text(&disk);
        assert!(text.contains("is damaged at byte") && text.contains("under a new id"), "{is_last} {text}");
    }
    let segments = names(&filled(), "log-");
    for gone in &segments[..segments.len() - 1] {
        let mut disk = filled();
        disk.remove(gone).unwrap();
        assert!(text(&disk).contains("missing before"), "{}", text(&disk));
    }
    let mut disk = filled();
    segments.iter().for_each(|name| disk.remove(name).unwrap());
    // Nothing but the first snapshot is left: that is a folder whose making was interrupted.
    assert!(open(&disk).is_ok());

    let disk = filled();
    let mut store = open(&disk).unwrap().store;
    store.write_snapshot(&meta(25, 2), b"state at 25").unwrap();
    store.compact(24, 2).unwrap();
    drop(store);
    disk.tamper(&names(&disk, "snapshot-")[0], |bytes| *bytes.last_mut().unwrap() ^= 1).unwrap();
    assert!(text(&disk).contains("not what was written"));
    let name = names(&disk, "snapshot-")[0].clone();
    disk.clone().remove(&name).unwrap();
    assert!(text(&disk).contains("are in a snapshot"), "{}", text(&disk));
}

#[test]
fn folders_of_others_and_of_newer_versions_are_refused() {
    let disk = filled();
    let open = |identity| LogStore::open(disk.clone(), identity, &limits(), None).err().map(|error| error.to_string()).unwrap_or_default();
    let text = open(Identity { cluster_id: "other".into(), ..identity() });
    assert!(text.contains("belongs to cluster \"test\"") && text.contains("its own data directory"), "{text}");
    assert!(open(Identity { member_id: 9, ..identity() }).contains("belongs to member"));
    let header = forge_proto::raft::FileHeader { version: 7, cluster_id: "test".into(), member_id: 1, ..Default::default() };
    let newer = super::frame::write(1, &prost::Message::encode_to_vec(&header));
    let disk = MemoryDisk::new();
    disk.put(&super::segment_name(1), newer);
    let text = LogStore::open(disk, identity(), &limits(), None).err().unwrap().to_string();
    assert!(text.contains("has format 7") && text.contains("up to 1"), "{text}");
}

#[test]
fn a_full_disk_loses_nothing_and_is_left() {
    let disk = filled();
    let mut store = open(&disk).unwrap().store;
    for room in 0..120 {
        disk.set_capacity_bytes(Some(disk.used_bytes() + room));
        let index = 31 + room as u64;
        match store.write(&[entry(index, 2)], None, true) {
            Ok(()) => {}
            Err(error) => {
                assert!(error.is_full(), "{error}");
                disk.set_capacity_bytes(None);
                store.write(&[entry(index, 2)], None, true).unwrap();
            }
        }
    }
    disk.set_capacity_bytes(None);
    assert!(store.write_snapshot(&meta(40, 2), &[1; 1000]).is_ok());
    disk.set_capacity_bytes(Some(disk.used_bytes() + 200));
    assert!(store.write_snapshot(&meta(50, 2), &[1; 1000]).unwrap_err().is_full());
    assert_eq!(names(&disk, "snapshot-"), [super::snapshot_name(40)]);
    drop(store);
    assert_eq!(open(&disk).unwrap().persisted.entries.last().map(|entry| entry.index), Some(150));
}

/// One thing a member does to its folder.
#[derive(Debug, Clone)]
enum Step {
    /// So many entries, after dropping so many that are not committed.
    Append {
        drop: u64,
        add: u64,
    },
    Snapshot {
        keep: u64,
    },
    Install {
        ahead: u64,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0_u64..3, 1_u64..5).prop_map(|(drop, add)| Step::Append { drop, add }),
        2 => (0_u64..4).prop_map(|keep| Step::Snapshot { keep }),
        1 => (1_u64..20).prop_map(|ahead| Step::Install { ahead }),
    ];
    prop::collection::vec(step, 1..25)
}

/// What must be there: entries by index and their terms.
#[derive(Debug, Clone, Default, PartialEq)]
struct Model {
    entries: BTreeMap<u64, u64>,
    snapshot: u64,
    term: u64,
}

fn act(store: &mut LogStore<MemoryDisk>, model: &mut Model, step: &Step) -> Result<(), LogError> {
    model.term += 1;
    let last = model.entries.keys().next_back().copied().unwrap_or(0).max(model.snapshot);
    match *step {
        Step::Append { drop, add } => {
            let first = (last + 1).saturating_sub(drop).max(model.snapshot + 1);
            drop_from(model, first);
            let entries: Vec<_> = (first..first + add).map(|index| entry(index, model.term)).collect();
            model.entries.extend(entries.iter().map(|entry| (entry.index, entry.term)));
            store.write(&entries, Some(&state(model.term, model.snapshot)), true)
        }
        Step::Snapshot { keep } if last > model.snapshot => {
            let term = model.entries.get(&last).copied().unwrap_or(1);
            model.snapshot = last;
            store.write_snapshot(&meta(last, term), format!("state at {last}").as_bytes())?;
            let index = last.saturating_sub(keep);
            match model.entries.get(&index) {
                Some(&term) => store.compact(index, term),
                None => Ok(()),
            }
        }
        Step::Snapshot { .. } => Ok(()),
        Step::Install { ahead } => {
            let index = last + ahead;
            model.entries.clear();
            model.snapshot = index;
            store.write_snapshot(&meta(index, model.term), format!("state at {index}").as_bytes())?;
            store.restart_at(&meta(index, model.term), Some(&state(model.term, index)))
        }
    }
}

fn drop_from(model: &mut Model, first: u64) {
    model.entries.split_off(&first);
}

/// What was read holds all of the model behind the snapshot.
fn holds(opened: &Opened<MemoryDisk>, model: &Model) -> bool {
    let read: BTreeMap<_, _> = opened.persisted.entries.iter().map(|entry| (entry.index, entry.term)).collect();
    let wanted: BTreeMap<_, _> = model.entries.range(model.snapshot + 1..).map(|(&index, &term)| (index, term)).collect();
    let newer: BTreeMap<_, _> = read.range(model.snapshot + 1..).map(|(&index, &term)| (index, term)).collect();
    opened.persisted.snapshot.index == model.snapshot && newer == wanted && opened.persisted.hard_state.term >= model.term.min(1)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// The process dies in each fsync in turn; what was acknowledged before is there, and what was not is all there or not
    /// at all.
    #[test]
    fn a_crash_in_any_fsync_loses_nothing_that_was_acknowledged(steps in steps(), seed: u64) {
        let whole = MemoryDisk::new();
        let mut store = open(&whole).unwrap().store;
        let mut model = Model { snapshot: 1, term: 1, ..Model::default() };
        let before = whole.syncs();
        for step in &steps {
            act(&mut store, &mut model, step).unwrap();
        }
        prop_assert!(holds(&open(&whole).unwrap(), &model));
        for sync in before + 1..=whole.syncs() {
            let disk = MemoryDisk::new();
            let mut store = open(&disk).unwrap().store;
            disk.crash_at_sync(Some(sync));
            let mut model = Model { snapshot: 1, term: 1, ..Model::default() };
            let mut next = model.clone();
            for step in &steps {
                if act(&mut store, &mut next, step).is_err() {
                    break;
                }
                model = next.clone();
            }
            prop_assert!(disk.is_crashed());
            disk.restart(seed ^ sync);
            let opened = open(&disk);
            prop_assert!(opened.is_ok(), "sync {}: {}", sync, opened.err().unwrap());
            let opened = opened.unwrap();
            prop_assert!(holds(&opened, &model) || holds(&opened, &next), "sync {}: {:?} is neither {:?} nor {:?}", sync, opened.persisted, model, next);
            // And it goes on from there.
            let mut store = opened.store;
            let last = opened.persisted.base_index + opened.persisted.entries.len() as u64;
            store.write(&[entry(last + 1, 1000)], Some(&state(1000, 0)), true).unwrap();
            prop_assert_eq!(open(&disk).unwrap().persisted.entries.last().map(|entry| entry.index), Some(last + 1));
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused(log in prop::collection::vec(any::<u8>(), 0..300), snapshot in prop::collection::vec(any::<u8>(), 0..300)) {
        crate::raft::fuzz::folder(&log, &snapshot);
    }
}

#[test]
fn a_real_folder_is_locked_and_keeps_what_it_got() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Folder::open(folder.path()).unwrap();
    assert!(matches!(Folder::open(folder.path()), Err(LogError::Locked { .. })));
    let mut store = LogStore::open(disk, identity(), &limits(), Some((members(), b"first".to_vec()))).unwrap().store;
    for index in 2..=30 {
        store.write(&[entry(index, 2)], Some(&state(2, index - 1)), true).unwrap();
    }
    assert!(store.segments() > 3);
    drop(store);
    let disk = Folder::open(folder.path()).unwrap();
    let opened = LogStore::open(disk, identity(), &limits(), None).unwrap();
    assert_eq!(opened.persisted.entries.len(), 29);
}
