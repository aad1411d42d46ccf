//! placeholder
pub mod step;
/// Errors of the model crate.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {}
pub use step::{StepModel, StepModelInfo, StepPlan};
