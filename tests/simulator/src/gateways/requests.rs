//! The requests of a gateway's callers: production's `Course` for each, and the idempotency keys.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use forge_cluster::client::route::{Next, Route};
use forge_gateway::ApiError;
use forge_gateway::core::{Course, Step, Stop, Terms};
use forge_gateway::idempotency::{KeyedRequest, command_id};
use forge_shared::cluster::command::{Command, IdempotencyRecord};
use forge_shared::generate::{AdmitError, Choice, EngineEvent, GenerateRequest, SamplingParams, TenantSalt};
use forge_shared::ids::RequestId;

use super::{COMMENT_MS, GatewayTimer, Process, Purpose};
use crate::host::Host;
use crate::message::{Answer, Ask, CallId, Message, StreamId};
use crate::streams::{Http, Order, Wire};
use crate::world::World;

/// The service that callers ask for.
pub const SERVICE: &str = "talk";
/// A request's time, seconds.
pub const REQUEST_S: u64 = 300;
/// For an admission, for a coordinator's answer, and for writing down an idempotency key, milliseconds.
const ADMIT_MS: u64 = 5_000;
const TRY_MS: u64 = 1_000;
const RECORD_MS: u64 = 5_000;
/// The wall clock at the beginning, seconds since 1970.
const WALL_S: u64 = 1_800_000_000;
const TENANT: &str = "anonymous";

/// A question to the coordinators about a key.
struct Asking {
    keyed: KeyedRequest,
    record: IdempotencyRecord,
    route: Route,
    asked: String,
    call: CallId,
    number: u64,
    until_ms: u64,
}

/// A caller's request.
pub(super) struct Request {
    order: Arc<Order>,
    asking: Option<Asking>,
    course: Option<Course>,
    seed: u64,
    /// The call at a worker.
    call: Option<CallId>,
    wait: u64,
    told_ms: u64,
    is_told: bool,
}

impl Request {
    /// Whether its caller was told that it will be answered.
    pub(super) fn is_accepted(&self) -> bool {
        self.is_told
    }
}

/// The request of an order as the engine sees it.
pub fn generate_request(order: &Order, seed: u64) -> GenerateRequest {
    let params = SamplingParams { temperature: 1.0, max_tokens: order.max_tokens, ..SamplingParams::default() };
    GenerateRequest {
        id: RequestId(order.id.clone()),
        tenant: TenantSalt::anonymous(),
        prompt_tokens: order.prompt.clone(),
        choices: (0..order.choices).map(|index| Choice { index, emitted_tokens: Vec::new() }).collect(),
        seed,
        params,
        priority: 0,
    }
}

impl Process {
    fn say_to(&self, world: &mut World, stream: StreamId, http: Http) {
        world.stream(stream, self.host, Message::Http(Box::new(http)));
    }

    fn refuse(&mut self, world: &mut World, stream: StreamId, error: ApiError) {
        self.requests.remove(&stream);
        self.say_to(world, stream, Http::Error(error));
        world.close(stream, self.host);
    }

    /// A caller asks for something.
    pub(super) fn asked(&mut self, world: &mut World, stream: StreamId, http: Http) {
        let Http::Post(order) = http else { return };
        if !self.directory.is_known() {
            // Nobody listens on the port yet.
            return world.close(stream, self.host);
        }
        self.remind(world, REQUEST_S * 1_000, GatewayTimer::Deadline { stream });
        let request = Request {
            order: order.clone(),
            asking: None,
            course: None,
            seed: 0,
            call: None,
            wait: 0,
            told_ms: world.now_ms,
            is_told: false,
        };
        self.requests.insert(stream, request);
        match &order.key {
            Some(key) => self.look_up(world, stream, key, &order),
            None => {
                let drawn = self.random.number();
                self.begin(world, stream, order.seed.unwrap_or(drawn), None);
            }
        }
    }

    /// As `idempotent` of the gateway's routes does.
    fn look_up(&mut self, world: &mut World, stream: StreamId, key: &str, order: &Order) {
        let now = self.now(world);
        let body = format!("{:?} {} {} {:?}", order.prompt, order.max_tokens, order.choices, order.seed);
        let found = KeyedRequest::new(TENANT, key, &[&b"/v1/completions"[..], body.as_bytes()])
            .and_then(|keyed| self.records.find(&keyed, now).map(|known| (keyed, known)));
        let (keyed, known) = match found {
            Ok(found) => found,
            Err(error) => return self.refuse(world, stream, error),
        };
        if let Some(known) = known {
            return self.begin(world, stream, order.seed.unwrap_or(known.seed), Some(known.numerics_id));
        }
        let model = match self.models.find(Some(SERVICE)) {
            Ok(model) => model,
            Err(error) => return self.refuse(world, stream, error),
        };
        let Some(numerics_id) = model.numerics_id(now) else {
            let reason = model.unready_reason().unwrap_or_else(|| "no replica is ready".into());
            return self.refuse(world, stream, AdmitError::Unavailable { reason }.into());
        };
        let record = keyed.record(TENANT, key, numerics_id, WALL_S + world.now_ms / 1_000);
        let route = Route::new(&self.addresses);
        let asking = Asking { keyed, record, route, asked: String::new(), call: 0, number: 0, until_ms: world.now_ms + RECORD_MS };
        if let Some(request) = self.requests.get_mut(&stream) {
            request.asking = Some(asking);
        }
        self.ask(world, stream);
    }

    /// Asks the next coordinator to write a key down.
    fn ask(&mut self, world: &mut World, stream: StreamId) {
        let Some(asking) = self.requests.get_mut(&stream).and_then(|request| request.asking.as_mut()) else { return };
        if world.now_ms >= asking.until_ms {
            // It is remembered by this gateway alone.
            let record = asking.record.clone();
            return self.recorded(world, stream, record);
        }
        asking.number = world.number();
        let number = asking.number;
        let mut after_ms = TRY_MS;
        match asking.route.next_step() {
            Next::Ask(address) => {
                asking.call = world.number();
                if let Some(to) = Host::coordinator_at(&address) {
                    let command = Box::new(Command::RecordIdempotency { record: asking.record.clone() });
                    let ask = Ask::Execute { request_id: command_id(&asking.record), command };
                    world.send(self.host, to, Message::Ask { call: asking.call, ask });
                }
                asking.asked = address;
            }
            Next::Pause(pause) => {
                asking.route.begin_round(&self.addresses);
                after_ms = pause.as_millis() as u64;
            }
        }
        let left_ms = asking.until_ms.saturating_sub(world.now_ms);
        self.remind(world, after_ms.min(left_ms).max(1), GatewayTimer::Ask { stream, number });
    }

    /// The coordinator that was asked has not answered, or a pause is over.
    pub(super) fn ask_again(&mut self, world: &mut World, stream: StreamId, number: u64) {
        let Some(asking) = self.requests.get_mut(&stream).and_then(|request| request.asking.as_mut()) else { return };
        if asking.number != number {
            return;
        }
        let asked = std::mem::take(&mut asking.asked);
        if !asked.is_empty() {
            self.addresses.demote(&asked);
        }
        self.ask(world, stream);
    }

    fn asking_by(&self, call: CallId) -> Option<StreamId> {
        let by = |request: &Request| request.asking.as_ref().is_some_and(|asking| asking.call == call);
        self.requests.iter().find(|(_, request)| by(request)).map(|(stream, _)| *stream)
    }

    /// Whether a question of a request's waits for this answer.
    pub(super) fn awaits(&self, call: CallId) -> bool {
        self.asking_by(call).is_some()
    }

    /// A coordinator answers.
    pub(super) fn answered(&mut self, world: &mut World, call: CallId, answer: Answer) {
        let Some(stream) = self.asking_by(call) else { return };
        let Some(asking) = self.requests.get_mut(&stream).and_then(|request| request.asking.as_mut()) else { return };
        let asked = std::mem::take(&mut asking.asked);
        asking.call = 0;
        match answer {
            Answer::Executed(Ok(applied)) => {
                let record = applied.existing.unwrap_or_else(|| asking.record.clone());
                self.addresses.prefer(&asked);
                self.recorded(world, stream, record);
            }
            Answer::Executed(Err(error)) => {
                world.violate("a good command is not refused", format!("{}: an idempotency key: {error}", self.host));
            }
            Answer::Failed { leader, .. } => {
                match leader {
                    Some(leader) => asking.route.follow(&asked, &leader),
                    None => self.addresses.demote(&asked),
                }
                self.ask(world, stream);
            }
            Answer::Read { .. } | Answer::Status { .. } => {}
        }
    }

    fn recorded(&mut self, world: &mut World, stream: StreamId, record: IdempotencyRecord) {
        let now = self.now(world);
        let Some(request) = self.requests.get_mut(&stream) else { return };
        let Some(asking) = request.asking.take() else { return };
        let given = request.order.seed;
        match self.records.settle(&asking.keyed, record, now) {
            Ok(known) => self.begin(world, stream, given.unwrap_or(known.seed), Some(known.numerics_id)),
            Err(error) => self.refuse(world, stream, error),
        }
    }

    /// Looks for a replica that answers.
    fn begin(&mut self, world: &mut World, stream: StreamId, seed: u64, numerics_id: Option<Arc<str>>) {
        let now = self.now(world);
        let model = match self.models.find(Some(SERVICE)) {
            Ok(model) => model,
            Err(error) => return self.refuse(world, stream, error),
        };
        let Some(request) = self.requests.get_mut(&stream) else { return };
        request.seed = seed;
        let mut affinity = DefaultHasher::new();
        request.order.prompt.hash(&mut affinity);
        let terms = Terms {
            model,
            request: generate_request(&request.order, seed),
            affinity: affinity.finish(),
            deadline: now + Duration::from_secs(REQUEST_S),
            deadline_s: REQUEST_S,
            numerics_id,
            may_be_shortened: false,
            retries: self.retries.clone(),
        };
        let (course, step) = Course::begin(terms, now);
        request.course = Some(course);
        self.carry_out(world, stream, step);
    }

    /// What the driver of production does.
    fn carry_out(&mut self, world: &mut World, stream: StreamId, step: Step) {
        match step {
            Step::Submit { replica, request } => {
                let key = replica.key().to_owned();
                let Some((worker, run)) = self.place_of(&key).filter(|_| self.directory.wanted().iter().any(|wanted| wanted.key == key))
                else {
                    return world.violate("a request goes to replicas that are wanted", format!("{} submits to {key}", self.host));
                };
                let call = self.call(world, worker, Purpose::Request(stream));
                if let Some(known) = self.requests.get_mut(&stream) {
                    known.call = Some(call);
                }
                world.say(self.host, format!("submits {} to {key} at {worker}", request.id));
                self.tell_worker(world, worker, Wire::Submit { call, run, request: Arc::new(*request), timeout_ms: REQUEST_S * 1_000 });
                self.remind(world, ADMIT_MS, GatewayTimer::Admit { call });
            }
            Step::Replay { reason, wait } => {
                world.say(self.host, format!("lost an engine: {reason}"));
                *world.faults.entry("requests submitted again").or_default() += 1;
                if let Some(call) = self.requests.get_mut(&stream).and_then(|request| request.call.take()) {
                    self.cancel(world, call);
                }
                self.wait(world, stream, wait);
            }
            Step::Wait(wait) => self.wait(world, stream, wait),
            Step::Listen => {
                let Some(request) = self.requests.get_mut(&stream) else { return };
                if !std::mem::replace(&mut request.is_told, true) {
                    let seed = request.seed;
                    self.say_to(world, stream, Http::Accepted { seed });
                }
            }
            // Only `heard` gives events, and collects them.
            Step::Forward(event) => self.forward(world, stream, vec![event]),
            Step::Fail(error) => {
                if let Some(call) = self.requests.get_mut(&stream).and_then(|request| request.call.take()) {
                    self.cancel(world, call);
                }
                self.refuse(world, stream, error);
            }
        }
    }

    fn wait(&mut self, world: &mut World, stream: StreamId, wait: Duration) {
        let number = world.number();
        if let Some(request) = self.requests.get_mut(&stream) {
            request.wait = number;
        }
        self.remind(world, (wait.as_millis() as u64).max(1), GatewayTimer::Wait { stream, number });
    }

    fn forward(&mut self, world: &mut World, stream: StreamId, events: Vec<EngineEvent>) {
        let Some(request) = self.requests.get_mut(&stream) else { return };
        request.told_ms = world.now_ms;
        let is_over = request.course.as_ref().is_none_or(Course::is_over);
        let call = request.call;
        self.say_to(world, stream, Http::Events(events));
        if is_over {
            self.requests.remove(&stream);
            if let Some(call) = call {
                self.cancel(world, call);
            }
        }
    }

    fn with_course(&mut self, world: &mut World, stream: StreamId, act: impl FnOnce(&mut Course, Duration) -> Step) {
        let now = self.now(world);
        let Some(course) = self.requests.get_mut(&stream).and_then(|request| request.course.as_mut()) else { return };
        let step = act(course, now);
        self.carry_out(world, stream, step);
    }

    /// A wait is over.
    pub(super) fn waited(&mut self, world: &mut World, stream: StreamId, number: u64) {
        if self.requests.get(&stream).is_some_and(|request| request.wait == number) {
            self.with_course(world, stream, Course::waited);
        }
    }

    /// A worker has not admitted a request in time.
    pub(super) fn not_admitted(&mut self, world: &mut World, call: CallId) {
        let Some((worker, Purpose::Request(stream))) = self.calls.get(&call).cloned() else { return };
        if self.is_submitted(stream, call) {
            self.cancel(world, call);
            let error = AdmitError::Unavailable { reason: format!("{worker} did not answer within {ADMIT_MS} ms") };
            self.with_course(world, stream, |course, now| course.submitted(Err(error), now));
        }
    }

    /// Whether the worker has not said yet whether it admits.
    fn is_submitted(&self, stream: StreamId, call: CallId) -> bool {
        let of = |request: &&Request| request.call == Some(call);
        self.requests.get(&stream).filter(of).and_then(|request| request.course.as_ref()).is_some_and(Course::is_submitted)
    }

    /// The call of a request is gone with its connection.
    pub(super) fn call_lost(&mut self, world: &mut World, stream: StreamId, call: CallId, reason: &str) {
        let reason = reason.to_owned();
        if self.is_submitted(stream, call) {
            self.with_course(world, stream, |course, now| course.submitted(Err(AdmitError::Unavailable { reason }), now));
        } else if self.requests.get(&stream).is_some_and(|request| request.call == Some(call)) {
            self.with_course(world, stream, |course, now| course.heard(Some(EngineEvent::Failed { reason, retryable: true }), now));
        }
    }

    /// A worker says something of a request.
    pub(super) fn request_hears(&mut self, world: &mut World, stream: StreamId, call: CallId, wire: Wire) {
        if self.requests.get(&stream).is_none_or(|request| request.call != Some(call)) {
            return;
        }
        match wire {
            Wire::Admitted { .. } => self.with_course(world, stream, |course, now| course.submitted(Ok(()), now)),
            Wire::Refused { error, .. } => {
                self.calls.remove(&call);
                self.with_course(world, stream, |course, now| course.submitted(Err(error), now));
            }
            Wire::Events { events, .. } => self.events(world, stream, events),
            Wire::Ended { .. } => {
                self.calls.remove(&call);
                self.with_course(world, stream, |course, now| course.heard(None, now));
            }
            _ => {}
        }
    }

    fn events(&mut self, world: &mut World, stream: StreamId, events: Vec<EngineEvent>) {
        let now = self.now(world);
        let Some(course) = self.requests.get_mut(&stream).and_then(|request| request.course.as_mut()) else { return };
        let (mut forwarded, mut last) = (Vec::new(), None);
        for event in events {
            match course.heard(Some(event), now) {
                Step::Forward(event) => forwarded.push(event),
                Step::Listen => {}
                other => {
                    last = Some(other);
                    break;
                }
            }
        }
        if !forwarded.is_empty() {
            self.forward(world, stream, forwarded);
        }
        if let Some(step) = last {
            self.carry_out(world, stream, step);
        }
    }

    /// A request has had its time.
    pub(super) fn deadline(&mut self, world: &mut World, stream: StreamId) {
        if let Some(request) = self.requests.get_mut(&stream) {
            let error = match &mut request.course {
                Some(course) => course.stop(Stop::Deadline),
                None => ApiError::Deadline { seconds: REQUEST_S },
            };
            self.carry_out(world, stream, Step::Fail(error));
        }
    }

    /// A caller is gone.
    pub(super) fn hung_up(&mut self, world: &mut World, stream: StreamId) {
        if let Some(call) = self.requests.remove(&stream).and_then(|request| request.call) {
            self.cancel(world, call);
        }
    }

    /// Tells callers that wait for long that this gateway lives.
    pub(super) fn comment(&mut self, world: &mut World) {
        let silent =
            |request: &mut Request| (request.told_ms + COMMENT_MS <= world.now_ms).then(|| request.told_ms = world.now_ms).is_some();
        let silent: Vec<StreamId> = self.requests.iter_mut().filter_map(|(stream, request)| silent(request).then_some(*stream)).collect();
        for stream in silent {
            self.say_to(world, stream, Http::Comment);
        }
    }
}
