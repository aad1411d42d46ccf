//! Where the ranks of a layout are, and the groups between those of several processes.
//!
//! What it is not: it places no rank; the plan does. Invariants: every process forms the groups of a rank in the same order
//! (tensor, expert, the stage before, the stage after), so that none waits for one that waits for it; ranks that are all in one
//! process share its memory.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use forge_kernels::Backend;
use forge_net::{Collective, Fabric, GroupId, GroupSpec, Member, MessageLinks};
use forge_shared::ids::{Epoch, NodeId};

use super::RankLayout;
use super::local::Seats;
use super::rank::{AbortGroups, LoadedRank};
use super::wire::{self, Message, Pieces};
use crate::decoder::Groups;
use crate::error::{ModelError, Result};
use crate::step::StageModel;

/// See the module's documentation.
#[derive(Clone)]
pub struct Reach {
    /// This process's place in the data plane.
    pub fabric: Arc<Fabric>,
    /// Of the replica: its groups are named so.
    pub name: String,
    /// Of the plan.
    pub epoch: Epoch,
    /// The node of each rank, in the layout's order. The first one's leads.
    pub members: Vec<Member>,
    /// This process's node.
    pub node: NodeId,
    /// What all must bring alike: the plan, and the digest of the weights.
    pub agreement: String,
    /// The longest wait for a group to come together. All processes must be about to form it.
    pub form_timeout: Duration,
    /// The longest wait of a rank for another.
    pub deadline: Duration,
    /// The node by whose fault the replica ended, once that is known.
    pub fault: Arc<OnceLock<NodeId>>,
}

impl Reach {
    /// Ranks of this process.
    pub fn here(&self) -> Vec<usize> {
        (0..self.members.len()).filter(|&rank| self.is_here(rank)).collect()
    }

    /// Whether the first rank is here, and with it the engine.
    pub fn leads(&self) -> bool {
        self.members.first().is_some_and(|first| first.node == self.node)
    }

    /// Nodes, each once: the leading one first.
    pub fn nodes(&self) -> Vec<Member> {
        let mut nodes: Vec<Member> = Vec::new();
        for member in &self.members {
            if nodes.iter().all(|known| known.node != member.node) {
                nodes.push(member.clone());
            }
        }
        nodes
    }

    /// The first rank of a node.
    pub(super) fn first_rank(&self, node: &NodeId) -> usize {
        self.members.iter().position(|member| member.node == *node).unwrap_or_default()
    }

    pub(super) fn is_here(&self, rank: usize) -> bool {
        self.members.get(rank).is_some_and(|member| member.node == self.node)
    }

    /// Notes whose fault an end is, if an error says so; else it is this node's. What only tells of another's end says nothing.
    pub fn blame(&self, error: &ModelError) {
        if let Some(node) = self.culprit(error) {
            // Only the first counts.
            let _ = self.fault.set(node);
        }
    }

    /// The node by whose fault a rank of this process met an error.
    pub(super) fn culprit(&self, error: &ModelError) -> Option<NodeId> {
        use forge_net::NetError;
        match error {
            ModelError::Net(NetError::PeerLost { node, .. } | NetError::Unreachable { node, .. } | NetError::Refused { node, .. })
            | ModelError::FarRank { node, .. } => Some(node.clone()),
            ModelError::Rank { source, .. } => self.culprit(source),
            ModelError::Net(NetError::Timeout { .. }) | ModelError::RankLate { .. } | ModelError::Ended { .. } => None,
            error if super::is_consequence(error) => None,
            _ => Some(self.node.clone()),
        }
    }

    /// Links between the processes: member 0 leads.
    ///
    /// # Errors
    /// As [`Fabric::links`].
    pub fn links(&self, purpose: &str) -> Result<MessageLinks> {
        let nodes = self.nodes();
        let rank = nodes.iter().position(|member| member.node == self.node).unwrap_or(nodes.len());
        Ok(self.fabric.links(GroupSpec { urgent: true, ..self.spec(purpose.to_owned(), nodes, rank) })?)
    }

    fn spec(&self, purpose: String, members: Vec<Member>, rank: usize) -> GroupSpec {
        GroupSpec {
            id: GroupId { name: self.name.clone(), purpose, epoch: self.epoch },
            members,
            rank,
            agreement: self.agreement.clone(),
            urgent: false,
            form_timeout: self.form_timeout,
            deadline: self.deadline,
        }
    }

    /// A group of `ranks` as `rank` has it: of this process's memory where that is enough.
    fn group<B: Backend>(
        &self,
        kind: &str,
        ranks: &[usize],
        rank: usize,
        here: Option<Arc<dyn Collective<B>>>,
    ) -> Result<Arc<dyn Collective<B>>> {
        if let Some(here) = here {
            return Ok(here);
        }
        let members = ranks.iter().map(|&rank| self.members[rank].clone()).collect();
        let position = ranks.iter().position(|&other| other == rank).unwrap_or(ranks.len());
        let purpose = format!("{kind} {}", ranks.first().copied().unwrap_or_default());
        Ok(self.fabric.form(self.spec(purpose, members, position))?)
    }

    fn hidden(&self, from: usize, to: usize, rank: usize) -> Result<HiddenLink> {
        let members = [from, to].map(|rank| self.members[rank].clone()).to_vec();
        let links = self.fabric.links(self.spec(format!("hidden {from}"), members, usize::from(rank == to)))?;
        Ok(HiddenLink { links: Arc::new(links), peer: usize::from(rank == from) })
    }

    /// Forms a rank's groups with those of other processes, and loads its part with them.
    pub(super) fn load<B: Backend>(
        &self,
        (layout, rank): (&RankLayout, usize),
        seats: Seats<B>,
        aborts: &LateAborts,
        load: impl FnOnce(Groups<B>) -> Result<Box<dyn StageModel>>,
    ) -> Result<LoadedRank> {
        let members = layout.members();
        let tensor = self.group("tensor", &layout.tensor_group(rank), rank, seats.tensor)?;
        aborts.add(abort_of(&tensor));
        let expert = self.group("expert", &layout.expert_group(rank), rank, seats.expert)?;
        aborts.add(abort_of(&expert));
        let link = |from: usize, to: usize| -> Result<Option<HiddenLink>> {
            if to >= layout.ranks() || (self.is_here(from) && self.is_here(to)) {
                return Ok(None);
            }
            let link = self.hidden(from, to, rank)?;
            let links = Arc::clone(&link.links);
            aborts.add(move |reason| links.abort(reason));
            Ok(Some(link))
        };
        let previous = if rank >= members { link(rank - members, rank)? } else { None };
        let next = link(rank, rank + members)?;
        Ok(LoadedRank { model: load(Groups { tensor, expert })?, previous, next })
    }
}

fn abort_of<B: Backend>(group: &Arc<dyn Collective<B>>) -> impl Fn(&str) + Send + Sync + 'static {
    let group = Arc::clone(group);
    move |reason| group.abort(reason)
}

/// Ends groups from any thread, also those that are formed after that was asked for.
#[derive(Clone, Default)]
pub(super) struct LateAborts(Arc<Mutex<Late>>);

#[derive(Default)]
struct Late {
    reason: Option<String>,
    groups: Vec<AbortGroups>,
}

impl LateAborts {
    fn add(&self, abort: impl Fn(&str) + Send + Sync + 'static) {
        let mut late = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(reason) = &late.reason {
            abort(reason);
        }
        late.groups.push(Box::new(abort));
    }

    pub(super) fn abort(&self, reason: &str) {
        let mut late = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if late.reason.is_none() {
            late.reason = Some(reason.to_owned());
        }
        late.groups.iter().for_each(|abort| abort(reason));
    }
}

/// The way of hidden states between two ranks of neighbouring stages in two processes.
pub(super) struct HiddenLink {
    links: Arc<MessageLinks>,
    peer: usize,
}

impl HiddenLink {
    pub(super) fn give(&self, step: u64, values: &[f32]) -> Result<()> {
        wire::send_values(&self.links, self.peer, step, values)
    }

    pub(super) fn take(&self, step: u64, deadline: Duration) -> Result<Vec<f32>> {
        let mut pieces = Pieces::default();
        loop {
            let Some(bytes) = self.links.recv(self.peer, deadline)? else {
                return Err(ModelError::RankLate { what: format!("the stage before's part of step {step}"), waited: deadline });
            };
            let Message::Piece { step: given, total, start, values } = Message::decode(&bytes)? else {
                return Err(ModelError::Message { reason: "a stage must give hidden states".to_owned() });
            };
            if let Some((given, values)) = pieces.take((given, total, start), &values)? {
                if given == step {
                    return Ok(values);
                }
                let reason = format!("the stage before gave step {given} for step {step}");
                return Err(ModelError::Plan { field: "step", reason });
            }
        }
    }
}
