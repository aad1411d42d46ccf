//! One file per command.

pub mod bench;
pub mod catalogue;
pub mod completions;
pub mod eval;
pub mod keys;
pub mod list;
pub mod pull;
pub mod rm;
pub mod run;
pub mod serve;
pub mod show;
pub mod version;
