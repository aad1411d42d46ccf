//! Streams between ranks of one process that belong to a group with other processes too.

use std::sync::Arc;
use std::time::Instant;

use forge_shared::ids::{Epoch, NodeId};

use crate::frame::{FrameReader, Head};
use crate::stream::{Failure, Inbox, Stream, Wire};

struct MemoryWire {
    epoch: Epoch,
    /// Where the other end reads.
    other: Arc<Inbox>,
}

impl Wire for MemoryWire {
    fn write(&self, head: Head, body: &[u8], until: Instant) -> Result<(), Failure> {
        self.other.deliver(head, self.epoch, body.to_vec(), until)
    }

    fn resume(&self) {}

    fn wait(&self, _until: Instant, _ready: &dyn Fn() -> bool, sleep: &dyn Fn()) {
        sleep();
    }

    fn abort(&self, reason: &str) {
        self.other.fail(Failure::Aborted(reason.to_owned()));
    }

    fn close(&self) {
        self.other.end();
    }
}

/// Both ends of a stream within this process.
pub(crate) fn pair(node: &NodeId, epoch: Epoch) -> (Stream, Stream) {
    let inboxes = [Inbox::new(FrameReader::new(epoch)), Inbox::new(FrameReader::new(epoch))];
    let end = |own: usize| {
        let wire = Arc::new(MemoryWire { epoch, other: Arc::clone(&inboxes[1 - own]) });
        Stream { node: node.clone(), inbox: Arc::clone(&inboxes[own]), wire }
    };
    (end(0), end(1))
}
