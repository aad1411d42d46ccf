//! Peers that say what no fabric says, or nothing: each is bounded, in time and in memory, and costs nobody else anything.

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use forge_kernels::{Backend, CpuBackend, CpuOptions};
use forge_net::frame::{Head, Kind, WireDType};
use forge_net::hello::Lane;
use forge_net::{Collective, Fabric, GroupSpec, Member, MessageLinks, NetError, Transport};
use support::raw::{Raw, hello};
use support::{Ca, NodePem, PATIENT, fabric, group_id, loopback};

/// What ends by itself has ended by then, on a busy machine too.
const SOON: Duration = Duration::from_secs(20);

/// One fabric, node n1, and node n0 by hand.
struct Scene {
    fabric: Fabric,
    address: SocketAddr,
    peer: NodePem,
}

fn scene() -> Scene {
    let ca = Ca::new();
    let fabric = fabric(ca.verifier("n1"), "n1", Transport::Tcp, PATIENT);
    Scene { address: fabric.local_address().unwrap(), fabric, peer: ca.node_pem("n0") }
}

/// A group of n0 (by hand), and of `fabric` under its name as the last rank.
fn spec(name: &str, epoch: u64, peers: usize) -> GroupSpec {
    let mut members = vec![Member { node: "n0".into(), address: Some(loopback(1)) }; peers];
    members.push(Member { node: name.into(), address: None });
    GroupSpec { id: group_id(epoch), members, rank: peers, agreement: String::new(), urgent: false, form_timeout: SOON, deadline: PATIENT }
}

/// Does it in a thread of its own, so that what never ends fails the test.
fn within<T: Send + 'static>(time: Duration, what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (give, take) = channel();
    thread::spawn(move || give.send(work()));
    take.recv_timeout(time).unwrap_or_else(|_| panic!("{what} has not ended after {time:?}"))
}

fn backend() -> CpuBackend {
    CpuBackend::new(CpuOptions { threads: 1, ..CpuOptions::default() }).unwrap()
}

impl Scene {
    fn session(&self) -> Raw {
        Raw::session(self.address, &self.peer, "n1")
    }

    fn stream(&self, epoch: u64, lane: Lane) -> Raw {
        Raw::stream(self.address, &self.peer, "n1", &hello(epoch, lane, [0, 1], 2, ""))
    }

    fn links(&self, epoch: u64) -> (MessageLinks, Raw) {
        let mut stream = self.stream(epoch, Lane::Pair);
        let links = self.fabric.links(spec("n1", epoch, 1)).unwrap();
        assert!(stream.is_welcome());
        (links, stream)
    }

    /// Rank 1 of a group, whose rank 0 is the stream.
    fn collective(&self, epoch: u64) -> (Arc<dyn Collective<CpuBackend>>, [Raw; 2]) {
        let mut streams = [Lane::Group, Lane::Pair].map(|lane| self.stream(epoch, lane));
        let group = self.fabric.form(spec("n1", epoch, 1)).unwrap();
        assert!(streams.iter_mut().all(Raw::is_welcome));
        (group, streams)
    }
}

fn rows(kind: Kind, rows: u32, width: u32) -> Head {
    Head { kind, dtype: WireDType::F32, rows, width }
}

#[test]
fn a_peer_that_closes_or_does_not_answer_is_given_up_in_time() {
    for answers in [false, true] {
        let ca = Ca::new();
        let near = fabric(ca.verifier("n0"), "n0", Transport::Tcp, PATIENT);
        let listener = TcpListener::bind(loopback(0)).unwrap();
        let address = listener.local_addr().unwrap();
        let peer = ca.node_pem("n1");
        thread::spawn(move || {
            let mut held = Vec::new();
            loop {
                let mut session = Raw::accept(&listener, &peer);
                // Closes it, or leaves it without an answer.
                let _ = session.next();
                if answers {
                    held.push(session);
                }
            }
        });
        let mut spec = spec("n1", 1, 1);
        spec.rank = 0;
        spec.members[1].address = Some(address);
        spec.form_timeout = Duration::from_secs(1);
        let error = within(SOON, "dialing", move || near.links(spec).map(drop)).unwrap_err();
        assert!(matches!(error, NetError::Unreachable { .. }), "{error}");
    }
}

#[test]
fn matrices_that_are_not_whole_or_too_large_are_refused() {
    let scene = scene();
    let _session = scene.session();
    let backend = backend();
    let chunk = vec![0; 256 << 10];
    let buffer = |rows: usize, width: usize| backend.buffer(rows, width).unwrap();
    let refused = |epoch: u64, head: Head, body: &[u8], run: &dyn Fn(&dyn Collective<CpuBackend>) -> Result<(), NetError>| {
        let (group, [mut stream, mut pair]) = scene.collective(epoch);
        let lane = if head.kind == Kind::Rows { &mut pair } else { &mut stream };
        lane.send(head, body);
        let start = Instant::now();
        let error = run(&*group).expect_err("refused");
        assert!(start.elapsed() < SOON, "{error}");
        error
    };
    let mismatch = |error: NetError| assert!(matches!(error, NetError::Mismatch { .. }), "{error}");
    // A sum at once, of which one row of two comes; a large one, of whose half only a half comes.
    mismatch(refused(1, rows(Kind::AllReduce, 2, 3), &[0; 12], &|group| group.all_reduce(&backend, &mut buffer(2, 3), 2)));
    let large = rows(Kind::AllReduce, 1, 40_000);
    mismatch(refused(2, large, &[0; 40_000], &|group| group.all_reduce(&backend, &mut buffer(1, 40_000), 1)));
    mismatch(refused(3, rows(Kind::AllGather, 2, 3), &[0; 12], &|group| {
        group.all_gather(&backend, Some(&buffer(2, 1)), &mut buffer(2, 4), 2)
    }));
    mismatch(refused(4, rows(Kind::ReduceScatter, 4, 3), &[0; 12], &|group| {
        group.reduce_scatter(&backend, &buffer(4, 3), 4, &mut buffer(2, 3)).map(drop)
    }));
    mismatch(refused(5, rows(Kind::Broadcast, 2, 3), &[], &|group| group.broadcast(&backend, &mut buffer(2, 3), 2, 0)));
    mismatch(refused(6, rows(Kind::AllToAll, 2, 3), &[0; 12], &|group| {
        group.all_to_all(&backend, &buffer(2, 3), &[1, 1], &mut buffer(9, 3)).map(drop)
    }));
    mismatch(refused(7, rows(Kind::Rows, 2, 3), &[0; 12], &|group| group.recv(&backend, &mut buffer(2, 3), 0..2, 0)));
    // Barriers have no rows, however many come; and what has no room in the output is not waited for.
    mismatch(refused(8, rows(Kind::Barrier, 1 << 16, 1 << 16), &chunk, &|group| group.barrier()));
    let error = refused(9, rows(Kind::AllToAll, 1 << 30, 3), &chunk, &|group| {
        group.all_to_all(&backend, &buffer(2, 3), &[1, 1], &mut buffer(9, 3)).map(drop)
    });
    assert!(matches!(error, NetError::Kernel(_)), "{error}");
}

#[test]
fn a_group_that_is_ended_while_it_is_formed_is_over() {
    let scene = scene();
    let mut session = scene.session();
    // Rank 0 is there, rank 1 is not; rank 0 gives up.
    let mut stream = Raw::stream(scene.address, &scene.peer, "n1", &hello(1, Lane::Pair, [0, 2], 3, ""));
    let start = Instant::now();
    thread::scope(|scope| {
        let forming = scope.spawn(|| scene.fabric.links(spec("n1", 1, 2)).map(drop));
        assert!(stream.is_welcome());
        let notice = hello(1, Lane::Group, [0, 2], 3, "device lost").encode();
        session.send(Head::bytes(Kind::Abort), &[1u64.to_le_bytes().as_slice(), &notice].concat());
        let error = forming.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("the group of epoch 1 was aborted: device lost"), "{error}");
    });
    assert!(start.elapsed() < SOON / 2, "{:?}", start.elapsed());
    assert!(scene.fabric.links(spec("n1", 1, 2)).unwrap_err().to_string().contains("only a later one"));
}

#[test]
fn a_group_that_is_ended_before_its_welcomes_came_is_over() {
    let ca = Ca::new();
    let near = fabric(ca.verifier("n0"), "n0", Transport::Tcp, PATIENT);
    let listener = TcpListener::bind(loopback(0)).unwrap();
    let mut waiting = spec("n1", 1, 1);
    waiting.rank = 0;
    waiting.members[1].address = Some(listener.local_addr().unwrap());
    let peer = ca.node_pem("n1");
    thread::scope(|scope| {
        let forming = scope.spawn(|| near.links(waiting).map(drop));
        let mut session = Raw::accept(&listener, &peer);
        assert_eq!(session.next().unwrap().head.kind, Kind::Ping);
        session.send(Head::bytes(Kind::Ping), &[]);
        let mut stream = Raw::accept(&listener, &peer);
        assert_eq!(stream.next().unwrap().head.kind, Kind::Hello);
        let start = Instant::now();
        let notice = hello(1, Lane::Group, [1, 0], 2, "device lost").encode();
        session.send(Head::bytes(Kind::Abort), &[1u64.to_le_bytes().as_slice(), &notice].concat());
        let error = forming.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("the group of epoch 1 was aborted: device lost"), "{error}");
        assert!(start.elapsed() < SOON / 2, "{:?}", start.elapsed());
    });
}

#[test]
fn frames_without_a_body_fill_an_inbox_too() {
    let scene = scene();
    let _session = scene.session();
    let (_links, mut stream) = scene.links(1);
    let patience = Some(Duration::from_millis(300));
    stream.socket.set_write_timeout(patience).and_then(|()| stream.socket.set_read_timeout(patience)).unwrap();
    let most = 64 << 20;
    let mut sent = 0;
    while sent < most {
        let frames: Vec<u8> = (0..4096).flat_map(|_| stream.bytes(Head::bytes(Kind::Message), &[])).collect();
        if stream.write(&frames).is_err() {
            break;
        }
        sent += frames.len();
    }
    // 8 MiB of what they take here, and what the kernel's buffers hold.
    assert!(sent < most, "{sent} bytes of frames that nobody takes");
}

#[test]
fn a_handshake_ends_however_slowly_it_goes_on() {
    let scene = scene();
    let mut slow = TcpStream::connect(scene.address).unwrap();
    slow.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    // A record of 16 KiB, of which a byte comes every now and then.
    let start = Instant::now();
    let mut answer = [0; 64];
    let mut next: Vec<u8> = vec![22, 3, 1, 0x40, 0, 1];
    let ended = loop {
        let sent = slow.write_all(&next);
        match slow.read(&mut answer) {
            Ok(_) => break true,
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => break true,
            Err(_) if sent.is_err() => break true,
            Err(_) if start.elapsed() > SOON => break false,
            Err(_) => next = vec![0],
        }
    };
    assert!(ended, "a handshake goes on after {:?}", start.elapsed());
}

#[test]
fn of_a_streams_tries_the_newest_is_taken() {
    let scene = scene();
    let _session = scene.session();
    // Both have come before the group is formed; the first is given up, then also one that is not.
    for (epoch, given_up) in [(1, true), (2, false)] {
        let first = scene.stream(epoch, Lane::Pair);
        thread::sleep(Duration::from_millis(300));
        let first = (!given_up).then_some(first);
        let mut second = scene.stream(epoch, Lane::Pair);
        thread::sleep(Duration::from_millis(300));
        let links = scene.fabric.links(spec("n1", epoch, 1)).unwrap();
        assert!(second.is_welcome());
        second.send(Head::bytes(Kind::Message), b"newest");
        assert_eq!(links.recv(0, SOON).unwrap().unwrap(), b"newest");
        drop(first);
    }
    // The second comes while the group is being formed.
    drop(scene.stream(3, Lane::Pair));
    thread::sleep(Duration::from_millis(300));
    thread::scope(|scope| {
        let forming = scope.spawn(|| scene.fabric.links(spec("n1", 3, 1)));
        thread::sleep(Duration::from_millis(300));
        let mut second = scene.stream(3, Lane::Pair);
        assert!(second.is_welcome());
        second.send(Head::bytes(Kind::Message), b"newest");
        assert_eq!(forming.join().unwrap().unwrap().recv(0, SOON).unwrap().unwrap(), b"newest");
    });
    // The first of three ranks tries again after its first stream was taken.
    thread::scope(|scope| {
        let open = |from| Raw::stream(scene.address, &scene.peer, "n1", &hello(4, Lane::Pair, [from, 2], 3, ""));
        let forming = scope.spawn(|| scene.fabric.links(spec("n1", 4, 2)));
        let mut first = open(0);
        assert!(first.is_welcome());
        drop(first);
        thread::sleep(Duration::from_millis(300));
        let mut again = open(0);
        assert!(again.is_welcome());
        let mut other = open(1);
        assert!(other.is_welcome());
        again.send(Head::bytes(Kind::Message), b"newest");
        assert_eq!(forming.join().unwrap().unwrap().recv(0, SOON).unwrap().unwrap(), b"newest");
    });
}

#[test]
fn a_stream_that_comes_before_its_session_is_noted_is_taken() {
    let ca = Ca::new();
    let near = fabric(ca.verifier("n0"), "n0", Transport::Tcp, PATIENT);
    let address = near.local_address().unwrap();
    let listener = TcpListener::bind(loopback(0)).unwrap();
    // Rank 0 is node n1, by hand; rank 1 is node n0, which connects to it.
    let mut spec = spec("n0", 1, 1);
    spec.members[0] = Member { node: "n1".into(), address: Some(listener.local_addr().unwrap()) };
    let peer = ca.node_pem("n1");
    thread::scope(|scope| {
        let forming = scope.spawn(|| near.links(spec).map(drop));
        let mut session = Raw::accept(&listener, &peer);
        assert_eq!(session.next().unwrap().head.kind, Kind::Ping);
        let mut stream = Raw::stream(address, &peer, "n0", &hello(1, Lane::Pair, [0, 1], 2, ""));
        thread::sleep(Duration::from_millis(300));
        session.send(Head::bytes(Kind::Ping), &[]);
        assert!(stream.is_welcome());
        forming.join().unwrap().unwrap();
    });
}

#[test]
fn a_node_has_so_many_connections_and_no_more() {
    let scene = scene();
    let held: Vec<Raw> = (0..8).map(|_| scene.session()).collect();
    let open = || {
        let mut session = Raw::connect(scene.address, &scene.peer, "n1", 0);
        session.send(Head::bytes(Kind::Ping), &[]);
        session.next().is_some()
    };
    assert!(!open(), "more than 8 sessions of one node");
    drop(held);
    let start = Instant::now();
    while !open() {
        assert!(start.elapsed() < SOON, "places are not given back");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_stream_of_a_node_without_a_session_is_told_so() {
    let scene = scene();
    let mut stream = scene.stream(1, Lane::Pair);
    let frame = stream.next().expect("a refusal");
    assert_eq!(frame.head.kind, Kind::Refuse);
    assert!(String::from_utf8_lossy(&frame.body).contains("has not connected"));
}
