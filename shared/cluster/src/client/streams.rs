//! Calls that go on: watches, loads, sessions.

use std::sync::Arc;
use std::time::Duration;

use forge_proto::cluster::{LoadsReply, LoadsRequest, WatchBatch, WatchRequest};
use forge_proto::node::{SessionDown, SessionUp};
use forge_shared::cluster::Revision;
use forge_shared::cluster::event::{Event, Kind};
use forge_shared::cluster::node::NodeSpec;
use forge_shared::cluster::session::{NodeDown, NodeUp};
use futures::StreamExt;
use tokio::sync::mpsc;
use tonic::{Request, Status, Streaming};

use super::calls::{Patience, jittered};
use super::channels::Channels;
use super::{from_json, kind_name, to_json};
use crate::api::{ClusterError, ClusterLoads, STREAM_DEPTH, Session, WatchItem};
use crate::status::why_broken;

/// One look for a coordinator that takes a stream; they go on for ever, look after look.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Where a watcher stands.
#[derive(Debug, Clone, Copy, Default)]
pub struct Position {
    /// The revision that it has seen everything of.
    pub after: u64,
    /// In the middle of a listing of everything there is; a new stream begins without.
    pub in_listing: bool,
}

pub(super) fn watch(channels: Arc<Channels>, kinds: Vec<Kind>, after: Option<Revision>) -> mpsc::Receiver<WatchItem> {
    let (items, received) = mpsc::channel(STREAM_DEPTH);
    tokio::spawn(async move {
        let kinds: Vec<String> = match kinds.into_iter().map(kind_name).collect() {
            Ok(kinds) => kinds,
            Err(error) => return ::tracing::error!(%error, "cannot watch"),
        };
        let mut position = Position { after: after.unwrap_or_default().0, in_listing: false };
        let mut pause = FIRST_PAUSE;
        while !items.is_closed() {
            let request = WatchRequest { after_revision: position.after, kinds: kinds.clone() };
            let opened = channels
                .call(Patience::reading(LOOK_TIMEOUT), |mut client, request| async move { client.watch(untimed(request)).await }, request)
                .await;
            let error = match opened {
                Ok(batches) => {
                    position.in_listing = false;
                    let (got_any, error) = relay_watch(batches, &mut position, &items).await;
                    if got_any {
                        pause = FIRST_PAUSE;
                    }
                    error
                }
                Err(error) => error,
            };
            if items.is_closed() {
                return;
            }
            ::tracing::debug!(%error, after = position.after, "a watch broke off; it resumes");
            rest(&mut pause, items.closed()).await;
        }
    });
    received
}

/// Gives batches on until the stream or the reader ends; whether there were any.
async fn relay_watch(mut batches: Streaming<WatchBatch>, position: &mut Position, items: &mpsc::Sender<WatchItem>) -> (bool, ClusterError) {
    let mut got_any = false;
    loop {
        let batch = tokio::select! {
            batch = batches.next() => batch,
            () = items.closed() => return (got_any, ended("the reader is gone")),
        };
        let batch = match batch {
            Some(Ok(batch)) => batch,
            Some(Err(status)) => return (got_any, broken(&status)),
            None => return (got_any, ended("the coordinator ended it")),
        };
        got_any = true;
        let events = match watch_items(batch, position) {
            Ok(events) => events,
            Err(error) => {
                // What cannot be read now cannot be read later either, but another coordinator may be of our version.
                ::tracing::error!(%error, "a watch cannot be read");
                return (false, error);
            }
        };
        for item in events {
            if items.send(item).await.is_err() {
                return (got_any, ended("the reader is gone"));
            }
        }
    }
}

/// What a batch says, and where it leaves the watcher.
///
/// # Errors
/// [`ClusterError::Protocol`]: it cannot be read.
pub fn watch_items(batch: WatchBatch, position: &mut Position) -> Result<Vec<WatchItem>, ClusterError> {
    let mut items = Vec::with_capacity(batch.events_json.len() + 2);
    if batch.is_reset {
        items.push(WatchItem::Reset);
    }
    position.in_listing = (position.in_listing || batch.is_reset) && !batch.is_reset_end;
    for event in &batch.events_json {
        items.push(WatchItem::Event(from_json::<Event>("event", event)?));
    }
    if !position.in_listing {
        position.after = batch.revision;
        items.push(WatchItem::Current(Revision(batch.revision)));
    }
    Ok(items)
}

pub(super) fn loads(channels: Arc<Channels>, interval: Duration) -> mpsc::Receiver<ClusterLoads> {
    let (items, received) = mpsc::channel(4);
    tokio::spawn(async move {
        let interval_ms = u32::try_from(interval.as_millis()).unwrap_or(u32::MAX);
        let mut pause = FIRST_PAUSE;
        while !items.is_closed() {
            let request = LoadsRequest { interval_ms };
            let opened = channels
                .call(Patience::reading(LOOK_TIMEOUT), |mut client, request| async move { client.loads(untimed(request)).await }, request)
                .await;
            let error = match opened {
                Ok(replies) => {
                    let (got_any, error) = relay_loads(replies, &items).await;
                    if got_any {
                        pause = FIRST_PAUSE;
                    }
                    error
                }
                Err(error) => error,
            };
            ::tracing::debug!(%error, "loads broke off");
            rest(&mut pause, items.closed()).await;
        }
    });
    received
}

async fn relay_loads(mut replies: Streaming<LoadsReply>, items: &mpsc::Sender<ClusterLoads>) -> (bool, ClusterError) {
    let mut got_any = false;
    loop {
        let reply = tokio::select! {
            reply = replies.next() => reply,
            () = items.closed() => return (got_any, ended("the reader is gone")),
        };
        let loads = match reply {
            Some(Ok(reply)) => from_json("loads", &reply.loads_json),
            Some(Err(status)) => Err(broken(&status)),
            None => Err(ended("the coordinator ended it")),
        };
        match loads {
            Ok(loads) => {
                if items.send(loads).await.is_err() {
                    return (got_any, ended("the reader is gone"));
                }
                got_any = true;
            }
            Err(error) => return (got_any, error),
        }
    }
}

/// Begins a session with the leader: looks for it until `timeout`.
pub(super) async fn session(channels: Arc<Channels>, hello: NodeSpec, timeout: Duration) -> Result<Session, ClusterError> {
    let hello = to_json(&NodeUp::Hello { spec: Box::new(hello) })?;
    let attempt = |address: String, _| {
        let (client, hello) = (channels.nodes(&address), hello.clone());
        async move { begin_session(client?, hello).await.map(|begun| (address, begun)) }
    };
    // A session that began and was lost leaves nothing behind but a lease that runs out.
    let (address, (first, down, up)) = channels.attempts(Patience::reading(timeout), attempt).await?;
    let (received, receiver) = mpsc::channel(STREAM_DEPTH);
    tokio::spawn(async move {
        relay_session(first, down, received).await;
        // It fell silent, broke off or leads no more: the next look begins with the others.
        channels.demote(&address);
    });
    Ok(Session { up, down: receiver })
}

type Begun = (NodeDown, Streaming<SessionDown>, mpsc::Sender<NodeUp>);

async fn begin_session(
    mut client: forge_proto::node::nodes_client::NodesClient<tonic::transport::Channel>,
    hello: bytes::Bytes,
) -> Result<Begun, Status> {
    let (up, messages) = mpsc::channel::<NodeUp>(STREAM_DEPTH);
    let first = futures::stream::iter([SessionUp { message_json: hello }]);
    let rest = futures::stream::unfold(messages, |mut messages| async {
        let message = messages.recv().await?;
        match serde_json::to_vec(&message) {
            Ok(json) => Some((SessionUp { message_json: json.into() }, messages)),
            Err(error) => {
                ::tracing::error!(%error, "a message cannot be written: the session ends");
                None
            }
        }
    });
    let mut request = Request::new(first.chain(rest));
    crate::tracing::inject(request.metadata_mut());
    let mut down = client.session(request).await?.into_inner();
    let answer = down.next().await.unwrap_or_else(|| Err(Status::unavailable("the session ended before it began")))?;
    match from_json("session", &answer.message_json).map_err(|error| crate::status::to_status(&error, None))? {
        NodeDown::Moved { leader } => {
            let error = ClusterError::Unavailable { waited_ms: 0, reason: "this coordinator does not lead".into() };
            Err(crate::status::to_status(&error, leader.as_deref()))
        }
        first => Ok((first, down, up)),
    }
}

async fn relay_session(first: NodeDown, mut down: Streaming<SessionDown>, received: mpsc::Sender<NodeDown>) {
    let mut next = Ok(first);
    loop {
        match next {
            Ok(message) => {
                if received.send(message).await.is_err() {
                    return;
                }
            }
            Err(error) => return ::tracing::warn!(error = why_broken(&error), "the session with the coordinator ended"),
        }
        let message = tokio::select! {
            message = down.next() => message,
            () = received.closed() => return,
        };
        next = match message {
            Some(Ok(message)) => from_json("session", &message.message_json),
            Some(Err(status)) => Err(broken(&status)),
            None => return,
        };
    }
}

/// A stream's request: the time of a try bounds its beginning, not its life.
pub(super) fn untimed<T>(mut request: Request<T>) -> Request<T> {
    request.metadata_mut().remove("grpc-timeout");
    request
}

async fn rest(pause: &mut Duration, closed: impl Future<Output = ()>) {
    tokio::select! {
        () = tokio::time::sleep(jittered(*pause)) => {}
        () = closed => {}
    }
    *pause = (*pause * 2).min(LONGEST_PAUSE);
}

fn ended(reason: &str) -> ClusterError {
    ClusterError::Unavailable { waited_ms: 0, reason: reason.into() }
}

fn broken(status: &Status) -> ClusterError {
    crate::status::from_status(status, super::channels::EXPECTED).error
}
