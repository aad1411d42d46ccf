//! Matrices stored [inputs, outputs], several in a row, as the [outputs, inputs] that products read.
//!
//! Values of one element are moved; those of a type with blocks, of which no column can be cut, are read as f32.

use std::ops::Range;

use forge_kernels::{DType, dequantize};

/// The matrices of a tensor.
pub(super) struct Planes<'a> {
    pub bytes: &'a [u8],
    pub inputs: usize,
    pub outputs: usize,
    pub dtype: DType,
}

impl Planes<'_> {
    /// Rows of the transposed matrices, counted over all of them, and columns of these.
    pub fn part(&self, rows: &[Range<usize>], columns: &Range<usize>) -> Vec<u8> {
        let (values, row_bytes) = (self.inputs * self.outputs, self.dtype.row_bytes(self.outputs).unwrap_or(0));
        let in_blocks = self.dtype.block_elements() > 1;
        let element = if in_blocks { size_of::<f32>() } else { self.dtype.block_bytes() };
        let mut owned = Vec::with_capacity(rows.iter().map(Range::len).sum::<usize>() * columns.len() * element);
        let mut floats = vec![0.0; if in_blocks { values } else { 0 }];
        for range in rows {
            let mut row = range.start;
            while row < range.end {
                let (plane, first) = (row / self.outputs, row % self.outputs);
                let last = self.outputs.min(first + range.end - row);
                let stored = &self.bytes[plane * self.inputs * row_bytes..][..self.inputs * row_bytes];
                let bytes = if in_blocks {
                    dequantize(self.dtype, stored, &mut floats);
                    bytemuck::cast_slice(&floats)
                } else {
                    stored
                };
                Plane { bytes, outputs: self.outputs, element }.transpose(first..last, columns, &mut owned);
                row += last - first;
            }
        }
        owned
    }
}

/// A matrix [inputs, outputs] of values of `element` bytes.
struct Plane<'a> {
    bytes: &'a [u8],
    outputs: usize,
    element: usize,
}

impl Plane<'_> {
    /// Appends [outputs, inputs] of the wanted ones. Walks in tiles, so that both sides stay in the cache.
    fn transpose(&self, outputs: Range<usize>, inputs: &Range<usize>, owned: &mut Vec<u8>) {
        const TILE: usize = 32;
        let (element, start) = (self.element, owned.len());
        owned.resize(start + outputs.len() * inputs.len() * element, 0);
        let owned = &mut owned[start..];
        for input_tile in inputs.clone().step_by(TILE) {
            for output_tile in outputs.clone().step_by(TILE) {
                for output in output_tile..(output_tile + TILE).min(outputs.end) {
                    let row = (output - outputs.start) * inputs.len();
                    for input in input_tile..(input_tile + TILE).min(inputs.end) {
                        let from = (input * self.outputs + output) * element;
                        let to = (row + input - inputs.start) * element;
                        owned[to..to + element].copy_from_slice(&self.bytes[from..from + element]);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposes_any_part_of_any_matrix() {
        // More than one tile each way, value = [input, output + 3 · plane] in two bytes.
        let (planes, inputs, outputs) = (3_usize, 70_usize, 64_usize);
        let value = |plane: usize, input: usize, output: usize| [input as u8, (output + 3 * plane) as u8];
        let stored: Vec<u8> = (0..planes)
            .flat_map(|plane| (0..inputs).flat_map(move |input| (0..outputs).flat_map(move |output| value(plane, input, output))))
            .collect();
        let wanted = [3..44, 60..61, 62..150];
        let part = Planes { bytes: &stored, inputs, outputs, dtype: DType::F16 }.part(&wanted, &(5..70));
        let rows: Vec<usize> = wanted.into_iter().flatten().collect();
        assert_eq!(part.len(), rows.len() * 65 * 2);
        for (index, found) in part.chunks_exact(2).enumerate() {
            let row = rows[index / 65];
            assert_eq!(found, value(row / outputs, index % 65 + 5, row % outputs));
        }
    }

    #[test]
    fn blocks_are_read_as_their_values() {
        // Two matrices of three rows of two blocks: a scale of 2^plane, values input + output − 40.
        let (inputs, outputs) = (3, 64);
        let value = |input: usize, output: usize| (input + output) as i8 - 40;
        let mut stored = Vec::new();
        for (plane, input, block) in (0..2).flat_map(|plane| (0..inputs).flat_map(move |input| [(plane, input, 0), (plane, input, 1)])) {
            stored.extend([0, [0x3c, 0x40][plane]]);
            stored.extend((0..32).map(|index| value(input, 32 * block + index) as u8));
        }
        let part = Planes { bytes: &stored, inputs, outputs, dtype: DType::Q8_0 }.part(std::slice::from_ref(&(60..70)), &(1..3));
        let floats: Vec<f32> = part.chunks_exact(4).map(|bytes| f32::from_ne_bytes(bytes.try_into().unwrap())).collect();
        let expected = (60..70_usize).flat_map(|row| (1..3).map(move |input| f32::from(value(input, row % 64)) * [1.0, 2.0][row / 64]));
        assert_eq!(floats, expected.collect::<Vec<_>>());
    }
}
