//! Self-attention of config.json: heads, scaling, windows, norms of queries and keys, latents.

use serde_json::Value;

use super::facts::Config;
use crate::arch::families::row::{LatentRow, QkNormRow, ScoreScale, WindowLayers, WindowRow};
use crate::arch::rope::yarn_magnitude;
use crate::arch::{AttentionSpec, LatentSpec, NormSpec, QkNormSpec};
use crate::error::Result;
use crate::json::Json;

impl Config<'_> {
    pub fn attention(&self, kv_heads: usize) -> Result<AttentionSpec> {
        let row = &self.family.attention;
        let latent = row.latent.as_ref().map(|latent| self.latent(latent)).transpose()?;
        let (head_dim, value_dim, kv_heads) = match &latent {
            Some((spec, value_dim)) => (spec.plain_dim + spec.rope_dim, *value_dim, self.heads),
            None => {
                let head_dim = self.size(&self.family.sizes.head_dim)?;
                (head_dim, head_dim, kv_heads)
            }
        };
        Ok(AttentionSpec {
            heads: self.heads,
            kv_heads,
            head_dim,
            value_dim,
            scale: self.score_scale(head_dim)? as f32,
            qkv_bias: self.flag(row.qkv_bias)?,
            out_bias: self.flag(row.out_bias)?,
            qk_norm: match row.qk_norm {
                Some(norm) if self.flag(norm.when)? => Some(self.qk_norm(&norm)?),
                _ => None,
            },
            clip: self.optional_number(row.clip.as_ref())?,
            softcap: self.optional_number(row.softcap.as_ref())?,
            sinks: row.sinks,
            windows: self.windows(row.windows.as_ref())?,
            latent: latent.map(|(spec, _)| spec),
        })
    }

    fn score_scale(&self, head_dim: usize) -> Result<f64> {
        let of_head = (head_dim as f64).powf(-0.5);
        match &self.family.attention.scale {
            ScoreScale::RootOfHead => Ok(of_head),
            ScoreScale::Key(number) => match self.number(number)? {
                Some(_) => self.scale(number),
                None => Ok(of_head),
            },
            ScoreScale::RootOf(number) => {
                let key = number.keys[0];
                let value = self.number(number)?.ok_or_else(|| self.json.error(key, "is null, a number is needed"))?;
                if value > 0.0 { Ok(value.powf(-0.5)) } else { Err(self.json.error(key, format!("is {value}, must be positive"))) }
            }
            ScoreScale::RootOfHeadAndYarn => {
                let (_, rope) = self.rope_parameters()?;
                let Some(rope) = rope else { return Ok(of_head) };
                let rope = Json { value: &rope, ..self.json };
                let scale = rope.optional_float("mscale_all_dim")?.unwrap_or(0.0);
                if self.rope_kind(&rope)? == "default" || scale == 0.0 {
                    return Ok(of_head);
                }
                Ok(of_head * yarn_magnitude(rope.float("factor")?, scale).powi(2))
            }
        }
    }

    fn qk_norm(&self, row: &QkNormRow) -> Result<QkNormSpec> {
        let QkNormRow { kind, bias, weight_offset, over, .. } = *row;
        Ok(QkNormSpec { over, norm: NormSpec { kind, eps: self.norm_eps()?, weight_offset, weight: true, bias } })
    }

    /// The latents, and the width of a value head.
    fn latent(&self, row: &LatentRow) -> Result<(LatentSpec, usize)> {
        let size = |key: &str, absent: usize| -> Result<usize> { Ok(self.json.optional_size(key)?.unwrap_or(absent)) };
        let key = row.query_rank.keys[0];
        let query_rank = match self.json.get(key) {
            Some(_) => self.json.optional_size(key)?,
            None => self.number(&row.query_rank)?.map(|rank| rank as usize),
        };
        let (plain_dim, rope_dim) = (size("qk_nope_head_dim", 128)?, size("qk_rope_head_dim", 64)?);
        for (key, dim) in [("qk_nope_head_dim", plain_dim), ("qk_rope_head_dim", rope_dim)] {
            if dim > 1 << 16 {
                return Err(self.json.error(key, format!("is {dim}, wider than any head")));
            }
        }
        let spec = LatentSpec { query_rank, kv_rank: size("kv_lora_rank", 512)?, plain_dim, rope_dim, norm_eps: row.norm_eps };
        Ok((spec, size("v_head_dim", 128)?))
    }

    /// Sliding windows per layer.
    fn windows(&self, row: Option<&WindowRow>) -> Result<Vec<Option<u32>>> {
        let none = vec![None; self.layers];
        let Some(row) = row else { return Ok(none) };
        if let Some(switch) = row.switch
            && !self.json.optional_bool(switch)?.unwrap_or(false)
        {
            return Ok(none);
        }
        let key = row.size.keys[0];
        let window = match self.json.get(key) {
            Some(_) => self.json.optional_id(key)?,
            None => self.number(&row.size)?.map(|window| window as u32),
        };
        let window = match window {
            None => return Ok(none),
            Some(0) => return Err(self.json.error(key, "is 0, must be at least 1")),
            Some(window) => window,
        };
        let windowed: Vec<bool> = match self.json.get("layer_types") {
            Some(types) => self.windowed_by_type(types)?,
            None => self.windowed_by_rule(row.layers)?,
        };
        Ok(windowed.into_iter().map(|windowed| windowed.then_some(window)).collect())
    }

    fn windowed_by_type(&self, types: &Value) -> Result<Vec<bool>> {
        let types = types.as_array().filter(|types| types.len() == self.layers);
        let types = types.ok_or_else(|| self.json.error("layer_types", format!("must be a list of {} names", self.layers)))?;
        types
            .iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(false),
                Some("sliding_attention") => Ok(true),
                _ => Err(self.json.error("layer_types", format!("holds {kind}; known are full_attention and sliding_attention"))),
            })
            .collect()
    }

    fn windowed_by_rule(&self, layers: WindowLayers) -> Result<Vec<bool>> {
        let bound = |key: &str, absent| -> Result<usize> { Ok(self.json.optional_size(key)?.unwrap_or(absent)) };
        if let WindowLayers::Repeated { key, full, windowed } = layers {
            return self.windowed_by_repetition(key, full, windowed);
        }
        let rule: Box<dyn Fn(usize) -> bool> = match layers {
            WindowLayers::All | WindowLayers::Repeated { .. } => Box::new(|_| true),
            WindowLayers::From(key, absent) => {
                let first = bound(key, absent)?;
                Box::new(move |layer| layer >= first)
            }
            WindowLayers::AlternateBelow(key, absent) => {
                let end = bound(key, absent)?;
                Box::new(move |layer| layer.is_multiple_of(2) && layer < end)
            }
            WindowLayers::AllButEvery(keys, absent) => {
                let period = self.json.first_size(keys)?.unwrap_or(absent);
                if period == 0 {
                    return Err(self.json.error(keys.first().copied().unwrap_or_default(), "is 0, must be at least 1"));
                }
                Box::new(move |layer| !(layer + 1).is_multiple_of(period))
            }
        };
        Ok((0..self.layers).map(rule).collect())
    }

    /// From `[[["global", "local"], 12]]`.
    fn windowed_by_repetition(&self, key: &str, full: &str, windowed: &str) -> Result<Vec<bool>> {
        let Some(value) = self.json.get(key) else {
            return Ok((0..self.layers).map(|layer| !layer.is_multiple_of(2)).collect());
        };
        let wrong =
            || self.json.error(key, format!("must be a list of [names, how often] for {} layers: {full} or {windowed}", self.layers));
        let mut layers = Vec::new();
        for item in value.as_array().ok_or_else(wrong)? {
            let names = item.get(0).and_then(Value::as_array).ok_or_else(wrong)?;
            let names: Vec<&str> = names.iter().filter_map(Value::as_str).collect();
            let times = item.get(1).and_then(Value::as_u64).filter(|times| *times <= self.layers as u64).ok_or_else(wrong)?;
            if names.is_empty() || names.len() > self.layers || !names.iter().all(|name| *name == full || *name == windowed) {
                return Err(wrong());
            }
            for _ in 0..times {
                layers.extend(names.iter().map(|name| *name == windowed));
                if layers.len() > self.layers {
                    return Err(wrong());
                }
            }
        }
        if layers.len() == self.layers { Ok(layers) } else { Err(wrong()) }
    }
}
