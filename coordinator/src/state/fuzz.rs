//! Entry points for fuzzing: what a hostile client, an old leader or a damaged disk could hand to the state.
//!
//! Invariant kept by them: nothing panics, whatever is applied keeps the state's rules, and a refused command changes
//! nothing that can be seen.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{Command, Envelope};
use forge_shared::cluster::node::{DeviceInfo, DeviceKind, NodeSpec, Role};
use forge_shared::ids::{Epoch, Incarnation, NodeId, ServiceName};
use forge_shared::plan::{ModelFacts, ModelShape};
use forge_shared::spec::{ModelService, ModelServiceSpec};
use forge_shared::version::{FIRST_LEVEL, LEVEL};

use super::{ClusterState, check_rules, snapshot};

/// Made once: every input begins with it.
static START: LazyLock<ClusterState> = LazyLock::new(start);

/// A cluster of two workers and a service whose model is known, at revision 4.
fn start() -> ClusterState {
    let mut state = ClusterState::new("fuzz");
    state.level = LEVEL;
    let worker = |id: &str| NodeSpec {
        id: NodeId::from(id),
        role: Role::Worker,
        incarnation: Incarnation(1),
        version: "1".into(),
        level: forge_shared::version::LEVEL,
        address: format!("{id}:7100"),
        metrics_address: String::new(),
        data_plane: None,
        devices: vec![DeviceInfo {
            index: 0,
            kind: DeviceKind::Cpu,
            name: String::new(),
            cores: 2,
            numa_node: None,
            instruction_sets: Vec::new(),
            memory_bytes: 1 << 30,
            read_bandwidth_bytes_per_s: 0,
            matrix_flops: 0,
            is_virtual: true,
            cannot_run: None,
        }],
    };
    let spec = ModelServiceSpec { model: "a/model".into(), ..ModelServiceSpec::default() };
    let name = ServiceName::from("demo");
    let commands = [
        Command::JoinNode { spec: Box::new(worker("w1")) },
        Command::JoinNode { spec: Box::new(worker("w2")) },
        Command::ApplyService { service: Box::new(ModelService::new("demo", spec)) },
        Command::RecordFacts { name: name.clone(), generation: 1, facts: Ok(Box::new(facts())) },
    ];
    for (number, command) in commands.into_iter().enumerate() {
        let envelope = envelope(&format!("start-{number}"), command);
        drop(state.apply(Revision(number as u64 + 1), &envelope));
    }
    state
}

fn envelope(request_id: &str, command: Command) -> Envelope {
    Envelope { request_id: request_id.into(), proposed_ms: 1_000, traceparent: String::new(), command }
}

/// Of the service's model.
fn facts() -> ModelFacts {
    ModelFacts {
        layers: 2,
        context_length: 128,
        weights_bytes: 1 << 20,
        kv_slot_bytes: 64,
        workspace_bytes: 1 << 20,
        weights_digest: "d".into(),
        shape: ModelShape::default(),
    }
}

/// A small cluster to which commands are applied, and what is checked after each.
pub(crate) struct Fuzzed {
    state: ClusterState,
    last_epochs: BTreeMap<ServiceName, Epoch>,
    next_revision: u64,
    is_changed: bool,
}

impl Fuzzed {
    /// Two workers and a service.
    pub(crate) fn begin() -> Self {
        Fuzzed { state: START.clone(), last_epochs: BTreeMap::new(), next_revision: 5, is_changed: false }
    }

    pub(crate) fn state(&self) -> &ClusterState {
        &self.state
    }

    /// Of the service's model.
    pub(crate) fn facts(&self) -> ModelFacts {
        facts()
    }

    /// Applies a command; whether it was taken.
    ///
    /// # Panics
    /// If it breaks a rule of the state, or changes something and is refused.
    pub(crate) fn apply(&mut self, request_id: &str, command: Command) -> bool {
        self.apply_envelope(&envelope(request_id, command))
    }

    fn apply_envelope(&mut self, envelope: &Envelope) -> bool {
        let before = self.state.revision();
        let (reply, changes) = self.state.apply(Revision(self.next_revision), envelope);
        self.next_revision += 1;
        assert!(reply.is_ok() || (changes.is_empty() && self.state.revision() == before), "a refused command changed something");
        if let Err(rule) = check_rules(&self.state) {
            panic!("{rule} after {envelope:?}");
        }
        for (name, service) in self.state.services() {
            let last = self.last_epochs.entry(name.clone()).or_default();
            assert!(service.last_epoch >= *last, "epochs of {name} went back");
            *last = service.last_epoch;
        }
        self.is_changed |= !changes.is_empty();
        reply.is_ok()
    }
}

/// Lines of JSON envelopes, applied in order to a small cluster; lines that are none are skipped.
///
/// # Panics
/// On a defect.
pub fn fuzz_envelopes(bytes: &[u8]) {
    let mut fuzzed = Fuzzed::begin();
    for line in bytes.split(|&byte| byte == b'\n').take(64) {
        let Ok(envelope) = serde_json::from_slice::<Envelope>(line) else { continue };
        fuzzed.apply_envelope(&envelope);
    }
    if fuzzed.is_changed {
        let written = fuzzed.state.encode();
        let read = ClusterState::decode(&written);
        assert_eq!(read.as_ref(), Ok(&fuzzed.state), "a state changes when it is written and read");
    }
}

/// Bytes as a snapshot: as they are, and as a body whose first line is right. What is taken must encode to what it came
/// from, once written by this build.
pub fn fuzz_snapshot(bytes: &[u8]) {
    let framed = (FIRST_LEVEL..=LEVEL).map(|level| snapshot::with_header(level, bytes));
    for bytes in framed.chain([bytes.to_vec()]) {
        if let Ok(state) = ClusterState::decode(&bytes) {
            let again = ClusterState::decode(&state.encode());
            assert_eq!(again.as_ref(), Ok(&state), "a snapshot changes when it is read");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_keeps_the_rules_and_hostile_lines_do_too() {
        assert_eq!(start().services().len(), 1);
        let lines = [
            r#"{"requestId":"a","proposedMs":18446744073709551615,"command":{"do":"scaleService","name":"demo","replicas":3}}"#,
            r#"{"requestId":"b","proposedMs":0,"command":{"do":"deleteService","name":"demo"}}"#,
            r#"{"requestId":"c","proposedMs":0,"command":{"do":"commitPlans","basis":4,"plans":[],"removed":[],"refusals":[]}}"#,
            "no envelope",
        ];
        fuzz_envelopes(lines.join("\n").as_bytes());
        fuzz_snapshot(&start().encode());
        fuzz_snapshot(b"{}");
    }
}
