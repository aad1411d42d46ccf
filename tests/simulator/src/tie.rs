//! A simulated node's tie to the coordinators: production's `SessionCore` and `Route`, with the world for a shell.
//!
//! Invariant: the lease, the tries and the end of the node are the core's decisions; this only carries messages.

use std::collections::BTreeSet;

use forge_cluster::client::route::{Addresses, Next, Route};
use forge_cluster::session::{SessionAction, SessionCore, SessionInput};
use forge_shared::cluster::node::NodeSpec;
use forge_shared::cluster::session::{NodeDown, NodeUp};

use crate::host::Host;
use crate::message::{Answer, Ask, CallId, Message, StreamId, Timer};
use crate::world::World;

/// For one coordinator's answer to a hello, and for all of one `Connect`, milliseconds.
const TRY_MS: u64 = 3_000;
const CONNECT_MS: u64 = 6_000;
/// For the question whether the group lives, milliseconds.
const STATUS_MS: u64 = 1_000;

struct Attempt {
    number: u64,
    route: Route,
    until_ms: u64,
    asked: String,
    stream: Option<StreamId>,
}

/// What the owner of a tie is told.
#[derive(Debug)]
pub enum Told {
    /// A session began.
    Welcome,
    /// A heartbeat is due.
    Heartbeat(u64),
    /// The leader says something that is not the tie's own matter.
    Down(NodeDown),
    /// The cluster lives without this node.
    Expired,
    /// The node must not go on.
    End(String),
}

/// See the module.
pub struct Tie {
    host: Host,
    life: u64,
    spec: NodeSpec,
    /// Of the lease.
    pub core: SessionCore,
    addresses: Addresses,
    attempt: Option<Attempt>,
    link: Option<StreamId>,
    asked: Option<(u64, BTreeSet<CallId>)>,
    timer_ms: u64,
}

impl Tie {
    /// Of a process that begins now.
    pub fn new(host: Host, life: u64, spec: NodeSpec, core: SessionCore, coordinators: &[Host]) -> Self {
        let addresses: Vec<String> = coordinators.iter().map(|host| host.address()).collect();
        let addresses = Addresses::new(&addresses);
        Tie { host, life, spec, core, addresses, attempt: None, link: None, asked: None, timer_ms: u64::MAX }
    }

    /// Sends to the leader, if a session holds.
    pub fn send(&self, world: &mut World, message: NodeUp) -> bool {
        let Some(link) = self.link.filter(|_| self.core.is_welcome()) else { return false };
        world.stream(link, self.host, Message::Up(message));
        true
    }

    /// Hands the core an input.
    pub fn input(&mut self, world: &mut World, input: SessionInput) -> Vec<Told> {
        let was_welcome = self.core.is_welcome();
        let mut told = Vec::new();
        let actions = self.core.handle(world.now_ms, input);
        if self.core.is_welcome() && !was_welcome {
            told.push(Told::Welcome);
        }
        for action in actions {
            match action {
                SessionAction::Connect => {
                    let number = world.number();
                    let route = Route::new(&self.addresses);
                    let until_ms = world.now_ms + CONNECT_MS;
                    world.say(self.host, "looks for the leader");
                    self.attempt = Some(Attempt { number, route, until_ms, asked: String::new(), stream: None });
                    told.extend(self.ask_next(world));
                }
                SessionAction::Disconnect => {
                    world.say(self.host, "lets its session go");
                    self.disconnect(world);
                }
                SessionAction::Heartbeat(number) => told.push(Told::Heartbeat(number)),
                SessionAction::AskGroup => self.ask_group(world),
                SessionAction::Expire => told.push(Told::Expired),
                SessionAction::End { reason } => told.push(Told::End(reason)),
            }
        }
        let due_ms = self.core.next_tick_ms();
        if due_ms != u64::MAX && (due_ms < self.timer_ms || self.timer_ms <= world.now_ms) {
            self.timer_ms = due_ms.max(world.now_ms + 1);
            world.remind(self.host, self.life, self.timer_ms - world.now_ms, Timer::Session);
        }
        told
    }

    fn disconnect(&mut self, world: &mut World) {
        let streams = [self.link.take(), self.attempt.take().and_then(|attempt| attempt.stream)];
        streams.into_iter().flatten().for_each(|stream| world.close(stream, self.host));
    }

    /// Says hello to the next coordinator of the attempt, or ends it.
    fn ask_next(&mut self, world: &mut World) -> Vec<Told> {
        let Some(attempt) = &mut self.attempt else { return Vec::new() };
        let left_ms = attempt.until_ms.saturating_sub(world.now_ms);
        let number = attempt.number;
        match attempt.route.next_step() {
            Next::Ask(address) if left_ms > 0 => {
                let Some(to) = Host::coordinator_at(&address) else { return Vec::new() };
                let stream = world.open(self.host, to);
                world.stream(stream, self.host, Message::Hello { spec: Box::new(self.spec.clone()) });
                (attempt.asked, attempt.stream) = (address, Some(stream));
                let wait_ms = if attempt.route.has_more() { left_ms / 2 } else { left_ms }.min(TRY_MS);
                world.remind(self.host, self.life, wait_ms, Timer::Attempt(number));
                Vec::new()
            }
            Next::Pause(pause) if (pause.as_millis() as u64) < left_ms => {
                attempt.route.begin_round(&self.addresses);
                world.remind(self.host, self.life, pause.as_millis() as u64, Timer::Attempt(number));
                Vec::new()
            }
            _ => {
                self.attempt = None;
                self.input(world, SessionInput::Connected(false))
            }
        }
    }

    /// The coordinator that was asked has not answered, or it is time for the next.
    pub fn attempt_over(&mut self, world: &mut World, number: u64) -> Vec<Told> {
        let Some(attempt) = self.attempt.as_mut().filter(|attempt| attempt.number == number) else { return Vec::new() };
        if let Some(stream) = attempt.stream.take() {
            world.close(stream, self.host);
            let asked = attempt.asked.clone();
            self.addresses.demote(&asked);
        }
        attempt.number = world.number();
        self.ask_next(world)
    }

    fn ask_group(&mut self, world: &mut World) {
        let number = world.number();
        let mut calls = BTreeSet::new();
        for address in self.addresses.all() {
            let Some(to) = Host::coordinator_at(address) else { continue };
            let call = world.number();
            calls.insert(call);
            world.send(self.host, to, Message::Ask { call, ask: Ask::Status });
        }
        self.asked = Some((number, calls));
        world.remind(self.host, self.life, STATUS_MS, Timer::AskGroup(number));
    }

    /// Time of the tie has come.
    pub fn timer(&mut self, world: &mut World, timer: Timer) -> Vec<Told> {
        match timer {
            Timer::Session => {
                self.timer_ms = u64::MAX;
                self.input(world, SessionInput::Tick)
            }
            Timer::Attempt(number) => self.attempt_over(world, number),
            Timer::AskGroup(number) if self.asked.as_ref().is_some_and(|(asked, _)| *asked == number) => {
                self.asked = None;
                self.input(world, SessionInput::Group { is_alive: false })
            }
            _ => Vec::new(),
        }
    }

    /// A message of a coordinator.
    pub fn arrives(&mut self, world: &mut World, stream: Option<StreamId>, message: Message) -> Vec<Told> {
        match message {
            Message::Answer { call, answer: Answer::Status { has_leader } } => {
                let is_asked = self.asked.as_ref().is_some_and(|(_, calls)| calls.contains(&call));
                if !is_asked || !has_leader {
                    return Vec::new();
                }
                self.asked = None;
                self.input(world, SessionInput::Group { is_alive: true })
            }
            Message::NoSession { leader } => {
                let Some(attempt) = self.attempt.as_mut().filter(|attempt| attempt.stream.is_some() && attempt.stream == stream) else {
                    return Vec::new();
                };
                attempt.stream = None;
                match leader {
                    Some(leader) => attempt.route.follow(&attempt.asked, &leader),
                    None => self.addresses.demote(&attempt.asked),
                }
                attempt.number = world.number();
                self.ask_next(world)
            }
            Message::Down(message) => self.down(world, stream, message),
            _ => Vec::new(),
        }
    }

    fn down(&mut self, world: &mut World, stream: Option<StreamId>, message: NodeDown) -> Vec<Told> {
        let mut told = Vec::new();
        if let Some(attempt) = self.attempt.take_if(|attempt| attempt.stream.is_some() && attempt.stream == stream) {
            self.link = attempt.stream;
            self.addresses.prefer(&attempt.asked);
            told.extend(self.input(world, SessionInput::Connected(true)));
        }
        if self.link.is_none() || self.link != stream {
            return told;
        }
        let input = match message {
            NodeDown::Welcome { lease_ms, heartbeat_ms } => SessionInput::Welcome { lease_ms, heartbeat_ms },
            NodeDown::Refused { reason } => SessionInput::Refused { reason },
            NodeDown::Ack { number, lease_ms, shares } => {
                told.push(Told::Down(NodeDown::Ack { number, lease_ms, shares }));
                SessionInput::Ack { number, lease_ms }
            }
            NodeDown::Moved { .. } => {
                if let Some(link) = self.link.take() {
                    world.close(link, self.host);
                }
                SessionInput::Closed
            }
            other => {
                told.push(Told::Down(other));
                return told;
            }
        };
        told.extend(self.input(world, input));
        told
    }

    /// A stream is gone.
    pub fn closed(&mut self, world: &mut World, stream: StreamId) -> Vec<Told> {
        if self.link == Some(stream) {
            world.say(self.host, "hears that its session's stream is gone");
            self.link = None;
            return self.input(world, SessionInput::Closed);
        }
        match &mut self.attempt {
            Some(attempt) if attempt.stream == Some(stream) => {
                attempt.stream = None;
                let asked = attempt.asked.clone();
                self.addresses.demote(&asked);
                attempt.number = world.number();
                self.ask_next(world)
            }
            _ => Vec::new(),
        }
    }
}
