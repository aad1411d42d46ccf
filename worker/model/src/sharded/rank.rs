//! One rank's thread: it loads its part, then runs every plan that comes, until none comes any more.
//!
//! It decides nothing. Invariants: however it ends, it says so and aborts every group, so that nobody waits for it; its
//! memory is free before it is counted as ended.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::RankLayout;
use super::reach::HiddenLink;
use crate::error::{ModelError, Result};
use crate::step::{StageInput, StageModel, StageOutput, StepModelInfo, StepPlan};

/// Loads a rank's part, on the rank's own thread: what that thread is told of cores and priority its kernels inherit.
pub type LoadRank = Box<dyn FnOnce() -> Result<LoadedRank> + Send>;

/// A rank's part, and the way to ranks of neighbouring stages in other processes.
pub struct LoadedRank {
    pub(super) model: Box<dyn StageModel>,
    pub(super) previous: Option<HiddenLink>,
    pub(super) next: Option<HiddenLink>,
}

impl LoadedRank {
    /// One whose neighbours are in this process.
    pub fn alone(model: Box<dyn StageModel>) -> Self {
        LoadedRank { model, previous: None, next: None }
    }
}

/// Ends a rank's groups with a reason.
pub type AbortGroups = Box<dyn Fn(&str) + Send + Sync>;

/// What a rank is made of.
pub struct RankSetup {
    /// Loads its part.
    pub load: LoadRank,
    /// Ends its groups, from whichever thread.
    pub abort: AbortGroups,
}

/// Ends the groups of all ranks.
pub(super) struct Aborts(pub(super) Vec<AbortGroups>);

impl Aborts {
    pub(super) fn all(&self, reason: &str) {
        self.0.iter().for_each(|abort| abort(reason));
    }
}

/// Hidden states of a step, on their way to the next stage.
pub(super) struct Hidden {
    step: u64,
    values: Vec<f32>,
}

/// What becomes of a rank's result.
pub(super) enum Gives {
    /// It goes to the next stage.
    Hidden(SyncSender<Hidden>),
    /// It goes to the next stage, in another process.
    FarHidden,
    /// It goes to the engine.
    Logits,
    /// The first rank gathers it.
    Share,
    /// It has none.
    Nothing,
}

/// What a rank says.
pub(super) enum Report {
    Loaded { rank: usize, info: StepModelInfo },
    Logits { step: u64, values: Vec<f32> },
    Failed { rank: usize, error: ModelError },
}

/// A rank's connections.
pub(super) struct Ports {
    pub(super) plans: Receiver<Arc<StepPlan>>,
    pub(super) previous: Option<Receiver<Hidden>>,
    pub(super) gives: Gives,
    pub(super) reports: Sender<Report>,
    pub(super) deadline: Duration,
}

pub(super) struct Rank {
    pub(super) number: usize,
    pub(super) ports: Ports,
    pub(super) aborts: Arc<Aborts>,
}

/// The ranks of one process, each in a thread of its own.
pub(super) struct Started {
    /// Where each takes its plans.
    pub(super) plans: Vec<SyncSender<Arc<StepPlan>>>,
    pub(super) aborts: Arc<Aborts>,
    pub(super) threads: Vec<JoinHandle<()>>,
}

impl Started {
    /// Starts them, in the layout's order; each loads its part and says so to `report`.
    ///
    /// # Errors
    /// A system without threads. Those that were started have ended then.
    pub(super) fn new(layout: &RankLayout, setups: Vec<(usize, RankSetup)>, report: &Sender<Report>, deadline: Duration) -> Result<Self> {
        let (stages, members) = (layout.stages.len(), layout.members());
        let here: Vec<usize> = setups.iter().map(|(rank, _)| *rank).collect();
        let (loads, aborts): (Vec<_>, Vec<_>) = setups.into_iter().map(|(rank, setup)| ((rank, setup.load), setup.abort)).unzip();
        let mut started = Started { plans: Vec::new(), aborts: Arc::new(Aborts(aborts)), threads: Vec::new() };
        // As many as there may be steps under way, so that nobody waits to send.
        let mut inputs: HashMap<usize, Receiver<Hidden>> = HashMap::new();
        for (number, load) in loads {
            let (plan, inbox) = sync_channel(stages);
            let next = number + members;
            let gives = if next >= layout.ranks() {
                layout.gives(number % members)
            } else if here.contains(&next) {
                let (output, input) = sync_channel(stages);
                inputs.insert(next, input);
                Gives::Hidden(output)
            } else {
                Gives::FarHidden
            };
            let ports = Ports { plans: inbox, previous: inputs.remove(&number), gives, reports: report.clone(), deadline };
            let rank = Rank { number, ports, aborts: started.aborts.clone() };
            let thread = std::thread::Builder::new().name(format!("forge-rank-{number}")).spawn(move || rank.run(load));
            match thread {
                Ok(thread) => started.threads.push(thread),
                Err(error) => {
                    started.end("the system gives no thread");
                    return Err(ModelError::Option {
                        option: "layout",
                        value: layout.ranks().to_string(),
                        reason: format!("the system gives no thread for a rank ({error}): allow more, or use fewer ranks"),
                    });
                }
            }
            started.plans.push(plan);
        }
        Ok(started)
    }

    /// Ends all ranks, and waits until their memory is free: they wait for nothing that an abort does not end.
    pub(super) fn end(&mut self, reason: &str) {
        self.plans.clear();
        self.aborts.all(reason);
        for thread in self.threads.drain(..) {
            // It has caught its own panics.
            let _ = thread.join();
        }
    }
}

impl Rank {
    /// The thread's life.
    pub(super) fn run(self, load: LoadRank) {
        let Rank { number, ports, aborts } = self;
        // The model lives in there: its memory is free before anybody hears of the end.
        let ended = catch_unwind(AssertUnwindSafe(|| serve(number, &ports, load)));
        let error = match ended {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(panic) => ModelError::RankPanicked { reason: text_of(&*panic).to_owned() },
        };
        // Said before it is done: whoever is woken by the abort speaks later.
        let reason = format!("rank {number}: {error}");
        let _ = ports.reports.send(Report::Failed { rank: number, error });
        aborts.all(&reason);
    }
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("unknown")
}

/// Until no plan comes any more.
fn serve(number: usize, ports: &Ports, load: LoadRank) -> Result<()> {
    let LoadedRank { mut model, previous, next } = load()?;
    let info = model.stage_info().clone();
    let loaded = Report::Loaded { rank: number, info };
    // Who listens to reports gives the plans too: without one there are none.
    let _ = ports.reports.send(loaded);
    let mut scratch = Vec::new();
    while let Ok(plan) = ports.plans.recv() {
        let hidden = match (&ports.previous, &previous) {
            (Some(previous), _) => Some(from_stage_before(previous, &plan, ports.deadline)?),
            (None, Some(previous)) => Some(previous.take(plan.step, ports.deadline)?),
            (None, None) => None,
        };
        let input = hidden.as_deref().map_or(StageInput::Tokens, StageInput::Hidden);
        match &ports.gives {
            Gives::Hidden(next) => {
                let mut values = Vec::new();
                model.run_stage(&plan, input, StageOutput::Hidden(&mut values))?;
                let sent = next.send(Hidden { step: plan.step, values });
                sent.map_err(|_| ModelError::RankGone { whom: "a rank of the next stage" })?;
            }
            Gives::FarHidden => {
                let next = next.as_ref().ok_or(ModelError::RankGone { whom: "a rank of the next stage" })?;
                model.run_stage(&plan, input, StageOutput::Hidden(&mut scratch))?;
                next.give(plan.step, &scratch)?;
            }
            Gives::Logits => {
                let mut values = Vec::new();
                model.run_stage(&plan, input, StageOutput::Logits(&mut values))?;
                let _ = ports.reports.send(Report::Logits { step: plan.step, values });
            }
            Gives::Share => model.run_stage(&plan, input, StageOutput::Logits(&mut scratch))?,
            Gives::Nothing => model.run_stage(&plan, input, StageOutput::Nothing)?,
        }
    }
    Ok(())
}

fn from_stage_before(previous: &Receiver<Hidden>, plan: &StepPlan, deadline: Duration) -> Result<Vec<f32>> {
    match previous.recv_timeout(deadline) {
        Ok(Hidden { step, values }) if step == plan.step => Ok(values),
        Ok(Hidden { step, .. }) => {
            Err(ModelError::Plan { field: "step", reason: format!("the stage before gave step {step} for step {}", plan.step) })
        }
        Err(RecvTimeoutError::Timeout) => {
            Err(ModelError::RankLate { what: format!("the stage before's part of step {}", plan.step), waited: deadline })
        }
        Err(RecvTimeoutError::Disconnected) => Err(ModelError::RankGone { whom: "a rank of the stage before" }),
    }
}
