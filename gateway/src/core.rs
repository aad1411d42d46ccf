//! The gateway's cores by one door: what a shell other than this crate's needs to drive them. The simulator of
//! `tests/simulator` is one; nothing here has a socket, a clock or a task.

pub use crate::course::{Course, READY_POLL, Step, Stop, Terms};
pub use crate::models::{Model, Models, Replica};
pub use crate::retry_budget::RetryBudget;
