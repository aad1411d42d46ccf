//! One file per command.

pub mod catalogue;
pub mod completions;
pub mod keys;
pub mod list;
pub mod pull;
pub mod rm;
pub mod run;
pub mod serve;
pub mod show;
pub mod version;
