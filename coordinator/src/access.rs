//! Who may do what: the one table of roles, commands and kinds.
//!
//! Invariant: commands that are the leader's own decisions come from nobody else, whatever the role.

use forge_shared::cluster::command::Command;
use forge_shared::cluster::event::Kind;
use forge_shared::cluster::node::Role;

use crate::error::CoordinatorError;
use crate::replicated::name_of;
use crate::watch::KindSet;

/// Why a command is the leader's own, if it is.
pub(crate) fn internal(command: &Command) -> Option<String> {
    let is_internal = match command {
        Command::RecordFacts { .. }
        | Command::RecordWait { .. }
        | Command::CommitPlans { .. }
        | Command::ReportReplica { .. }
        | Command::JoinNode { .. }
        | Command::LoseNode { .. }
        | Command::UseJoinToken { .. }
        | Command::RecordCertificate { .. }
        | Command::BeginCaRotation { .. }
        | Command::PutMember { .. }
        | Command::RemoveMember { .. }
        | Command::RecordRollout { .. }
        | Command::RaiseLevel { .. } => true,
        Command::ApplyService { .. }
        | Command::ScaleService { .. }
        | Command::UndoService { .. }
        | Command::DeleteService { .. }
        | Command::CordonNode { .. }
        | Command::DrainNode { .. }
        | Command::RemoveNode { .. }
        | Command::PutJoinToken { .. }
        | Command::RemoveJoinToken { .. }
        | Command::PutKey { .. }
        | Command::RevokeKey { .. }
        | Command::RevokeCertificates { .. }
        | Command::SwitchCa { .. }
        | Command::FinishCaRotation { .. }
        | Command::AbandonCaRotation
        | Command::RecordIdempotency { .. } => false,
    };
    is_internal.then(|| format!("{} is decided by the leader alone", name_of(command)))
}

/// Whether a caller of this role may have this command applied.
///
/// # Errors
/// [`CoordinatorError::Forbidden`], naming the role it takes.
pub(crate) fn may_execute(role: Role, command: &Command) -> Result<(), CoordinatorError> {
    if let Some(reason) = internal(command) {
        return Err(CoordinatorError::Forbidden { reason });
    }
    let needed = match command {
        Command::RecordIdempotency { .. } => Role::Gateway,
        _ => Role::Admin,
    };
    if role == needed {
        return Ok(());
    }
    Err(CoordinatorError::Forbidden { reason: format!("{} takes a certificate of role {needed}, not {role}", name_of(command)) })
}

/// Kinds that a caller of this role may list and watch.
pub(crate) fn visible(role: Role) -> KindSet {
    match role {
        Role::Admin => KindSet::ALL,
        // Keys are stored hashed; gateways check them.
        Role::Gateway => KindSet::of(&[Kind::Node, Kind::Service, Kind::Key, Kind::Member, Kind::Trust]),
        Role::Worker => KindSet::of(&[Kind::Node, Kind::Service, Kind::Member, Kind::Trust]),
        Role::Coordinator => KindSet::of(&[Kind::Member, Kind::Trust]),
    }
}

/// Whether a caller of this role may see this kind.
///
/// # Errors
/// [`CoordinatorError::Forbidden`].
pub(crate) fn may_see(role: Role, kind: Kind) -> Result<(), CoordinatorError> {
    if visible(role).has(kind) {
        return Ok(());
    }
    Err(CoordinatorError::Forbidden { reason: format!("a {role} may not see objects of kind {kind:?}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_leaders_own_commands_come_from_nobody() {
        let command = Command::LoseNode { node: "a".into(), incarnation: Default::default(), reason: String::new() };
        for role in Role::ALL {
            assert!(matches!(may_execute(role, &command), Err(CoordinatorError::Forbidden { .. })), "{role}");
        }
    }

    #[test]
    fn operators_commands_take_an_operator() {
        let command = Command::CordonNode { node: "a".into(), cordoned: true };
        assert!(may_execute(Role::Admin, &command).is_ok());
        for role in [Role::Worker, Role::Gateway, Role::Coordinator] {
            let refusal = may_execute(role, &command).expect_err("only an operator may").to_string();
            assert!(refusal.contains("admin") && refusal.contains(role.as_str()), "{refusal}");
        }
    }

    #[test]
    fn workers_see_no_keys_and_nobody_but_operators_sees_tokens() {
        assert!(may_see(Role::Worker, Kind::Key).is_err() && may_see(Role::Gateway, Kind::Key).is_ok());
        for role in [Role::Worker, Role::Gateway, Role::Coordinator] {
            assert!(may_see(role, Kind::Token).is_err());
        }
    }
}
