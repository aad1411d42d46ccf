//! How long an event takes to reach every watcher of one coordinator, and what an idle watcher costs it.
//!
//! `cargo run --release -p forge-coordinator --example bench_watch -- [WATCHERS] [EVENTS] [STREAMS ...]` (10,000 and 20 unless
//! told; 1,000 streams on a connection, and then one). First without sockets: streams whose batches are encoded for the
//! wire. Then over gRPC and mTLS against a coordinator in a process of its own: memory is the coordinator's alone, time is
//! from the command to the last watcher, and includes what the clients need to read it on the same machine.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::pin::Pin;
use std::process::{Child, Command as Process, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use forge_cluster::tls::{ChannelOptions, ClusterCa, Credentials, Identity, NODE_LIFETIME, NodeKey, PeerName, SharedCredentials, channel};
use forge_coordinator::watch::{HistoryBounds, Hub, KindSet, See, Source, Watcher};
use forge_coordinator::{CertificateOptions, RunOptions, Surroundings, prepare};
use forge_proto::cluster::cluster_client::ClusterClient;
use forge_proto::cluster::{ExecuteRequest, WatchBatch, WatchRequest};
use forge_shared::cluster::Revision;
use forge_shared::cluster::command::{Command, JoinToken};
use forge_shared::cluster::event::{Change, Notice, Object};
use forge_shared::cluster::node::Role;
use futures::{Stream, StreamExt};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Watches that are being opened at once.
const OPENING: usize = 64;
/// All of them must have been opened, and an event must have reached all, by then.
const PATIENCE: Duration = Duration::from_secs(300);

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

/// Bytes of memory that a process holds.
fn resident_bytes(pid: u32) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let pages: u64 = statm.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    pages * 4096
}

/// Time on processors that a process has had, in ms (the kernel counts in steps of 10).
fn cpu_ms(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default();
    fields.split_whitespace().skip(11).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum::<u64>() * 10
}

fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

#[tokio::main]
async fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [role, folder, listen] = arguments.as_slice()
        && role == "serve"
    {
        return serve(Path::new(folder), listen.parse()?).await;
    }
    let numbers = arguments.iter().map(|text| text.parse()).collect::<Result<Vec<usize>, _>>()?;
    let (watchers, events) = (numbers.first().copied().unwrap_or(10_000), numbers.get(1).copied().unwrap_or(20));
    without_sockets(watchers, events).await?;
    for streams in numbers.get(2..).filter(|streams| !streams.is_empty()).unwrap_or(&[1000, 1]) {
        over_grpc(watchers, events, *streams).await?;
    }
    Ok(())
}

/// The coordinator's process: until its input ends.
async fn serve(folder: &Path, listen: SocketAddr) -> Result<(), Failure> {
    let options = RunOptions {
        name: "c1".into(),
        listen,
        address: listen.to_string(),
        metrics: None,
        data_dir: folder.join("data"),
        tls_dir: folder.join("tls"),
        founds_group: true,
        join_token: None,
        lease: Duration::from_secs(3),
        heartbeat: Duration::from_millis(500),
        surroundings: Surroundings::default(),
        certificates: CertificateOptions::default(),
        build: Default::default(),
    };
    let prepared = prepare(options).await?;
    let coordinator = prepared.coordinator().clone();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let served = tokio::spawn(prepared.run(async { drop(stopped.await) }));
    while coordinator.readiness().is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    println!("ready");
    tokio::task::spawn_blocking(|| std::io::stdin().lines().for_each(drop)).await?;
    drop(stop);
    Ok(served.await??)
}

/// The coordinator's process, ended when this goes.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

async fn over_grpc(watchers: usize, events: usize, streams: usize) -> Result<(), Failure> {
    let folder = tempfile::tempdir()?;
    let now_s = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    let ca = ClusterCa::create("bench", now_s)?;
    let credentials = |role, name: &str| {
        let key = NodeKey::generate()?;
        let certificate = ca.sign(&key.signing_request_der()?, &Identity::new("bench", role, name)?, NODE_LIFETIME, now_s)?;
        Credentials::from_pem(&certificate, &key.pem(), ca.certificate_pem())
    };
    let tls_dir = folder.path().join("tls");
    ca.save(&tls_dir)?;
    credentials(Role::Coordinator, "c1")?.save(&tls_dir)?;
    let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
    let mut server = Process::new(std::env::current_exe()?)
        .args([Path::new("serve"), folder.path(), Path::new(&address.to_string())])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let output = server.stdout.take().ok_or("no output")?;
    let server = Server(server);
    let pid = server.0.id();
    BufReader::new(output).lines().next().ok_or("the coordinator did not start")??;

    let identity = SharedCredentials::new(credentials(Role::Admin, "operator")?);
    // Both ends share this machine: a late answer is no dead connection here.
    let patient = ChannelOptions {
        connect_timeout: Duration::from_secs(20),
        keep_alive_interval: Duration::from_secs(60),
        keep_alive_timeout: Duration::from_secs(60),
    };
    let connect = || channel(&address.to_string(), &PeerName::Any(Role::Coordinator), &identity, patient);
    let mut operator = ClusterClient::new(connect()?);
    let mut apply = async |name: String| {
        let token = JoinToken {
            id: name.clone(),
            secret_sha256: "0".repeat(64),
            role: Role::Worker,
            expires_ms: (now_s + 3600) * 1000,
            uses_left: 1,
        };
        let command_json = serde_json::to_vec(&Command::PutJoinToken { token })?.into();
        operator.execute(ExecuteRequest { request_id: name, command_json }).await?;
        Ok::<_, Failure>(())
    };
    apply("first".into()).await?;
    let seen = Arc::new(AtomicUsize::new(0));
    let (before, opening) = (resident_bytes(pid), Arc::new(Semaphore::new(OPENING)));
    let mut client = None;
    // Dropped before the coordinator is: none of them outlives it.
    let mut watches = tokio::task::JoinSet::new();
    for number in 0..watchers {
        if number % streams == 0 {
            client = Some(ClusterClient::new(connect()?));
        }
        let (client, seen) = (client.clone().ok_or("no client")?, seen.clone());
        let place = opening.clone().acquire_owned().await?;
        watches.spawn(async move {
            if let Err(error) = watch(client, &seen, place).await {
                eprintln!("a watch ended: {error}");
            }
        });
    }
    wait_for(&seen, 2 * watchers).await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let per_watcher = resident_bytes(pid).saturating_sub(before) / watchers as u64;
    let connections = watchers.div_ceil(streams);
    println!("over gRPC, {watchers} watchers on {connections} connections: {per_watcher} bytes of the coordinator's memory each (idle)");
    let (mut times, cpu_before) = (Vec::new(), (cpu_ms(pid), cpu_ms(std::process::id())));
    for event in 0..events {
        tokio::time::sleep(Duration::from_millis(200)).await;
        let began = Instant::now();
        apply(format!("event-{event}")).await?;
        wait_for(&seen, watchers * (event + 3)).await?;
        times.push(began.elapsed());
    }
    let cpu = (cpu_ms(pid) - cpu_before.0, cpu_ms(std::process::id()) - cpu_before.1);
    report(&mut times);
    let each = |ms: u64| ms as f64 / events as f64;
    println!("processor time per event: coordinator {:.0} ms, all clients {:.0} ms; load {}", each(cpu.0), each(cpu.1), load());
    let after = resident_bytes(pid).saturating_sub(before) / watchers as u64;
    println!("after {events} events: {after} bytes each");
    watches.shutdown().await;
    Ok(())
}

/// Counts what a watcher sees: the end of its listing, and events.
async fn watch(
    mut client: ClusterClient<tonic::transport::Channel>,
    seen: &AtomicUsize,
    place: tokio::sync::OwnedSemaphorePermit,
) -> Result<(), Failure> {
    let request = WatchRequest { after_revision: 0, kinds: vec!["token".into()] };
    let mut batches = client.watch(request).await?.into_inner();
    let mut place = Some(place);
    while let Some(batch) = batches.message().await? {
        seen.fetch_add(batch.events_json.len() + usize::from(batch.is_reset_end), Ordering::Relaxed);
        place.take();
    }
    Err("the coordinator closed it".into())
}

fn report(times: &mut [Duration]) {
    times.sort();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let (median, worst) = (times[times.len() / 2], times[times.len() - 1]);
    println!("an event reached all of them in {:.1} ms (median), {:.1} ms (worst of {})", ms(median), ms(worst), times.len());
}

async fn without_sockets(watchers: usize, events: usize) -> Result<(), Failure> {
    let hub = Hub::new(HistoryBounds::default(), Revision(0));
    let stop = CancellationToken::new();
    let running = tokio::spawn(hub.clone().run(stop.clone()));
    let world = Arc::new(World(Mutex::new((Revision(0), Vec::new()))));
    let seen = Arc::new(AtomicUsize::new(0));
    let encoded_bytes = Arc::new(AtomicUsize::new(0));

    let before = resident_bytes(std::process::id());
    let mut tasks = tokio::task::JoinSet::new();
    for _ in 0..watchers {
        let mut batches = stream(hub.watch(world.clone(), KindSet::ALL, None));
        let (seen, encoded_bytes) = (seen.clone(), encoded_bytes.clone());
        tasks.spawn(async move {
            while let Some(batch) = batches.next().await {
                let bytes = batch.encode_to_vec().len();
                encoded_bytes.fetch_add(bytes, Ordering::Relaxed);
                seen.fetch_add(batch.events_json.len() + usize::from(batch.is_reset_end), Ordering::Relaxed);
            }
        });
    }
    wait_for(&seen, watchers).await?;
    let per_watcher = resident_bytes(std::process::id()).saturating_sub(before) / watchers as u64;
    println!("{watchers} watchers, {per_watcher} bytes of memory each (idle, without sockets)");

    let mut times = Vec::new();
    for event in 0..events {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let began = Instant::now();
        world.write(&hub);
        wait_for(&seen, watchers * (event + 2)).await?;
        times.push(began.elapsed());
    }
    report(&mut times);
    println!("{} bytes written for the wire; load {}", encoded_bytes.load(Ordering::Relaxed), load());
    tasks.shutdown().await;
    stop.cancel();
    Ok(running.await?)
}

async fn wait_for(seen: &AtomicUsize, count: usize) -> Result<(), Failure> {
    let ends = Instant::now() + PATIENCE;
    while seen.load(Ordering::Relaxed) < count {
        if Instant::now() > ends {
            return Err(format!("{} of {count} were seen within {PATIENCE:?}", seen.load(Ordering::Relaxed)).into());
        }
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
    Ok(())
}
