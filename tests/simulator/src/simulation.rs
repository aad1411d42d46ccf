//! One run: the cluster, its faults, and the two phases.
//!
//! In the phase of safety things go wrong, and every invariant is looked at after every event. Then all faults end, and in
//! the phase of liveness everything that is wished must come about in time.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use forge_gateway::cluster::Serves;
use forge_shared::cluster::service::{ReplicaPhase, ReplicaRecord};
use forge_worker::agent::RunId;

use crate::callers::{Caller, Served};
use crate::clients::{Client, History, TOKEN, TOKEN_USES};
use crate::coordinators::Coordinator;
use crate::faults::{Cast, Fault, FaultKind, schedule};
use crate::gateways::Gateway;
use crate::host::Host;
use crate::ledger::SharedLedger;
use crate::message::{Event, Timer};
use crate::workers::{Claims, Worker};
use crate::world::{Violation, Weather, World};

/// Longest phase of liveness, milliseconds.
const LIVENESS_MS: u64 = 400_000;
/// How often it is looked whether everything has come about, milliseconds.
const LOOK_MS: u64 = 20;

/// How large a run is.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Everything follows from it.
    pub seed: u64,
    /// Who takes part.
    pub cast: Cast,
    /// Operators.
    pub clients: u16,
    /// Who asks gateways for answers.
    pub callers: u16,
    /// Length of the phase of safety, milliseconds.
    pub safety_ms: u64,
    /// What goes wrong.
    pub faults: Vec<Fault>,
    /// Prints everything as it happens.
    pub prints: bool,
}

impl Plan {
    /// The usual run of a seed.
    pub fn of_seed(seed: u64) -> Plan {
        Plan::of(seed, Cast { coordinators: 3, workers: 5, gateways: 2 }, 6)
    }

    /// The run of a seed without gateways and callers.
    pub fn without_gateways(seed: u64) -> Plan {
        Plan::of(seed, Cast { coordinators: 3, workers: 5, gateways: 0 }, 0)
    }

    fn of(seed: u64, cast: Cast, callers: u16) -> Plan {
        let safety_ms = 20_000;
        Plan { seed, cast, clients: 3, callers, safety_ms, faults: schedule(seed, &cast, safety_ms), prints: false }
    }
}

/// What a run came to.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What did not hold, if anything.
    pub violation: Option<Violation>,
    /// Of all events.
    pub digest: u64,
    /// Events there were.
    pub events: u64,
    /// Simulated milliseconds.
    pub simulated_ms: u64,
    /// Faults that came about, by kind.
    pub faults: BTreeMap<&'static str, u64>,
    /// Entries that were applied.
    pub entries: u64,
    /// Changes that were acknowledged, reads that were answered, questions that were given up.
    pub answers: [u64; 3],
    /// What became of the callers' orders.
    pub served: Served,
    /// The last events.
    pub timeline: String,
}

struct Simulation {
    world: World,
    faults: Vec<Fault>,
    coordinators: Vec<Coordinator>,
    clients: Vec<Client>,
    workers: Vec<Worker>,
    gateways: Vec<Gateway>,
    callers: Vec<Caller>,
    claims: Claims,
    history: History,
    ledger: SharedLedger,
    /// Until when processes stand still, and what happens to them meanwhile, in order.
    paused: BTreeMap<Host, (u64, Vec<Event>)>,
    /// Who led in each term.
    leaders: BTreeMap<u64, Host>,
    all: Vec<Host>,
}

/// Carries a plan out. A panic of the code under test is a violation too.
pub fn run(plan: &Plan) -> Outcome {
    let mut simulation = Simulation::new(plan);
    let ended = catch_unwind(AssertUnwindSafe(|| simulation.run(plan)));
    if let Err(panic) = ended {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned()).or_else(|| panic.downcast_ref::<String>().cloned());
        simulation.world.violate("nothing panics", text.unwrap_or_default());
    }
    let Simulation { world, history, ledger, callers, .. } = simulation;
    let entries = ledger.lock().last();
    Outcome {
        digest: world.trace.digest(),
        events: world.trace.events(),
        simulated_ms: world.now_ms,
        entries,
        answers: [history.done, history.reads, history.given_up],
        served: callers.iter().fold(Served::default(), |sum, caller| sum.plus(&caller.served)),
        timeline: world.trace.timeline(60),
        faults: world.faults,
        violation: world.violation,
    }
}

impl Simulation {
    fn new(plan: &Plan) -> Simulation {
        let ledger = SharedLedger::default();
        let ids: Vec<u64> = (1..=u64::from(plan.cast.coordinators)).collect();
        let coordinators: Vec<_> = (1..=plan.cast.coordinators).map(|id| Coordinator::new(id, &ids, plan.seed, ledger.clone())).collect();
        let hosts: Vec<Host> = coordinators.iter().map(|coordinator| coordinator.host).collect();
        let mut clients: Vec<_> = (0..plan.clients).map(|index| Client::new(index, &hosts, plan.seed)).collect();
        for client in &mut clients {
            (client.has_services, client.has_callers) = (plan.cast.workers > 0, plan.callers > 0);
        }
        let workers: Vec<_> = (0..plan.cast.workers).map(|index| Worker::new(index, &hosts, plan.seed)).collect();
        let mut all = hosts.clone();
        all.extend(workers.iter().map(|worker| worker.host));
        all.extend((0..plan.clients).map(Host::Client));
        let gateways: Vec<_> = (0..plan.cast.gateways).map(|index| Gateway::new(index, &hosts, plan.seed)).collect();
        let doors: Vec<Host> = gateways.iter().map(|gateway| gateway.host).collect();
        all.extend(doors.iter().copied());
        all.extend((0..plan.callers).map(Host::Caller));
        Simulation {
            world: World::new(plan.seed, plan.prints),
            faults: plan.faults.clone(),
            coordinators,
            clients,
            workers,
            gateways,
            callers: (0..plan.callers).map(|index| Caller::new(index, &doors, plan.seed)).collect(),
            claims: Claims::default(),
            history: History::default(),
            ledger,
            paused: BTreeMap::new(),
            leaders: BTreeMap::new(),
            all,
        }
    }

    fn run(&mut self, plan: &Plan) {
        for (index, fault) in self.faults.iter().enumerate() {
            self.world.put(fault.at_ms, Event::FaultBegins(index));
        }
        for coordinator in &mut self.coordinators {
            coordinator.start(&mut self.world);
        }
        for worker in &mut self.workers {
            worker.start(&mut self.world);
        }
        for client in &mut self.clients {
            client.start(&mut self.world);
        }
        for gateway in &mut self.gateways {
            gateway.start(&mut self.world);
        }
        for caller in &mut self.callers {
            caller.start(&mut self.world);
        }
        while self.world.violation.is_none()
            && let Some(event) = self.world.advance(plan.safety_ms)
        {
            self.happen(event);
        }
        if self.world.violation.is_none() {
            self.end_faults();
            self.settle(plan.safety_ms + LIVENESS_MS);
        }
    }

    /// All that is wished comes about.
    fn settle(&mut self, until_ms: u64) {
        self.clients.iter_mut().for_each(|client| client.is_quiet = true);
        self.callers.iter_mut().for_each(|caller| caller.be_quiet(&mut self.world));
        let mut next_look_ms = 0;
        while self.world.violation.is_none() {
            if self.world.now_ms >= next_look_ms {
                next_look_ms = self.world.now_ms + LOOK_MS;
                if self.is_settled() {
                    break;
                }
            }
            let Some(event) = self.world.advance(until_ms) else {
                let seen = self.unsettled();
                return self.world.violate("once faults stop everything comes about", seen);
            };
            self.happen(event);
        }
        self.check_end();
    }

    fn is_settled(&self) -> bool {
        let first = self.coordinators[0].applied_index();
        self.clients.iter().all(|client| !client.is_busy())
            && self.workers.iter().all(Worker::is_welcome)
            && self.gateways_settled()
            && self.coordinators.iter().any(Coordinator::leads)
            && self.coordinators.iter().all(|coordinator| coordinator.applied_index() == first)
            && self.wishes_open().is_empty()
    }

    /// Every caller has its answer, nobody holds anything of anybody, and gateways serve what there is.
    fn gateways_settled(&self) -> bool {
        let is_done = |gateway: &Gateway| gateway.is_welcome() && gateway.requests() == 0;
        self.callers.iter().all(|caller| !caller.is_busy())
            && self.gateways.iter().all(is_done)
            && self.workers.iter().all(Worker::is_idle)
            && self.unserved().is_none()
    }

    /// A gateway that serves other replicas than those that are there, in words.
    fn unserved(&self) -> Option<String> {
        let replicated = self.coordinators.iter().find(|it| it.leads()).and_then(Coordinator::replicated)?;
        let state = replicated.read();
        let mut ready = Serves::new();
        for (name, service) in state.services() {
            let mut epochs: Vec<_> = service.replicas.iter().map(|replica| replica.plan.epoch).collect();
            epochs.sort_unstable();
            if !epochs.is_empty() {
                ready.insert(name.clone(), epochs);
            }
        }
        self.gateways.iter().find_map(|gateway| {
            let mut serves = gateway.serves().cloned().unwrap_or_default();
            serves.values_mut().for_each(|epochs| epochs.sort_unstable());
            (serves != ready).then(|| format!("{} serves {serves:?} of {ready:?}", gateway.host))
        })
    }

    /// What is wished and has not come about, in words.
    fn wishes_open(&self) -> Vec<String> {
        let Some(replicated) = self.coordinators.iter().find(|it| it.leads()).and_then(Coordinator::replicated) else { return Vec::new() };
        let state = replicated.read();
        let mut open = Vec::new();
        for (name, service) in state.services() {
            let wished = if service.is_deleted { 0 } else { service.service.spec.replicas as usize };
            let is_up = |replica: &ReplicaRecord| {
                replica.generation == service.generation
                    && replica.status.phase == ReplicaPhase::Ready
                    && self
                        .workers
                        .iter()
                        .any(|worker| worker.id() == replica.plan.ranks[0].node && worker.serves(&RunId::of(&replica.plan)))
            };
            let up = service.replicas.iter().filter(|replica| is_up(replica)).count();
            if up != wished || service.replicas.len() != wished || !service.leaving.is_empty() || service.is_deleted {
                open.push(format!(
                    "{name}: {wished} wished, {up} up, {} planned, {} leaving, {:?}",
                    service.replicas.len(),
                    service.leaving.len(),
                    service.refusal
                ));
            }
        }
        let planned = state.standing_plans().count();
        let runs: usize = self.workers.iter().map(Worker::runs).sum();
        if planned != runs {
            open.push(format!("{planned} plans and {runs} runs"));
        }
        open
    }

    fn unsettled(&self) -> String {
        let coordinators: Vec<String> = self
            .coordinators
            .iter()
            .map(|it| format!("{}: up {}, leads {}, applied {:?}", it.host, it.is_up(), it.leads(), it.applied_index()))
            .collect();
        let busy = self.clients.iter().filter(|client| client.is_busy()).count();
        let away: Vec<String> = self.workers.iter().filter(|worker| !worker.is_welcome()).map(|worker| worker.host.to_string()).collect();
        let callers: Vec<String> = self.callers.iter().filter(|caller| caller.is_busy()).map(Caller::waits_for).collect();
        let held: Vec<String> = self.workers.iter().filter(|worker| !worker.is_idle()).map(|worker| worker.host.to_string()).collect();
        let open: Vec<String> = self.gateways.iter().map(|it| format!("{} has {} requests", it.host, it.requests())).collect();
        format!(
            "{}; {busy} clients wait; no session: {away:?}; {}; callers: {callers:?}; {open:?}; engines that hold something: {held:?}; {}",
            coordinators.join("; "),
            self.wishes_open().join("; "),
            self.unserved().unwrap_or_default(),
        )
    }

    fn check_end(&mut self) {
        if self.world.violation.is_some() {
            return;
        }
        let Some(replicated) = self.coordinators.iter().find(|it| it.leads()).and_then(Coordinator::replicated) else { return };
        let state = replicated.read();
        if state.revision().0 < self.history.revision {
            let seen = format!("revision {} was acknowledged, and the state is at {}", self.history.revision, state.revision());
            self.world.violate("no acknowledged command is lost", seen);
        }
        if let Some(missing) = self.history.keys.iter().find(|name| !state.keys().contains_key(*name)) {
            self.world.violate("no acknowledged command is lost", format!("key {missing:?} was acknowledged and is not there"));
        }
        let uses = self.ledger.lock().uses.len();
        if let Some(token) = state.token(TOKEN)
            && (TOKEN_USES - token.uses_left) as usize != uses
        {
            let seen = format!("{uses} requests used the token, and it was used {} times", TOKEN_USES - token.uses_left);
            self.world.violate("a request takes effect once", seen);
        }
    }

    fn happen(&mut self, event: Event) {
        let (host, kind, detail) = label(&event);
        if let Some((_, held)) = host.and_then(|host| self.paused.get_mut(&host)) {
            return held.push(event);
        }
        let Some(host) = host else {
            return match event {
                Event::FaultBegins(index) => self.begin(index),
                Event::FaultEnds(index) => self.end(index),
                _ => {}
            };
        };
        self.world.trace.event(self.world.now_ms, host, kind, detail);
        match host {
            Host::Coordinator(id) => {
                let coordinator = &mut self.coordinators[usize::from(id) - 1];
                let is_stale = matches!(event, Event::Timer { life, .. } if life != coordinator.life);
                if !is_stale {
                    coordinator.handle(&mut self.world, event);
                }
                self.check(id);
            }
            Host::Client(index) => self.clients[usize::from(index)].handle(&mut self.world, &mut self.history, event),
            Host::Worker(index) => {
                let worker = &mut self.workers[usize::from(index)];
                let is_stale = matches!(event, Event::Timer { life, .. } if life != worker.life);
                if !is_stale {
                    worker.handle(&mut self.world, &mut self.claims, event);
                }
            }
            Host::Gateway(index) => {
                let gateway = &mut self.gateways[usize::from(index)];
                let is_stale = matches!(event, Event::Timer { life, .. } if life != gateway.life);
                if !is_stale {
                    gateway.handle(&mut self.world, event);
                }
            }
            Host::Caller(index) => self.callers[usize::from(index)].handle(&mut self.world, event),
        }
    }

    /// What can be wrong after something happened at a coordinator.
    fn check(&mut self, id: u16) {
        let coordinator = &self.coordinators[usize::from(id) - 1];
        if let Some(term) = coordinator.led_term() {
            let leader = *self.leaders.entry(term).or_insert(coordinator.host);
            if leader != coordinator.host {
                self.world.violate("one leader per term", format!("{leader} and {} lead in term {term}", coordinator.host));
            }
        }
        let mut ledger = self.ledger.lock();
        if let Some(violation) = ledger.violation.take() {
            self.world.violate(violation.invariant, violation.seen);
        }
        for (node, incarnation, reason) in std::mem::take(&mut ledger.lost) {
            let worker = self.workers.iter().find(|worker| worker.id().0 == node);
            let left_ms = worker.and_then(|worker| worker.lease_left_ms(self.world.now_ms, incarnation)).unwrap_or(0);
            if left_ms > 0 && reason.starts_with("no heartbeat") {
                let seen = format!("{node} was taken to be lost with {left_ms} ms of its lease left");
                self.world.violate("a lease ends at its node no later than at the leader", seen);
            }
        }
    }

    fn coordinator(&mut self, host: Host) -> Option<&mut Coordinator> {
        self.coordinators.iter_mut().find(|coordinator| coordinator.host == host)
    }

    fn begin(&mut self, index: usize) {
        let Fault { kind, for_ms, .. } = self.faults[index].clone();
        let now_ms = self.world.now_ms;
        *self.world.faults.entry(kind.name()).or_default() += 1;
        let host = match &kind {
            FaultKind::Kill(host) | FaultKind::Pause(host) | FaultKind::Isolate(host) => *host,
            FaultKind::CrashAtSync { host, .. } | FaultKind::DiskFull { host, .. } | FaultKind::ClockJump { host, .. } => *host,
            FaultKind::Cut { from, .. } => *from,
            FaultKind::EngineDies(host) | FaultKind::Leave(host) => *host,
            _ => Host::Coordinator(0),
        };
        self.world.say(host, format!("FAULT {kind:?} for {for_ms} ms"));
        self.world.put(now_ms + for_ms, Event::FaultEnds(index));
        match kind {
            FaultKind::Kill(host) => self.kill(host),
            FaultKind::CrashAtSync { host, ahead } => {
                if let Some(coordinator) = self.coordinator(host) {
                    coordinator.disk.crash_at_sync(Some(coordinator.disk.syncs() + ahead));
                }
            }
            FaultKind::DiskFull { host, room_bytes } => {
                if let Some(coordinator) = self.coordinator(host) {
                    coordinator.disk.set_capacity_bytes(Some(coordinator.disk.used_bytes() + room_bytes));
                }
            }
            FaultKind::Pause(host) => {
                let paused = self.paused.entry(host).or_default();
                paused.0 = paused.0.max(now_ms + for_ms);
            }
            FaultKind::Loss(percent) => self.world.weather.loss_percent = percent,
            FaultKind::Delay(most_ms) => self.world.weather.delay_ms = most_ms,
            FaultKind::Duplicate(percent) => self.world.weather.duplicate_percent = percent,
            FaultKind::ClockJump { host, by_ms } => {
                if let Some(coordinator) = self.coordinator(host) {
                    coordinator.clock_off_ms += by_ms;
                }
            }
            FaultKind::KillCoordinators => {
                for coordinator in &mut self.coordinators {
                    coordinator.kill(&mut self.world);
                }
            }
            FaultKind::Cut { .. } | FaultKind::Isolate(_) => {
                let cuts = self.cuts(&kind);
                self.world.cuts.extend(cuts);
            }
            FaultKind::EngineDies(host) => {
                if let Some(worker) = self.workers.iter_mut().find(|worker| worker.host == host) {
                    worker.engine_dies(&mut self.world, &mut self.claims);
                }
            }
            FaultKind::AnsweringEngineDies => {
                if let Some(worker) = self.workers.iter_mut().find(|worker| worker.answers()) {
                    worker.engine_dies(&mut self.world, &mut self.claims);
                }
            }
            FaultKind::AnsweringWorkerDies => {
                if let Some(worker) = self.workers.iter_mut().find(|worker| worker.answers()) {
                    worker.kill(&mut self.world);
                }
            }
            FaultKind::Leave(host) => {
                if let Some(worker) = self.workers.iter_mut().find(|worker| worker.host == host) {
                    worker.leave(&mut self.world);
                }
            }
        }
    }

    fn cuts(&self, kind: &FaultKind) -> Vec<(Host, Host)> {
        match *kind {
            FaultKind::Cut { from, to, is_one_way: true } => vec![(from, to)],
            FaultKind::Cut { from, to, .. } => vec![(from, to), (to, from)],
            FaultKind::Isolate(host) => {
                let others = self.all.iter().filter(|other| **other != host);
                others.flat_map(|&other| [(host, other), (other, host)]).collect()
            }
            _ => Vec::new(),
        }
    }

    fn kill(&mut self, host: Host) {
        match host {
            Host::Coordinator(id) => self.coordinators[usize::from(id) - 1].kill(&mut self.world),
            Host::Worker(index) => self.workers[usize::from(index)].kill(&mut self.world),
            Host::Gateway(index) => self.gateways[usize::from(index)].kill(&mut self.world),
            Host::Client(_) | Host::Caller(_) => {}
        }
    }

    fn end(&mut self, index: usize) {
        let Fault { kind, .. } = self.faults[index].clone();
        match kind {
            FaultKind::Cut { .. } | FaultKind::Isolate(_) => {
                let cuts = self.cuts(&kind);
                for cut in cuts {
                    self.world.cuts.remove(&cut);
                }
            }
            FaultKind::DiskFull { host, .. } => {
                if let Some(coordinator) = self.coordinator(host) {
                    coordinator.disk.set_capacity_bytes(None);
                }
            }
            FaultKind::Pause(host) if self.paused.get(&host).is_some_and(|(until_ms, _)| *until_ms <= self.world.now_ms) => {
                self.resume(host);
            }
            FaultKind::Loss(_) => self.world.weather.loss_percent = 0,
            FaultKind::Delay(_) => self.world.weather.delay_ms = Weather::FAIR.delay_ms,
            FaultKind::Duplicate(_) => self.world.weather.duplicate_percent = 0,
            _ => {}
        }
    }

    /// A process goes on: all that waited for it happens at once, in order, and before anything later.
    fn resume(&mut self, host: Host) {
        let (_, held) = self.paused.remove(&host).unwrap_or_default();
        held.into_iter().for_each(|event| self.happen(event));
    }

    fn end_faults(&mut self) {
        self.world.say(Host::Coordinator(0), "all faults end");
        self.world.cuts.clear();
        self.world.weather = Weather::FAIR;
        let paused: Vec<Host> = self.paused.keys().copied().collect();
        paused.into_iter().for_each(|host| self.resume(host));
        for coordinator in &mut self.coordinators {
            coordinator.disk.set_capacity_bytes(None);
            coordinator.disk.crash_at_sync(None);
            coordinator.start(&mut self.world);
        }
        for worker in &mut self.workers {
            worker.is_sound = true;
            worker.start(&mut self.world);
        }
        for gateway in &mut self.gateways {
            gateway.start(&mut self.world);
        }
    }
}

/// Where an event happens, and numbers for the digest.
fn label(event: &Event) -> (Option<Host>, u64, u64) {
    match event {
        Event::Arrives { from, to, stream, message } => {
            let size = match message {
                crate::message::Message::Raft { bytes, .. } => bytes.len() as u64,
                _ => stream.unwrap_or(0),
            };
            (Some(*to), 1 + from.number(), size)
        }
        Event::Closed { at, stream } => (Some(*at), 2, *stream),
        Event::Timer { host, life, timer } => (Some(*host), 3 + matches!(timer, Timer::Tick) as u64, *life),
        Event::FaultBegins(_) | Event::FaultEnds(_) => (None, 0, 0),
    }
}
