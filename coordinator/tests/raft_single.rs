//! A group of one with a real folder and its own thread: what a laptop runs.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forge_coordinator::raft::{self, Frozen, MemberChange, PeerTransport, RaftError, RaftHandle, RaftOptions, RaftRole, StateMachine};
use forge_proto::raft as wire;

const SOON: Duration = Duration::from_secs(20);

/// Remembers what was applied, one text after the other.
#[derive(Default)]
struct Texts(Vec<String>);

impl StateMachine for Texts {
    fn apply(&mut self, index: u64, data: &[u8]) -> Vec<u8> {
        self.0.push(String::from_utf8_lossy(data).into_owned());
        format!("{index}: {} texts", self.0.len()).into_bytes()
    }

    fn snapshot(&self) -> Frozen {
        let lines = self.0.clone();
        Box::new(move || lines.join("\n").into_bytes())
    }

    fn restore(&mut self, _: u64, data: &[u8]) -> Result<(), String> {
        let text = String::from_utf8(data.to_vec()).map_err(|error| error.to_string())?;
        self.0 = text.lines().map(Into::into).collect();
        Ok(())
    }
}

struct NoPeers;

impl PeerTransport for NoPeers {
    fn send(&self, _: u64, _: Vec<wire::Message>) {}
    fn send_snapshot(&self, _: u64, _: wire::Message, _: Bytes) {}
}

fn options(folder: &std::path::Path) -> RaftOptions {
    let mut options = RaftOptions::new(1, "test", folder);
    options.tick = Duration::from_millis(5);
    options.bootstrap = Some(vec![1]);
    options
}

fn start(options: RaftOptions) -> Result<RaftHandle, RaftError> {
    raft::start(options, Box::new(Texts::default()), Arc::new(NoPeers))
}

async fn leads(raft: &RaftHandle) {
    let mut status = raft.status();
    let led = status.wait_for(|status| status.role == RaftRole::Leader);
    drop(tokio::time::timeout(SOON, led).await.expect("a group of one elects itself").expect("the member lives"));
}

async fn propose(raft: &RaftHandle, text: String) -> Result<String, RaftError> {
    let proposed = raft.propose(Bytes::from(text.into_bytes()), SOON).await?;
    Ok(String::from_utf8(proposed.reply).expect("the machine answers with text"))
}

#[tokio::test]
async fn what_is_acknowledged_is_there_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path());
    // Small enough that snapshots are made and segments go.
    options.limits.snapshot_entries = 20;
    options.limits.trailing_entries = 5;
    options.limits.segment_bytes = 1000;
    for start_number in 0..3 {
        let raft = start(options.clone()).unwrap();
        leads(&raft).await;
        for number in 0..50 {
            let reply = propose(&raft, format!("text {number}")).await.unwrap();
            assert!(reply.ends_with(&format!(": {} texts", start_number * 50 + number + 1)), "{reply}");
        }
        let read = raft.read_index(SOON).await.unwrap();
        let status = raft.status().borrow().clone();
        assert!(status.applied_index >= read && status.snapshot_index > 20, "{status:?}");
        raft.stop().await;
        assert!(matches!(propose(&raft, "late".into()).await, Err(RaftError::Stopped { .. })));
    }
    let segments = std::fs::read_dir(folder.path())
        .unwrap()
        .filter(|file| file.as_ref().unwrap().file_name().to_string_lossy().starts_with("log-"))
        .count();
    assert!(segments < 10, "{segments} segments are left");
}

#[tokio::test]
async fn a_folder_is_used_by_one_process_and_one_member() {
    let folder = tempfile::tempdir().unwrap();
    let raft = start(options(folder.path())).unwrap();
    let text = start(options(folder.path())).err().unwrap().to_string();
    assert!(text.contains("another process uses"), "{text}");
    raft.stop().await;

    let foreign = RaftOptions { cluster_id: "other".into(), ..options(folder.path()) };
    let text = start(foreign).err().unwrap().to_string();
    assert!(text.contains("belongs to cluster \"test\", and this is \"other\""), "{text}");
    let foreign = RaftOptions { member_id: 2, bootstrap: None, ..options(folder.path()) };
    let text = start(foreign).err().unwrap().to_string();
    assert!(text.contains("belongs to member \"1\""), "{text}");
}

#[tokio::test]
async fn requests_that_make_no_sense_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut options = options(folder.path());
    options.limits.entry_bytes = 100;
    let raft = start(options.clone()).unwrap();
    leads(&raft).await;
    let long = raft.propose(Bytes::from(vec![0; 101]), SOON).await;
    assert!(matches!(long, Err(RaftError::TooLarge { bytes: 101, limit_bytes: 100 })), "{long:?}");
    let only = raft.change_members(MemberChange::Remove(1), SOON).await;
    assert!(matches!(only, Err(RaftError::Members(_))), "{only:?}");
    let stranger = raft.change_members(MemberChange::Promote(7), SOON).await;
    assert!(matches!(stranger, Err(RaftError::Members(_))), "{stranger:?}");
    assert!(raft.change_members(MemberChange::Remove(7), SOON).await.is_ok(), "it is not there already");
    let stranger = raft.transfer_leadership(7, SOON).await;
    assert!(matches!(stranger, Err(RaftError::Members(_))), "{stranger:?}");
    assert!(raft.transfer_leadership(1, SOON).await.is_ok());
    raft.stop().await;

    for bad in [
        RaftOptions { member_id: 0, ..options.clone() },
        RaftOptions { cluster_id: String::new(), ..options.clone() },
        RaftOptions { election_ticks: 4, ..options.clone() },
        RaftOptions { bootstrap: Some(vec![2]), ..options.clone() },
        RaftOptions { bootstrap: Some(vec![1, 1]), ..options.clone() },
    ] {
        assert!(matches!(start(bad).err(), Some(RaftError::Options(_))));
    }
}
