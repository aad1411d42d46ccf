//! The engines of a simulated worker: production's `EngineCore` (scheduler, block manager, sampler) with the stub model, and
//! the engine service's part of their streams.
//!
//! Steps take simulated time. A run gets its engine with the first request. Invariants it checks after every step: those of
//! the scheduler and of the block manager, and that the model can run what was planned.

use std::collections::BTreeMap;
use std::time::Duration;

use forge_engine::{EngineCore, EngineOptions};
use forge_shared::generate::{AdmitError, EngineEvent};
use forge_shared::link::EngineStatus;
use forge_shared::telemetry::run_label;
use forge_worker::agent::RunId;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

use crate::host::Host;
use crate::message::{CallId, Message, StreamId, Timer};
use crate::random::Random;
use crate::streams::Wire;
use crate::stub::{self, StubModel};
use crate::world::World;

/// What deaths of engines that answered somebody are counted under.
pub const DIED_WITH_REQUESTS: &str = "engine dies with requests";
/// A step's time, milliseconds.
const STEP_MS: (u64, u64) = (5, 60);
/// Shortest time between two words on how busy an engine is, milliseconds.
const STATUS_MS: u64 = 100;

struct Engine {
    core: EngineCore,
    model: StubModel,
    logits: Vec<f32>,
    begun_ms: u64,
}

/// A run as its link has it.
struct Run {
    engine: Option<Engine>,
    /// Why it takes nothing.
    absent: Option<String>,
    /// When what is left fails; it takes nothing new.
    drains_until_ms: Option<u64>,
    restarts: u32,
    told_ms: u64,
    is_stepping: bool,
}

struct Call {
    run: RunId,
    events: mpsc::Receiver<EngineEvent>,
    deadline_ms: u64,
}

/// See the module.
pub struct Engines {
    host: Host,
    life: u64,
    random: Random,
    runs: BTreeMap<RunId, Run>,
    calls: BTreeMap<(StreamId, CallId), Call>,
    watches: BTreeMap<(StreamId, CallId), RunId>,
}

impl Engines {
    /// Of a process that begins.
    pub fn new(host: Host, life: u64, seed: u64) -> Self {
        Engines { host, life, random: Random::new(seed, life), runs: BTreeMap::new(), calls: BTreeMap::new(), watches: BTreeMap::new() }
    }

    /// A run loads its model, once more perhaps.
    pub fn open(&mut self, run: &RunId) {
        let new = Run { engine: None, absent: None, drains_until_ms: None, restarts: 0, told_ms: 0, is_stepping: false };
        let known = self.runs.entry(run.clone()).and_modify(|run| run.restarts += 1).or_insert(new);
        known.absent = Some("the model is loading".into());
    }

    /// A run can answer.
    pub fn ready(&mut self, world: &mut World, run: &RunId) {
        if let Some(known) = self.runs.get_mut(run).filter(|known| known.drains_until_ms.is_none()) {
            known.absent = None;
            self.tell(world, run);
        }
    }

    /// A run takes nothing new, and has so long for the rest.
    pub fn drain(&mut self, world: &mut World, run: &RunId, timeout_ms: u64) {
        let Some(known) = self.runs.get_mut(run) else { return };
        let until_ms = world.now_ms.saturating_add(timeout_ms);
        known.drains_until_ms = Some(known.drains_until_ms.map_or(until_ms, |earlier| earlier.min(until_ms)));
        known.absent = Some("the replica is stopping".into());
        self.tell(world, run);
        self.soon(world, run);
    }

    /// Whether a run that drains still answers somebody.
    pub fn answers(&self, run: &RunId) -> bool {
        self.runs.get(run).and_then(|run| run.engine.as_ref()).is_some_and(|engine| !engine.core.is_idle())
    }

    /// A run's engine dies.
    pub fn die(&mut self, world: &mut World, run: &RunId, reason: &str) {
        let Some(known) = self.runs.get_mut(run) else { return };
        if known.engine.take().is_some_and(|engine| !engine.core.is_idle()) {
            *world.faults.entry(DIED_WITH_REQUESTS).or_default() += 1;
        }
        known.absent = Some(reason.to_owned());
        self.tell(world, run);
        self.flush(world, run);
    }

    /// A run is gone.
    pub fn forget(&mut self, world: &mut World, run: &RunId) {
        if let Some(mut known) = self.runs.remove(run) {
            known.engine = None;
            self.flush(world, run);
        }
        let over: Vec<(StreamId, CallId)> = self.watches.iter().filter(|(_, of)| *of == run).map(|(id, _)| *id).collect();
        for (stream, call) in over {
            self.watches.remove(&(stream, call));
            self.send(world, stream, Wire::NotFound { call });
        }
    }

    /// Whether no engine holds anything of anybody.
    pub fn are_idle(&self) -> bool {
        let is_idle = |engine: &Engine| engine.core.is_idle() && engine.core.scheduler().blocks().used() == 0;
        self.calls.is_empty() && self.runs.values().filter_map(|run| run.engine.as_ref()).all(is_idle)
    }

    /// A gateway says something.
    pub fn arrives(&mut self, world: &mut World, stream: StreamId, wire: Wire) {
        match wire {
            Wire::Ping => self.send(world, stream, Wire::Pong),
            Wire::Submit { call, run, request, timeout_ms } => {
                let (sender, events) = mpsc::channel(EngineOptions::default().event_capacity);
                let admitted = self.submit(world, &run, (*request).clone(), sender);
                let deadline_ms = world.now_ms.saturating_add(timeout_ms);
                match admitted {
                    Ok(()) => {
                        self.calls.insert((stream, call), Call { run: run.clone(), events, deadline_ms });
                        self.send(world, stream, Wire::Admitted { call });
                        self.soon(world, &run);
                    }
                    Err(error) => self.send(world, stream, Wire::Refused { call, error }),
                }
            }
            Wire::Cancel { call } => {
                self.calls.remove(&(stream, call));
                self.watches.remove(&(stream, call));
            }
            Wire::WatchReplica { call, run } => match self.runs.get(&run) {
                Some(known) => {
                    let status = status(known);
                    self.watches.insert((stream, call), run);
                    self.send(world, stream, Wire::Update { call, status });
                }
                None => self.send(world, stream, Wire::NotFound { call }),
            },
            _ => {}
        }
    }

    /// A gateway's connection is gone, and with it its calls.
    pub fn closed(&mut self, stream: StreamId) {
        self.calls.retain(|(of, _), _| *of != stream);
        self.watches.retain(|(of, _), _| *of != stream);
    }

    fn submit(
        &mut self,
        world: &mut World,
        run: &RunId,
        request: forge_shared::generate::GenerateRequest,
        events: mpsc::Sender<EngineEvent>,
    ) -> Result<(), AdmitError> {
        let unavailable = |reason: String| AdmitError::Unavailable { reason };
        let Some(known) = self.runs.get_mut(run) else { return Err(unavailable(format!("this worker does not run {run}"))) };
        if let Some(reason) = &known.absent {
            return Err(unavailable(reason.clone()));
        }
        if known.engine.is_none() {
            let options =
                EngineOptions { max_batch_size: 6, max_chunk_rows: 16, max_waiting: 4, epoch: run.epoch, ..EngineOptions::default() };
            let label = run_label("talk", "talk/0", Default::default());
            let core = EngineCore::on_one_thread(stub::info(), stub::tokenizer(), options, stub::metrics(), &label)
                .map_err(|error| unavailable(error.to_string()))?;
            known.engine = Some(Engine { core, model: StubModel::default(), logits: Vec::new(), begun_ms: world.now_ms });
        }
        let Some(engine) = &mut known.engine else { return Err(unavailable("there is no engine".into())) };
        engine.core.submit(request, events, Duration::from_millis(world.now_ms - engine.begun_ms))
    }

    /// A run's next step is due after a step's time.
    fn soon(&mut self, world: &mut World, run: &RunId) {
        let Some(known) = self.runs.get_mut(run) else { return };
        if known.is_stepping || known.engine.as_ref().is_none_or(|engine| engine.core.is_idle()) {
            return;
        }
        known.is_stepping = true;
        let after_ms = self.random.between(STEP_MS.0, STEP_MS.1);
        world.remind(self.host, self.life, after_ms, Timer::Engine { replica: run.replica.clone(), epoch: run.epoch.0 });
    }

    /// A run's step.
    pub fn step(&mut self, world: &mut World, run: &RunId) {
        let Some(known) = self.runs.get_mut(run) else { return };
        known.is_stepping = false;
        let is_over = known.drains_until_ms.is_some_and(|until_ms| world.now_ms >= until_ms);
        if let Some(engine) = &mut known.engine {
            if is_over {
                engine.core.fail_all("the engine is shutting down");
            }
            let now = Duration::from_millis(world.now_ms - engine.begun_ms);
            if let Err(reason) = engine.step(now) {
                world.violate("an engine's plans and blocks are sound", format!("{run} at {}: {reason}", self.host));
            }
        }
        self.flush(world, run);
        let is_due = self.runs.get(run).is_some_and(|known| world.now_ms >= known.told_ms + STATUS_MS);
        if is_due {
            self.tell(world, run);
        }
        self.soon(world, run);
    }

    /// Sends what a run's engine has answered.
    fn flush(&mut self, world: &mut World, run: &RunId) {
        let mut replies = Vec::new();
        for (&(stream, call), known) in self.calls.iter_mut().filter(|(_, known)| known.run == *run) {
            let mut events = Vec::new();
            let has_ended = loop {
                match known.events.try_recv() {
                    Ok(event) => events.push(event),
                    Err(error) => break error == TryRecvError::Disconnected,
                }
            };
            let is_late = world.now_ms >= known.deadline_ms;
            if events.is_empty() && !has_ended && is_late {
                events.push(EngineEvent::Failed { reason: "the request's time is over".into(), retryable: false });
            }
            let is_last = matches!(events.last(), Some(EngineEvent::Done(_) | EngineEvent::Failed { .. }));
            replies.push((stream, call, events, has_ended, is_last));
        }
        for (stream, call, events, has_ended, is_last) in replies {
            if !events.is_empty() {
                self.send(world, stream, Wire::Events { call, events });
            }
            if has_ended && !is_last {
                self.send(world, stream, Wire::Ended { call });
            }
            if has_ended || is_last {
                self.calls.remove(&(stream, call));
            }
        }
    }

    /// Tells watchers how a run does.
    fn tell(&mut self, world: &mut World, run: &RunId) {
        let Some(known) = self.runs.get_mut(run) else { return };
        known.told_ms = world.now_ms;
        let status = status(known);
        let watchers: Vec<(StreamId, CallId)> = self.watches.iter().filter(|(_, of)| *of == run).map(|(id, _)| *id).collect();
        for (stream, call) in watchers {
            self.send(world, stream, Wire::Update { call, status: status.clone() });
        }
    }

    fn send(&self, world: &mut World, stream: StreamId, wire: Wire) {
        world.stream(stream, self.host, Message::Wire(Box::new(wire)));
    }
}

impl Engine {
    fn step(&mut self, now: Duration) -> Result<(), String> {
        if self.core.begin_step(now)
            && let Some(plan) = self.core.plan()
        {
            self.model.step(plan, &mut self.logits)?;
            self.core.finish_step(&mut self.logits, now).map_err(|error| error.to_string())?;
        }
        self.core.scheduler().check()
    }
}

fn status(run: &Run) -> EngineStatus {
    let mut status = EngineStatus { restarts: run.restarts, ..EngineStatus::default() };
    match &run.absent {
        Some(reason) => status.reason = reason.clone(),
        None => status.ready = true,
    }
    if let Some(scheduler) = run.engine.as_ref().map(|engine| engine.core.scheduler()) {
        (status.running, status.waiting) = (scheduler.running(), scheduler.waiting());
        status.kv_blocks_used = scheduler.blocks().used();
    }
    status
}
