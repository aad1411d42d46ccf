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
//! What it is not: it decides nothing and restarts nothing. Ranks of other processes are not known here yet.
//!
//! Invariants: all ranks run the same plans in the same order; a rank that fails, panics or is late ends all others by
//! the abort of every group, and no wait of theirs outlives its deadline or that abort; logits have the bits of one
//! process that holds everything.

mod layout;
mod local;
mod rank;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use forge_shared::ids::Epoch;

use crate::decoder::plan;
use crate::error::{ModelError, Result};
use crate::step::{Pipeline, StepModel, StepModelInfo, StepPlan};

pub use layout::RankLayout;
pub use local::MakeBackend;
pub use rank::{AbortGroups, LoadRank, RankSetup};

use rank::{Aborts, Gives, Ports, Rank, Report};

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
    /// One channel per rank; empty once the model has ended.
    plans: Vec<SyncSender<Arc<StepPlan>>>,
    reports: Receiver<Report>,
    aborts: Arc<Aborts>,
    threads: Vec<JoinHandle<()>>,
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
        let stages = layout.stages.len();
        let members = layout.members();
        let (loads, aborts): (Vec<_>, Vec<_>) = setups.into_iter().map(|setup| (setup.load, setup.abort)).unzip();
        let aborts = Arc::new(Aborts(aborts));
        let (report, reports) = channel();
        // As many as there may be steps under way, so that nobody waits to send.
        let mut inputs: Vec<Option<Receiver<_>>> = (0..members).map(|_| None).collect();
        let (mut plans, mut ranks) = (Vec::new(), Vec::new());
        for (number, load) in loads.into_iter().enumerate() {
            let (stage, member) = (number / members, number % members);
            let (plan, inbox) = sync_channel(stages);
            let previous = inputs[member].take();
            let mut next = None;
            if stage + 1 < stages {
                let (output, input) = sync_channel(stages);
                next = Some(output);
                inputs[member] = Some(input);
            }
            let gives = match next {
                Some(output) => Gives::Hidden(output),
                None => layout.gives(member),
            };
            let ports = Ports { plans: inbox, previous, gives, reports: report.clone(), deadline: options.deadline };
            plans.push(plan);
            ranks.push((Rank { number, ports, aborts: aborts.clone() }, load));
        }
        drop(report);
        let mut model = ShardedModel {
            info: StepModelInfo::default(),
            options,
            stages,
            plans,
            reports,
            aborts,
            threads: Vec::with_capacity(ranks.len()),
            under_way: VecDeque::new(),
            ended: None,
        };
        for (rank, load) in ranks {
            let name = format!("forge-rank-{}", rank.number);
            let thread = std::thread::Builder::new().name(name).spawn(move || rank.run(load));
            model.threads.push(thread.map_err(|error| ModelError::Option {
                option: "layout",
                value: layout.ranks().to_string(),
                reason: format!("the system gives no thread for a rank ({error}): allow more, or use fewer ranks"),
            })?);
        }
        let infos = model.loaded()?;
        model.info = agreed(infos)?;
        Ok(model)
    }

    /// What every rank says once it is loaded.
    fn loaded(&mut self) -> Result<Vec<StepModelInfo>> {
        let mut infos: Vec<Option<StepModelInfo>> = vec![None; self.plans.len()];
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
        self.abort(&error.to_string());
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

    fn abort(&mut self, reason: &str) {
        self.plans.clear();
        self.aborts.all(reason);
    }

    fn end(&mut self, error: ModelError) -> ModelError {
        let reason = error.to_string();
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
        // A rank that has ended has said why, or will have; there is room for a step in every other's channel.
        let gone = self.plans.iter().any(|rank| rank.try_send(shared.clone()).is_err());
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
        for thread in self.threads.drain(..) {
            // It has caught its own panics.
            let _ = thread.join();
        }
    }
}
