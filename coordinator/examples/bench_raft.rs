//! How fast a raft group of three is: `cargo run --release -p forge-coordinator --example bench_raft [-- [plain] [FOLDER]]`.
//!
//! Three members in three processes of this host, over gRPC and mTLS as in production (`plain`: without TLS), each with its
//! own folder under FOLDER (a temporary one by default: mind that it may lie in memory). Prints the p50 of an fsync of the
//! same size, alone and three at once as the members do it, beside the latency of one proposal alone and the rate with 256
//! in flight, in several rounds: other load on the machine shows as a difference between them.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use forge_cluster::tls::{
    ChannelOptions, ClusterCa, Credentials, Identity, NODE_LIFETIME, NodeKey, PeerName, SharedCredentials, TlsIncoming, channel,
};
use forge_coordinator::raft::transport::{Connector, GrpcTransport, RaftService, peer_endpoint};
use forge_coordinator::raft::{self, Frozen, RaftHandle, RaftOptions, RaftRole, StateMachine};
use forge_shared::cluster::node::Role;
use tokio::net::TcpListener;
use tonic::transport::{Endpoint, Server};

const PROPOSAL_BYTES: usize = 256;
const IN_FLIGHT: usize = 256;
const MEASURED: Duration = Duration::from_secs(5);
const ALONE: usize = 200;
const ROUNDS: usize = 3;

struct Count(u64);

impl StateMachine for Count {
    fn apply(&mut self, _: u64, _: &[u8]) -> Vec<u8> {
        self.0 += 1;
        Vec::new()
    }

    fn snapshot(&self) -> Frozen {
        let count = self.0;
        Box::new(move || count.to_le_bytes().to_vec())
    }

    fn restore(&mut self, _: u64, data: &[u8]) -> Result<(), String> {
        self.0 = u64::from_le_bytes(data.try_into().map_err(|_| "not 8 bytes")?);
        Ok(())
    }
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [role, id, folder, ports] = arguments.as_slice()
        && role == "member"
    {
        let ports = ports.split(',').map(str::parse).collect::<Result<Vec<u16>, _>>()?;
        return member(id.parse()?, folder.into(), ports);
    }
    let is_plain = arguments.first().is_some_and(|first| first == "plain");
    arguments.drain(..usize::from(is_plain));
    let folder = arguments.first().map_or_else(|| std::env::temp_dir().join(format!("bench-raft-{}", std::process::id())), PathBuf::from);
    std::fs::create_dir_all(&folder)?;
    println!("three members, {}; {PROPOSAL_BYTES} bytes a proposal", if is_plain { "without TLS" } else { "mTLS" });
    println!("fsync alone: {}", fsync(&folder, 1)?);
    println!("fsync, three at once: {}", fsync(&folder, 3)?);
    if !is_plain {
        certify(&folder)?;
    }
    let ports: Vec<String> = free_ports()?.iter().map(u16::to_string).collect();
    let mut members = Vec::new();
    for id in 1..=3 {
        let member = Command::new(std::env::current_exe()?)
            .args(["member", &id.to_string()])
            .arg(folder.join(format!("member-{id}")))
            .arg(ports.join(","))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        members.push(member);
    }
    let printed = print_first(&mut members);
    for mut member in members {
        // Those that follow end when their input does.
        drop(member.stdin.take());
        member.wait()?;
    }
    std::fs::remove_dir_all(&folder)?;
    printed
}

/// Gives each member the certificate of a coordinator.
fn certify(folder: &Path) -> Result<(), Failure> {
    let now_s = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
    let ca = ClusterCa::create("bench", now_s)?;
    for id in 1..=3 {
        let key = NodeKey::generate()?;
        let identity = Identity::new("bench", Role::Coordinator, &format!("c{id}"))?;
        let certificate = ca.sign(&key.signing_request_der()?, &identity, NODE_LIFETIME, now_s)?;
        let credentials = Credentials::from_pem(&certificate, &key.pem(), ca.certificate_pem())?;
        credentials.save(&tls_folder(&folder.join(format!("member-{id}"))))?;
    }
    Ok(())
}

fn tls_folder(member: &Path) -> PathBuf {
    member.join("tls")
}

/// Prints the lines of whichever member leads, until it has printed all.
fn print_first(members: &mut [Child]) -> Result<(), Failure> {
    let (sender, lines) = std::sync::mpsc::channel();
    for member in members {
        let output = member.stdout.take().ok_or("no output")?;
        let sender = sender.clone();
        std::thread::spawn(move || BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    }
    drop(sender);
    loop {
        let line = lines.recv_timeout(Duration::from_secs(60))?;
        if line == "done" {
            return Ok(());
        }
        println!("{line}");
    }
}

fn free_ports() -> std::io::Result<Vec<u16>> {
    let listeners = (0..3).map(|_| std::net::TcpListener::bind("127.0.0.1:0")).collect::<Result<Vec<_>, _>>()?;
    listeners.iter().map(|listener| Ok(listener.local_addr()?.port())).collect()
}

/// Percentiles of an append with fdatasync, by so many threads at once, each with its own file.
fn fsync(folder: &Path, at_once: usize) -> std::io::Result<String> {
    let append = |number: usize| {
        let path = folder.join(format!("fsync-{number}"));
        let mut file = std::fs::File::create(&path)?;
        let mut taken = Vec::new();
        for _ in 0..200 {
            let started = Instant::now();
            file.write_all(&[1; PROPOSAL_BYTES])?;
            file.sync_data()?;
            taken.push(started.elapsed());
        }
        std::fs::remove_file(path)?;
        Ok::<_, std::io::Error>(taken)
    };
    let taken = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..at_once).map(|number| scope.spawn(move || append(number))).collect();
        let joined = threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| Err(std::io::Error::other("a thread ended"))));
        joined.collect::<std::io::Result<Vec<_>>>()
    })?;
    Ok(percentiles(taken.into_iter().flatten().collect()))
}

fn percentiles(mut taken: Vec<Duration>) -> String {
    taken.sort();
    let at = |percent: usize| taken[taken.len() * percent / 100].as_secs_f64() * 1000.0;
    format!("p50 {:.2} ms, p90 {:.2} ms, p99 {:.2} ms", at(50), at(90), at(99))
}

fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

fn member(id: u64, folder: PathBuf, ports: Vec<u16>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let _entered = runtime.enter();
    let own = ports[id as usize - 1];
    let tls = tls_folder(&folder);
    let credentials = if tls.exists() { Some(SharedCredentials::new(Credentials::load(&tls)?)) } else { None };
    let own_credentials = credentials.clone();
    let connector: Connector = Arc::new(move |to| {
        let address = format!("127.0.0.1:{}", ports[to as usize - 1]);
        let credentials = credentials.clone();
        Box::pin(async move {
            match credentials {
                Some(credentials) => {
                    let peer = PeerName::One(Role::Coordinator, format!("c{to}"));
                    channel(&address, &peer, &credentials, ChannelOptions::default()).map_err(|error| error.to_string())
                }
                None => {
                    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| error.to_string())?;
                    peer_endpoint(endpoint).connect().await.map_err(|error| error.to_string())
                }
            }
        })
    });
    let transport = GrpcTransport::new("bench", Default::default(), connector, runtime.handle().clone());
    let mut options = RaftOptions::new(id, "bench", folder.join("raft"));
    options.bootstrap = Some(vec![1, 2, 3]);
    let raft = raft::start(options, Box::new(Count(0)), transport.clone())?;
    transport.attach(raft.clone());
    let service = RaftService::server("bench", raft.clone(), Arc::new(|_, _| Ok(Box::new(|_| Ok(())))));
    let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", own)))?;
    let server = Server::builder().tcp_nodelay(true).add_service(service);
    match own_credentials {
        Some(credentials) => drop(runtime.spawn(server.serve_with_incoming(TlsIncoming::new(listener, &credentials)?))),
        None => {
            drop(listener);
            drop(runtime.spawn(server.serve(([127, 0, 0, 1], own).into())));
        }
    }
    runtime.spawn(async move {
        let mut status = raft.status();
        if status.wait_for(|status| status.role == RaftRole::Leader).await.is_ok()
            && let Err(error) = measure(&raft).await
        {
            println!("failed: {error}");
        }
        println!("done");
    });
    // Until the parent is done.
    std::io::stdin().lines().for_each(drop);
    Ok(())
}

async fn measure(raft: &RaftHandle) -> Result<(), Failure> {
    let data = Bytes::from(vec![7; PROPOSAL_BYTES]);
    let deadline = Duration::from_secs(10);
    // Connections are made and followers found by the first ones.
    for _ in 0..50 {
        raft.propose(data.clone(), deadline).await?;
    }
    for _ in 0..ROUNDS {
        let mut alone = Vec::new();
        for _ in 0..ALONE {
            let started = Instant::now();
            raft.propose(data.clone(), deadline).await?;
            alone.push(started.elapsed());
        }
        println!("one proposal alone: {}; load {}", percentiles(alone), load());
        many(raft, &data, deadline).await?;
    }
    Ok(())
}

async fn many(raft: &RaftHandle, data: &Bytes, deadline: Duration) -> Result<(), Failure> {
    let (count, is_over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let started = Instant::now();
    let tasks: Vec<_> = (0..IN_FLIGHT)
        .map(|_| {
            let (raft, data, count, is_over) = (raft.clone(), data.clone(), count.clone(), is_over.clone());
            tokio::spawn(async move {
                let mut taken = Vec::new();
                while !is_over.load(Ordering::Relaxed) {
                    let started = Instant::now();
                    raft.propose(data.clone(), deadline).await?;
                    taken.push(started.elapsed());
                    count.fetch_add(1, Ordering::Relaxed);
                }
                Ok::<_, raft::RaftError>(taken)
            })
        })
        .collect();
    tokio::time::sleep(MEASURED).await;
    let rate = count.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64();
    is_over.store(true, Ordering::Relaxed);
    let mut taken = Vec::new();
    for task in tasks {
        taken.extend(task.await??);
    }
    println!("{IN_FLIGHT} in flight: {rate:.0} proposals/s, {}; load {}", percentiles(taken), load());
    Ok(())
}
