//! A group in one thread: members on faulty disks, a network that loses, delays and parts, time in ticks, all from one
//! seed. After every step it checks what must hold: one leader per term, one entry per index, nothing acknowledged lost.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use forge_coordinator::raft::convert;
use forge_coordinator::raft::log::MemoryDisk;
use forge_coordinator::raft::member::{Answer, Member, RequestId, Sink};
use forge_coordinator::raft::snapshot::SnapshotWork;
use forge_coordinator::raft::{Frozen, MemberChange, RaftError, RaftOptions, RaftRole, RaftStatus, StateMachine};
use forge_proto::raft as wire;

/// Every entry that any member ever applied.
type History = Arc<Mutex<BTreeMap<u64, Vec<u8>>>>;

/// Keeps all that was applied, and checks it against what others applied.
struct Machine {
    history: History,
    applied: BTreeMap<u64, Vec<u8>>,
}

impl StateMachine for Machine {
    fn apply(&mut self, index: u64, data: &[u8]) -> Vec<u8> {
        let mut history = self.history.lock().unwrap();
        let known = history.entry(index).or_insert_with(|| data.to_vec());
        assert_eq!(known, data, "two members applied different entries at {index}");
        assert!(self.applied.insert(index, data.to_vec()).is_none(), "entry {index} was applied twice");
        index.to_le_bytes().to_vec()
    }

    fn snapshot(&self) -> Frozen {
        let applied = self.applied.clone();
        Box::new(move || {
            let mut bytes = Vec::new();
            for (index, data) in &applied {
                bytes.extend_from_slice(&index.to_le_bytes());
                bytes.extend_from_slice(&(data.len() as u64).to_le_bytes());
                bytes.extend_from_slice(data);
            }
            bytes
        })
    }

    fn restore(&mut self, _: u64, mut data: &[u8]) -> Result<(), String> {
        let mut take = |bytes: usize| {
            let (taken, rest) = data.split_at_checked(bytes).ok_or("the snapshot is short")?;
            data = rest;
            Ok::<_, &str>(taken.to_vec())
        };
        self.applied.clear();
        while let Ok(index) = take(8) {
            let len = u64::from_le_bytes(take(8)?.try_into().unwrap()) as usize;
            self.applied.insert(u64::from_le_bytes(index.try_into().unwrap()), take(len)?);
        }
        Ok(())
    }
}

#[derive(Default)]
struct Out {
    messages: Vec<(wire::Message, Option<Bytes>)>,
    answers: Vec<(RequestId, Answer)>,
}

impl Sink for Out {
    fn send(&mut self, messages: Vec<wire::Message>) {
        self.messages.extend(messages.into_iter().map(|message| (message, None)));
    }

    fn send_snapshot(&mut self, _: u64, message: wire::Message, data: Bytes) {
        self.messages.push((message, Some(data)));
    }

    fn answer(&mut self, id: RequestId, answer: Answer) {
        self.answers.push((id, answer));
    }
}

/// One host.
pub struct Host {
    pub disk: MemoryDisk,
    pub member: Option<Member<MemoryDisk>>,
    pub bootstrap: Option<Vec<u64>>,
    starts: u64,
    /// A snapshot that is being written.
    work: Option<SnapshotWork>,
}

/// What a request asked for.
enum Asked {
    Data(Vec<u8>),
    /// And the highest index acknowledged before.
    Read(u64),
    Change,
}

/// See the module.
pub struct World {
    pub hosts: BTreeMap<u64, Host>,
    pub loss_percent: u64,
    pub most_delay_ticks: u64,
    /// Pairs (from, to) that do not reach each other.
    pub cut: BTreeSet<(u64, u64)>,
    pub now: u64,
    pub answers: BTreeMap<RequestId, Result<u64, RaftError>>,
    /// Index and data of what was acknowledged.
    pub acknowledged: BTreeMap<u64, Vec<u8>>,
    pub sent_snapshots: usize,
    pub change_options: fn(&mut RaftOptions),
    asked: BTreeMap<RequestId, Asked>,
    mail: BTreeMap<(u64, u64), (wire::Message, Option<Bytes>)>,
    leaders: BTreeMap<u64, u64>,
    history: History,
    next: u64,
    random: u64,
}

impl World {
    pub fn new(voters: &[u64], seed: u64) -> Self {
        Self::with_options(voters, seed, |_| {})
    }

    pub fn with_options(voters: &[u64], seed: u64, change_options: fn(&mut RaftOptions)) -> Self {
        let mut world = Self {
            hosts: BTreeMap::new(),
            loss_percent: 0,
            most_delay_ticks: 1,
            cut: BTreeSet::new(),
            now: 0,
            answers: BTreeMap::new(),
            acknowledged: BTreeMap::new(),
            sent_snapshots: 0,
            change_options,
            asked: BTreeMap::new(),
            mail: BTreeMap::new(),
            leaders: BTreeMap::new(),
            history: History::default(),
            next: 0,
            random: seed,
        };
        for &id in voters {
            world.add_host(id, Some(voters.to_vec()));
        }
        world
    }

    pub fn add_host(&mut self, id: u64, bootstrap: Option<Vec<u64>>) {
        self.hosts.insert(id, Host { disk: MemoryDisk::new(), member: None, bootstrap, starts: 0, work: None });
        self.start(id);
    }

    pub fn random(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.random;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    /// Starts a host; whether it came up (its disk may be set to kill it again).
    pub fn start(&mut self, id: u64) -> bool {
        let seed = self.random(u64::MAX);
        let host = self.hosts.get_mut(&id).unwrap();
        host.starts += 1;
        let mut options = RaftOptions::new(id, "test", "unused");
        options.bootstrap = host.bootstrap.clone();
        (self.change_options)(&mut options);
        let machine = Machine { history: self.history.clone(), applied: BTreeMap::new() };
        match Member::open(options, seed, host.disk.clone(), Box::new(machine)) {
            Ok(member) => host.member = Some(member),
            Err(_) if host.disk.is_crashed() => {}
            Err(error) => panic!("member {id} does not start: {error}"),
        }
        host.member.is_some()
    }

    /// The process dies, and what was not synced survives in part.
    pub fn crash(&mut self, id: u64) {
        let seed = self.random(u64::MAX);
        let host = self.hosts.get_mut(&id).unwrap();
        host.member = None;
        host.work = None;
        host.disk.crash();
        host.disk.restart(seed);
    }

    fn with(&mut self, id: u64, act: impl FnOnce(&mut Member<MemoryDisk>, &mut Out) -> Result<(), RaftError>) {
        let host = self.hosts.get_mut(&id).unwrap();
        let Some(member) = &mut host.member else { return };
        // It is written while other things happen, and done at some later step.
        if (self.now + id).is_multiple_of(3)
            && let Some(work) = host.work.take()
        {
            member.snapshot_made(work.run());
        }
        let mut out = Out::default();
        let done = act(member, &mut out).and_then(|()| member.turn(&mut out));
        match done {
            Ok(()) => host.work = member.take_snapshot_work().or(host.work.take()),
            Err(_) if host.disk.is_crashed() => {
                host.member = None;
                host.work = None;
                let seed = self.random(u64::MAX);
                self.hosts[&id].disk.restart(seed);
            }
            Err(error) => panic!("member {id} stops: {error}"),
        }
        // What left before a crash has left.
        for (message, data) in out.messages {
            self.post(message, data);
        }
        for (request, answer) in out.answers {
            self.take_answer(request, answer);
        }
        self.check(id);
    }

    fn take_answer(&mut self, request: RequestId, answer: Answer) {
        let answer = match (self.asked.remove(&request).expect("each is answered once"), answer) {
            (Asked::Data(data), Answer::Proposed(answer)) => answer.map(|proposed| {
                assert_eq!(proposed.reply, proposed.index.to_le_bytes());
                assert!(self.acknowledged.insert(proposed.index, data).is_none(), "one index was given twice");
                proposed.index
            }),
            (Asked::Read(acknowledged), Answer::Read(answer)) => {
                if let Ok(index) = answer {
                    assert!(index >= acknowledged, "a read saw {index}, and {acknowledged} was acknowledged before it");
                }
                answer
            }
            (Asked::Change, Answer::Changed(answer)) => answer.map(|()| 0),
            _ => panic!("an answer to another question"),
        };
        self.answers.insert(request, answer);
    }

    fn post(&mut self, message: wire::Message, data: Option<Bytes>) {
        self.sent_snapshots += usize::from(data.is_some());
        if self.random(100) < self.loss_percent {
            if data.is_some() {
                self.with(message.from, |member, _| {
                    member.report_snapshot(message.to, false);
                    Ok(())
                });
            }
            return;
        }
        self.next += 1;
        let at = self.now + self.random(self.most_delay_ticks);
        // On the way it is bytes.
        let message: wire::Message = prost::Message::decode(prost::Message::encode_to_vec(&message).as_slice()).unwrap();
        self.mail.insert((at, self.next), (message, data));
    }

    /// One tick at every host, and all mail that is due by then.
    pub fn tick(&mut self) {
        for id in self.hosts.keys().copied().collect::<Vec<_>>() {
            self.with(id, |member, out| member.tick(out));
        }
        self.deliver();
        self.now += 1;
    }

    pub fn deliver(&mut self) {
        while let Some(entry) = self.mail.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let (message, data) = entry.remove();
            let (from, to) = (message.from, message.to);
            let reaches = !self.cut.contains(&(from, to)) && self.hosts.get(&to).is_some_and(|host| host.member.is_some());
            match data {
                _ if !reaches && data.is_none() => {}
                None => {
                    let message = convert::message_in(message, to).expect("members send what members take");
                    self.with(to, |member, out| member.receive(message, out));
                }
                Some(_) if !reaches => self.with(from, |member, _| {
                    member.report_snapshot(to, false);
                    Ok(())
                }),
                Some(data) => {
                    let message = convert::snapshot_in(message, data, to).expect("members send what members take");
                    self.with(to, |member, out| member.receive_snapshot(message, out));
                    self.with(from, |member, _| {
                        member.report_snapshot(to, true);
                        Ok(())
                    });
                }
            }
        }
    }

    fn check(&mut self, id: u64) {
        let Some(member) = &self.hosts[&id].member else { return };
        let core = member.core();
        if core.is_leader() {
            let leader = *self.leaders.entry(core.term()).or_insert(id);
            assert_eq!(leader, id, "two leaders in term {}", core.term());
        }
    }

    pub fn run(&mut self, ticks: u64) {
        for _ in 0..ticks {
            self.tick();
        }
    }

    /// Ticks until `is_done`; how many it took.
    pub fn until(&mut self, most_ticks: u64, what: &str, is_done: impl Fn(&mut World) -> bool) -> u64 {
        let started = self.now;
        while !is_done(self) {
            assert!(self.now - started < most_ticks, "{what}: not after {most_ticks} ticks; {:#?}", self.statuses());
            self.tick();
        }
        self.now - started
    }

    pub fn statuses(&self) -> Vec<RaftStatus> {
        self.hosts.values().filter_map(|host| host.member.as_ref()).map(Member::status).collect()
    }

    pub fn status(&self, id: u64) -> RaftStatus {
        self.hosts[&id].member.as_ref().unwrap().status()
    }

    /// The leader that a majority follows.
    pub fn leader(&self) -> Option<u64> {
        let statuses = self.statuses();
        let leader = statuses.iter().filter(|status| status.role == RaftRole::Leader).max_by_key(|status| status.term)?.member_id;
        let followed = statuses.iter().filter(|status| status.leader == Some(leader)).count();
        let voters = self.status(leader).members.iter().filter(|member| member.is_voter).count();
        (followed * 2 > voters).then_some(leader)
    }

    pub fn await_leader(&mut self) -> u64 {
        self.until(200, "a leader", |world| world.leader().is_some());
        self.leader().unwrap()
    }

    pub fn propose(&mut self, id: u64, data: Vec<u8>) -> RequestId {
        self.next += 1;
        let request = self.next;
        self.asked.insert(request, Asked::Data(data.clone()));
        self.with(id, |member, out| {
            member.propose(vec![(request, Bytes::from(data))], out);
            Ok(())
        });
        request
    }

    pub fn read(&mut self, id: u64) -> RequestId {
        self.next += 1;
        let request = self.next;
        self.asked.insert(request, Asked::Read(self.acknowledged.keys().max().copied().unwrap_or(0)));
        self.with(id, |member, _| {
            member.read(vec![request]);
            Ok(())
        });
        request
    }

    pub fn change(&mut self, id: u64, change: MemberChange) -> RequestId {
        self.next += 1;
        let request = self.next;
        self.asked.insert(request, Asked::Change);
        self.with(id, |member, out| {
            member.change(request, change, out);
            Ok(())
        });
        request
    }

    /// Changes the group as the handle does: again while it is busy.
    pub fn change_to_end(&mut self, change: MemberChange) {
        for _ in 0..200 {
            let leader = self.await_leader();
            let request = self.change(leader, change);
            self.until(200, "an answer to the change", |world| world.answers.contains_key(&request));
            match &self.answers[&request] {
                Ok(_) => return,
                Err(RaftError::Busy { .. } | RaftError::NotLeader { .. }) => self.tick(),
                Err(error) => panic!("{change:?}: {error}"),
            }
        }
        panic!("{change:?}: busy for ever");
    }

    pub fn transfer(&mut self, id: u64, to: u64) -> RequestId {
        self.next += 1;
        let request = self.next;
        self.asked.insert(request, Asked::Change);
        self.with(id, |member, out| {
            member.transfer(request, to, out);
            Ok(())
        });
        request
    }

    /// Cuts `island` off from all others, both ways.
    pub fn part(&mut self, island: &[u64]) {
        for &one in island {
            for &other in self.hosts.keys().filter(|id| !island.contains(id)) {
                self.cut.extend([(one, other), (other, one)]);
            }
        }
    }

    /// Ends all faults, starts who is down, and checks that the group agrees and has lost nothing.
    pub fn settle(&mut self) {
        self.loss_percent = 0;
        self.cut.clear();
        for id in self.hosts.keys().copied().collect::<Vec<_>>() {
            self.hosts[&id].disk.set_capacity_bytes(None);
            self.hosts[&id].disk.crash_at_sync(None);
            if self.hosts[&id].member.is_none() {
                assert!(self.start(id));
            }
        }
        let leader = self.await_leader();
        let last = self.propose(leader, b"the last".to_vec());
        self.until(400, "agreement", |world| {
            if matches!(world.answers.get(&last), Some(Err(_))) {
                return true;
            }
            let statuses = world.statuses();
            let members = &statuses.iter().max_by_key(|status| status.term).unwrap().members;
            let mut of_group = statuses.iter().filter(|status| members.iter().any(|member| member.id == status.member_id));
            let first = of_group.next().unwrap().applied_index;
            world.answers.contains_key(&last) && of_group.all(|status| status.applied_index == first)
        });
        let history = self.history.lock().unwrap();
        for (index, data) in &self.acknowledged {
            assert_eq!(history.get(index), Some(data), "entry {index} was acknowledged and is lost");
        }
    }

    pub fn good_answers(&self, requests: &[RequestId]) -> usize {
        requests.iter().filter(|request| matches!(self.answers.get(request), Some(Ok(_)))).count()
    }
}
