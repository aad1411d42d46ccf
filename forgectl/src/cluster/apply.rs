//! `forgectl apply`: a wish, the plan that it would give, and the wait until it is carried out.

use std::time::Duration;

use forge_cluster::api::{ClusterApi, PlannedService};
use forge_cluster::client::RemoteCluster;
use forge_shared::cluster::command::Command;
use forge_shared::config::{Layers, Setting};
use forge_shared::spec::ModelService;
use serde_json::json;

use super::connect::{TIMEOUT, request_id, with_cluster};
use super::wait::wait_until_running;
use super::{data, rows};
use crate::cli::cluster::{ApplyArgs, WaitFor};
use crate::context::read_document;
use crate::failure::{Failure, Result};
use crate::output::{OutputFormat, print_facts, print_list, print_text};

/// Who waits longer than this for a plan is told for what.
const TELL_AFTER: Duration = Duration::from_secs(3);

/// `forgectl apply`.
///
/// # Errors
/// A specification that is wrong (2), that fits nowhere (3), a cluster that cannot be reached (4), a model that fails (1).
pub fn apply(args: &ApplyArgs) -> Result<()> {
    let service = wish(args)?;
    with_cluster(&args.server, |cluster| async move {
        if args.dry_run {
            return show_plan(&plan(&cluster, service, Duration::from_secs(args.timeout)).await?, args.output);
        }
        let name = service.metadata.name.clone();
        let applied = cluster.execute(request_id(), Command::ApplyService { service: Box::new(service) }, TIMEOUT).await?;
        let is_data = matches!(args.output, OutputFormat::Json | OutputFormat::Yaml);
        if !is_data {
            print_text(&format!("{name} {}\n", if applied.changed { "applied" } else { "unchanged" }))?;
        }
        if args.wait == WaitFor::Running {
            wait_until_running(&cluster, &name, applied.revision, Duration::from_secs(args.timeout)).await?;
        }
        // One document, once all that was asked for is done.
        let reached = if args.wait == WaitFor::Running { "running" } else { "submitted" };
        let done = json!({ "name": name, "changed": applied.changed, "revision": applied.revision, "reached": reached });
        if is_data { print_facts(args.output, &done, &[]) } else { Ok(()) }
    })
}

/// The wish: the file and `--set`. Variables of this machine are not the cluster's.
fn wish(args: &ApplyArgs) -> Result<ModelService> {
    let Some(file) = &args.sources.file else {
        return Err(
            Failure::usage("what is to be applied?").help("-f FILE names a ModelService; docs/configuration.md has one to start from")
        );
    };
    let mut layers = Layers { file: Some(read_document(file)?), ..Layers::default() };
    for text in &args.sources.assignments {
        layers.assignments.push(Setting::assignment(text)?);
    }
    let service = layers.resolve()?;
    if service.spec.model.is_empty() {
        return Err(Failure::usage("spec.model: is missing").help("name a model, for example `model: smollm2:135m`"));
    }
    Ok(service)
}

/// Asks for a plan. Where a worker has to read the model first, who waits is told.
async fn plan(cluster: &RemoteCluster, service: ModelService, timeout: Duration) -> Result<PlannedService> {
    let model = service.spec.model.clone();
    let planning = cluster.plan(service, timeout);
    tokio::pin!(planning);
    let planned = tokio::select! {
        planned = &mut planning => planned,
        () = tokio::time::sleep(TELL_AFTER) => {
            eprintln!("a worker reads {model}; waiting up to {} s for it", timeout.as_secs());
            planning.await
        }
    };
    Ok(planned?)
}

fn show_plan(planned: &PlannedService, output: OutputFormat) -> Result<()> {
    if matches!(output, OutputFormat::Json | OutputFormat::Yaml) {
        return print_facts(output, &data::planned(planned)?, &[]);
    }
    let name = &planned.service.metadata.name;
    print_text(&format!("{name} {}\n\n", if planned.changes { "would change" } else { "would not change" }))?;
    let placed: Vec<Vec<String>> = rows::planned(&planned.plans).iter().map(rows::placement).collect();
    print_list(output, &placed, &rows::PLACEMENTS, Clone::clone)?;
    if !planned.refused_devices.is_empty() {
        print_text("\nNot taken:\n")?;
        let columns = ["DEVICE", "WHY"].map(crate::output::column);
        print_list(output, &planned.refused_devices, &columns, |(device, why)| vec![device.clone(), why.clone()])?;
    }
    planned.notes.iter().try_for_each(|note| print_text(&format!("\nNote: {note}\n")))
}
