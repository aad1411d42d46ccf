//! From flags, variables and contexts to a connection.

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use forge_cluster::api::ClusterApi;
use forge_cluster::client::{RemoteCluster, believe};
use forge_cluster::tls::SharedCredentials;
use forge_shared::cluster::event::{Kind, Object};
use uuid::Uuid;

use super::certs::read_trust;
use super::contexts::{ContextStore, LOCAL_CONTEXT, is_local};
use crate::cli::cluster::ServerArgs;
use crate::failure::{Exit, Failure, Result};
use crate::runtime;

/// Longest wait for one answer: a new leader is there long before.
pub const TIMEOUT: Duration = Duration::from_secs(15);

/// Longest wait for what a command does not need itself.
pub const LEARN_TIMEOUT: Duration = Duration::from_secs(2);

/// The cluster that is meant: `--context`, the current context, or the one of a `forgectl serve` on this machine;
/// `--server` gives other addresses for the same certificate.
///
/// # Errors
/// If no cluster is known, or its certificate cannot be used.
pub fn connect(store: &ContextStore, args: &ServerArgs) -> Result<RemoteCluster> {
    let name = context(store, args)?;
    if is_local(&name) && args.server.is_empty() && !store.living_local()?.contains(&name) {
        return Err(not_running(&name));
    }
    let known = store.get(&name)?;
    let servers = if args.server.is_empty() { &known.servers } else { &args.server };
    Ok(RemoteCluster::new(servers, &SharedCredentials::new(known.credentials))?)
}

/// Name of the context that is meant.
fn context(store: &ContextStore, args: &ServerArgs) -> Result<String> {
    Ok(match &args.context {
        Some(name) => name.clone(),
        None => match store.current()? {
            Some(name) => name,
            // Of several, the one that began first.
            None => store.living_local()?.into_iter().next().unwrap_or_else(|| LOCAL_CONTEXT.to_owned()),
        },
    })
}

fn not_running(name: &str) -> Failure {
    let what = if name == LOCAL_CONTEXT {
        "no cluster runs in a `forgectl serve` on this machine, and no other one is chosen".to_owned()
    } else {
        format!("the `forgectl serve` with the context {name} does not run")
    };
    Failure::new(what).exit(Exit::LostContact).help(
        "start one with `forgectl serve`; `forgectl context use NAME` chooses another, `forgectl context add` remembers one, \
         `forgectl cluster init` makes one",
    )
}

/// Keeps the addresses of the coordinators of now with the context, so that the next command finds one though those it was
/// made with are gone. What cannot be learned or kept changes nothing.
async fn learn(store: &ContextStore, args: &ServerArgs, cluster: &RemoteCluster) {
    let Ok(name) = context(store, args) else { return };
    let Ok(status) = cluster.status(LEARN_TIMEOUT).await else { return };
    let servers: Vec<String> = status.members.into_iter().map(|member| member.address).filter(|address| !address.is_empty()).collect();
    if let Err(failure) = store.learn(&name, &servers) {
        tracing::debug!(%failure, "the coordinators' addresses are not kept");
    }
}

/// Keeps the context's certificate and its CAs fresh: who uses it now and then never needs another, also over a change of the
/// CA. What fails does not fail the command, and is told each time.
pub async fn freshen(args: &ServerArgs, cluster: &RemoteCluster) {
    let kept = async {
        let store = ContextStore::open()?;
        let folder = store.folder_of(&context(&store, args)?);
        let credentials = cluster.credentials();
        if is_renewal_due(cluster, &folder).await? || credentials.clock().now_s() >= credentials.get().renew_at_s() {
            let renewed = cluster.renew(LEARN_TIMEOUT).await?;
            credentials.keep(renewed, &folder)?;
            cluster.confirm(LEARN_TIMEOUT).await?;
        }
        Ok::<_, Failure>(())
    };
    if let Err(failure) = kept.await {
        let days = cluster.credentials().left_s() / (24 * 3600);
        eprintln!("warning: your certificate ends in {days} days and could not be renewed: {failure}");
    }
}

/// Takes over which CAs are believed; whether a change of the CA waits for this operator's next certificate.
async fn is_renewal_due(cluster: &RemoteCluster, folder: &Path) -> Result<bool> {
    let trust = match read_trust(cluster, LEARN_TIMEOUT).await {
        Ok(trust) => trust,
        // A coordinator of an older version, which has no CAs to change.
        Err(failure) => {
            tracing::debug!(%failure, "which CAs are believed was not told");
            return Ok(false);
        }
    };
    let credentials = cluster.credentials();
    believe(credentials, &trust, folder)?;
    if trust.rotation.is_none() {
        return Ok(false);
    }
    let serial = credentials.get().serial()?;
    let record = cluster.read(Kind::Certificate, Some(serial), LEARN_TIMEOUT).await?.objects.into_iter().next();
    let Some(Object::Certificate(record)) = record else { return Ok(true) };
    if !record.is_used {
        cluster.confirm(LEARN_TIMEOUT).await?;
    }
    let believes_all = trust.cas.iter().all(|ca| record.believes.contains(&ca.sha256));
    Ok(!believes_all || trust.signing().is_some_and(|ca| ca.sha256 != record.ca_sha256))
}

/// Runs a command against the cluster that is meant. Ctrl-C ends it.
///
/// # Errors
/// The command's own.
pub fn with_cluster<T, F: Future<Output = Result<T>>>(args: &ServerArgs, work: impl FnOnce(RemoteCluster) -> F) -> Result<T> {
    let store = ContextStore::open()?;
    let runtime = runtime::start()?;
    runtime.block_on(async {
        let cluster = connect(&store, args)?;
        let done = tokio::select! {
            done = work(cluster.clone()) => done,
            () = runtime::interrupt() => Err(Failure::new("stopped")),
        };
        if done.is_ok() {
            learn(&store, args, &cluster).await;
            freshen(args, &cluster).await;
        }
        done
    })
}

/// A request id for one command.
pub fn request_id() -> String {
    format!("forgectl-{}", Uuid::new_v4())
}
