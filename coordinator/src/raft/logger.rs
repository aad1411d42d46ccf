//! raft-rs's log lines in ours: its information and below as debug, its warnings and errors as they are.

use slog::{Drain, Level, Logger, Never, OwnedKVList, Record};

struct ToTracing;

impl Drain for ToTracing {
    type Ok = ();
    type Err = Never;

    fn log(&self, record: &Record<'_>, _: &OwnedKVList) -> Result<(), Never> {
        match record.level() {
            Level::Critical | Level::Error => tracing::error!(target: "forge_coordinator::raft", "{}", record.msg()),
            Level::Warning => tracing::warn!(target: "forge_coordinator::raft", "{}", record.msg()),
            Level::Info => tracing::debug!(target: "forge_coordinator::raft", "{}", record.msg()),
            Level::Debug | Level::Trace => {}
        }
        Ok(())
    }
}

pub(super) fn to_tracing() -> Logger {
    Logger::root(ToTracing, slog::o!())
}
