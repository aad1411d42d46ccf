//! How positions enter, by GGUF metadata: rotary tables and their scaling, learned positions, linear biases.

use super::keys::Keys;
use crate::arch::families::row::{AlibiRow, LocalRope, PositionRow, RopeRow};
use crate::arch::rope::{LONG_ROPE_TENSORS, LongRopeSide, ROPE_FREQS, yarn_magnitude};
use crate::arch::{AlibiSpec, AttentionSpec, PositionSpec, RopeLayers, RopeScaling, RopeSpec};
use crate::error::{ModelError, Result};
use crate::gguf::metadata::config_error;

const DEFAULT_THETA: f64 = 10_000.0;
/// Bases of layers that see everything and of windowed ones: the format's own key, and Ollama's.
const THETA: [&str; 2] = ["rope.freq_base", "rope.global.freq_base"];
const LOCAL_THETA: [&str; 2] = ["rope.freq_base_swa", "rope.local.freq_base"];
const KIND: &str = "rope.scaling.type";
const FACTOR: &str = "rope.scaling.factor";

impl Keys<'_> {
    pub fn position(&self, attention: &AttentionSpec, context_length: usize) -> Result<PositionSpec> {
        match &self.family.position {
            PositionRow::Learned { offset } => Ok(PositionSpec::Learned { offset: *offset }),
            PositionRow::Alibi(row) => self.alibi(row, attention),
            PositionRow::Rope(row) | PositionRow::AlibiIf(_, _, row) => self.rope(row, attention, context_length),
        }
    }

    fn alibi(&self, row: &AlibiRow, attention: &AttentionSpec) -> Result<PositionSpec> {
        let max_bias = self.not_zero("attention.max_alibi_bias")?.or(row.max_bias.absent).unwrap_or(8.0);
        if !(max_bias.is_finite() && max_bias > 0.0) {
            return Err(config_error(&self.key("attention.max_alibi_bias"), format!("is {max_bias}, must be positive")));
        }
        let factor = if row.scaled { (attention.head_dim as f64).powf(-0.5) as f32 } else { 1.0 };
        Ok(PositionSpec::Alibi(AlibiSpec::new(self.heads, max_bias, factor, row.rounded)))
    }

    fn rope(&self, row: &RopeRow, attention: &AttentionSpec, context_length: usize) -> Result<PositionSpec> {
        let whole = attention.latent.map_or(attention.head_dim, |latent| latent.rope_dim);
        let full = RopeSpec {
            style: self.family.gguf.rope_style,
            rotary_dim: self.optional_size("rope.dimension_count")?.unwrap_or(whole),
            theta: self.one_of(THETA)?.unwrap_or(DEFAULT_THETA),
            scaling: self.scaling(context_length)?,
        };
        let local_theta = self.one_of(LOCAL_THETA)?;
        let windowed = match &row.local {
            None => RopeSpec { theta: local_theta.unwrap_or(full.theta), ..full.clone() },
            Some(LocalRope::SameTheta) => RopeSpec { scaling: RopeScaling::Default, ..full.clone() },
            Some(LocalRope::Theta(theta)) => {
                let theta = local_theta.or(theta.absent).unwrap_or(DEFAULT_THETA);
                RopeSpec { theta, scaling: RopeScaling::Default, ..full.clone() }
            }
        };
        Ok(PositionSpec::Rope(RopeLayers::by_window(full, windowed, &attention.windows)))
    }

    /// A number with two names, which agree where a file has both.
    fn one_of(&self, [own, other]: [&str; 2]) -> Result<Option<f64>> {
        match (self.optional_float(own)?, self.optional_float(other)?) {
            (Some(one), Some(two)) if one != two => {
                Err(config_error(&self.key(other), format!("is {two}, and {} is {one}", self.key(own))))
            }
            (one, two) => Ok(one.or(two)),
        }
    }

    pub fn scaling(&self, context_length: usize) -> Result<RopeScaling> {
        let kind = self.metadata.optional_string(&self.key(KIND))?;
        let factor = match self.not_zero(FACTOR)? {
            Some(factor) => Some(factor),
            None => self.not_zero("rope.scale_linear")?,
        };
        let has = |name: &str| self.tensors.contains_key(name);
        if LONG_ROPE_TENSORS.iter().any(|name| has(name)) {
            return self.longrope(context_length);
        }
        let stretched = factor.filter(|factor| *factor != 1.0);
        match (kind, stretched) {
            (None | Some("none" | "linear"), None) if has(ROPE_FREQS) => Ok(RopeScaling::Tensor),
            (_, Some(factor)) if has(ROPE_FREQS) => Err(ModelError::Unsupported {
                what: format!("GGUF metadata: {} = {factor} beside the tensor {ROPE_FREQS}", self.key(FACTOR)),
                remedy: "take the Hugging Face folder of this model".to_owned(),
            }),
            (Some("none"), _) | (None, None) => Ok(RopeScaling::Default),
            (Some("linear"), _) if factor.is_none() => Err(config_error(&self.key(FACTOR), "is missing")),
            (None | Some("linear"), _) => Ok(factor.map_or(RopeScaling::Default, |factor| RopeScaling::Linear { factor })),
            (Some("yarn"), _) => self.yarn(factor, context_length),
            (Some(other), _) => Err(ModelError::Unsupported {
                what: format!("GGUF metadata: {} = {other:?}", self.key(KIND)),
                remedy: "take the Hugging Face folder of this model; GGUF files are served with scaling none, linear, yarn, or \
                         longrope whose factors are tensors"
                    .to_owned(),
            }),
        }
    }

    fn original_context(&self, context_length: usize) -> Result<f64> {
        Ok(self.not_zero("rope.scaling.original_context_length")?.unwrap_or(context_length as f64))
    }

    /// The factor on cos and sin that the file asks for, beside what the kind of scaling brings.
    fn attention_factor(&self) -> Result<f64> {
        Ok(self.not_zero("rope.scaling.attn_factor")?.unwrap_or(1.0))
    }

    fn longrope(&self, context_length: usize) -> Result<RopeScaling> {
        let side = LongRopeSide { divisors: None, attention_factor: self.attention_factor()? };
        Ok(RopeScaling::LongRope { original_context: self.original_context(context_length)?, short: side.clone(), long: side })
    }

    /// YaRN's `mscale_all_dim`. Writers of DeepSeek's files store a tenth of it.
    pub fn magnitude_of_all(&self) -> Result<Option<f64>> {
        let stored = self.not_zero("rope.scaling.yarn_log_multiplier")?;
        Ok(if self.family.attention.latent.is_some() { stored.map(|stored| stored / 0.1) } else { stored })
    }

    fn yarn(&self, factor: Option<f64>, context_length: usize) -> Result<RopeScaling> {
        let factor = factor.ok_or_else(|| config_error(&self.key(FACTOR), "is missing"))?;
        let magnitude = match self.magnitude_of_all()? {
            // `mscale` is not stored: DeepSeek's is equal to `mscale_all_dim`, that of others is 1.
            Some(_) if self.family.attention.latent.is_some() => 1.0,
            Some(all) => yarn_magnitude(factor, 1.0) / yarn_magnitude(factor, all),
            None => yarn_magnitude(factor, 1.0),
        };
        Ok(RopeScaling::Yarn {
            factor,
            original_context: self.original_context(context_length)?,
            beta_fast: self.not_zero("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: self.not_zero("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            attention_factor: magnitude * self.attention_factor()?,
            truncate: self.family.gguf.yarn_truncates,
        })
    }
}
