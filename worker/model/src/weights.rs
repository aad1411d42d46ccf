//! From the names of an architecture to tensors of a checkpoint: the strict check both ways, and slices.
//!
//! What it is: it resolves every tensor the architecture names, checks its shape, and refuses a checkpoint with
//! tensors left over. [`MatrixRef`] then gives any (rows, columns) slice as a [`MatrixSource`] over the file's own
//! bytes; only transposed matrices and gathered rows are copied. What it is not: it knows no rank and no backend.
//!
//! Invariant: a slice lies inside its tensor, and its columns are whole blocks.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use forge_kernels::{DType, MatrixSource, NormKind, Segments, dequantize};

use crate::arch::families::{Family, MlpNames, Names, QkvNames, TensorNames};
use crate::arch::rope::ROPE_FREQS;
use crate::arch::{Architecture, PositionSpec, RopeLayers, RopeScaling};
use crate::checkpoint::{Checkpoint, Format, TensorEntry};
use crate::error::{ModelError, Result};

/// Rows of a stored matrix, as the decoder sees it: [outputs, inputs].
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct MatrixRef {
    pub name: String,
    /// Rows of the (untransposed) tensor: a part of it where q, k and v are stored as one.
    pub rows: Range<usize>,
    pub columns: usize,
    pub dtype: DType,
    /// The tensor is stored [inputs, outputs].
    pub transposed: bool,
}

/// Values of a stored vector.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct VectorRef {
    pub name: String,
    pub values: Range<usize>,
}

/// A product's tensors.
#[derive(Debug, Clone)]
pub(crate) struct LinearRef {
    pub weight: MatrixRef,
    pub bias: Option<VectorRef>,
}

/// A norm's tensors.
#[derive(Debug, Clone)]
pub(crate) struct NormRef {
    pub weight: VectorRef,
    pub bias: Option<VectorRef>,
}

/// A layer's tensors.
#[derive(Debug, Clone)]
pub(crate) struct LayerRefs {
    pub attention_norm: NormRef,
    pub q: LinearRef,
    pub k: LinearRef,
    pub v: LinearRef,
    pub out: LinearRef,
    pub mlp_norm: NormRef,
    pub gate: Option<LinearRef>,
    pub up: LinearRef,
    pub down: LinearRef,
}

/// All tensors of a decoder.
#[derive(Debug, Clone)]
pub(crate) struct DecoderRefs {
    pub embedding: MatrixRef,
    pub positions: Option<MatrixRef>,
    pub layers: Vec<LayerRefs>,
    pub final_norm: NormRef,
    /// `None` where the head is the embedding.
    pub head: Option<MatrixRef>,
    pub rope_divisors: Option<VectorRef>,
}

impl DecoderRefs {
    /// Resolves all names and checks both ways.
    ///
    /// # Errors
    /// [`ModelError::MissingTensors`], [`ModelError::TensorShape`], [`ModelError::UnexpectedTensors`].
    pub fn resolve(architecture: &Architecture, family: &Family, checkpoint: &Checkpoint) -> Result<Self> {
        let mut resolver = Resolver::new(family, checkpoint);
        let names = resolver.names;
        let Architecture { hidden_size, vocab_size, .. } = *architecture;
        let embedding = resolver.table(&resolver.prefixed(names.embedding), vocab_size, hidden_size)?;
        let positions = match architecture.position {
            PositionSpec::Learned { offset } => {
                Some(resolver.table(&resolver.prefixed(names.positions), architecture.context_length + offset, hidden_size)?)
            }
            PositionSpec::Rope(_) | PositionSpec::Alibi(_) => None,
        };
        let layers = (0..architecture.layers).map(|layer| resolver.layer(architecture, layer)).collect::<Result<_>>()?;
        let final_norm = resolver.norm(&resolver.prefixed(names.final_norm), architecture)?;
        let head = if architecture.head.tied {
            resolver.consumed.extend(names.head.iter().map(|head| format!("{head}.weight")));
            None
        } else {
            Some(resolver.table(&resolver.pick("", names.head), vocab_size, hidden_size)?)
        };
        let rope_divisors = match &architecture.position {
            PositionSpec::Rope(RopeLayers { tables, .. }) if tables[0].scaling == RopeScaling::Tensor => {
                let rope = &tables[0];
                Some(resolver.vector(ROPE_FREQS, rope.rotary_dim / 2, 0..rope.rotary_dim / 2)?)
            }
            _ => None,
        };
        resolver.finish()?;
        Ok(DecoderRefs { embedding, positions, layers, final_norm, head, rope_divisors })
    }
}

/// Looks names up, remembers which are used and which are missing. A missing tensor does not stop it, so that the
/// error lists all of them.
struct Resolver<'a> {
    checkpoint: &'a Checkpoint,
    names: &'static TensorNames,
    prefix: &'static str,
    transposed: bool,
    consumed: BTreeSet<String>,
    missing: Vec<String>,
}

impl<'a> Resolver<'a> {
    fn new(family: &Family, checkpoint: &'a Checkpoint) -> Self {
        // The table is static, so its rows are; going through the name gives that lifetime.
        let family = crate::arch::families::by_name(family.name).expect("a row of the table is found by its own name");
        let (names, prefix, transposed) = match checkpoint.format() {
            Format::Gguf => (&family.gguf.names, "", false),
            Format::HuggingFace => {
                let prefixed = format!("{}{}.weight", family.hf.prefix, family.hf.names.embedding[0]);
                let prefix = if checkpoint.tensors().contains_key(&prefixed) { family.hf.prefix } else { "" };
                (&family.hf.names, prefix, family.hf.transposed)
            }
        };
        Resolver { checkpoint, names, prefix, transposed, consumed: BTreeSet::new(), missing: Vec::new() }
    }

    fn prefixed(&self, names: Names) -> String {
        self.pick(self.prefix, names)
    }

    /// The first of some names that the checkpoint has; the first of all where it has none, for the error.
    fn pick(&self, prefix: &str, names: Names) -> String {
        let all = || names.iter().map(|name| format!("{prefix}{name}"));
        all().find(|name| self.has(name)).or_else(|| all().next()).unwrap_or_else(|| prefix.to_owned())
    }

    fn has(&self, base: &str) -> bool {
        self.checkpoint.tensors().contains_key(&format!("{base}.weight"))
    }

    /// The entry with its shape checked; a missing one is noted and stands in as f32 of the right shape.
    fn entry(&mut self, name: &str, expected: &[usize]) -> Result<TensorEntry> {
        self.consumed.insert(name.to_owned());
        match self.checkpoint.tensors().get(name) {
            Some(entry) if entry.shape == expected => Ok(entry.clone()),
            Some(entry) => Err(ModelError::TensorShape { name: name.to_owned(), expected: expected.to_vec(), actual: entry.shape.clone() }),
            None => {
                self.missing.push(name.to_owned());
                Ok(TensorEntry { dtype: DType::F32, shape: expected.to_vec(), source: 0, bytes: 0..0 })
            }
        }
    }

    /// A matrix that no family transposes: embedding, positions, head.
    fn table(&mut self, base: &str, rows: usize, columns: usize) -> Result<MatrixRef> {
        let name = format!("{base}.weight");
        let dtype = self.entry(&name, &[rows, columns])?.dtype;
        Ok(MatrixRef { name, rows: 0..rows, columns, dtype, transposed: false })
    }

    fn vector(&mut self, name: &str, length: usize, values: Range<usize>) -> Result<VectorRef> {
        let entry = self.entry(name, &[length])?;
        if entry.dtype.is_quantized() {
            return Err(ModelError::UnsupportedType {
                tensor: name.to_owned(),
                found: entry.dtype.to_string(),
                remedy: "norms and biases must be F32, F16 or BF16".to_owned(),
            });
        }
        Ok(VectorRef { name: name.to_owned(), values })
    }

    fn norm(&mut self, base: &str, architecture: &Architecture) -> Result<NormRef> {
        let length = architecture.hidden_size;
        let weight = self.vector(&format!("{base}.weight"), length, 0..length)?;
        let bias = match architecture.norm.kind {
            NormKind::Layer => Some(self.vector(&format!("{base}.bias"), length, 0..length)?),
            NormKind::Rms => None,
        };
        Ok(NormRef { weight, bias })
    }

    /// Rows `rows` of the product `base` of `all_rows` outputs.
    fn linear_part(&mut self, base: &str, all_rows: usize, rows: Range<usize>, columns: usize, bias: bool) -> Result<LinearRef> {
        let name = format!("{base}.weight");
        let shape = if self.transposed { [columns, all_rows] } else { [all_rows, columns] };
        let dtype = self.entry(&name, &shape)?.dtype;
        let bias = if bias { Some(self.vector(&format!("{base}.bias"), all_rows, rows.clone())?) } else { None };
        Ok(LinearRef { weight: MatrixRef { name, rows, columns, dtype, transposed: self.transposed }, bias })
    }

    fn linear(&mut self, base: &str, rows: usize, columns: usize, bias: bool) -> Result<LinearRef> {
        self.linear_part(base, rows, 0..rows, columns, bias)
    }

    fn layer(&mut self, architecture: &Architecture, layer: usize) -> Result<LayerRefs> {
        let names = self.names;
        let prefix = format!("{}{}", self.prefix, names.layer.replace("{}", &layer.to_string()));
        let name = |base: &str| format!("{prefix}{base}");
        let attention = &architecture.attention;
        let hidden = architecture.hidden_size;
        let q_rows = attention.heads * attention.head_dim;
        let kv_rows = attention.kv_heads * attention.head_dim;
        let bias = attention.qkv_bias;
        let stored = |way: &&QkvNames| match way {
            QkvNames::Separate { q, .. } => self.has(&name(q)),
            QkvNames::Concat(qkv) | QkvNames::Grouped(qkv) => self.has(&name(qkv)),
        };
        let way = *names.qkv.iter().find(stored).unwrap_or(&names.qkv[0]);
        let (q, k, v) = match way {
            QkvNames::Separate { q, k, v } => (
                self.linear(&name(q), q_rows, hidden, bias)?,
                self.linear(&name(k), kv_rows, hidden, bias)?,
                self.linear(&name(v), kv_rows, hidden, bias)?,
            ),
            QkvNames::Concat(qkv) | QkvNames::Grouped(qkv) => {
                let all = q_rows + 2 * kv_rows;
                (
                    self.linear_part(&name(qkv), all, 0..q_rows, hidden, bias)?,
                    self.linear_part(&name(qkv), all, q_rows..q_rows + kv_rows, hidden, bias)?,
                    self.linear_part(&name(qkv), all, q_rows + kv_rows..all, hidden, bias)?,
                )
            }
        };
        let mlp = &architecture.mlp;
        let (gate, up, down) = match names.mlp[0] {
            MlpNames::Separate { gate, up, down } => (Some(gate), up, down),
            MlpNames::Plain { up, down } => (None, up, down),
            MlpNames::GateUp { gate_up, down } => (None, gate_up, down),
        };
        Ok(LayerRefs {
            attention_norm: self.norm(&self.pick(&prefix, names.attention_norm), architecture)?,
            q,
            k,
            v,
            out: self.linear(&self.pick(&prefix, names.out), hidden, q_rows, attention.out_bias)?,
            mlp_norm: self.norm(&self.pick(&prefix, names.mlp_norm), architecture)?,
            gate: gate.map(|gate| self.linear(&name(gate), mlp.intermediate_size, hidden, mlp.bias)).transpose()?,
            up: self.linear(&name(up), mlp.intermediate_size, hidden, mlp.bias)?,
            down: self.linear(&name(down), hidden, mlp.intermediate_size, mlp.bias)?,
        })
    }

    fn finish(mut self) -> Result<()> {
        if !self.missing.is_empty() {
            self.missing.dedup();
            return Err(ModelError::MissingTensors { names: self.missing });
        }
        let left: Vec<String> = self.checkpoint.tensors().keys().filter(|name| !self.consumed.contains(*name)).cloned().collect();
        if left.is_empty() { Ok(()) } else { Err(ModelError::UnexpectedTensors { names: left }) }
    }
}

impl MatrixRef {
    /// Bytes of a slice as stored.
    pub fn slice_bytes(&self, rows: usize, columns: usize) -> usize {
        self.dtype.row_bytes(columns).unwrap_or(0) * rows
    }

    /// Rows `rows` and columns `columns` (whole blocks) of this matrix, summed by `segments`. It lies in the file's
    /// own bytes unless the tensor is stored transposed: then the slice is transposed into owned memory.
    ///
    /// # Errors
    /// Columns that would cut a quantization block.
    pub fn slice(&self, checkpoint: &Checkpoint, rows: Range<usize>, columns: Range<usize>, segments: Segments) -> Result<MatrixSource> {
        debug_assert!(rows.end <= self.rows.len() && columns.end <= self.columns && segments.columns() == columns.len());
        let entry = &checkpoint.tensors()[&self.name];
        let stored = self.rows.start + rows.start..self.rows.start + rows.end;
        let source = |bytes, offset, row_stride_bytes| MatrixSource {
            name: self.name.clone(),
            bytes,
            offset,
            row_stride_bytes,
            rows: rows.len(),
            columns: columns.len(),
            dtype: self.dtype,
            scales: None,
            segments: segments.clone(),
        };
        if self.transposed {
            let owned = transpose(checkpoint.bytes(entry), entry.shape[1], stored, columns.clone(), self.dtype.block_bytes());
            let stride = columns.len() * self.dtype.block_bytes();
            return Ok(source(Arc::new(owned), 0, stride));
        }
        let cut = || ModelError::Layout {
            requested: format!("columns {columns:?} of {}", self.name),
            reason: format!("they would cut a block of {} {} values", self.dtype.block_elements(), self.dtype),
            nearest: format!("bounds that are multiples of {}", self.dtype.block_elements()),
        };
        let row_bytes = self.dtype.row_bytes(self.columns).ok_or_else(cut)?;
        let column_offset = self.dtype.row_bytes(columns.start).ok_or_else(cut)?;
        self.dtype.row_bytes(columns.len()).ok_or_else(cut)?;
        Ok(source(checkpoint.source(entry), entry.bytes.start + stored.start * row_bytes + column_offset, row_bytes))
    }

    /// Runs of rows one after another, all columns: mapped where there is one run, else copied.
    ///
    /// # Errors
    /// As [`MatrixRef::slice`].
    pub fn gather(&self, checkpoint: &Checkpoint, runs: &[Range<usize>]) -> Result<MatrixSource> {
        let whole = Segments::whole(self.columns);
        if let [run] = runs {
            return self.slice(checkpoint, run.clone(), 0..self.columns, whole);
        }
        let mut owned = Vec::new();
        let mut joined = None;
        for run in runs {
            let part = self.slice(checkpoint, run.clone(), 0..self.columns, whole.clone())?;
            let bytes = part.rows * part.row_stride_bytes;
            owned.extend_from_slice(&(*part.bytes).as_ref()[part.offset..part.offset + bytes]);
            joined = Some(part);
        }
        let part = joined.ok_or_else(|| ModelError::MissingTensors { names: vec![self.name.clone()] })?;
        Ok(MatrixSource { rows: runs.iter().map(Range::len).sum(), bytes: Arc::new(owned), offset: 0, ..part })
    }
}

/// Stored [inputs, outputs] with `all_outputs` per row → [outputs, inputs] for the wanted ones. Walks in tiles, so that
/// both sides stay in the cache.
fn transpose(stored: &[u8], all_outputs: usize, outputs: Range<usize>, inputs: Range<usize>, element: usize) -> Vec<u8> {
    const TILE: usize = 32;
    let mut owned = vec![0; outputs.len() * inputs.len() * element];
    for input_tile in inputs.clone().step_by(TILE) {
        for output_tile in outputs.clone().step_by(TILE) {
            for output in output_tile..(output_tile + TILE).min(outputs.end) {
                for input in input_tile..(input_tile + TILE).min(inputs.end) {
                    let from = (input * all_outputs + output) * element;
                    let to = ((output - outputs.start) * inputs.len() + input - inputs.start) * element;
                    owned[to..to + element].copy_from_slice(&stored[from..from + element]);
                }
            }
        }
    }
    owned
}

impl VectorRef {
    /// The values of some runs (relative to this vector), one after another, as f32.
    ///
    /// # Errors
    /// [`ModelError::NonFinite`]: vectors are small and always looked through.
    pub fn read(&self, checkpoint: &Checkpoint, runs: &[Range<usize>]) -> Result<Vec<f32>> {
        let entry = &checkpoint.tensors()[&self.name];
        let bytes = checkpoint.bytes(entry);
        let mut values = Vec::new();
        for index in runs.iter().flat_map(|run| self.values.start + run.start..self.values.start + run.end) {
            let value = dense_value(entry.dtype, bytes, index);
            if !value.is_finite() {
                return Err(ModelError::NonFinite { tensor: self.name.clone(), index });
            }
            values.push(value);
        }
        Ok(values)
    }

    /// All values as f32.
    ///
    /// # Errors
    /// As [`VectorRef::read`].
    pub fn read_all(&self, checkpoint: &Checkpoint) -> Result<Vec<f32>> {
        self.read(checkpoint, std::slice::from_ref(&(0..self.values.len())))
    }
}

/// Value `index` of a dense tensor.
fn dense_value(dtype: DType, bytes: &[u8], index: usize) -> f32 {
    let mut value = [0.0];
    let size = dtype.block_bytes();
    dequantize(dtype, &bytes[index * size..(index + 1) * size], &mut value);
    value[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposes_any_part() {
        // More than one tile each way, value = input · 256 + output in two bytes.
        let (inputs, outputs) = (70, 50);
        let stored: Vec<u8> = (0..inputs).flat_map(|input| (0..outputs).flat_map(move |output| [input as u8, output as u8])).collect();
        let part = transpose(&stored, outputs, 3..47, 5..70, 2);
        assert_eq!(part.len(), 44 * 65 * 2);
        for (index, value) in part.chunks_exact(2).enumerate() {
            assert_eq!(value, [(index % 65 + 5) as u8, (index / 65 + 3) as u8]);
        }
    }
}
