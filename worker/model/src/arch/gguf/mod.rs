//! From GGUF metadata to an [`Architecture`]: a pure function of the metadata, the tensor directory and the family's
//! row. The directory tells what the metadata does not: vocabulary size, tied head, biases, norms, stored rope divisors.
//!
//! Invariant: a key that changes the computation is honoured or refused by name; where one is absent, the value is what
//! the format's own writers and readers mean by that.

mod attention;
mod experts;
mod keys;
mod position;
mod variants;

use std::collections::BTreeMap;

use self::keys::Keys;
use super::families::row::{EmbeddingScale, HeadScale, When};
use super::families::{self, Family};
use super::{Architecture, BlockOrder, BlockSpec, EmbeddingSpec, HeadSpec, MlpSpec};
use crate::checkpoint::TensorEntry;
use crate::error::{ModelError, Result};
use crate::gguf::Metadata;
use crate::gguf::metadata::config_error;

/// More layers and heads than any model has. The architecture is checked later, but lists as long as this are made
/// before.
const MOST: usize = 1 << 16;

/// Reads the architecture from a parsed GGUF file.
///
/// # Errors
/// An unknown family, a missing or senseless key, or a variant that is not implemented; by name.
pub fn from_gguf(metadata: &Metadata, tensors: &BTreeMap<String, TensorEntry>) -> Result<Architecture> {
    from_gguf_as(families::of_gguf(metadata)?, metadata, tensors)
}

/// `general.architecture`.
pub(crate) fn architecture_name(metadata: &Metadata) -> Result<&str> {
    metadata.optional_string("general.architecture")?.ok_or_else(|| config_error("general.architecture", "is missing"))
}

/// As [`from_gguf`], for a family chosen by the operator; keys have the prefix that the file gives them.
///
/// # Errors
/// As [`from_gguf`].
pub(crate) fn from_gguf_as(family: &Family, metadata: &Metadata, tensors: &BTreeMap<String, TensorEntry>) -> Result<Architecture> {
    let name = architecture_name(metadata)?;
    let bare = Keys { metadata, name, tensors, family, hidden_size: 0, layers: 0, heads: 0 };
    bare.refuse_variants()?;
    let bounded = |key: &str| match bare.size(key)? {
        size if size > MOST => Err(config_error(&bare.key(key), format!("is {size}, more than any model has"))),
        size => Ok(size),
    };
    let (layers, heads) = (bounded("block_count")?, bounded("attention.head_count")?);
    let keys = Keys { hidden_size: bare.size("embedding_length")?, layers, heads, ..bare };
    let embedding = format!("{}.weight", family.gguf.names.embedding[0]);
    let vocab_size = tensors.get(&embedding).and_then(|tensor| tensor.shape.first().copied());
    let vocab_size = vocab_size.ok_or_else(|| ModelError::MissingTensors { names: vec![embedding] })?;
    let context_length = keys.size("context_length")?;
    let attention = keys.attention(context_length)?;
    let mlp = keys.mlp()?;
    Architecture {
        family: family.name,
        hidden_size: keys.hidden_size,
        layers,
        vocab_size,
        context_length,
        embedding: keys.embedding()?,
        position: keys.position(&attention, context_length)?,
        norm: family.norm_spec(keys.norm_eps()?, 0.0),
        block: keys.block()?,
        experts: keys.experts(&mlp)?,
        attention,
        mlp,
        head: keys.head()?,
    }
    .validate("GGUF metadata")
}

impl Keys<'_> {
    fn norm_eps(&self) -> Result<f32> {
        let [usual, other] = self.family.gguf_eps_keys();
        let eps = match self.optional_float(usual)? {
            Some(eps) => Some(eps),
            None => self.optional_float(other)?,
        };
        eps.map(|eps| eps as f32).ok_or_else(|| config_error(&self.key(usual), "is missing"))
    }

    fn embedding(&self) -> Result<EmbeddingSpec> {
        let row = &self.family.embedding;
        let scale = match (self.not_zero("embedding_scale")?, row.scale) {
            (Some(scale), _) => scale,
            (None, EmbeddingScale::RootOfHidden) => (self.hidden_size as f64).sqrt(),
            (None, EmbeddingScale::One | EmbeddingScale::Key(_)) => 1.0,
        };
        Ok(EmbeddingSpec { width: self.hidden_size, scale: scale as f32, norm: row.norm })
    }

    /// The family's way to put a layer together whose norms are there; where that leaves a choice, a key decides.
    fn block(&self) -> Result<BlockSpec> {
        const PARALLEL: &str = "use_parallel_residual";
        let names = &self.family.gguf.names;
        let attention = self.layer_name(names.attention_norm, "weight");
        let mlp = self.layer_name(names.mlp_norm, "weight").filter(|mlp| Some(mlp) != attention.as_ref());
        let cases = self.family.blocks;
        let fits = |block: &BlockSpec| block.attention_pre_norm == attention.is_some() && block.mlp_pre_norm == mlp.is_some();
        let mut fitting = cases.iter().map(|case| case.block).filter(|block| cases.len() == 1 || fits(block));
        let keyed = cases.iter().flat_map(|case| case.when).any(|when| matches!(when, When::Bool(PARALLEL, ..)));
        let both_orders = fitting.clone().any(|block| block.order == BlockOrder::Parallel)
            && fitting.clone().any(|block| block.order == BlockOrder::Sequential);
        let block = if keyed && both_orders {
            let key = self.key(PARALLEL);
            let parallel = self.metadata.optional_bool(&key)?.ok_or_else(|| config_error(&key, "is missing"))?;
            fitting.find(|block| (block.order == BlockOrder::Parallel) == parallel)
        } else {
            fitting.next()
        };
        let block = block.or(cases.first().map(|case| case.block)).unwrap_or(BlockSpec::PRE_NORM);
        Ok(BlockSpec { residual_scale: self.not_zero("residual_scale")?.unwrap_or(1.0) as f32, ..block })
    }

    fn mlp(&self) -> Result<MlpSpec> {
        let row = &self.family.mlp;
        let intermediate_size = match self.optional_size("feed_forward_length")? {
            Some(size) => size,
            None if self.family.experts.is_some() => self.size("expert_feed_forward_length")?,
            None => self.size("feed_forward_length")?,
        };
        Ok(MlpSpec {
            intermediate_size,
            gated: row.gated,
            activation: self.family.gguf.activation,
            bias: self.flag(row.bias, &["ffn_up"], "bias"),
        })
    }

    fn head(&self) -> Result<HeadSpec> {
        let (row, names) = (&self.family.head, self.family.gguf.names.head);
        let has = |ending: &str| names.iter().any(|name| self.tensors.contains_key(&format!("{name}.{ending}")));
        let stored = self.not_zero("logit_scale")?;
        let scale = match row.scale {
            HeadScale::One | HeadScale::Times(_) => stored.unwrap_or(1.0),
            HeadScale::DividedBy(_) => 1.0 / stored.ok_or_else(|| config_error(&self.key("logit_scale"), "is missing"))?,
        };
        Ok(HeadSpec {
            tied: !has("weight"),
            bias: matches!(row.bias, families::row::Flag::Always) || has("bias"),
            scale: scale as f32,
            softcap: self.number_or("final_logit_softcapping", row.softcap.as_ref())?,
        })
    }
}

#[cfg(test)]
mod tests;
