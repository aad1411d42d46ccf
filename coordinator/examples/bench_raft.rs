//! How fast a raft group of three is: `cargo run --release -p forge-coordinator --example bench_raft [FOLDER]`.
//!
//! Three members in three processes of this host, over gRPC on loopback TCP, each with its own folder under FOLDER (a
//! temporary one by default: mind that it may lie in memory). Prints the p50 of an fsync of the same size beside the
//! latency of one proposal alone and the rate with 256 in flight.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use forge_coordinator::raft::transport::{Connector, GrpcTransport, RaftService, peer_endpoint};
use forge_coordinator::raft::{self, RaftHandle, RaftOptions, RaftRole, StateMachine};
use tonic::transport::Endpoint;

const PROPOSAL_BYTES: usize = 256;
const IN_FLIGHT: usize = 256;
const MEASURED: Duration = Duration::from_secs(5);

struct Count(u64);

impl StateMachine for Count {
    fn apply(&mut self, _: u64, _: &[u8]) -> Vec<u8> {
        self.0 += 1;
        Vec::new()
    }

    fn snapshot(&self) -> Vec<u8> {
        self.0.to_le_bytes().to_vec()
    }

    fn restore(&mut self, _: u64, data: &[u8]) -> Result<(), String> {
        self.0 = u64::from_le_bytes(data.try_into().map_err(|_| "not 8 bytes")?);
        Ok(())
    }
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [role, id, folder, ports] = arguments.as_slice()
        && role == "member"
    {
        let ports = ports.split(',').map(str::parse).collect::<Result<Vec<u16>, _>>()?;
        return member(id.parse()?, folder.into(), ports);
    }
    let folder = arguments.first().map_or_else(|| std::env::temp_dir().join(format!("bench-raft-{}", std::process::id())), PathBuf::from);
    std::fs::create_dir_all(&folder)?;
    println!("fsync of {PROPOSAL_BYTES} bytes appended, p50: {:.2} ms, p99: {:.2} ms", fsync(&folder, 50)?, fsync(&folder, 99)?);
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

/// Milliseconds of an append with fdatasync.
fn fsync(folder: &std::path::Path, percentile: usize) -> std::io::Result<f64> {
    let path = folder.join("fsync");
    let mut file = std::fs::File::create(&path)?;
    let mut taken = Vec::new();
    for _ in 0..200 {
        let started = Instant::now();
        file.write_all(&[1; PROPOSAL_BYTES])?;
        file.sync_data()?;
        taken.push(started.elapsed());
    }
    std::fs::remove_file(path)?;
    taken.sort();
    Ok(taken[taken.len() * percentile / 100].as_secs_f64() * 1000.0)
}

fn member(id: u64, folder: PathBuf, ports: Vec<u16>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let own = ports[id as usize - 1];
    let connector: Connector = Arc::new(move |to| {
        let port = ports[to as usize - 1];
        Box::pin(async move {
            let endpoint = Endpoint::from_shared(format!("http://127.0.0.1:{port}")).map_err(|error| error.to_string())?;
            peer_endpoint(endpoint).connect().await.map_err(|error| error.to_string())
        })
    });
    let transport = GrpcTransport::new("bench", connector, runtime.handle().clone());
    let mut options = RaftOptions::new(id, "bench", folder);
    options.bootstrap = Some(vec![1, 2, 3]);
    let raft = raft::start(options, Box::new(Count(0)), transport.clone())?;
    transport.attach(raft.clone());
    let service = RaftService::server("bench", raft.clone(), Arc::new(|_| Ok(Box::new(|_| Ok(())))));
    runtime.spawn(tonic::transport::Server::builder().tcp_nodelay(true).add_service(service).serve(([127, 0, 0, 1], own).into()));
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
    let mut alone = Vec::new();
    for _ in 0..200 {
        let started = Instant::now();
        raft.propose(data.clone(), deadline).await?;
        alone.push(started.elapsed().as_secs_f64() * 1000.0);
    }
    alone.sort_by(f64::total_cmp);
    println!("one proposal alone, p50: {:.2} ms, p99: {:.2} ms", alone[100], alone[198]);
    let (count, is_over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let started = Instant::now();
    let tasks: Vec<_> = (0..IN_FLIGHT)
        .map(|_| {
            let (raft, data, count, is_over) = (raft.clone(), data.clone(), count.clone(), is_over.clone());
            tokio::spawn(async move {
                while !is_over.load(Ordering::Relaxed) {
                    raft.propose(data.clone(), deadline).await?;
                    count.fetch_add(1, Ordering::Relaxed);
                }
                Ok::<_, raft::RaftError>(())
            })
        })
        .collect();
    tokio::time::sleep(MEASURED).await;
    is_over.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await??;
    }
    println!("{IN_FLIGHT} in flight: {:.0} proposals/s", count.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64());
    Ok(())
}
