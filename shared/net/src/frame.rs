//! The frames of the data plane: how bytes of a stream become messages, and messages bytes.
//!
//! A frame is a head of 32 bytes (little endian) and a body:
//!
//! | bytes | field |
//! |---|---|
//! | 0 | version of this layout: 1 |
//! | 1 | kind |
//! | 2 | type of the values: 0 bytes, 1 f32 |
//! | 3 | 0 |
//! | 4..8 | length of the body in bytes |
//! | 8..16 | epoch |
//! | 16..24 | number of the frame on its stream, from 0 |
//! | 24..28, 28..32 | rows and columns of the whole matrix that the body is a part of; 0 for bytes |
//!
//! What it is: a core without I/O; bytes are pushed in and frames come out. What it is not: it knows no group, and does not
//! say which frame may follow which.
//!
//! Invariants: a stream carries one epoch, and its frames in order, each once; memory grows with the bytes that have come,
//! never with what a head claims.

use forge_shared::ids::Epoch;

/// Version of the frames' layout.
pub const VERSION: u8 = 1;
/// Bytes of a head.
pub const HEAD_BYTES: usize = 32;
/// Longest body of a frame that carries a message or values, bytes.
pub const MAX_BODY_BYTES: usize = 64 << 20;
/// Longest body of a frame before a stream is accepted, bytes.
pub const MAX_HELLO_BYTES: usize = 4096;
/// What is reserved for a body before any of it has come, bytes.
const FIRST_RESERVE_BYTES: usize = 256 << 10;

/// Why bytes are no frames, or not the frames that were due.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Another version of Forge speaks.
    #[error("the peer's frames have version {found}, this process reads version {VERSION}: run the same version of Forge on both")]
    Version {
        /// What the frame says.
        found: u8,
    },
    /// A number that stands for nothing.
    #[error("{field} is {found}, which stands for nothing")]
    Unknown {
        /// Field of the head.
        field: &'static str,
        /// What the frame says.
        found: u64,
    },
    /// A body that is longer than allowed here.
    #[error("a body of {found} bytes; at most {limit} are allowed here")]
    TooLong {
        /// What the head says.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// Rows and columns that do not fit the body or its type.
    #[error("a body of {body_bytes} bytes for {rows} rows × {width} columns of type {dtype}")]
    Shape {
        /// Length of the body.
        body_bytes: usize,
        /// Rows.
        rows: u32,
        /// Columns.
        width: u32,
        /// Number of the type.
        dtype: u8,
    },
    /// A frame of another epoch than its stream's.
    #[error("a frame of epoch {found} on a stream of epoch {expected}")]
    Epoch {
        /// The frame's.
        found: Epoch,
        /// The stream's.
        expected: Epoch,
    },
    /// A frame again, or one too many ahead.
    #[error("frame {found} came where frame {expected} was due")]
    Number {
        /// The frame's.
        found: u64,
        /// The next one's.
        expected: u64,
    },
    /// The stream ended inside a frame.
    #[error("the stream ended {missing} bytes before the end of a frame")]
    Truncated {
        /// Bytes that did not come.
        missing: usize,
    },
    /// A first frame whose body cannot be read.
    #[error("{field} of the first frame: {reason}")]
    Hello {
        /// Which part.
        field: &'static str,
        /// What is wrong with it.
        reason: String,
    },
}

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// First frame of whoever opens a stream: [`Hello`](crate::hello::Hello).
    Hello = 1,
    /// The answer: the stream belongs to the group.
    Welcome = 2,
    /// The other answer; the body says why. Ends the stream.
    Refuse = 3,
    /// The group is over; the body says why. Ends the stream.
    Abort = 4,
    /// Bytes of a message link.
    Message = 5,
    /// Shows that the peer lives, on transports that do not see to it.
    Ping = 6,
    /// Rows of [`Collective::all_reduce`](crate::Collective::all_reduce) while sums are taken.
    AllReduce = 16,
    /// Summed rows of the same.
    AllReduced = 17,
    /// Rows of an `all_gather`.
    AllGather = 18,
    /// Rows of a `reduce_scatter`.
    ReduceScatter = 19,
    /// Rows of a `broadcast`.
    Broadcast = 20,
    /// Rows of an `all_to_all`.
    AllToAll = 21,
    /// Rows of one rank for another.
    Rows = 22,
    /// A rank has come to a `barrier`.
    Barrier = 23,
}

impl Kind {
    const ALL: [Kind; 14] = [
        Kind::Hello,
        Kind::Welcome,
        Kind::Refuse,
        Kind::Abort,
        Kind::Message,
        Kind::Ping,
        Kind::AllReduce,
        Kind::AllReduced,
        Kind::AllGather,
        Kind::ReduceScatter,
        Kind::Broadcast,
        Kind::AllToAll,
        Kind::Rows,
        Kind::Barrier,
    ];
}

/// Type of a body's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum WireDType {
    /// Not values.
    Bytes = 0,
    /// 32-bit floats.
    F32 = 1,
}

/// A frame's head, but for what belongs to its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// What it is.
    pub kind: Kind,
    /// Type of the values.
    pub dtype: WireDType,
    /// Rows of the whole matrix.
    pub rows: u32,
    /// Columns of the whole matrix.
    pub width: u32,
}

impl Head {
    /// A frame of bytes.
    pub fn bytes(kind: Kind) -> Self {
        Head { kind, dtype: WireDType::Bytes, rows: 0, width: 0 }
    }
}

/// A frame that came.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its head.
    pub head: Head,
    /// Epoch in its head: the stream's.
    pub epoch: Epoch,
    /// Its body.
    pub body: Vec<u8>,
}

/// Numbers the frames that go out on one stream.
#[derive(Debug)]
pub struct FrameWriter {
    epoch: Epoch,
    next: u64,
}

impl FrameWriter {
    /// For a stream of this epoch.
    pub fn new(epoch: Epoch) -> Self {
        FrameWriter { epoch, next: 0 }
    }

    /// The next frame's head, for a body of so many bytes.
    ///
    /// # Errors
    /// [`FrameError::TooLong`].
    pub fn head(&mut self, head: Head, body_bytes: usize) -> Result<[u8; HEAD_BYTES], FrameError> {
        let too_long = FrameError::TooLong { found: body_bytes, limit: MAX_BODY_BYTES };
        let length = u32::try_from(body_bytes).ok().filter(|_| body_bytes <= MAX_BODY_BYTES).ok_or(too_long)?;
        let mut bytes = [0; HEAD_BYTES];
        bytes[..3].copy_from_slice(&[VERSION, head.kind as u8, head.dtype as u8]);
        bytes[4..8].copy_from_slice(&length.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.epoch.0.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.next.to_le_bytes());
        bytes[24..28].copy_from_slice(&head.rows.to_le_bytes());
        bytes[28..32].copy_from_slice(&head.width.to_le_bytes());
        self.next += 1;
        Ok(bytes)
    }
}

/// Reads the frames that come in on one stream.
#[derive(Debug)]
pub struct FrameReader {
    /// Unknown until the first frame where the peer opened the stream.
    epoch: Option<Epoch>,
    next: u64,
    max_body_bytes: usize,
    head: [u8; HEAD_BYTES],
    head_filled: usize,
    /// The frame whose body is coming, and how long it will be.
    body: Option<(Frame, usize)>,
}

impl FrameReader {
    /// Of a stream that this process opened at this epoch.
    pub fn new(epoch: Epoch) -> Self {
        FrameReader { max_body_bytes: MAX_BODY_BYTES, ..FrameReader::with(Some(epoch)) }
    }

    /// Of a stream that a peer opened: its first frame says which epoch it is, and must be short.
    pub fn opened_by_peer() -> Self {
        FrameReader::with(None)
    }

    fn with(epoch: Option<Epoch>) -> Self {
        FrameReader { epoch, next: 0, max_body_bytes: MAX_HELLO_BYTES, head: [0; HEAD_BYTES], head_filled: 0, body: None }
    }

    /// Takes in what came and gives every frame that is complete to `take`. After an error the stream is of no more use.
    ///
    /// # Errors
    /// [`FrameError`] for the first thing that is not as it must be.
    pub fn push(&mut self, mut bytes: &[u8], mut take: impl FnMut(Frame)) -> Result<(), FrameError> {
        loop {
            if let Some((frame, length)) = &mut self.body {
                let part = bytes.len().min(*length - frame.body.len());
                frame.body.extend_from_slice(&bytes[..part]);
                bytes = &bytes[part..];
                if frame.body.len() < *length {
                    return Ok(());
                }
                if let Some((frame, _)) = self.body.take() {
                    // The first frame was within its own limit; what follows are frames of an accepted stream or none.
                    self.max_body_bytes = MAX_BODY_BYTES;
                    take(frame);
                }
            }
            let part = bytes.len().min(HEAD_BYTES - self.head_filled);
            self.head[self.head_filled..self.head_filled + part].copy_from_slice(&bytes[..part]);
            self.head_filled += part;
            bytes = &bytes[part..];
            if self.head_filled < HEAD_BYTES {
                return Ok(());
            }
            self.head_filled = 0;
            self.body = Some(self.read_head()?);
        }
    }

    /// The stream has ended.
    ///
    /// # Errors
    /// [`FrameError::Truncated`] inside a frame.
    pub fn end(&self) -> Result<(), FrameError> {
        match &self.body {
            Some((frame, length)) => Err(FrameError::Truncated { missing: length - frame.body.len() }),
            None if self.head_filled > 0 => Err(FrameError::Truncated { missing: HEAD_BYTES - self.head_filled }),
            None => Ok(()),
        }
    }

    /// Bytes held for a frame that is not complete.
    pub fn held_bytes(&self) -> usize {
        self.body.as_ref().map_or(0, |(frame, _)| frame.body.len())
    }

    fn read_head(&mut self) -> Result<(Frame, usize), FrameError> {
        let head = &self.head;
        let u32_at = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        if head[0] != VERSION {
            return Err(FrameError::Version { found: head[0] });
        }
        let unknown = |field, found: u8| FrameError::Unknown { field, found: found.into() };
        let kind = Kind::ALL.into_iter().find(|&kind| kind as u8 == head[1]).ok_or(unknown("kind", head[1]))?;
        let dtype = [WireDType::Bytes, WireDType::F32].into_iter().find(|&dtype| dtype as u8 == head[2]);
        let dtype = dtype.ok_or(unknown("dtype", head[2]))?;
        if head[3] != 0 {
            return Err(unknown("byte 3", head[3]));
        }
        let (length, rows, width) = (u32_at(4) as usize, u32_at(24), u32_at(28));
        if length > self.max_body_bytes {
            return Err(FrameError::TooLong { found: length, limit: self.max_body_bytes });
        }
        let fits = match dtype {
            WireDType::Bytes => rows == 0 && width == 0,
            WireDType::F32 => length % 4 == 0 && length as u128 <= u128::from(rows) * u128::from(width) * 4,
        };
        if !fits {
            return Err(FrameError::Shape { body_bytes: length, rows, width, dtype: dtype as u8 });
        }
        let epoch = Epoch(u64_at(8));
        let expected = *self.epoch.get_or_insert(epoch);
        if epoch != expected {
            return Err(FrameError::Epoch { found: epoch, expected });
        }
        let number = u64_at(16);
        if number != self.next {
            return Err(FrameError::Number { found: number, expected: self.next });
        }
        self.next += 1;
        let body = Vec::with_capacity(length.min(FIRST_RESERVE_BYTES));
        Ok((Frame { head: Head { kind, dtype, rows, width }, epoch, body }, length))
    }
}

#[cfg(test)]
mod tests;
