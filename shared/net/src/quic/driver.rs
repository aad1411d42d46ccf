//! The process's endpoint: sends and receives datagrams, and keeps the time of all connections.
//!
//! Who reads the socket: a thread that waits for a message ([`Driver::wait`]; one at a time, the others sleep), and while
//! none waits, the driver's own thread, which has the timers always.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use forge_shared::ids::NodeId;
use parking_lot::Mutex;
use quinn_proto::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn_proto::{
    ClientConfig, ConnectionEvent, ConnectionHandle, DatagramEvent, Endpoint, EndpointEvent, Incoming, ServerConfig, TransportConfig,
};

use super::config;
use super::connection::{Connection, Effect, State};
use super::socket::{Buffers, Socket, ecn_from};
use super::wire::QuicWire;
use crate::stream::Stream;
use crate::tls::{self, PeerVerifier};
use crate::transport::{Carrier, Events, Lost};
use crate::{NetError, Result};

/// Connections at once, those in their handshake included.
const MAX_CONNECTIONS: usize = 512;
/// From so many on, whoever connects must first show that it has the address that it claims.
const VALIDATE_FROM: usize = MAX_CONNECTIONS / 2;
/// Connections that one node may have open here.
const MAX_NODE_CONNECTIONS: usize = 8;
/// How long the driver's own thread leaves the socket to others after one has waited on it.
const LINGER: Duration = Duration::from_millis(1);
/// Longest sleep of the driver's thread.
const LONGEST_SLEEP: Duration = Duration::from_secs(1);
/// Longest look at the socket by a thread that waits for something else.
const LOOK: Duration = Duration::from_millis(20);
/// Batches that are read before other work gets its turn.
const BATCHES_PER_TURN: usize = 16;

/// See the module's documentation.
pub(crate) struct Driver {
    pub(super) socket: Socket,
    pub(super) verifier: Arc<dyn PeerVerifier>,
    endpoint: Mutex<EndpointState>,
    transport: Arc<TransportConfig>,
    buffers: Mutex<Buffers>,
    /// Set before the first datagram is read.
    events: OnceLock<Weak<dyn Events>>,
    /// For the streams that peers open.
    me: Weak<Driver>,
    started: Instant,
    /// A thread that waits for a message reads the socket.
    led: AtomicBool,
    /// When one did so last, in microseconds since `started`; 0 asks the driver's thread to take over at once.
    led_us: AtomicU64,
    followers: AtomicUsize,
    /// When the driver's thread wakes by itself.
    wakes_us: AtomicU64,
    stopped: AtomicBool,
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct EndpointState {
    endpoint: Endpoint,
    connections: HashMap<ConnectionHandle, Arc<Connection>>,
    /// Whose they are, once that is known.
    nodes: HashMap<ConnectionHandle, NodeId>,
    scratch: Vec<u8>,
}

impl Driver {
    /// Binds the socket.
    pub(crate) fn bind(address: SocketAddr, verifier: Arc<dyn PeerVerifier>, silence: Duration) -> Result<Arc<Self>> {
        let socket = Socket::bind(address).map_err(|error| NetError::Bind { address, reason: error.to_string() })?;
        let transport = config::transport(socket.receive_buffer_bytes(), silence)?;
        // Checked here so that a process without a usable certificate does not start; later ones are made per connection.
        let server = server_config(&*verifier, &transport)?;
        let endpoint = Endpoint::new(Arc::new(config::endpoint()?), Some(server), !socket.may_fragment(), None);
        let state = EndpointState { endpoint, connections: HashMap::new(), nodes: HashMap::new(), scratch: Vec::new() };
        Ok(Arc::new_cyclic(|me| Driver {
            socket,
            verifier,
            endpoint: Mutex::new(state),
            transport,
            buffers: Mutex::new(Buffers::new()),
            events: OnceLock::new(),
            me: Weak::clone(me),
            started: Instant::now(),
            led: AtomicBool::new(false),
            led_us: AtomicU64::new(0),
            followers: AtomicUsize::new(0),
            wakes_us: AtomicU64::new(u64::MAX),
            stopped: AtomicBool::new(false),
            thread: Mutex::new(None),
        }))
    }

    /// Begins to answer.
    pub(crate) fn begin(self: &Arc<Self>, events: Weak<dyn Events>) -> Result<()> {
        if self.events.set(events).is_err() {
            return Err(NetError::Setup { what: "thread", reason: "it runs already".to_owned() });
        }
        let runner = Arc::clone(self);
        let thread = std::thread::Builder::new().name("forge-net".to_owned()).spawn(move || runner.run());
        *self.thread.lock() = Some(thread.map_err(|error| NetError::Setup { what: "thread", reason: error.to_string() })?);
        Ok(())
    }

    pub(crate) fn local_address(&self) -> Result<SocketAddr> {
        self.socket.local_address().map_err(|error| NetError::Setup { what: "address", reason: error.to_string() })
    }

    /// Says goodbye to all peers and ends the thread.
    pub(crate) fn stop(&self) {
        let connections: Vec<_> = self.endpoint.lock().connections.values().cloned().collect();
        for connection in connections {
            self.with(&connection, |state, effects| connection.close(state, "the process ends", effects));
        }
        self.stopped.store(true, Ordering::Release);
        self.socket.wake();
        let thread = self.thread.lock().take();
        if let Some(thread) = thread
            && thread.thread().id() != std::thread::current().id()
        {
            // It panics only where an invariant is broken, which its own message says.
            let _ = thread.join();
        }
    }

    /// Ends connections whose peers are not believed any more.
    pub(crate) fn recheck(&self) {
        let connections: Vec<_> = self.endpoint.lock().connections.values().cloned().collect();
        for connection in connections {
            self.with(&connection, |state, effects| {
                // One in its handshake asks when that is done.
                if state.is_connected()
                    && let Err(reason) = state.identify(self)
                {
                    connection.close(state, &reason, effects);
                }
            });
        }
    }

    /// Connects to a node and waits until it has answered with the right certificate.
    pub(crate) fn dial(&self, node: &NodeId, address: SocketAddr, until: Instant) -> std::result::Result<Arc<Connection>, Lost> {
        let refuse = |reason: String| Lost { reason, silent: false };
        let tls = tls::client_config(&*self.verifier).map_err(refuse)?;
        let tls = QuicClientConfig::try_from(tls).map_err(|error| refuse(error.to_string()))?;
        let mut client = ClientConfig::new(Arc::new(tls));
        client.transport_config(Arc::clone(&self.transport));
        let connection = {
            let mut state = self.endpoint.lock();
            let name = self.verifier.server_name(node);
            let (handle, proto) =
                state.endpoint.connect(Instant::now(), client, address, &name).map_err(|error| refuse(error.to_string()))?;
            let connection = Connection::new(handle, proto, Some(node.clone()));
            state.connections.insert(handle, Arc::clone(&connection));
            connection
        };
        self.with(&connection, |_, _| ());
        loop {
            let seen = connection.progress();
            {
                let state = connection.state.lock();
                if let Some(lost) = state.lost() {
                    return Err(lost.clone());
                }
                if state.is_connected() {
                    drop(state);
                    return Ok(connection);
                }
            }
            if Instant::now() >= until {
                self.with(&connection, |state, effects| connection.close(state, "no answer in time", effects));
                return Err(Lost { reason: "no answer in time".to_owned(), silent: true });
            }
            self.wait(until, &|| connection.progress() != seen, &|| connection.sleep(seen, until));
        }
    }

    /// Changes a connection, lets it send, and tells the layer above.
    pub(super) fn with<T>(&self, connection: &Arc<Connection>, change: impl FnOnce(&mut State, &mut Vec<Effect>) -> T) -> T {
        let mut effects = Vec::new();
        let mut state = connection.state.lock();
        let done = change(&mut state, &mut effects);
        connection.pump(&mut state, self, &mut effects);
        drop(state);
        self.tell(connection, effects);
        done
    }

    pub(super) fn tell(&self, connection: &Arc<Connection>, effects: Vec<Effect>) {
        if effects.is_empty() {
            return;
        }
        // Gone while the process ends.
        let (Some(events), Some(driver)) = (self.events.get().and_then(Weak::upgrade), self.me.upgrade()) else { return };
        let carrier = Carrier::Quic(Arc::clone(connection));
        for effect in effects {
            match effect {
                Effect::Connected => events.connected(carrier.clone()),
                Effect::Opened { node, id, inbox, first } => {
                    let wire = QuicWire::accepted(Arc::clone(&driver), connection, id, &inbox, first.epoch);
                    events.opened(Stream { node, inbox, wire }, first);
                }
                Effect::Lost(lost) => events.lost(&carrier, &lost.reason),
            }
        }
    }

    pub(super) fn endpoint_event(&self, handle: ConnectionHandle, event: EndpointEvent) -> Option<ConnectionEvent> {
        let mut state = self.endpoint.lock();
        if event.is_drained() {
            state.connections.remove(&handle);
            state.nodes.remove(&handle);
        }
        state.endpoint.handle_event(handle, event)
    }

    /// Notes whose a connection is; whether a node may have one more, if the node `opened` it.
    pub(super) fn takes(&self, handle: ConnectionHandle, node: &NodeId, opened: bool) -> bool {
        let mut state = self.endpoint.lock();
        let takes = !opened || state.nodes.values().filter(|other| *other == node).count() < MAX_NODE_CONNECTIONS;
        state.nodes.insert(handle, node.clone());
        takes
    }

    fn now_us(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }

    /// Notes when a connection's timers are due, and wakes the driver's thread where it would sleep beyond that.
    pub(super) fn set_due(&self, connection: &Connection, due: Option<Instant>) {
        let due_us = due.map_or(u64::MAX, |due| due.saturating_duration_since(self.started).as_micros() as u64);
        connection.due_us.store(due_us, Ordering::Release);
        if due_us < self.wakes_us.load(Ordering::Acquire) {
            self.wakes_us.store(due_us, Ordering::Release);
            self.socket.wake();
        }
    }

    /// Waits until `ready` or `until`, reading the socket in this thread unless another does.
    pub(super) fn wait(&self, until: Instant, ready: &dyn Fn() -> bool, sleep: &dyn Fn()) {
        if self.led.swap(true, Ordering::AcqRel) {
            self.followers.fetch_add(1, Ordering::AcqRel);
            sleep();
            self.followers.fetch_sub(1, Ordering::AcqRel);
            return;
        }
        while !ready() && !self.stopped.load(Ordering::Acquire) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            self.socket.wait_readable(left.min(LOOK));
            self.receive();
        }
        let others = self.followers.load(Ordering::Acquire) > 0;
        self.led_us.store(if others { 0 } else { self.now_us() }, Ordering::Release);
        self.led.store(false, Ordering::Release);
        if others {
            self.socket.wake();
        }
    }

    fn run(&self) {
        while !self.stopped.load(Ordering::Acquire) {
            let led_ago = self.now_us().saturating_sub(self.led_us.load(Ordering::Acquire));
            let led = self.led.load(Ordering::Acquire) || led_ago < LINGER.as_micros() as u64;
            // Announced before the timers are looked at: one that is set meanwhile wakes this thread.
            self.wakes_us.store(u64::MAX, Ordering::Release);
            let due_us = self.timers();
            let sleep = Duration::from_micros(due_us.saturating_sub(self.now_us())).min(if led { LINGER } else { LONGEST_SLEEP });
            let wakes_us = self.now_us() + sleep.as_micros() as u64;
            if self.wakes_us.swap(wakes_us, Ordering::AcqRel) != u64::MAX {
                continue;
            }
            self.socket.wait(!led, sleep);
            if !led {
                self.receive();
            }
        }
    }

    /// Handles the timers that are due; when the next ones are.
    fn timers(&self) -> u64 {
        let connections: Vec<_> = self.endpoint.lock().connections.values().cloned().collect();
        for connection in &connections {
            if connection.due_us.load(Ordering::Acquire) <= self.now_us() {
                self.with(connection, |state, _| state.proto.handle_timeout(Instant::now()));
            }
        }
        connections.iter().map(|connection| connection.due_us.load(Ordering::Acquire)).min().unwrap_or(u64::MAX)
    }

    /// Reads the socket until it is empty, or for a turn.
    fn receive(&self) {
        let mut buffers = self.buffers.lock();
        let mut touched: Vec<Arc<Connection>> = Vec::new();
        for _ in 0..BATCHES_PER_TURN {
            let some = self.socket.receive(&mut buffers, |meta, datagram| {
                let ecn = meta.ecn.map(ecn_from);
                let connection = self.datagram(meta.addr, meta.dst_ip, ecn, datagram);
                if let Some(connection) = connection
                    && !touched.iter().any(|other| other.handle == connection.handle)
                {
                    touched.push(connection);
                }
            });
            for connection in touched.drain(..) {
                self.with(&connection, |_, _| ());
            }
            if !some {
                return;
            }
        }
    }

    /// Hands one datagram to its connection, which then has to be pumped.
    fn datagram(
        &self,
        from: SocketAddr,
        to: Option<std::net::IpAddr>,
        ecn: Option<quinn_proto::EcnCodepoint>,
        datagram: &[u8],
    ) -> Option<Arc<Connection>> {
        let now = Instant::now();
        let mut state = self.endpoint.lock();
        let EndpointState { endpoint, connections, scratch, .. } = &mut *state;
        scratch.clear();
        match endpoint.handle(now, from, to, ecn, datagram.into(), scratch)? {
            DatagramEvent::ConnectionEvent(handle, event) => {
                let connection = connections.get(&handle).cloned()?;
                drop(state);
                connection.state.lock().proto.handle_event(event);
                Some(connection)
            }
            DatagramEvent::NewConnection(incoming) => self.accept(&mut state, incoming, now),
            DatagramEvent::Response(transmit) => {
                self.socket.send(&transmit, scratch);
                None
            }
        }
    }

    fn accept(&self, state: &mut EndpointState, incoming: Incoming, now: Instant) -> Option<Arc<Connection>> {
        let EndpointState { endpoint, connections, scratch, .. } = state;
        scratch.clear();
        let mut incoming = incoming;
        if connections.len() >= VALIDATE_FROM && !incoming.remote_address_validated() {
            match endpoint.retry(incoming, scratch) {
                Ok(transmit) => {
                    self.socket.send(&transmit, scratch);
                    return None;
                }
                Err(refused) => incoming = refused.into_incoming(),
            }
        }
        let server = server_config(&*self.verifier, &self.transport);
        let (true, Ok(server)) = (connections.len() < MAX_CONNECTIONS, server.as_ref()) else {
            let why = server.err().map_or("too many connections".to_owned(), |error| error.to_string());
            tracing::warn!(from = %incoming.remote_address(), %why, "refused a connection to the data plane");
            let transmit = endpoint.refuse(incoming, scratch);
            self.socket.send(&transmit, scratch);
            return None;
        };
        match endpoint.accept(incoming, now, scratch, Some(Arc::clone(server))) {
            Ok((handle, proto)) => {
                let connection = Connection::new(handle, proto, None);
                connections.insert(handle, Arc::clone(&connection));
                Some(connection)
            }
            Err(refused) => {
                if let Some(transmit) = refused.response {
                    self.socket.send(&transmit, scratch);
                }
                None
            }
        }
    }
}

fn server_config(verifier: &dyn PeerVerifier, transport: &Arc<TransportConfig>) -> Result<Arc<ServerConfig>> {
    let setup = |reason: String| NetError::Setup { what: "certificate", reason };
    let tls = tls::server_config(verifier).map_err(setup)?;
    let tls = QuicServerConfig::try_from(tls).map_err(|error| setup(error.to_string()))?;
    let mut server = ServerConfig::with_crypto(Arc::new(tls));
    server.transport_config(Arc::clone(transport));
    // Nodes do not move; a connection that seems to is not the peer's.
    server.migration(false);
    Ok(Arc::new(server))
}
