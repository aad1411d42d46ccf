//! TCP with TLS, for networks that carry no UDP.
//!
//! Each stream is a TLS connection of its own, so that a peer that does not read one holds up no other; one more per pair of
//! nodes, made by the one with the lower id, shows by pings that both live and carries what must go ahead of bulk.
//!
//! Invariants: as with QUIC, whoever connects has shown a certificate that names its node; when the pings stop, all streams
//! with that node fail.

mod pipe;
mod session;

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use forge_shared::ids::{Epoch, NodeId};
use parking_lot::{Condvar, Mutex};
use rustls::pki_types::ServerName;

use crate::frame::{Frame, FrameReader, Head, Kind};
use crate::stream::{Failure, Inbox, Stream};
use crate::tls::{self, PeerVerifier};
use crate::transport::{Carrier, Events, Lost};
use crate::{NetError, Result};
use pipe::{Pipe, PipeWire};
pub(crate) use session::Session;

/// Handshakes of peers at once; more are turned away.
const MAX_HANDSHAKES: usize = 64;
/// Connections that one node may have open here, beside those for streams.
const MAX_SESSIONS: usize = 8;
/// Streams that one node may have open here, each of which is a connection and a thread.
const MAX_STREAMS: usize = 1024;
/// Longest handshake, from the connection to the peer's first frame, and longest wait of a stream for its node's session.
const HANDSHAKE: Duration = Duration::from_secs(5);
/// Pause after a failed accept: out of file descriptors, which others must give back first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// The process's listener and its sessions.
pub(crate) struct TcpDriver {
    listener: TcpListener,
    verifier: Arc<dyn PeerVerifier>,
    silence: Duration,
    events: OnceLock<Weak<dyn Events>>,
    sessions: Mutex<Vec<Weak<Session>>>,
    /// There is one more.
    session_came: Condvar,
    /// What each node has opened here.
    opened: Mutex<HashMap<NodeId, Opened>>,
    handshakes: AtomicUsize,
    stopped: AtomicBool,
}

/// Connections that a node has opened here.
#[derive(Default)]
struct Opened {
    sessions: usize,
    streams: usize,
}

/// What a node opens.
#[derive(Clone, Copy)]
enum Place {
    Session,
    Stream,
}

impl Place {
    fn taken(self, opened: &mut Opened) -> (&mut usize, usize) {
        match self {
            Place::Session => (&mut opened.sessions, MAX_SESSIONS),
            Place::Stream => (&mut opened.streams, MAX_STREAMS),
        }
    }
}

/// One of a node's places, until it is dropped.
struct Held<'a> {
    driver: &'a TcpDriver,
    node: NodeId,
    place: Place,
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut nodes = self.driver.opened.lock();
        if let Some(opened) = nodes.get_mut(&self.node) {
            *self.place.taken(opened).0 -= 1;
            if opened.sessions + opened.streams == 0 {
                nodes.remove(&self.node);
            }
        }
    }
}

impl TcpDriver {
    pub(crate) fn bind(address: SocketAddr, verifier: Arc<dyn PeerVerifier>, silence: Duration) -> Result<Arc<Self>> {
        let listener = TcpListener::bind(address).map_err(|error| NetError::Bind { address, reason: error.to_string() })?;
        tls::server_config(&*verifier).map_err(|reason| NetError::Setup { what: "certificate", reason })?;
        Ok(Arc::new(TcpDriver {
            listener,
            verifier,
            silence,
            events: OnceLock::new(),
            sessions: Mutex::default(),
            session_came: Condvar::new(),
            opened: Mutex::default(),
            handshakes: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
        }))
    }

    pub(crate) fn local_address(&self) -> Result<SocketAddr> {
        self.listener.local_addr().map_err(|error| NetError::Setup { what: "address", reason: error.to_string() })
    }

    pub(crate) fn begin(self: &Arc<Self>, events: Weak<dyn Events>) -> Result<()> {
        if self.events.set(events).is_err() {
            return Err(NetError::Setup { what: "thread", reason: "it runs already".to_owned() });
        }
        let driver = Arc::clone(self);
        spawn("forge-net", move || driver.accept())
    }

    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        let sessions: Vec<_> = self.sessions.lock().iter().filter_map(Weak::upgrade).collect();
        for session in sessions {
            session.end("the process ends");
        }
        self.session_came.notify_all();
        // Wakes the thread that accepts.
        if let Ok(address) = self.listener.local_addr() {
            let _ = TcpStream::connect_timeout(&address, HANDSHAKE);
        }
    }

    /// Ends sessions with nodes that are not believed any more, and their streams with them.
    pub(crate) fn recheck(&self) {
        let sessions: Vec<_> = self.sessions.lock().iter().filter_map(Weak::upgrade).collect();
        for session in sessions {
            if let Err(reason) = session.peer(&*self.verifier) {
                session.end(&reason);
            }
        }
    }

    fn events(&self) -> Option<Arc<dyn Events>> {
        self.events.get().and_then(Weak::upgrade)
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    fn accept(self: Arc<Self>) {
        while !self.is_stopped() {
            let Ok((socket, from)) = self.listener.accept() else {
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            };
            if self.handshakes.fetch_add(1, Ordering::AcqRel) >= MAX_HANDSHAKES {
                self.handshakes.fetch_sub(1, Ordering::AcqRel);
                tracing::warn!(%from, "refused a connection to the data plane: too many handshakes");
                continue;
            }
            let driver = Arc::clone(&self);
            let spawned = spawn("forge-net-in", move || {
                let shaken = driver.shake_hands(socket);
                driver.handshakes.fetch_sub(1, Ordering::AcqRel);
                match shaken {
                    Ok((pipe, node, inbox, first)) => driver.take_in(pipe, node, inbox, first),
                    Err(error) => tracing::warn!(%from, %error, "refused a connection to the data plane"),
                }
            });
            if spawned.is_err() {
                self.handshakes.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }

    /// A peer's connection up to its first frame.
    fn shake_hands(&self, socket: TcpStream) -> io::Result<(Arc<Pipe>, NodeId, Arc<Inbox>, Frame)> {
        let config = tls::server_config(&*self.verifier).map_err(io::Error::other)?;
        let connection = rustls::ServerConnection::new(Arc::new(config)).map_err(io::Error::other)?;
        let until = Instant::now() + HANDSHAKE;
        let pipe = Pipe::new(socket, connection.into(), until)?;
        let node = pipe.peer(&*self.verifier).map_err(|reason| {
            pipe.refuse(&reason, until);
            io::Error::other(reason)
        })?;
        let inbox = Inbox::new(FrameReader::opened_by_peer());
        loop {
            match inbox.take() {
                Some(Ok((first, _))) => {
                    pipe.set_epoch(first.epoch);
                    return Ok((pipe, node, inbox, first));
                }
                Some(Err(failure)) => return Err(io::Error::other(format!("{failure:?}"))),
                None if Instant::now() >= until => return Err(io::ErrorKind::TimedOut.into()),
                None => {
                    if !pipe.read_into(&inbox, until.saturating_duration_since(Instant::now()))? {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
            }
        }
    }

    /// What a peer's first frame makes of its connection.
    fn take_in(self: &Arc<Self>, pipe: Arc<Pipe>, node: NodeId, inbox: Arc<Inbox>, first: Frame) {
        let Some(events) = self.events() else { return };
        if first.head.kind == Kind::Ping {
            // The peer tries again: a process of that node that has ended gives its places back.
            let Some(_held) = self.hold(&node, Place::Session) else { return };
            let session = self.add_session(node, pipe, inbox);
            session.run(self, &*events);
            return;
        }
        let refuse = |reason: &str| pipe.refuse(reason, Instant::now() + HANDSHAKE);
        let Some(_held) = self.hold(&node, Place::Stream) else { return refuse("the node has too many streams open") };
        let Some(session) = self.session_with(&node) else { return refuse("a stream of a node that has not connected") };
        session.add(&inbox, &pipe);
        let wire = PipeWire::new(Arc::clone(&pipe), false);
        events.opened(Stream { node, inbox: Arc::clone(&inbox), wire: Arc::<PipeWire>::clone(&wire) }, first);
        drop(events);
        if wire.wait_until_accepted() {
            drop(wire);
            pipe.read_on(&inbox);
        }
    }

    fn hold(&self, node: &NodeId, place: Place) -> Option<Held<'_>> {
        let mut nodes = self.opened.lock();
        let (taken, limit) = place.taken(nodes.entry(node.clone()).or_default());
        if *taken >= limit {
            tracing::warn!(%node, limit, "refused a connection to the data plane: the node has too many");
            return None;
        }
        *taken += 1;
        Some(Held { driver: self, node: node.clone(), place })
    }

    /// The newest session with a node. A stream of its may come before this process has noted the session that it dialed.
    fn session_with(&self, node: &NodeId) -> Option<Arc<Session>> {
        let until = Instant::now() + HANDSHAKE;
        let mut sessions = self.sessions.lock();
        loop {
            let live = |session: &Arc<Session>| session.node() == node && !session.is_lost();
            let found = sessions.iter().rev().filter_map(Weak::upgrade).find(live);
            if found.is_some() || self.is_stopped() || self.session_came.wait_until(&mut sessions, until).timed_out() {
                return found;
            }
        }
    }

    fn add_session(&self, node: NodeId, control: Arc<Pipe>, inbox: Arc<Inbox>) -> Arc<Session> {
        let session = Session::new(node, control, inbox);
        let mut sessions = self.sessions.lock();
        sessions.retain(|session| session.strong_count() > 0);
        sessions.push(Arc::downgrade(&session));
        self.session_came.notify_all();
        drop(sessions);
        // A verdict that changed between the handshake and the list.
        if let Err(reason) = session.peer(&*self.verifier) {
            session.end(&reason);
        }
        session
    }

    fn connect(&self, node: &NodeId, address: SocketAddr, until: Instant, epoch: Epoch) -> std::result::Result<Arc<Pipe>, Lost> {
        let silent = |error: io::Error| Lost { reason: error.to_string(), silent: true };
        let refused = |reason: String| Lost { reason, silent: false };
        let left = until.saturating_duration_since(Instant::now()).min(HANDSHAKE).max(Duration::from_millis(1));
        // Nobody listens yet: the peer may still start.
        let socket = TcpStream::connect_timeout(&address, left).map_err(silent)?;
        let config = tls::client_config(&*self.verifier).map_err(refused)?;
        let name = ServerName::try_from(self.verifier.server_name(node)).map_err(|error| refused(error.to_string()))?;
        let connection = rustls::ClientConnection::new(Arc::new(config), name).map_err(|error| refused(error.to_string()))?;
        let pipe = Pipe::new(socket, connection.into(), until.min(Instant::now() + HANDSHAKE)).map_err(|error| {
            let certificate = error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>());
            Lost { reason: error.to_string(), silent: !certificate }
        })?;
        match pipe.peer(&*self.verifier) {
            Ok(found) if found == *node => {
                pipe.set_epoch(epoch);
                Ok(pipe)
            }
            Ok(found) => Err(refused(format!("node {found} answers where node {node} was expected"))),
            Err(reason) => Err(refused(reason)),
        }
    }

    /// Connects to a node: the connection that shows that both live.
    pub(crate) fn dial(self: &Arc<Self>, node: &NodeId, address: SocketAddr, until: Instant) -> std::result::Result<Arc<Session>, Lost> {
        let pipe = self.connect(node, address, until, Epoch(0))?;
        // Whether it arrives shows in what comes back.
        let _ = pipe.write(Head::bytes(Kind::Ping), &[], until);
        let inbox = Inbox::new(FrameReader::new(Epoch(0)));
        first_answer(&pipe, &inbox, until)?;
        let session = self.add_session(node.clone(), pipe, inbox);
        let (running, driver) = (Arc::clone(&session), Arc::clone(self));
        let spawned = spawn("forge-net-peer", move || {
            if let Some(events) = driver.events() {
                running.run(&driver, &*events);
            }
        });
        spawned.map_err(|error| Lost { reason: error.to_string(), silent: false })?;
        // Whoever dialed finds it among its peers.
        if let Some(events) = self.events() {
            events.connected(Carrier::Tcp(Arc::clone(&session)));
        }
        Ok(session)
    }

    /// Opens a stream: a connection of its own.
    pub(crate) fn open(
        &self,
        session: &Arc<Session>,
        address: Option<SocketAddr>,
        epoch: Epoch,
        until: Instant,
    ) -> std::result::Result<Stream, Failure> {
        let node = session.node();
        let address = address.ok_or_else(|| Failure::Lost("over TCP the addresses of all members must be named".to_owned()))?;
        let pipe = self.connect(node, address, until, epoch).map_err(|lost| Failure::Lost(lost.reason))?;
        let inbox = Inbox::new(FrameReader::new(epoch));
        session.add(&inbox, &pipe);
        let stream = Stream { node: node.clone(), inbox: Arc::clone(&inbox), wire: PipeWire::new(Arc::clone(&pipe), true) };
        let spawned = spawn("forge-net-in", move || pipe.read_on(&inbox));
        spawned.map_err(|error| Failure::Lost(error.to_string()))?;
        Ok(stream)
    }
}

/// Waits for the first ping back: the peer has taken the session, so that streams may follow.
fn first_answer(pipe: &Pipe, inbox: &Inbox, until: Instant) -> std::result::Result<(), Lost> {
    let refused = |reason: String| Lost { reason, silent: false };
    loop {
        match inbox.take() {
            Some(Ok((frame, _))) if frame.head.kind == Kind::Refuse => {
                return Err(refused(String::from_utf8_lossy(&frame.body).into_owned()));
            }
            Some(Ok(_)) => return Ok(()),
            Some(Err(failure)) => return Err(refused(format!("{failure:?}"))),
            None => {}
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Lost { reason: "no answer in time".to_owned(), silent: true });
        }
        match pipe.read_into(inbox, left.min(HANDSHAKE)) {
            Ok(true) => {}
            // It has too many connections just now, or ends: who refuses says so.
            Ok(false) => return Err(Lost { reason: "the peer closes the connection".to_owned(), silent: true }),
            // A refused certificate shows here, after the handshake is done on this side.
            Err(error) => {
                let closed = matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionAborted);
                return Err(Lost { reason: error.to_string(), silent: closed });
            }
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
    let spawned = std::thread::Builder::new().name(name.to_owned()).spawn(work);
    spawned.map(drop).map_err(|error| NetError::Setup { what: "thread", reason: error.to_string() })
}
