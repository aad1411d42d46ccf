//! Who raft's messages go to and come from: names and addresses of members, and certificates that fit them.
//!
//! What it is not: it carries nothing; [`crate::raft::transport`] does.
//!
//! Invariants: a peer is dialled under the name and address that the log gives its number; it is believed as long as it
//! belongs to the group, only with a coordinator's certificate of that name, and speaks for its own number alone. One that
//! was removed is told so, and ends.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use forge_cluster::api::ClusterApi;
use forge_cluster::client::RemoteCluster;
use forge_cluster::tls::{ChannelOptions, Peer, PeerName, SharedCredentials, channel};
use forge_proto::raft::raft_server::RaftServer;
use forge_shared::cluster::command::{CommandError, MemberRecord};
use forge_shared::cluster::node::Role;
use forge_shared::version::Build;
use futures::FutureExt;
use parking_lot::RwLock;
use tonic::{Request, Status};

use crate::coordinator::Coordinator;
use crate::member_file::MemberFile;
use crate::raft::PeerTransport;
use crate::raft::transport::{Connector, GrpcTransport, RaftService, SenderCheck, not_a_member};

/// For the others to say who a member is.
const ASK_WITHIN: Duration = Duration::from_secs(1);

/// Who belongs to the group, as far as this member knows.
#[derive(Debug)]
struct Book {
    /// This member.
    own_id: u64,
    /// Those that were there when this one came: it must answer them before its log says who they are.
    first: BTreeMap<u64, MemberRecord>,
    /// The log's list as applied here.
    listed: BTreeMap<u64, MemberRecord>,
}

impl Book {
    fn new(member: &MemberFile) -> Book {
        let first = member.peers.iter().map(|peer| (peer.id, peer.clone())).collect();
        Book { own_id: member.member_id, first, listed: BTreeMap::new() }
    }

    /// A member's name and address. Members are written into the log before they belong to the group: once this one is
    /// there, all are that came before it, and those missing have been removed.
    fn get(&self, id: u64) -> Option<&MemberRecord> {
        let first = || self.first.get(&id).filter(|_| !self.listed.contains_key(&self.own_id));
        self.listed.get(&id).or_else(first)
    }

    /// Of all others that belong to the group.
    fn addresses(&self) -> Vec<String> {
        let known = self.first.keys().chain(self.listed.keys()).filter(|&&id| id != self.own_id).filter_map(|&id| self.get(id));
        let addresses: BTreeSet<String> = known.map(|member| member.address.clone()).filter(|address| !address.is_empty()).collect();
        addresses.into_iter().collect()
    }

    /// Takes the log's list; members that are to be dialled anew, or no more.
    fn learn(&mut self, listed: &BTreeMap<u64, MemberRecord>) -> Vec<u64> {
        let known: BTreeMap<u64, MemberRecord> =
            self.first.keys().chain(self.listed.keys()).filter_map(|&id| Some((id, self.get(id)?.clone()))).collect();
        self.listed.clone_from(listed);
        known.into_iter().filter(|(id, before)| self.get(*id) != Some(before)).map(|(id, _)| id).collect()
    }

    /// Whether who has a coordinator's certificate of this name may speak as this member.
    fn check(&self, name: &str, id: u64, is_removed: impl FnOnce(u64) -> bool) -> Result<(), Status> {
        match self.get(id) {
            Some(member) if member.name == name => Ok(()),
            Some(member) => {
                Err(Status::permission_denied(format!("member {id} is {}, and the certificate is that of {name}", member.name)))
            }
            None if is_removed(id) => Err(not_a_member(id)),
            // This member was away when it was let in, and learns of it from its messages.
            None => Ok(()),
        }
    }
}

/// One coordinator's links to the others.
pub(crate) struct Peers {
    group_id: String,
    book: Arc<RwLock<Book>>,
    transport: Arc<GrpcTransport>,
}

impl Peers {
    /// Links that are dialled from the current runtime.
    pub(crate) fn new(member: &MemberFile, credentials: &SharedCredentials, build: Build) -> Peers {
        let book = Arc::new(RwLock::new(Book::new(member)));
        let connector = connector(book.clone(), credentials.clone());
        let transport = GrpcTransport::new(member.group_id.clone(), build, connector, tokio::runtime::Handle::current());
        Peers { group_id: member.group_id.clone(), book, transport }
    }

    /// Ends when this member learns that it was removed from the group: from the group's list, or from a peer that takes
    /// its messages no more.
    pub(crate) fn removal(&self, coordinator: &Coordinator) -> impl Future<Output = ()> + use<> {
        let told = self.transport.removed().clone();
        let mut status = coordinator.raft().status();
        async move {
            let mut belonged = false;
            let left = async {
                loop {
                    let belongs = {
                        let now = status.borrow_and_update();
                        now.members.iter().any(|member| member.id == now.member_id)
                    };
                    // One that is being let in is not on the list yet.
                    if belonged && !belongs {
                        return;
                    }
                    belonged |= belongs;
                    if status.changed().await.is_err() {
                        std::future::pending::<()>().await;
                    }
                }
            };
            tokio::select! {
                () = told.cancelled() => {}
                () = left => {}
            }
        }
    }

    /// The sending end.
    pub(crate) fn transport(&self) -> Arc<dyn PeerTransport> {
        self.transport.clone()
    }

    /// The receiving end.
    pub(crate) fn service(&self, coordinator: &Coordinator) -> RaftServer<RaftService> {
        let check = sender_check(self.book.clone(), coordinator.clone());
        RaftService::server(self.group_id.clone(), coordinator.raft().clone(), check)
    }

    /// Follows the log's list of members, until the coordinator stops.
    pub(crate) fn follow(&self, coordinator: &Coordinator) {
        self.transport.attach(coordinator.raft().clone());
        let (book, transport, coordinator) = (self.book.clone(), self.transport.clone(), coordinator.clone());
        let mut changes = coordinator.0.replicated.changes();
        coordinator.clone().0.tasks.spawn(async move {
            loop {
                changes.borrow_and_update();
                let changed = book.write().learn(coordinator.0.replicated.read().members());
                changed.into_iter().for_each(|id| transport.forget(id));
                tokio::select! {
                    () = coordinator.0.stop.cancelled() => return,
                    changed = changes.changed() => if changed.is_err() { return },
                }
            }
        });
    }
}

fn connector(book: Arc<RwLock<Book>>, credentials: SharedCredentials) -> Connector {
    Arc::new(move |to| {
        let (known, others) = {
            let book = book.read();
            (book.get(to).cloned(), book.addresses())
        };
        let credentials = credentials.clone();
        async move {
            let member = match known {
                Some(member) => member,
                None => ask_for(to, &others, &credentials).await?,
            };
            let peer = PeerName::One(Role::Coordinator, member.name);
            channel(&member.address, &peer, &credentials, ChannelOptions::default()).map_err(|error| error.to_string())
        }
        .boxed()
    })
}

/// Who a member is, of the others: one that was let in while this one was away may lead, and what the log says of it comes
/// only once it is answered.
async fn ask_for(id: u64, others: &[String], credentials: &SharedCredentials) -> Result<MemberRecord, String> {
    let unknown = |why: String| format!("the address of member {id} is not known: {why}");
    let group = RemoteCluster::new(others, credentials).map_err(|error| unknown(error.to_string()))?;
    let status = group.status(ASK_WITHIN).await.map_err(|error| unknown(error.to_string()))?;
    let member = status.members.into_iter().find(|member| member.id == id && !member.address.is_empty());
    let member = member.ok_or_else(|| unknown("the others do not know it either".into()))?;
    let build = Build { version: member.version, level: member.level };
    Ok(MemberRecord::new(id, &member.name, &member.address, build))
}

fn sender_check(book: Arc<RwLock<Book>>, coordinator: Coordinator) -> SenderCheck {
    Arc::new(move |extensions, build| {
        let request = Request::from_parts(Default::default(), extensions.clone(), ());
        let caller = Peer::require(&request, &[Role::Coordinator]).map_err(|error| Status::permission_denied(error.to_string()))?;
        let (book, coordinator) = (book.clone(), coordinator.clone());
        Ok(Box::new(move |id| {
            let replicated = &coordinator.0.replicated;
            let is_removed = |id| replicated.read().is_removed_member(id);
            book.read().check(&caller.name, id, is_removed)?;
            let refused = |error: CommandError| Status::failed_precondition(error.to_string());
            replicated.read().check_build(Role::Coordinator, &caller.name, &build).map_err(refused)?;
            coordinator.hear(id, &build);
            Ok(())
        }))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(id: u64, name: &str) -> (u64, MemberRecord) {
        (id, MemberRecord::new(id, name, &format!("{name}-{id}:7000"), Build::default()))
    }

    fn book(own_id: u64, first: &[(u64, MemberRecord)]) -> Book {
        let peers = first.iter().map(|(_, member)| member.clone()).collect();
        Book::new(&MemberFile { member_id: own_id, group_id: "g".into(), is_founder: false, peers })
    }

    #[test]
    fn a_member_that_came_under_a_name_used_before_is_believed_and_the_one_before_is_not() {
        let mut book = book(3, &[member(1, "c1"), member(2, "c2")]);
        let gone = |id| id == 2;
        assert!(book.check("c2", 2, |_| false).is_ok());
        let list = BTreeMap::from([member(1, "c1"), member(3, "c3"), member(57, "c2")]);
        assert_eq!(book.learn(&list), [2], "it is dialled no more");
        assert!(book.check("c2", 57, gone).is_ok());
        assert!(book.check("c2", 2, gone).expect_err("removed").message().contains("removed"));
        assert!(book.check("c1", 57, gone).expect_err("another's number").message().contains("certificate"));
        assert!(book.get(2).is_none() && book.get(57).is_some());
    }

    #[test]
    fn one_that_comes_hears_those_before_it_until_its_log_has_named_all() {
        let first = [member(1, "c1"), member(57, "c2")];
        let mut book = book(60, &first);
        let mut list = BTreeMap::new();
        // The log's beginning, in which an earlier process had the name.
        for (id, record) in [member(1, "c1"), member(2, "c2")] {
            list.insert(id, record);
            assert!(book.learn(&list).is_empty());
            assert!(book.check("c2", 57, |_| false).is_ok());
            assert_eq!(book.get(57), Some(&first[1].1));
        }
        let list = BTreeMap::from([member(1, "c1"), member(60, "c3")]);
        assert_eq!(book.learn(&list), [2, 57], "what the whole list lacks is gone");
    }

    #[test]
    fn who_was_let_in_while_this_one_was_away_is_heard() {
        let mut book = book(1, &[]);
        book.learn(&BTreeMap::from([member(1, "c1"), member(2, "c2")]));
        assert!(book.check("c4", 90, |_| false).is_ok());
    }

    #[test]
    fn one_that_moved_is_dialled_anew() {
        let mut book = book(1, &[]);
        let mut list = BTreeMap::from([member(1, "c1"), member(2, "c2")]);
        assert!(book.learn(&list).is_empty());
        assert!(book.learn(&list).is_empty());
        list.entry(2).and_modify(|member| member.address = "elsewhere:7000".into());
        assert_eq!(book.learn(&list), [2]);
    }
}
