//! A simulated operator: asks the coordinators for changes and reads, and holds their answers against what it knows.
//!
//! It finds its way by production's `Route`, keeps one request id over all tries of a change, and never asks two things at
//! once. Invariants it checks: an acknowledged change is newer than all that was acknowledged before it was asked for, and a
//! read sees all of that.

use forge_cluster::client::route::{Addresses, Next, Route};
use forge_shared::cluster::command::{ApiKeyRecord, Command, CommandError, JoinToken};
use forge_shared::cluster::node::Role;
use forge_shared::ids::ServiceName;
use forge_shared::spec::{ModelService, ModelServiceSpec};

use crate::gateways::SERVICE;
use crate::host::Host;
use crate::message::{Answer, Ask, CallId, Event, Message, Timer};
use crate::random::Random;
use crate::world::World;

/// For one coordinator's answer, milliseconds.
const TRY_MS: u64 = 1_000;
/// After so long a client gives up and does not know, milliseconds.
const GIVE_UP_MS: u64 = 12_000;
/// Longest pause between two things that it asks for, milliseconds.
const PAUSE_MS: u64 = 400;
/// The token that everyone uses.
pub const TOKEN: &str = "aaaa";
/// How often it may be used.
pub const TOKEN_USES: u32 = 10_000;

/// What was acknowledged to anyone.
#[derive(Debug, Default)]
pub struct History {
    /// The newest revision that an answer told of.
    pub revision: u64,
    /// Names of keys that exist for sure, in the order in which that was said.
    pub keys: Vec<String>,
    /// Answers with success, and questions that were given up.
    pub done: u64,
    /// See `done`.
    pub given_up: u64,
    /// Answers to reads.
    pub reads: u64,
}

#[derive(Debug)]
enum Wish {
    Key(String),
    Use,
    Token,
    Read,
    /// Something about a service.
    Service,
}

#[derive(Debug)]
struct Question {
    wish: Wish,
    ask: Ask,
    begun_ms: u64,
    /// What had been acknowledged when it was asked for.
    seen_revision: u64,
    /// How many keys.
    seen_keys: usize,
    route: Route,
    call: CallId,
    asked: Option<Host>,
}

/// See the module.
pub struct Client {
    host: Host,
    random: Random,
    addresses: Addresses,
    question: Option<Question>,
    number: u64,
    timer: u64,
    /// Asks for nothing new.
    pub is_quiet: bool,
    /// Asks for services too.
    pub has_services: bool,
    /// The service that callers ask for is one of them.
    pub has_callers: bool,
}

impl Client {
    /// A client of these coordinators.
    pub fn new(index: u16, coordinators: &[Host], seed: u64) -> Self {
        let addresses: Vec<String> = coordinators.iter().map(|host| host.address()).collect();
        Client {
            host: Host::Client(index),
            random: Random::new(seed, 300 + u64::from(index)),
            addresses: Addresses::new(&addresses),
            question: None,
            number: 0,
            timer: 0,
            is_quiet: false,
            has_services: false,
            has_callers: false,
        }
    }

    /// Begins to ask.
    pub fn start(&mut self, world: &mut World) {
        let after_ms = self.random.between(1, PAUSE_MS);
        self.later(world, after_ms);
    }

    /// Whether it waits for an answer.
    pub fn is_busy(&self) -> bool {
        self.question.is_some()
    }

    fn later(&mut self, world: &mut World, after_ms: u64) {
        self.timer = world.number();
        world.remind(self.host, 0, after_ms, Timer::Client(self.timer));
    }

    /// Something happens here.
    pub fn handle(&mut self, world: &mut World, history: &mut History, event: Event) {
        match event {
            Event::Timer { timer: Timer::Client(number), .. } if number == self.timer => self.go_on(world, history),
            Event::Arrives { message: Message::Answer { call, answer }, .. } => self.answered(world, history, call, answer),
            _ => {}
        }
    }

    fn go_on(&mut self, world: &mut World, history: &mut History) {
        match &mut self.question {
            None if self.is_quiet => {}
            None => {
                self.begin(world, history);
                self.ask(world);
            }
            Some(question) if world.now_ms >= question.begun_ms + GIVE_UP_MS && !self.is_quiet => {
                self.question = None;
                history.given_up += 1;
                self.later(world, 1);
            }
            Some(question) => {
                if let Some(Host::Coordinator(_)) = question.asked.take().inspect(|asked| self.addresses.demote(&asked.address())) {
                    question.call = 0;
                }
                self.ask(world);
            }
        }
    }

    fn begin(&mut self, world: &mut World, history: &History) {
        self.number += 1;
        let name = format!("{}-{}", self.host, self.number);
        let wish = match self.random.below(10) {
            _ if self.number == 1 && self.host == Host::Client(0) => Wish::Token,
            _ if self.number == 2 && self.has_callers && self.host == Host::Client(0) => Wish::Service,
            0..3 => Wish::Key(name.clone()),
            3..5 => Wish::Use,
            5..7 if self.has_services => Wish::Service,
            _ => Wish::Read,
        };
        let command = match &wish {
            Wish::Key(name) => Some(Command::PutKey { key: Box::new(key(name)) }),
            Wish::Use => Some(Command::UseJoinToken { id: TOKEN.into(), role: Role::Worker, node: name.clone() }),
            Wish::Token => Some(Command::PutJoinToken { token: token() }),
            Wish::Service => Some(self.service()),
            Wish::Read => None,
        };
        let ask = match command {
            Some(command) => Ask::Execute { request_id: name, command: Box::new(command) },
            None => Ask::Read,
        };
        self.question = Some(Question {
            wish,
            ask,
            begun_ms: world.now_ms,
            seen_revision: history.revision,
            seen_keys: history.keys.len(),
            route: Route::new(&self.addresses),
            call: 0,
            asked: None,
        });
    }

    fn service(&mut self) -> Command {
        let name = format!("s{}", self.random.below(3));
        let replicas = self.random.between(1, 3) as u32;
        if self.has_callers && (self.number == 2 || self.random.chance(25)) {
            return self.talk(replicas);
        }
        match self.random.below(10) {
            0 => Command::DeleteService { name: ServiceName(name) },
            1..4 => Command::ScaleService { name: ServiceName(name), replicas },
            change => {
                // Another wish now and then, so that replicas are rolled.
                let model = format!("a/model-{}", change % 2);
                let spec = ModelServiceSpec { model, replicas, ..ModelServiceSpec::default() };
                Command::ApplyService { service: Box::new(ModelService::new(&name, spec)) }
            }
        }
    }

    /// The service that callers ask for: it is scaled and rolled, and goes on answering with the same tokens.
    fn talk(&mut self, replicas: u32) -> Command {
        if self.number > 2 && self.random.chance(60) {
            return Command::ScaleService { name: ServiceName(SERVICE.into()), replicas };
        }
        let max_waiting = 8 + self.random.below(2) as usize;
        let spec = ModelServiceSpec { model: "a/model-0".into(), replicas: replicas.max(2), max_waiting, ..ModelServiceSpec::default() };
        Command::ApplyService { service: Box::new(ModelService::new(SERVICE, spec)) }
    }

    /// Asks the next coordinator.
    fn ask(&mut self, world: &mut World) {
        let Some(question) = &mut self.question else { return };
        let after_ms = match question.route.next_step() {
            Next::Ask(address) => {
                if let Some(to) = Host::coordinator_at(&address) {
                    question.call = world.number();
                    question.asked = Some(to);
                    let ask = Message::Ask { call: question.call, ask: question.ask.clone() };
                    world.send(self.host, to, ask);
                }
                TRY_MS
            }
            Next::Pause(pause) => {
                question.route.begin_round(&self.addresses);
                pause.as_millis() as u64
            }
        };
        self.later(world, after_ms);
    }

    fn answered(&mut self, world: &mut World, history: &mut History, call: CallId, answer: Answer) {
        let Some(question) = self.question.take_if(|question| question.call == call) else { return };
        let asked = question.asked.map(Host::address).unwrap_or_default();
        match answer {
            Answer::Failed { leader, .. } => {
                let mut question = question;
                match leader {
                    Some(leader) => question.route.follow(&asked, &leader),
                    None => self.addresses.demote(&asked),
                }
                (question.call, question.asked) = (0, None);
                self.question = Some(question);
                // It goes on at once to the next, as long as there is one.
                return self.ask(world);
            }
            Answer::Executed(Ok(applied)) => {
                let is_old =
                    applied.revision.0 < question.seen_revision || (applied.changed && applied.revision.0 == question.seen_revision);
                if is_old {
                    let seen = format!(
                        "{} was told revision {} of {:?}, which was asked for after {}",
                        self.host, applied.revision, question.wish, question.seen_revision
                    );
                    world.violate("an acknowledged command is newer than what was acknowledged before it", seen);
                }
                history.revision = history.revision.max(applied.revision.0);
                history.done += 1;
                if let Wish::Key(name) = question.wish {
                    history.keys.push(name);
                }
            }
            // Nobody has made it yet, or somebody has removed it.
            Answer::Executed(Err(CommandError::Token { .. } | CommandError::NotFound { .. })) if matches!(question.wish, Wish::Use) => {}
            Answer::Executed(Err(CommandError::NotFound { .. } | CommandError::Conflict { .. }))
                if matches!(question.wish, Wish::Service) => {}
            Answer::Executed(Err(error)) => {
                world.violate("a good command is not refused", format!("{}: {:?}: {error}", self.host, question.wish))
            }
            Answer::Read { revision, keys } => {
                self.compare(world, &question, &history.keys[..question.seen_keys], (revision.0, keys));
                history.revision = history.revision.max(revision.0);
                history.reads += 1;
            }
            Answer::Status { .. } => {}
        }
        self.addresses.prefer(&asked);
        let after_ms = self.random.between(1, PAUSE_MS);
        self.later(world, after_ms);
    }

    /// Holds what was read against what had been acknowledged before it was asked for.
    fn compare(&self, world: &mut World, question: &Question, seen_keys: &[String], (revision, mut keys): (u64, Vec<String>)) {
        if revision < question.seen_revision {
            let seen = format!("{} read revision {revision}, and {} was acknowledged before it asked", self.host, question.seen_revision);
            world.violate("reads are linearizable", seen);
        }
        keys.sort_unstable();
        if let Some(missing) = seen_keys.iter().find(|name| keys.binary_search(name).is_err()) {
            world.violate("no acknowledged command is lost", format!("{} reads no key {missing:?}, which was acknowledged", self.host));
        }
    }
}

fn key(name: &str) -> ApiKeyRecord {
    let digits: String = name.bytes().map(|byte| format!("{byte:02x}")).collect();
    ApiKeyRecord {
        id: format!("{digits:0>16}").chars().take(16).collect(),
        name: name.into(),
        created_s: 1,
        revoked_s: None,
        rpm: Some(60),
        tpm: None,
        salt: "00".repeat(16),
        hash: "00".repeat(32),
    }
}

fn token() -> JoinToken {
    JoinToken {
        id: TOKEN.into(),
        secret_sha256: "00".repeat(32),
        role: Role::Worker,
        expires_ms: 1_800_000_000_000 + 7 * 24 * 3_600_000,
        uses_left: TOKEN_USES,
    }
}
