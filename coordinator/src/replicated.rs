//! The state machine that raft drives: the cluster's state, and the watch hub that tells of its changes.
//!
//! Invariant: an entry is applied and published under one lock, so that a listing and the place in the history after it
//! belong together. What raft hands over was proposed by a member of this group, and is still not believed: an entry that
//! is no command answers an error on every member alike and changes nothing. One that takes a level which this build does
//! not have stops the member: the others apply it.
//!
//! An entry is the JSON of an [`Envelope`]; one that takes more than the first level has a line before it that says which.

use std::sync::Arc;

use bytes::Bytes;
use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{Applied, CommandError, Envelope};
use forge_shared::cluster::event::Kind;
use forge_shared::version::{Build, FIRST_LEVEL};
use parking_lot::{RwLock, RwLockReadGuard};
use tokio::sync::watch;

use crate::raft::{Frozen, StateMachine};
use crate::state::{ClusterState, level_of};
use crate::watch::{HistoryBounds, Hub, See, Source};

/// Kinds in the order in which a listing gives them: members and nodes before what refers to them.
const KINDS: [Kind; 8] = [Kind::Trust, Kind::Member, Kind::Node, Kind::Service, Kind::Key, Kind::Token, Kind::Certificate, Kind::Notice];

/// Begins the first line of an entry that takes more than the first level. JSON begins with a brace.
const LEVEL_MARK: &str = "level ";
const MAX_LEVEL_DIGITS: usize = 9;

/// The applied state of this member, shared between raft's thread and everything that reads.
#[derive(Debug)]
pub struct Replicated {
    state: RwLock<ClusterState>,
    /// Tells of its changes.
    pub hub: Arc<Hub>,
    /// The state's revision; changes wake the leader's loop.
    changed: watch::Sender<Revision>,
    /// What this process is a build of.
    build: Build,
}

impl Replicated {
    /// The state of a member of this build that has applied nothing since.
    pub fn new(state: ClusterState, build: Build) -> Arc<Replicated> {
        let revision = state.revision();
        let hub = Hub::new(HistoryBounds::default(), revision);
        Arc::new(Replicated { state: RwLock::new(state), hub, changed: watch::Sender::new(revision), build })
    }

    /// The state now. Hold it briefly: applying waits.
    pub fn read(&self) -> RwLockReadGuard<'_, ClusterState> {
        self.state.read()
    }

    /// Whether this process knows what a level brought.
    fn knows(&self, level: u32) -> Result<(), String> {
        if level <= self.build.level {
            return Ok(());
        }
        Err(format!("the cluster is at level {level}, and this is forge-coordinator {}: start a newer one", self.build))
    }

    /// Follows the revision.
    pub fn changes(&self) -> watch::Receiver<Revision> {
        self.changed.subscribe()
    }
}

impl Source for Replicated {
    fn visit(&self, see: &mut See<'_>) {
        let state = self.state.read();
        see(state.revision(), &|| KINDS.into_iter().flat_map(|kind| state.objects(kind)).collect());
    }
}

/// The end that raft holds.
#[derive(Debug)]
pub struct Machine(pub Arc<Replicated>);

impl StateMachine for Machine {
    fn knows(&self, data: &[u8]) -> Result<(), String> {
        let (level, _) = split_level(data);
        self.0.knows(level).map_err(|why| format!("{why}; the group goes on without this member until then"))
    }

    fn apply(&mut self, index: u64, data: &[u8]) -> Vec<u8> {
        let envelope: Envelope = match serde_json::from_slice(split_level(data).1) {
            Ok(envelope) => envelope,
            Err(error) => {
                tracing::error!(index, %error, "an entry of the log is no command of this version");
                return encode_reply(&Err(unreadable(&error)));
            }
        };
        let span = tracing::info_span!("apply", index, command = command_name(&envelope), request_id = envelope.request_id);
        forge_cluster::tracing::set_parent(&span, &envelope.traceparent);
        let _entered = span.enter();
        let mut state = self.0.state.write();
        let (reply, changes) = state.apply(Revision(index), &envelope);
        let revision = state.revision();
        self.0.hub.publish(revision, changes);
        drop(state);
        self.0.changed.send_if_modified(|held| {
            let is_new = *held != revision;
            *held = revision;
            is_new
        });
        if let Err(error) = &reply {
            tracing::debug!(%error, "a command was refused");
        }
        encode_reply(&reply)
    }

    fn snapshot(&self) -> Frozen {
        let state = self.0.state.read().clone();
        Box::new(move || state.encode())
    }

    fn restore(&mut self, _index: u64, data: &[u8]) -> Result<(), String> {
        let restored = ClusterState::decode(data).map_err(|error| error.to_string())?;
        self.0.knows(restored.level())?;
        let mut state = self.0.state.write();
        let revision = restored.revision();
        *state = restored;
        self.0.hub.reset(revision);
        drop(state);
        self.0.changed.send_replace(revision);
        Ok(())
    }
}

/// An envelope as the log holds it.
///
/// # Errors
/// It has no JSON.
pub fn encode_envelope(envelope: &Envelope) -> Result<Bytes, CommandError> {
    let json = serde_json::to_vec(envelope).map_err(|error| unreadable(&error))?;
    match level_of(&envelope.command) {
        FIRST_LEVEL => Ok(Bytes::from(json)),
        level => Ok(Bytes::from([format!("{LEVEL_MARK}{level}\n").into_bytes(), json].concat())),
    }
}

/// The level an entry takes, and its JSON. What only looks like such a line is no command of any build.
fn split_level(data: &[u8]) -> (u32, &[u8]) {
    let marked = data.strip_prefix(LEVEL_MARK.as_bytes()).and_then(|rest| {
        let end = rest.iter().take(MAX_LEVEL_DIGITS + 1).position(|byte| *byte == b'\n')?;
        let level = std::str::from_utf8(&rest[..end]).ok()?.parse().ok()?;
        Some((level, &rest[end + 1..]))
    });
    marked.unwrap_or((FIRST_LEVEL, data))
}

/// What a proposal answered.
///
/// # Errors
/// It is no reply of this version.
pub fn decode_reply(reply: &[u8]) -> Result<Result<Applied, CommandError>, serde_json::Error> {
    serde_json::from_slice(reply)
}

fn encode_reply(reply: &Result<Applied, CommandError>) -> Vec<u8> {
    // Plain data with string keys: this cannot fail; an empty reply would be reported as unreadable to the proposer.
    serde_json::to_vec(reply).unwrap_or_default()
}

fn unreadable(error: &serde_json::Error) -> CommandError {
    CommandError::Invalid { field: "command".into(), reason: format!("it cannot be read by this version: {error}") }
}

/// The command's name in the log, for spans and metrics.
pub(crate) fn command_name(envelope: &Envelope) -> &'static str {
    name_of(&envelope.command)
}

/// As [`command_name`].
pub(crate) fn name_of(command: &forge_shared::cluster::command::Command) -> &'static str {
    use forge_shared::cluster::command::Command as C;
    match command {
        C::ApplyService { .. } => "applyService",
        C::ScaleService { .. } => "scaleService",
        C::UndoService { .. } => "undoService",
        C::RecordRollout { .. } => "recordRollout",
        C::DeleteService { .. } => "deleteService",
        C::RecordFacts { .. } => "recordFacts",
        C::RecordWait { .. } => "recordWait",
        C::CommitPlans { .. } => "commitPlans",
        C::ReportReplica { .. } => "reportReplica",
        C::JoinNode { .. } => "joinNode",
        C::LoseNode { .. } => "loseNode",
        C::CordonNode { .. } => "cordonNode",
        C::DrainNode { .. } => "drainNode",
        C::RemoveNode { .. } => "removeNode",
        C::PutJoinToken { .. } => "putJoinToken",
        C::UseJoinToken { .. } => "useJoinToken",
        C::RemoveJoinToken { .. } => "removeJoinToken",
        C::PutKey { .. } => "putKey",
        C::RevokeKey { .. } => "revokeKey",
        C::RecordCertificate { .. } => "recordCertificate",
        C::RevokeCertificates { .. } => "revokeCertificates",
        C::BeginCaRotation { .. } => "beginCaRotation",
        C::SwitchCa { .. } => "switchCa",
        C::FinishCaRotation { .. } => "finishCaRotation",
        C::AbandonCaRotation => "abandonCaRotation",
        C::RecordIdempotency { .. } => "recordIdempotency",
        C::PutMember { .. } => "putMember",
        C::RemoveMember { .. } => "removeMember",
        C::RaiseLevel { .. } => "raiseLevel",
    }
}

#[cfg(test)]
mod tests {
    use forge_shared::cluster::command::Command;

    use super::*;

    fn machine(level: u32) -> Machine {
        Machine(Replicated::new(ClusterState::new("c"), Build { level, ..Build::default() }))
    }

    fn entry(command: Command) -> Bytes {
        let envelope = Envelope { request_id: "r".into(), proposed_ms: 1, traceparent: String::new(), command };
        encode_envelope(&envelope).expect("JSON")
    }

    #[test]
    fn an_older_build_stops_before_what_it_does_not_know() {
        let known = entry(Command::CordonNode { node: "w".into(), cordoned: true });
        assert!(known.starts_with(b"{"), "as the first release wrote it");
        let raised = entry(Command::RaiseLevel { level: 2 });
        let (mut old, mut new) = (machine(1), machine(2));
        assert_eq!(old.knows(&known), Ok(()));
        let why = old.knows(&raised).expect_err("too new");
        assert!(why.contains("level 2") && why.contains("start a newer one"), "{why}");
        assert_eq!(new.knows(&raised), Ok(()));
        let reply = decode_reply(&new.apply(1, &raised)).expect("a reply").expect("taken");
        assert!(reply.changed);
        let snapshot = new.snapshot()();
        let why = old.restore(1, &snapshot).expect_err("too new");
        assert!(why.contains("level 2"), "{why}");
        assert_eq!(machine(2).restore(1, &snapshot), Ok(()));
    }

    #[test]
    fn what_only_looks_like_a_level_is_no_command_of_anybody() {
        for bytes in [&b"level 2"[..], b"level x\n{}", b"level 99999999999\n{}", b"", b"level \n"] {
            let mut machine = machine(2);
            assert_eq!(machine.knows(bytes), Ok(()));
            assert!(decode_reply(&machine.apply(1, bytes)).expect("a reply").is_err());
        }
    }
}
