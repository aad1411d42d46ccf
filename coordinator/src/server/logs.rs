//! Log lines of replicas and nodes, through the workers' engine services.
//!
//! Invariant: operators reach workers through a coordinator alone; a worker that is away takes its own lines with it and
//! no others; streams of lines at once are bounded, and each ends, at the latest after hours.

use std::time::Duration;

use forge_cluster::tls::{ChannelOptions, PeerName, channel};
use forge_proto::cluster::{LogLine, LogsRequest};
use forge_proto::engine::EngineLogsRequest;
use forge_proto::engine::engine_client::EngineClient;
use forge_shared::cluster::command::CommandError;
use forge_shared::cluster::node::{NodePhase, Role};
use forge_shared::ids::{NodeId, ServiceName};
use futures::StreamExt;
use tonic::Status;

use super::Shared;
use super::call::refuse;
use super::cluster::Answers;
use crate::error::CoordinatorError;

/// Lines to begin with, at most.
const MAX_TAIL: u32 = 10_000;
/// Replicas whose lines are merged.
const MAX_SOURCES: usize = 256;

/// Workers that are asked at once.
const ASKED_AT_ONCE: usize = 16;
/// For a worker to begin.
const BEGIN_WITHIN: Duration = Duration::from_secs(5);
/// Who follows lines for so long asks anew.
const FOLLOWED_FOR: Duration = Duration::from_secs(12 * 3600);

/// Where lines come from.
struct Source {
    node: NodeId,
    address: String,
    /// `service/index`, or empty for all of the worker.
    replica: String,
    /// The cluster has given the worker up: nobody waits for it.
    is_lost: bool,
}

/// Begins to follow what the request names.
pub(super) async fn follow(shared: &Shared, request: LogsRequest) -> Result<Answers<LogLine>, Status> {
    let full = |_| refuse(CoordinatorError::Busy { reason: "this coordinator carries as many streams of log lines as it takes".into() });
    let place = shared.logs.clone().try_acquire_owned().map_err(full)?;
    let sources = sources(shared, &request).map_err(refuse)?;
    let mut streams = Vec::new();
    let mut failed = None;
    for some in sources.chunks(ASKED_AT_ONCE) {
        let mut asked = Vec::with_capacity(some.len());
        for source in some {
            asked.push(open(shared, source, &request));
        }
        for opened in futures::future::join_all(asked).await {
            match opened {
                Ok(stream) => streams.push(stream),
                Err(error) => {
                    tracing::warn!(%error, "a worker gives no log lines");
                    failed = Some(error);
                }
            }
        }
    }
    if let (true, Some(error)) = (streams.is_empty(), failed) {
        return Err(error);
    }
    let stop = shared.coordinator.0.stop.clone();
    let over = async move {
        let _ = tokio::time::timeout(FOLLOWED_FOR, stop.cancelled()).await;
        drop(place);
    };
    Ok(futures::stream::select_all(streams).take_until(over).boxed())
}

async fn open(shared: &Shared, source: &Source, request: &LogsRequest) -> Result<Answers<LogLine>, Status> {
    if source.is_lost {
        return Err(away(source, "it is lost"));
    }
    let peer = PeerName::One(Role::Worker, source.node.0.clone());
    let unusable = |error: forge_cluster::tls::TlsError| refuse(CoordinatorError::Start { reason: error.to_string() });
    let channel = channel(&source.address, &peer, &shared.credentials, ChannelOptions::default()).map_err(unusable)?;
    let asked = EngineLogsRequest { replica: source.replica.clone(), follow: request.follow, tail: request.tail.min(MAX_TAIL) };
    let mut client = EngineClient::new(channel);
    let late = |_| away(source, &format!("no answer within {BEGIN_WITHIN:?}"));
    let begun = tokio::time::timeout(BEGIN_WITHIN, client.logs(asked)).await.map_err(late)?;
    let lines = begun.map_err(|status| away(source, status.message()))?.into_inner();
    let node = source.node.0.clone();
    let lines = lines.map(move |line| {
        let line = line?;
        let source = if line.replica.is_empty() { node.clone() } else { line.replica };
        Ok(LogLine { source, at_ms: line.at_ms, level: line.level, text: line.text })
    });
    Ok(lines.boxed())
}

fn away(source: &Source, why: &str) -> Status {
    let Source { node, address, .. } = source;
    refuse(CoordinatorError::Away {
        reason: format!(
            "worker {node} at {address} gives no lines: {why}; `forgectl get nodes` says where it stands, its own log what it did"
        ),
    })
}

fn sources(shared: &Shared, request: &LogsRequest) -> Result<Vec<Source>, CoordinatorError> {
    let state = shared.coordinator.0.replicated.read();
    let missing = |kind: &str, name: &str| {
        CoordinatorError::Command(CommandError::NotFound { kind: kind.into(), name: name.chars().take(80).collect(), nearest: None })
    };
    if request.is_node {
        let record = state.nodes().get(&NodeId::from(request.target.as_str())).ok_or_else(|| missing("node", &request.target))?;
        if record.spec.role != Role::Worker {
            return Err(CoordinatorError::message(
                "target",
                format!("{} is a {}: only workers keep lines for others", request.target, record.spec.role),
            ));
        }
        let spec = &record.spec;
        let is_lost = record.phase == NodePhase::Lost;
        return Ok(vec![Source { node: spec.id.clone(), address: spec.address.clone(), replica: String::new(), is_lost }]);
    }
    let (name, index) = named_replica(&request.target)?;
    let service = state.services().get(&ServiceName::from(name)).ok_or_else(|| missing("service", name))?;
    let wished = service.replicas.iter().filter(|replica| index.is_none_or(|index| replica.plan.replica.index == index));
    let sources: Vec<Source> = wished
        .filter_map(|replica| {
            let record = state.nodes().get(&replica.plan.ranks.first()?.node)?;
            let (node, is_lost) = (&record.spec, record.phase == NodePhase::Lost);
            Some(Source { node: node.id.clone(), address: node.address.clone(), replica: replica.plan.replica.to_string(), is_lost })
        })
        .take(MAX_SOURCES)
        .collect();
    if sources.is_empty() {
        return Err(missing("placed replica", &request.target));
    }
    Ok(sources)
}

/// `SERVICE`, or `SERVICE/INDEX`.
pub(super) fn named_replica(target: &str) -> Result<(&str, Option<u32>), CoordinatorError> {
    match target.split_once('/') {
        None => Ok((target, None)),
        Some((name, index)) => {
            let index: u32 = index.parse().map_err(|_| CoordinatorError::message("target", "write SERVICE or SERVICE/INDEX"))?;
            Ok((name, Some(index)))
        }
    }
}
