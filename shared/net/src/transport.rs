//! What the layer above knows of transports: connections that carry streams, and what it hears of them.

use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use forge_shared::ids::{Epoch, NodeId};

use crate::fabric::Member;
use crate::frame::{Frame, Head, Kind};
use crate::hello::Hello;
use crate::quic::{self, Urgency};
use crate::stream::{Failure, Stream};
use crate::tcp::{self, TcpDriver};
use crate::tls::PeerVerifier;
use crate::{NetError, Result};

/// How streams are carried between processes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Transport {
    /// QUIC over UDP.
    #[default]
    Quic,
    /// TLS over TCP, where UDP is blocked. The addresses of all members must then be named.
    Tcp,
}

/// Why a connection was not made, or ended.
#[derive(Debug, Clone)]
pub(crate) struct Lost {
    pub(crate) reason: String,
    /// The peer was not heard: trying again may help. Else it, or this process, refused.
    pub(crate) silent: bool,
}

/// A connection to a peer.
#[derive(Clone)]
pub(crate) enum Carrier {
    Quic(Arc<quic::Connection>),
    Tcp(Arc<tcp::Session>),
}

impl Carrier {
    pub(crate) fn peer(&self) -> Option<NodeId> {
        match self {
            Carrier::Quic(connection) => connection.peer(),
            Carrier::Tcp(session) => Some(session.node().clone()),
        }
    }

    pub(crate) fn is_lost(&self) -> bool {
        match self {
            Carrier::Quic(connection) => connection.is_lost(),
            Carrier::Tcp(session) => session.is_lost(),
        }
    }

    pub(crate) fn is_same(&self, other: &Carrier) -> bool {
        match (self, other) {
            (Carrier::Quic(one), Carrier::Quic(other)) => Arc::ptr_eq(one, other),
            (Carrier::Tcp(one), Carrier::Tcp(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }
}

/// Pause before a peer that does not answer is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(50);

/// How often a connection that is otherwise silent shows that it lives.
pub(crate) fn keep_alive(silence: Duration) -> Duration {
    silence * 2 / 7
}

/// How a stream is opened.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Open {
    pub(crate) urgency: Urgency,
    pub(crate) epoch: Epoch,
    pub(crate) until: Instant,
}

/// What the layer above hears. Called without locks of the transport.
pub(crate) trait Events: Send + Sync {
    /// A connection is ready, whoever made it.
    fn connected(&self, carrier: Carrier);
    /// A peer has opened a stream with this first frame. Nothing more is read from it until `resume`.
    fn opened(&self, stream: Stream, first: Frame);
    /// A peer says that a group is over.
    fn told(&self, node: &NodeId, notice: &Hello);
    /// A connection is over; its streams have failed.
    fn lost(&self, carrier: &Carrier, reason: &str);
}

/// The transport of a process.
pub(crate) enum Endpoint {
    Quic(Arc<quic::Driver>),
    Tcp(Arc<TcpDriver>),
}

impl Endpoint {
    /// Takes the port.
    pub(crate) fn bind(transport: Transport, address: SocketAddr, verifier: Arc<dyn PeerVerifier>, silence: Duration) -> Result<Self> {
        match transport {
            Transport::Quic => quic::Driver::bind(address, verifier, silence).map(Endpoint::Quic),
            Transport::Tcp => TcpDriver::bind(address, verifier, silence).map(Endpoint::Tcp),
        }
    }

    /// Begins to answer peers.
    pub(crate) fn begin(&self, events: Weak<dyn Events>) -> Result<()> {
        match self {
            Endpoint::Quic(driver) => driver.begin(events),
            Endpoint::Tcp(driver) => driver.begin(events),
        }
    }

    pub(crate) fn local_address(&self) -> Result<SocketAddr> {
        match self {
            Endpoint::Quic(driver) => driver.local_address(),
            Endpoint::Tcp(driver) => driver.local_address(),
        }
    }

    /// Connects, trying again while nobody answers.
    pub(crate) fn dial(&self, node: &NodeId, address: SocketAddr, until: Instant) -> Result<Carrier> {
        loop {
            let dialed = match self {
                Endpoint::Quic(driver) => driver.dial(node, address, until).map(Carrier::Quic),
                Endpoint::Tcp(driver) => driver.dial(node, address, until).map(Carrier::Tcp),
            };
            match dialed {
                Ok(carrier) => return Ok(carrier),
                Err(lost) if lost.silent && Instant::now() + RETRY_PAUSE < until => std::thread::sleep(RETRY_PAUSE),
                Err(lost) => return Err(NetError::Unreachable { node: node.clone(), address, reason: lost.reason }),
            }
        }
    }

    /// Opens a stream to a member over the connection to its node.
    pub(crate) fn open(&self, carrier: &Carrier, member: &Member, open: Open) -> std::result::Result<Stream, Failure> {
        match (self, carrier) {
            (Endpoint::Quic(driver), Carrier::Quic(connection)) => driver.open(connection, &member.node, open.urgency, open.epoch),
            (Endpoint::Tcp(driver), Carrier::Tcp(session)) => driver.open(session, member.address, open.epoch, open.until),
            _ => Err(Failure::Lost("a connection of another transport".to_owned())),
        }
    }

    /// Tells a peer, ahead of everything else, that a group is over, and waits for nothing.
    pub(crate) fn tell(&self, carrier: &Carrier, notice: &Hello) {
        let (epoch, head, body) = (notice.group.epoch, Head::bytes(Kind::Abort), notice.encode());
        match carrier {
            Carrier::Quic(connection) => {
                if let Endpoint::Quic(driver) = self {
                    driver.tell_peer(connection, epoch, head, &body);
                }
            }
            Carrier::Tcp(session) => session.tell(epoch, head, &body),
        }
    }

    /// Ends connections whose peers are not believed any more.
    pub(crate) fn recheck(&self) {
        match self {
            Endpoint::Quic(driver) => driver.recheck(),
            Endpoint::Tcp(driver) => driver.recheck(),
        }
    }

    pub(crate) fn stop(&self) {
        match self {
            Endpoint::Quic(driver) => driver.stop(),
            Endpoint::Tcp(driver) => driver.stop(),
        }
    }
}
