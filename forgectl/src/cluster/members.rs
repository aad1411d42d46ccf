//! The coordinators themselves: status, membership, join tokens, backups.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use forge_cluster::api::{ClusterApi, GroupStatus};
use forge_cluster::client::{MemberAction, RemoteCluster};
use forge_cluster::config::{CoordinatorConfig, load};
use forge_cluster::tls::{JoinTokenText, ca_digest};
use forge_shared::cluster::command::Command;
use forge_shared::cluster::node::Role;
use forge_shared::version::Build;

use super::connect::{TIMEOUT, request_id, with_cluster};
use super::init::CONFIG_FILE;
use super::rows;
use crate::cli::cluster::{JoinTokenArgs, MembersCommand, RestoreArgs, ServerArgs};
use crate::failure::{Failure, Result};
use crate::output::{OutputFormat, column, print_facts, print_list, print_text, wide};
use crate::time::Utc;

/// Longest life of a join token: a week.
const MAX_TOKEN_MINUTES: u32 = 7 * 24 * 60;
/// Longest wait for a member to catch up or a leader to follow.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(60);

/// `forgectl cluster status`.
///
/// # Errors
/// No coordinator answers.
pub fn status(output: OutputFormat, server: &ServerArgs) -> Result<()> {
    with_cluster(server, |cluster| async move {
        show_status(&cluster.status(TIMEOUT).await?, output)?;
        if !matches!(output, OutputFormat::Table | OutputFormat::Wide) {
            return Ok(());
        }
        match super::certs::summary(&cluster).await {
            Ok(lines) => print_text(&format!("\n{}\n", lines.join("\n"))),
            // Nobody leads: what the status says is all there is.
            Err(failure) => print_text(&format!("\ncertificates: unknown ({failure})\n")),
        }
    })
}

fn show_status(status: &GroupStatus, output: OutputFormat) -> Result<()> {
    if matches!(output, OutputFormat::Json | OutputFormat::Yaml) {
        return print_facts(output, status, &[]);
    }
    let name = |id: u64| status.members.iter().find(|member| member.id == id).map(|member| member.name.clone());
    let leader =
        name(status.leader_id).unwrap_or_else(|| if status.leader_id == 0 { "nobody".into() } else { status.leader_id.to_string() });
    print_facts(
        output,
        status,
        &[
            ("CLUSTER", status.cluster_id.clone()),
            ("LEADER", leader),
            ("ANSWERED", name(status.member_id).unwrap_or_else(|| status.member_id.to_string())),
            ("TERM", status.term.to_string()),
            ("REVISION", status.revision.to_string()),
            ("VERSION", status.version.clone()),
            ("LEVEL", level(status)),
        ],
    )?;
    print_text("\n")?;
    let columns = [column("ID"), column("NAME"), column("ADDRESS"), column("ROLE"), column("STATE"), column("VERSION"), wide("LOG")];
    print_list(output, &status.members, &columns, |member| {
        let role = match (member.id == status.leader_id, member.is_voter) {
            (true, _) => "leader",
            (false, true) => "voter",
            (false, false) => "learner",
        };
        // Only the leader hears of everybody.
        let state = match (status.member_id == status.leader_id, member.is_reachable || member.id == status.member_id) {
            (_, true) => "answers",
            (true, false) => "silent",
            (false, false) => "unknown",
        };
        vec![
            member.id.to_string(),
            member.name.clone(),
            member.address.clone(),
            role.into(),
            state.into(),
            rows::build(&Build { version: member.version.clone(), level: member.level }),
            member.matched_index.to_string(),
        ]
    })
}

/// The cluster's level, and who keeps it below what the answering coordinator knows.
fn level(status: &GroupStatus) -> String {
    const SHOWN: usize = 5;
    let older = &status.older;
    let more = if older.len() > SHOWN { format!(" and {} more", older.len() - SHOWN) } else { String::new() };
    match older.as_slice() {
        [] => status.level.to_string(),
        _ => format!("{}, until these are upgraded: {}{more}", status.level, older[..older.len().min(SHOWN)].join(", ")),
    }
}

/// `forgectl cluster members`.
///
/// # Errors
/// A member that is not known, a change that the group refuses.
pub fn change_members(command: &MembersCommand) -> Result<()> {
    match command {
        MembersCommand::Add { server } => {
            join_token(&JoinTokenArgs { role: Role::Coordinator, minutes: 60, uses: 1, server: server.clone() })
        }
        MembersCommand::Remove { member, server } => with_cluster(server, |cluster| async move {
            let (id, name) = find(&cluster, member).await?;
            cluster.change_members(MemberAction::Remove(id), CHANGE_TIMEOUT).await?;
            print_text(&format!("coordinator {name} is no longer a member; stop it, and do not start it on its folder again\n"))
        }),
        MembersCommand::TransferLeader { member, server } => with_cluster(server, |cluster| async move {
            let (id, name) = find(&cluster, member).await?;
            cluster.change_members(MemberAction::TransferLeadership(id), CHANGE_TIMEOUT).await?;
            print_text(&format!("coordinator {name} leads\n"))
        }),
    }
}

async fn find(cluster: &RemoteCluster, wanted: &str) -> Result<(u64, String)> {
    let status = cluster.status(TIMEOUT).await?;
    let found = status.members.iter().find(|member| member.name == wanted || member.id.to_string() == wanted);
    let known = || status.members.iter().map(|member| member.name.as_str()).collect::<Vec<_>>().join(", ");
    found
        .map(|member| (member.id, member.name.clone()))
        .ok_or_else(|| Failure::new(format!("no coordinator is called {wanted:?}")).help(format!("there are: {}", known())))
}

/// `forgectl cluster join-token`.
///
/// # Errors
/// A role that does not join by token, no leader.
pub fn join_token(args: &JoinTokenArgs) -> Result<()> {
    if args.role == Role::Admin {
        return Err(
            Failure::usage("operators do not join by token").help("`forgectl cluster admin NAME --ca DIR --out DIR` makes a certificate")
        );
    }
    if !(1..=MAX_TOKEN_MINUTES).contains(&args.minutes) || args.uses == 0 {
        return Err(Failure::usage(format!("--minutes: 1 to {MAX_TOKEN_MINUTES}; --uses: at least 1")));
    }
    with_cluster(&args.server, |cluster| async move {
        let members = cluster.status(TIMEOUT).await?.members;
        let addresses: Vec<String> = members.into_iter().map(|member| member.address).filter(|address| !address.is_empty()).collect();
        let token = JoinTokenText::generate(signing_ca(&cluster).await?, addresses)?;
        let expires_ms = (Utc::now().0 + u64::from(args.minutes) * 60) * 1000;
        let command = Command::PutJoinToken { token: token.record(args.role, expires_ms, args.uses) };
        cluster.execute(request_id(), command, TIMEOUT).await?;
        eprintln!(
            "Lets in {} {}(s) for {} minutes. Put it where only that process reads it (membership.tokenFile):",
            args.uses, args.role, args.minutes
        );
        print_text(&format!("{}\n", token.to_text()))
    })
}

/// SHA-256 of the CA that coordinators show: what a token pins.
async fn signing_ca(cluster: &RemoteCluster) -> Result<[u8; 32]> {
    let own = cluster.credentials().get().ca_digest();
    let trust = super::certs::read_trust(cluster, TIMEOUT).await?;
    let Some(signing) = trust.signing() else { return Ok(own) };
    Ok(ca_digest(&signing.certificate_pem)?)
}

/// A new file for its owner alone: a backup holds what keys and tokens are checked against.
fn create_private(file: &Path) -> std::io::Result<std::fs::File> {
    std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(file)
}

fn cannot_write(file: &Path, error: &std::io::Error) -> Failure {
    let failure = Failure::of(error).while_doing(&format!("cannot write {}", file.display()));
    match error.kind() {
        std::io::ErrorKind::AlreadyExists => failure.help("a backup is written over nothing: name a new file, or remove this one first"),
        std::io::ErrorKind::NotFound => failure.help("make its folder first"),
        _ => failure,
    }
}

/// `forgectl cluster restore`: what `forge-coordinator --restore` does.
///
/// # Errors
/// A configuration or a backup that cannot be used, a data folder that is not empty.
pub fn restore(args: &RestoreArgs) -> Result<()> {
    let file = args.config.clone().unwrap_or_else(|| args.dir.join(CONFIG_FILE));
    let config: CoordinatorConfig = load(Some(&file), &args.assignments)?;
    let header = forge_coordinator::restore(&args.file, &config.data_dir).map_err(|error| Failure::of(&error))?;
    print_text(&format!(
        "{}\nstart it without --bootstrap:  forge-coordinator --config {}\n",
        header.restored_into(&config.data_dir),
        file.display()
    ))
}

/// `forgectl cluster backup`.
///
/// # Errors
/// A file that is there already, a backup that broke off (nothing is left of it).
pub fn backup(file: &Path, server: &ServerArgs) -> Result<()> {
    let failed = |error: std::io::Error| cannot_write(file, &error);
    let mut out = create_private(file).map_err(failed)?;
    let written = with_cluster(server, |cluster| async move {
        let mut pieces = cluster.backup(TIMEOUT).await?;
        let mut bytes = 0;
        while let Some(piece) = pieces.recv().await {
            let piece = piece?;
            out.write_all(&piece).map_err(failed)?;
            bytes += piece.len();
        }
        out.sync_all().map_err(failed)?;
        Ok(bytes)
    });
    match written {
        Ok(bytes) => print_text(&format!("wrote {bytes} bytes to {}\n", file.display())),
        Err(failure) => {
            let _ = std::fs::remove_file(file);
            Err(failure)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_backup_is_for_its_owner_alone_and_over_no_other() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("backup");
        create_private(&file).expect("new");
        assert_eq!(std::fs::metadata(&file).expect("there").permissions().mode() & 0o777, 0o600);
        let error = create_private(&file).expect_err("there already");
        assert!(cannot_write(&file, &error).to_string().contains("name a new file"));
    }
}
