//! A simulated worker: production's `Agent` and `SessionCore`; its engines are times of loading and stopping.
//!
//! Invariants it checks: no two processes ever hold one epoch of a replica; a node that is given up runs nothing more; the
//! runs of a node fit its memory as they were planned.

use std::collections::{BTreeMap, VecDeque};

use forge_cluster::session::SessionCore;
use forge_shared::cluster::node::{DeviceInfo, DeviceKind, NodeLoad, NodeSpec, Role};
use forge_shared::cluster::service::ReplicaPhase;
use forge_shared::cluster::session::{NodeDown, NodeUp};
use forge_shared::ids::{Epoch, Incarnation, NodeId};
use forge_shared::plan::{ModelFacts, ModelShape};
use forge_shared::version::LEVEL;
use forge_worker::agent::{Agent, AgentAction, AgentInput, Death, RestartLimits, RunId, RunState};

use crate::engines::Engines;
use crate::host::Host;
use crate::message::{Event, Message, Timer};
use crate::random::Random;
use crate::tie::{Tie, Told};
use crate::world::World;

const MIB: u64 = 1 << 20;
/// Of a worker's one device, bytes.
const MEMORY_BYTES: u64 = 4_096 * MIB;
/// Models looked at together, as in production.
const INSPECTIONS_MAX: usize = 2;
/// Runs that die while they load, of a hundred.
const DEATH_PERCENT: u64 = 4;
/// A run's steps: a progress each, then ready; and its end.
const READY_STEP: u32 = 3;
const STOPPED_STEP: u32 = 9;

/// Which process first held each epoch of a replica.
#[derive(Debug, Default)]
pub struct Claims(BTreeMap<(String, Epoch), (Host, u64)>);

struct Run {
    /// Tells restarts apart.
    serial: u32,
    memory_bytes: u64,
}

struct Process {
    tie: Tie,
    agent: Agent,
    runs: BTreeMap<RunId, Run>,
    engines: Engines,
    pending: VecDeque<NodeUp>,
    inspections: usize,
    agent_timer_ms: u64,
}

/// See the module.
pub struct Worker {
    /// Which.
    pub host: Host,
    /// Which process of it this is.
    pub life: u64,
    coordinators: Vec<Host>,
    incarnation: u64,
    seed: u64,
    random: Random,
    process: Option<Process>,
    /// None of its runs dies by itself.
    pub is_sound: bool,
}

impl Worker {
    /// A worker that is not started.
    pub fn new(index: u16, coordinators: &[Host], seed: u64) -> Self {
        Worker {
            host: Host::Worker(index),
            life: 0,
            coordinators: coordinators.to_vec(),
            incarnation: 0,
            seed,
            random: Random::new(seed, 1_000 + u64::from(index)),
            process: None,
            is_sound: false,
        }
    }

    /// Its name in the cluster.
    pub fn id(&self) -> NodeId {
        NodeId(self.host.to_string())
    }

    /// Starts a process.
    pub fn start(&mut self, world: &mut World) {
        if self.process.is_some() {
            return;
        }
        self.life = world.number();
        self.incarnation += 1;
        let spec = self.spec();
        let agent = Agent::new(spec.id.clone(), spec.incarnation, RestartLimits::default());
        let tie = Tie::new(self.host, self.life, spec, SessionCore::new(self.random.number()), &self.coordinators);
        let engines = Engines::new(self.host, self.life, self.seed);
        let runs = BTreeMap::new();
        self.process = Some(Process { tie, agent, runs, engines, pending: VecDeque::new(), inspections: 0, agent_timer_ms: u64::MAX });
        world.say(self.host, format!("starts, incarnation {}", self.incarnation));
        world.remind(self.host, self.life, 1 + self.random.below(100), Timer::Session);
    }

    fn spec(&self) -> NodeSpec {
        let device = DeviceInfo {
            index: 0,
            kind: DeviceKind::Cpu,
            name: "simulated".into(),
            cores: 2,
            numa_node: None,
            instruction_sets: vec!["avx2".into()],
            memory_bytes: MEMORY_BYTES,
            read_bandwidth_bytes_per_s: 0,
            matrix_flops: 0,
            is_virtual: true,
            cannot_run: None,
        };
        NodeSpec {
            id: self.id(),
            role: Role::Worker,
            incarnation: Incarnation(self.incarnation),
            version: env!("CARGO_PKG_VERSION").into(),
            level: LEVEL,
            address: self.host.address(),
            metrics_address: String::new(),
            data_plane: None,
            devices: vec![device],
        }
    }

    /// The process is killed; another starts after a while.
    pub fn kill(&mut self, world: &mut World) {
        if self.process.take().is_some() {
            world.say(self.host, "is killed");
            self.come_back(world);
        }
    }

    fn come_back(&mut self, world: &mut World) {
        world.died(self.host);
        self.life = world.number();
        let after_ms = self.random.between(100, 5_000);
        world.remind(self.host, self.life, after_ms, Timer::Restart);
    }

    /// It says good-bye, and comes back as a new process.
    pub fn leave(&mut self, world: &mut World) {
        let Some(process) = &mut self.process else { return };
        process.tie.send(world, NodeUp::Goodbye);
        // What is on its way arrives before the end of the stream does.
        self.process = None;
        self.come_back(world);
    }

    /// One of its engines dies.
    pub fn engine_dies(&mut self, world: &mut World, claims: &mut Claims) {
        let Some(process) = &self.process else { return };
        let is_up = |run: &&RunId| process.agent.state(run) == Some(&RunState::Ready);
        let busy = process.runs.keys().filter(is_up).find(|run| process.engines.answers(run));
        let up = busy.or_else(|| process.runs.keys().find(is_up)).cloned();
        if let Some(run) = up {
            let death = Death { reason: "told to".into(), restartable: true, found_memory_bytes: None, fault: None };
            self.feed(world, claims, AgentInput::Died { run, death });
        }
    }

    /// Milliseconds of its lease that are left, of the process of an incarnation.
    pub fn lease_left_ms(&self, now_ms: u64, incarnation: u64) -> Option<u64> {
        let process = self.process.as_ref().filter(|_| self.incarnation == incarnation)?;
        process.tie.core.lease_left_ms(now_ms)
    }

    /// Whether a session holds.
    pub fn is_welcome(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.tie.core.is_welcome())
    }

    /// Whether it has a run of this plan that answers.
    pub fn serves(&self, run: &RunId) -> bool {
        self.process.as_ref().is_some_and(|process| process.agent.state(run) == Some(&RunState::Ready))
    }

    /// Runs that it has.
    pub fn runs(&self) -> usize {
        self.process.as_ref().map_or(0, |process| process.runs.len())
    }

    /// Whether an engine of it answers somebody.
    pub fn answers(&self) -> bool {
        self.process.as_ref().is_some_and(|process| process.runs.keys().any(|run| process.engines.answers(run)))
    }

    /// Whether no engine holds anything of anybody.
    pub fn is_idle(&self) -> bool {
        self.process.as_ref().is_none_or(|process| process.engines.are_idle())
    }

    /// Something happens here.
    pub fn handle(&mut self, world: &mut World, claims: &mut Claims, event: Event) {
        if let Event::Timer { timer: Timer::Restart, .. } = event {
            return self.start(world);
        }
        let Some(process) = &mut self.process else {
            if let Event::Arrives { stream: Some(stream), .. } = event {
                world.close(stream, self.host);
            }
            return;
        };
        let told = match event {
            Event::Closed { stream, .. } => {
                process.engines.closed(stream);
                process.tie.closed(world, stream)
            }
            Event::Arrives { stream: Some(stream), message: Message::Wire(wire), .. } => {
                return process.engines.arrives(world, stream, *wire);
            }
            Event::Timer { timer: Timer::Engine { replica, epoch }, .. } => {
                return process.engines.step(world, &RunId { replica, epoch: Epoch(epoch) });
            }
            Event::Arrives { stream, message, .. } => process.tie.arrives(world, stream, message),
            Event::Timer { timer: Timer::Agent, .. } => {
                process.agent_timer_ms = u64::MAX;
                return self.feed(world, claims, AgentInput::Tick);
            }
            Event::Timer { timer: Timer::Run { replica, epoch, step }, .. } => {
                return self.run_goes_on(world, claims, RunId { replica, epoch: Epoch(epoch) }, step);
            }
            Event::Timer { timer: Timer::Inspected { number }, .. } => {
                process.inspections -= 1;
                process.pending.push_back(NodeUp::Inspected { number, result: Ok(Box::new(facts())) });
                process.flush(world);
                return;
            }
            Event::Timer { timer, .. } => process.tie.timer(world, timer),
            Event::FaultBegins(_) | Event::FaultEnds(_) => Vec::new(),
        };
        self.told(world, claims, told);
    }

    fn told(&mut self, world: &mut World, claims: &mut Claims, told: Vec<Told>) {
        for told in told {
            let Some(process) = &mut self.process else { return };
            match told {
                Told::Welcome => {
                    process.pending.clear();
                    self.feed(world, claims, AgentInput::Connected);
                }
                Told::Heartbeat(number) => {
                    process.tie.send(world, NodeUp::Heartbeat { number, load: NodeLoad::default(), usage: Vec::new() });
                }
                Told::Down(NodeDown::Assignments { history, revision, assignments }) => {
                    self.feed(world, claims, AgentInput::Assignments { history, revision, assignments });
                }
                Told::Down(NodeDown::Inspect { number, .. }) => {
                    if process.inspections >= INSPECTIONS_MAX {
                        process.pending.push_back(NodeUp::Busy { number });
                    } else {
                        process.inspections += 1;
                        let after_ms = self.random.between(10, 600);
                        world.remind(self.host, self.life, after_ms, Timer::Inspected { number });
                    }
                }
                Told::Down(_) => {}
                Told::Expired => {
                    world.say(self.host, "is given up by the cluster and stops");
                    *world.faults.entry("worker expired").or_default() += 1;
                    self.feed(world, claims, AgentInput::Expired);
                    self.check_stopped(world);
                }
                Told::End(reason) => {
                    world.say(self.host, format!("is refused: {reason}"));
                    self.process = None;
                    return self.come_back(world);
                }
            }
        }
        if let Some(process) = &mut self.process {
            process.flush(world);
        }
    }

    fn check_stopped(&self, world: &mut World) {
        let Some(process) = &self.process else { return };
        let serves = |run: &&RunId| matches!(process.agent.state(run), Some(RunState::Ready | RunState::Starting));
        if let Some(run) = process.runs.keys().find(serves) {
            world.violate("a node that is given up serves nothing", format!("{} goes on with {run}", self.host));
        }
    }

    fn feed(&mut self, world: &mut World, claims: &mut Claims, input: AgentInput) {
        let Some(process) = &mut self.process else { return };
        match &input {
            AgentInput::Ready { run, .. } => process.engines.ready(world, run),
            AgentInput::Died { run, .. } => process.engines.die(world, run, "the engine died and is being restarted"),
            AgentInput::Stopped { run } => process.engines.die(world, run, "the replica is not running"),
            _ => {}
        }
        for action in process.agent.handle(world.now_ms, input) {
            match action {
                AgentAction::Start { assignment, .. } => {
                    let run = RunId::of(&assignment.plan);
                    let (first, _) = *claims.0.entry((run.replica.clone(), run.epoch)).or_insert((self.host, self.life));
                    let holder = claims.0[&(run.replica.clone(), run.epoch)];
                    if holder != (self.host, self.life) {
                        let seen = format!("{} starts {run}, which a process of {first} held", self.host);
                        world.violate("no two processes hold one epoch", seen);
                    }
                    let of_node = |rank: &&forge_shared::plan::RankPlan| rank.node.0 == self.host.to_string();
                    let memory = |rank: &forge_shared::plan::RankPlan| {
                        rank.memory.weights_bytes + rank.memory.kv_bytes + rank.memory.workspace_bytes
                    };
                    let memory_bytes = assignment.plan.ranks.iter().filter(of_node).map(memory).sum();
                    let serial = process.runs.get(&run).map_or(0, |run| run.serial + 1);
                    world.say(self.host, format!("starts {run}"));
                    let timer = Timer::Run { replica: run.replica.clone(), epoch: run.epoch.0, step: serial * 16 };
                    process.engines.open(&run);
                    process.runs.insert(run, Run { serial, memory_bytes });
                    let agent = &process.agent;
                    let holds =
                        |run: &RunId| matches!(agent.state(run), Some(RunState::Starting | RunState::Ready | RunState::Stopping { .. }));
                    let held_bytes: u64 = process.runs.iter().filter(|(run, _)| holds(run)).map(|(_, run)| run.memory_bytes).sum();
                    if held_bytes > MEMORY_BYTES {
                        let seen = format!("{} holds {} MiB of {}", self.host, held_bytes / MIB, MEMORY_BYTES / MIB);
                        world.violate("plans fit their devices", seen);
                    }
                    let after_ms = self.random.between(5, 300);
                    world.remind(self.host, self.life, after_ms, timer);
                }
                AgentAction::Stop { run, timeout_ms } => {
                    process.engines.drain(world, &run, timeout_ms);
                    if let Some(known) = process.runs.get(&run) {
                        let step = known.serial * 16 + STOPPED_STEP;
                        let after_ms = self.random.between(1, 400).min(timeout_ms.max(20));
                        world.remind(self.host, self.life, after_ms, Timer::Run { replica: run.replica, epoch: run.epoch.0, step });
                    }
                }
                AgentAction::Forget(run) => {
                    process.engines.forget(world, &run);
                    process.runs.remove(&run);
                }
                AgentAction::Report(report) => {
                    world.say(self.host, format!("reports {}@{}: {:?}", report.replica, report.epoch, report.status.phase));
                    process.pending.push_back(NodeUp::Replica { report });
                }
                AgentAction::Refused { reason } => world.say(self.host, format!("refuses: {reason}")),
                AgentAction::Drained => {}
            }
        }
        process.flush(world);
        if let Some(at_ms) = process.agent.next_tick_ms()
            && at_ms < process.agent_timer_ms
        {
            process.agent_timer_ms = at_ms;
            world.remind(self.host, self.life, at_ms.saturating_sub(world.now_ms) + 1, Timer::Agent);
        }
    }

    fn run_goes_on(&mut self, world: &mut World, claims: &mut Claims, run: RunId, step: u32) {
        let Some(process) = &self.process else { return };
        let Some(known) = process.runs.get(&run) else { return };
        if known.serial != step / 16 {
            return;
        }
        let is_stopping = matches!(process.agent.state(&run), Some(RunState::Stopping { .. }));
        let step = step % 16;
        if step == STOPPED_STEP && process.engines.answers(&run) {
            // It ends once it has answered, or at the end of its time.
            let timer = Timer::Run { replica: run.replica, epoch: run.epoch.0, step: known.serial * 16 + STOPPED_STEP };
            return world.remind(self.host, self.life, 20, timer);
        }
        if step == STOPPED_STEP {
            return self.feed(world, claims, AgentInput::Stopped { run });
        }
        if is_stopping {
            return;
        }
        if !self.is_sound && self.random.chance(DEATH_PERCENT) {
            *world.faults.entry("run dies while loading").or_default() += 1;
            let death = Death { reason: "it fell over".into(), restartable: true, found_memory_bytes: None, fault: None };
            return self.feed(world, claims, AgentInput::Died { run, death });
        }
        if step == READY_STEP {
            return self.feed(world, claims, AgentInput::Ready { run, numerics_id: "n1".into() });
        }
        let phase = if step == 0 { ReplicaPhase::Pulling } else { ReplicaPhase::Loading };
        let timer = Timer::Run { replica: run.replica.clone(), epoch: run.epoch.0, step: known.serial * 16 + step + 1 };
        let after_ms = self.random.between(5, 500);
        world.remind(self.host, self.life, after_ms, timer);
        self.feed(world, claims, AgentInput::Progress { run, phase, percent: 50 });
    }
}

impl Process {
    /// Sends what waits, while a session holds.
    fn flush(&mut self, world: &mut World) {
        while self.tie.core.is_welcome()
            && let Some(message) = self.pending.pop_front()
        {
            self.tie.send(world, message);
        }
    }
}

/// The numbers of the only model there is.
pub fn facts() -> ModelFacts {
    let weights_bytes = 200 * MIB;
    ModelFacts {
        layers: 30,
        context_length: 8_192,
        weights_bytes,
        kv_slot_bytes: 23_040,
        workspace_bytes: 64 * MIB,
        weights_digest: "d1".into(),
        shape: ModelShape {
            heads: 9,
            kv_heads: 3,
            experts: 0,
            hidden_size: 576,
            vocab_size: 49_152,
            embedding_bytes: weights_bytes / 10,
            head_bytes: 0,
            layer_bytes: vec![weights_bytes * 9 / 10 / 30; 30],
            expert_bytes: vec![],
            tensor_extra_bytes: vec![],
        },
    }
}
