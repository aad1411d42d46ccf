//! Looks names up, remembers which are used and which are missing. A missing tensor does not stop it, so that the
//! error lists all of them.

use std::collections::BTreeSet;

use forge_kernels::DType;

use super::matrix::Order;
use super::runs::Runs;
use super::vector::VectorPiece;
use super::{LinearRef, MatrixRef, NormRef, VectorRef};
use crate::arch::families::{Family, Names, Naming, TensorNames};
use crate::arch::{Architecture, NormSpec, PositionSpec, RopeSpec};
use crate::checkpoint::{Checkpoint, TensorEntry};
use crate::error::{ModelError, Result};

/// Missing names after which it stops: a configuration may speak of millions of layers that no file has.
const MOST_MISSING: usize = 1000;

pub(super) struct Resolver<'a> {
    pub checkpoint: &'a Checkpoint,
    pub names: &'static TensorNames,
    /// Before every name but the head's.
    pub prefix: &'static str,
    /// Matrices of layers are stored [inputs, outputs].
    pub transposed: bool,
    consumed: BTreeSet<String>,
    missing: Vec<String>,
    /// Names of the checkpoint without layer and expert numbers.
    kinds: BTreeSet<String>,
}

fn without_numbers(name: &str) -> String {
    name.replace(|letter: char| letter.is_ascii_digit(), "")
}

impl<'a> Resolver<'a> {
    pub fn new(family: &'static Family, checkpoint: &'a Checkpoint) -> Self {
        let naming = family.naming(checkpoint.format(), |name| checkpoint.tensors().contains_key(name));
        let Naming { names, prefix, transposed } = naming;
        let kinds = checkpoint.tensors().keys().map(|name| without_numbers(name)).collect();
        Resolver { checkpoint, names, prefix, transposed, consumed: BTreeSet::new(), missing: Vec::new(), kinds }
    }

    /// Whether there is a tensor of this whole name.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.checkpoint.tensors().contains_key(name)
    }

    /// Whether there is a weight of this base name.
    pub fn has(&self, base: &str) -> bool {
        self.has_tensor(&format!("{base}.weight"))
    }

    /// The first of some base names that the checkpoint has. Where it has none, the error is to speak of the name that other
    /// layers have, else of the first.
    pub fn pick(&self, prefix: &str, names: Names) -> String {
        self.first(prefix, names, |name| self.has(name))
    }

    /// As [`Resolver::pick`] for whole names.
    pub fn pick_whole(&self, prefix: &str, names: Names) -> String {
        self.first(prefix, names, |name| self.has_tensor(name))
    }

    fn first(&self, prefix: &str, names: Names, found: impl Fn(&str) -> bool) -> String {
        let all = || names.iter().map(|name| format!("{prefix}{name}"));
        let fallback = || all().find(|name| self.has_like(name)).or_else(|| all().next());
        all().find(|name| found(name)).or_else(fallback).unwrap_or_else(|| prefix.to_owned())
    }

    /// Whether there is a tensor of this name but for layer and expert numbers.
    pub fn has_like(&self, base: &str) -> bool {
        let base = without_numbers(base);
        self.kinds.contains(&format!("{base}.weight")) || self.kinds.contains(&base)
    }

    /// The entry with its shape checked; a missing one is noted and stands in as f32 of the right shape.
    pub fn entry(&mut self, name: &str, expected: &[usize]) -> Result<TensorEntry> {
        let first = self.consumed.insert(name.to_owned());
        match self.checkpoint.tensors().get(name) {
            Some(entry) if entry.shape == expected => Ok(entry.clone()),
            Some(entry) => Err(ModelError::TensorShape { name: name.to_owned(), expected: expected.to_vec(), actual: entry.shape.clone() }),
            None => {
                self.missing.extend(first.then(|| name.to_owned()));
                if self.missing.len() > MOST_MISSING {
                    return Err(ModelError::MissingTensors { names: std::mem::take(&mut self.missing) });
                }
                Ok(TensorEntry { dtype: DType::F32, shape: expected.to_vec(), source: 0, bytes: 0..0 })
            }
        }
    }

    /// How many names were not found so far.
    pub fn missing(&self) -> usize {
        self.missing.len()
    }

    /// A matrix that no family transposes: embedding, positions, head, router.
    pub fn table(&mut self, base: &str, rows: usize, columns: usize) -> Result<MatrixRef> {
        let name = format!("{base}.weight");
        let dtype = self.entry(&name, &[rows, columns])?.dtype;
        Ok(MatrixRef { name, rows: Runs::contiguous(0..rows), columns, dtype, order: Order::Rows })
    }

    /// Some values of a tensor of `shape`.
    pub fn vector(&mut self, name: &str, shape: &[usize], values: Runs) -> Result<VectorRef> {
        self.vector_entry(name, shape)?;
        Ok(VectorRef::of(name.to_owned(), values))
    }

    /// All values of a tensor of one dimension.
    pub fn whole_vector(&mut self, name: &str, length: usize) -> Result<VectorRef> {
        self.vector(name, &[length], Runs::contiguous(0..length))
    }

    fn vector_entry(&mut self, name: &str, shape: &[usize]) -> Result<()> {
        let dtype = self.entry(name, shape)?.dtype;
        if matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Ok(());
        }
        Err(ModelError::UnsupportedType {
            tensor: name.to_owned(),
            found: dtype.to_string(),
            remedy: "norms and biases must be F32, F16 or BF16".to_owned(),
        })
    }

    /// A norm's parameters, `length` values each.
    pub fn norm(&mut self, base: &str, length: usize, spec: NormSpec) -> Result<NormRef> {
        let mut parameter = |there: bool, ending| match there {
            true => self.whole_vector(&format!("{base}.{ending}"), length).map(Some),
            false => Ok(None),
        };
        Ok(NormRef { weight: parameter(spec.weight, "weight")?, bias: parameter(spec.bias, "bias")? })
    }

    /// A norm with parameters of its own for each of `heads` heads: one tensor [heads, width], or, where the name has
    /// `{}` in it, one for each head.
    pub fn norm_of_each_head(&mut self, base: &str, heads: usize, width: usize, spec: NormSpec) -> Result<NormRef> {
        let mut parameter = |there: bool, ending| {
            if !there {
                return Ok(None);
            }
            let name = format!("{base}.{ending}");
            if !name.contains("{}") {
                return self.vector(&name, &[heads, width], Runs::contiguous(0..heads * width)).map(Some);
            }
            let mut pieces = Vec::new();
            for head in 0..heads {
                let name = name.replace("{}", &head.to_string());
                self.vector_entry(&name, &[width])?;
                pieces.push(VectorPiece { name, values: Runs::contiguous(0..width) });
            }
            Ok(Some(VectorRef { pieces }))
        };
        Ok(NormRef { weight: parameter(spec.weight, "weight")?, bias: parameter(spec.bias, "bias")? })
    }

    /// Rows `rows` of the product `base` of `all_rows` outputs.
    pub fn linear_part(&mut self, base: &str, all_rows: usize, rows: Runs, columns: usize, bias: bool) -> Result<LinearRef> {
        let name = format!("{base}.weight");
        let (shape, order) = match self.transposed {
            true => ([columns, all_rows], Order::Transposed { outputs: all_rows }),
            false => ([all_rows, columns], Order::Rows),
        };
        let dtype = order.seen(self.entry(&name, &shape)?.dtype);
        let bias = if bias { Some(self.vector(&format!("{base}.bias"), &[all_rows], rows)?) } else { None };
        Ok(LinearRef { weight: MatrixRef { name, rows, columns, dtype, order }, bias })
    }

    /// A whole product.
    pub fn linear(&mut self, base: &str, rows: usize, columns: usize, bias: bool) -> Result<LinearRef> {
        self.linear_part(base, rows, Runs::contiguous(0..rows), columns, bias)
    }

    /// The head's matrix, where it is not the embedding's, and its bias.
    pub fn head(&mut self, architecture: &Architecture) -> Result<(Option<MatrixRef>, Option<VectorRef>)> {
        let Architecture { vocab_size, embedding, head, .. } = *architecture;
        let name = self.pick("", self.names.head);
        let matrix = if head.tied {
            // Some files hold a copy.
            self.consumed.extend(self.names.head.iter().map(|head| format!("{head}.weight")));
            None
        } else {
            Some(self.table(&name, vocab_size, embedding.width)?)
        };
        let bias = if head.bias { Some(self.whole_vector(&format!("{name}.bias"), vocab_size)?) } else { None };
        Ok((matrix, bias))
    }

    /// Per rotary table: the tensors of divisors that its scaling reads.
    pub fn rope_divisors(&mut self, architecture: &Architecture) -> Result<Vec<Vec<VectorRef>>> {
        let PositionSpec::Rope(rope) = &architecture.position else { return Ok(Vec::new()) };
        let mut of_table =
            |table: &RopeSpec| table.scaling.stored_divisors().iter().map(|name| self.whole_vector(name, table.rotary_dim / 2)).collect();
        rope.tables.iter().map(&mut of_table).collect()
    }

    /// The check both ways.
    pub fn finish(self) -> Result<()> {
        if !self.missing.is_empty() {
            return Err(ModelError::MissingTensors { names: self.missing });
        }
        let left: Vec<String> = self.checkpoint.tensors().keys().filter(|name| !self.consumed.contains(*name)).cloned().collect();
        if left.is_empty() { Ok(()) } else { Err(ModelError::UnexpectedTensors { names: left }) }
    }
}
