//! How a command fails: one message, its causes, what to do, and the exit code.
//!
//! Invariant: nothing else in this crate decides an exit code, and no error reaches the user by its `Debug` form.

use std::error::Error;
use std::fmt;
use std::process::ExitCode;

use forge_gateway::GatewayError;
use forge_shared::config::ConfigError;
use forge_store::StoreError;

/// What a command's exit code says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It was tried and did not work.
    Failed = 1,
    /// The specification or the command line is wrong.
    Usage = 2,
    /// No machine here can hold it.
    NotPlaceable = 3,
    /// What did the work stopped answering.
    LostContact = 4,
}

/// Why a command failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    exit: Exit,
    message: String,
    causes: Vec<String>,
    help: Option<String>,
}

/// Result of a command.
pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// A failure with the exit code 1.
    pub fn new(message: impl Into<String>) -> Self {
        Failure { exit: Exit::Failed, message: message.into(), causes: Vec::new(), help: None }
    }

    /// A wrong command line or specification.
    pub fn usage(message: impl Into<String>) -> Self {
        Failure { exit: Exit::Usage, ..Failure::new(message) }
    }

    /// An error and the chain below it. Causes that a message repeats already are left out.
    pub fn of(error: &dyn Error) -> Self {
        let mut failure = Failure::new(error.to_string());
        let mut said = failure.message.clone();
        let mut next = error.source();
        while let Some(cause) = next {
            let text = cause.to_string();
            if !said.contains(&text) {
                said = text.clone();
                failure.causes.push(text);
            }
            next = cause.source();
        }
        failure
    }

    /// With something before the message that says what was being done.
    #[must_use]
    pub fn while_doing(mut self, action: &str) -> Self {
        self.causes.insert(0, std::mem::replace(&mut self.message, action.to_owned()));
        self
    }

    /// With a further cause.
    #[must_use]
    pub fn cause(mut self, cause: impl Into<String>) -> Self {
        self.causes.push(cause.into());
        self
    }

    /// Whether its message or a cause says this.
    pub fn says(&self, text: &str) -> bool {
        self.message.contains(text) || self.causes.iter().any(|cause| cause.contains(text))
    }

    /// With what to do about it.
    #[must_use]
    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }

    /// With another exit code.
    #[must_use]
    pub fn exit(mut self, exit: Exit) -> Self {
        self.exit = exit;
        self
    }

    /// The code the process ends with.
    pub fn code(&self) -> ExitCode {
        ExitCode::from(self.exit as u8)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.message)?;
        for cause in &self.causes {
            write!(f, "\n  cause: {cause}")?;
        }
        match &self.help {
            Some(help) => write!(f, "\n  help: {help}"),
            None => Ok(()),
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let failure = Failure::usage(error.to_string());
        match error.help() {
            Some(help) => failure.help(help),
            None => failure,
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::UnknownModel { name, tried, remedy } => {
                let failure = Failure { causes: tried, ..Failure::usage(format!("'{name}' names no model")) };
                failure.help(format!("{remedy}. `forgectl catalogue` lists the aliases"))
            }
            StoreError::AmbiguousModel { name, readings, remedy } => {
                let failure = Failure::usage(format!("'{name}' is ambiguous: it may be {}", readings.join(" or ")));
                failure.help(format!("write {remedy}"))
            }
            StoreError::AllSourcesFailed { name, failures } => {
                let causes = failures.iter().map(|failure| format!("{}: {}", failure.source, failure.reason)).collect();
                Failure { causes, ..Failure::new(format!("could not fetch '{name}' from any of its sources")) }
                    .help("check the network, or name another source: a hub mirror (HF_ENDPOINT), an https URL or a local path")
            }
            StoreError::NotFound { name } => Failure::new(format!("model '{name}' is not in the local store"))
                .help(format!("`forgectl pull {name}` fetches it; `forgectl list` shows what is there")),
            StoreError::InUse { name } => Failure::new(format!("model '{name}' is in use by a running Forge process"))
                .help("stop that process first, then remove the model"),
            StoreError::InvalidName { .. } | StoreError::Catalogue { .. } | StoreError::Setting { .. } => {
                Failure::of(&error).exit(Exit::Usage)
            }
            _ => Failure::of(&error),
        }
    }
}

impl From<GatewayError> for Failure {
    fn from(error: GatewayError) -> Self {
        match error {
            GatewayError::OpenToTheWorld { host } => {
                Failure::usage(format!("will not listen on {host} without API keys: anybody who reaches this machine could use it"))
                    .help("make a key with `forgectl keys create NAME`, or listen on 127.0.0.1, or pass --insecure if the network is yours")
            }
            GatewayError::PortInUse { address, flag } => {
                Failure::new(format!("port {} on {} is in use by another program", address.port(), address.ip()))
                    .help(format!("stop that program, or choose another port: {flag} N, where 0 picks a free one"))
            }
            GatewayError::Config { .. } | GatewayError::KeyInvalid { .. } => Failure::of(&error).exit(Exit::Usage),
            _ => Failure::of(&error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("inner")]
    struct Inner;

    #[test]
    fn a_failure_reads_as_message_causes_and_help() {
        let failure = Failure::of(&Outer(Inner)).while_doing("could not do it").help("try again");
        assert_eq!(failure.to_string(), "error: could not do it\n  cause: outer\n  cause: inner\n  help: try again");
    }

    #[test]
    fn every_source_that_failed_is_a_cause() {
        let failures = vec![
            forge_store::SourceFailure { source: "hf:a/b".into(), reason: "no route".into() },
            forge_store::SourceFailure { source: "pypi:c".into(), reason: "no index".into() },
        ];
        let text = Failure::from(StoreError::AllSourcesFailed { name: "x".into(), failures }).to_string();
        assert!(text.contains("cause: hf:a/b: no route\n  cause: pypi:c: no index\n  help:"), "{text}");
    }
}
