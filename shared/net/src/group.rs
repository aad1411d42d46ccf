//! The ranks of a replica or job as one group: who belongs to it, who has come, how it ends, and what follows it.
//!
//! What it is: a core without I/O; hellos, welcomes and aborts go in, verdicts come out. One [`Group`] is one rank's view of
//! one epoch; [`Epochs`] is what a process remembers over groups.
//!
//! Invariants: a group is formed only of members that brought the same id, size, agreement and each its own node's
//! certificate; an ended group stays ended, with its first reason; an epoch that this process has closed, or an older one
//! of the same name and purpose, is never formed again.

use std::collections::{BTreeMap, VecDeque};

use forge_shared::ids::{Epoch, NodeId};

use crate::hello::{GroupId, Hello, MAX_AGREEMENT_BYTES, MAX_NAME_BYTES, MAX_RANKS};

/// How many names a process remembers; the ones that were closed first are forgotten first.
const MAX_REMEMBERED: usize = 4096;

/// Why a member or a stream does not belong to a group.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// A description that cannot be a group.
    #[error("group {group}: {field} is {value}; {remedy}")]
    Description {
        /// The group.
        group: Box<GroupId>,
        /// What is wrong.
        field: &'static str,
        /// How it is.
        value: String,
        /// What to write.
        remedy: &'static str,
    },
    /// An epoch that is over.
    #[error("group {group}: epoch {closed} was closed here; only a later one can be formed")]
    Closed {
        /// What was asked for.
        group: Box<GroupId>,
        /// The newest epoch of it that was closed.
        closed: Epoch,
    },
    /// A node that has not this rank.
    #[error("group {group}: node {node} says that it is rank {rank}, which it is not in this plan")]
    Stranger {
        /// The group.
        group: Box<GroupId>,
        /// Who says so.
        node: NodeId,
        /// Which rank it means.
        rank: usize,
    },
    /// A member that has something else.
    #[error("group {group}: rank {rank} has {field} {theirs:?}, this rank {ours:?}; both must be the same")]
    Disagreement {
        /// The group.
        group: Box<GroupId>,
        /// The other rank.
        rank: usize,
        /// In what.
        field: &'static str,
        /// What it has.
        theirs: String,
        /// What this rank has.
        ours: String,
    },
    /// A stream that is there already.
    #[error("group {group}: rank {rank} opens a stream that is open")]
    Twice {
        /// The group.
        group: Box<GroupId>,
        /// The other rank.
        rank: usize,
    },
    /// The group has ended.
    #[error("group {group} is over: {reason}")]
    Over {
        /// The group.
        group: Box<GroupId>,
        /// Why.
        reason: String,
    },
}

/// Who is in a group: the node of each rank, in rank order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// Which group.
    pub id: GroupId,
    /// The node of each rank; one node may have several.
    pub nodes: Vec<NodeId>,
    /// This rank.
    pub rank: usize,
    /// What all members must bring alike; empty where there is nothing.
    pub agreement: String,
}

/// Where a group stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Lanes still to come from or to be welcomed by a peer.
    Forming,
    Formed,
    Over(String),
}

/// One rank's view of its group.
#[derive(Debug, Clone)]
pub struct Group {
    membership: Membership,
    lanes: usize,
    /// Streams that are there, per rank.
    come: Vec<usize>,
    state: State,
}

impl Group {
    /// A group that is being formed, with so many streams to each peer.
    ///
    /// # Errors
    /// [`GroupError::Description`].
    pub fn new(membership: Membership, lanes: usize) -> Result<Self, GroupError> {
        let size = membership.nodes.len();
        let wrong =
            |field, value: String, remedy| Err(GroupError::Description { group: Box::new(membership.id.clone()), field, value, remedy });
        if size == 0 || size > MAX_RANKS {
            return wrong("members", size.to_string(), "name between 1 and 1024");
        }
        if membership.rank >= size {
            return wrong("rank", membership.rank.to_string(), "name a rank below the number of members");
        }
        let id = &membership.id;
        for (field, text, limit) in [
            ("name", &id.name, MAX_NAME_BYTES),
            ("purpose", &id.purpose, MAX_NAME_BYTES),
            ("agreement", &membership.agreement, MAX_AGREEMENT_BYTES),
        ] {
            if text.len() > limit {
                return wrong(field, format!("{} bytes long", text.len()), "shorten it: 512 bytes for names, 1024 for the agreement");
            }
        }
        let mut come = vec![0; size];
        come[membership.rank] = lanes;
        let state = if size == 1 { State::Formed } else { State::Forming };
        Ok(Group { membership, lanes, come, state })
    }

    /// Who is in it.
    pub fn membership(&self) -> &Membership {
        &self.membership
    }

    /// Whether this rank opens the streams to that one; else it waits for them. One of two opens, always the same.
    pub fn opens(&self, peer: usize) -> bool {
        self.membership.rank < peer
    }

    /// A peer has opened a stream: whether it belongs here. `node` is what its certificate says.
    ///
    /// # Errors
    /// [`GroupError`]; but for [`GroupError::Over`] the group stands as before.
    pub fn hello(&mut self, node: &NodeId, hello: &Hello) -> Result<(), GroupError> {
        self.check_open()?;
        let own = &self.membership;
        let group = || Box::new(own.id.clone());
        if hello.group != own.id || hello.to != own.rank || own.nodes.get(hello.from) != Some(node) || self.opens(hello.from) {
            return Err(GroupError::Stranger { group: group(), node: node.clone(), rank: hello.from });
        }
        let differs =
            |field, theirs: String, ours: String| GroupError::Disagreement { group: group(), rank: hello.from, field, theirs, ours };
        if hello.size != own.nodes.len() {
            return Err(differs("members", hello.size.to_string(), own.nodes.len().to_string()));
        }
        if hello.agreement != own.agreement {
            return Err(differs("agreement", hello.agreement.clone(), own.agreement.clone()));
        }
        self.come(hello.from)
    }

    /// A peer has welcomed a stream that this rank opened.
    ///
    /// # Errors
    /// [`GroupError::Stranger`] for a rank outside, [`GroupError::Twice`], [`GroupError::Over`].
    pub fn welcomed(&mut self, peer: usize) -> Result<(), GroupError> {
        self.check_open()?;
        if !self.opens(peer) || peer >= self.come.len() {
            let node = self.membership.nodes[self.membership.rank].clone();
            return Err(GroupError::Stranger { group: Box::new(self.membership.id.clone()), node, rank: peer });
        }
        self.come(peer)
    }

    fn come(&mut self, peer: usize) -> Result<(), GroupError> {
        if self.come[peer] == self.lanes {
            return Err(GroupError::Twice { group: Box::new(self.membership.id.clone()), rank: peer });
        }
        self.come[peer] += 1;
        if self.come.iter().all(|&come| come == self.lanes) {
            self.state = State::Formed;
        }
        Ok(())
    }

    /// A stream of a peer has ended before the group was formed: it may come again.
    pub fn left(&mut self, peer: usize) {
        if matches!(self.state, State::Forming)
            && let Some(come) = self.come.get_mut(peer)
        {
            *come = come.saturating_sub(1);
        }
    }

    /// Whether all streams are there.
    pub fn is_formed(&self) -> bool {
        self.state == State::Formed
    }

    /// Ranks that have not come.
    pub fn missing(&self) -> usize {
        self.come.iter().filter(|&&come| come < self.lanes).count()
    }

    /// Ends the group. The first reason is kept; returns whether this was it.
    pub fn end(&mut self, reason: &str) -> bool {
        let first = !matches!(self.state, State::Over(_));
        if first {
            self.state = State::Over(reason.to_owned());
        }
        first
    }

    /// Fails once the group is over.
    ///
    /// # Errors
    /// [`GroupError::Over`].
    pub fn check_open(&self) -> Result<(), GroupError> {
        match &self.state {
            State::Over(reason) => Err(GroupError::Over { group: Box::new(self.membership.id.clone()), reason: reason.clone() }),
            State::Forming | State::Formed => Ok(()),
        }
    }
}

/// What a process remembers of the epochs it has closed.
#[derive(Debug, Default)]
pub struct Epochs {
    closed: BTreeMap<(String, String), Epoch>,
    order: VecDeque<(String, String)>,
}

impl Epochs {
    /// Whether a group of this id may be formed. A later epoch than any seen may: the peer has heard of a plan first.
    ///
    /// # Errors
    /// [`GroupError::Closed`].
    pub fn check(&self, id: &GroupId) -> Result<(), GroupError> {
        match self.closed.get(&(id.name.clone(), id.purpose.clone())) {
            Some(&closed) if id.epoch <= closed => Err(GroupError::Closed { group: Box::new(id.clone()), closed }),
            _ => Ok(()),
        }
    }

    /// This epoch of the group is over here, and with it all older ones.
    pub fn close(&mut self, id: &GroupId) {
        let key = (id.name.clone(), id.purpose.clone());
        match self.closed.get_mut(&key) {
            Some(closed) => *closed = id.epoch.max(*closed),
            None => {
                self.closed.insert(key.clone(), id.epoch);
                self.order.push_back(key);
            }
        }
        while self.order.len() > MAX_REMEMBERED {
            if let Some(oldest) = self.order.pop_front() {
                self.closed.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests;
