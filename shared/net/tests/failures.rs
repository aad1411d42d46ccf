//! What peers and networks do wrong: each is a typed error within its bound, and the fabric lives on.

mod support;

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use forge_net::group::GroupError;
use forge_net::{Fabric, GroupSpec, Member, MessageLinks, NetError, SILENCE, Transport};
use forge_shared::ids::{Epoch, NodeId};
use support::{Ca, PATIENT, fabric, fabrics, loopback, spec};

/// A dead peer is known within this.
const NOTICED: Duration = Duration::from_secs(2);

fn link(fabrics: &[Fabric], specs: [GroupSpec; 2]) -> [Result<MessageLinks, NetError>; 2] {
    thread::scope(|scope| {
        let [first, second] = specs;
        let other = scope.spawn(|| fabrics[1].links(second));
        [fabrics[0].links(first), other.join().unwrap()]
    })
}

fn link_of(fabrics: &[Fabric], nodes: [usize; 2], epoch: u64) -> [Result<MessageLinks, NetError>; 2] {
    thread::scope(|scope| {
        let other = scope.spawn(|| fabrics[nodes[1]].links(spec(fabrics, &nodes, 1, epoch)));
        [fabrics[nodes[0]].links(spec(fabrics, &nodes, 0, epoch)), other.join().unwrap()]
    })
}

fn linked(fabrics: &[Fabric], epoch: u64) -> [MessageLinks; 2] {
    link_of(fabrics, [0, 1], epoch).map(Result::unwrap)
}

fn soon(spec: GroupSpec) -> GroupSpec {
    GroupSpec { form_timeout: Duration::from_secs(8), ..spec }
}

/// How late this machine wakes who sleeps: a busy one must not fail a test of time.
struct Lag(Arc<AtomicBool>, thread::JoinHandle<Duration>);

impl Lag {
    fn begin() -> Self {
        let ended = Arc::new(AtomicBool::new(false));
        let watched = Arc::clone(&ended);
        let nap = Duration::from_millis(10);
        let watch = move || {
            let mut latest = Duration::ZERO;
            while !watched.load(Ordering::Relaxed) {
                let start = Instant::now();
                thread::sleep(nap);
                latest = latest.max(start.elapsed() - nap);
            }
            latest
        };
        Lag(ended, thread::spawn(watch))
    }

    fn end(self) -> Duration {
        self.0.store(true, Ordering::Relaxed);
        self.1.join().unwrap()
    }
}

/// Passes datagrams between two sockets as long as it may, and only those that are short enough.
struct Path {
    address: SocketAddr,
    longest: Arc<AtomicUsize>,
    passes: Arc<AtomicBool>,
    ended: Arc<AtomicBool>,
}

impl Path {
    fn to(target: SocketAddr) -> Self {
        let near = UdpSocket::bind(loopback(0)).unwrap();
        let path = Path {
            address: near.local_addr().unwrap(),
            longest: Arc::new(AtomicUsize::new(usize::MAX)),
            passes: Arc::new(AtomicBool::new(true)),
            ended: Arc::default(),
        };
        let far = UdpSocket::bind(loopback(0)).unwrap();
        far.connect(target).unwrap();
        let client = Arc::new(std::sync::Mutex::new(None));
        let carry = |from: UdpSocket, to: UdpSocket, outward: bool| {
            let (longest, passes, ended, client) =
                (Arc::clone(&path.longest), Arc::clone(&path.passes), Arc::clone(&path.ended), Arc::clone(&client));
            from.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            thread::spawn(move || {
                let mut bytes = vec![0; 65_536];
                while !ended.load(Ordering::Relaxed) {
                    let Ok((length, source)) = from.recv_from(&mut bytes) else { continue };
                    if outward {
                        *client.lock().unwrap() = Some(source);
                    }
                    if !passes.load(Ordering::Relaxed) || length > longest.load(Ordering::Relaxed) {
                        continue;
                    }
                    let _ = match (outward, *client.lock().unwrap()) {
                        (true, _) => to.send(&bytes[..length]),
                        (false, Some(client)) => to.send_to(&bytes[..length], client),
                        (false, None) => Ok(0),
                    };
                }
            });
        };
        carry(near.try_clone().unwrap(), far.try_clone().unwrap(), true);
        carry(far, near, false);
        path
    }
}

impl Drop for Path {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
    }
}

/// Two fabrics whose datagrams go through a path.
fn over_a_path(silence: Duration) -> (Vec<Fabric>, Path, [MessageLinks; 2]) {
    let fabrics = fabrics(2, Transport::Quic, silence);
    let path = Path::to(fabrics[1].local_address().unwrap());
    let specs = [0, 1].map(|rank| {
        let mut spec = spec(&fabrics, &[0, 1], rank, 1);
        spec.members[1].address = Some(path.address);
        spec
    });
    let links = link(&fabrics, specs).map(Result::unwrap);
    (fabrics, path, links)
}

#[test]
fn messages_arrive_whole_and_in_order() {
    for transport in [Transport::Quic, Transport::Tcp] {
        let fabrics = fabrics(2, transport, PATIENT);
        messages(linked(&fabrics, 3));
    }
}

fn messages([near, far]: [MessageLinks; 2]) {
    assert_eq!((near.rank(), far.rank(), near.size(), far.epoch()), (0, 1, 2, Epoch(3)));
    assert_eq!(far.recv(0, Duration::from_millis(10)).unwrap(), None);
    let messages: Vec<Vec<u8>> = [0, 1, 1000, 5_000_000, 3].map(|length| (0..length).map(|byte| byte as u8).collect()).into();
    thread::scope(|scope| {
        scope.spawn(|| messages.iter().for_each(|message| near.send(1, message).unwrap()));
        for message in &messages {
            assert!(far.recv(0, PATIENT).unwrap().as_ref() == Some(message));
        }
    });
    far.send(0, b"still here").unwrap();
    assert_eq!(near.recv(1, PATIENT).unwrap().unwrap(), b"still here");
    assert!(matches!(near.send(0, b""), Err(NetError::NotAPeer { .. })));
    assert!(matches!(near.send(1, &vec![0; (64 << 20) + 1]), Err(NetError::TooLong { .. })));
    near.send(1, b"refusals end nothing").unwrap();
}

#[test]
fn a_peer_that_ends_its_group_or_process_is_known_at_once() {
    for transport in [Transport::Quic, Transport::Tcp] {
        ends(fabrics(2, transport, PATIENT));
    }
}

fn ends(mut fabrics: Vec<Fabric>) {
    let [near, far] = linked(&fabrics, 1);
    let start = Instant::now();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| near.recv(1, PATIENT));
        thread::sleep(Duration::from_millis(50));
        far.abort("device lost");
        let error = waiting.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("the group of epoch 1 was aborted: device lost"), "{error}");
    });
    assert!(matches!(near.send(1, b""), Err(NetError::Aborted { epoch: Epoch(1), .. })));

    let [near, far] = linked(&fabrics, 2);
    drop(far);
    let error = near.recv(1, PATIENT).unwrap_err().to_string();
    assert!(error.contains("left the group"), "{error}");

    let [near, _far] = linked(&fabrics, 3);
    drop(fabrics.pop());
    let error = near.recv(1, PATIENT).unwrap_err();
    assert!(matches!(error, NetError::PeerLost { .. } | NetError::Aborted { .. }), "{error}");
    assert!(start.elapsed() < PATIENT / 2, "{:?}", start.elapsed());
}

/// Nobody says anything for longer than a peer may be silent, but for the transports' own signs of life.
#[test]
fn peers_with_nothing_to_say_stay() {
    for transport in [Transport::Quic, Transport::Tcp] {
        let fabrics = fabrics(2, transport, Duration::from_secs(4));
        let [near, far] = linked(&fabrics, 1);
        thread::sleep(Duration::from_secs(6));
        far.send(0, b"still here").unwrap();
        assert_eq!(near.recv(1, PATIENT).unwrap().unwrap(), b"still here");
    }
}

#[test]
fn a_silent_peer_is_dead_within_two_seconds() {
    let (_fabrics, path, [near, far]) = over_a_path(SILENCE);
    near.send(1, b"hello").unwrap();
    assert!(far.recv(0, PATIENT).unwrap().is_some());
    let lag = Lag::begin();
    path.passes.store(false, Ordering::Relaxed);
    let start = Instant::now();
    thread::scope(|scope| {
        for (links, peer) in [(&near, 1), (&far, 0)] {
            scope.spawn(move || {
                let error = links.recv(peer, PATIENT).unwrap_err();
                assert!(matches!(error, NetError::PeerLost { .. }), "{error}");
                assert!(error.to_string().contains("timed out"), "{error}");
            });
        }
    });
    let (took, lag) = (start.elapsed(), lag.end());
    assert!(took < NOTICED + 4 * lag, "{took:?} on a machine that is {lag:?} late");
}

#[test]
fn a_path_that_begins_to_swallow_long_datagrams_is_found_out() {
    let (_fabrics, path, [near, far]) = over_a_path(PATIENT);
    let large = vec![7; 400_000];
    let carried = |far: &MessageLinks| {
        thread::scope(|scope| {
            scope.spawn(|| near.send(1, &large).unwrap());
            far.recv(0, PATIENT).unwrap().unwrap() == large
        })
    };
    assert!(carried(&far));
    // Long datagrams have been in use by now; a tunnel on the way takes no more than these.
    path.longest.store(1300, Ordering::Relaxed);
    assert!(carried(&far));
}

#[test]
fn a_peer_that_stops_reading_holds_up_its_sender_and_nobody_else() {
    let fabrics = fabrics(2, Transport::Quic, PATIENT);
    let specs = |epoch| [0, 1].map(|rank| GroupSpec { deadline: Duration::from_millis(700), ..spec(&fabrics, &[0, 1], rank, epoch) });
    let [near, far] = link(&fabrics, specs(1)).map(Result::unwrap);
    let [other_near, other_far] = link(&fabrics, specs(2)).map(Result::unwrap);
    let message = vec![1; 1 << 20];
    let mut sent = 0;
    let error = loop {
        match near.send(1, &message) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
        assert!(sent < 64, "what a peer does not read is bounded");
    };
    assert!(matches!(error, NetError::Timeout { operation: "send", .. }), "{error}");
    other_near.send(1, b"passes").unwrap();
    assert_eq!(other_far.recv(0, PATIENT).unwrap().unwrap(), b"passes");
    // What was sent before can be read no more: the group is over, for both.
    let error = far.recv(0, PATIENT).map(|message| message.map(|message| message.len()));
    assert!(error.is_err() || sent > 0);
}

#[test]
fn an_abort_wakes_a_sender_whose_peer_does_not_read() {
    for transport in [Transport::Quic, Transport::Tcp] {
        let fabrics = fabrics(2, transport, PATIENT);
        let [near, far] = linked(&fabrics, 1);
        let message = vec![1; 1 << 20];
        let sent = AtomicUsize::new(0);
        let start = Instant::now();
        thread::scope(|scope| {
            let sending = scope.spawn(|| {
                loop {
                    match near.send(1, &message) {
                        Ok(()) => sent.fetch_add(1, Ordering::Relaxed),
                        Err(error) => return error,
                    };
                }
            });
            until_stuck(&[&sent]);
            near.abort("enough");
            let error = sending.join().unwrap();
            assert!(error.to_string().contains("the group of epoch 1 was aborted: enough"), "{transport:?}: {error}");
        });
        let error = loop {
            match far.recv(0, PATIENT) {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert!(error.to_string().contains("the group of epoch 1 was aborted: enough"), "{transport:?}: {error}");
        assert!(start.elapsed() < PATIENT / 2, "{:?}", start.elapsed());
    }
}

/// Returns once nobody has sent anything for a while.
fn until_stuck(sent: &[&AtomicUsize]) {
    let count = || sent.iter().map(|sent| sent.load(Ordering::Relaxed)).sum::<usize>();
    let mut before = usize::MAX;
    while before != count() {
        before = count();
        thread::sleep(Duration::from_secs(1));
    }
}

#[test]
fn streams_that_nobody_reads_stop_no_others_and_no_notice() {
    let fabrics = fabrics(2, Transport::Quic, PATIENT);
    let stuck: Vec<[MessageLinks; 2]> = (1..=10).map(|epoch| group_of_its_own(&fabrics, epoch)).collect();
    let [near, far] = group_of_its_own(&fabrics, 11);
    let message = vec![1; 1 << 20];
    let sent: Vec<AtomicUsize> = stuck.iter().map(|_| AtomicUsize::new(0)).collect();
    thread::scope(|scope| {
        let sending = |at: usize| {
            let ([links, _], sent, message) = (&stuck[at], &sent[at], &message);
            scope.spawn(move || {
                while links.send(1, message).is_ok() {
                    sent.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let senders: Vec<_> = (0..stuck.len()).map(sending).collect();
        until_stuck(&sent.iter().collect::<Vec<_>>());
        near.send(1, b"passes").unwrap();
        assert_eq!(far.recv(0, PATIENT / 4).unwrap().expect("a message beside streams that nobody reads"), b"passes");
        for [near, far] in &stuck {
            near.abort("enough");
            let error = loop {
                match far.recv(0, PATIENT / 4) {
                    Ok(Some(_)) => {}
                    Ok(None) => panic!("the notice has not come"),
                    Err(error) => break error,
                }
            };
            assert!(error.to_string().contains("was aborted: enough"), "{error}");
        }
        senders.into_iter().for_each(|sender| sender.join().unwrap());
    });
}

/// Links under a name of their own, so that several are there at once.
fn group_of_its_own(fabrics: &[Fabric], number: u64) -> [MessageLinks; 2] {
    let specs = [0, 1].map(|rank| {
        let mut spec = spec(fabrics, &[0, 1], rank, 1);
        spec.id.name = format!("chat/{number}");
        spec
    });
    link(fabrics, specs).map(Result::unwrap)
}

#[test]
fn peers_outside_the_group_and_other_wishes_are_refused() {
    for transport in [Transport::Quic, Transport::Tcp] {
        refusals(&fabrics(3, transport, PATIENT));
    }
}

fn refusals(fabrics: &[Fabric]) {
    // Node 0 says that it is rank 0 of a group whose rank 0 is node 1.
    let _known = link_of(fabrics, [1, 2], 9).map(Result::unwrap);
    let mut stranger = soon(spec(fabrics, &[1, 2], 0, 10));
    stranger.members[0] = Member { node: "n0".into(), address: None };
    thread::scope(|scope| {
        let group = scope.spawn(|| fabrics[2].links(soon(spec(fabrics, &[1, 2], 1, 10))).map(|_| ()));
        let refused = fabrics[0].links(stranger).map(|_| ()).unwrap_err();
        assert!(
            matches!(&refused, NetError::Refused { rank: 1, reason, .. } if reason.contains("node n0 says that it is rank 0")),
            "{refused}"
        );
        let alone = group.join().unwrap().unwrap_err();
        assert!(matches!(alone, NetError::Timeout { missing: 1, .. }), "{alone}");
    });
    // Weights that differ by one byte.
    let specs = [0, 1].map(|rank| GroupSpec { agreement: format!("sha256:{rank}"), ..spec(fabrics, &[0, 1], rank, 2) });
    let [near, far] = link(fabrics, specs).map(|links| links.map(|_| ()).unwrap_err());
    assert!(matches!(&near, NetError::Refused { rank: 1, reason, .. } if reason.contains("agreement")), "{near}");
    assert!(matches!(far, NetError::Group(GroupError::Disagreement { rank: 0, field: "agreement", .. })), "{far}");
    // Nobody comes.
    let brief = GroupSpec { form_timeout: Duration::from_millis(300), ..spec(fabrics, &[0, 1], 1, 3) };
    let alone = fabrics[1].links(brief).map(|_| ()).unwrap_err();
    assert!(matches!(alone, NetError::Timeout { operation: "form", missing: 1, .. }), "{alone}");
    // This node is no member, or the description is none.
    assert!(fabrics[2].links(spec(fabrics, &[0, 1], 1, 4)).is_err());
    assert!(fabrics[0].links(GroupSpec { members: Vec::new(), ..spec(fabrics, &[0, 1], 0, 4) }).is_err());
}

#[test]
fn an_epoch_that_is_over_is_refused_for_all() {
    for transport in [Transport::Quic, Transport::Tcp] {
        over(&fabrics(2, transport, PATIENT));
    }
}

fn over(fabrics: &[Fabric]) {
    drop(linked(fabrics, 5));
    // One node has forgotten: it began anew under the same name.
    for epoch in [4, 5] {
        let late = fabrics[0].links(spec(fabrics, &[0, 1], 0, epoch)).map(|_| ()).unwrap_err();
        assert!(matches!(&late, NetError::Group(GroupError::Closed { closed: Epoch(5), .. })), "{late}");
    }
    drop(linked(fabrics, 6));
}

#[test]
fn only_certificates_of_the_cluster_that_name_the_node_are_taken() {
    for transport in [Transport::Quic, Transport::Tcp] {
        certificates(transport);
    }
}

fn certificates(transport: Transport) {
    let (ca, other_ca) = (Ca::new(), Ca::new());
    let target = fabric(ca.verifier("n1"), "n1", transport, PATIENT);
    let address = target.local_address().unwrap();
    let to_target = |node: &str| {
        let member = |node: &str, address| Member { node: NodeId(node.to_owned()), address };
        GroupSpec {
            id: support::group_id(1),
            members: vec![member(node, Some(loopback(1))), member("n1", Some(address))],
            rank: 0,
            agreement: String::new(),
            urgent: false,
            form_timeout: PATIENT,
            deadline: PATIENT,
        }
    };
    let dial = |verifier, node: &str| {
        let start = Instant::now();
        let error = fabric(verifier, node, transport, PATIENT).links(to_target(node)).map(|_| ()).unwrap_err();
        assert!(start.elapsed() < PATIENT / 2, "a refusal is no silence");
        error
    };
    for (verifier, what) in [(other_ca.verifier("n0"), "another CA"), (ca.node_pem("n0").verifier(false), "no certificate")] {
        let error = dial(verifier, "n0");
        assert!(matches!(error, NetError::Unreachable { .. } | NetError::PeerLost { .. }), "{what}: {error}");
    }
    // A node that answers under another name than it was called by.
    let impostor = fabric(ca.verifier("n2"), "n1", transport, PATIENT);
    let caller = fabric(ca.verifier("n0"), "n0", transport, PATIENT);
    let mut spec = to_target("n0");
    spec.members[1].address = Some(impostor.local_address().unwrap());
    let error = caller.links(spec).map(|_| ()).unwrap_err();
    assert!(matches!(error, NetError::Unreachable { .. }), "{error}");
    // Noise on the port disturbs nobody.
    let noise = UdpSocket::bind(loopback(0)).unwrap();
    for length in [0, 1, 20, 1200, 1400] {
        noise.send_to(&vec![0xc3; length], address).unwrap();
    }
    let ok = fabric(ca.verifier("n0"), "n0", transport, PATIENT);
    thread::scope(|scope| {
        let other = scope.spawn(|| target.links(GroupSpec { rank: 1, ..to_target("n0") }));
        ok.links(to_target("n0")).unwrap();
        other.join().unwrap().unwrap();
    });
}
