//! `ShardedModel`: a replica of several ranks as one [`StepModel`].
//!
//! ```text
//!              ┌─ plan ─► rank 0 ─┐ hidden      ┌─ rank 2 ─┐
//! engine ─ step┤                  ├────────────►│          ├─ logits ─► engine
//!              └─ plan ─► rank 1 ─┘             └─ rank 3 ─┘
//!                       first stage             second stage
//! ```
//!
//! Each rank is a thread with its own kernels, weights and keys (`rank`). Every step's plan goes to all of them; within
//! a stage they share sums over their groups (`local`), hidden states go from each rank to the one in its place of the
//! next stage, and the last stage's first rank gives the logits. While one stage computes a step, the stage before it may
//! compute the next: so many steps as there are stages may be under way.
//!
//! Ranks may be in several processes (`spanning`, `following`): the leading one has the first rank and the engine, and sends the
//! plans; groups over processes go over the data plane (`reach`), those within one through its memory.
//!
//! What it is not: it decides nothing and restarts nothing.
//!
//! Invariants: all ranks run the same plans in the same order; a rank that fails, panics or is late ends all others by
//! the abort of every group, and no wait of theirs outlives its deadline or that abort; logits have the bits of one
//! process that holds everything.

mod following;
mod layout;
mod local;
mod rank;
mod reach;
mod spanning;
mod wire;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use forge_shared::ids::Epoch;

use crate::decoder::plan;
use crate::error::{ModelError, Result};
use crate::step::{Pipeline, StepModel, StepModelInfo, StepPlan};

pub use following::{FollowingRanks, StopFollowing};
pub use layout::RankLayout;
pub use local::MakeBackend;
pub use rank::{AbortGroups, LoadRank, LoadedRank, RankSetup};
pub use reach::Reach;

use rank::{Report, Started};
use spanning::Far;

/// How long a root cause is waited for when a rank has only heard that another failed.
const ROOT_CAUSE_WAIT: Duration = Duration::from_secs(1);

/// How a sharded model is run.
#[derive(Debug, Clone, Copy)]
pub struct ShardedOptions {
    /// Epoch of the plan: steps of an older one are refused.
    pub epoch: Epoch,
    /// The longest a step, or a stage's part of one, is waited for.
    pub deadline: Duration,
}

impl ShardedOptions {
    /// Steps of `epoch`, waited for two minutes at most: longer than any step takes that makes sense to serve.
    pub fn new(epoch: Epoch) -> Self {
        ShardedOptions { epoch, deadline: Duration::from_secs(120) }
    }
}

/// See the module's documentation.
pub struct ShardedModel {
    info: StepModelInfo,
    options: ShardedOptions,
    stages: usize,
    /// Those of this process; they take no plans once the model has ended.
    ranks: Started,
    reports: Receiver<Report>,
    /// Those of other processes.
    far: Option<Far>,
    listeners: Vec<JoinHandle<()>>,
    /// Steps whose logits are still to come, oldest first.
    under_way: VecDeque<u64>,
    ended: Option<String>,
}

impl ShardedModel {
    /// Starts a thread for each rank, in the plan's order, which loads its part; returns when all have.
    ///
    /// # Errors
    /// What a rank met while loading, ranks that are not alike, or a system without threads. All ranks have ended then.
    pub fn start(layout: &RankLayout, setups: Vec<RankSetup>, options: ShardedOptions) -> Result<Self> {
        layout.check(setups.len())?;
        Self::begin(layout, setups.into_iter().enumerate().collect(), None, options)
    }

    /// As [`ShardedModel::start`], where only these ranks are here, and `far` has the others.
    fn begin(layout: &RankLayout, setups: Vec<(usize, RankSetup)>, far: Option<Far>, options: ShardedOptions) -> Result<Self> {
        let (report, reports) = channel();
        let ranks = Started::new(layout, setups, &report, options.deadline)?;
        let mut model = ShardedModel {
            info: StepModelInfo::default(),
            options,
            stages: layout.stages.len(),
            ranks,
            reports,
            far: None,
            listeners: Vec::new(),
            under_way: VecDeque::new(),
            ended: None,
        };
        if let Some(far) = far {
            let far = model.far.insert(far);
            model.listeners = far.listen(&report)?;
        }
        drop(report);
        let infos = model.loaded(layout.ranks())?;
        model.info = agreed(infos)?;
        Ok(model)
    }

    /// What every rank says once it is loaded.
    fn loaded(&mut self, ranks: usize) -> Result<Vec<StepModelInfo>> {
        let mut infos: Vec<Option<StepModelInfo>> = vec![None; ranks];
        while infos.iter().any(Option::is_none) {
            match self.reports.recv() {
                Ok(Report::Loaded { rank, info }) => infos[rank] = Some(info),
                Ok(Report::Failed { rank, error }) => return Err(self.root_cause(rank, error)),
                Ok(Report::Logits { .. }) | Err(_) => return Err(self.end(ModelError::RankGone { whom: "a rank that was loading" })),
            }
        }
        Ok(infos.into_iter().flatten().collect())
    }

    /// Ends everything with what happened first: a rank that only heard of another's failure is not the one to blame.
    fn root_cause(&mut self, rank: usize, error: ModelError) -> ModelError {
        let (mut rank, mut error) = (rank, error);
        // Other processes may still say what happened.
        self.abort_ranks(&error.to_string());
        while is_consequence(&error) {
            match self.reports.recv_timeout(ROOT_CAUSE_WAIT) {
                Ok(Report::Failed { rank: other, error: earlier }) if !is_consequence(&earlier) => (rank, error) = (other, earlier),
                Ok(_) => {}
                Err(_) => break,
            }
        }
        self.end(ModelError::Rank { rank, source: Box::new(error) })
    }

    /// Why a rank has ended, whatever else the ranks have to say.
    fn failure(&mut self) -> ModelError {
        loop {
            match self.reports.recv_timeout(ROOT_CAUSE_WAIT) {
                Ok(Report::Failed { rank, error }) => return self.root_cause(rank, error),
                Ok(_) => {}
                Err(_) => return self.end(ModelError::RankGone { whom: "a rank" }),
            }
        }
    }

    fn abort_ranks(&mut self, reason: &str) {
        self.ranks.plans.clear();
        self.ranks.aborts.all(reason);
    }

    fn abort(&mut self, reason: &str) {
        self.abort_ranks(reason);
        if let Some(far) = &self.far {
            far.links.abort(reason);
        }
    }

    fn end(&mut self, error: ModelError) -> ModelError {
        let reason = error.to_string();
        if let Some(far) = &self.far {
            far.reach.blame(&error);
        }
        self.abort(&reason);
        self.ended = Some(reason);
        error
    }
}

/// Whether an error says only that another rank has failed.
fn is_consequence(error: &ModelError) -> bool {
    matches!(error, ModelError::Net(forge_net::NetError::Aborted { .. }) | ModelError::RankGone { .. })
}

/// The facts that all ranks share, with the bytes of the largest block.
fn agreed(infos: Vec<StepModelInfo>) -> Result<StepModelInfo> {
    let mut infos = infos.into_iter();
    let Some(mut all) = infos.next() else { return Err(ModelError::RankGone { whom: "every rank" }) };
    for (rank, info) in infos.enumerate().map(|(index, info)| (index + 1, info)) {
        let fields = [
            ("numerics id", info.numerics_id.clone(), all.numerics_id.clone()),
            ("vocab_size", info.vocab_size.to_string(), all.vocab_size.to_string()),
            ("max_model_len", info.max_model_len.to_string(), all.max_model_len.to_string()),
            ("block_size", info.block_size.to_string(), all.block_size.to_string()),
            ("kv_blocks", info.kv_blocks.to_string(), all.kv_blocks.to_string()),
            ("max_step_rows", info.max_step_rows.to_string(), all.max_step_rows.to_string()),
            ("max_logits_rows", info.max_logits_rows.to_string(), all.max_logits_rows.to_string()),
        ];
        if let Some((field, actual, expected)) = fields.into_iter().find(|(_, actual, expected)| actual != expected) {
            return Err(ModelError::RanksDiffer { rank, field, actual, expected });
        }
        all.kv_block_bytes = all.kv_block_bytes.max(info.kv_block_bytes);
    }
    Ok(all)
}

impl Pipeline for ShardedModel {
    fn depth(&self) -> usize {
        self.stages
    }

    fn submit(&mut self, plan: &StepPlan) -> Result<()> {
        if let Some(reason) = &self.ended {
            return Err(ModelError::Ended { reason: reason.clone() });
        }
        if self.under_way.len() >= self.stages {
            let reason = format!("{} steps are under way, and there are {} stages", self.under_way.len(), self.stages);
            return Err(ModelError::Plan { field: "step", reason });
        }
        plan::check(plan, &self.info, self.options.epoch)?;
        self.options.epoch = plan.epoch;
        let shared = Arc::new(plan.clone());
        // A process that is gone says why in its listener's report.
        let far_gone = self.far.as_ref().is_some_and(|far| far.send(plan).is_err());
        // A rank that has ended has said why, or will have; there is room for a step in every other's channel.
        let gone = self.ranks.plans.iter().any(|rank| rank.try_send(shared.clone()).is_err()) || far_gone;
        self.under_way.push_back(plan.step);
        if gone { Err(self.failure()) } else { Ok(()) }
    }

    fn complete(&mut self, logits: &mut Vec<f32>) -> Result<()> {
        if let Some(reason) = &self.ended {
            return Err(ModelError::Ended { reason: reason.clone() });
        }
        if self.under_way.is_empty() {
            return Err(ModelError::Plan { field: "step", reason: "no step is under way".to_owned() });
        }
        *logits = self.next_logits()?;
        self.under_way.pop_front();
        Ok(())
    }
}

impl ShardedModel {
    fn next_logits(&mut self) -> Result<Vec<f32>> {
        let step = self.under_way.front().copied().unwrap_or_default();
        match self.reports.recv_timeout(self.options.deadline) {
            Ok(Report::Logits { step: done, values }) if done == step => Ok(values),
            Ok(Report::Logits { step: done, .. }) => {
                let reason = format!("the ranks gave step {done}, and step {step} was next");
                Err(self.end(ModelError::Plan { field: "step", reason }))
            }
            Ok(Report::Failed { rank, error }) => Err(self.root_cause(rank, error)),
            Ok(Report::Loaded { .. }) | Err(RecvTimeoutError::Disconnected) => Err(self.end(ModelError::RankGone { whom: "every rank" })),
            Err(RecvTimeoutError::Timeout) => {
                let what = format!("the logits of step {step}");
                Err(self.end(ModelError::RankLate { what, waited: self.options.deadline }))
            }
        }
    }
}

impl StepModel for ShardedModel {
    fn info(&self) -> &StepModelInfo {
        &self.info
    }

    fn step(&mut self, plan: &StepPlan, logits: &mut Vec<f32>) -> Result<()> {
        self.submit(plan)?;
        self.complete(logits)
    }

    fn pipeline(&mut self) -> Option<&mut dyn Pipeline> {
        (self.stages > 1).then_some(self as &mut dyn Pipeline)
    }
}

impl Drop for ShardedModel {
    /// Returns when all memory is free: ranks wait for nothing that an abort does not end.
    fn drop(&mut self) {
        self.abort("the replica has ended");
        self.ranks.end("the replica has ended");
        for listener in self.listeners.drain(..) {
            // It does nothing that panics; if it did, that is over too.
            let _ = listener.join();
        }
    }
}
