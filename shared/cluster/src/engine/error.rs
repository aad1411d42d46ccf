//! What is wrong with a message of the engine's wire.

/// A message that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A field that must be there is not; perhaps one that this version does not know is there instead.
    #[error("{field} is missing: bring both sides to one version of Forge")]
    Missing {
        /// Which.
        field: &'static str,
    },
    /// A field with a value that it cannot have.
    #[error("{field}: {reason}")]
    Value {
        /// Which.
        field: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// More of something than is taken.
    #[error("{field}: {count}, at most {limit}")]
    TooLarge {
        /// Of what.
        field: &'static str,
        /// How many there are.
        count: usize,
        /// How many may be.
        limit: usize,
    },
    /// Bytes that are no message.
    #[error("not a message: {reason}")]
    Decode {
        /// What the decoder says.
        reason: String,
    },
}

impl From<WireError> for tonic::Status {
    fn from(error: WireError) -> Self {
        tonic::Status::invalid_argument(error.to_string())
    }
}
