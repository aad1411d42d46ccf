//! What can go wrong in a backend: sizes that do not fit each other, memory, a device.

/// Errors of the kernels crate. Shape errors are defects of the caller, caught before any memory is touched.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// An operand's size does not match the operation.
    #[error("{operation}: {operand} has {actual} elements, the operation needs {expected}")]
    Shape {
        /// The operation that refused.
        operation: &'static str,
        /// The operand at fault.
        operand: &'static str,
        /// Elements it has.
        actual: usize,
        /// Elements it must have.
        expected: usize,
    },
    /// A weight's bytes do not hold the matrix they are said to hold.
    #[error("weight {name}: {reason}")]
    Weight {
        /// Tensor name.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The device has not enough memory.
    #[error("cannot allocate {bytes} bytes for {what}: lower --kv-memory, --max-batch-size or --max-model-len")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
        /// What they were for.
        what: &'static str,
    },
    /// A combination the backend does not implement.
    #[error("{backend} backend: {what} is not supported: {remedy}")]
    Unsupported {
        /// Backend name.
        backend: &'static str,
        /// What was asked for.
        what: String,
        /// What to do instead.
        remedy: String,
    },
}

/// Result of a backend operation.
pub type Result<T> = std::result::Result<T, KernelError>;
