//! MXFP4 whose exponents are stored apart from the values, as the blocks that products read.
//!
//! Both keep 32 values and an exponent of theirs; what differs is where they lie. Stored, a byte has two neighbours, the
//! first in its lower half. In a block of the products an exponent comes first, and a byte has a value of the first half of
//! the block and one of the second.
//!
//! Invariant: no value changes.

use std::ops::Range;

use forge_kernels::DType;

/// Bytes of a block's values.
const VALUE_BYTES: usize = 16;

/// Stored matrices, one after another.
pub(super) struct SplitBlocks<'a> {
    /// [rows, blocks, 16]
    pub values: &'a [u8],
    /// [rows, blocks]
    pub exponents: &'a [u8],
    /// Values in a row.
    pub columns: usize,
}

impl SplitBlocks<'_> {
    /// Rows, and columns (whole blocks) of these, as MXFP4 blocks.
    pub fn joined(&self, rows: &[Range<usize>], columns: &Range<usize>) -> Vec<u8> {
        let block = DType::MXFP4.block_elements();
        let (in_row, wanted) = (self.columns / block, columns.start / block..columns.end / block);
        let count = rows.iter().map(Range::len).sum::<usize>() * wanted.len();
        let mut joined = Vec::with_capacity(count * DType::MXFP4.block_bytes());
        for row in rows.iter().cloned().flatten() {
            let (first, last) = (row * in_row + wanted.start, row * in_row + wanted.end);
            let values = self.values[first * VALUE_BYTES..last * VALUE_BYTES].chunks_exact(VALUE_BYTES);
            for (values, exponent) in values.zip(&self.exponents[first..last]) {
                joined.push(*exponent);
                let (front, back) = values.split_at(VALUE_BYTES / 2);
                joined.extend(front.iter().zip(back).flat_map(|(&front, &back)| [front & 15 | back << 4, front >> 4 | back & 0xf0]));
            }
        }
        joined
    }
}

#[cfg(test)]
mod tests {
    use forge_kernels::{Segments, dequantize};
    use safetensors::SafeTensors;

    use super::*;
    use crate::weights::{FeedForwardRefs, LinearRef};
    use crate::{LoadMode, Model};

    #[test]
    fn values_are_those_of_transformers_bit_for_bit() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/model/quantized/gpt_oss-mxfp4");
        let model = Model::open(folder, LoadMode::Mmap).unwrap();
        let golden = std::fs::read(format!("{folder}/values.safetensors")).unwrap();
        let golden = SafeTensors::deserialize(&golden).unwrap();
        let FeedForwardRefs::Experts(experts) = &model.refs().layers[0].mlp else { panic!("experts") };
        for (expert, mlp) in experts.experts.iter().enumerate() {
            let gate = mlp.gate.as_ref().unwrap();
            for (linear, name, first, step) in [(gate, "gate_up", 0, 2), (&mlp.up, "gate_up", 1, 2), (&mlp.down, "down", 0, 1)] {
                let LinearRef { weight, .. } = linear;
                let rows = weight.all_rows();
                let part = weight
                    .part(model.checkpoint(), std::slice::from_ref(&rows), 0..weight.columns, Segments::whole(weight.columns))
                    .unwrap();
                let mut values = vec![0.0; rows.len() * weight.columns];
                dequantize(part.dtype, (*part.bytes).as_ref(), &mut values);
                let tensor = golden.tensor(&format!("model.layers.0.mlp.experts.{name}_proj")).unwrap();
                let &[_, inputs, outputs] = tensor.shape() else { panic!("{:?}", tensor.shape()) };
                let (columns, bytes) = (weight.columns, tensor.data());
                assert_eq!((inputs, outputs), (columns, step * rows.len()));
                for (index, value) in values.iter().enumerate() {
                    let (row, column) = (index / columns, index % columns);
                    let at = ((expert * inputs + column) * outputs + first + step * row) * 2;
                    let expected = f32::from_bits(u32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]])) << 16);
                    assert_eq!(value.to_bits(), expected.to_bits(), "expert {expert}, {name}, row {row}, column {column}");
                }
            }
        }
    }

    #[test]
    fn values_keep_their_place_in_the_block() {
        // Two rows of two blocks; value = (place in its row) % 13, exponent = 10 · row + block.
        let value = |place: usize| (place % 13) as u8;
        let values: Vec<u8> = (0..2).flat_map(|_| (0..32).map(|byte| value(2 * byte) | value(2 * byte + 1) << 4)).collect();
        let split = SplitBlocks { values: &values, exponents: &[0, 1, 10, 11], columns: 64 };
        let joined = split.joined(&[0..1, 1..2], &(32..64));
        assert_eq!((joined.len(), joined[0], joined[17]), (2 * 17, 1, 11));
        for place in 0..16 {
            assert_eq!((joined[1 + place] & 15, joined[1 + place] >> 4), (value(32 + place), value(48 + place)));
        }
        assert_eq!(split.joined(std::slice::from_ref(&(1..2)), &(0..64))[..17], split.joined(&[0..1, 1..2], &(0..32))[17..]);
    }
}
