//! `forgectl rollout`: how far a change is, the way back, and the wishes before.
//!
//! Invariant: exit code 0 says that the newest generation answers with all its replicas, that gateways send requests to
//! them, and that nothing older runs; with `--no-wait`, that nothing keeps it from coming to that.

use std::time::Duration;

use forge_cluster::api::ClusterApi;
use forge_cluster::client::RemoteCluster;
use forge_shared::cluster::Revision;
use forge_shared::cluster::command::Command;
use forge_shared::cluster::event::{Kind, Object};
use forge_shared::cluster::service::{Facts, PastWish, RolloutProgress, ServiceRecord};
use forge_shared::config::{Format, render};
use forge_shared::ids::ServiceName;

use super::connect::{TIMEOUT, request_id, with_cluster};
use super::wait::{Step, follow_service};
use crate::cli::rollout::{RolloutArgs, RolloutCommand};
use crate::failure::{Exit, Failure, Result};
use crate::output::{OutputFormat, column, print_facts, print_list, print_text};
use crate::time::{Utc, ago};

/// `forgectl rollout`.
///
/// # Errors
/// A rollout that is stuck (1), a target that is none (2), a change that fits nowhere (3), one that is not done in time (4).
pub fn rollout(args: &RolloutArgs) -> Result<()> {
    match &args.command {
        RolloutCommand::Status { target, no_wait, timeout, server } => {
            let name = target_of(target)?;
            with_cluster(server, |cluster| async move {
                let (now, since) = service(&cluster, name).await?;
                if *no_wait {
                    return match judge(&now) {
                        Step::GoesOn(line) | Step::Done(line) => print_text(&format!("{line}\n")),
                        Step::Failed(failure) => Err(failure),
                    };
                }
                let line = follow_service(&cluster, (name, since), (Duration::from_secs(*timeout), "is not rolled out"), judge).await?;
                print_text(&format!("{line}\n"))
            })
        }
        RolloutCommand::Undo { target, to_generation, server } => {
            let name = target_of(target)?;
            let command = Command::UndoService { name: ServiceName(name.to_owned()), to: *to_generation };
            with_cluster(server, |cluster| async move {
                let applied = cluster.execute(request_id(), command, TIMEOUT).await?;
                let (ServiceRecord { generation, .. }, _) = service(&cluster, name).await?;
                print_text(&match applied.changed {
                    true => format!("{name} goes back, as generation {generation}; `forgectl rollout status model/{name}` shows how far\n"),
                    false => format!("{name} is at generation {generation} already\n"),
                })
            })
        }
        RolloutCommand::History { target, generation, output, server } => {
            let name = target_of(target)?;
            with_cluster(server, |cluster| async move {
                let wishes = wishes(service(&cluster, name).await?.0);
                match generation {
                    None => list(&wishes, *output),
                    Some(generation) => show(name, &wishes, *generation, *output),
                }
            })
        }
    }
}

/// The name of `model/NAME` or `NAME`.
fn target_of(text: &str) -> Result<&str> {
    match text.split_once('/') {
        None if !text.is_empty() => Ok(text),
        Some(("model" | "models", name)) if !name.is_empty() => Ok(name),
        _ => Err(Failure::usage(format!("{text:?} rolls nothing out")).help("write model/NAME, or the name of a model alone")),
    }
}

/// The service as it is now, and when that is.
async fn service(cluster: &RemoteCluster, name: &str) -> Result<(ServiceRecord, Revision)> {
    let listing = cluster.read(Kind::Service, Some(name.to_owned()), TIMEOUT).await?;
    match listing.objects.into_iter().next() {
        Some(Object::Service(service)) => Ok((*service, listing.revision)),
        _ => Err(Failure::new(format!("there is no {name:?}")).help("`forgectl get models` lists what there is")),
    }
}

/// Where a rollout stands.
fn judge(service: &ServiceRecord) -> Step {
    let name = &service.service.metadata.name;
    let progress = service.progress();
    let RolloutProgress { wished, ready, old, old_serving, .. } = progress;
    let (generation, rolled) = (service.generation, format!("{ready} of {wished} replicas are ready"));
    if service.is_deleted {
        return Step::Failed(Failure::new(format!("{name} is being deleted")));
    }
    if progress.is_complete() {
        return Step::Done(format!("{name} generation {generation} is rolled out: {rolled}"));
    }
    let back = format!("`forgectl rollout undo model/{name}` goes back; `forgectl describe model {name}` says more");
    if let Facts::Failed { reason } = &service.facts {
        return Step::Failed(Failure::new(format!("{name} generation {generation}: its model cannot be used: {reason}")).help(back));
    }
    if let Some(refusal) = &service.refusal {
        let failure = Failure::new(format!("{name} generation {generation}: {refusal}")).exit(Exit::NotPlaceable);
        return Step::Failed(failure.help(format!("take the nearest settings, or add a worker; {back}")));
    }
    if let Some(reason) = &service.stuck {
        return Step::Failed(Failure::new(format!("{name} generation {generation} is stuck: {reason}")).help(back));
    }
    let rest = match (old_serving, old) {
        (0, 0) => String::new(),
        (0, old) => format!(", {old} of older generations finish their requests"),
        (serving, _) => format!(", {serving} of older generations serve on"),
    };
    Step::GoesOn(format!("{name} generation {generation}: {rolled}{rest}"))
}

/// All wishes there are, the present one last.
fn wishes(service: ServiceRecord) -> Vec<PastWish> {
    let ServiceRecord { mut history, service, generation, changed_ms, .. } = service;
    history.push(PastWish { generation, service, changed_ms });
    history
}

fn list(wishes: &[PastWish], output: OutputFormat) -> Result<()> {
    let columns = ["GENERATION", "SINCE", "MODEL", "STATE"].map(column);
    let present = wishes.last().map_or(0, |wish| wish.generation);
    print_list(output, wishes, &columns, |wish| {
        vec![
            wish.generation.to_string(),
            wish.changed_ms.map_or("-".to_owned(), |ms| ago(Utc(ms / 1000))),
            wish.service.spec.model.clone(),
            if wish.generation == present { "present".into() } else { "to go back to".into() },
        ]
    })
}

fn show(name: &str, wishes: &[PastWish], generation: u64, output: OutputFormat) -> Result<()> {
    let Some(wish) = wishes.iter().find(|wish| wish.generation == generation) else {
        let known: Vec<String> = wishes.iter().map(|wish| wish.generation.to_string()).collect();
        return Err(Failure::new(format!("{name} keeps no generation {generation}")).help(format!("there are {}", known.join(", "))));
    };
    match output {
        OutputFormat::Json => print_facts(output, &wish.service, &[]),
        _ => print_text(&render(&wish.service, Format::Yaml)?),
    }
}

#[cfg(test)]
mod tests {
    use forge_shared::ids::Epoch;
    use forge_shared::spec::{ModelService, ModelServiceSpec};

    use super::*;

    fn record() -> ServiceRecord {
        ServiceRecord {
            service: ModelService::new("demo", ModelServiceSpec { model: "m".into(), ..Default::default() }),
            generation: 3,
            revision: Revision(1),
            created: Revision(1),
            facts: Facts::NEW,
            replicas: Vec::new(),
            leaving: Vec::new(),
            older: Vec::new(),
            history: Vec::new(),
            changed_ms: None,
            stuck: None,
            is_deleted: false,
            refusal: None,
            last_epoch: Epoch(0),
            longest_len: None,
        }
    }

    #[test]
    fn targets_are_models() {
        assert_eq!(target_of("demo").expect("a name"), "demo");
        assert_eq!(target_of("model/demo").expect("a kind and a name"), "demo");
        for wrong in ["", "model/", "node/w1", "/x"] {
            assert!(target_of(wrong).expect_err("none").to_string().contains("model/NAME"), "{wrong}");
        }
    }

    #[test]
    fn what_is_stuck_fails_and_says_the_way_back() {
        assert!(matches!(judge(&record()), Step::GoesOn(line) if line == "demo generation 3: 0 of 1 replicas are ready"));
        let stuck = ServiceRecord { stuck: Some("no progress for 600 s".into()), ..record() };
        let Step::Failed(failure) = judge(&stuck) else { panic!("it is stuck") };
        let text = failure.to_string();
        assert!(text.contains("no progress for 600 s") && text.contains("rollout undo model/demo"), "{text}");
    }

    #[test]
    fn the_present_wish_is_listed_last() {
        let past = PastWish { generation: 1, service: record().service, changed_ms: Some(1) };
        let all = wishes(ServiceRecord { history: vec![past], ..record() });
        assert_eq!(all.iter().map(|wish| wish.generation).collect::<Vec<_>>(), [1, 3]);
        assert!(show("demo", &all, 2, OutputFormat::Table).expect_err("not kept").to_string().contains("there are 1, 3"));
    }
}
