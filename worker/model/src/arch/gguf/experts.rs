//! Mixtures of experts of GGUF metadata. Which layers have experts, and how wide a shared one is, the tensors tell.

use forge_kernels::ActivationKind;

use super::keys::Keys;
use crate::arch::families::row::{ExpertsRow, ScoreRow, SharedRow};
use crate::arch::{ExpertsSpec, MlpSpec, RouterGroups, RouterScore, RouterSpec, SharedExpertSpec};
use crate::error::{ModelError, Result};

impl Keys<'_> {
    pub fn experts(&self, mlp: &MlpSpec) -> Result<Option<ExpertsSpec>> {
        let Some(row) = &self.family.experts else {
            return match self.optional_size("expert_count")? {
                None | Some(0) => Ok(None),
                Some(count) => Err(ModelError::Unsupported {
                    what: format!("GGUF metadata: {} = {count}", self.key("expert_count")),
                    remedy: format!("family {} has no experts", self.family.name),
                }),
            };
        };
        let activation = match &row.clamped {
            Some((limit, alpha)) => {
                ActivationKind::ClampedSwiglu { limit: limit.absent.unwrap_or(f64::MAX) as f32, alpha: alpha.absent.unwrap_or(1.0) as f32 }
            }
            None => mlp.activation,
        };
        let intermediate_size = self.optional_size("expert_feed_forward_length")?.unwrap_or(mlp.intermediate_size);
        let expert = MlpSpec { intermediate_size, gated: true, activation, bias: row.bias };
        let mut layers: Vec<bool> = (0..self.layers).map(|layer| self.has_in(layer, "ffn_gate_inp.weight")).collect();
        if !layers.contains(&true) {
            // The check of tensors names them as missing.
            layers.fill(true);
        }
        let first = layers.iter().position(|has| *has).unwrap_or(0);
        Ok(Some(ExpertsSpec {
            count: self.size("expert_count")?,
            expert,
            router: self.router(row, first)?,
            shared: self.shared(row.shared, expert, first),
            layers,
        }))
    }

    fn name_in(&self, layer: usize, name: &str) -> String {
        format!("{}{name}", self.family.gguf.names.layer.replace("{}", &layer.to_string()))
    }

    fn has_in(&self, layer: usize, name: &str) -> bool {
        self.tensors.contains_key(&self.name_in(layer, name))
    }

    fn router(&self, row: &ExpertsRow, first: usize) -> Result<RouterSpec> {
        let score = match self.optional_size("expert_gating_func")?.unwrap_or(0) {
            1 => RouterScore::Softmax,
            2 => RouterScore::Sigmoid,
            3 => RouterScore::SoftmaxOfChosen,
            0 => match row.score {
                ScoreRow::Softmax => RouterScore::Softmax,
                ScoreRow::Sigmoid => RouterScore::Sigmoid,
                ScoreRow::SoftmaxOfChosen => RouterScore::SoftmaxOfChosen,
                ScoreRow::SparseMixer { jitter } => RouterScore::SparseMixer { jitter: jitter.absent.unwrap_or(0.0) as f32 },
            },
            other => {
                return Err(ModelError::Unsupported {
                    what: format!("GGUF metadata: {} = {other}", self.key("expert_gating_func")),
                    remedy: "known are 1 (softmax), 2 (sigmoid) and 3 (softmax of the chosen)".to_owned(),
                });
            }
        };
        let groups = match (self.optional_size("expert_group_count")?, self.optional_size("expert_group_used_count")?) {
            (Some(count), Some(kept)) if count > 1 => Some(RouterGroups { count, kept, best_two: matches!(score, RouterScore::Sigmoid) }),
            _ => None,
        };
        let normalize = self.metadata.optional_bool(&self.key("expert_weights_norm"))?;
        Ok(RouterSpec {
            per_token: self.size("expert_used_count")?,
            score,
            normalize: normalize.unwrap_or(self.family.gguf.normalize),
            scale: self.not_zero("expert_weights_scale")?.unwrap_or(1.0) as f32,
            groups,
            bias: row.router_bias,
            correction_bias: self.has_in(first, "exp_probs_b.bias"),
        })
    }

    fn shared(&self, row: SharedRow, expert: MlpSpec, first: usize) -> Option<SharedExpertSpec> {
        let gate = match row {
            SharedRow::No => return None,
            SharedRow::Gated(_) => true,
            SharedRow::Count(..) => false,
        };
        let intermediate_size = *self.tensors.get(&self.name_in(first, "ffn_up_shexp.weight"))?.shape.first()?;
        Some(SharedExpertSpec { mlp: MlpSpec { intermediate_size, ..expert }, gate })
    }
}
