//! A simulated gateway: production's `Directory`, `Roster`, `Models`, `Course` and session core, with the world for a shell.
//!
//! It watches the cluster, dials replicas, keeps a session with the leader, and answers callers. What it is not: it decides
//! nothing; HTTP, keys, limits, templates and tokenizers are not here. Invariant it checks: a request goes only to a replica
//! that the cluster, as far as this gateway was told, wants to be used.

mod follow;
mod replicas;
mod requests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use forge_cluster::client::route::Addresses;
use forge_cluster::session::SessionCore;
use forge_gateway::cluster::{Directory, Roster, Serves, load};
use forge_gateway::core::{Models, RetryBudget};
use forge_gateway::idempotency::IdempotencyRecords;
use forge_shared::cluster::node::{NodeSpec, Role};
use forge_shared::cluster::session::NodeUp;
use forge_shared::ids::{Incarnation, NodeId};
use forge_shared::version::LEVEL;
use parking_lot::Mutex;

use crate::host::Host;
use crate::message::{CallId, Event, Message, StreamId, Timer};
use crate::random::Random;
use crate::streams::Wire;
use crate::tie::{Tie, Told};
use crate::world::World;
use follow::Watching;
use replicas::DialedReplica;
use requests::Request;
pub use requests::{SERVICE, generate_request};

/// Between two looks at the connections, and how long one may be silent: production's keep-alive, milliseconds.
const BEAT_MS: u64 = 500;
const SILENT_MS: u64 = 2_000;
/// After so long without a word for its caller a stream gets a comment, milliseconds.
const COMMENT_MS: u64 = 2_000;

/// What a gateway reminds itself of.
#[derive(Debug, Clone)]
#[expect(missing_docs, reason = "each variant is described; its fields' names and types say the rest")]
pub enum GatewayTimer {
    /// Time to look at the connections.
    Beat,
    /// The watch of the cluster is tried again.
    Watch(u64),
    /// The watch of a replica is tried again.
    Replica { key: String, number: u64 },
    /// A wait of a request is over.
    Wait { stream: StreamId, number: u64 },
    /// A submission has had its time.
    Admit { call: CallId },
    /// A request has had its time.
    Deadline { stream: StreamId },
    /// A coordinator has not answered a request's question.
    Ask { stream: StreamId, number: u64 },
}

/// The way to a worker.
struct Connection {
    stream: StreamId,
    heard_ms: u64,
}

/// What a call on such a way is for.
#[derive(Debug, Clone)]
enum Purpose {
    Request(StreamId),
    Replica(String),
}

struct Process {
    host: Host,
    life: u64,
    begun_ms: u64,
    random: Random,
    tie: Tie,
    addresses: Addresses,
    watching: Watching,
    directory: Directory,
    roster: Roster<DialedReplica>,
    models: Models,
    serves: Serves,
    retries: Arc<Mutex<RetryBudget>>,
    records: IdempotencyRecords,
    connections: BTreeMap<Host, Connection>,
    calls: BTreeMap<CallId, (Host, Purpose)>,
    requests: BTreeMap<StreamId, Request>,
}

/// See the module.
pub struct Gateway {
    /// Which.
    pub host: Host,
    /// Which process of it this is.
    pub life: u64,
    coordinators: Vec<Host>,
    incarnation: u64,
    random: Random,
    process: Option<Process>,
}

impl Gateway {
    /// A gateway that is not started.
    pub fn new(index: u16, coordinators: &[Host], seed: u64) -> Self {
        let random = Random::new(seed, 2_000_000 + u64::from(index));
        Gateway { host: Host::Gateway(index), life: 0, coordinators: coordinators.to_vec(), incarnation: 0, random, process: None }
    }

    /// Starts a process.
    pub fn start(&mut self, world: &mut World) {
        if self.process.is_some() {
            return;
        }
        self.life = world.number();
        self.incarnation += 1;
        let spec = NodeSpec {
            id: NodeId(self.host.to_string()),
            role: Role::Gateway,
            incarnation: Incarnation(self.incarnation),
            version: env!("CARGO_PKG_VERSION").into(),
            level: LEVEL,
            address: self.host.address(),
            metrics_address: String::new(),
            data_plane: None,
            devices: Vec::new(),
        };
        let addresses: Vec<String> = self.coordinators.iter().map(|host| host.address()).collect();
        let core = SessionCore::serving_on(self.random.number());
        let mut process = Process {
            host: self.host,
            life: self.life,
            begun_ms: world.now_ms,
            random: Random::new(self.random.number(), 1),
            tie: Tie::new(self.host, self.life, spec, core, &self.coordinators),
            addresses: Addresses::new(&addresses),
            watching: Watching::default(),
            directory: Directory::default(),
            roster: Roster::default(),
            models: Models::default(),
            serves: Serves::new(),
            retries: Arc::default(),
            records: IdempotencyRecords::new(1_000),
            connections: BTreeMap::new(),
            calls: BTreeMap::new(),
            requests: BTreeMap::new(),
        };
        world.say(self.host, format!("starts, incarnation {}", self.incarnation));
        world.remind(self.host, self.life, 1 + self.random.below(100), Timer::Session);
        world.remind(self.host, self.life, BEAT_MS, Timer::Gateway(GatewayTimer::Beat));
        process.look(world);
        self.process = Some(process);
    }

    /// The process is killed; another starts after a while.
    pub fn kill(&mut self, world: &mut World) {
        if let Some(process) = self.process.take() {
            let with = process.requests.values().filter(|request| request.is_accepted()).count();
            world.say(self.host, format!("is killed, with {with} answers under way"));
            self.come_back(world);
        }
    }

    fn come_back(&mut self, world: &mut World) {
        world.died(self.host);
        self.life = world.number();
        let after_ms = self.random.between(100, 5_000);
        world.remind(self.host, self.life, after_ms, Timer::Restart);
    }

    /// Whether a session holds.
    pub fn is_welcome(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.tie.core.is_welcome())
    }

    /// What it tells the leader that it serves.
    pub fn serves(&self) -> Option<&Serves> {
        self.process.as_ref().map(|process| &process.serves)
    }

    /// Requests that are not over.
    pub fn requests(&self) -> usize {
        self.process.as_ref().map_or(0, |process| process.requests.len())
    }

    /// Something happens here.
    pub fn handle(&mut self, world: &mut World, event: Event) {
        if let Event::Timer { timer: Timer::Restart, .. } = event {
            return self.start(world);
        }
        let Some(process) = &mut self.process else {
            if let Event::Arrives { stream: Some(stream), .. } = event {
                world.close(stream, self.host);
            }
            return;
        };
        for told in process.happens(world, event) {
            match told {
                Told::Heartbeat(number) => {
                    let load = load(process.serves.clone(), process.requests.len() as u64, 0);
                    process.tie.send(world, NodeUp::Heartbeat { number, load, usage: Vec::new() });
                }
                Told::End(reason) => {
                    world.say(self.host, format!("is refused: {reason}"));
                    self.process = None;
                    return self.come_back(world);
                }
                Told::Expired => return world.violate("a gateway serves on whoever has given it up", self.host.to_string()),
                Told::Welcome | Told::Down(_) => {}
            }
        }
    }
}

impl Process {
    fn now(&self, world: &World) -> Duration {
        Duration::from_millis(world.now_ms - self.begun_ms)
    }

    fn remind(&self, world: &mut World, after_ms: u64, timer: GatewayTimer) {
        world.remind(self.host, self.life, after_ms, Timer::Gateway(timer));
    }

    fn happens(&mut self, world: &mut World, event: Event) -> Vec<Told> {
        match event {
            Event::Arrives { from: worker @ Host::Worker(_), stream: Some(stream), message: Message::Wire(wire), .. } => {
                self.hears(world, worker, stream, *wire);
            }
            Event::Arrives { stream: Some(stream), message: Message::Http(http), .. } => self.asked(world, stream, *http),
            Event::Arrives { stream: Some(stream), message: Message::Batch(batch), .. } => self.told(world, stream, batch),
            Event::Arrives { stream: Some(stream), message: Message::Wire(_), .. } => self.watching.heard(world, stream),
            Event::Arrives { message: Message::Answer { call, answer }, .. } if self.awaits(call) => self.answered(world, call, answer),
            Event::Arrives { stream, message, .. } => return self.tie.arrives(world, stream, message),
            Event::Closed { stream, .. } if self.watching.is(stream) => self.watch_over(world),
            Event::Closed { stream, .. } if self.requests.contains_key(&stream) => self.hung_up(world, stream),
            Event::Closed { stream, .. } => match self.worker_of(stream) {
                Some(worker) => self.lose(world, worker),
                None => return self.tie.closed(world, stream),
            },
            Event::Timer { timer: Timer::Gateway(timer), .. } => self.timer(world, timer),
            Event::Timer { timer, .. } => return self.tie.timer(world, timer),
            Event::FaultBegins(_) | Event::FaultEnds(_) => {}
        }
        Vec::new()
    }

    fn timer(&mut self, world: &mut World, timer: GatewayTimer) {
        match timer {
            GatewayTimer::Beat => self.beat(world),
            GatewayTimer::Watch(number) if self.watching.is_due(number) => self.look(world),
            GatewayTimer::Watch(_) => {}
            GatewayTimer::Replica { key, number } => self.watch_again(world, &key, number),
            GatewayTimer::Wait { stream, number } => self.waited(world, stream, number),
            GatewayTimer::Admit { call } => self.not_admitted(world, call),
            GatewayTimer::Deadline { stream } => self.deadline(world, stream),
            GatewayTimer::Ask { stream, number } => self.ask_again(world, stream, number),
        }
    }

    /// Gives up who is silent, and asks the others for a sign.
    fn beat(&mut self, world: &mut World) {
        let silent: Vec<Host> =
            self.connections.iter().filter(|(_, it)| it.heard_ms + SILENT_MS <= world.now_ms).map(|(host, _)| *host).collect();
        for worker in silent {
            world.say(self.host, format!("hears nothing of {worker}"));
            self.lose(world, worker);
        }
        let quiet = |it: &&Connection| it.heard_ms + BEAT_MS <= world.now_ms;
        let quiet: Vec<StreamId> = self.connections.values().filter(quiet).map(|it| it.stream).collect();
        for stream in quiet {
            world.stream(stream, self.host, Message::Wire(Box::new(Wire::Ping)));
        }
        self.look_after_watch(world);
        self.comment(world);
        self.remind(world, BEAT_MS, GatewayTimer::Beat);
    }

    fn worker_of(&self, stream: StreamId) -> Option<Host> {
        self.connections.iter().find(|(_, it)| it.stream == stream).map(|(host, _)| *host)
    }

    /// The connection to a worker, made where there is none.
    fn connection(&mut self, world: &mut World, worker: Host) -> StreamId {
        let host = self.host;
        self.connections.entry(worker).or_insert_with(|| Connection { stream: world.open(host, worker), heard_ms: world.now_ms }).stream
    }

    /// Sends on the connection to a worker, if there is one.
    fn tell_worker(&self, world: &mut World, worker: Host, wire: Wire) {
        if let Some(connection) = self.connections.get(&worker) {
            world.stream(connection.stream, self.host, Message::Wire(Box::new(wire)));
        }
    }

    /// Begins a call on the connection to a worker.
    fn call(&mut self, world: &mut World, worker: Host, purpose: Purpose) -> CallId {
        self.connection(world, worker);
        let call = world.number();
        self.calls.insert(call, (worker, purpose));
        call
    }

    /// A call is not waited for any more.
    fn cancel(&mut self, world: &mut World, call: CallId) {
        if let Some((worker, _)) = self.calls.remove(&call) {
            self.tell_worker(world, worker, Wire::Cancel { call });
        }
    }

    /// The connection to a worker is gone, and all calls on it.
    fn lose(&mut self, world: &mut World, worker: Host) {
        let Some(connection) = self.connections.remove(&worker) else { return };
        world.close(connection.stream, self.host);
        let lost: Vec<(CallId, Purpose)> =
            self.calls.iter().filter(|(_, (of, _))| *of == worker).map(|(call, (_, purpose))| (*call, purpose.clone())).collect();
        for (call, _) in &lost {
            self.calls.remove(call);
        }
        // Who is not ready must be known before anyone looks for another.
        for (call, purpose) in &lost {
            if let Purpose::Replica(key) = purpose {
                self.replica_lost(world, key, *call, &format!("the connection to {worker} broke"));
            }
        }
        for (call, purpose) in lost {
            if let Purpose::Request(stream) = purpose {
                self.call_lost(world, stream, call, &format!("the connection to {worker} broke"));
            }
        }
    }

    /// A worker says something.
    fn hears(&mut self, world: &mut World, worker: Host, stream: StreamId, wire: Wire) {
        let Some(connection) = self.connections.get_mut(&worker).filter(|it| it.stream == stream) else { return };
        connection.heard_ms = world.now_ms;
        let (Wire::Admitted { call }
        | Wire::Refused { call, .. }
        | Wire::Events { call, .. }
        | Wire::Ended { call }
        | Wire::Update { call, .. }
        | Wire::NotFound { call }) = &wire
        else {
            return;
        };
        let call = *call;
        match self.calls.get(&call).map(|(_, purpose)| purpose.clone()) {
            Some(Purpose::Replica(key)) => self.replica_hears(world, &key, call, wire),
            Some(Purpose::Request(of)) => self.request_hears(world, of, call, wire),
            None => {}
        }
    }
}
