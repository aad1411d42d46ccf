//! `EngineThread`: the loop that drives [`EngineCore`] and a model on an OS thread of its own.
//!
//! It sleeps while there is nothing to do. A panic or a model's error ends it: the state is marked dead first,
//! then every stream ends without `Done` (so that the gateway replays elsewhere or after the restart), and last
//! the supervisor hears of it. It never restarts itself: that is its supervisor's decision.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use forge_model::StepModel;
use forge_shared::generate::{AdmitError, EngineEvent, GenerateRequest};
use forge_shared::link::{ModelCard, PrefixUpdate};
use forge_shared::telemetry::{Metrics, run_label};
use forge_text::Tokenizer;
use tokio::sync::{mpsc, oneshot};

use crate::handle::{EngineHandle, Shared};
use crate::{EngineCore, EngineError, EngineOptions};

/// Commands that may wait for the end of a step; more submissions are refused as overload.
const COMMAND_CAPACITY: usize = 4096;
/// How often clients that are behind are looked at when nothing else is to be done.
const STALL_POLL: Duration = Duration::from_millis(5);

/// Everything an engine is made of.
pub struct EngineSetup {
    /// What runs the steps.
    pub model: Box<dyn StepModel>,
    /// Of the same model; its end tokens end answers.
    pub tokenizer: Tokenizer,
    /// What gateways are told; its name labels the metrics, with the replica and the options' epoch.
    pub card: Arc<ModelCard>,
    /// Which copy of the model it is: `service/index`.
    pub replica: String,
    /// Settings.
    pub options: EngineOptions,
    /// Where to count.
    pub metrics: Metrics,
}

/// How an engine's thread ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EngineExit {
    /// It was drained or stopped, or all its handles were dropped.
    Stopped,
    /// The model failed or something panicked; the supervisor may build another.
    Died {
        /// What happened.
        reason: String,
    },
}

pub(crate) enum Command {
    Submit {
        request: Box<GenerateRequest>,
        events: mpsc::Sender<EngineEvent>,
        reply: oneshot::Sender<Result<(), AdmitError>>,
    },
    /// Tell of the prefix cache's changes.
    Listen {
        updates: mpsc::Sender<PrefixUpdate>,
    },
    /// Finish what was admitted, but fail what is left at the deadline.
    Drain {
        deadline: Instant,
    },
}

/// Starts engines. See the module's documentation.
pub struct EngineThread;

impl EngineThread {
    /// Starts an engine on its own thread. The receiver tells how it ended.
    ///
    /// # Errors
    /// [`EngineError::Option`], or [`EngineError::Thread`] if the system gives no thread.
    pub fn spawn(setup: EngineSetup) -> Result<(EngineHandle, oneshot::Receiver<EngineExit>), EngineError> {
        let EngineSetup { mut model, tokenizer, card, replica, options, metrics } = setup;
        let event_capacity = options.event_capacity;
        let run = run_label(&card.name, &replica, options.epoch);
        let mut core = EngineCore::new(model.info().clone(), tokenizer, options, &metrics, &run)?;
        core.allow_under_way(model.pipeline().map_or(1, |pipeline| pipeline.depth()));
        let (commands, inbox) = sync_channel(COMMAND_CAPACITY);
        let (exit_sender, exit) = oneshot::channel();
        let shared = Arc::new(Shared::new(core.scheduler().blocks().total()));
        let handle = EngineHandle::new(commands, shared.clone(), card, event_capacity);
        let mut worker = Worker {
            core,
            model,
            inbox,
            shared,
            start: Instant::now(),
            deadline: None,
            abandoned: false,
            listener_behind: false,
            logits: Vec::new(),
        };
        std::thread::Builder::new().name("forge-engine".into()).spawn(move || {
            let result = catch_unwind(AssertUnwindSafe(|| worker.run()));
            let exit = match result {
                Ok(Ok(())) => EngineExit::Stopped,
                Ok(Err(error)) => EngineExit::Died { reason: error.to_string() },
                Err(panic) => EngineExit::Died { reason: format!("panic: {}", panic_text(&*panic)) },
            };
            match &exit {
                EngineExit::Stopped => worker.shared.set_ended("the engine has stopped"),
                EngineExit::Died { reason } => {
                    tracing::error!(%reason, "the engine died");
                    worker.shared.set_ended(reason);
                }
            }
            worker.core.clear_gauges();
            // Only now: a client that sees its stream end must not find the engine ready.
            drop(worker);
            // Nobody may be listening, which is fine.
            let _ = exit_sender.send(exit);
        })?;
        Ok((handle, exit))
    }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("unknown")
}

/// The thread's state.
struct Worker {
    core: EngineCore,
    model: Box<dyn StepModel>,
    inbox: Receiver<Command>,
    shared: Arc<Shared>,
    start: Instant,
    /// When draining: until when.
    deadline: Option<Instant>,
    /// All handles are gone; only streams are left.
    abandoned: bool,
    /// A listener to the prefix cache has no room.
    listener_behind: bool,
    logits: Vec<f32>,
}

impl Worker {
    /// Runs until stopped.
    fn run(&mut self) -> Result<(), EngineError> {
        loop {
            let begin = Instant::now();
            self.take_commands();
            if self.deadline.is_some_and(|deadline| begin >= deadline) {
                self.core.fail_all("the engine is shutting down");
                return Ok(());
            }
            let stepped = self.run_step(begin)?;
            self.shared.observe(&self.core);
            self.listener_behind = self.core.tell_listeners();
            if stepped {
                continue;
            }
            let stopping = self.deadline.is_some() || self.abandoned;
            if self.core.is_idle() && stopping {
                return Ok(());
            }
            self.wait();
        }
    }

    /// Begins a step where there is one to run; finishes the oldest under way once no more may begin. Returns whether
    /// there was anything to do.
    fn run_step(&mut self, begin: Instant) -> Result<bool, EngineError> {
        let began = self.core.begin_step(begin - self.start);
        let model_begin = Instant::now();
        match (self.model.pipeline(), self.core.plan().filter(|_| began)) {
            (Some(pipeline), Some(plan)) => {
                pipeline.submit(plan)?;
                if self.core.under_way() < pipeline.depth() {
                    return Ok(true);
                }
                pipeline.complete(&mut self.logits)?;
            }
            (Some(pipeline), None) if self.core.under_way() > 0 => pipeline.complete(&mut self.logits)?,
            (None, Some(plan)) => self.model.step(plan, &mut self.logits)?,
            (_, None) => return Ok(false),
        }
        let model_end = Instant::now();
        self.core.finish_step(&mut self.logits, model_end - self.start)?;
        let model = model_end - model_begin;
        let other = begin.elapsed().saturating_sub(model);
        self.core.count_time(model, other);
        self.shared.count_time(model, other);
        Ok(true)
    }

    /// Takes all commands that are there, without waiting.
    fn take_commands(&mut self) {
        loop {
            match self.inbox.try_recv() {
                Ok(command) => self.take(command),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {
                    self.abandoned = true;
                    return;
                }
            }
        }
    }

    /// Sleeps until there is something to do: a command when idle, room in a channel when all clients are
    /// behind.
    fn wait(&mut self) {
        if self.core.is_idle() && !self.listener_behind {
            match self.inbox.recv() {
                Ok(command) => self.take(command),
                Err(_) => self.abandoned = true,
            }
            return;
        }
        if self.abandoned {
            std::thread::sleep(STALL_POLL);
            return;
        }
        match self.inbox.recv_timeout(STALL_POLL) {
            Ok(command) => self.take(command),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.abandoned = true,
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Submit { request, events, reply } => {
                let result = match self.deadline {
                    Some(_) => Err(AdmitError::Unavailable { reason: "the engine is draining".into() }),
                    None => self.core.submit(*request, events, self.start.elapsed()),
                };
                // If the submitter went away, so did its receiver, and the next step drops the request.
                let _ = reply.send(result);
            }
            Command::Listen { updates } => self.core.listen(updates),
            Command::Drain { deadline } => {
                self.deadline = Some(self.deadline.map_or(deadline, |earlier| earlier.min(deadline)));
            }
        }
    }
}
