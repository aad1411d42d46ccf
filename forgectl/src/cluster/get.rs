//! `forgectl get` and `describe`: objects of the cluster, once or with their changes.
//!
//! Invariant: as data, a thing is printed whole ([`super::data`]); tables leave out, data does not.

use forge_cluster::api::{ClusterApi, WatchItem};
use forge_cluster::client::RemoteCluster;
use forge_shared::cluster::event::{Change, Kind, Object};

use super::connect::{TIMEOUT, with_cluster};
use super::errors::with_names;
use super::watching::View;
use super::{data, rows};
use crate::cli::cluster::{DescribeArgs, Described, GetArgs, Listed};
use crate::failure::{Failure, Result};
use crate::output::{Column, OutputFormat, column, print_facts, print_list, print_text};
use crate::time::{Utc, ago};

fn kind_of(listed: Listed) -> Kind {
    match listed {
        Listed::Nodes => Kind::Node,
        Listed::Models | Listed::Placements => Kind::Service,
        Listed::Events => Kind::Notice,
        Listed::Keys => Kind::Key,
    }
}

/// One of a kind, in words.
fn noun(listed: Listed) -> &'static str {
    match listed {
        Listed::Nodes => "node",
        Listed::Models => "model",
        Listed::Placements => "model with placements",
        Listed::Events => "event",
        Listed::Keys => "key",
    }
}

/// Columns of a kind.
pub(super) fn columns(listed: Listed) -> &'static [Column] {
    match listed {
        Listed::Nodes => &rows::NODES,
        Listed::Models => &rows::MODELS,
        Listed::Placements => &rows::PLACEMENTS,
        Listed::Events => &rows::EVENTS,
        Listed::Keys => &rows::KEYS,
    }
}

/// Rows of objects: one each, but one per rank for placements.
pub(super) fn table(listed: Listed, objects: &[Object]) -> (&'static [Column], Vec<Vec<String>>) {
    let rows = objects.iter().flat_map(|object| match (listed, object) {
        (Listed::Nodes, Object::Node(node)) => vec![rows::node(node)],
        (Listed::Models, Object::Service(service)) => vec![rows::model(service)],
        (Listed::Placements, Object::Service(service)) => rows::placed(service).iter().map(rows::placement).collect(),
        (Listed::Events, Object::Notice(notice)) => vec![rows::event(notice)],
        (Listed::Keys, Object::Key(key)) => vec![rows::key(key)],
        _ => Vec::new(),
    });
    (columns(listed), rows.collect())
}

fn print_objects(listed: Listed, objects: &[Object], output: OutputFormat) -> Result<()> {
    match output {
        OutputFormat::Json | OutputFormat::Yaml => {
            let values = objects.iter().map(|object| data::objects(listed, object)).collect::<Result<Vec<_>>>()?;
            print_list(output, &values.concat(), &[], |_| Vec::new())
        }
        OutputFormat::Table | OutputFormat::Wide => {
            let (columns, rows) = table(listed, objects);
            if rows.is_empty() {
                return print_text(match listed {
                    Listed::Nodes => "No nodes. `forgectl cluster join-token --role worker` lets one in.\n",
                    Listed::Models => "No models. `forgectl apply -f FILE` asks for one.\n",
                    Listed::Placements => "Nothing is placed.\n",
                    Listed::Events => "No events.\n",
                    Listed::Keys => "No keys: gateways take any, on loopback only. `forgectl keys create NAME --cluster` makes one.\n",
                });
            }
            print_list(output, &rows, columns, Clone::clone)
        }
    }
}

/// `forgectl get`.
///
/// # Errors
/// No coordinator answers, or there is no such object.
pub fn get(args: &GetArgs) -> Result<()> {
    with_cluster(&args.server, |cluster| async move {
        if args.watch {
            return watch(&cluster, args).await;
        }
        let objects = read(&cluster, args.kind, args.name.as_deref()).await?;
        print_objects(args.kind, &objects, args.output)
    })
}

async fn read(cluster: &RemoteCluster, listed: Listed, name: Option<&str>) -> Result<Vec<Object>> {
    let objects = cluster.read(kind_of(listed), name.map(str::to_owned), TIMEOUT).await?.objects;
    match name {
        Some(name) if objects.is_empty() => {
            let failure = Failure::new(format!("there is no {} {name:?}", noun(listed)));
            Err(with_names(cluster, failure, kind_of(listed), name).await)
        }
        _ => Ok(objects),
    }
}

/// Everything there is, and then what changes.
async fn watch(cluster: &RemoteCluster, args: &GetArgs) -> Result<()> {
    let wanted = |name: &str| args.name.as_deref().is_none_or(|wanted| wanted == name);
    // A watch from the beginning may give an older listing and what happened since: right for programs, history for people.
    let first = cluster.read(kind_of(args.kind), None, TIMEOUT).await?;
    let objects: Vec<Object> = first.objects.into_iter().filter(|object| wanted(&object.name())).collect();
    let (mut view, text) = View::begin(args, &objects)?;
    print_text(&text)?;
    let mut items = cluster.watch(vec![kind_of(args.kind)], Some(first.revision));
    let mut listing = None;
    while let Some(item) = items.recv().await {
        match item {
            WatchItem::Reset => listing = Some(Vec::new()),
            WatchItem::Event(event) => match (event.change, &mut listing) {
                (Change::Put { object }, Some(objects)) if wanted(&object.name()) => objects.push(object),
                (Change::Put { object }, None) if wanted(&object.name()) => print_text(&view.put(&object)?)?,
                (Change::Deleted { name, .. }, None) if wanted(&name) => print_text(&view.gone(&name)?)?,
                _ => {}
            },
            WatchItem::Current(_) => {
                if let Some(objects) = listing.take() {
                    print_text(&view.replace(&objects)?)?;
                }
            }
        }
    }
    Ok(())
}

/// `forgectl describe`.
///
/// # Errors
/// No coordinator answers, or there is no such object.
pub fn describe(args: &DescribeArgs) -> Result<()> {
    with_cluster(&args.server, |cluster| async move {
        let kind = Listed::from(args.kind);
        let objects = read(&cluster, kind, Some(&args.name)).await?;
        let Some(object) = objects.first() else { return Ok(()) };
        if matches!(args.output, OutputFormat::Json | OutputFormat::Yaml) {
            return match (kind, data::objects(kind, object)?.as_slice()) {
                (Listed::Placements, ranks) => print_facts(args.output, &ranks, &[]),
                (_, [one]) => print_facts(args.output, one, &[]),
                (_, many) => print_facts(args.output, &many, &[]),
            };
        }
        match object {
            Object::Node(node) => {
                print_facts(args.output, &(), &node_facts(node))?;
                heading("DEVICES")?;
                let columns = ["DEVICE", "KIND", "CORES", "MEMORY", "READS", "INSTRUCTIONS"].map(column);
                print_list(args.output, &node.spec.devices, &columns, |device| {
                    let reads = device.read_bandwidth_bytes_per_s;
                    let reads = if reads == 0 { "not measured".into() } else { format!("{}/s", rows::bytes(reads)) };
                    let sets = device.cannot_run.clone().unwrap_or_else(|| device.instruction_sets.join(","));
                    vec![
                        device.index.to_string(),
                        rows::kind(device),
                        device.cores.to_string(),
                        rows::bytes(device.memory_bytes),
                        reads,
                        sets,
                    ]
                })?;
            }
            Object::Service(service) => {
                let (_, reason) = rows::model_state(service);
                let row = rows::model(service);
                let facts: Vec<(&str, String)> =
                    rows::MODELS.iter().map(|column| column.name).zip(row).filter(|(name, _)| *name != "REASON").collect();
                print_facts(args.output, &(), &facts)?;
                if !reason.is_empty() {
                    print_text(&format!("REASON      {reason}\n"))?;
                }
                heading("REPLICAS")?;
                let (columns, rows) = table(Listed::Placements, std::slice::from_ref(object));
                print_list(OutputFormat::Wide, &rows, columns, Clone::clone)?;
            }
            Object::Key(_) | Object::Notice(_) | Object::Member(_) | Object::Token(_) | Object::Certificate(_) | Object::Trust(_) => {
                let (columns, rows) = table(kind, std::slice::from_ref(object));
                let facts: Vec<(&str, String)> = columns.iter().map(|column| column.name).zip(rows.into_iter().flatten()).collect();
                print_facts(args.output, &(), &facts)?;
            }
        }
        describe_events(&cluster, args).await
    })
}

fn heading(text: &str) -> Result<()> {
    print_text(&format!("\n{text}\n"))
}

fn node_facts(node: &forge_shared::cluster::node::NodeRecord) -> Vec<(&'static str, String)> {
    vec![
        ("NAME", node.spec.id.0.clone()),
        ("ROLE", node.spec.role.to_string()),
        ("STATE", rows::node_state(node)),
        ("SINCE", ago(Utc(node.since_ms / 1000))),
        ("REASON", if node.reason.is_empty() { "-".into() } else { node.reason.clone() }),
        ("ADDRESS", node.spec.address.clone()),
        ("METRICS", node.spec.metrics_address.clone()),
        ("DATA PLANE", node.spec.data_plane.as_ref().map_or("-".into(), |told| format!("{} ({})", told.address, told.transport))),
        ("INCARNATION", node.spec.incarnation.0.to_string()),
        ("VERSION", node.spec.version.clone()),
    ]
}

/// What happened to it, newest last.
async fn describe_events(cluster: &RemoteCluster, args: &DescribeArgs) -> Result<()> {
    let about: &[&str] = match args.kind {
        Described::Node => &["node"],
        Described::Model | Described::Placement => &["service", "replica"],
        Described::Event | Described::Key => return Ok(()),
    };
    let mut events = cluster.read(Kind::Notice, None, TIMEOUT).await?.objects;
    events.retain(|object| match object {
        Object::Notice(notice) => about.iter().any(|kind| {
            let rest = notice.about.strip_prefix(kind).and_then(|rest| rest.strip_prefix('/'));
            rest.is_some_and(|rest| rest == args.name || rest.strip_prefix(&args.name).is_some_and(|rest| rest.starts_with('/')))
        }),
        _ => false,
    });
    if events.is_empty() {
        return Ok(());
    }
    heading("EVENTS")?;
    print_objects(Listed::Events, &events, args.output)
}
