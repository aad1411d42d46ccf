//! Mixtures of experts of config.json: which layers, how many, how a token chooses.

use std::collections::BTreeSet;

use forge_kernels::ActivationKind;

use super::facts::Config;
use crate::arch::families::row::{ExpertLayers, ExpertsRow, GroupsRow, ScoreRow, SharedRow};
use crate::arch::{ExpertsSpec, MlpSpec, RouterGroups, RouterScore, RouterSpec, SharedExpertSpec};
use crate::error::Result;

impl Config<'_> {
    pub fn experts(&self, mlp: &MlpSpec) -> Result<Option<ExpertsSpec>> {
        let Some(row) = &self.family.experts else { return Ok(None) };
        let activation = match &row.clamped {
            Some((limit, alpha)) => ActivationKind::ClampedSwiglu {
                limit: self.optional_number(Some(limit))?.unwrap_or(f32::MAX),
                alpha: self.optional_number(Some(alpha))?.unwrap_or(1.0),
            },
            None => mlp.activation,
        };
        let intermediate_size = self.size(&row.intermediate_size)?;
        let expert = MlpSpec { intermediate_size, gated: true, activation, bias: row.bias };
        Ok(Some(ExpertsSpec {
            layers: self.expert_layers(row.layers)?,
            count: self.size(&row.count)?,
            expert,
            router: self.router(row)?,
            shared: self.shared(row.shared, expert)?,
        }))
    }

    fn expert_layers(&self, layers: ExpertLayers) -> Result<Vec<bool>> {
        match layers {
            ExpertLayers::All => Ok(vec![true; self.layers]),
            ExpertLayers::From(key, absent) => {
                let first = self.json.optional_size(key)?.unwrap_or(absent);
                Ok((0..self.layers).map(|layer| layer >= first).collect())
            }
            ExpertLayers::Sparse => {
                const STEP: &str = "decoder_sparse_step";
                let step = self.json.optional_size(STEP)?.unwrap_or(1);
                if step == 0 {
                    return Err(self.json.error(STEP, "is 0, must be at least 1"));
                }
                const DENSE: &str = "mlp_only_layers";
                let dense = self.json.sizes(DENSE)?;
                if dense.len() > self.layers {
                    return Err(self.json.error(DENSE, format!("has {} entries, there are {} layers", dense.len(), self.layers)));
                }
                let dense: BTreeSet<u64> = dense.into_iter().collect();
                Ok((0..self.layers).map(|layer| (layer + 1).is_multiple_of(step) && !dense.contains(&(layer as u64))).collect())
            }
        }
    }

    fn router(&self, row: &ExpertsRow) -> Result<RouterSpec> {
        Ok(RouterSpec {
            per_token: self.size(&row.per_token)?,
            score: match row.score {
                ScoreRow::Softmax => RouterScore::Softmax,
                ScoreRow::Sigmoid => RouterScore::Sigmoid,
                ScoreRow::SoftmaxOfChosen => RouterScore::SoftmaxOfChosen,
                ScoreRow::SparseMixer { jitter } => RouterScore::SparseMixer { jitter: self.number(&jitter)?.unwrap_or(0.0) as f32 },
            },
            normalize: self.flag(row.normalize)?,
            scale: self.scale(&row.scale)? as f32,
            groups: self.groups(row.groups)?,
            bias: row.router_bias,
            correction_bias: row.correction_bias,
        })
    }

    fn groups(&self, row: GroupsRow) -> Result<Option<RouterGroups>> {
        let best_two = match row {
            GroupsRow::No => return Ok(None),
            GroupsRow::If(key, value) if self.json.optional_str(key)? != Some(value) => return Ok(None),
            GroupsRow::If(..) => false,
            GroupsRow::BestTwo => true,
        };
        // Sizes of DeepSeek-V3, whose configuration class has them; V2's has none.
        let size = |key: &str, absent: usize| match self.json.optional_size(key)? {
            Some(size) => Ok(size),
            None if best_two => Ok(absent),
            None => Err(self.json.error(key, "is missing")),
        };
        Ok(Some(RouterGroups { count: size("n_group", 8)?, kept: size("topk_group", 4)?, best_two }))
    }

    fn shared(&self, row: SharedRow, expert: MlpSpec) -> Result<Option<SharedExpertSpec>> {
        let (intermediate_size, gate) = match row {
            SharedRow::No => return Ok(None),
            SharedRow::Gated(size) => (self.size(&size)?, true),
            SharedRow::Count(key, absent) => {
                let count = match self.json.find(key) {
                    Some(value) if value.is_null() => 0,
                    _ => self.json.optional_size(key)?.unwrap_or(absent),
                };
                if count == 0 {
                    return Ok(None);
                }
                (expert.intermediate_size.saturating_mul(count), false)
            }
        };
        Ok(Some(SharedExpertSpec { mlp: MlpSpec { intermediate_size, ..expert }, gate }))
    }
}
