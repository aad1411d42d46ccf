//! How positions enter, by config.json: rotary tables and their scaling, learned positions, linear biases.

use std::borrow::Cow;

use serde_json::Value;

use super::FILE;
use super::facts::Config;
use crate::arch::families::row::{AlibiRow, LocalRope, PositionRow, RopeRow, Rotary};
use crate::arch::rope::{LongRopeSide, yarn_magnitude};
use crate::arch::{AlibiSpec, AttentionSpec, PositionSpec, RopeLayers, RopeScaling, RopeSpec};
use crate::error::{ModelError, Result};
use crate::json::Json;

const ORIGINAL: &str = "original_max_position_embeddings";

impl Config<'_> {
    pub fn position(&self, attention: &AttentionSpec, context_length: usize) -> Result<PositionSpec> {
        match &self.family.position {
            PositionRow::Learned { offset } => Ok(PositionSpec::Learned { offset: *offset }),
            PositionRow::Rope(row) => self.rope(row, attention, context_length),
            PositionRow::Alibi(row) => self.alibi(row, attention),
            PositionRow::AlibiIf(key, alibi, rope) => match self.json.optional_bool(key)?.unwrap_or(false) {
                true => self.alibi(alibi, attention),
                false => self.rope(rope, attention, context_length),
            },
        }
    }

    fn alibi(&self, row: &AlibiRow, attention: &AttentionSpec) -> Result<PositionSpec> {
        let max_bias = self.optional_number(Some(&row.max_bias))?.unwrap_or(8.0);
        let factor = if row.scaled { (attention.head_dim as f64).powf(-0.5) as f32 } else { 1.0 };
        Ok(PositionSpec::Alibi(AlibiSpec::new(self.heads, f64::from(max_bias), factor, row.rounded)))
    }

    /// The rope parameters with the key they were found under.
    pub fn rope_parameters(&self) -> Result<(&'static str, Option<Cow<'_, Value>>)> {
        for key in ["rope_scaling", "rope_parameters"] {
            match self.json.get(key) {
                Some(Value::Object(map)) if map.is_empty() => {}
                Some(value @ Value::Object(_)) => return Ok((key, Some(Cow::Borrowed(value)))),
                Some(_) => return Err(self.json.error(key, "must be an object")),
                None => {}
            }
        }
        let absent = match &self.family.position {
            PositionRow::Rope(RopeRow { absent: Some(text), .. }) => serde_json::from_str(text).ok(),
            _ => None,
        };
        Ok(("rope_scaling", absent.map(Cow::Owned)))
    }

    /// The type of rope scaling, by its one name.
    pub fn rope_kind<'v>(&self, parameters: &Json<'v>) -> Result<&'v str> {
        let kind = match parameters.optional_str("rope_type")? {
            Some(kind) => kind,
            None => parameters.optional_str("type")?.unwrap_or("default"),
        };
        let aliases = match &self.family.position {
            PositionRow::Rope(row) => row.aliases,
            _ => &[],
        };
        Ok(aliases.iter().find(|(alias, _)| *alias == kind).map_or(kind, |(_, name)| name))
    }

    fn rope(&self, row: &RopeRow, attention: &AttentionSpec, context_length: usize) -> Result<PositionSpec> {
        let (key, parameters) = self.rope_parameters()?;
        let null = Value::Null;
        let parameters = Json { value: parameters.as_deref().unwrap_or(&null), ..self.json };
        let rotated = attention.latent.map_or(attention.head_dim, |latent| latent.rope_dim);
        let nested = parameters.value.as_object().is_some_and(|object| object.values().any(Value::is_object));
        let reader = RopeReader { config: self, row, key, by_layer_type: nested, rotated, context_length };
        let (full, windowed) = if nested {
            reader.by_layer_type(&parameters)?
        } else {
            let full = reader.table(&parameters, &row.theta_of(false))?;
            let windowed = match &row.local {
                Some(_) if key == "rope_parameters" && parameters.value.is_object() => {
                    return Err(ModelError::Unsupported {
                        what: format!("{FILE}: {key} for all layers alike"),
                        remedy: format!("family {} has full_attention and sliding_attention in it", self.family.name),
                    });
                }
                Some(LocalRope::SameTheta) => RopeSpec { scaling: RopeScaling::Default, ..full.clone() },
                Some(LocalRope::Theta(_)) => reader.table(&Json { value: &null, ..self.json }, &row.theta_of(true))?,
                None => full.clone(),
            };
            (full, windowed)
        };
        Ok(PositionSpec::Rope(RopeLayers::by_window(full, windowed, &attention.windows)))
    }
}

impl RopeRow {
    /// Where the base of full or windowed layers is found.
    fn theta_of(&self, windowed: bool) -> crate::arch::families::row::Number {
        match self.local {
            Some(LocalRope::Theta(theta)) if windowed => theta,
            _ => self.theta,
        }
    }
}

struct RopeReader<'a> {
    config: &'a Config<'a>,
    row: &'a RopeRow,
    key: &'static str,
    /// Whether each layer type has parameters of its own.
    by_layer_type: bool,
    /// Width of a head's part that may rotate.
    rotated: usize,
    context_length: usize,
}

impl RopeReader<'_> {
    /// Tables of full and of windowed layers, from parameters that name the layer type.
    fn by_layer_type(&self, parameters: &Json<'_>) -> Result<(RopeSpec, RopeSpec)> {
        const TYPES: [&str; 2] = ["full_attention", "sliding_attention"];
        let known = |key: &String| TYPES.contains(&key.as_str());
        if let Some(other) = parameters.value.as_object().and_then(|object| object.keys().find(|key| !known(key))) {
            return Err(ModelError::Unsupported {
                what: format!("{FILE}: {}: {other}", self.key),
                remedy: format!("known layer types are {} and {}", TYPES[0], TYPES[1]),
            });
        }
        let table = |kind: &str, windowed| {
            let value = parameters.get(kind).unwrap_or(&Value::Null);
            self.table(&Json { value, ..*parameters }, &self.row.theta_of(windowed))
        };
        Ok((table(TYPES[0], false)?, table(TYPES[1], true)?))
    }

    fn table(&self, parameters: &Json<'_>, theta: &crate::arch::families::row::Number) -> Result<RopeSpec> {
        let json = &self.config.json;
        let theta = match parameters.optional_float("rope_theta")? {
            Some(theta) => theta,
            None => self.config.number(theta)?.ok_or_else(|| json.error("rope_theta", "is null, a number is needed"))?,
        };
        let rotary_dim = match &self.row.rotary {
            Rotary::Width(key, absent) => match json.find(key) {
                Some(Value::Null) => self.rotated,
                _ => json.optional_size(key)?.unwrap_or(*absent),
            },
            Rotary::Share(share) => {
                let share = match parameters.optional_float("partial_rotary_factor")? {
                    Some(share) => share,
                    None => self.config.number(share)?.unwrap_or(1.0),
                };
                (self.rotated as f64 * share) as usize
            }
        };
        Ok(RopeSpec { style: self.row.style, rotary_dim, theta, scaling: self.scaling(parameters)? })
    }

    fn scaling(&self, parameters: &Json<'_>) -> Result<RopeScaling> {
        match self.config.rope_kind(parameters)? {
            "default" => Ok(RopeScaling::Default),
            "linear" => Ok(RopeScaling::Linear { factor: parameters.float("factor")? }),
            "dynamic" => Ok(RopeScaling::Dynamic { factor: parameters.float("factor")?, trained_context: self.context_length as f64 }),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: parameters.float("factor")?,
                low_freq_factor: parameters.float("low_freq_factor")?,
                high_freq_factor: parameters.float("high_freq_factor")?,
                original_context: self.original_context(parameters)?,
            }),
            "yarn" => self.yarn(parameters),
            "longrope" => self.longrope(parameters),
            other => Err(ModelError::Unsupported {
                what: format!("{FILE}: {}: rope_type = {other:?}", self.key),
                remedy: "supported: default, linear, dynamic, llama3, yarn, longrope".to_owned(),
            }),
        }
    }

    /// The context a scaled model was first trained for: that of the file itself overrules that of parameters for all
    /// layers, and says nothing of parameters for a layer type.
    fn original_context(&self, parameters: &Json<'_>) -> Result<f64> {
        if !self.by_layer_type
            && let Some(original) = self.config.json.optional_float(ORIGINAL)?.or(self.row.original_context)
        {
            return Ok(original);
        }
        Ok(parameters.optional_float(ORIGINAL)?.unwrap_or(self.context_length as f64))
    }

    fn yarn(&self, parameters: &Json<'_>) -> Result<RopeScaling> {
        let original_context = self.original_context(parameters)?;
        let factor = parameters.optional_float("factor")?.unwrap_or(self.context_length as f64 / original_context);
        let not_zero = |key: &str| Ok::<_, ModelError>(parameters.optional_float(key)?.filter(|value| *value != 0.0));
        let attention_factor = match parameters.optional_float("attention_factor")? {
            Some(given) => given,
            None => match (not_zero("mscale")?, not_zero("mscale_all_dim")?) {
                (Some(some), Some(all)) => yarn_magnitude(factor, some) / yarn_magnitude(factor, all),
                _ => yarn_magnitude(factor, 1.0),
            },
        };
        Ok(RopeScaling::Yarn {
            factor,
            original_context,
            beta_fast: not_zero("beta_fast")?.unwrap_or(32.0),
            beta_slow: not_zero("beta_slow")?.unwrap_or(1.0),
            attention_factor,
            truncate: parameters.optional_bool("truncate")?.unwrap_or(true),
        })
    }

    fn longrope(&self, parameters: &Json<'_>) -> Result<RopeScaling> {
        let original_context = self.original_context(parameters)?;
        let factor = parameters.optional_float("factor")?.unwrap_or(self.context_length as f64 / original_context);
        let (short_magnitude, long_magnitude) = if self.row.stored_magnitudes {
            (parameters.float("short_mscale")?, parameters.float("long_mscale")?)
        } else {
            let magnitude = match parameters.optional_float("attention_factor")? {
                Some(given) => given,
                None if factor <= 1.0 => 1.0,
                None => (1.0 + factor.ln() / original_context.ln()).sqrt(),
            };
            (magnitude, magnitude)
        };
        let side =
            |key: &str, attention_factor| Ok::<_, ModelError>(LongRopeSide { divisors: Some(parameters.floats(key)?), attention_factor });
        Ok(RopeScaling::LongRope {
            original_context,
            short: side("short_factor", short_magnitude)?,
            long: side("long_factor", long_magnitude)?,
        })
    }
}
