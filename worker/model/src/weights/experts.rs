//! The tensors of a mixture of experts, in all the ways that checkpoints store them.

use super::matrix::Order;
use super::resolver::Resolver;
use super::runs::Runs;
use super::{ExpertsRefs, LinearRef, MatrixRef, MlpRefs};
use crate::arch::families::{ExpertNames, ExpertStorage, MlpNames};
use crate::arch::{ExpertsSpec, MlpSpec};
use crate::error::{ModelError, Result};

/// Where the tensors of an MLP are found.
#[derive(Debug, Clone, Copy)]
pub(super) enum MlpPlace<'a> {
    /// It has tensors of its own; `{}` in their names is the expert.
    Own { prefix: &'a str, expert: usize },
    /// It is one of `count` in tensors [experts, outputs, inputs].
    Stacked { prefix: &'a str, expert: usize, count: usize },
}

/// Some rows of a product of an MLP.
#[derive(Debug, Clone, Copy)]
pub(super) struct MlpPart {
    /// Outputs of the stored product.
    pub all_rows: usize,
    /// Those that are meant.
    pub rows: Runs,
    pub columns: usize,
    pub bias: bool,
}

impl Resolver<'_> {
    pub fn experts(&mut self, prefix: &str, hidden: usize, spec: &ExpertsSpec) -> Result<ExpertsRefs> {
        let Some(names) = self.names.experts else {
            return Err(ModelError::Unsupported {
                what: "a mixture of experts in this family".to_owned(),
                remedy: "the configuration is probably another model's; download the folder or file again".to_owned(),
            });
        };
        let router = format!("{prefix}{}", names.router);
        let bias = match spec.router.bias {
            true => Some(self.whole_vector(&format!("{router}.bias"), spec.count)?),
            false => None,
        };
        let router = LinearRef { weight: self.table(&router, spec.count, hidden)?, bias };
        let correction = match spec.router.correction_bias {
            true => Some(self.whole_vector(&self.pick_whole(prefix, names.correction_bias), spec.count)?),
            false => None,
        };
        let experts = self.all_experts(prefix, &names, hidden, spec)?;
        let shared = spec.shared.map(|shared| self.mlp(prefix, names.shared, hidden, &shared.mlp)).transpose()?;
        let shared_gate = match spec.shared {
            Some(shared) if shared.gate => Some(self.shared_gate(&format!("{prefix}{}", names.shared_gate), hidden)?),
            _ => None,
        };
        Ok(ExpertsRefs { router, correction, experts, shared, shared_gate })
    }

    /// One row, which GGUF files store as a vector.
    fn shared_gate(&mut self, base: &str, hidden: usize) -> Result<MatrixRef> {
        let name = format!("{base}.weight");
        let is_vector = self.checkpoint.tensors().get(&name).is_some_and(|entry| entry.shape.len() == 1);
        let dtype = if is_vector { self.entry(&name, &[hidden]) } else { self.entry(&name, &[1, hidden]) }?.dtype;
        Ok(MatrixRef { name, rows: Runs::contiguous(0..1), columns: hidden, dtype, order: Order::Rows })
    }

    fn all_experts(&mut self, prefix: &str, names: &ExpertNames, hidden: usize, spec: &ExpertsSpec) -> Result<Vec<MlpRefs>> {
        let stored = |storage: &&ExpertStorage| match storage {
            ExpertStorage::PerExpert(way) => self.has(&format!("{prefix}{}", first_name(way)).replace("{}", "0")),
            ExpertStorage::Stacked(way) => self.has(&format!("{prefix}{}", first_name(way))),
            ExpertStorage::TransposedByTurns { gate_up, .. } => self.has_tensor(&format!("{prefix}{gate_up}")),
        };
        let storage = *names.storage.iter().find(stored).unwrap_or(&names.storage[0]);
        let missing_before = self.missing();
        let mut experts = Vec::new();
        for expert in 0..spec.count {
            experts.push(self.expert(prefix, storage, expert, hidden, spec)?);
            // Of a stack the first expert finds what is missing. What the others' parts cost would then be the
            // configuration's word alone: no file holds them.
            if self.missing() > missing_before && !matches!(storage, ExpertStorage::PerExpert(_)) {
                break;
            }
        }
        Ok(experts)
    }

    fn expert(&mut self, prefix: &str, storage: ExpertStorage, expert: usize, hidden: usize, spec: &ExpertsSpec) -> Result<MlpRefs> {
        let count = spec.count;
        match storage {
            ExpertStorage::PerExpert(way) => self.mlp_of(way, &spec.expert, hidden, MlpPlace::Own { prefix, expert }),
            ExpertStorage::Stacked(way) => self.mlp_of(way, &spec.expert, hidden, MlpPlace::Stacked { prefix, expert, count }),
            ExpertStorage::TransposedByTurns { gate_up, down } => {
                let part = |name: &str, all_rows, rows, columns| StackPart {
                    name: format!("{prefix}{name}"),
                    expert,
                    count,
                    part: MlpPart { all_rows, rows, columns, bias: spec.expert.bias },
                };
                let inner = spec.expert.intermediate_size;
                Ok(MlpRefs {
                    gate: Some(self.transposed_part(part(gate_up, 2 * inner, Runs::every_second(0, inner), hidden))?),
                    up: self.transposed_part(part(gate_up, 2 * inner, Runs::every_second(1, inner), hidden))?,
                    down: self.transposed_part(part(down, hidden, Runs::contiguous(0..hidden), inner))?,
                })
            }
        }
    }

    /// An expert's rows of a stack [experts, inputs, outputs], or [experts, outputs, inputs] where it is MXFP4.
    fn transposed_part(&mut self, StackPart { name, expert, count, part }: StackPart) -> Result<LinearRef> {
        let MlpPart { all_rows, rows, columns, bias } = part;
        let (shape, order) = match self.checkpoint.exponents(&name) {
            Some(_) => ([count, all_rows, columns], Order::SplitBlocks),
            None => ([count, columns, all_rows], Order::Transposed { outputs: all_rows }),
        };
        let dtype = order.seen(self.entry(&name, &shape)?.dtype);
        let rows = rows.moved(expert * all_rows);
        let bias = match bias {
            true => Some(self.vector(&format!("{name}_bias"), &[count, all_rows], rows)?),
            false => None,
        };
        Ok(LinearRef { weight: MatrixRef { name, rows, columns, dtype, order }, bias })
    }

    /// An MLP stored in the first of some ways that the checkpoint has.
    pub fn mlp(&mut self, prefix: &str, ways: &[MlpNames], hidden: usize, spec: &MlpSpec) -> Result<MlpRefs> {
        let fits = |way: &&MlpNames| spec.gated != matches!(way, MlpNames::Plain { .. });
        let fitting = || ways.iter().filter(fits);
        let stored = fitting().find(|way| self.has(&format!("{prefix}{}", first_name(way))));
        let Some(way) = stored.or_else(|| fitting().next()) else {
            return Err(ModelError::Unsupported {
                what: format!("an MLP {} gate in this family", if spec.gated { "with a" } else { "without a" }),
                remedy: "the configuration is probably another model's; download the folder or file again".to_owned(),
            });
        };
        self.mlp_of(*way, spec, hidden, MlpPlace::Own { prefix, expert: 0 })
    }

    fn mlp_of(&mut self, way: MlpNames, spec: &MlpSpec, hidden: usize, place: MlpPlace<'_>) -> Result<MlpRefs> {
        let MlpSpec { intermediate_size: inner, bias, .. } = *spec;
        let rows = |all_rows, rows| MlpPart { all_rows, rows: Runs::contiguous(rows), columns: hidden, bias };
        let own = rows(inner, 0..inner);
        let out = MlpPart { all_rows: hidden, rows: Runs::contiguous(0..hidden), columns: inner, bias };
        let (gate, up, down) = match way {
            MlpNames::Separate { gate, up, down } => (Some((gate, own)), (up, own), down),
            MlpNames::GateUp { gate_up, down } => {
                (Some((gate_up, rows(2 * inner, 0..inner))), (gate_up, rows(2 * inner, inner..2 * inner)), down)
            }
            MlpNames::Plain { up, down } => (None, (up, own), down),
        };
        Ok(MlpRefs {
            gate: gate.map(|(name, part)| self.mlp_part(place, name, part)).transpose()?,
            up: self.mlp_part(place, up.0, up.1)?,
            down: self.mlp_part(place, down, out)?,
        })
    }

    fn mlp_part(&mut self, place: MlpPlace<'_>, base: &str, part: MlpPart) -> Result<LinearRef> {
        let MlpPart { all_rows, rows, columns, bias } = part;
        match place {
            MlpPlace::Own { prefix, expert } => {
                let name = format!("{prefix}{}", base.replace("{}", &expert.to_string()));
                self.linear_part(&name, all_rows, rows, columns, bias)
            }
            MlpPlace::Stacked { prefix, expert, count } => {
                let name = format!("{prefix}{base}.weight");
                let dtype = self.entry(&name, &[count, all_rows, columns])?.dtype;
                let rows = rows.moved(expert * all_rows);
                let bias = match bias {
                    true => Some(self.vector(&format!("{prefix}{base}.bias"), &[count, all_rows], rows)?),
                    false => None,
                };
                Ok(LinearRef { weight: MatrixRef { name, rows, columns, dtype, order: Order::Rows }, bias })
            }
        }
    }
}

/// Some rows of an expert in a stack.
struct StackPart {
    name: String,
    expert: usize,
    count: usize,
    part: MlpPart,
}

/// The base name by which a way of storing an MLP is recognized.
fn first_name(way: &MlpNames) -> &'static str {
    match way {
        MlpNames::Separate { gate: first, .. } | MlpNames::GateUp { gate_up: first, .. } | MlpNames::Plain { up: first, .. } => first,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::families::by_name;
    use crate::{LoadMode, Model};

    /// What a model's layer that its file does not have is resolved to, with as many experts as the configuration may name.
    fn absent_layer(file: &str) -> Result<ExpertsRefs> {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/model").join(file);
        let model = Model::open(path, LoadMode::Mmap).unwrap();
        let architecture = model.architecture();
        let spec = ExpertsSpec { count: 4096, ..architecture.experts.clone().unwrap() };
        let mut resolver = Resolver::new(by_name(architecture.family).unwrap(), model.checkpoint());
        resolver.experts("absent.", architecture.hidden_size, &spec)
    }

    #[test]
    fn the_parts_of_a_missing_stack_take_no_memory() {
        for file in ["rows/gpt_oss", "rows-gguf/mixtral.gguf"] {
            assert_eq!(absent_layer(file).unwrap().experts.len(), 1, "{file}");
        }
        // Where each expert has tensors of its own, the list of what is missing is bounded.
        let error = absent_layer("rows/mixtral").err();
        assert!(matches!(&error, Some(ModelError::MissingTensors { names }) if names.len() < 2000), "{error:?}");
    }
}
