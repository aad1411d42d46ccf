//! The tensors of a layer: norms, and attention in all the ways that checkpoints store it.

use super::matrix::Order;
use super::resolver::Resolver;
use super::runs::Runs;
use super::{AttentionRefs, DirectRefs, ExpandRefs, FeedForwardRefs, LatentRefs, LayerRefs, LinearRef, MatrixRef, NormRef, QkvRefs};
use crate::arch::families::{LatentNames, Names, QkvNames};
use crate::arch::{Architecture, AttentionSpec, LatentSpec, QkNormOver};
use crate::error::{ModelError, Result};

impl Resolver<'_> {
    pub fn layer(&mut self, architecture: &Architecture, layer: usize) -> Result<LayerRefs> {
        let names = self.names;
        let prefix = format!("{}{}", self.prefix, names.layer.replace("{}", &layer.to_string()));
        let block = architecture.block;
        let mut norm = |there: bool, names: Names| match there {
            true => self.norm(&self.pick(&prefix, names), architecture.hidden_size, architecture.norm).map(Some),
            false => Ok(None),
        };
        let attention_norm = norm(block.attention_pre_norm, names.attention_norm)?;
        let attention_post_norm = norm(block.attention_post_norm, names.attention_post_norm)?;
        let mlp_norm = norm(block.mlp_pre_norm, names.mlp_norm)?;
        let mlp_post_norm = norm(block.mlp_post_norm, names.mlp_post_norm)?;
        let attention = self.attention(&prefix, architecture)?;
        let mlp = match &architecture.experts {
            Some(experts) if architecture.has_experts(layer) => {
                FeedForwardRefs::Experts(Box::new(self.experts(&prefix, architecture.hidden_size, experts)?))
            }
            _ => FeedForwardRefs::Dense(Box::new(self.mlp(&prefix, names.mlp, architecture.hidden_size, &architecture.mlp)?)),
        };
        Ok(LayerRefs { attention_norm, attention, attention_post_norm, mlp_norm, mlp, mlp_post_norm })
    }

    fn attention(&mut self, prefix: &str, architecture: &Architecture) -> Result<AttentionRefs> {
        let (names, spec, hidden) = (self.names, &architecture.attention, architecture.hidden_size);
        let qkv = match (&spec.latent, &names.latent) {
            (Some(latent), Some(names)) => QkvRefs::Latent(Box::new(self.latent(prefix, names, latent, architecture)?)),
            (Some(_), None) => {
                return Err(ModelError::Unsupported {
                    what: "latent attention in this family".to_owned(),
                    remedy: "the configuration is probably another model's; download the folder or file again".to_owned(),
                });
            }
            (None, _) => self.direct(prefix, spec, hidden)?,
        };
        let out = self.linear(&self.pick(prefix, names.out), hidden, spec.heads * spec.value_dim, spec.out_bias)?;
        let sinks = match spec.sinks {
            true => Some(self.whole_vector(&self.pick_whole(prefix, names.sinks), spec.heads)?),
            false => None,
        };
        Ok(AttentionRefs { qkv, out, sinks })
    }

    /// q, k and v as products of x.
    fn direct(&mut self, prefix: &str, spec: &AttentionSpec, hidden: usize) -> Result<QkvRefs> {
        let names = self.names;
        let AttentionSpec { heads, kv_heads, head_dim, value_dim, qkv_bias, .. } = *spec;
        let (q_rows, k_rows, v_rows) = (heads * head_dim, kv_heads * head_dim, kv_heads * value_dim);
        let name = |base: &str| format!("{prefix}{base}");
        let stored = |way: &&QkvNames| match way {
            QkvNames::Separate { q, .. } => self.has(&name(q)),
            QkvNames::Concat(qkv) | QkvNames::Grouped(qkv) => self.has(&name(qkv)),
        };
        let way = names.qkv.iter().find(stored).unwrap_or(&names.qkv[0]);
        let all = q_rows + k_rows + v_rows;
        let mut part = |base: &str, rows| self.linear_part(&name(base), all, rows, hidden, qkv_bias);
        let (q, k, v) = match *way {
            QkvNames::Concat(qkv) => (
                part(qkv, Runs::contiguous(0..q_rows))?,
                part(qkv, Runs::contiguous(q_rows..q_rows + k_rows))?,
                part(qkv, Runs::contiguous(q_rows + k_rows..all))?,
            ),
            QkvNames::Grouped(qkv) => {
                let queries = heads / kv_heads * head_dim;
                let stride = queries + head_dim + value_dim;
                let runs = |start, length| Runs { start, length, stride, count: kv_heads };
                (part(qkv, runs(0, queries))?, part(qkv, runs(queries, head_dim))?, part(qkv, runs(queries + head_dim, value_dim))?)
            }
            QkvNames::Separate { q, k, v } => (
                self.linear(&name(q), q_rows, hidden, qkv_bias)?,
                self.linear(&name(k), k_rows, hidden, qkv_bias)?,
                self.linear(&name(v), v_rows, hidden, qkv_bias)?,
            ),
        };
        let q_norm = self.qk_norm(&self.pick_norm(prefix, names.q_norm), spec, heads)?;
        let k_norm = self.qk_norm(&self.pick_norm(prefix, names.k_norm), spec, kv_heads)?;
        Ok(QkvRefs::Direct(Box::new(DirectRefs { q, k, v, q_norm, k_norm })))
    }

    /// As [`Resolver::pick`], of names that may have the head in them.
    fn pick_norm(&self, prefix: &str, names: Names) -> String {
        let all = || names.iter().map(|name| format!("{prefix}{name}"));
        all().find(|name| self.has(&name.replace("{}", "0"))).or_else(|| all().next()).unwrap_or_default()
    }

    fn qk_norm(&mut self, base: &str, spec: &AttentionSpec, heads: usize) -> Result<Option<NormRef>> {
        let Some(qk_norm) = spec.qk_norm else { return Ok(None) };
        match qk_norm.over {
            QkNormOver::Head => self.norm(base, spec.head_dim, qk_norm.norm),
            QkNormOver::EachHead => self.norm_of_each_head(base, heads, spec.head_dim, qk_norm.norm),
            QkNormOver::Full => self.norm(base, heads * spec.head_dim, qk_norm.norm),
        }
        .map(Some)
    }

    /// Latent attention. Biases are those of the products that read x.
    fn latent(&mut self, prefix: &str, names: &LatentNames, latent: &LatentSpec, architecture: &Architecture) -> Result<LatentRefs> {
        let (spec, hidden) = (&architecture.attention, architecture.hidden_size);
        let AttentionSpec { heads, head_dim, qkv_bias, .. } = *spec;
        let LatentSpec { query_rank, kv_rank, rope_dim, .. } = *latent;
        let name = |base: &str| format!("{prefix}{base}");
        let norm = latent.norm();
        let (query_latent, q) = match query_rank {
            Some(rank) => {
                let down = self.linear(&name(names.q_a), rank, hidden, qkv_bias)?;
                let norm = self.norm(&name(names.q_a_norm), rank, norm)?;
                (Some((down, norm)), self.linear(&name(names.q_b), heads * head_dim, rank, false)?)
            }
            None => (None, self.linear(&name(names.q), heads * head_dim, hidden, false)?),
        };
        let rows = kv_rank + rope_dim;
        let kv_a = name(names.kv_a);
        Ok(LatentRefs {
            query_latent,
            q,
            latent: self.linear_part(&kv_a, rows, Runs::contiguous(0..kv_rank), hidden, qkv_bias)?,
            rotary_key: self.linear_part(&kv_a, rows, Runs::contiguous(kv_rank..rows), hidden, qkv_bias)?,
            latent_norm: self.norm(&name(names.kv_a_norm), kv_rank, norm)?,
            expand: self.expand(prefix, names, latent, spec)?,
        })
    }

    /// The products that make keys and values of the latent. Which way they are stored is one for all layers.
    fn expand(&mut self, prefix: &str, names: &LatentNames, latent: &LatentSpec, spec: &AttentionSpec) -> Result<ExpandRefs> {
        let AttentionSpec { heads, value_dim, .. } = *spec;
        let LatentSpec { kv_rank, plain_dim, .. } = *latent;
        let name = |base: &str| format!("{prefix}{base}");
        let Some((keys, values)) = names.apart.filter(|(keys, _)| self.has_like(&name(keys))) else {
            return Ok(ExpandRefs::Joined(self.linear(&name(names.kv_b), heads * (plain_dim + value_dim), kv_rank, false)?));
        };
        let mut stack = |base: &str, shape: [usize; 3], width: usize, order: Order| -> Result<LinearRef> {
            let name = format!("{}.weight", name(base));
            let dtype = order.seen(self.entry(&name, &shape)?.dtype);
            let rows = Runs::contiguous(0..heads * width);
            Ok(LinearRef { weight: MatrixRef { name, rows, columns: kv_rank, dtype, order }, bias: None })
        };
        Ok(ExpandRefs::Apart {
            keys: stack(keys, [heads, kv_rank, plain_dim], plain_dim, Order::Transposed { outputs: plain_dim })?,
            values: stack(values, [heads, value_dim, kv_rank], value_dim, Order::Rows)?,
        })
    }
}
