//! A replica whose ranks are in several processes: the leading one's side, and what both sides start from.
//!
//! What it is not: the processes agree on nothing here but steps; that all of them are about to start is their workers' matter.

use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;
use std::time::Duration;

use forge_kernels::Backend;
use forge_net::{Member, MessageLinks};

use super::local::seats;
use super::rank::{LoadRank, Report};
use super::reach::LateAborts;
use super::wire::{Message, Pieces};
use super::{MakeBackend, RankLayout, RankSetup, Reach, ShardedModel, ShardedOptions};
use crate::decoder::Decoder;
use crate::decoder::options::DecoderOptions;
use crate::error::{ModelError, Result};
use crate::model::Model;
use crate::step::{StageModel, StepPlan};

/// The group of the processes by which plans go out and results come back.
pub(super) const STEPS: &str = "steps";
/// One look at a link that may be silent for long.
pub(super) const LOOK: Duration = Duration::from_secs(1);

impl ShardedModel {
    /// The ranks of this process, which leads, one for each of `backends`, together with those of other processes, which
    /// [`super::FollowingRanks::start`] the same. `options` are those of an undivided decoder. Returns when all have loaded.
    ///
    /// # Errors
    /// As [`ShardedModel::start`]; processes that cannot be reached, have other weights, or ended meanwhile.
    pub fn spanning<B: Backend>(
        model: &Model,
        layout: &RankLayout,
        options: &DecoderOptions,
        reach: &Reach,
        backends: Vec<MakeBackend<B>>,
    ) -> Result<Self> {
        let started = Self::span(model, layout, options, reach, backends);
        started.inspect_err(|error| reach.blame(error))
    }

    fn span<B: Backend>(
        model: &Model,
        layout: &RankLayout,
        options: &DecoderOptions,
        reach: &Reach,
        backends: Vec<MakeBackend<B>>,
    ) -> Result<Self> {
        let setups = setups(model, layout, options, reach, backends)?;
        let far = Far { links: Arc::new(reach.links(STEPS)?), reach: reach.clone() };
        let sharded = ShardedOptions { epoch: options.epoch, deadline: reach.deadline };
        Self::begin(layout, setups, Some(far), sharded)
    }
}

/// What each rank of this process is made of.
pub(super) fn setups<B: Backend>(
    model: &Model,
    layout: &RankLayout,
    options: &DecoderOptions,
    reach: &Reach,
    backends: Vec<MakeBackend<B>>,
) -> Result<Vec<(usize, RankSetup)>> {
    layout.check(reach.members.len())?;
    let here = reach.here();
    if here.is_empty() || here.len() != backends.len() {
        let reason = format!("{} of its ranks are here, with {} backends", here.len(), backends.len());
        return Err(ModelError::Option { option: "layout", value: layout.ranks().to_string(), reason });
    }
    let parts = options.progress.divided(here.len());
    let seats = seats::<B>(layout, options.epoch, reach.deadline, |rank| reach.is_here(rank))?;
    let mut seats: Vec<Option<_>> = seats.into_iter().map(Some).collect();
    let setup = |((rank, backend), progress): ((usize, MakeBackend<B>), _)| {
        let options = DecoderOptions { shard: layout.shard(rank), progress, ..options.clone() };
        let seats = seats[rank].take().unwrap_or_default();
        let (model, layout, reach, aborts) = (model.clone(), layout.clone(), reach.clone(), LateAborts::default());
        let late = aborts.clone();
        let load: LoadRank = Box::new(move || {
            reach.load((&layout, rank), seats, &late, |groups| {
                Ok(Box::new(Decoder::new(&model, backend()?, &options, groups)?) as Box<dyn StageModel>)
            })
        });
        (rank, RankSetup { load, abort: Box::new(move |reason| aborts.abort(reason)) })
    };
    Ok(here.into_iter().zip(backends).zip(parts).map(setup).collect())
}

/// The ranks of other processes, as the leading one has them.
pub(super) struct Far {
    pub(super) links: Arc<MessageLinks>,
    pub(super) reach: Reach,
}

impl Far {
    /// The members that are not this process.
    fn others(&self) -> impl Iterator<Item = (usize, Member)> {
        self.reach.nodes().into_iter().enumerate().skip(1)
    }

    /// Hears what they say, each in a thread that ends with the links.
    pub(super) fn listen(&self, reports: &Sender<Report>) -> Result<Vec<JoinHandle<()>>> {
        let listen = |(member, place): (usize, Member)| {
            let listener = Listener { links: Arc::clone(&self.links), reach: self.reach.clone(), member, place, reports: reports.clone() };
            std::thread::Builder::new().name(format!("forge-far-{member}")).spawn(move || listener.run()).map_err(no_thread)
        };
        self.others().map(listen).collect()
    }

    /// Sends a plan to all of them.
    pub(super) fn send(&self, plan: &StepPlan) -> Result<()> {
        let message = Message::Plan(plan.clone()).encode();
        for member in 1..self.links.size() {
            self.links.send(member, &message)?;
        }
        Ok(())
    }
}

pub(super) fn no_thread(error: std::io::Error) -> ModelError {
    ModelError::Option {
        option: "layout",
        value: "ranks of several processes".to_owned(),
        reason: format!("the system gives no thread ({error}): allow more, or use fewer ranks"),
    }
}

/// Hears one process.
struct Listener {
    links: Arc<MessageLinks>,
    reach: Reach,
    member: usize,
    place: Member,
    reports: Sender<Report>,
}

impl Listener {
    fn run(self) {
        let Err(error) = self.listen();
        self.reach.blame(&error);
        // Nobody listens once the model has ended.
        let _ = self.reports.send(Report::Failed { rank: self.reach.first_rank(&self.place.node), error });
    }

    fn listen(&self) -> Result<std::convert::Infallible> {
        let mut pieces = Pieces::default();
        loop {
            let Some(bytes) = self.links.recv(self.member, LOOK)? else { continue };
            let report = match Message::decode(&bytes)? {
                Message::Loaded { rank, info } if self.reach.members.get(rank).is_some_and(|member| member.node == self.place.node) => {
                    Report::Loaded { rank, info }
                }
                Message::Piece { step, total, start, values } => match pieces.take((step, total, start), &values)? {
                    Some((step, values)) => Report::Logits { step, values },
                    None => continue,
                },
                Message::Failed { rank, node, reason } => {
                    let error = ModelError::FarRank { node, reason };
                    self.reach.blame(&error);
                    Report::Failed { rank, error }
                }
                Message::Loaded { rank, .. } => {
                    return Err(ModelError::Message { reason: format!("node {} speaks for rank {rank}", self.place.node) });
                }
                Message::Plan(_) => return Err(ModelError::Message { reason: "only the leading rank plans".to_owned() }),
            };
            // Nobody listens once the model has ended; then the links end too.
            let _ = self.reports.send(report);
        }
    }
}
