//! A simulated caller of the gateways: asks for answers one after the other, and holds each against the undisturbed one.
//!
//! Invariants it checks: tokens come at positions 0, 1, 2, … and are those of the undisturbed answer, through whatever
//! became of engines, workers and gateways; each answer ends once and as it should; a key means one seed; who is refused is
//! told so with a typed error that may be tried again; what was accepted does not end with an error, but where two engines
//! died meanwhile and it is held to be the cause.

use std::collections::BTreeSet;
use std::sync::Arc;

use forge_engine::sampler::Sampler;
use forge_gateway::ApiError;
use forge_gateway::journal::MAX_FRUITLESS_DEATHS;
use forge_shared::generate::{EngineEvent, GenerateRequest};

use crate::engines::DIED_WITH_REQUESTS;
use crate::gateways::generate_request;
use crate::host::Host;
use crate::message::{Event, Message, StreamId, Timer};
use crate::random::Random;
use crate::streams::{Http, Order};
use crate::stub::{self, Undisturbed};
use crate::world::World;

/// Longest pause between two orders, milliseconds.
const PAUSE_MS: u64 = 400;
/// Between two tries at an order, milliseconds.
const AGAIN_MS: (u64, u64) = (100, 1_000);
/// After so long without a byte the connection is given up, milliseconds.
const SILENT_MS: u64 = 6_000;
/// Orders whose caller hangs up in the middle, of a hundred.
const HANG_UP_PERCENT: u64 = 8;

/// What became of orders.
#[derive(Debug, Default, Clone, Copy)]
pub struct Served {
    /// Answers that came whole.
    pub answers: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Answers that were begun again because their gateway was gone.
    pub begun_again: u64,
    /// Refusals.
    pub refused: u64,
    /// Orders whose caller hung up.
    pub hung_up: u64,
    /// Answers that were given up because engine after engine died of them, as it seemed.
    pub given_up: u64,
}

impl Served {
    /// Both together.
    #[must_use]
    pub fn plus(self, more: &Served) -> Served {
        Served {
            answers: self.answers + more.answers,
            tokens: self.tokens + more.tokens,
            begun_again: self.begun_again + more.begun_again,
            refused: self.refused + more.refused,
            hung_up: self.hung_up + more.hung_up,
            given_up: self.given_up + more.given_up,
        }
    }
}

struct Pending {
    order: Arc<Order>,
    /// That the order stands for, once a gateway said so and the order names one or has a key.
    seed: Option<u64>,
    stream: Option<StreamId>,
    /// Of the try on this stream.
    request: Option<GenerateRequest>,
    answers: Vec<Undisturbed>,
    finished: Vec<bool>,
    heard_ms: u64,
    /// It hangs up after so many tokens.
    leaves_after: Option<u64>,
    tokens: u64,
    /// Engines that had died with requests when it was accepted.
    deaths: u64,
}

/// Engines that died with requests so far.
fn deaths(world: &World) -> u64 {
    world.faults.get(DIED_WITH_REQUESTS).copied().unwrap_or(0)
}

/// See the module.
pub struct Caller {
    host: Host,
    random: Random,
    /// The preferred first.
    gateways: Vec<Host>,
    pending: Option<Pending>,
    timer: u64,
    orders: u64,
    sampler: Sampler,
    row: Vec<f32>,
    /// Asks for nothing new, once each gateway answered it since.
    pub is_quiet: bool,
    /// Gateways that answered since it was told to be quiet.
    since: BTreeSet<Host>,
    /// What became of its orders.
    pub served: Served,
}

impl Caller {
    /// A caller of these gateways.
    pub fn new(index: u16, gateways: &[Host], seed: u64) -> Self {
        let mut gateways = gateways.to_vec();
        let first = usize::from(index) % gateways.len().max(1);
        gateways.rotate_left(first);
        Caller {
            host: Host::Caller(index),
            random: Random::new(seed, 3_000_000 + u64::from(index)),
            gateways,
            pending: None,
            timer: 0,
            orders: 0,
            sampler: Sampler::new(stub::VOCAB as usize),
            row: Vec::new(),
            is_quiet: false,
            since: BTreeSet::new(),
            served: Served::default(),
        }
    }

    /// Begins to ask.
    pub fn start(&mut self, world: &mut World) {
        let after_ms = self.random.between(1_000, 3_000);
        self.later(world, after_ms);
    }

    /// Faults have ended: one more answer is wanted from each gateway, to see that they give some.
    pub fn be_quiet(&mut self, world: &mut World) {
        self.is_quiet = true;
        self.since.clear();
        if self.pending.is_none() {
            self.later(world, 1);
        }
    }

    /// Whether it waits for an answer.
    pub fn is_busy(&self) -> bool {
        self.pending.is_some() || (self.is_quiet && !self.is_satisfied())
    }

    fn is_satisfied(&self) -> bool {
        self.gateways.iter().all(|gateway| self.since.contains(gateway))
    }

    /// What it waits for, in words.
    pub fn waits_for(&self) -> String {
        match &self.pending {
            None => format!("{} for nothing", self.host),
            Some(pending) => {
                format!("{} for {} at {:?}, {} tokens so far", self.host, pending.order.id, self.gateways.first(), pending.tokens)
            }
        }
    }

    fn later(&mut self, world: &mut World, after_ms: u64) {
        self.timer = world.number();
        world.remind(self.host, 0, after_ms, Timer::Client(self.timer));
    }

    /// Something happens here.
    pub fn handle(&mut self, world: &mut World, event: Event) {
        match event {
            Event::Timer { timer: Timer::Client(number), .. } if number == self.timer => self.go_on(world),
            Event::Arrives { stream: Some(stream), message: Message::Http(http), .. } if self.is_mine(stream) => self.hears(world, *http),
            Event::Closed { stream, .. } if self.is_mine(stream) => self.broken(world, "its connection broke"),
            _ => {}
        }
    }

    fn is_mine(&self, stream: StreamId) -> bool {
        self.pending.as_ref().is_some_and(|pending| pending.stream == Some(stream))
    }

    fn go_on(&mut self, world: &mut World) {
        match &self.pending {
            None if self.is_quiet && self.is_satisfied() => {}
            None => {
                while self.is_quiet && self.gateways.first().is_some_and(|gateway| self.since.contains(gateway)) {
                    self.gateways.rotate_left(1);
                }
                self.order();
                self.post(world);
            }
            Some(pending) if pending.stream.is_none() => self.post(world),
            Some(pending) if pending.heard_ms + SILENT_MS <= world.now_ms => {
                if let Some(stream) = pending.stream {
                    world.close(stream, self.host);
                }
                self.broken(world, "it hears nothing");
            }
            Some(_) => self.later(world, SILENT_MS / 2),
        }
    }

    /// Thinks of something to ask. Prompts begin alike, so that their blocks are shared.
    fn order(&mut self) {
        self.orders += 1;
        let id = format!("{}-{}", self.host, self.orders);
        let begins = self.random.below(4);
        let (shared, own) = (self.random.between(0, 20), self.random.between(1, 10));
        let of_begin = (0..shared).map(|at| ((begins * 7 + at * at) % u64::from(stub::VOCAB - 1)) as u32);
        let mut prompt: Vec<u32> = of_begin.collect();
        prompt.extend((0..own).map(|_| self.random.below(u64::from(stub::VOCAB - 1)) as u32));
        let key = self.random.chance(60).then(|| format!("key-{id}"));
        let seed = self.random.chance(50).then(|| self.random.number());
        let choices = if self.random.chance(20) { 2 } else { 1 };
        let max_tokens = self.random.between(1, 60) as u32;
        let leaves_after = (!self.is_quiet && self.random.chance(HANG_UP_PERCENT)).then(|| self.random.below(20));
        let order = Arc::new(Order { id, key, seed, prompt: prompt.into(), max_tokens, choices });
        self.pending = Some(Pending {
            seed: order.seed,
            order,
            stream: None,
            request: None,
            answers: Vec::new(),
            finished: Vec::new(),
            heard_ms: 0,
            leaves_after,
            tokens: 0,
            deaths: 0,
        });
    }

    /// Sends the order to the preferred gateway.
    fn post(&mut self, world: &mut World) {
        let (Some(pending), Some(gateway)) = (&mut self.pending, self.gateways.first()) else { return };
        let stream = world.open(self.host, *gateway);
        pending.stream = Some(stream);
        (pending.request, pending.tokens, pending.heard_ms) = (None, 0, world.now_ms);
        world.stream(stream, self.host, Message::Http(Box::new(Http::Post(pending.order.clone()))));
        self.later(world, SILENT_MS / 2);
    }

    /// The try on this stream is over without an answer: the next goes to the other gateway.
    fn again(&mut self, world: &mut World) {
        let Some(pending) = &mut self.pending else { return };
        pending.stream = None;
        self.gateways.rotate_left(1);
        let after_ms = self.random.between(AGAIN_MS.0, AGAIN_MS.1);
        self.later(world, after_ms);
    }

    fn broken(&mut self, world: &mut World, how: &str) {
        if let Some(pending) = self.pending.as_ref().filter(|pending| pending.request.is_some()) {
            world.say(self.host, format!("begins {} again, after {} tokens: {how}", pending.order.id, pending.tokens));
            self.served.begun_again += 1;
        }
        self.again(world);
    }

    fn hears(&mut self, world: &mut World, http: Http) {
        let Some(pending) = &mut self.pending else { return };
        pending.heard_ms = world.now_ms;
        match http {
            Http::Accepted { seed } => {
                let is_fixed = pending.order.key.is_some() || pending.order.seed.is_some();
                if let Some(known) = pending.seed.filter(|known| is_fixed && *known != seed) {
                    let seen = format!("{}: seed {seed} after {known}", pending.order.id);
                    return world.violate("a repeated request has its seed", seen);
                }
                pending.seed = is_fixed.then_some(seed);
                let request = generate_request(&pending.order, seed);
                pending.answers = (0..pending.order.choices).map(|choice| Undisturbed::new(&request, choice)).collect();
                pending.finished = vec![false; pending.answers.len()];
                pending.request = Some(request);
                pending.deaths = deaths(world);
            }
            Http::Events(events) => {
                for event in events {
                    self.event(world, event);
                }
            }
            Http::Error(error) => self.refused(world, error),
            Http::Comment | Http::Post(_) => {}
        }
    }

    fn event(&mut self, world: &mut World, event: EngineEvent) {
        let Some(pending) = &mut self.pending else { return };
        let id = pending.order.id.clone();
        let wrong = match event {
            _ if pending.request.is_none() => Some(("nothing comes before the head", format!("{event:?}"))),
            EngineEvent::Token(token) => match pending.answers.get_mut(token.choice as usize) {
                Some(answer) if answer.tokens != token.position => {
                    Some(("tokens come in order, each once", format!("token {} where {} is next", token.position, answer.tokens)))
                }
                Some(answer) => {
                    pending.tokens += 1;
                    let expected = answer.next_token(&mut self.sampler, &mut self.row);
                    let seen = || format!("{token:?} where {expected:?} belongs");
                    (expected != Some(token.token)).then(|| ("tokens are those of the undisturbed answer", seen()))
                }
                None => Some(("tokens are those of the undisturbed answer", format!("of choice {}", token.choice))),
            },
            EngineEvent::Finished { choice, reason, .. } => {
                let known = pending.answers.get(choice as usize).and_then(|answer| answer.end.clone());
                let is_again = pending.finished.get_mut(choice as usize).is_none_or(|finished| std::mem::replace(finished, true));
                (is_again || known != Some(reason.clone()))
                    .then(|| ("an answer ends once and as it should", format!("{reason:?} where {known:?} belongs; again: {is_again}")))
            }
            EngineEvent::Done(usage) => {
                let tokens: u32 = pending.answers.iter().map(|answer| answer.tokens).sum();
                let is_whole = pending.finished.iter().all(|finished| *finished) && usage.completion_tokens == tokens;
                if is_whole {
                    return self.whole(world);
                }
                Some(("an answer ends once and as it should", format!("{usage:?} after {tokens} tokens")))
            }
            other => Some(("only what was asked for comes", format!("{other:?}"))),
        };
        if let Some((invariant, seen)) = wrong {
            return world.violate(invariant, format!("{id}: {seen}"));
        }
        let is_enough = self.pending.as_ref().is_some_and(|pending| pending.leaves_after.is_some_and(|most| pending.tokens > most));
        if is_enough {
            self.hang_up(world);
        }
    }

    fn whole(&mut self, world: &mut World) {
        let Some(pending) = self.pending.take() else { return };
        if let Some(stream) = pending.stream {
            world.close(stream, self.host);
        }
        self.served.answers += 1;
        self.served.tokens += pending.tokens;
        if self.is_quiet {
            self.since.extend(self.gateways.first());
        }
        let after_ms = self.random.between(1, PAUSE_MS);
        self.later(world, after_ms);
    }

    fn hang_up(&mut self, world: &mut World) {
        let Some(stream) = self.pending.take().and_then(|pending| pending.stream) else { return };
        world.close(stream, self.host);
        self.served.hung_up += 1;
        let after_ms = self.random.between(1, PAUSE_MS);
        self.later(world, after_ms);
    }

    fn refused(&mut self, world: &mut World, error: ApiError) {
        let Some(pending) = &self.pending else { return };
        world.say(self.host, format!("{} is refused: {error}", pending.order.id));
        // Two engines that die in a row without a token between look as if this request had killed them.
        let is_blamed = matches!(error, ApiError::EngineFailed { .. }) && deaths(world) >= pending.deaths + u64::from(MAX_FRUITLESS_DEATHS);
        if pending.request.is_some() && is_blamed {
            self.served.given_up += 1;
            return self.again(world);
        }
        if pending.request.is_some() {
            return world.violate("what was accepted does not end with an error", format!("{}: {error}", pending.order.id));
        }
        // The service may not have been known to that gateway yet.
        let is_unknown = matches!(error, ApiError::UnknownModel { .. });
        if !is_unknown && error.retry_after_s().is_none() {
            return world.violate("a refusal may be tried again", format!("{}: {error}", pending.order.id));
        }
        self.served.refused += 1;
        self.again(world);
    }
}
