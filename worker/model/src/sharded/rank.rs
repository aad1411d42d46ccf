//! One rank's thread: it loads its part, then runs every plan that comes, until none comes any more.
//!
//! It decides nothing. Invariants: however it ends, it says so and aborts every group, so that nobody waits for it; its
//! memory is free before it is counted as ended.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender};
use std::time::Duration;

use crate::error::{ModelError, Result};
use crate::step::{StageInput, StageModel, StageOutput, StepModelInfo, StepPlan};

/// Loads a rank's part, on the rank's own thread: what that thread is told of cores and priority its kernels inherit.
pub type LoadRank = Box<dyn FnOnce() -> Result<Box<dyn StageModel>> + Send>;

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
    let mut model = load()?;
    let info = model.stage_info().clone();
    let loaded = Report::Loaded { rank: number, info };
    // Who listens to reports gives the plans too: without one there are none.
    let _ = ports.reports.send(loaded);
    let mut scratch = Vec::new();
    while let Ok(plan) = ports.plans.recv() {
        let hidden = ports.previous.as_ref().map(|previous| from_stage_before(previous, &plan, ports.deadline)).transpose()?;
        let input = hidden.as_deref().map_or(StageInput::Tokens, StageInput::Hidden);
        match &ports.gives {
            Gives::Hidden(next) => {
                let mut values = Vec::new();
                model.run_stage(&plan, input, StageOutput::Hidden(&mut values))?;
                let sent = next.send(Hidden { step: plan.step, values });
                sent.map_err(|_| ModelError::RankGone { whom: "a rank of the next stage" })?;
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
