//! `ModelLauncher`: loads a checkpoint for a plan and starts its engine. The production [`Launch`].

use std::sync::Arc;
use std::time::Instant;

use forge_engine::{EngineExit, EngineOptions, EngineSetup, EngineThread};
use forge_kernels::{CpuBackend, CpuOptions};
use forge_model::StepModel;
use forge_shared::link::ModelCard;
use forge_shared::plan::Plan;
use forge_shared::telemetry::{Metrics, model_label};

use crate::WorkerError;
use crate::actors::{Launch, Launched};
use crate::prepare::{DecoderSizes, PreparedModel};

/// See the module documentation.
pub(crate) struct ModelLauncher {
    pub(crate) model: PreparedModel,
    /// The numerics id is filled in when the model is loaded.
    pub(crate) card: ModelCard,
    pub(crate) max_waiting: usize,
    pub(crate) prefix_cache: bool,
    pub(crate) metrics: Metrics,
}

impl Launch for ModelLauncher {
    fn launch(&self, plan: &Plan) -> Result<Launched, WorkerError> {
        let started = Instant::now();
        let [rank] = plan.ranks.as_slice() else {
            let reason = format!("this process can hold one rank, and the plan has {}", plan.ranks.len());
            return Err(WorkerError::Setting { field: "spec.layout", reason });
        };
        let backend = Arc::new(CpuBackend::new(CpuOptions { threads: rank.threads, ..CpuOptions::default() })?);
        let options = self.model.decoder_options(DecoderSizes {
            max_model_len: plan.max_model_len,
            block_size: plan.block_size,
            kv_blocks: plan.kv_blocks,
            kv_cache_dtype: plan.kv_cache_dtype,
            max_step_tokens: plan.max_step_tokens,
            max_batch_size: plan.max_batch_size,
            epoch: plan.epoch,
        });
        let decoder: Box<dyn StepModel> = Box::new(self.model.model.decoder(backend, &options)?);
        #[cfg(debug_assertions)]
        let decoder = crate::fault::inject(decoder)?;
        let card = Arc::new(ModelCard { numerics_id: decoder.info().numerics_id.clone(), ..self.card.clone() });
        let setup = EngineSetup {
            model: decoder,
            tokenizer: self.model.text.tokenizer().clone(),
            card,
            options: EngineOptions {
                max_batch_size: plan.max_batch_size,
                max_chunk_rows: plan.max_step_tokens,
                prefix_caching: self.prefix_cache,
                max_waiting: self.max_waiting,
                epoch: plan.epoch,
                ..EngineOptions::default()
            },
            metrics: self.metrics.clone(),
        };
        let (handle, exit) = EngineThread::spawn(setup)?;
        let load_s = started.elapsed().as_secs_f64();
        self.metrics.model_load_s.get_or_create(&model_label(&self.card.name)).set(load_s);
        tracing::info!(model = self.card.name, load_s, threads = rank.threads, "model loaded");
        let engine = handle.clone();
        Ok(Launched {
            engine: Arc::new(handle),
            ended: Box::pin(async move {
                match exit.await {
                    Ok(EngineExit::Stopped) => None,
                    Ok(EngineExit::Died { reason }) => Some(reason),
                    Err(_) => Some("its thread ended without a word".into()),
                }
            }),
            stop: Box::new(move |timeout| engine.drain(timeout)),
        })
    }
}
