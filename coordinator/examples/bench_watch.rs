//! How long an event takes to reach every watcher of one coordinator, and what an idle watcher costs.
//!
//! `cargo run --release -p forge-coordinator --example bench_watch -- [WATCHERS] [EVENTS]` (10,000 and 20 unless told).
//! First without sockets: streams whose batches are encoded for the wire. Then over gRPC and mTLS against a coordinator in
//! this process, [`STREAMS`] watches on a connection; its memory and time are those of both ends.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use forge_cluster::api::ClusterApi;
use forge_cluster::tls::{ChannelOptions, ClusterCa, Credentials, Identity, NODE_LIFETIME, NodeKey, PeerName, SharedCredentials, channel};
use forge_coordinator::watch::{HistoryBounds, Hub, KindSet, See, Source, Watcher};
use forge_coordinator::{RunOptions, prepare};
use forge_proto::cluster::cluster_client::ClusterClient;
use forge_proto::cluster::{WatchBatch, WatchRequest};
use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{Command, JoinToken};
use forge_shared::cluster::event::{Change, Notice, Object};
use forge_shared::cluster::node::Role;
use futures::{Stream, StreamExt};
use parking_lot::Mutex;
use prost::Message;
use tokio_util::sync::CancellationToken;

/// A state of notices, published under its lock.
struct World(Mutex<(Revision, Vec<Notice>)>);

impl Source for World {
    fn visit(&self, see: &mut See<'_>) {
        let held = self.0.lock();
        see(held.0, &|| held.1.iter().cloned().map(Object::Notice).collect());
    }
}

impl World {
    fn write(&self, hub: &Hub) {
        let mut held = self.0.lock();
        held.0.0 += 1;
        let notice = Notice {
            number: held.0.0,
            revision: held.0,
            at_ms: 0,
            is_warning: false,
            reason: "Bench".into(),
            about: "service/bench".into(),
            message: "x".repeat(500),
        };
        held.1 = vec![notice.clone()];
        hub.publish(held.0, vec![Change::Put { object: Object::Notice(notice) }]);
    }
}

type Answers = Pin<Box<dyn Stream<Item = WatchBatch> + Send>>;

fn stream(watcher: Watcher) -> Answers {
    Box::pin(futures::stream::unfold(watcher, async |mut watcher: Watcher| {
        let batch = watcher.next().await;
        let batch = WatchBatch {
            revision: batch.revision.0,
            events_json: batch.events.iter().map(|event| event.json.clone()).collect(),
            is_reset: batch.is_reset,
            is_reset_end: batch.is_reset_end,
        };
        Some((batch, watcher))
    }))
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * 4096
}

#[tokio::main]
async fn main() {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default: usize| arguments.next().and_then(|text| text.parse().ok()).unwrap_or(default);
    let (watchers, events) = (number(10_000), number(20));
    without_sockets(watchers, events).await;
    over_grpc(watchers, events).await;
}

/// Watches on one connection.
const STREAMS: usize = 1000;

async fn over_grpc(watchers: usize, events: usize) {
    let folder = tempfile::tempdir().expect("a folder");
    let now_s = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_secs();
    let ca = ClusterCa::create("bench", now_s).expect("a CA");
    let credentials = |role, name: &str| {
        let key = NodeKey::generate().expect("a key");
        let identity = Identity::new("bench", role, name).expect("a name");
        let request = key.signing_request_der().expect("a request");
        let certificate = ca.sign(&request, &identity, NODE_LIFETIME, now_s).expect("signed");
        Credentials::from_pem(&certificate, &key.pem(), ca.certificate_pem()).expect("whole")
    };
    let tls_dir = folder.path().join("tls");
    ca.save(&tls_dir).expect("saved");
    credentials(Role::Coordinator, "c1").save(&tls_dir).expect("saved");
    let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a free port");
    let options = RunOptions {
        name: "c1".into(),
        listen: free,
        address: free.to_string(),
        metrics: "127.0.0.1:0".parse().expect("an address"),
        data_dir: folder.path().join("data"),
        tls_dir,
        founds_group: true,
        join_token: None,
        lease: Duration::from_secs(3),
        heartbeat: Duration::from_millis(500),
    };
    let prepared = prepare(options).await.expect("it starts");
    let coordinator = prepared.coordinator().clone();
    tokio::spawn(prepared.run(std::future::pending()));
    while coordinator.readiness().is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let identity = SharedCredentials::new(credentials(Role::Admin, "operator"));
    // Both ends share this machine: a late answer is no dead connection here.
    let patient = ChannelOptions { keep_alive_timeout: Duration::from_secs(60), ..ChannelOptions::default() };
    let connect = || channel(&free.to_string(), &PeerName::Any(Role::Coordinator), &identity, patient);
    let seen = Arc::new(AtomicUsize::new(0));
    let before = resident_bytes();
    for _ in 0..watchers.div_ceil(STREAMS) {
        let client = ClusterClient::new(connect().expect("a channel"));
        for _ in 0..STREAMS.min(watchers) {
            let (mut client, seen) = (client.clone(), seen.clone());
            tokio::spawn(async move {
                let request = WatchRequest { after_revision: 0, kinds: vec!["token".into()] };
                let mut batches = client.watch(request).await.expect("a watch").into_inner();
                while let Ok(Some(batch)) = batches.message().await {
                    seen.fetch_add(batch.events_json.len() + usize::from(batch.is_reset_end), Ordering::Relaxed);
                }
            });
        }
    }
    let watchers = watchers.div_ceil(STREAMS) * STREAMS.min(watchers);
    wait_for(&seen, watchers).await;
    let per_watcher = resident_bytes().saturating_sub(before) / watchers as u64;
    println!("over gRPC: {watchers} watchers, {per_watcher} bytes of memory each, both ends together");
    let mut times = Vec::new();
    for event in 0..events {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let token = JoinToken {
            id: format!("t{event}"),
            secret_sha256: "0".repeat(64),
            role: Role::Worker,
            expires_ms: (now_s + 3600) * 1000,
            uses_left: 1,
        };
        let began = Instant::now();
        let command = Command::PutJoinToken { token };
        ClusterApi::execute(&coordinator, format!("bench-{event}"), command, Duration::from_secs(10)).await.expect("applied");
        wait_for(&seen, watchers * (event + 2)).await;
        times.push(began.elapsed());
    }
    report(&mut times);
}

fn report(times: &mut [Duration]) {
    times.sort();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    println!("an event reached all of them in {:.1} ms (median), {:.1} ms (worst of {})", ms(median), ms(worst), times.len());
}

async fn without_sockets(watchers: usize, events: usize) {
    let hub = Hub::new(HistoryBounds::default(), Revision(0));
    tokio::spawn(hub.clone().run(CancellationToken::new()));
    let world = Arc::new(World(Mutex::new((Revision(0), Vec::new()))));
    let seen = Arc::new(AtomicUsize::new(0));
    let encoded_bytes = Arc::new(AtomicUsize::new(0));

    let before = resident_bytes();
    for _ in 0..watchers {
        let mut batches = stream(hub.watch(world.clone(), KindSet::ALL, None));
        let (seen, encoded_bytes) = (seen.clone(), encoded_bytes.clone());
        tokio::spawn(async move {
            while let Some(batch) = batches.next().await {
                let bytes = batch.encode_to_vec().len();
                encoded_bytes.fetch_add(bytes, Ordering::Relaxed);
                seen.fetch_add(batch.events_json.len() + usize::from(batch.is_reset_end), Ordering::Relaxed);
            }
        });
    }
    wait_for(&seen, watchers).await;
    let per_watcher = resident_bytes().saturating_sub(before) / watchers as u64;
    println!("{watchers} watchers, {per_watcher} bytes of memory each (idle, without sockets)");

    let mut times = Vec::new();
    for event in 0..events {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let began = Instant::now();
        world.write(&hub);
        wait_for(&seen, watchers * (event + 2)).await;
        times.push(began.elapsed());
    }
    report(&mut times);
    println!("{} bytes written for the wire", encoded_bytes.load(Ordering::Relaxed));
}

async fn wait_for(seen: &AtomicUsize, count: usize) {
    while seen.load(Ordering::Relaxed) < count {
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
}
