//! The service that `forgectl serve` was started for: waited for until it answers, and watched from then on.
//!
//! It decides one thing, which a cluster leaves open: when the process has nothing left to live for. Other services, and this
//! one once an operator changed or deleted it, are the operator's matter and end nothing.

use std::collections::BTreeSet;
use std::time::Duration;

use forge_cluster::api::WatchItem;
use forge_gateway::cluster::ClusterMember;
use forge_model::LoadProgress;
use forge_shared::cluster::event::{Change, Kind, Object};
use forge_shared::cluster::service::{Facts as KnownFacts, ReplicaPhase, ReplicaReport};
use forge_shared::ids::Epoch;
use forge_shared::link::EngineLink;
use forge_shared::spec::ModelService;
use forge_store::ResolvedModel;
use forge_worker::WorkerError;
use forge_worker::agent::RunId;
use forge_worker::prepare::PreparedModel;
use tokio::sync::mpsc;

use super::Embedded;
use crate::banner::{Facts, Shown};
use crate::failure::{Failure, Result};
use crate::loading::watched;
use crate::replica::{failed, not_placeable};

/// What a service begins with.
pub struct Beginning {
    /// Where it runs.
    pub cluster: Embedded,
    /// The gateway's tie to it.
    pub member: ClusterMember,
    /// Its model, opened.
    pub prepared: PreparedModel,
    /// Held, so that the store keeps the files.
    pub model: ResolvedModel,
}

/// See the module documentation.
pub struct ServedService {
    parts: Beginning,
    changes: mpsc::Receiver<WatchItem>,
    name: String,
    /// Of the wish as this process made it.
    generation: u64,
    /// Runs that were ready and have not ended since.
    alive: BTreeSet<(String, Epoch)>,
}

impl ServedService {
    /// Wishes for it, and waits until the gateway knows.
    ///
    /// # Errors
    /// A wish that the cluster does not take.
    pub async fn begin(service: &ModelService, parts: Beginning) -> Result<Self> {
        let name = service.metadata.name.clone();
        let generation = parts.cluster.apply(service).await?;
        let changes = parts.cluster.api().watch(vec![Kind::Service], None);
        parts.member.publishes(&name, |_| true).await;
        Ok(ServedService { parts, changes, name, generation, alive: BTreeSet::new() })
    }

    /// Waits until as many replicas as are wished answer, and shows how far loading is.
    ///
    /// # Errors
    /// One of them cannot be loaded, or there is no room.
    pub async fn ready(&mut self) -> Result<()> {
        let (name, progress): (String, LoadProgress) = (self.name.clone(), self.parts.prepared.progress.clone());
        watched(&name, || progress.bytes(), self.answers()).await
    }

    async fn answers(&mut self) -> Result<()> {
        loop {
            let Beginning { cluster, member, .. } = &mut self.parts;
            tokio::select! {
                () = member.publishes(&self.name, |published| published.wished > 0 && published.served >= published.wished) => return Ok(()),
                report = cluster.report() => self.judge(&report?).await?,
                Some(item) = self.changes.recv() => self.judge_change(item)?,
            }
        }
    }

    /// Waits until it is dead for good; never returns while it runs, is being restarted, or is the operator's matter.
    pub async fn failed(&mut self) -> Failure {
        loop {
            let judged = match self.parts.cluster.report().await {
                Ok(report) => self.judge(&report).await,
                Err(failure) => Err(failure),
            };
            if let Err(failure) = judged {
                return failure;
            }
        }
    }

    /// What is worth showing of it.
    ///
    /// # Errors
    /// The coordinator does not answer, or there is nothing.
    pub async fn shown(&self) -> Result<Shown> {
        let Beginning { cluster, prepared, .. } = &self.parts;
        let gone = || Failure::new(format!("{} was deleted before it was ready", self.name));
        let record = cluster.service(&self.name).await?.ok_or_else(gone)?;
        let board = cluster.board();
        let running = record.replicas.iter().find_map(|replica| Some((&replica.plan, board.get(&RunId::of(&replica.plan))?)));
        let (plan, link) = running.ok_or_else(gone)?;
        Ok(Shown {
            card: link.card(),
            has_chat: prepared.text.chat_template().is_ok(),
            plan: plan.clone(),
            replicas: record.service.spec.replicas,
            facts: Facts::of(prepared),
            context: cluster.context().to_owned(),
        })
    }

    /// Ends everything, letting requests under way finish within `timeout`. Bounded.
    pub async fn end(self, timeout: Duration) {
        let Beginning { cluster, member, model, .. } = self.parts;
        drop(member);
        cluster.end(timeout).await;
        drop(model);
    }

    async fn judge(&mut self, report: &ReplicaReport) -> Result<()> {
        if report.replica.service.0 != self.name {
            return Ok(());
        }
        let run = (report.replica.to_string(), report.epoch);
        match report.status.phase {
            ReplicaPhase::Ready => drop(self.alive.insert(run)),
            ReplicaPhase::Stopped => drop(self.alive.remove(&run)),
            ReplicaPhase::Failed => {
                self.alive.remove(&run);
                if self.alive.is_empty() && self.is_as_begun().await? {
                    return Err(failed(WorkerError::GivenUp { replica: run.0, reason: report.status.reason.clone() }));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether the wish is still the one that this process made.
    async fn is_as_begun(&self) -> Result<bool> {
        let record = self.parts.cluster.service(&self.name).await?;
        Ok(record.is_some_and(|record| !record.is_deleted && record.generation == self.generation))
    }

    /// What the cluster says that no replica will.
    fn judge_change(&self, item: WatchItem) -> Result<()> {
        let WatchItem::Event(event) = item else { return Ok(()) };
        let Change::Put { object: Object::Service(record) } = event.change else { return Ok(()) };
        if record.service.metadata.name != self.name || record.generation != self.generation {
            return Ok(());
        }
        match (record.refusal, record.facts) {
            (Some(refusal), _) => Err(not_placeable(refusal)),
            (None, KnownFacts::Failed { reason }) => Err(Failure::new(reason)),
            (None, _) => Ok(()),
        }
    }
}
