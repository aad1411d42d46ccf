//! One exchange: rows to some ranks, rows from some ranks, in chunks.

use super::WiredRank;
use crate::frame::{Frame, Head, Kind, WireDType};
use crate::hello::Lane;
use crate::mesh::Call;
use crate::{NetError, Result};

/// Bytes of rows in one frame. Less than half an inbox: see the parent's invariant.
const CHUNK_BYTES: usize = 256 << 10;

/// What goes to one rank: a matrix, or a run of one's values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Outgoing<'a> {
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) values: &'a [f32],
}

impl<'a> Outgoing<'a> {
    pub(super) fn part(rows: usize, width: usize, values: &'a [f32]) -> Self {
        Outgoing { rows, width, values }
    }
}

/// A chunk that came: part of what one rank sent.
#[derive(Debug)]
pub(super) struct Part<'a> {
    pub(super) from: usize,
    pub(super) rows: usize,
    pub(super) width: usize,
    /// Values of this rank that came before.
    pub(super) offset: usize,
    body: &'a [u8],
}

impl Part<'_> {
    pub(super) fn values(&self) -> impl Iterator<Item = f32> {
        self.body.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes))
    }

    pub(super) fn len(&self) -> usize {
        self.body.len() / 4
    }

    /// Puts the values where they belong in the whole, whose length was checked.
    pub(super) fn copy_to(&self, whole: &mut [f32]) {
        let place = &mut whole[self.offset..self.offset + self.len()];
        place.iter_mut().zip(self.values()).for_each(|(place, value)| *place = value);
    }
}

/// What has come of one rank's matrix.
struct Incoming {
    from: usize,
    /// Rows and columns that its first frame says: all others say the same.
    shape: Option<(usize, usize)>,
    received: usize,
    done: bool,
}

impl Incoming {
    fn new(from: usize) -> Self {
        Incoming { from, shape: None, received: 0, done: false }
    }
}

impl WiredRank {
    /// Sends to each rank what is there for it, and takes what comes from the ranks in `from`, which is a matrix each.
    /// A matrix ends with its first frame that is not a full chunk. `take` refuses a part that does not belong there, and
    /// says how many values its rank must send in all: no more come, and no fewer.
    pub(super) fn exchange(
        &self,
        operation: &'static str,
        kind: Kind,
        outgoing: &[Option<Outgoing<'_>>],
        from: &[usize],
        mut take: impl FnMut(Part<'_>) -> Result<usize>,
    ) -> Result<()> {
        let call = Call { operation, lane: Lane::Group, until: self.mesh.until() };
        let mut incoming: Vec<Incoming> = from.iter().map(|&from| Incoming::new(from)).collect();
        let mut sending: Vec<(usize, Outgoing<'_>)> =
            outgoing.iter().enumerate().filter_map(|(rank, outgoing)| outgoing.map(|outgoing| (rank, outgoing))).collect();
        for chunk in 0.. {
            for &(rank, outgoing) in &sending {
                self.send_chunk(call, kind, rank, outgoing, chunk)?;
            }
            sending.retain(|(_, outgoing)| chunk < last_chunk(outgoing.values.len()));
            for incoming in incoming.iter_mut().filter(|incoming| !incoming.done) {
                let frame = self.mesh.recv_in_time(call, incoming.from)?;
                self.take_frame((operation, kind), incoming, &frame, &mut take)?;
            }
            if sending.is_empty() && incoming.iter().all(|incoming| incoming.done) {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Rows for one rank, outside the group's operations.
    pub(super) fn send_rows(&self, outgoing: Outgoing<'_>, to: usize) -> Result<()> {
        let call = Call { operation: "send", lane: Lane::Pair, until: self.mesh.until() };
        for chunk in 0..=last_chunk(outgoing.values.len()) {
            self.send_chunk(call, Kind::Rows, to, outgoing, chunk)?;
        }
        Ok(())
    }

    /// Rows of one rank, outside the group's operations; `take` as for [`WiredRank::exchange`].
    pub(super) fn recv_rows(&self, from: usize, mut take: impl FnMut(Part<'_>) -> Result<usize>) -> Result<()> {
        let call = Call { operation: "recv", lane: Lane::Pair, until: self.mesh.until() };
        let mut incoming = Incoming::new(from);
        while !incoming.done {
            let frame = self.mesh.recv_in_time(call, from)?;
            self.take_frame(("recv", Kind::Rows), &mut incoming, &frame, &mut take)?;
        }
        Ok(())
    }

    fn send_chunk(&self, call: Call, kind: Kind, to: usize, outgoing: Outgoing<'_>, chunk: usize) -> Result<()> {
        let Outgoing { rows, width, values } = outgoing;
        let count = |what: &str, number: usize| {
            u32::try_from(number).map_err(|_| self.mismatch(call.operation, format!("{number} {what}"), "less than 2^32".to_owned()))
        };
        let head = Head { kind, dtype: WireDType::F32, rows: count("rows", rows)?, width: count("columns", width)? };
        let start = (chunk * CHUNK_BYTES / 4).min(values.len());
        let end = (start + CHUNK_BYTES / 4).min(values.len());
        self.mesh.send(call, to, head, wire_bytes(&values[start..end]))
    }

    fn take_frame(
        &self,
        (operation, kind): (&'static str, Kind),
        incoming: &mut Incoming,
        frame: &Frame,
        take: &mut impl FnMut(Part<'_>) -> Result<usize>,
    ) -> Result<()> {
        let Head { kind: found, dtype, rows, width } = frame.head;
        if found != kind || dtype != WireDType::F32 {
            let actual = format!("{kind:?} of F32");
            return Err(self.mismatch(operation, actual, format!("{found:?} of {dtype:?} (rank {})", incoming.from)));
        }
        let shape = (rows as usize, width as usize);
        let first = *incoming.shape.get_or_insert(shape);
        if shape != first || frame.body.len() > CHUNK_BYTES {
            let expected = format!("{} bytes of {rows} rows × {width} columns (rank {})", frame.body.len(), incoming.from);
            return Err(self.mismatch(operation, format!("chunks of {} rows × {} columns", first.0, first.1), expected));
        }
        let part = Part { from: incoming.from, rows: shape.0, width: shape.1, offset: incoming.received, body: &frame.body };
        incoming.received += part.len();
        incoming.done = frame.body.len() < CHUNK_BYTES;
        let length = take(part)?;
        if incoming.received > length || (incoming.done && incoming.received < length) {
            let expected = format!("{} values (rank {})", incoming.received, incoming.from);
            return Err(self.mismatch(operation, format!("room for {length} values"), expected));
        }
        Ok(())
    }

    pub(super) fn mismatch(&self, operation: &'static str, actual: String, expected: String) -> NetError {
        NetError::Mismatch { operation, rank: self.own(), actual, expected }
    }

    /// Checks a whole matrix's shape; how many values it has.
    pub(super) fn same_shape(&self, operation: &'static str, own: (usize, usize), part: &Part<'_>) -> Result<usize> {
        self.same_part(operation, own, own.0 * own.1, part)
    }

    /// Checks a part of a matrix of this shape, of which `length` values come.
    pub(super) fn same_part(&self, operation: &'static str, own: (usize, usize), length: usize, part: &Part<'_>) -> Result<usize> {
        if (part.rows, part.width) == own && part.offset + part.len() <= length {
            return Ok(length);
        }
        let actual = format!("{} rows × {} columns", own.0, own.1);
        Err(self.mismatch(operation, actual, format!("{} rows × {} columns (rank {})", part.rows, part.width, part.from)))
    }
}

/// Number of the last chunk: a frame that is not full ends a matrix, so one of full chunks is followed by an empty one.
fn last_chunk(values: usize) -> usize {
    values / (CHUNK_BYTES / 4)
}

/// Values as they go over the wire: little endian, as they lie in memory.
fn wire_bytes(values: &[f32]) -> &[u8] {
    const { assert!(cfg!(target_endian = "little"), "the data plane sends values as they lie in memory") };
    bytemuck::cast_slice(values)
}
