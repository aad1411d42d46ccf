//! As `hostile`, over QUIC: peers that open connections and streams and leave them there.

mod support;

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use forge_net::Transport;
use forge_shared::ids::NodeId;
use quinn_proto::crypto::rustls::QuicClientConfig;
use quinn_proto::{ClientConfig, Connection, ConnectionHandle, DatagramEvent, Dir, Endpoint, EndpointConfig, Event, VarInt};
use support::{Ca, NodePem, PATIENT, fabric, loopback, spec};

const SOON: Duration = Duration::from_secs(20);

/// A peer that speaks QUIC by hand.
struct Raw {
    socket: UdpSocket,
    endpoint: Endpoint,
    target: SocketAddr,
    config: ClientConfig,
}

impl Raw {
    fn new(target: SocketAddr, peer: &NodePem) -> Self {
        let mut tls = (*peer.verifier(true).client_config().unwrap()).clone();
        tls.alpn_protocols = vec![b"forge-net/1".to_vec()];
        let config = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
        let socket = UdpSocket::bind(loopback(0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(5))).unwrap();
        Raw { socket, endpoint: Endpoint::new(Arc::new(EndpointConfig::default()), None, true, None), target, config }
    }

    fn connect(&mut self, peer: &NodePem) -> (ConnectionHandle, Connection) {
        let name = peer.verifier(true).server_name(&NodeId("n1".to_owned()));
        let (handle, mut connection) = self.endpoint.connect(Instant::now(), self.config.clone(), self.target, &name).unwrap();
        self.send(&mut connection);
        (handle, connection)
    }

    fn send(&self, connection: &mut Connection) {
        let mut bytes = Vec::new();
        while let Some(transmit) = connection.poll_transmit(Instant::now(), 1, &mut bytes) {
            self.socket.send_to(&bytes[..transmit.size], transmit.destination).unwrap();
            bytes.clear();
        }
    }

    /// Sends what is due and takes what has come; whether the connection was made in this turn.
    fn turn(&mut self, handle: ConnectionHandle, connection: &mut Connection) -> bool {
        self.send(connection);
        let mut bytes = [0; 65_536];
        while let Ok((length, from)) = self.socket.recv_from(&mut bytes) {
            let handled = self.endpoint.handle(Instant::now(), from, None, None, bytes[..length].into(), &mut Vec::new());
            if let Some(DatagramEvent::ConnectionEvent(_, event)) = handled {
                connection.handle_event(event);
            }
            self.send(connection);
        }
        if connection.poll_timeout().is_some_and(|due| due <= Instant::now()) {
            connection.handle_timeout(Instant::now());
        }
        while let Some(event) = connection.poll_endpoint_events() {
            if let Some(answer) = self.endpoint.handle_event(handle, event) {
                connection.handle_event(answer);
            }
        }
        let mut connected = false;
        while let Some(event) = connection.poll() {
            connected |= matches!(event, Event::Connected);
        }
        connected
    }
}

#[test]
fn handshakes_that_nobody_ends_do_not_keep_a_node_out() {
    let ca = Ca::new();
    let nodes = [0, 1].map(|node| fabric(ca.verifier(&format!("n{node}")), &format!("n{node}"), Transport::Quic, PATIENT));
    let peer = ca.node_pem("n7");
    let mut raw = Raw::new(nodes[1].local_address().unwrap(), &peer);
    // More than there may be connections at all, whose answers nobody reads.
    let _open: Vec<_> = (0..700)
        .map(|_| {
            thread::sleep(Duration::from_millis(3));
            raw.connect(&peer)
        })
        .collect();
    thread::scope(|scope| {
        let far = scope.spawn(|| nodes[1].links(spec(&nodes, &[0, 1], 1, 1)));
        let near = nodes[0].links(spec(&nodes, &[0, 1], 0, 1)).unwrap();
        near.send(1, b"in").unwrap();
        assert_eq!(far.join().unwrap().unwrap().recv(0, PATIENT).unwrap().unwrap(), b"in");
    });
}

#[test]
fn streams_that_end_before_their_hello_are_forgotten() {
    let ca = Ca::new();
    let node = fabric(ca.verifier("n1"), "n1", Transport::Quic, PATIENT);
    let peer = ca.node_pem("n0");
    let mut raw = Raw::new(node.local_address().unwrap(), &peer);
    let (handle, mut connection) = raw.connect(&peer);
    let start = Instant::now();
    while !raw.turn(handle, &mut connection) {
        assert!(start.elapsed() < SOON, "no connection");
    }
    // 1024 may be open at once; these are not.
    let mut opened = 0;
    while opened < 2000 {
        assert!(start.elapsed() < 2 * SOON, "only {opened} streams could be opened");
        let Some(id) = connection.streams().open(Dir::Bi) else {
            raw.turn(handle, &mut connection);
            continue;
        };
        let mut stream = connection.send_stream(id);
        match opened % 3 {
            0 => stream.finish().unwrap(),
            1 => stream.reset(VarInt::from_u32(9)).unwrap(),
            _ => {
                // The beginning of a hello.
                assert_eq!(stream.write(&[1, 1, 0]).unwrap(), 3);
                stream.finish().unwrap();
            }
        }
        opened += 1;
        if opened % 64 == 0 {
            raw.turn(handle, &mut connection);
        }
    }
}

#[test]
fn a_node_has_so_many_connections_and_no_more() {
    let ca = Ca::new();
    let nodes = [0, 1].map(|node| fabric(ca.verifier(&format!("n{node}")), &format!("n{node}"), Transport::Quic, PATIENT));
    let peer = ca.node_pem("n7");
    let mut closed = 0;
    let mut held = Vec::new();
    for _ in 0..10 {
        let mut raw = Raw::new(nodes[1].local_address().unwrap(), &peer);
        let (handle, mut connection) = raw.connect(&peer);
        let start = Instant::now();
        // This side has its connection before the other knows who it is.
        while !raw.turn(handle, &mut connection) {
            assert!(start.elapsed() < SOON, "no connection");
        }
        while !connection.is_closed() && start.elapsed() < Duration::from_secs(1) {
            raw.send(&mut connection);
            let mut bytes = [0; 65_536];
            while let Ok((length, from)) = raw.socket.recv_from(&mut bytes) {
                let handled = raw.endpoint.handle(Instant::now(), from, None, None, bytes[..length].into(), &mut Vec::new());
                if let Some(DatagramEvent::ConnectionEvent(_, event)) = handled {
                    connection.handle_event(event);
                }
            }
        }
        closed += usize::from(connection.is_closed());
        held.push((raw, connection));
    }
    assert_eq!(closed, 2, "a node has 8 connections");
    // Another node is not concerned.
    thread::scope(|scope| {
        let far = scope.spawn(|| nodes[1].links(spec(&nodes, &[0, 1], 1, 1)).map(drop));
        nodes[0].links(spec(&nodes, &[0, 1], 0, 1)).unwrap();
        far.join().unwrap().unwrap();
    });
}
