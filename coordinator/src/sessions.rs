//! Sessions of workers and gateways with the leader: who is connected, what each was told, what it was asked.
//!
//! What it is not: it proposes nothing and keeps no lease (`LeaseTable` does). It holds the sending ends of the sessions
//! and never waits for one: a node that does not read its messages loses its session and begins another.
//!
//! Invariants: a node has one session, the newest; a question has one answer or runs out; everything is bounded.

use std::collections::BTreeMap;

use forge_cluster::api::ClusterLoads;
use forge_shared::cluster::Revision;
use forge_shared::cluster::node::{NodeLoad, NodeSpec, Role};
use forge_shared::cluster::session::{Assignment, NodeDown};
use forge_shared::ids::{NodeId, ServiceName};
use forge_shared::plan::ModelFacts;
use forge_shared::spec::ModelService;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use crate::control::{Duties, Duty};

/// Sessions of one leader.
pub(crate) const MAX_SESSIONS: usize = 8192;
/// Questions without an answer yet.
const MAX_QUESTIONS: usize = 1024;

/// What a worker found out of a model.
pub(crate) type Inspection = Result<Box<ModelFacts>, String>;

/// Why a worker was asked to look at a model.
#[derive(Debug)]
pub(crate) enum Purpose {
    /// For the controller: this service.
    Service { name: ServiceName },
    /// For a dry run that waits.
    DryRun(oneshot::Sender<Inspection>),
}

#[derive(Debug)]
struct Question {
    node: NodeId,
    purpose: Purpose,
    until_ms: u64,
}

#[derive(Debug)]
struct Entry {
    number: u64,
    spec: NodeSpec,
    down: mpsc::Sender<NodeDown>,
    ended: CancellationToken,
    load: NodeLoad,
    heard_ms: u64,
    /// The last assignments that were sent; `None` before the first.
    sent: Option<Vec<Assignment>>,
}

#[derive(Debug, Default)]
struct Inner {
    sessions: BTreeMap<NodeId, Entry>,
    questions: BTreeMap<u64, Question>,
    /// Questions that ended without an answer.
    unanswered: Vec<(NodeId, ServiceName)>,
    /// The state's revision that all workers were told their part of.
    assigned: Option<Revision>,
    next_session: u64,
    next_question: u64,
}

impl Inner {
    /// Ends questions without an answer.
    fn give_up(&mut self, is_over: impl Fn(&Question) -> bool) {
        for (_, question) in self.questions.extract_if(.., |_, question| is_over(question)) {
            if let Purpose::Service { name } = question.purpose {
                self.unanswered.push((question.node, name));
            }
        }
    }
}

/// A session's place in the table.
#[derive(Debug, Clone)]
pub struct Handle {
    pub(crate) node: NodeId,
    pub(crate) number: u64,
    /// Cancelled when the session must end.
    pub(crate) ended: CancellationToken,
}

impl Handle {
    /// Whether the session must end.
    pub fn is_over(&self) -> bool {
        self.ended.is_cancelled()
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Sessions(Mutex<Inner>);

impl Sessions {
    /// Takes a node in; an older session of it ends. `None` where there is no room.
    pub(crate) fn begin(&self, spec: NodeSpec, down: mpsc::Sender<NodeDown>, now_ms: u64) -> Option<Handle> {
        let mut inner = self.0.lock();
        let node = spec.id.clone();
        if inner.sessions.len() >= MAX_SESSIONS && !inner.sessions.contains_key(&node) {
            return None;
        }
        inner.next_session += 1;
        inner.assigned = None;
        let handle = Handle { node: node.clone(), number: inner.next_session, ended: CancellationToken::new() };
        let entry = Entry {
            number: handle.number,
            down,
            ended: handle.ended.clone(),
            load: NodeLoad::default(),
            heard_ms: now_ms,
            sent: None,
            spec,
        };
        let incarnation = entry.spec.incarnation;
        if let Some(old) = inner.sessions.insert(node.clone(), entry) {
            if old.spec.incarnation < incarnation {
                let reason = format!("a newer process joined as {node}: two workers must not share a name, nor an old one go on");
                // Where there is no room for it, the session's end says it too.
                let _ = old.down.try_send(NodeDown::Refused { reason });
            }
            old.ended.cancel();
            inner.give_up(|question| question.node == node);
        }
        Some(handle)
    }

    /// Forgets a session, if it is still the node's newest.
    pub(crate) fn end(&self, handle: &Handle) {
        let mut inner = self.0.lock();
        if inner.sessions.get(&handle.node).is_some_and(|entry| entry.number == handle.number) {
            inner.sessions.remove(&handle.node);
            inner.give_up(|question| question.node == handle.node);
        }
        handle.ended.cancel();
    }

    /// Ends every session, saying where to go.
    pub(crate) fn end_all(&self, leader: Option<String>) {
        let mut inner = self.0.lock();
        for entry in std::mem::take(&mut inner.sessions).into_values() {
            let _ = entry.down.try_send(NodeDown::Moved { leader: leader.clone() });
            entry.ended.cancel();
        }
        inner.questions.clear();
    }

    /// Ends the sessions of nodes for which `verdict` has a last word.
    pub(crate) fn end_where(&self, verdict: impl Fn(&NodeSpec) -> Option<NodeDown>) {
        let mut inner = self.0.lock();
        let mut ended = Vec::new();
        inner.sessions.retain(|node, entry| match verdict(&entry.spec) {
            None => true,
            Some(last) => {
                let _ = entry.down.try_send(last);
                entry.ended.cancel();
                ended.push(node.clone());
                false
            }
        });
        inner.give_up(|question| ended.contains(&question.node));
    }

    /// Notes a heartbeat.
    pub(crate) fn heard(&self, handle: &Handle, load: NodeLoad, now_ms: u64) {
        if let Some(entry) = self.0.lock().sessions.get_mut(&handle.node).filter(|entry| entry.number == handle.number) {
            entry.load = load;
            entry.heard_ms = now_ms;
        }
    }

    /// Tells each worker what it is to run, where that changed. While neither the state nor the sessions do, nothing is
    /// looked at.
    pub(crate) fn assign<'a>(&self, (history, revision): (&str, Revision), duties: impl FnOnce() -> Duties<'a>) {
        let mut inner = self.0.lock();
        if inner.assigned.replace(revision) == Some(revision) {
            return;
        }
        let duties = duties();
        for (node, entry) in inner.sessions.iter_mut().filter(|(_, entry)| entry.spec.role == Role::Worker) {
            let own = duties.at(node);
            let is_told = |sent: &Vec<Assignment>| sent.len() == own.len() && own.iter().zip(sent).all(|(duty, told)| duty.is(told));
            if entry.sent.as_ref().is_some_and(is_told) {
                continue;
            }
            let assignments: Vec<Assignment> = own.iter().map(Duty::assignment).collect();
            let message = NodeDown::Assignments { history: history.to_owned(), revision, assignments: assignments.clone() };
            match entry.down.try_send(message) {
                Ok(()) => entry.sent = Some(assignments),
                Err(_) => {
                    tracing::warn!(%node, "a worker does not read its assignments: its session ends");
                    entry.ended.cancel();
                }
            }
        }
    }

    /// Asks a worker to look at a model; its answer counts for `within_ms`. False where it has no session, or where as many
    /// questions are open as may be.
    pub(crate) fn ask(&self, node: &NodeId, service: ModelService, purpose: Purpose, within_ms: u64, now_ms: u64) -> bool {
        let mut inner = self.0.lock();
        let is_full = inner.questions.len() >= MAX_QUESTIONS;
        let message = |number| NodeDown::Inspect { number, service: Box::new(service) };
        let number = inner.next_question;
        let is_sent = inner.sessions.get(node).is_some_and(|entry| !is_full && entry.down.try_send(message(number)).is_ok());
        if !is_sent {
            if let Purpose::Service { name } = purpose {
                inner.unanswered.push((node.clone(), name));
            }
            return false;
        }
        inner.next_question += 1;
        inner.questions.insert(number, Question { node: node.clone(), purpose, until_ms: now_ms.saturating_add(within_ms) });
        true
    }

    /// A worker's answer: why it was asked, if it was and in time.
    pub(crate) fn answered(&self, handle: &Handle, number: u64, now_ms: u64) -> Option<Purpose> {
        let mut inner = self.0.lock();
        let is_asked = inner.questions.get(&number).is_some_and(|question| question.node == handle.node && question.until_ms > now_ms);
        if is_asked { inner.questions.remove(&number).map(|question| question.purpose) } else { None }
    }

    /// Questions about services that ended without an answer since the last call: of whom, about what.
    pub(crate) fn take_unanswered(&self, now_ms: u64) -> Vec<(NodeId, ServiceName)> {
        let mut inner = self.0.lock();
        inner.give_up(|question| question.until_ms <= now_ms);
        std::mem::take(&mut inner.unanswered)
    }

    /// Workers with a session, those with the fewest questions first.
    pub(crate) fn workers(&self) -> Vec<NodeId> {
        let inner = self.0.lock();
        let asked = |node: &NodeId| inner.questions.values().filter(|question| question.node == *node).count();
        let workers = inner.sessions.values().filter(|entry| entry.spec.role == Role::Worker).map(|entry| entry.spec.id.clone());
        let mut workers: Vec<_> = workers.map(|node| (asked(&node), node)).collect();
        workers.sort();
        workers.into_iter().map(|(_, node)| node).collect()
    }

    /// Sessions of a role.
    pub(crate) fn count(&self, role: Role) -> usize {
        self.0.lock().sessions.values().filter(|entry| entry.spec.role == role).count()
    }

    /// What every node last said of itself, by name.
    pub(crate) fn loads(&self, now_ms: u64) -> ClusterLoads {
        let inner = self.0.lock();
        let load = |entry: &Entry| {
            let silent_ms = now_ms.saturating_sub(entry.heard_ms);
            (entry.spec.clone(), entry.load.clone(), silent_ms)
        };
        let mut nodes: Vec<_> = inner.sessions.values().map(load).collect();
        nodes.sort_by(|(left, ..), (right, ..)| left.id.cmp(&right.id));
        ClusterLoads { nodes }
    }
}

#[cfg(test)]
mod tests {
    use forge_shared::ids::Incarnation;
    use forge_shared::spec::ModelServiceSpec;

    use super::*;

    fn spec(id: &str, incarnation: u64) -> NodeSpec {
        NodeSpec {
            id: id.into(),
            role: Role::Worker,
            incarnation: Incarnation(incarnation),
            version: "0.1.0".into(),
            level: forge_shared::version::LEVEL,
            address: "127.0.0.1:7100".into(),
            metrics_address: String::new(),
            data_plane: None,
            devices: Vec::new(),
        }
    }

    fn begin(sessions: &Sessions, id: &str, incarnation: u64) -> (Handle, mpsc::Receiver<NodeDown>) {
        let (down, received) = mpsc::channel(4);
        (sessions.begin(spec(id, incarnation), down, 0).expect("there is room"), received)
    }

    fn service() -> ModelService {
        ModelService::new("s", ModelServiceSpec::default())
    }

    #[tokio::test]
    async fn a_newer_process_of_the_same_name_ends_the_older_one() {
        let sessions = Sessions::default();
        let (old, mut old_down) = begin(&sessions, "a", 1);
        let (new, _new_down) = begin(&sessions, "a", 2);
        assert!(old.ended.is_cancelled() && !new.ended.is_cancelled());
        assert!(matches!(old_down.try_recv(), Ok(NodeDown::Refused { reason }) if reason.contains("newer")));
        sessions.end(&old);
        assert_eq!(sessions.workers(), [NodeId::from("a")], "the old one's end does not take the new one along");
    }

    #[tokio::test]
    async fn the_same_process_may_begin_again() {
        let sessions = Sessions::default();
        let (old, mut old_down) = begin(&sessions, "a", 1);
        let _new = begin(&sessions, "a", 1);
        assert!(old.ended.is_cancelled());
        assert!(old_down.try_recv().is_err(), "it is not refused");
    }

    #[tokio::test]
    async fn assignments_are_sent_when_they_change_and_a_deaf_worker_loses_its_session() {
        let sessions = Sessions::default();
        let (handle, mut down) = begin(&sessions, "a", 1);
        sessions.assign(("g", Revision(1)), Duties::default);
        sessions.assign(("g", Revision(2)), Duties::default);
        assert!(matches!(down.try_recv(), Ok(NodeDown::Assignments { revision: Revision(1), .. })));
        assert!(down.try_recv().is_err(), "nothing changed");
        sessions.assign(("g", Revision(2)), || unreachable!("the state is as it was"));
        let (_other, mut other_down) = begin(&sessions, "b", 1);
        sessions.assign(("g", Revision(2)), Duties::default);
        assert!(matches!(other_down.try_recv(), Ok(NodeDown::Assignments { .. })), "a new session is told in the same state");
        assert!(down.try_recv().is_err(), "and nobody else");
        let (node, wish) = (NodeId::from("a"), service());
        let one = |epoch: u64| {
            vec![forge_shared::plan::Plan {
                replica: forge_shared::ids::ReplicaId { service: "s".into(), index: 0 },
                epoch: forge_shared::ids::Epoch(epoch),
                max_model_len: 1,
                block_size: 1,
                kv_blocks: 1,
                kv_cache_dtype: Default::default(),
                max_step_tokens: 1,
                max_batch_size: 1,
                ranks: Vec::new(),
            }]
        };
        for epoch in 1..=5 {
            let plans = one(epoch);
            sessions.assign(("g", Revision(2 + epoch)), || Duties::of_one(&node, &plans, &wish));
        }
        assert!(handle.ended.is_cancelled(), "four lie unread, the fifth found no room");
    }

    #[tokio::test]
    async fn questions_are_asked_once_and_answered_by_whom_they_were_put_to() {
        let sessions = Sessions::default();
        let (a, mut down) = begin(&sessions, "a", 1);
        let (b, _b_down) = begin(&sessions, "b", 1);
        let purpose = || Purpose::Service { name: "s".into() };
        let now = 1_000;
        let within = 5_000;
        assert!(sessions.ask(&a.node, service(), purpose(), within, now));
        let Ok(NodeDown::Inspect { number, .. }) = down.try_recv() else { panic!("it was asked") };
        assert!(sessions.answered(&b, number, now).is_none(), "b was not asked");
        assert!(matches!(sessions.answered(&a, number, now), Some(Purpose::Service { .. })));
        assert!(sessions.answered(&a, number, now).is_none(), "one answer");
        assert!(sessions.take_unanswered(now).is_empty());
        assert!(!sessions.ask(&NodeId::from("c"), service(), purpose(), within, now), "it has no session");
        assert!(sessions.ask(&b.node, service(), purpose(), within, now));
        assert!(sessions.ask(&a.node, service(), purpose(), within * 9, now));
        let names = |node: &str| (NodeId::from(node), ServiceName::from("s"));
        assert_eq!(sessions.take_unanswered(now + within * 2), [names("c"), names("b")], "b's time is over");
        sessions.end(&a);
        assert_eq!(sessions.take_unanswered(now), [names("a")], "with the session, its questions end");
    }

    #[tokio::test]
    async fn the_end_of_leadership_says_where_to_go() {
        let sessions = Sessions::default();
        let (handle, mut down) = begin(&sessions, "a", 1);
        sessions.end_all(Some("c2:7000".into()));
        assert!(handle.ended.is_cancelled());
        assert!(matches!(down.try_recv(), Ok(NodeDown::Moved { leader: Some(leader) }) if leader == "c2:7000"));
        assert!(sessions.workers().is_empty());
    }
}
