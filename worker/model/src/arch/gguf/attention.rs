//! Self-attention of GGUF metadata: heads, scaling, windows, norms of queries and keys, latents.

use super::keys::Keys;
use crate::arch::families::row::{Flag, ScoreScale, WindowLayers, WindowRow};
use crate::arch::rope::yarn_magnitude;
use crate::arch::{AttentionSpec, LatentSpec, NormSpec, QkNormSpec, RopeScaling};
use crate::error::{ModelError, Result};
use crate::gguf::metadata::{Array, Value, config_error};

/// Widths of a head.
struct Widths {
    key: usize,
    value: usize,
}

impl Keys<'_> {
    pub fn attention(&self, context_length: usize) -> Result<AttentionSpec> {
        let row = &self.family.attention;
        let widths = self.widths()?;
        let latent = row.latent.as_ref().map(|latent| self.latent(&widths, latent.norm_eps)).transpose()?;
        let kv_heads = match latent {
            Some(_) => self.heads,
            None => self.optional_size("attention.head_count_kv")?.unwrap_or(self.heads),
        };
        let scale = self.score_scale(widths.key, context_length)?;
        let names = &self.family.gguf.names;
        Ok(AttentionSpec {
            heads: self.heads,
            kv_heads,
            head_dim: widths.key,
            value_dim: widths.value,
            scale: scale as f32,
            qkv_bias: self.flag(row.qkv_bias, &["attn_q", "attn_qkv", "attn_kv_a_mqa"], "bias"),
            out_bias: self.flag(row.out_bias, names.out, "bias"),
            qk_norm: match row.qk_norm {
                Some(norm) if matches!(norm.when, Flag::Always) || self.layer_name(names.q_norm, "weight").is_some() => {
                    // An offset of the weight is in the file's weights.
                    let spec = NormSpec { kind: norm.kind, eps: self.norm_eps()?, weight_offset: 0.0, weight: true, bias: norm.bias };
                    Some(QkNormSpec { over: norm.over, norm: spec })
                }
                _ => None,
            },
            clip: self.number_or("attention.clamp_kqv", None)?,
            softcap: self.number_or("attn_logit_softcapping", row.softcap.as_ref())?,
            sinks: row.sinks,
            windows: self.windows(row.windows.as_ref())?,
            latent,
        })
    }

    fn widths(&self) -> Result<Widths> {
        let length = |key: &str| self.optional_size(&format!("attention.{key}_length"));
        let mla = |key: &str| self.optional_size(&format!("attention.{key}_length_mla"));
        let or = |given: Option<usize>, other: Option<usize>| given.or(other);
        let (key, value) = match self.family.attention.latent {
            Some(_) => (or(mla("key")?, length("key")?), or(mla("value")?, length("value")?)),
            None => (length("key")?, length("value")?),
        };
        let share = || match self.heads {
            heads if heads > 0 && self.hidden_size.is_multiple_of(heads) => Ok(self.hidden_size / heads),
            heads => {
                Err(config_error(&self.key("attention.head_count"), format!("{} is not a multiple of {heads} heads", self.hidden_size)))
            }
        };
        let widths = match (key, value) {
            (Some(key), Some(value)) => Widths { key, value },
            (Some(both), None) | (None, Some(both)) => Widths { key: both, value: both },
            (None, None) => {
                let share = share()?;
                Widths { key: share, value: share }
            }
        };
        if widths.key != widths.value && self.family.attention.latent.is_none() {
            return Err(ModelError::Unsupported {
                what: format!("keys of {} and values of {} per head", widths.key, widths.value),
                remedy: format!("models of family {} have keys and values equally wide", self.family.name),
            });
        }
        Ok(widths)
    }

    fn score_scale(&self, head_dim: usize, context_length: usize) -> Result<f64> {
        if let Some(scale) = self.not_zero("attention.scale")? {
            return Ok(scale);
        }
        let of_head = (head_dim as f64).powf(-0.5);
        match &self.family.attention.scale {
            ScoreScale::RootOf(_) if self.family.gguf.layers_scaled_by_share == Some(self.layers) && self.heads > 0 => {
                Ok(((self.hidden_size / self.heads) as f64).powf(-0.5))
            }
            ScoreScale::RootOfHeadAndYarn => match self.scaling(context_length)? {
                RopeScaling::Yarn { factor, attention_factor, .. } => {
                    let magnitude = attention_factor * yarn_magnitude(factor, self.magnitude_of_all()?.unwrap_or(0.0));
                    Ok(of_head * magnitude * magnitude)
                }
                _ => Ok(of_head),
            },
            ScoreScale::RootOfHead | ScoreScale::RootOf(_) | ScoreScale::Key(_) => Ok(of_head),
        }
    }

    fn latent(&self, widths: &Widths, norm_eps: f32) -> Result<LatentSpec> {
        let rope_dim = self.size("rope.dimension_count")?;
        let plain_dim = widths.key.checked_sub(rope_dim).filter(|plain| *plain > 0).ok_or_else(|| {
            config_error(&self.key("rope.dimension_count"), format!("is {rope_dim}, keys have only {} values", widths.key))
        })?;
        let has_query_latent = self.layer_name(&["attn_q_a"], "weight").is_some();
        let query_rank = if has_query_latent { Some(self.size("attention.q_lora_rank")?) } else { None };
        Ok(LatentSpec { query_rank, kv_rank: self.size("attention.kv_lora_rank")?, plain_dim, rope_dim, norm_eps })
    }

    /// Sliding windows per layer: as the file says; else as the family has them.
    fn windows(&self, row: Option<&WindowRow>) -> Result<Vec<Option<u32>>> {
        const WINDOW: &str = "attention.sliding_window";
        const PATTERN: &str = "attention.sliding_window_pattern";
        let period = match row.map(|row| row.layers) {
            Some(WindowLayers::AllButEvery(_, period)) => Some(period),
            _ => None,
        };
        let absent = row.filter(|_| period.is_some()).and_then(|row| row.size.absent).map(|window| window as u32);
        let window = match self.metadata.optional_u32(&self.key(WINDOW))? {
            Some(window) => Some(window).filter(|window| *window > 0),
            None => absent,
        };
        let Some(window) = window else { return Ok(vec![None; self.layers]) };
        let windowed: Vec<bool> = match (self.metadata.get(&self.key(PATTERN)), row.map(|row| row.layers)) {
            (Some(Value::Array(Array::Bool(pattern))), _) if pattern.len() >= self.layers => pattern[..self.layers].to_vec(),
            (Some(Value::Array(_)), _) => {
                return Err(config_error(&self.key(PATTERN), format!("must be a number or a list of {} booleans", self.layers)));
            }
            (Some(_), _) => self.all_but_every(self.size(PATTERN)?),
            (None, Some(WindowLayers::AllButEvery(_, period))) => self.all_but_every(period),
            (None, Some(WindowLayers::All) | None) => vec![true; self.layers],
            (None, Some(WindowLayers::From(..) | WindowLayers::AlternateBelow(..) | WindowLayers::Repeated { .. })) => {
                return Err(ModelError::Unsupported {
                    what: format!("GGUF metadata: {} = {window}", self.key(WINDOW)),
                    remedy: "take the Hugging Face folder of this model, whose configuration says which layers have the window".to_owned(),
                });
            }
        };
        Ok(windowed.into_iter().map(|windowed| windowed.then_some(window)).collect())
    }

    /// A period of 0 means no layer.
    fn all_but_every(&self, period: usize) -> Vec<bool> {
        (0..self.layers).map(|layer| period > 0 && !(layer + 1).is_multiple_of(period)).collect()
    }
}
