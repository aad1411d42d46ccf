//! Who raft's messages go to and come from: names and addresses of members, and certificates that fit them.
//!
//! What it is not: it carries nothing; [`crate::raft::transport`] does.
//!
//! Invariants: a peer is dialled under the name and address that the log gives its id, and believed only with a
//! coordinator's certificate of that name; it speaks for its own id alone.

use std::collections::HashMap;
use std::sync::Arc;

use forge_cluster::tls::{ChannelOptions, Peer, PeerName, SharedCredentials, channel};
use forge_proto::raft::raft_server::RaftServer;
use forge_shared::cluster::node::Role;
use futures::FutureExt;
use parking_lot::RwLock;
use tonic::{Request, Status};

use crate::coordinator::Coordinator;
use crate::member_file::MemberFile;
use crate::raft::PeerTransport;
use crate::raft::transport::{Connector, GrpcTransport, RaftService, SenderCheck};

/// Names and addresses of members by id. Members that the log names; and those that were there when this one came, for it
/// must answer them before its log says who they are.
type Book = Arc<RwLock<HashMap<u64, (String, String)>>>;

/// One coordinator's links to the others.
pub(crate) struct Peers {
    group_id: String,
    book: Book,
    transport: Arc<GrpcTransport>,
}

impl Peers {
    /// Links that are dialled from the current runtime.
    pub(crate) fn new(member: &MemberFile, credentials: &SharedCredentials) -> Peers {
        let known = member.peers.iter().map(|peer| (peer.id, (peer.name.clone(), peer.address.clone())));
        let book: Book = Arc::new(RwLock::new(known.collect()));
        let connector = connector(book.clone(), credentials.clone());
        let transport = GrpcTransport::new(member.group_id.clone(), connector, tokio::runtime::Handle::current());
        Peers { group_id: member.group_id.clone(), book, transport }
    }

    /// The sending end.
    pub(crate) fn transport(&self) -> Arc<dyn PeerTransport> {
        self.transport.clone()
    }

    /// The receiving end.
    pub(crate) fn service(&self, coordinator: &Coordinator) -> RaftServer<RaftService> {
        RaftService::server(self.group_id.clone(), coordinator.raft().clone(), sender_check(self.book.clone()))
    }

    /// Follows the log's list of members, until the coordinator stops.
    pub(crate) fn follow(&self, coordinator: &Coordinator) {
        self.transport.attach(coordinator.raft().clone());
        let (book, transport, coordinator) = (self.book.clone(), self.transport.clone(), coordinator.clone());
        let mut changes = coordinator.0.replicated.changes();
        coordinator.clone().0.tasks.spawn(async move {
            loop {
                changes.borrow_and_update();
                learn(&book, &transport, &coordinator);
                tokio::select! {
                    () = coordinator.0.stop.cancelled() => return,
                    changed = changes.changed() => if changed.is_err() { return },
                }
            }
        });
    }
}

fn learn(book: &Book, transport: &GrpcTransport, coordinator: &Coordinator) {
    let state = coordinator.0.replicated.read();
    let mut book = book.write();
    for (id, member) in state.members() {
        let now = (member.name.clone(), member.address.clone());
        // A member that moved is dialled anew.
        if book.insert(*id, now.clone()).is_some_and(|before| before != now) {
            transport.forget(*id);
        }
    }
}

fn connector(book: Book, credentials: SharedCredentials) -> Connector {
    Arc::new(move |to| {
        let known = book.read().get(&to).cloned();
        let made = known.ok_or_else(|| format!("the address of member {to} is not known")).and_then(|(name, address)| {
            let peer = PeerName::One(Role::Coordinator, name);
            channel(&address, &peer, &credentials, ChannelOptions::default()).map_err(|error| error.to_string())
        });
        futures::future::ready(made).boxed()
    })
}

fn sender_check(book: Book) -> SenderCheck {
    Arc::new(move |extensions| {
        let request = Request::from_parts(Default::default(), extensions.clone(), ());
        let caller = Peer::require(&request, &[Role::Coordinator]).map_err(|error| Status::permission_denied(error.to_string()))?;
        let id = book.read().iter().find(|(_, (name, _))| *name == caller.name).map(|(id, _)| *id);
        id.map(Some).ok_or_else(|| Status::permission_denied(format!("{caller} is no member that is known here")))
    })
}
