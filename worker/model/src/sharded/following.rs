//! Ranks of a process that does not lead: they run every plan that comes, until the leading process or one of them ends.
//!
//! It decides nothing. Invariant: however it ends, the leading process is told, all groups of its ranks are aborted, and its
//! memory is free when [`FollowingRanks::run`] returns.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use forge_kernels::Backend;
use forge_net::MessageLinks;

use super::rank::{Aborts, Report, Started};
use super::spanning::{LOOK, STEPS, no_thread, setups};
use super::wire::{Message, send_values};
use super::{MakeBackend, RankLayout, Reach, agreed, is_consequence};
use crate::decoder::options::DecoderOptions;
use crate::decoder::plan;
use crate::error::{ModelError, Result};
use crate::model::Model;
use crate::step::{StepModelInfo, StepPlan};

/// How long the leading process may take to hear why a rank has failed.
const HEARD: Duration = Duration::from_millis(500);
/// Between two looks whether it has.
const PAUSE: Duration = Duration::from_millis(5);

/// See the module's documentation.
pub struct FollowingRanks {
    info: StepModelInfo,
    reach: Reach,
    links: Arc<MessageLinks>,
    ranks: Started,
    reports: Receiver<Report>,
    /// For the thread that reads plans.
    report: Sender<Report>,
    reader: Option<JoinHandle<()>>,
}

/// Ends following ranks from another thread.
#[derive(Clone)]
pub struct StopFollowing {
    ranks: Arc<Aborts>,
    links: Arc<MessageLinks>,
}

impl StopFollowing {
    /// Ends them, and with them the replica.
    pub fn stop(&self, reason: &str) {
        self.links.abort(reason);
        self.ranks.all(reason);
    }
}

impl FollowingRanks {
    /// The ranks of this process, one for each of `backends`; the leading process [`super::ShardedModel::spanning`]s them. Returns
    /// when they have loaded.
    ///
    /// # Errors
    /// What a rank met while loading; processes that cannot be reached, have other weights, or ended meanwhile.
    pub fn start<B: Backend>(
        model: &Model,
        layout: &RankLayout,
        options: &DecoderOptions,
        reach: &Reach,
        backends: Vec<MakeBackend<B>>,
    ) -> Result<Self> {
        let begun = Self::begin(model, layout, options, reach, backends).and_then(Self::loaded);
        begun.inspect_err(|error| reach.blame(error))
    }

    fn begin<B: Backend>(
        model: &Model,
        layout: &RankLayout,
        options: &DecoderOptions,
        reach: &Reach,
        backends: Vec<MakeBackend<B>>,
    ) -> Result<Self> {
        let setups = setups(model, layout, options, reach, backends)?;
        let links = Arc::new(reach.links(STEPS)?);
        let (report, reports) = std::sync::mpsc::channel();
        let ranks = Started::new(layout, setups, &report, reach.deadline)?;
        Ok(FollowingRanks { info: StepModelInfo::default(), reach: reach.clone(), links, ranks, reports, report, reader: None })
    }

    /// Waits for the ranks, and says it to the leading process.
    fn loaded(mut self) -> Result<Self> {
        let mut infos = Vec::new();
        while infos.len() < self.ranks.plans.len() {
            match self.reports.recv_timeout(LOOK) {
                Ok(Report::Loaded { rank, info }) => {
                    self.links.send(0, &Message::Loaded { rank, info: info.clone() }.encode())?;
                    infos.push(info);
                }
                Ok(Report::Failed { rank, error }) => return Err(self.end(rank, error)),
                // Somebody else may have ended the replica meanwhile.
                Err(_) => self.links.check_open()?,
                Ok(Report::Logits { .. }) => {}
            }
        }
        self.info = agreed(infos)?;
        Ok(self)
    }

    /// Fixed facts of its ranks.
    pub fn info(&self) -> &StepModelInfo {
        &self.info
    }

    /// The way to end them from another thread.
    pub fn stopper(&self) -> StopFollowing {
        StopFollowing { ranks: Arc::clone(&self.ranks.aborts), links: Arc::clone(&self.links) }
    }

    /// Runs what comes until it is over, and says why.
    pub fn run(mut self) -> ModelError {
        let reader = PlanReader {
            links: Arc::clone(&self.links),
            plans: std::mem::take(&mut self.ranks.plans),
            info: self.info.clone(),
            reach: self.reach.clone(),
        };
        let report = self.report.clone();
        let read = move || {
            let Err(error) = reader.read();
            let rank = reader.reach.here().first().copied().unwrap_or_default();
            // Nobody listens once the ranks have ended.
            let _ = report.send(Report::Failed { rank, error });
        };
        match std::thread::Builder::new().name("forge-plans".into()).spawn(read) {
            Ok(thread) => self.reader = Some(thread),
            Err(error) => return self.end(0, no_thread(error)),
        }
        loop {
            match self.reports.recv() {
                Ok(Report::Logits { step, values }) => {
                    if let Err(error) = send_values(&self.links, 0, step, &values) {
                        return self.end(0, error);
                    }
                }
                Ok(Report::Failed { rank, error }) => return self.end(rank, error),
                Ok(Report::Loaded { .. }) => {}
                Err(_) => return self.end(0, ModelError::RankGone { whom: "every rank of this process" }),
            }
        }
    }

    /// Tells the leading process, and ends all.
    fn end(&mut self, rank: usize, error: ModelError) -> ModelError {
        self.reach.blame(&error);
        if !is_consequence(&error)
            && let Some(node) = self.reach.culprit(&error)
        {
            let message = Message::Failed { rank, node, reason: error.to_string() };
            // It ends the links when it has read that; where it does not, they end here.
            if self.links.send(0, &message.encode()).is_ok() {
                let until = Instant::now() + HEARD;
                while self.links.check_open().is_ok() && Instant::now() < until {
                    std::thread::sleep(PAUSE);
                }
            }
        }
        self.stopper().stop(&format!("rank {rank}: {error}"));
        error
    }
}

impl Drop for FollowingRanks {
    /// Returns when all memory is free: ranks wait for nothing that an abort does not end.
    fn drop(&mut self) {
        self.links.abort("the ranks of this process have ended");
        self.ranks.end("the ranks of this process have ended");
        if let Some(reader) = self.reader.take() {
            // It does nothing that panics; if it did, that is over too.
            let _ = reader.join();
        }
    }
}

/// Hands plans to the ranks in the order in which they come.
struct PlanReader {
    links: Arc<MessageLinks>,
    plans: Vec<SyncSender<Arc<StepPlan>>>,
    info: StepModelInfo,
    reach: Reach,
}

impl PlanReader {
    fn read(&self) -> Result<std::convert::Infallible> {
        let mut epoch = self.reach.epoch;
        loop {
            let Some(bytes) = self.links.recv(0, LOOK)? else { continue };
            let Message::Plan(plan) = Message::decode(&bytes)? else {
                return Err(ModelError::Message { reason: "the leading process must send plans".to_owned() });
            };
            plan::check(&plan, &self.info, epoch)?;
            epoch = plan.epoch;
            let plan = Arc::new(plan);
            for rank in &self.plans {
                // One that has ended says why by itself.
                rank.send(plan.clone()).map_err(|_| ModelError::RankGone { whom: "a rank of this process" })?;
            }
        }
    }
}
