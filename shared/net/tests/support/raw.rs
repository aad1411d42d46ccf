//! A peer that speaks the data plane's frames over TCP by hand, so that it can say what no fabric says.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use forge_net::frame::{Frame, FrameReader, FrameWriter, Head, Kind};
use forge_net::hello::{Hello, Lane};
use forge_shared::ids::{Epoch, NodeId};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, ServerConnection, StreamOwned};

use super::{NodePem, PATIENT, group_id};

const PROTOCOL: &[u8] = b"forge-net/1";

trait Both: Read + Write + Send {}
impl<T: Read + Write + Send> Both for T {}

/// One connection.
pub struct Raw {
    tls: Box<dyn Both>,
    pub socket: TcpStream,
    reader: FrameReader,
    writer: FrameWriter,
    frames: VecDeque<Frame>,
}

impl Raw {
    /// Connects as a node; frames are of this epoch.
    pub fn connect(address: SocketAddr, from: &NodePem, to: &str, epoch: u64) -> Self {
        let verifier = from.verifier(true);
        let mut config = (*verifier.client_config().unwrap()).clone();
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        let name = ServerName::try_from(verifier.server_name(&NodeId(to.to_owned()))).unwrap();
        let socket = TcpStream::connect(address).unwrap();
        let tls = ClientConnection::new(Arc::new(config), name).unwrap();
        let kept = socket.try_clone().unwrap();
        Raw::new(Box::new(StreamOwned::new(tls, socket)), kept, FrameReader::new(Epoch(epoch)), epoch)
    }

    /// Takes the next connection as a node.
    pub fn accept(listener: &TcpListener, as_node: &NodePem) -> Self {
        let mut config = (*as_node.verifier(true).server_config().unwrap()).clone();
        config.alpn_protocols = vec![PROTOCOL.to_vec()];
        let (socket, _) = listener.accept().unwrap();
        let tls = ServerConnection::new(Arc::new(config)).unwrap();
        let kept = socket.try_clone().unwrap();
        Raw::new(Box::new(StreamOwned::new(tls, socket)), kept, FrameReader::opened_by_peer(), 0)
    }

    fn new(tls: Box<dyn Both>, socket: TcpStream, reader: FrameReader, epoch: u64) -> Self {
        socket.set_read_timeout(Some(PATIENT)).unwrap();
        Raw { tls, socket, reader, writer: FrameWriter::new(Epoch(epoch)), frames: VecDeque::new() }
    }

    /// A session: the peer has answered its ping.
    pub fn session(address: SocketAddr, from: &NodePem, to: &str) -> Self {
        let mut session = Raw::connect(address, from, to, 0);
        session.send(Head::bytes(Kind::Ping), &[]);
        assert_eq!(session.next().expect("a ping back").head.kind, Kind::Ping);
        session
    }

    /// A stream of a group, with its hello.
    pub fn stream(address: SocketAddr, from: &NodePem, to: &str, hello: &Hello) -> Self {
        let mut stream = Raw::connect(address, from, to, hello.group.epoch.0);
        stream.send(Head::bytes(Kind::Hello), &hello.encode());
        stream
    }

    pub fn bytes(&mut self, head: Head, body: &[u8]) -> Vec<u8> {
        [self.writer.head(head, body.len()).unwrap().as_slice(), body].concat()
    }

    pub fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.tls.write_all(bytes)
    }

    pub fn send(&mut self, head: Head, body: &[u8]) {
        let bytes = self.bytes(head, body);
        self.write(&bytes).unwrap();
    }

    /// The next frame; none at the end.
    pub fn next(&mut self) -> Option<Frame> {
        while self.frames.is_empty() {
            let mut bytes = [0; 4096];
            match self.tls.read(&mut bytes) {
                Ok(0) | Err(_) => return None,
                Ok(read) => self.reader.push(&bytes[..read], |frame| self.frames.push_back(frame)).unwrap(),
            }
        }
        self.frames.pop_front()
    }

    pub fn is_welcome(&mut self) -> bool {
        self.next().is_some_and(|frame| frame.head.kind == Kind::Welcome)
    }

    /// Whether nothing comes for so long.
    pub fn is_silent(&mut self, time: Duration) -> bool {
        self.socket.set_read_timeout(Some(time)).unwrap();
        let mut byte = [0];
        let peeked = self.socket.peek(&mut byte);
        self.socket.set_read_timeout(Some(PATIENT)).unwrap();
        peeked.is_err_and(|error| matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut))
    }
}

pub fn hello(epoch: u64, lane: Lane, [from, to]: [usize; 2], size: usize, agreement: &str) -> Hello {
    Hello { group: group_id(epoch), lane, from, to, size, agreement: agreement.to_owned() }
}
