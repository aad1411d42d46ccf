//! How a group comes together: connect, open streams to higher ranks, take those of lower ranks, wait for welcomes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use forge_shared::ids::NodeId;

use super::{Arrival, GroupSpec, Shared, State, Underway, abort_stream, refuse};
use crate::frame::{Head, Kind};
use crate::group::{Group, GroupError, Membership};
use crate::hello::{Hello, Lane};
use crate::memory;
use crate::mesh::{Mesh, Parts, describe};
use crate::quic::Urgency;
use crate::stream::Stream;
use crate::transport::{Carrier, Open};
use crate::{NetError, Result};

/// How often a rank that waits for others looks whether one has refused it.
const LOOK: Duration = Duration::from_millis(50);

/// A group on its way.
struct Forming<'a> {
    shared: &'a Shared,
    spec: &'a GroupSpec,
    group: Group,
    lanes: &'static [Lane],
    until: Instant,
    /// Per rank, its streams in the order of lanes.
    streams: Vec<Vec<Stream>>,
    carriers: Vec<Option<Carrier>>,
    registered: Registered<'a>,
}

/// A group's entry among those that are being formed, until it is dropped.
struct Registered<'a> {
    shared: &'a Shared,
    number: u64,
}

impl<'a> Registered<'a> {
    fn new(shared: &'a Shared, spec: &GroupSpec) -> Self {
        let mut state = shared.state.lock();
        let number = state.next_forming;
        state.next_forming += 1;
        let nodes = spec.members.iter().map(|member| member.node.clone()).collect();
        state.forming.insert(number, Underway { id: spec.id.clone(), rank: spec.rank, nodes, streams: Vec::new(), over: None });
        Registered { shared, number }
    }

    /// Why the group is over, if another member has ended it.
    fn over(&self, state: &State) -> Option<String> {
        state.forming.get(&self.number)?.over.clone()
    }

    /// A stream that ends with the group.
    fn add(&self, stream: &Stream) {
        let stream = (Arc::downgrade(&stream.inbox), Arc::downgrade(&stream.wire));
        let over = {
            let mut state = self.shared.state.lock();
            let over = self.over(&state);
            if let Some(underway) = state.forming.get_mut(&self.number).filter(|_| over.is_none()) {
                underway.streams.push(stream.clone());
            }
            over
        };
        if let Some(reason) = over {
            abort_stream(&stream, &reason);
        }
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.shared.state.lock().forming.remove(&self.number);
    }
}

impl Shared {
    /// Forms a group: streams for messages and rows between pairs, and with `collective` those for the whole group.
    pub(crate) fn form(self: &Arc<Self>, spec: GroupSpec, collective: bool) -> Result<Arc<Mesh>> {
        let lanes: &[Lane] = if collective { &[Lane::Group, Lane::Pair] } else { &[Lane::Pair] };
        let membership = Membership {
            id: spec.id.clone(),
            nodes: spec.members.iter().map(|member| member.node.clone()).collect(),
            rank: spec.rank,
            agreement: spec.agreement.clone(),
        };
        let group = Group::new(membership, lanes.len())?;
        self.state.lock().epochs.check(&spec.id)?;
        if spec.members[spec.rank].node != self.node {
            return Err(GroupError::Stranger { group: Box::new(spec.id), node: self.node.clone(), rank: spec.rank }.into());
        }
        let size = spec.members.len();
        let mut forming = Forming {
            shared: self,
            spec: &spec,
            group,
            lanes,
            until: Instant::now() + spec.form_timeout,
            streams: (0..size).map(|_| Vec::new()).collect(),
            carriers: vec![None; size],
            registered: Registered::new(self, &spec),
        };
        forming.connect()?;
        forming.open()?;
        forming.take()?;
        forming.wait_for_welcomes()?;
        let Forming { group, streams, carriers, registered, .. } = forming;
        let epoch = spec.id.epoch;
        let mesh = Mesh::new(Arc::downgrade(self), Parts { spec: spec.clone(), group, lanes, streams, carriers });
        let lost = {
            let mut state = self.state.lock();
            // From here on an abort finds the mesh; one that came before is noted.
            if let Some(reason) = registered.over(&state) {
                drop(state);
                return Err(NetError::Aborted { epoch, reason });
            }
            state.meshes.retain(|mesh| mesh.strong_count() > 0);
            state.meshes.push(Arc::downgrade(&mesh));
            // A connection that ended since is not heard of again.
            mesh.carriers().any(Carrier::is_lost) || state.stopped
        };
        if lost {
            mesh.abort("a member was lost while the group was formed");
        }
        Ok(mesh)
    }
}

impl Forming<'_> {
    fn peers(&self) -> impl Iterator<Item = usize> + use<> {
        let own = self.spec.rank;
        (0..self.spec.members.len()).filter(move |&rank| rank != own)
    }

    fn node(&self, rank: usize) -> &NodeId {
        &self.spec.members[rank].node
    }

    fn aborted(&self, reason: String) -> NetError {
        NetError::Aborted { epoch: self.spec.id.epoch, reason }
    }

    fn timeout(&self, missing: usize) -> NetError {
        let GroupSpec { rank, members, form_timeout, .. } = self.spec;
        NetError::Timeout { operation: "form", rank: *rank, missing, size: members.len(), waited: *form_timeout }
    }

    /// A connection to every other node: of two, the one with the lower id dials.
    fn connect(&mut self) -> Result<()> {
        for rank in self.peers() {
            let node = self.node(rank).clone();
            if node != self.shared.node {
                self.carriers[rank] = Some(if self.shared.node < node { self.dial(rank, &node)? } else { self.wait_for_peer(&node)? });
            }
        }
        Ok(())
    }

    fn dial(&self, rank: usize, node: &NodeId) -> Result<Carrier> {
        // Under this lock for one node at a time, so that two groups do not connect to it twice.
        let dialing = self.shared.dialing(node);
        let _dialing = dialing.try_lock_until(self.until).ok_or_else(|| self.timeout(1))?;
        if let Some(carrier) = self.shared.live_peer(&mut self.shared.state.lock(), node) {
            return Ok(carrier);
        }
        let address = self.spec.members[rank].address.ok_or_else(|| GroupError::Description {
            group: Box::new(self.spec.id.clone()),
            field: "address",
            value: format!("missing for node {node}"),
            remedy: "name the address of its data plane",
        })?;
        self.shared.endpoint.dial(node, address, self.until)
    }

    fn wait_for_peer(&self, node: &NodeId) -> Result<Carrier> {
        let mut state = self.shared.state.lock();
        loop {
            if let Some(carrier) = self.shared.live_peer(&mut state, node) {
                return Ok(carrier);
            }
            if let Some(reason) = self.registered.over(&state) {
                return Err(self.aborted(reason));
            }
            if state.stopped || self.shared.changed.wait_until(&mut state, self.until).timed_out() {
                return Err(self.timeout(1));
            }
        }
    }

    /// Streams to the ranks above this one, each with its hello.
    fn open(&mut self) -> Result<()> {
        let GroupSpec { id, rank: from, members, agreement, urgent, .. } = self.spec;
        for to in self.peers().filter(|&rank| self.group.opens(rank)) {
            for &lane in self.lanes {
                let hello = Hello { group: id.clone(), lane, from: *from, to, size: members.len(), agreement: agreement.clone() };
                let stream = match &self.carriers[to] {
                    Some(carrier) => {
                        let urgency = if *urgent { Urgency::Control } else { Urgency::Bulk };
                        let open = Open { urgency, epoch: id.epoch, until: self.until };
                        let opened = self.shared.endpoint.open(carrier, &members[to], open);
                        let stream = opened.map_err(|failure| describe(failure, "form", self.spec, to))?;
                        self.registered.add(&stream);
                        let sent = stream.send(Head::bytes(Kind::Hello), &hello.encode(), self.until);
                        sent.map_err(|failure| describe(failure, "form", self.spec, to))?;
                        stream
                    }
                    None => {
                        let (ours, theirs) = memory::pair(&self.shared.node, id.epoch);
                        self.registered.add(&ours);
                        self.shared.arrived(theirs, hello);
                        ours
                    }
                };
                self.streams[to].push(stream);
            }
        }
        Ok(())
    }

    /// Takes the streams that lower ranks open to this one.
    fn take(&mut self) -> Result<()> {
        let lower = self.spec.rank;
        // Lanes may come in another order than they were opened.
        let mut taken: Vec<Vec<(Lane, Stream)>> = (0..lower).map(|_| Vec::new()).collect();
        while taken.iter().any(|streams| streams.len() < self.lanes.len()) {
            let Some(Arrival { stream, hello, .. }) = self.next_arrival(&taken)? else { continue };
            // The peer has tried again: the stream that was taken is none any more.
            let stale = |(lane, old): &(Lane, Stream)| *lane == hello.lane && old.node == stream.node && old.has_failed();
            if let Some(at) = taken[hello.from].iter().position(stale) {
                taken[hello.from].remove(at);
                self.group.left(hello.from);
            }
            let lane_known = self.lanes.contains(&hello.lane) && taken[hello.from].iter().all(|(lane, _)| *lane != hello.lane);
            let checked = if lane_known {
                self.group.hello(&stream.node, &hello)
            } else {
                Err(GroupError::Twice { group: Box::new(self.spec.id.clone()), rank: hello.from })
            };
            match checked {
                Ok(()) => {
                    self.registered.add(&stream);
                    let welcome = stream.send(Head::bytes(Kind::Welcome), &[], self.until);
                    welcome.map_err(|failure| describe(failure, "form", self.spec, hello.from))?;
                    stream.wire.resume();
                    taken[hello.from].push((hello.lane, stream));
                }
                Err(error) => {
                    refuse(&stream, &error.to_string());
                    // A stranger changes nothing; a member that brings something else does not come back with the right thing.
                    if matches!(error, GroupError::Disagreement { .. }) {
                        return Err(error.into());
                    }
                }
            }
        }
        for (rank, mut streams) in taken.into_iter().enumerate() {
            streams.sort_by_key(|(lane, _)| *lane);
            self.streams[rank] = streams.into_iter().map(|(_, stream)| stream).collect();
        }
        Ok(())
    }

    fn next_arrival(&self, taken: &[Vec<(Lane, Stream)>]) -> Result<Option<Arrival>> {
        let spec = self.spec;
        let meant = |hello: &Hello| hello.group == spec.id && hello.to == spec.rank && hello.from < spec.rank;
        let mut state = self.shared.state.lock();
        if let Some(reason) = self.registered.over(&state) {
            return Err(self.aborted(reason));
        }
        let State { arrivals, stopped, .. } = &mut *state;
        if let Some(at) = arrivals.iter().position(|arrival| meant(&arrival.hello) && !arrival.is_over()) {
            return Ok(Some(arrivals.remove(at)));
        }
        if *stopped || Instant::now() >= self.until {
            return Err(self.timeout(taken.iter().filter(|streams| streams.len() < self.lanes.len()).count()));
        }
        self.shared.changed.wait_until(&mut state, self.until.min(Instant::now() + LOOK));
        drop(state);
        // Someone who has refused or died makes waiting for the others useless.
        for rank in self.peers().filter(|&rank| self.group.opens(rank)) {
            let failed = self.streams[rank].iter().find_map(|stream| stream.inbox.failure());
            if let Some(failure) = failed {
                return Err(self.read_refusal(rank).unwrap_or_else(|| describe(failure, "form", spec, rank)));
            }
        }
        if let Some(carrier) = self.carriers.iter().flatten().find(|carrier| carrier.is_lost()) {
            let node = carrier.peer().unwrap_or_else(|| NodeId(String::new()));
            let rank = spec.members.iter().position(|member| member.node == node).unwrap_or_default();
            return Err(NetError::PeerLost { operation: "form", node, rank, reason: "its connection ended".to_owned() });
        }
        Ok(None)
    }

    /// What a peer said before it ended its stream, if it refused.
    fn read_refusal(&self, rank: usize) -> Option<NetError> {
        self.streams[rank].iter().find_map(|stream| match stream.inbox.take() {
            Some(Ok((frame, _))) if frame.head.kind == Kind::Refuse => Some(self.refused(rank, &frame.body)),
            _ => None,
        })
    }

    fn refused(&self, rank: usize, body: &[u8]) -> NetError {
        let reason = String::from_utf8_lossy(body).into_owned();
        NetError::Refused { node: self.node(rank).clone(), rank, reason }
    }

    fn wait_for_welcomes(&mut self) -> Result<()> {
        for rank in self.peers().filter(|&rank| rank > self.spec.rank) {
            for lane in 0..self.lanes.len() {
                let frame = self.streams[rank][lane].recv(self.until);
                let frame = frame.map_err(|failure| describe(failure, "form", self.spec, rank))?;
                match frame.head.kind {
                    Kind::Welcome => self.group.welcomed(rank)?,
                    Kind::Refuse => return Err(self.refused(rank, &frame.body)),
                    other => return Err(self.refused(rank, format!("it answers with {other:?}").as_bytes())),
                }
            }
        }
        Ok(())
    }
}
