//! `ModelLauncher`: provides a model for an assignment, loads it within its reservation and starts its engine. The
//! production [`Launch`].

use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use forge_engine::{EngineExit, EngineHandle, EngineOptions, EngineSetup, EngineThread};
use forge_model::Shard;
use forge_model::sharded::RankLayout;
use forge_shared::cluster::service::ReplicaPhase;
use forge_shared::cluster::session::Assignment;
use forge_shared::ids::NodeId;
use forge_shared::link::ModelCard;
use forge_shared::plan::{Plan, RankPlan};
use forge_shared::telemetry::{Metrics, run_label};
use tokio::sync::oneshot;

use crate::WorkerError;
use crate::actors::{Launch, LaunchWatch, Launched};
use crate::ledger::{Ledger, Patience, Reservation};
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
    /// This node: a plan's ranks must be on it.
    pub node: NodeId,
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
        let layout = ranks::layout(plan, &self.node)?;
        let ProvidedModel { model, names, lease } = self.models.provide(assignment, watch)?;
        if watch.cancel.is_cancelled() {
            return Err(forge_store::StoreError::Cancelled.into());
        }
        (watch.progress)(ReplicaPhase::Loading, 0);
        let started = Instant::now();
        ranks::check(plan, &layout, &model, sizes(plan))?;
        let mut reservations = self.reserve(plan, watch)?;
        let card = card(&model, plan, names)?;
        let cores = ranks::cores(plan, &reservations);
        let load = LoadRun {
            model: model.clone(),
            card: card.clone(),
            assignment: assignment.clone(),
            metrics: self.metrics.clone(),
            layout,
            cores,
        };
        let (handle, exit) = load.on_own_thread(watch)?;
        reservations.iter_mut().for_each(Reservation::loaded);
        let load_s = started.elapsed().as_secs_f64();
        let label = run_label(&card.name, &plan.replica.to_string(), plan.epoch);
        self.metrics.model_load_s.get_or_create(&label).set(load_s);
        let threads: usize = plan.ranks.iter().map(|rank| rank.threads).sum();
        tracing::info!(
            replica = %plan.replica, epoch = plan.epoch.0, model = card.name, ranks = plan.ranks.len(), load_s, threads, "model loaded"
        );
        let (engine, prefixes, counted) = (handle.clone(), handle.clone(), handle.clone());
        Ok(Launched {
            engine: Arc::new(handle),
            ended: Box::pin(async move {
                let end = match exit.await {
                    Ok(EngineExit::Stopped) => None,
                    Ok(EngineExit::Died { reason }) => Some(reason),
                    Err(_) => Some("its thread ended without a word".into()),
                };
                // Both are held exactly as long as the engine's memory is.
                drop((reservations, lease));
                end
            }),
            stop: Box::new(move |timeout| engine.drain(timeout)),
            text: Some(model.text),
            prefixes: Box::new(move || prefixes.prefixes()),
            generated_tokens: Box::new(move || counted.generated_tokens()),
        })
    }
}

impl ModelLauncher {
    /// Takes the memory of every rank, in the plan's order; of all or of none.
    fn reserve(&self, plan: &Plan, watch: &LaunchWatch) -> Result<Vec<Reservation>, WorkerError> {
        let is_cancelled = || watch.cancel.is_cancelled();
        let reserve = |rank: &RankPlan| self.ledger.reserve_patiently(rank.device, rank.memory.total_bytes(), SHORTAGE, is_cancelled);
        plan.ranks.iter().map(reserve).collect()
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
    /// For each rank.
    cores: Vec<RankCores>,
}

impl LoadRun {
    /// Loads on a thread of its own, whose cores and priority the engine's threads inherit, and the kernels' of a single
    /// rank; where there are several, each has a thread and cores of its own.
    fn on_own_thread(self, watch: &LaunchWatch) -> Result<(EngineHandle, oneshot::Receiver<EngineExit>), WorkerError> {
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

    fn load(self) -> Result<(EngineHandle, oneshot::Receiver<EngineExit>), WorkerError> {
        let LoadRun { model, card, assignment, metrics, layout, cores } = self;
        let (plan, spec) = (&assignment.plan, &assignment.service.spec);
        let options = model.decoder_options(sizes(plan), Shard::default());
        let decoder = ranks::load(&model, &options, &layout, cores)?;
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
        Ok(EngineThread::spawn(setup)?)
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
