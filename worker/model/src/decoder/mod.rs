//! The generic decoder.

pub mod options;

use std::sync::Arc;

use forge_kernels::Backend;
use forge_net::Collective;

use crate::decoder::options::DecoderOptions;
use crate::error::{ModelError, Result};
use crate::model::Model;
use crate::step::{StepModel, StepModelInfo, StepPlan};

/// One rank's decoder.
pub struct Decoder<B: Backend> {
    backend: Arc<B>,
    info: StepModelInfo,
}

impl<B: Backend> Decoder<B> {
    /// Loads this rank's share of the weights and allocates pool and workspace.
    ///
    /// # Errors
    /// Options or a degree that cannot be had, NaN weights, too little memory.
    pub fn new(model: &Model, backend: Arc<B>, options: &DecoderOptions, collective: Arc<dyn Collective<B>>) -> Result<Self> {
        let _ = (model, backend, options, collective);
        todo!()
    }

    /// The backend.
    pub fn backend(&self) -> &Arc<B> {
        &self.backend
    }
}

impl<B: Backend> StepModel for Decoder<B> {
    fn info(&self) -> &StepModelInfo {
        &self.info
    }

    fn step(&mut self, _plan: &StepPlan, _logits: &mut Vec<f32>) -> std::result::Result<(), ModelError> {
        todo!()
    }
}
