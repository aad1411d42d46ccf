//! The way out of a QUIC stream.

use std::sync::Arc;
use std::time::Instant;

use forge_shared::ids::{Epoch, NodeId};
use parking_lot::Mutex;
use quinn_proto::{Dir, StreamId, WriteError};

use super::connection::Connection;
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
    /// A peer's stream without a way back.
    receives_only: bool,
    /// Held while a frame is written, so that frames do not mix.
    writer: Mutex<FrameWriter>,
}

impl QuicWire {
    /// A stream that the peer opened.
    pub(super) fn accepted(driver: Arc<Driver>, connection: &Arc<Connection>, id: StreamId, epoch: Epoch) -> Arc<Self> {
        QuicWire::new(driver, connection, id, epoch, id.dir() == Dir::Uni)
    }

    fn new(driver: Arc<Driver>, connection: &Arc<Connection>, id: StreamId, epoch: Epoch, receives_only: bool) -> Arc<Self> {
        let writer = Mutex::new(FrameWriter::new(epoch));
        Arc::new(QuicWire { driver, connection: Arc::clone(connection), id, receives_only, writer })
    }

    fn write_all(&self, mut bytes: &[u8], until: Instant) -> Result<(), Failure> {
        while !bytes.is_empty() {
            let seen = self.connection.progress();
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
        Ok(Stream { node: node.clone(), inbox, wire: QuicWire::new(Arc::clone(self), connection, id, epoch, false) })
    }

    /// Sends one frame on a stream of its own, ahead of everything else, and waits for nothing.
    pub(crate) fn tell_peer(&self, connection: &Arc<Connection>, epoch: Epoch, head: Head, body: &[u8]) {
        let Ok(head) = FrameWriter::new(epoch).head(head, body.len()) else { return };
        self.with(connection, |state, _| {
            if state.lost().is_some() {
                return;
            }
            let Some(id) = state.open(Dir::Uni, None) else { return };
            let mut stream = state.proto.send_stream(id);
            let _ = stream.set_priority(Urgency::Abort as i32);
            // A few hundred bytes: what the windows do not take, the peer's own deadline replaces.
            let _ = stream.write(&[head.as_slice(), body].concat());
            let _ = stream.finish();
        });
    }
}
