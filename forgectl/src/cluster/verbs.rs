//! One command, one change: nodes are cordoned and drained, services scaled and deleted; and log lines.

use forge_cluster::api::ClusterApi;
use forge_cluster::client::LogSource;
use forge_shared::cluster::command::Command;
use forge_shared::ids::{NodeId, ServiceName};

use super::connect::{TIMEOUT, request_id, with_cluster};
use super::errors::explained;
use crate::cli::cluster::{DeleteArgs, DrainArgs, LogsArgs, NodeArgs, ScaleArgs, ServerArgs};
use crate::failure::{Failure, Result};
use crate::output::print_text;
use crate::time::Utc;

fn change(server: &ServerArgs, command: Command, done: &str, already: &str) -> Result<()> {
    with_cluster(server, |cluster| async move {
        let applied = match cluster.execute(request_id(), command, TIMEOUT).await {
            Ok(applied) => applied,
            Err(error) => return Err(explained(&cluster, error).await),
        };
        print_text(&format!("{}\n", if applied.changed { done } else { already }))
    })
}

/// `forgectl cordon` and `uncordon`. To uncordon is to end a drain too.
///
/// # Errors
/// A node that is not known, no leader.
pub fn cordon(args: &NodeArgs, is_cordoned: bool) -> Result<()> {
    let (name, node) = (&args.node, NodeId(args.node.clone()));
    if is_cordoned {
        let command = Command::CordonNode { node, cordoned: true };
        return change(&args.server, command, &format!("node {name} takes no new replicas"), &format!("node {name} was cordoned already"));
    }
    with_cluster(&args.server, |cluster| async move {
        let undrained = match cluster
            .execute(request_id(), Command::DrainNode { node: node.clone(), draining: false, is_forced: false }, TIMEOUT)
            .await
        {
            Ok(undrained) => undrained,
            Err(error) => return Err(explained(&cluster, error).await),
        };
        let uncordoned = cluster.execute(request_id(), Command::CordonNode { node, cordoned: false }, TIMEOUT).await?;
        let changed = undrained.changed || uncordoned.changed;
        print_text(&format!("node {name} {}\n", if changed { "takes replicas again" } else { "was not cordoned" }))
    })
}

/// `forgectl drain`.
///
/// # Errors
/// A node that is not known, no leader.
pub fn drain(args: &DrainArgs) -> Result<()> {
    let DrainArgs { node: name, force, server } = args;
    let command = Command::DrainNode { node: NodeId(name.clone()), draining: true, is_forced: *force };
    let rest = match force {
        true => "those with room nowhere else end once their requests are finished".to_owned(),
        false => format!("those with room nowhere else serve on until there is, or until `forgectl drain {name} --force`"),
    };
    let done = format!(
        "node {name}: its replicas move away; {rest}\n\
         `forgectl get placements -w` shows how far, `forgectl uncordon {name}` takes it back"
    );
    change(server, command, &done, &format!("node {name} was draining already"))
}

/// `forgectl scale`.
///
/// # Errors
/// A service that is not known, no leader.
pub fn scale(args: &ScaleArgs) -> Result<()> {
    let command = Command::ScaleService { name: ServiceName(args.name.clone()), replicas: args.replicas };
    let done = format!("{}: {} replicas wanted", args.name, args.replicas);
    change(&args.server, command, &done, &format!("{}: {} replicas were wanted already", args.name, args.replicas))
}

/// `forgectl delete`.
///
/// # Errors
/// A service or node that is not known, a node that lives, no leader.
pub fn delete(args: &DeleteArgs) -> Result<()> {
    match deletion(&args.target)? {
        Command::RemoveNode { node } => {
            let done = format!("node {node} is forgotten; its name is free");
            change(&args.server, Command::RemoveNode { node }, &done, "it was forgotten already")
        }
        command => {
            let name = args.target.last().map(String::as_str).unwrap_or_default();
            let done = format!("{name} is deleted; its replicas finish what they are answering");
            change(&args.server, command, &done, &format!("{name} was being deleted already"))
        }
    }
}

/// The command of `delete NAME`, `delete model NAME` or `delete node NAME`.
pub(super) fn deletion(target: &[String]) -> Result<Command> {
    match target {
        [name] => Ok(Command::DeleteService { name: ServiceName(name.clone()) }),
        [kind, name] if kind == "model" => Ok(Command::DeleteService { name: ServiceName(name.clone()) }),
        [kind, name] if kind == "node" => Ok(Command::RemoveNode { node: NodeId(name.clone()) }),
        _ => {
            Err(Failure::usage(format!("cannot delete {:?}", target.join(" ")))
                .help("write `delete NAME` for a model, or `delete node NAME`"))
        }
    }
}

/// `forgectl logs`.
///
/// # Errors
/// A target that is not known, lines that break off.
pub fn logs(args: &LogsArgs) -> Result<()> {
    let source = LogSource { target: args.target.clone(), is_node: args.node, is_following: args.follow, tail_lines: args.tail };
    with_cluster(&args.server, |cluster| async move {
        let mut lines = match cluster.logs(source, TIMEOUT).await {
            Ok(lines) => lines,
            Err(error) => return Err(explained(&cluster, error).await),
        };
        while let Some(line) = lines.recv().await {
            let line = line?;
            print_text(&format!("{} {} {} {}\n", Utc(line.at_ms / 1000), line.source, line.level, line.text.trim_end()))?;
        }
        Ok(())
    })
}
