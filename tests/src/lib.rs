//! What the cross-crate suites and the examples share: running a model over given tokens, and the golden file of
//! llama.cpp's answers.
//!
//! It is no part of the product. The suites are the files beside `src`.

pub mod company;
mod f32_copy;
pub mod fuzzing;
mod golden;
pub mod relay;
mod rows;

pub use f32_copy::f32_copy;
pub use golden::{Document, ExactCase, ExactGolden, GreedyCase, Leading, LlamaGolden};
pub use rows::{CpuDecoder, open_decoder, top_two};
