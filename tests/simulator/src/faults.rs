//! What goes wrong in a run: a list that follows from the seed, of which any part can be left out.

use crate::host::Host;
use crate::random::Random;

/// A fault.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant is described; its fields' names and types say the rest")]
pub enum FaultKind {
    /// The process is killed; another comes soon after, or at the fault's end.
    Kill(Host),
    /// The process dies in its fsync number so many from now.
    CrashAtSync { host: Host, ahead: u64 },
    /// The disk takes so many bytes more, until the fault's end.
    DiskFull { host: Host, room_bytes: usize },
    /// The process stands still.
    Pause(Host),
    /// One way or both ways between two processes.
    Cut { from: Host, to: Host, is_one_way: bool },
    /// One process and all others.
    Isolate(Host),
    /// Messages are lost, of a hundred.
    Loss(u64),
    /// Messages take up to so long, milliseconds, and overtake each other.
    Delay(u64),
    /// Messages arrive twice, of a hundred.
    Duplicate(u64),
    /// A wall clock jumps, for good.
    ClockJump { host: Host, by_ms: i64 },
    /// All coordinators are killed at once.
    KillCoordinators,
    /// An engine of a worker dies.
    EngineDies(Host),
    /// An engine dies in the middle of answers, wherever there is one.
    AnsweringEngineDies,
    /// A worker is killed in the middle of answers, whichever has some.
    AnsweringWorkerDies,
    /// A worker says good-bye and comes back as a new process.
    Leave(Host),
}

impl FaultKind {
    /// Its name in counts.
    pub fn name(&self) -> &'static str {
        match self {
            FaultKind::Kill(Host::Coordinator(_)) => "kill coordinator",
            FaultKind::Kill(Host::Worker(_)) => "kill worker",
            FaultKind::Kill(_) => "kill gateway",
            FaultKind::CrashAtSync { .. } => "crash at fsync planned",
            FaultKind::DiskFull { .. } => "disk full",
            FaultKind::Pause(Host::Gateway(_)) => "pause gateway",
            FaultKind::Pause(_) => "pause",
            FaultKind::Cut { is_one_way: true, .. } => "one-way cut",
            FaultKind::Cut { from: Host::Gateway(_), to: Host::Worker(_), .. } => "cut between gateway and worker",
            FaultKind::Cut { .. } => "cut",
            FaultKind::Isolate(Host::Gateway(_)) => "isolation of a gateway",
            FaultKind::Isolate(_) => "isolation",
            FaultKind::Loss(_) => "loss",
            FaultKind::Delay(_) => "delay, reordering",
            FaultKind::Duplicate(_) => "duplication",
            FaultKind::ClockJump { .. } => "clock jump",
            FaultKind::KillCoordinators => "kill all coordinators",
            FaultKind::EngineDies(_) => "engine dies",
            FaultKind::AnsweringEngineDies => "answering engine dies",
            FaultKind::AnsweringWorkerDies => "kill answering worker",
            FaultKind::Leave(_) => "worker leaves",
        }
    }
}

/// A fault and its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// When it begins, simulated milliseconds.
    pub at_ms: u64,
    /// How long it lasts, milliseconds.
    pub for_ms: u64,
    /// What it is.
    pub kind: FaultKind,
}

/// Who can have faults.
#[derive(Debug, Clone, Copy)]
pub struct Cast {
    /// Coordinators, from 1.
    pub coordinators: u16,
    /// Workers, from 0.
    pub workers: u16,
    /// Gateways, from 0.
    pub gateways: u16,
}

impl Cast {
    fn any(&self, random: &mut Random) -> Host {
        let all = u64::from(self.coordinators) + u64::from(self.workers) + u64::from(self.gateways);
        match random.below(all) as u16 {
            number if number < self.coordinators => Host::Coordinator(number + 1),
            number if number < self.coordinators + self.workers => Host::Worker(number - self.coordinators),
            number => Host::Gateway(number - self.coordinators - self.workers),
        }
    }
}

/// The faults of a seed, in `safety_ms`.
pub fn schedule(seed: u64, cast: &Cast, safety_ms: u64) -> Vec<Fault> {
    let mut random = Random::new(seed, 2);
    let count = random.between(4, 24);
    let mut faults: Vec<Fault> = (0..count).map(|_| fault(&mut random, cast, safety_ms)).collect();
    faults.sort_by_key(|fault| fault.at_ms);
    faults
}

/// Something that goes wrong between callers and engines.
fn answering(random: &mut Random, gateway: Host, worker: Host) -> FaultKind {
    match random.below(8) {
        0 => FaultKind::Kill(gateway),
        1 => FaultKind::Pause(gateway),
        2 => FaultKind::Cut { from: gateway, to: worker, is_one_way: random.chance(50) },
        3 => FaultKind::Isolate(gateway),
        4 => FaultKind::AnsweringWorkerDies,
        5 => FaultKind::EngineDies(worker),
        _ => FaultKind::AnsweringEngineDies,
    }
}

fn fault(random: &mut Random, cast: &Cast, safety_ms: u64) -> Fault {
    let at_ms = random.between(500, safety_ms.saturating_sub(1_000));
    let for_ms = random.between(100, 6_000);
    let coordinator = Host::Coordinator(random.between(1, u64::from(cast.coordinators)) as u16);
    let worker = (cast.workers > 0).then(|| Host::Worker(random.below(u64::from(cast.workers)) as u16));
    let gateway = (cast.gateways > 0).then(|| Host::Gateway(random.below(u64::from(cast.gateways)) as u16));
    let any = cast.any(random);
    if let (Some(gateway), Some(worker), true) = (gateway, worker, random.chance(if gateway.is_some() { 40 } else { 0 })) {
        return Fault { at_ms, for_ms, kind: answering(random, gateway, worker) };
    }
    let kind = match random.below(20) {
        0 | 1 => FaultKind::Kill(coordinator),
        2 | 3 => FaultKind::Kill(any),
        4 | 5 => FaultKind::CrashAtSync { host: coordinator, ahead: random.between(1, 40) },
        6 => FaultKind::DiskFull { host: coordinator, room_bytes: random.below(6_000) as usize },
        7 => FaultKind::Pause(coordinator),
        8 => FaultKind::Pause(any),
        9 | 10 => {
            let is_one_way = random.chance(50);
            FaultKind::Cut { from: coordinator, to: cast.any(random), is_one_way }
        }
        11 => FaultKind::Cut { from: any, to: cast.any(random), is_one_way: random.chance(50) },
        12 => FaultKind::Isolate(coordinator),
        13 => FaultKind::Isolate(any),
        14 => FaultKind::Loss(random.between(1, 30)),
        15 => FaultKind::Delay(random.between(5, 400)),
        16 => FaultKind::Duplicate(random.between(1, 30)),
        17 => {
            let by_ms = random.between(1_000, 7_200_000) as i64;
            FaultKind::ClockJump { host: coordinator, by_ms: if random.chance(50) { by_ms } else { -by_ms } }
        }
        18 => match worker {
            Some(worker) if random.chance(50) => FaultKind::EngineDies(worker),
            Some(worker) => FaultKind::Leave(worker),
            None => FaultKind::KillCoordinators,
        },
        _ => FaultKind::KillCoordinators,
    };
    Fault { at_ms, for_ms, kind }
}
