//! The `Cluster` service: what operators and programs ask.

use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use forge_proto::cluster::change_members_request::Change;
use forge_proto::cluster::cluster_server::Cluster;
use forge_proto::cluster::{
    BackupChunk, BackupRequest, BeginCaRotationReply, BeginCaRotationRequest, ChangeMembersReply, ChangeMembersRequest, ExecuteReply,
    ExecuteRequest, LoadsReply, LoadsRequest, LogLine, LogsRequest, PlanReply, PlanRequest, ReadReply, ReadRequest, StatusReply,
    StatusRequest, WatchBatch, WatchRequest,
};
use forge_shared::cluster::Revision;
use forge_shared::cluster::command::Command;
use forge_shared::cluster::event::Kind;
use forge_shared::cluster::node::Role;
use forge_shared::spec::ModelService;
use futures::{Stream, StreamExt};
use tonic::{Request, Response, Status};
use tracing::Instrument;

use super::Shared;
use super::call::{json, refuse, timeout, to_json};
use crate::access;
use crate::coordinator::{GroupChange, Submission};
use crate::error::CoordinatorError;
use crate::in_process::MIN_LOADS_INTERVAL;
use crate::watch::{KindSet, Watcher};

/// The longest pause between loads.
const MAX_LOADS_INTERVAL: Duration = Duration::from_secs(60);
/// Bytes of a part of a backup.
const BACKUP_CHUNK_BYTES: usize = 256 << 10;

/// A stream of answers.
pub(super) type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

pub(super) struct ClusterService(pub(super) Shared);

#[tonic::async_trait]
impl Cluster for ClusterService {
    async fn execute(&self, request: Request<ExecuteRequest>) -> Result<Response<ExecuteReply>, Status> {
        let caller = self.0.caller(&request, &[Role::Admin, Role::Gateway])?;
        let _place = self.0.place()?;
        let timeout = timeout(&request);
        let span = tracing::info_span!("execute", by = %caller);
        forge_cluster::tracing::set_parent(&span, &forge_cluster::tracing::from_metadata(request.metadata()));
        let ExecuteRequest { request_id, command_json } = request.into_inner();
        let command: Command = json("command_json", &command_json)?;
        access::may_execute(caller.role, &command).map_err(refuse)?;
        let submitted = async {
            let traceparent = forge_cluster::tracing::current_traceparent();
            self.0.coordinator.submit(Submission { request_id, traceparent, command }, timeout).await
        };
        let applied = submitted.instrument(span).await.map_err(refuse)?;
        Ok(Response::new(ExecuteReply { applied_json: to_json(&applied)? }))
    }

    async fn read(&self, request: Request<ReadRequest>) -> Result<Response<ReadReply>, Status> {
        let caller = self.0.caller(&request, &Role::ALL)?;
        let _place = self.0.place()?;
        let timeout = timeout(&request);
        let ReadRequest { kind, name, is_local } = request.into_inner();
        let kind = parse_kind(&kind)?;
        access::may_see(caller.role, kind).map_err(refuse)?;
        let name = (!name.is_empty()).then_some(name.as_str());
        let listing = self.0.coordinator.list(kind, name, is_local, timeout).await.map_err(refuse)?;
        let objects_json: Result<Vec<Bytes>, Status> = listing.objects.iter().map(to_json).collect();
        Ok(Response::new(ReadReply { revision: listing.revision.0, objects_json: objects_json? }))
    }

    type WatchStream = Answers<WatchBatch>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let caller = self.0.caller(&request, &Role::ALL)?;
        let full = |_| refuse(CoordinatorError::Busy { reason: "this coordinator has as many watchers as it takes".into() });
        let place = self.0.watches.clone().try_acquire_owned().map_err(full)?;
        let WatchRequest { after_revision, kinds } = request.into_inner();
        let wished = if kinds.is_empty() {
            KindSet::ALL
        } else {
            let kinds: Result<Vec<Kind>, Status> = kinds.iter().take(32).map(|kind| parse_kind(kind)).collect();
            let kinds = kinds?;
            for kind in &kinds {
                access::may_see(caller.role, *kind).map_err(refuse)?;
            }
            KindSet::of(&kinds)
        };
        let after = (after_revision > 0).then_some(Revision(after_revision));
        let watcher = self.0.coordinator.watcher(wished.and(access::visible(caller.role)), after);
        let ended = self.0.coordinator.in_contact().map_err(refuse)?.cancelled_owned();
        let batches = futures::stream::unfold((watcher, place), async |(mut watcher, place): (Watcher, _)| {
            let batch = watcher.next().await.into();
            Some((Ok(batch), (watcher, place)))
        });
        Ok(Response::new(Box::pin(batches.take_until(ended))))
    }

    async fn plan(&self, request: Request<PlanRequest>) -> Result<Response<PlanReply>, Status> {
        self.0.caller(&request, &[Role::Admin])?;
        let _place = self.0.place()?;
        let timeout = timeout(&request);
        let service: ModelService = json("service_json", &request.into_inner().service_json)?;
        let planned = self.0.coordinator.plan(service, timeout).await.map_err(refuse)?;
        Ok(Response::new(PlanReply { planned_json: to_json(&planned)? }))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusReply>, Status> {
        self.0.caller(&request, &Role::ALL)?;
        Ok(Response::new(StatusReply { status_json: to_json(&self.0.coordinator.group_status())? }))
    }

    async fn change_members(&self, request: Request<ChangeMembersRequest>) -> Result<Response<ChangeMembersReply>, Status> {
        let caller = self.0.caller(&request, &[Role::Admin])?;
        let _place = self.0.place()?;
        let timeout = timeout(&request);
        let change = match request.into_inner().change {
            Some(Change::RemoveId(id)) => GroupChange::Remove(id),
            Some(Change::TransferToId(id)) => GroupChange::Transfer(id),
            Some(Change::PromoteId(id)) => GroupChange::Promote(id),
            None => return Err(refuse(CoordinatorError::message("change", "say what is to change: remove, transfer to, promote"))),
        };
        tracing::info!(by = %caller, ?change, "the group is to change");
        self.0.coordinator.change_members(change, timeout).await.map_err(refuse)?;
        Ok(Response::new(ChangeMembersReply {}))
    }

    async fn begin_ca_rotation(&self, request: Request<BeginCaRotationRequest>) -> Result<Response<BeginCaRotationReply>, Status> {
        let caller = self.0.caller(&request, &[Role::Admin])?;
        let _place = self.0.place()?;
        let timeout = timeout(&request);
        let ca_sha256 = self.0.begin_ca_rotation(timeout).await.map_err(refuse)?;
        tracing::info!(by = %caller, ca = ca_sha256, "a new CA is introduced");
        Ok(Response::new(BeginCaRotationReply { ca_sha256 }))
    }

    type LoadsStream = Answers<LoadsReply>;

    async fn loads(&self, request: Request<LoadsRequest>) -> Result<Response<Self::LoadsStream>, Status> {
        self.0.caller(&request, &[Role::Admin, Role::Gateway])?;
        let full = |_| refuse(CoordinatorError::Busy { reason: "this coordinator has as many streams as it takes".into() });
        let place = self.0.watches.clone().try_acquire_owned().map_err(full)?;
        let interval = Duration::from_millis(request.into_inner().interval_ms.into()).clamp(MIN_LOADS_INTERVAL, MAX_LOADS_INTERVAL);
        let coordinator = self.0.coordinator.clone();
        // A follower has none: the caller learns at once where to ask.
        let ended = coordinator.leading().map_err(refuse)?.ended.clone().cancelled_owned();
        let loads = futures::stream::unfold((coordinator, place, true), move |(coordinator, place, is_first)| async move {
            if !is_first {
                tokio::time::sleep(interval).await;
            }
            let loads = coordinator.leading().map_err(refuse).and_then(|leading| to_json(&leading.sessions.loads(coordinator.now_ms())));
            Some((loads.map(|loads_json| LoadsReply { loads_json }), (coordinator, place, false)))
        });
        Ok(Response::new(Box::pin(loads.take_until(ended))))
    }

    type LogsStream = Answers<LogLine>;

    async fn logs(&self, request: Request<LogsRequest>) -> Result<Response<Self::LogsStream>, Status> {
        self.0.caller(&request, &[Role::Admin])?;
        let lines = super::logs::follow(&self.0, request.into_inner()).await?;
        Ok(Response::new(lines))
    }

    type BackupStream = Answers<BackupChunk>;

    async fn backup(&self, request: Request<BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        let caller = self.0.caller(&request, &[Role::Admin])?;
        let place = self.0.place()?;
        let bytes = self.0.coordinator.backup(timeout(&request)).await.map_err(refuse)?;
        tracing::info!(by = %caller, bytes = bytes.len(), "a backup is taken");
        let chunks = futures::stream::unfold((bytes, place), async |(mut rest, place): (Bytes, _)| {
            if rest.is_empty() {
                return None;
            }
            let data = rest.split_to(rest.len().min(BACKUP_CHUNK_BYTES));
            Some((Ok(BackupChunk { data }), (rest, place)))
        });
        Ok(Response::new(Box::pin(chunks)))
    }
}

pub(super) fn parse_kind(text: &str) -> Result<Kind, Status> {
    Ok(match text {
        "node" => Kind::Node,
        "service" => Kind::Service,
        "key" => Kind::Key,
        "member" => Kind::Member,
        "token" => Kind::Token,
        "notice" => Kind::Notice,
        "certificate" => Kind::Certificate,
        "trust" => Kind::Trust,
        other => {
            let shown: String = other.chars().take(40).collect();
            let reason = format!("{shown:?} is none of node, service, key, member, token, notice, certificate, trust");
            return Err(refuse(CoordinatorError::Message { field: "kind", reason }));
        }
    })
}
