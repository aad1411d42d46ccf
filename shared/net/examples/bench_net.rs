//! Speed of the data plane between two processes of this machine, beside plain loopback TCP and UDP.
//!
//! `cargo run --release -p forge-net --example bench_net [-- tcp]` measures, in one run: round trips of messages by size;
//! all_reduce of 8 KiB and more; large messages one way and both ways with the longest stalls; processor time per byte.

#[path = "../tests/support/mod.rs"]
mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use forge_kernels::{Backend, CpuBackend, CpuOptions};
use forge_net::{Fabric, GroupId, GroupSpec, Member, MessageLinks, SILENCE, Transport};
use forge_shared::ids::Epoch;
use support::{Ca, NodePem, fabric, loopback};

const SIZES: [usize; 6] = [64, 1 << 10, 8 << 10, 64 << 10, 256 << 10, 1 << 20];
const UDP_SIZES: [usize; 3] = [64, 1 << 10, 8 << 10];
const REDUCED: [usize; 4] = [256, 8 << 10, 64 << 10, 1 << 20];
const BULK_BYTES: usize = 1 << 20;
const BULK_MESSAGES: usize = 400;
const WAIT: Duration = Duration::from_secs(30);

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["peer", address, transport] => peer(address.parse().expect("an address"), transport_of(transport)),
        rest => lead(transport_of(rest.first().copied().unwrap_or("quic"))),
    }
}

fn transport_of(name: &str) -> Transport {
    match name {
        "quic" => Transport::Quic,
        "tcp" => Transport::Tcp,
        other => panic!("transport {other}: write quic or tcp"),
    }
}

/// How often a size is measured.
fn rounds(bytes: usize) -> usize {
    (200_000_000 / (bytes + 50_000)).clamp(50, 2000)
}

struct Peer {
    child: Child,
    tcp: SocketAddr,
    udp: SocketAddr,
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.wait();
    }
}

fn lead(transport: Transport) {
    let ca = Ca::new();
    let own = fabric(ca.verifier("n0"), "n0", transport, SILENCE);
    // The peer has the greater name, so this process connects; it says where.
    let pem = ca.node_pem("n1");
    let name = format!("{transport:?}").to_lowercase();
    let mut child = Command::new(std::env::current_exe().expect("a path"))
        .args(["peer", &own.local_address().expect("an address").to_string(), &name])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program starts again");
    let mut stdin = child.stdin.take().expect("a pipe");
    stdin.write_all([pem.certificate, pem.key, pem.ca].join("\0").as_bytes()).expect("the peer reads");
    drop(stdin);
    let mut addresses = String::new();
    let stdout = child.stdout.take().expect("a pipe");
    BufReader::new(stdout).read_line(&mut addresses).expect("the peer says where it listens");
    let address = |index: usize| addresses.split(' ').nth(index).and_then(|text| text.trim().parse().ok()).expect("an address");
    let (fabric_at, tcp, udp): (SocketAddr, _, _) = (address(0), address(1), address(2));
    let peer = Peer { child, tcp, udp };

    let links = own.links(group("messages", 0, fabric_at)).expect("a link");
    println!("round trip, µs (p50 / p99):      {name:>18}  {:>16}  {:>16}", "plain TCP", "plain UDP");
    let mut stream = TcpStream::connect(peer.tcp).expect("a connection");
    stream.set_nodelay(true).expect("no delay");
    let socket = UdpSocket::bind(loopback(0)).expect("a socket");
    socket.connect(peer.udp).expect("an address");
    for size in SIZES {
        let message = vec![1; size];
        let ours = measure(size, || {
            links.send(1, &message).expect("sent");
            links.recv(1, WAIT).expect("received").expect("in time");
        });
        let mut back = vec![0; size];
        let tcp = measure(size, || {
            stream.write_all(&message).expect("sent");
            stream.read_exact(&mut back).expect("received");
        });
        let udp = UDP_SIZES.contains(&size).then(|| {
            measure(size, || {
                socket.send(&message).expect("sent");
                socket.recv(&mut back).expect("received");
            })
        });
        let udp = udp.map_or(String::new(), |udp| spread(&udp));
        println!("{:>24} bytes   {:>18}  {:>16}  {udp:>16}", size, spread(&ours), spread(&tcp));
    }

    let backend = CpuBackend::new(CpuOptions { threads: 1, ..CpuOptions::default() }).expect("a backend");
    let rank = own.form::<CpuBackend>(group("tensor", 0, fabric_at)).expect("a group");
    println!("all_reduce of two ranks, µs (p50 / p99):");
    for size in REDUCED {
        let mut buffer = backend.buffer(1, size / 4).expect("a buffer");
        let times = measure(size, || rank.all_reduce(&backend, &mut buffer, 1).expect("a sum"));
        println!("{:>24} bytes   {:>18}", size, spread(&times));
    }

    println!("messages of {BULK_BYTES} bytes:");
    let (usage, start) = (cpu_seconds(), Instant::now());
    let gaps = receive(&links);
    report("one way", start.elapsed(), &gaps, cpu_seconds() - usage, 1);
    let (usage, start) = (cpu_seconds(), Instant::now());
    let gaps = std::thread::scope(|scope| {
        scope.spawn(|| send(&links, 1));
        receive(&links)
    });
    report("both ways", start.elapsed(), &gaps, cpu_seconds() - usage, 2);
    println!("UDP segments per send: {}", segments());
}

fn peer(_leader: SocketAddr, transport: Transport) {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text).expect("the leader writes");
    let mut parts = text.split('\0').map(str::to_owned);
    let mut part = || parts.next().expect("three parts");
    let pem = NodePem { node: "n1".to_owned(), certificate: part(), key: part(), ca: part() };
    let own: Fabric = fabric(pem.verifier(true), "n1", transport, SILENCE);
    let listener = TcpListener::bind(loopback(0)).expect("a port");
    let socket = UdpSocket::bind(loopback(0)).expect("a port");
    let at = own.local_address().expect("an address");
    println!("{at} {} {}", listener.local_addr().expect("an address"), socket.local_addr().expect("an address"));

    let links = own.links(group("messages", 1, at)).expect("a link");
    let (mut stream, _) = listener.accept().expect("a connection");
    stream.set_nodelay(true).expect("no delay");
    let mut bytes = vec![0; 1 << 20];
    for size in SIZES {
        for _ in 0..rounds(size) {
            let message = links.recv(0, WAIT).expect("received").expect("in time");
            links.send(0, &message).expect("sent");
        }
        for _ in 0..rounds(size) {
            stream.read_exact(&mut bytes[..size]).expect("received");
            stream.write_all(&bytes[..size]).expect("sent");
        }
        if UDP_SIZES.contains(&size) {
            for _ in 0..rounds(size) {
                let (length, from) = socket.recv_from(&mut bytes).expect("received");
                socket.send_to(&bytes[..length], from).expect("sent");
            }
        }
    }
    let backend = CpuBackend::new(CpuOptions { threads: 1, ..CpuOptions::default() }).expect("a backend");
    let rank = own.form::<CpuBackend>(group("tensor", 1, at)).expect("a group");
    for size in REDUCED {
        let mut buffer = backend.buffer(1, size / 4).expect("a buffer");
        for _ in 0..rounds(size) {
            rank.all_reduce(&backend, &mut buffer, 1).expect("a sum");
        }
    }
    send(&links, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| send(&links, 0));
        receive_from(&links, 0);
    });
    // Nothing is lost of what the leader still reads.
    let _ = links.recv(0, WAIT);
}

fn group(purpose: &str, rank: usize, peer: SocketAddr) -> GroupSpec {
    GroupSpec {
        id: GroupId { name: "bench/0".into(), purpose: purpose.into(), epoch: Epoch(1) },
        members: vec![Member { node: "n0".into(), address: None }, Member { node: "n1".into(), address: Some(peer) }],
        rank,
        agreement: String::new(),
        urgent: false,
        form_timeout: WAIT,
        deadline: WAIT,
    }
}

fn measure(size: usize, mut round: impl FnMut()) -> Vec<Duration> {
    let time = |_| {
        let start = Instant::now();
        round();
        start.elapsed()
    };
    let mut times: Vec<Duration> = (0..rounds(size)).map(time).collect();
    times.sort();
    times
}

fn spread(times: &[Duration]) -> String {
    let at = |part: usize| times[(times.len() - 1) * part / 100].as_secs_f64() * 1e6;
    format!("{:.0} / {:.0}", at(50), at(99))
}

fn send(links: &MessageLinks, to: usize) {
    let message = vec![1; BULK_BYTES];
    for _ in 0..BULK_MESSAGES {
        links.send(to, &message).expect("sent");
    }
}

fn receive(links: &MessageLinks) -> Vec<Duration> {
    receive_from(links, 1)
}

/// The times between messages.
fn receive_from(links: &MessageLinks, from: usize) -> Vec<Duration> {
    let mut gaps: Vec<Duration> = (0..BULK_MESSAGES)
        .map(|_| {
            let start = Instant::now();
            links.recv(from, WAIT).expect("received").expect("in time");
            start.elapsed()
        })
        .collect();
    gaps.sort();
    gaps
}

fn report(what: &str, took: Duration, gaps: &[Duration], cpu_s: f64, directions: usize) {
    let bytes = (BULK_BYTES * BULK_MESSAGES) as f64;
    let at = |part: usize| gaps[(gaps.len() - 1) * part / 100].as_secs_f64() * 1e3;
    println!(
        "{what:>24}   {:.0} MB/s each way; between messages {:.2} ms (p50), {:.2} ms (p99); {:.2} ns of processor per byte here, {:.0} MB/s per core",
        bytes / took.as_secs_f64() / 1e6,
        at(50),
        at(99),
        cpu_s * 1e9 / bytes / directions as f64,
        bytes * directions as f64 / cpu_s / 1e6,
    );
}

/// Processor time of this process, both modes, to 10 ms.
fn cpu_seconds() -> f64 {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").expect("Linux");
    // The name, in brackets, may hold anything; utime and stime are fields 14 and 15.
    let fields = stat.rsplit(')').next().expect("fields").split_whitespace();
    fields.skip(11).take(2).map(|ticks| ticks.parse::<f64>().expect("a number")).sum::<f64>() / TICKS_PER_SECOND
}

/// Segments that the kernel takes in one send.
fn segments() -> usize {
    let socket = UdpSocket::bind(loopback(0)).expect("a socket");
    quinn_udp::UdpSocketState::new((&socket).into()).map_or(1, |state| state.max_gso_segments())
}
