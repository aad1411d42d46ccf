//! The operations a decoder needs, behind one [`Backend`] trait, and our CPU implementation of them.
//!
//! What it is: products over dense and quantized weights, normalization, rotary positions, paged
//! attention, activations, the reduction tree that fixes the order of every sum, and the thread pool.
//! What it is not: it knows no model family, no file format and no request.
//!
//! Invariant (DESIGN P2): a value's bits depend on its own inputs alone, never on how many rows share
//! the batch, how many threads compute it, or which instruction set runs it.

pub mod backend;
pub mod batch;
pub mod dtype;
pub mod error;
pub mod tree;

mod attention;
mod bandwidth;
mod cpu;
mod dense;
mod dequantize;
mod elementwise;
mod exp;
mod experts;
mod hadamard;
mod kv;
mod lanes;
mod linear;
mod memory;
mod norm;
mod path;
mod peak;
mod pool;
mod prefetch;
mod quantize;
mod quantized;
mod rope;
mod scales;
mod weight;

pub use backend::{
    ActivationKind, Alibi, AttentionParams, Backend, Columns, ExpertChoices, ExpertEntry, GroupProduct, HeadRuns, KvShape, MatrixSource,
    NormKind, NormParams, Product, RopeParams, RopeStyle, RowGroup,
};
pub use bandwidth::measure_read_bandwidth;
pub use batch::{AttentionBatch, SequenceSlice};
pub use cpu::{CpuBackend, CpuBuffer, CpuOptions, CpuVector};
pub use dequantize::{dequantize, holds_non_finite};
pub use dtype::{DType, KvDType};
pub use error::KernelError;
pub use kv::CpuKvPool;
pub use path::{CpuPath, PATH_VARIABLE};
pub use peak::measure_peak_flops;
pub use pool::ThreadPool;
pub use rope::CpuRopeTable;
pub use scales::BlockScales;
pub use tree::Segments;
pub use weight::CpuWeight;
