//! The way out of a QUIC stream.

use std::sync::Arc;
use std::time::Instant;

use forge_shared::ids::{Epoch, NodeId};
use parking_lot::Mutex;
use quinn_proto::{Dir, StreamId, WriteError};

use super::connection::{ABORTED, Connection};
use super::driver::Driver;
use crate::frame::{FrameReader, FrameWriter, Head};
use crate::stream::{Failure, Inbox, Stream, Wire};

/// Urgency of streams: what is small and waited for goes ahead of bulk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Urgency {
    Bulk = 0,
    Control = 1,
    Abort = 2,
}

/// One stream of a connection.
pub(crate) struct QuicWire {
    driver: Arc<Driver>,
    connection: Arc<Connection>,
    id: StreamId,
    /// The stream's: once that has failed, nothing is written any more.
    inbox: Arc<Inbox>,
    /// A peer's stream without a way back.
    receives_only: bool,
    /// Held while a frame is written, so that frames do not mix.
    writer: Mutex<FrameWriter>,
}

impl QuicWire {
    /// A stream that the peer opened.
    pub(super) fn accepted(driver: Arc<Driver>, connection: &Arc<Connection>, id: StreamId, inbox: &Arc<Inbox>, epoch: Epoch) -> Arc<Self> {
        QuicWire { receives_only: id.dir() == Dir::Uni, ..QuicWire::new(driver, connection, id, inbox, epoch) }.into()
    }

    fn new(driver: Arc<Driver>, connection: &Arc<Connection>, id: StreamId, inbox: &Arc<Inbox>, epoch: Epoch) -> Self {
        let (connection, inbox, writer) = (Arc::clone(connection), Arc::clone(inbox), Mutex::new(FrameWriter::new(epoch)));
        QuicWire { driver, connection, id, inbox, receives_only: false, writer }
    }

    fn write_all(&self, mut bytes: &[u8], until: Instant) -> Result<(), Failure> {
        while !bytes.is_empty() {
            let seen = self.connection.progress();
            if let Some(failure) = self.inbox.failure() {
                return Err(failure);
            }
            {
                let mut state = self.connection.state.lock();
                if let Some(lost) = state.lost() {
                    return Err(Failure::Lost(lost.reason.clone()));
                }
                match state.proto.send_stream(self.id).write(bytes) {
                    Ok(written) => {
                        bytes = &bytes[written..];
                        continue;
                    }
                    // The notice, which says why, is on its way.
                    Err(WriteError::Stopped(ABORTED)) => {}
                    Err(WriteError::Blocked) => {}
                    Err(WriteError::Stopped(_) | WriteError::ClosedStream) => return Err(Failure::Left),
                }
            }
            // What was written must go out, or the peer never makes room.
            self.driver.with(&self.connection, |_, _| ());
            if Instant::now() >= until {
                return Err(Failure::Timeout);
            }
            self.driver.wait(until, &|| self.connection.progress() != seen, &|| self.connection.sleep(seen, until));
        }
        Ok(())
    }
}

impl Wire for QuicWire {
    fn write(&self, head: Head, body: &[u8], until: Instant) -> Result<(), Failure> {
        if self.receives_only {
            return Err(Failure::Left);
        }
        let mut writer = self.writer.lock();
        let head = writer.head(head, body.len()).map_err(Failure::Frame)?;
        self.write_all(&head, until)?;
        self.write_all(body, until)?;
        self.driver.with(&self.connection, |_, _| ());
        Ok(())
    }

    fn resume(&self) {
        self.driver.with(&self.connection, |state, effects| state.resume(self.id, effects));
    }

    fn wait(&self, until: Instant, ready: &dyn Fn() -> bool, sleep: &dyn Fn()) {
        self.driver.wait(until, ready, sleep);
    }

    fn abort(&self, _reason: &str) {
        self.driver.with(&self.connection, |state, _| state.abort_stream(self.id));
        self.connection.advance();
    }

    fn close(&self) {
        self.driver.with(&self.connection, |state, _| state.close_stream(self.id));
    }
}

impl Driver {
    /// Opens a stream on a connection.
    pub(crate) fn open(
        self: &Arc<Self>,
        connection: &Arc<Connection>,
        node: &NodeId,
        urgency: Urgency,
        epoch: Epoch,
    ) -> Result<Stream, Failure> {
        let inbox = Inbox::new(FrameReader::new(epoch));
        let id = self.with(connection, |state, _| {
            if let Some(lost) = state.lost() {
                return Err(Failure::Lost(lost.reason.clone()));
            }
            let id = state.open(Dir::Bi, Some(Arc::clone(&inbox)));
            let id = id.ok_or_else(|| Failure::Lost("the peer takes no more streams".to_owned()))?;
            // Fails only for a stream that has ended.
            let _ = state.proto.send_stream(id).set_priority(urgency as i32);
            Ok(id)
        })?;
        let wire = Arc::new(QuicWire::new(Arc::clone(self), connection, id, &inbox, epoch));
        Ok(Stream { node: node.clone(), inbox, wire })
    }

    /// Sends one frame on a stream of its own, ahead of everything else and as soon as there is room. Waits for nothing.
    pub(crate) fn tell_peer(&self, connection: &Arc<Connection>, epoch: Epoch, head: Head, body: &[u8]) {
        let Ok(head) = FrameWriter::new(epoch).head(head, body.len()) else { return };
        self.with(connection, |state, _| state.notify([head.as_slice(), body].concat()));
    }
}
