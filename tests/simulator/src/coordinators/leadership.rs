//! Leading: when a coordinator begins and ends to lead, and the leader's passes. Decisions are `Leading`'s.

use std::collections::{BTreeMap, BTreeSet};

use forge_coordinator::CoordinatorError;
use forge_coordinator::leading::{LeaderOptions, Leading, changed_records, level_to_raise};
use forge_coordinator::raft::RaftError;
use forge_coordinator::raft::member::{Answer, RequestId};
use forge_coordinator::replicated::decode_reply;
use forge_shared::cluster::command::MemberRecord;
use forge_shared::version::Build;

use super::{CLUSTER, Coordinator, Out, Process, Purpose, envelope};
use crate::host::Host;
use crate::message::Timer;
use crate::world::World;

/// Length of a lease and between heartbeats, milliseconds.
pub const LEASE_MS: u64 = 3_000;
const HEARTBEAT_MS: u64 = 500;
/// Between two passes without news, and after news, milliseconds.
const PASS_MS: u64 = 100;
const PASS_SOON_MS: u64 = 10;
/// For one of the leader's own commands, milliseconds.
pub const PROPOSE_WITHIN_MS: u64 = 2_000;

/// What a leader's shell holds.
pub struct Leader {
    pub core: Leading,
    next_pass_ms: u64,
    /// Commands of the last pass without an answer, and until when they are waited for.
    open: BTreeSet<RequestId>,
    open_until_ms: u64,
    seen_revision: u64,
    /// A session began.
    pub is_woken: bool,
}

impl Coordinator {
    /// Begins or ends to lead, as raft says.
    pub(super) fn follow(&mut self, world: &mut World) {
        let Some(process) = &mut self.process else { return };
        let core = process.member.core();
        let term = core.term();
        let leads = core.is_leader() && !process.member.is_full();
        if term != process.known_term {
            process.known_term = term;
            if leads {
                world.say(self.host, format!("is elected in term {term}"));
            }
        }
        if process.leader.as_ref().is_some_and(|leader| !leads || leader.core.term() != term)
            && let Some(leader) = process.leader.take()
        {
            world.say(self.host, "leads no more");
            let address = process.address_of(process.member.core().leader());
            leader.core.end(address);
            process.is_stirred = true;
        }
        if !leads {
            process.awaited_term = None;
        } else if process.leader.is_none() && process.awaited_term != Some(term) {
            // What earlier terms left in the log must be applied here before anything is decided from the state.
            process.awaited_term = Some(term);
            let id = world.number();
            process.requests.insert(id, Purpose::Lead { term });
            process.member.read(vec![id]);
            self.step(world, |_, _, _| Ok(()));
            return;
        }
        if let Some(leader) = &mut process.leader {
            let revision = process.replicated.read().revision().0;
            let is_news = std::mem::replace(&mut leader.seen_revision, revision) != revision;
            if is_news | std::mem::take(&mut leader.is_woken) {
                leader.wake(world, self.host, self.life);
            }
        }
    }

    /// One look at everything.
    pub(super) fn pass(&mut self, world: &mut World) {
        let wall_ms = self.wall_ms(world);
        let (host, life) = (self.host, self.life);
        let voters = self.voters.clone();
        let Some(leader) = self.process.as_mut().and_then(|process| process.leader.as_mut()) else { return };
        if world.now_ms < leader.next_pass_ms {
            // A later one was put nearer meanwhile.
            return;
        }
        leader.next_pass_ms = world.now_ms + PASS_MS;
        world.remind(host, life, PASS_MS, Timer::Pass);
        if !leader.open.is_empty() && world.now_ms < leader.open_until_ms {
            return;
        }
        self.step(world, |process, world, out| {
            let Some(leader) = &mut process.leader else { return Ok(()) };
            let state = process.replicated.read();
            let mut commands = leader.core.pass(world.now_ms, &state, false).unwrap_or_default();
            // In production a member is written down when it is let in.
            for &voter in &voters {
                let host = Host::Coordinator(voter as u16);
                let record = MemberRecord::new(voter, &host.to_string(), &host.address(), Build::default());
                commands.extend(changed_records(&state, record, &BTreeMap::new()));
            }
            commands.extend(level_to_raise(&state, &Build::default(), &process.member.status()));
            drop(state);
            leader.open.clear();
            leader.open_until_ms = world.now_ms + PROPOSE_WITHIN_MS;
            let ids: Vec<String> = commands.iter().map(|_| leader.core.request_id("pass")).collect();
            for (request_id, command) in ids.into_iter().zip(commands) {
                let id = process.propose(world, envelope(request_id, wall_ms, command), Purpose::Pass, out);
                if let Some(leader) = &mut process.leader {
                    leader.open.insert(id);
                }
            }
            process.is_stirred = true;
            Ok(())
        });
    }
}

impl Leader {
    /// Asks for a pass soon.
    pub fn wake(&mut self, world: &mut World, host: Host, life: u64) {
        let soon_ms = world.now_ms + PASS_SOON_MS;
        if soon_ms < self.next_pass_ms {
            self.next_pass_ms = soon_ms;
            world.remind(host, life, PASS_SOON_MS, Timer::Pass);
        }
    }
}

impl Process {
    /// Answers to what the leader itself asked of raft.
    pub(super) fn answered_leader(
        &mut self,
        world: &mut World,
        host: Host,
        (id, purpose): (RequestId, Purpose),
        answer: Answer,
        out: &mut Out,
    ) {
        match (purpose, answer) {
            (Purpose::Lead { term }, Answer::Read(Ok(_))) => {
                let core = self.member.core();
                if core.is_leader() && core.term() == term && self.leader.is_none() {
                    let options = LeaderOptions { history: CLUSTER.into(), lease_ms: LEASE_MS, heartbeat_ms: HEARTBEAT_MS };
                    let core = Leading::new(options, term, world.now_ms, &self.replicated.read());
                    world.say(host, format!("leads in term {term}"));
                    self.leader = Some(Leader {
                        core,
                        next_pass_ms: u64::MAX,
                        open: BTreeSet::new(),
                        open_until_ms: 0,
                        seen_revision: u64::MAX,
                        is_woken: true,
                    });
                }
            }
            // The next look at raft asks again.
            (Purpose::Lead { .. }, _) => self.awaited_term = None,
            (Purpose::Pass, _) => {
                if let Some(leader) = &mut self.leader {
                    leader.open.remove(&id);
                }
            }
            (Purpose::Join { stream }, Answer::Proposed(reply)) => {
                let joined = reply.map_err(|error| self.coordinator_error(&error)).and_then(|proposed| read(&proposed.reply));
                self.joined(world, host, stream, joined);
            }
            (Purpose::Report { stream }, Answer::Proposed(reply)) => {
                let done = reply.map_err(|error| self.coordinator_error(&error)).and_then(|proposed| read(&proposed.reply));
                self.reported(world, host, stream, done);
            }
            (Purpose::Goodbye { stream }, _) => self.end_session(world, host, stream),
            (Purpose::Nothing | Purpose::Join { .. } | Purpose::Report { .. } | Purpose::Call { .. }, _) => {}
        }
        let _ = out;
    }

    fn coordinator_error(&self, error: &RaftError) -> CoordinatorError {
        match error {
            RaftError::NotLeader { leader } => CoordinatorError::NotLeader { leader: self.address_of(*leader) },
            error => CoordinatorError::Unknown { reason: error.to_string() },
        }
    }
}

fn read(reply: &[u8]) -> Result<(), CoordinatorError> {
    match decode_reply(reply) {
        Ok(reply) => reply.map(|_| ()).map_err(CoordinatorError::Command),
        Err(error) => Err(CoordinatorError::Unknown { reason: error.to_string() }),
    }
}
