//! What ranks of several processes say to each other of steps, as bytes.
//!
//! What it is not: it carries nothing; [`forge_net::MessageLinks`] do.
//!
//! Invariants: what was written is read as it was; anything else is refused in words, and takes no more memory than the bytes
//! that came.

use forge_kernels::SequenceSlice;
use forge_net::MessageLinks;
use forge_shared::ids::{Epoch, NodeId};

use crate::error::{ModelError, Result};
use crate::step::{StepModelInfo, StepPlan};

/// Values in one message: small beside what may wait in a stream.
const PIECE_VALUES: usize = 256 << 10;
/// Longest text of a failure.
const MAX_REASON_BYTES: usize = 4 << 10;

/// A message.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Message {
    /// From the leading process: what to compute.
    Plan(StepPlan),
    /// A rank has its part of the model.
    Loaded { rank: usize, info: StepModelInfo },
    /// Values of a step, in order: logits, or hidden states. `start` of `total`.
    Piece { step: u64, total: usize, start: usize, values: Vec<f32> },
    /// A rank has failed, by the fault of that node.
    Failed { rank: usize, node: NodeId, reason: String },
}

impl Message {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Writer(Vec::new());
        match self {
            Message::Plan(plan) => {
                out.0.reserve(64 + 4 * (3 * plan.tokens.len() + plan.block_tables.len() + 5 * plan.sequences.len()));
                out.0.push(1);
                out.u64(plan.epoch.0);
                out.u64(plan.step);
                for numbers in [&plan.tokens, &plan.positions, &plan.slots, &plan.block_tables, &plan.logits_rows] {
                    out.list(numbers.iter().copied());
                }
                let slices = plan.sequences.iter();
                out.list(slices.flat_map(|slice| {
                    let SequenceSlice { row_start, row_count, first_position, table_start, table_len } = *slice;
                    [row_start, row_count, first_position, table_start, table_len]
                }));
                out.list(plan.block_copies.iter().flat_map(|&(from, to)| [from, to]));
            }
            Message::Loaded { rank, info } => {
                out.0.push(2);
                out.size(*rank);
                let sizes = [
                    info.vocab_size,
                    info.max_model_len,
                    info.block_size,
                    info.kv_blocks,
                    info.kv_block_bytes,
                    info.max_step_rows,
                    info.max_logits_rows,
                ];
                sizes.into_iter().for_each(|size| out.size(size));
                out.text(&info.numerics_id);
            }
            Message::Piece { step, total, start, values } => out.piece((*step, *total, *start), values),
            Message::Failed { rank, node, reason } => {
                out.0.push(4);
                out.size(*rank);
                out.text(&node.0);
                let end = (0..=reason.len().min(MAX_REASON_BYTES)).rev().find(|&end| reason.is_char_boundary(end)).unwrap_or(0);
                out.text(&reason[..end]);
            }
        }
        out.0
    }

    /// # Errors
    /// [`ModelError::Message`] for bytes that are no message.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self> {
        let mut from = Reader(bytes);
        let message = match from.bytes::<1>("kind")? {
            [1] => {
                let (epoch, step) = (Epoch(from.u64("epoch")?), from.u64("step")?);
                let mut lists: [Vec<u32>; 5] = Default::default();
                for (list, field) in lists.iter_mut().zip(["tokens", "positions", "slots", "block_tables", "logits_rows"]) {
                    *list = from.list(field, 1)?;
                }
                let [tokens, positions, slots, block_tables, logits_rows] = lists;
                let sequences = from.list("sequences", 5)?;
                let (slices, _) = sequences.as_chunks::<5>();
                let slice = |&[row_start, row_count, first_position, table_start, table_len]: &[u32; 5]| SequenceSlice {
                    row_start,
                    row_count,
                    first_position,
                    table_start,
                    table_len,
                };
                let sequences = slices.iter().map(slice).collect();
                let copies = from.list("block_copies", 2)?;
                let block_copies = copies.as_chunks::<2>().0.iter().map(|&[from, to]| (from, to)).collect();
                Message::Plan(StepPlan { epoch, step, tokens, positions, slots, sequences, block_tables, logits_rows, block_copies })
            }
            [2] => {
                let rank = from.size("rank")?;
                let mut size = || from.size("info");
                let info = StepModelInfo {
                    vocab_size: size()?,
                    max_model_len: size()?,
                    block_size: size()?,
                    kv_blocks: size()?,
                    kv_block_bytes: size()?,
                    max_step_rows: size()?,
                    max_logits_rows: size()?,
                    numerics_id: from.text("numerics_id")?,
                };
                Message::Loaded { rank, info }
            }
            [3] => {
                let (step, total, start) = (from.u64("step")?, from.size("total")?, from.size("start")?);
                let (values, rest) = from.0.as_chunks::<4>();
                from.0 = rest;
                Message::Piece { step, total, start, values: values.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect() }
            }
            [4] => {
                let (rank, node) = (from.size("rank")?, NodeId(from.text("node")?));
                Message::Failed { rank, node, reason: from.text("reason")? }
            }
            [other] => return Err(wrong(format!("its kind is {other}"))),
        };
        if from.0.is_empty() { Ok(message) } else { Err(wrong(format!("{} bytes follow its end", from.0.len()))) }
    }
}

fn wrong(reason: String) -> ModelError {
    ModelError::Message { reason }
}

struct Writer(Vec<u8>);

impl Writer {
    fn u64(&mut self, number: u64) {
        self.0.extend_from_slice(&number.to_le_bytes());
    }

    fn size(&mut self, size: usize) {
        self.u64(size as u64);
    }

    fn list(&mut self, numbers: impl Iterator<Item = u32>) {
        let at = self.0.len();
        self.size(0);
        numbers.for_each(|number| self.0.extend_from_slice(&number.to_le_bytes()));
        let count = ((self.0.len() - at - 8) / 4) as u64;
        self.0[at..at + 8].copy_from_slice(&count.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.size(text.len());
        self.0.extend_from_slice(text.as_bytes());
    }

    fn piece(&mut self, (step, total, start): (u64, usize, usize), values: &[f32]) {
        self.0.reserve(32 + 4 * values.len());
        self.0.push(3);
        self.u64(step);
        self.size(total);
        self.size(start);
        values.iter().for_each(|value| self.0.extend_from_slice(&value.to_le_bytes()));
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, field: &str, count: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or_else(|| wrong(format!("it ends within {field}")))?;
        self.0 = rest;
        Ok(taken)
    }

    fn bytes<const N: usize>(&mut self, field: &str) -> Result<[u8; N]> {
        let taken = self.take(field, N)?;
        taken.try_into().map_err(|_| wrong(format!("it ends within {field}")))
    }

    fn u64(&mut self, field: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes(field)?))
    }

    fn size(&mut self, field: &str) -> Result<usize> {
        let size = self.u64(field)?;
        usize::try_from(size).map_err(|_| wrong(format!("{field} is {size}")))
    }

    /// Numbers in groups of `of`.
    fn list(&mut self, field: &str, of: usize) -> Result<Vec<u32>> {
        let count = self.size(field)?;
        let bytes = count.checked_mul(4).filter(|_| count.is_multiple_of(of));
        let taken = self.take(field, bytes.ok_or_else(|| wrong(format!("{field} has {count} numbers")))?)?;
        Ok(taken.as_chunks::<4>().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect())
    }

    fn text(&mut self, field: &str) -> Result<String> {
        let count = self.size(field)?;
        let taken = self.take(field, count)?;
        String::from_utf8(taken.to_vec()).map_err(|_| wrong(format!("{field} is no text")))
    }
}

/// Sends a step's values, in as many messages as it takes.
///
/// # Errors
/// As [`MessageLinks::send`].
pub(super) fn send_values(links: &MessageLinks, to: usize, step: u64, values: &[f32]) -> Result<()> {
    let mut start = 0;
    loop {
        let end = values.len().min(start + PIECE_VALUES);
        let mut out = Writer(Vec::new());
        out.piece((step, values.len(), start), &values[start..end]);
        links.send(to, &out.0)?;
        start = end;
        if start == values.len() {
            return Ok(());
        }
    }
}

/// A step's values as they come.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    under_way: Option<(u64, usize)>,
    values: Vec<f32>,
}

impl Pieces {
    /// Takes the next piece; the step and its values once all have come.
    ///
    /// # Errors
    /// [`ModelError::Message`] for a piece that is not the next one.
    pub(super) fn take(&mut self, (step, total, start): (u64, usize, usize), values: &[f32]) -> Result<Option<(u64, Vec<f32>)>> {
        let expected = *self.under_way.get_or_insert((step, total));
        if expected != (step, total) || start != self.values.len() || values.len() > total - start {
            let reason =
                format!("values {start} and {} more of {total} of step {step}, after {} of {expected:?}", values.len(), self.values.len());
            return Err(wrong(reason));
        }
        self.values.extend_from_slice(values);
        if self.values.len() < total {
            // An empty one would never end.
            return if values.is_empty() { Err(wrong(format!("a piece of step {step} is empty"))) } else { Ok(None) };
        }
        self.under_way = None;
        Ok(Some((step, std::mem::take(&mut self.values))))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plan() -> StepPlan {
        StepPlan {
            epoch: Epoch(7),
            step: 9,
            tokens: vec![1, 2, 3],
            positions: vec![4, 5, 0],
            slots: vec![6, 7, 8],
            sequences: vec![
                SequenceSlice { row_start: 0, row_count: 2, first_position: 4, table_start: 0, table_len: 1 },
                SequenceSlice { row_start: 2, row_count: 1, first_position: 0, table_start: 1, table_len: 1 },
            ],
            block_tables: vec![0, 3],
            logits_rows: vec![1, 2],
            block_copies: vec![(3, 4)],
        }
    }

    fn messages() -> Vec<Message> {
        let info = StepModelInfo { vocab_size: 100, kv_blocks: 3, numerics_id: "cpu ä".into(), ..StepModelInfo::default() };
        vec![
            Message::Plan(plan()),
            Message::Plan(StepPlan::default()),
            Message::Loaded { rank: 3, info },
            Message::Piece { step: 1, total: 3, start: 1, values: vec![-0.0, f32::MAX] },
            Message::Failed { rank: 1, node: "w2".into(), reason: "it panicked".into() },
        ]
    }

    #[test]
    fn messages_come_back_and_parts_of_them_do_not() {
        for message in messages() {
            let bytes = message.encode();
            assert_eq!(Message::decode(&bytes).unwrap(), message);
            for end in 0..bytes.len() {
                let part = Message::decode(&bytes[..end]);
                // A piece that ends between two values is another piece.
                assert!(part.is_err() || matches!(message, Message::Piece { .. }), "{message:?} to {end}");
            }
            if !matches!(message, Message::Piece { .. }) {
                assert!(Message::decode(&[bytes, vec![0]].concat()).is_err());
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200), at in 0_usize..5, flips in any::<[u8; 4]>()) {
            let _ = Message::decode(&bytes);
            let mut damaged = messages()[at].encode();
            for flip in flips {
                let place = usize::from(flip) % damaged.len();
                damaged[place] ^= flip;
            }
            let _ = Message::decode(&damaged);
        }
    }

    #[test]
    fn values_are_put_together_in_order_alone() {
        let mut pieces = Pieces::default();
        assert_eq!(pieces.take((1, 3, 0), &[1.0, 2.0]).unwrap(), None);
        assert_eq!(pieces.take((1, 3, 2), &[3.0]).unwrap(), Some((1, vec![1.0, 2.0, 3.0])));
        assert_eq!(pieces.take((2, 0, 0), &[]).unwrap(), Some((2, vec![])));
        for wrong in [(1, 3, 1), (1, usize::MAX, 5)] {
            assert!(matches!(Pieces::default().take(wrong, &[1.0]), Err(ModelError::Message { .. })));
        }
        assert!(Pieces::default().take((1, 1, 0), &[1.0, 2.0]).is_err() && Pieces::default().take((1, 1, 0), &[]).is_err());
    }
}
