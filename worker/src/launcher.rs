//! `ModelLauncher`: provides a model for an assignment, loads it within its reservation and starts its engine. The
//! production [`Launch`].

use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use forge_engine::{EngineExit, EngineHandle, EngineOptions, EngineSetup, EngineThread};
use forge_model::Shard;
use forge_model::sharded::{FollowingRanks, RankLayout, StopFollowing};
use forge_net::Fabric;
use forge_shared::cluster::service::ReplicaPhase;
use forge_shared::cluster::session::Assignment;
use forge_shared::ids::NodeId;
use forge_shared::link::{EngineLink, ModelCard};
use forge_shared::plan::{Plan, RankPlan};
use forge_shared::telemetry::{Metrics, run_label};
use forge_text::ModelText;
use tokio::sync::oneshot;

use crate::WorkerError;
use crate::actors::{Launch, LaunchWatch, Launched};
use crate::ledger::{Ledger, Patience, Reservation};
use crate::meeting::Meeting;
use crate::models::{ProvideModel, ProvidedModel, ServedNames};
use crate::prepare::{DecoderSizes, PreparedModel};
use crate::ranks::{self, RankCores};
use crate::time::now_s;

/// How often a load is looked at.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(20);

/// Longer than others' short peaks of memory, short beside a load.
const SHORTAGE: Patience = Patience { wait: Duration::from_secs(5), pause: Duration::from_millis(250) };

/// See the module documentation.
pub struct ModelLauncher {
    /// This node: some of a plan's ranks must be on it.
    pub node: NodeId,
    /// The way to ranks on other workers; absent outside a cluster.
    pub fabric: Option<Arc<Fabric>>,
    /// Where models come from.
    pub models: Arc<dyn ProvideModel>,
    /// What this node's devices have.
    pub ledger: Arc<Ledger>,
    /// Where everything is counted.
    pub metrics: Metrics,
}

impl Launch for ModelLauncher {
    fn launch(&self, assignment: &Assignment, watch: &LaunchWatch) -> Result<Launched, WorkerError> {
        let plan = &assignment.plan;
        let layout = ranks::layout(plan)?;
        let here = ranks::here(plan, &self.node)?;
        if !plan.is_divided() {
            return self.run(assignment, watch, (layout, here), None);
        }
        let meeting = Arc::new(Meeting::begin(self.fabric.as_ref(), assignment, &self.node, &watch.cancel)?);
        let launched = self.run(assignment, watch, (layout, here), Some(&meeting));
        launched.map_err(|error| meeting.failed(error))
    }
}

impl ModelLauncher {
    /// Brings the model, takes the memory of the ranks that are `here`, and loads them.
    fn run(
        &self,
        assignment: &Assignment,
        watch: &LaunchWatch,
        (layout, here): (RankLayout, Vec<usize>),
        meeting: Option<&Arc<Meeting>>,
    ) -> Result<Launched, WorkerError> {
        let plan = &assignment.plan;
        let ProvidedModel { model, names, lease } = self.models.provide(assignment, watch)?;
        if watch.cancel.is_cancelled() {
            return Err(forge_store::StoreError::Cancelled.into());
        }
        (watch.progress)(ReplicaPhase::Loading, 0);
        let started = Instant::now();
        ranks::check(plan, &here, &layout, &model, sizes(plan))?;
        let mut reservations = self.reserve(plan, &here, watch)?;
        let card = card(&model, plan, names)?;
        let cores = ranks::cores(plan, &here, &reservations);
        meeting.map_or(Ok(()), |meeting| meeting.all_ready(&watch.cancel))?;
        let load = LoadRun {
            model: model.clone(),
            card: card.clone(),
            assignment: assignment.clone(),
            metrics: self.metrics.clone(),
            layout,
            cores,
            meeting: meeting.cloned(),
        };
        let loaded = load.on_own_thread(watch)?;
        reservations.iter_mut().for_each(Reservation::loaded);
        let load_s = started.elapsed().as_secs_f64();
        let label = run_label(&card.name, &plan.replica.to_string(), plan.epoch);
        self.metrics.model_load_s.get_or_create(&label).set(load_s);
        let threads: usize = here.iter().map(|&rank| plan.ranks[rank].threads).sum();
        let (ranks, of_ranks) = (here.len(), plan.ranks.len());
        tracing::info!(
            replica = %plan.replica, epoch = plan.epoch.0, model = card.name, ranks, of_ranks, load_s, threads, "model loaded"
        );
        // Both are held exactly as long as the memory is.
        let held = (reservations, lease);
        match loaded {
            Loaded::Leading { handle, exit } => leading(handle, exit, model.text, meeting, held),
            Loaded::Following { ranks, meeting } => following(ranks, meeting, held),
        }
    }

    /// Takes the memory of every rank that is here, in the plan's order; of all or of none.
    fn reserve(&self, plan: &Plan, here: &[usize], watch: &LaunchWatch) -> Result<Vec<Reservation>, WorkerError> {
        let is_cancelled = || watch.cancel.is_cancelled();
        let reserve = |rank: &RankPlan| self.ledger.reserve_patiently(rank.device, rank.memory.total_bytes(), SHORTAGE, is_cancelled);
        here.iter().map(|&rank| reserve(&plan.ranks[rank])).collect()
    }
}

/// A replica whose engine is here.
fn leading(
    handle: EngineHandle,
    exit: oneshot::Receiver<EngineExit>,
    text: ModelText,
    meeting: Option<&Arc<Meeting>>,
    held: impl Send + 'static,
) -> Result<Launched, WorkerError> {
    let (engine, prefixes, counted) = (handle.clone(), handle.clone(), handle.clone());
    let (numerics_id, fault) = (handle.card().numerics_id.clone(), meeting.map(|meeting| meeting.reach().fault.clone()));
    if let Some(meeting) = meeting {
        let engine = handle.clone();
        meeting.hear_drains(move |timeout| engine.drain(timeout))?;
    }
    let over = meeting.cloned().map(EndsRun);
    Ok(Launched {
        engine: Some(Arc::new(handle)),
        numerics_id,
        fault,
        ended: Box::pin(async move {
            let end = match exit.await {
                Ok(EngineExit::Stopped) => None,
                Ok(EngineExit::Died { reason }) => Some(reason),
                Err(_) => Some("its thread ended without a word".into()),
            };
            drop((held, over));
            end
        }),
        stop: Box::new(move |timeout| engine.drain(timeout)),
        text: Some(text),
        prefixes: Box::new(move || prefixes.prefixes()),
        generated_tokens: Box::new(move || counted.generated_tokens()),
    })
}

/// Ranks whose engine is on another worker.
fn following(ranks: Box<FollowingRanks>, meeting: Arc<Meeting>, held: impl Send + 'static) -> Result<Launched, WorkerError> {
    let (numerics_id, fault) = (ranks.info().numerics_id.clone(), Some(meeting.reach().fault.clone()));
    let stopper = StopsRanks(ranks.stopper());
    let say_drain = meeting.say_drain();
    let (end, ended) = oneshot::channel();
    let over = EndsRun(meeting);
    let follow = move || {
        let error = (*ranks).run();
        // Its memory is free from here on.
        drop((held, over));
        // Nobody may be waiting any more.
        let _ = end.send(error.to_string());
    };
    let thread = std::thread::Builder::new().name("forge-follow".into()).spawn(follow);
    thread.map_err(|error| WorkerError::EngineDied { reason: format!("the system gives no thread: {error}") })?;
    Ok(Launched {
        engine: None,
        numerics_id,
        fault,
        ended: Box::pin(async move { Some(ended.await.unwrap_or_else(|_| "its thread ended without a word".into())) }),
        stop: Box::new(move |timeout| {
            let ranks = stopper.0.clone();
            if timeout.is_zero() {
                return ranks.stop(ENDED);
            }
            // The engine lets its requests finish, and ends the ranks then.
            say_drain(timeout);
            let late = std::thread::Builder::new().name("forge-drain".into()).spawn(move || {
                std::thread::sleep(timeout);
                ranks.stop(ENDED);
            });
            if late.is_err() {
                stopper.0.stop(ENDED);
            }
        }),
        text: None,
        prefixes: Box::new(|| tokio::sync::mpsc::channel(1).1),
        generated_tokens: Box::new(|| 0),
    })
}

/// Why ranks end that are not wanted any more.
const ENDED: &str = "its worker ends it";

/// Ends following ranks that nobody can stop any more.
struct StopsRanks(StopFollowing);

impl Drop for StopsRanks {
    fn drop(&mut self) {
        self.0.stop(ENDED);
    }
}

/// Ends a run for all its workers when this one's part of it has ended.
struct EndsRun(Arc<Meeting>);

impl Drop for EndsRun {
    fn drop(&mut self) {
        self.0.end();
    }
}

fn sizes(plan: &Plan) -> DecoderSizes {
    DecoderSizes {
        max_model_len: plan.max_model_len,
        block_size: plan.block_size,
        kv_blocks: plan.kv_blocks,
        kv_cache_dtype: plan.kv_cache_dtype,
        max_step_tokens: plan.max_step_tokens,
        max_batch_size: plan.max_batch_size,
        epoch: plan.epoch,
    }
}

/// What a loading thread takes with it.
struct LoadRun {
    model: PreparedModel,
    card: ModelCard,
    assignment: Assignment,
    metrics: Metrics,
    layout: RankLayout,
    /// For each rank that is here.
    cores: Vec<RankCores>,
    /// With the workers that have the others.
    meeting: Option<Arc<Meeting>>,
}

/// What was loaded.
enum Loaded {
    Leading { handle: EngineHandle, exit: oneshot::Receiver<EngineExit> },
    Following { ranks: Box<FollowingRanks>, meeting: Arc<Meeting> },
}

impl LoadRun {
    /// Loads on a thread of its own, whose cores and priority the engine's threads inherit, and the kernels' of a single
    /// rank; where there are several, each has a thread and cores of its own.
    fn on_own_thread(self, watch: &LaunchWatch) -> Result<Loaded, WorkerError> {
        let progress = self.model.progress.clone();
        let died = |reason: String| WorkerError::EngineDied { reason: format!("while loading: {reason}") };
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::Builder::new().name("forge-load".into()).spawn(move || {
            // Dropped at the thread's end, whichever way it ends.
            let _end = end;
            if let Some(leading) = self.cores.first() {
                leading.settle();
            }
            self.load()
        });
        let thread = thread.map_err(|error| died(error.to_string()))?;
        while let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(PROGRESS_INTERVAL) {
            let (done, total) = progress.bytes();
            let percent = (u128::from(done) * 100).checked_div(u128::from(total)).unwrap_or(0);
            (watch.progress)(ReplicaPhase::Loading, u8::try_from(percent).unwrap_or(100));
        }
        match thread.join() {
            Ok(loaded) => loaded,
            Err(_) => Err(died("its thread panicked".into())),
        }
    }

    fn load(self) -> Result<Loaded, WorkerError> {
        let LoadRun { model, card, assignment, metrics, layout, cores, meeting } = self;
        let (plan, spec) = (&assignment.plan, &assignment.service.spec);
        let options = model.decoder_options(sizes(plan), Shard::default());
        if let Some(meeting) = meeting.clone().filter(|meeting| !meeting.reach().leads()) {
            let ranks = Box::new(ranks::follow(&model, &options, &layout, cores, meeting.reach())?);
            return Ok(Loaded::Following { ranks, meeting });
        }
        let decoder = ranks::load(&model, &options, &layout, cores, meeting.as_deref().map(Meeting::reach))?;
        #[cfg(debug_assertions)]
        let decoder = crate::fault::inject(decoder)?;
        let card = Arc::new(ModelCard { numerics_id: decoder.info().numerics_id.clone(), ..card });
        let setup = EngineSetup {
            model: decoder,
            tokenizer: model.text.tokenizer().clone(),
            card,
            replica: plan.replica.to_string(),
            options: EngineOptions {
                max_batch_size: plan.max_batch_size,
                max_chunk_rows: plan.max_step_tokens,
                prefix_caching: spec.prefix_cache,
                max_waiting: spec.max_waiting,
                epoch: plan.epoch,
                ..EngineOptions::default()
            },
            metrics,
        };
        let (handle, exit) = EngineThread::spawn(setup)?;
        Ok(Loaded::Leading { handle, exit })
    }
}

/// What gateways are told of a model before it is loaded: all but the numerics id.
pub(crate) fn card(model: &PreparedModel, plan: &Plan, names: ServedNames) -> Result<ModelCard, WorkerError> {
    let name =
        names.listed.first().cloned().ok_or(WorkerError::Setting { field: "spec.modelName", reason: "give the model a name".into() })?;
    Ok(ModelCard {
        name,
        names: names.listed,
        unlisted_names: names.unlisted,
        max_model_len: plan.max_model_len,
        vocab_size: model.model.architecture().vocab_size,
        numerics_id: String::new(),
        created_s: now_s(),
        default_sampling: model.default_sampling(),
    })
}
