//! Services and their replicas as the cluster knows them.

use serde::{Deserialize, Serialize};

use crate::ids::{Epoch, NodeId, ReplicaId};
use crate::plan::{ModelFacts, Plan, Refusal};
use crate::spec::ModelService;

use super::Revision;

/// A service, what is known of its model, and its replicas.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ServiceRecord {
    /// What the operator asked for, defaults filled in.
    pub service: ModelService,
    /// Grows with every change of the wish but of the number of replicas; replicas of an older generation are replaced.
    pub generation: u64,
    /// When the wish last changed.
    pub revision: Revision,
    /// When the service was created. Of two that claim one name for clients, the older has it.
    #[serde(default)]
    pub created: Revision,
    /// The model's numbers, found by a worker for this generation.
    pub facts: Facts,
    /// Replicas by index, ascending; a missing index is not placed. An index is there once.
    pub replicas: Vec<ReplicaRecord>,
    /// Replicas on their way out: superseded by one in `replicas` of the same index, or not wanted any more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub leaving: Vec<LeavingReplica>,
    /// Wishes of older generations that still have replicas.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub older: Vec<OlderWish>,
    /// Wishes before this one, the oldest first, to go back to. Level 2.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub history: Vec<PastWish>,
    /// When the wish of this generation came, milliseconds since 1970 by the leader's clock. Level 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_ms: Option<u64>,
    /// Why its rollout makes no progress, once its deadline for it is over. Level 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stuck: Option<String>,
    /// It was deleted, and its last replicas finish their requests; the record goes with the last of them.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_deleted: bool,
    /// Why a replica cannot be placed, from the last try; at most one for the service.
    pub refusal: Option<Refusal>,
    /// Highest epoch ever given out for this service: the next plan's is larger.
    pub last_epoch: Epoch,
    /// Longest context that a plan of this generation had, tokens: the next plan keeps it where it fits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub longest_len: Option<usize>,
}

/// How far the newest generation of a service is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RolloutProgress {
    /// Replicas that are wished.
    pub wished: u32,
    /// Those of the newest generation that are placed and run, or may.
    pub updated: u32,
    /// Those of the newest generation that answer.
    pub ready: u32,
    /// Replicas of older generations that still run.
    pub old: u32,
    /// Those of them that take requests.
    pub old_serving: u32,
}

impl RolloutProgress {
    /// Whether all that is wished answers, and nothing older is left.
    pub fn is_complete(&self) -> bool {
        self.ready == self.wished && self.old == 0
    }
}

impl ServiceRecord {
    /// How far its rollout is.
    pub fn progress(&self) -> RolloutProgress {
        let runs = |replica: &&ReplicaRecord| !matches!(replica.status.phase, ReplicaPhase::Failed | ReplicaPhase::Stopped);
        let is_ready = |replica: &&ReplicaRecord| replica.status.phase == ReplicaPhase::Ready;
        let wished = self.service.spec.replicas;
        let updated =
            || self.replicas.iter().filter(|replica| replica.generation == self.generation && replica.plan.replica.index < wished);
        let is_old = |replica: &&ReplicaRecord| replica.generation < self.generation;
        let leaving = || self.leaving.iter().filter(|leaving| leaving.replica.generation < self.generation);
        let standing = || self.replicas.iter().filter(is_old).filter(runs);
        let count = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        RolloutProgress {
            wished,
            updated: count(updated().filter(runs).count()),
            ready: count(updated().filter(is_ready).count()),
            old: count(standing().count() + leaving().count()),
            old_serving: count(standing().filter(is_ready).count() + leaving().filter(|leaving| !leaving.is_draining).count()),
        }
    }
}

/// A wish that was replaced by a newer one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PastWish {
    /// Which.
    pub generation: u64,
    /// The wish.
    pub service: ModelService,
    /// When it came, milliseconds since 1970 by the leader's clock; unknown where that was not written down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_ms: Option<u64>,
}

/// A replica on its way out. It is told apart from its successor, which has the same id, by its epoch.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LeavingReplica {
    /// As it stood.
    pub replica: ReplicaRecord,
    /// Whether it takes no more requests. Before that it serves on, until its successor is ready.
    pub is_draining: bool,
}

/// A wish that was replaced by a newer one, kept as long as replicas carry it out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct OlderWish {
    /// Which.
    pub generation: u64,
    /// The wish.
    pub service: ModelService,
    /// Digest of the weights its replicas were planned for.
    pub weights_digest: String,
}

/// What is known of a service's model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "state", deny_unknown_fields)]
pub enum Facts {
    /// No worker has looked yet.
    Unknown {
        /// What that waits for, where it takes longer than a moment.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        waits_for: String,
    },
    /// A worker looked and cannot use the model: nothing is placed until the wish changes.
    Failed {
        /// What is wrong with it, with the remedy.
        reason: String,
    },
    /// The model's numbers.
    Known {
        /// For placement.
        facts: Box<ModelFacts>,
    },
}

impl Facts {
    /// Of a wish that is new.
    pub const NEW: Facts = Facts::Unknown { waits_for: String::new() };
}

/// A placed replica and where it stands.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ReplicaRecord {
    /// The coordinator's decision.
    pub plan: Plan,
    /// Generation of the service it was planned for.
    pub generation: u64,
    /// What its leading rank's node last reported.
    pub status: ReplicaStatus,
}

/// What a worker reports of a replica.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ReplicaStatus {
    /// Where it stands.
    pub phase: ReplicaPhase,
    /// Share done of what the phase is doing, 0 to 100.
    pub percent: u8,
    /// Why, where it failed; what is being waited for, elsewhere.
    pub reason: String,
    /// Times its engine was restarted under this plan.
    pub restarts: u32,
    /// Of the running engine; empty before.
    pub numerics_id: String,
    /// By whose fault a replica with ranks on several nodes failed, where that is known. Level 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fault: Option<NodeId>,
}

impl ReplicaStatus {
    /// A replica that its worker has not spoken of yet.
    pub fn placed() -> Self {
        ReplicaStatus {
            phase: ReplicaPhase::Placed,
            percent: 0,
            reason: String::new(),
            restarts: 0,
            numerics_id: String::new(),
            fault: None,
        }
    }
}

/// Where a replica stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ReplicaPhase {
    /// Planned; its worker has not answered.
    Placed,
    /// Its files are coming.
    Pulling,
    /// Its weights are being loaded.
    Loading,
    /// It answers.
    Ready,
    /// It lets running requests finish, and takes no more.
    Draining,
    /// Its worker gave it up; it is placed anew.
    Failed,
    /// It has ended as it was told to; nothing of it runs.
    Stopped,
}

/// A worker's report of one replica, bound to the plan it speaks of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ReplicaReport {
    /// Which.
    pub replica: ReplicaId,
    /// Under which plan; a report of another epoch changes nothing.
    pub epoch: Epoch,
    /// What it says.
    pub status: ReplicaStatus,
    /// Bytes Forge may really use on its device, in all, where they were fewer than the node had said: it is believed no
    /// more than this.
    pub found_memory_bytes: Option<u64>,
}
