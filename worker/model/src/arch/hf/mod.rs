//! From `config.json` to an [`Architecture`]: a pure function of the file and the family's row. Understands the spellings
//! of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`).
//!
//! Invariant: a key that changes the computation is honoured or refused by name; where one is absent, the value is that
//! of the family's configuration class.

mod attention;
mod experts;
mod facts;
mod position;

use forge_kernels::ActivationKind;
use serde_json::Value;

use self::facts::Config;
use super::families::row::{ActivationRow, EmbeddingScale, Fixed, HeadScale, KvHeads, Only, Size, When};
use super::families::{self, Family};
use super::{Architecture, BlockSpec, EmbeddingSpec, HeadSpec, MlpSpec};
use crate::error::{ModelError, Result};

pub(super) const FILE: &str = "config.json";

/// More layers and heads than any model has. The architecture is checked later, but lists as long as this are made before.
pub(super) const MOST_LAYERS: usize = 1 << 16;
pub(super) const MOST_HEADS: usize = 1 << 16;

/// Reads the architecture from a parsed config.json.
///
/// # Errors
/// An unknown family, a missing or senseless key, or a variant that is not implemented; by name.
pub fn from_config_json(config: &Value) -> Result<Architecture> {
    from_config_json_as(families::by_model_type(config)?, config)
}

/// As [`from_config_json`], for a family chosen by the operator.
///
/// # Errors
/// As [`from_config_json`].
pub(crate) fn from_config_json_as(family: &Family, config: &Value) -> Result<Architecture> {
    crate::checkpoint::quantized::scheme(config)?;
    let sizes = &family.sizes;
    let json = families::text_config(config);
    let bare = Config { json, outer: config, family, hidden_size: 0, layers: 0, heads: 0 };
    let bounded = |size: &Size, most: usize| match bare.size(size)? {
        found if found > most => Err(json.error(size.keys[0], format!("is {found}, more than any model has"))),
        found => Ok(found),
    };
    let (layers, heads) = (bounded(&sizes.layers, MOST_LAYERS)?, bounded(&sizes.heads, MOST_HEADS)?);
    let config = Config { hidden_size: bare.size(&sizes.hidden_size)?, layers, heads, ..bare };
    config.refuse_variants()?;
    let context_length = config.size(&sizes.context_length)?;
    let attention = config.attention(config.kv_heads(&sizes.kv_heads)?)?;
    let mlp = config.mlp()?;
    let position = config.position(&attention, context_length)?;
    Architecture {
        family: family.name,
        hidden_size: config.hidden_size,
        layers,
        vocab_size: config.size(&sizes.vocab_size)?,
        context_length: position.context_length(context_length),
        embedding: config.embedding()?,
        position,
        norm: family.norm_spec(config.norm_eps()?, family.norm.weight_offset),
        block: config.block()?,
        experts: config.experts(&mlp)?,
        attention,
        mlp,
        head: config.head()?,
    }
    .validate(FILE)
}

impl Config<'_> {
    fn refuse_variants(&self) -> Result<()> {
        for Fixed(key, only) in self.family.fixed {
            let Some(value) = self.json.get(key) else { continue };
            let (fits, wanted) = match only {
                Only::Bool(only) => (value.as_bool().map(|value| value == *only), only.to_string()),
                Only::Number(only) => (value.as_f64().map(|value| value == *only), only.to_string()),
                Only::Texts(texts) => (value.as_str().map(|value| texts.contains(&value)), texts.join(" or ")),
                Only::Null => (Some(false), "null".to_owned()),
            };
            match fits {
                Some(true) => {}
                Some(false) => {
                    return Err(ModelError::Unsupported {
                        what: format!("{FILE}: {key} = {value}"),
                        remedy: format!("only models with {key} = {wanted} can be served"),
                    });
                }
                None => return Err(self.json.error(key, format!("is {value}, {wanted} is needed"))),
            }
        }
        Ok(())
    }

    fn kv_heads(&self, row: &KvHeads) -> Result<usize> {
        match row {
            KvHeads::Key(size) => self.size(size),
            KvHeads::MultiQuery(size) => {
                if self.json.optional_bool("new_decoder_architecture")?.unwrap_or(false) {
                    self.size(size)
                } else if self.json.optional_bool("multi_query")?.unwrap_or(true) {
                    Ok(1)
                } else {
                    Ok(self.heads)
                }
            }
        }
    }

    fn embedding(&self) -> Result<EmbeddingSpec> {
        let row = &self.family.embedding;
        let width = row.width.map_or(Ok(None), |key| self.json.optional_size(key))?.unwrap_or(self.hidden_size);
        let scale = match row.scale {
            EmbeddingScale::One => 1.0,
            EmbeddingScale::RootOfHidden => (self.hidden_size as f64).sqrt(),
            EmbeddingScale::Key(number) => self.scale(&number)?,
        };
        Ok(EmbeddingSpec { width, scale: scale as f32, norm: row.norm })
    }

    fn norm_eps(&self) -> Result<f32> {
        let row = &self.family.norm;
        let eps = self.json.first(row.eps).map_or(Ok(None), |key| self.json.optional_float(key))?;
        Ok(eps.unwrap_or(row.default_eps) as f32)
    }

    fn block(&self) -> Result<BlockSpec> {
        let holds = |when: &When| match *when {
            When::Bool(key, absent, wanted) => Ok(self.json.optional_bool(key)?.unwrap_or(absent) == wanted),
            When::Size(key, absent, wanted) => Ok(self.json.optional_size(key)?.unwrap_or(absent) == wanted),
        };
        for case in self.family.blocks {
            if case.when.iter().map(holds).collect::<Result<Vec<bool>>>()?.into_iter().all(|holds| holds) {
                let residual_scale = self.scale(&self.family.residual_scale)? as f32;
                return Ok(BlockSpec { residual_scale, ..case.block });
            }
        }
        let key = |when: &When| match when {
            When::Bool(key, ..) | When::Size(key, ..) => *key,
        };
        let mut keys: Vec<&str> = self.family.blocks.iter().flat_map(|case| case.when).map(key).collect();
        keys.sort_unstable();
        keys.dedup();
        let values = keys.iter().map(|key| format!("{key} = {}", self.json.find(key).unwrap_or(&Value::Null)));
        Err(ModelError::Unsupported {
            what: format!("{FILE}: {}", values.collect::<Vec<_>>().join(", ")),
            remedy: format!("no model of family {} is known with these together", self.family.name),
        })
    }

    fn mlp(&self) -> Result<MlpSpec> {
        let row = &self.family.mlp;
        Ok(MlpSpec {
            intermediate_size: self.size(&self.family.sizes.intermediate_size)?,
            gated: row.gated,
            activation: self.activation(&row.activation)?,
            bias: self.flag(row.bias)?,
        })
    }

    fn activation(&self, row: &ActivationRow) -> Result<ActivationKind> {
        let key = self.json.first(row.keys);
        let name = key.map_or(Ok(None), |key| self.json.optional_str(key))?.unwrap_or(row.absent);
        match name {
            "silu" | "swish" => Ok(ActivationKind::Silu),
            "gelu" if row.gelu_is_tanh => Ok(ActivationKind::GeluTanh),
            "gelu" | "gelu_python" => Ok(ActivationKind::GeluErf),
            "gelu_new" | "gelu_pytorch_tanh" | "gelu_fast" => Ok(ActivationKind::GeluTanh),
            "relu" => Ok(ActivationKind::Relu),
            other => Err(ModelError::Unsupported {
                what: format!("{FILE}: {} = {other:?}", key.unwrap_or("activation")),
                remedy: "supported activations: silu, gelu, gelu_new, gelu_pytorch_tanh, relu".to_owned(),
            }),
        }
    }

    fn head(&self) -> Result<HeadSpec> {
        let row = &self.family.head;
        let scale = match row.scale {
            HeadScale::One => 1.0,
            HeadScale::Times(number) => self.scale(&number)?,
            HeadScale::DividedBy(number) => 1.0 / self.scale(&number)?,
        };
        Ok(HeadSpec {
            tied: self.tied()?.unwrap_or(row.tied_default),
            bias: self.flag(row.bias)?,
            scale: scale as f32,
            softcap: self.optional_number(row.softcap.as_ref())?,
        })
    }
}

#[cfg(test)]
mod row_tests;
#[cfg(test)]
mod tests;
