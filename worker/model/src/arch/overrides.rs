//! What an operator says about a model against its files: family, context extension, sliding window.
//!
//! What it is not: it sets no sizes. A family that is named here is checked tensor by tensor like any other.
//!
//! Invariant: an override that a model cannot take is refused by name; none is dropped in silence.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::rope::{RopeScaling, yarn_magnitude};
use super::{Architecture, PositionSpec};
use crate::error::{ModelError, Result};

/// What to do otherwise than a model's files say.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Overrides {
    /// The family: a row's name, a `model_type` or a `general.architecture`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<String>,
    /// Context extension of rotary positions, instead of the model's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScalingOverride>,
    /// Sliding window in positions of the layers that have one, else of all layers; 0: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sliding_window: Option<u32>,
}

/// Context extension of rotary positions as it is written on a command line, `type=yarn,factor=4,original=8192`, or as a
/// map of the same keys.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "String")]
pub struct RopeScalingOverride {
    kind: Kind,
    /// In the order of [`NUMBERS`].
    numbers: [Option<f64>; NUMBERS.len()],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Default,
    Linear,
    Dynamic,
    Yarn,
    Llama3,
}

const KINDS: [(&str, Kind); 5] =
    [("default", Kind::Default), ("linear", Kind::Linear), ("dynamic", Kind::Dynamic), ("yarn", Kind::Yarn), ("llama3", Kind::Llama3)];

/// Keys beside `type`, and the kinds that take them.
const NUMBERS: [(&str, &[Kind]); 7] = [
    ("factor", &[Kind::Linear, Kind::Dynamic, Kind::Yarn, Kind::Llama3]),
    ("original", &[Kind::Dynamic, Kind::Yarn, Kind::Llama3]),
    ("beta_fast", &[Kind::Yarn]),
    ("beta_slow", &[Kind::Yarn]),
    ("attention_factor", &[Kind::Yarn]),
    ("low_freq_factor", &[Kind::Llama3]),
    ("high_freq_factor", &[Kind::Llama3]),
];
const ORIGINAL: &str = "original_max_position_embeddings";

impl RopeScalingOverride {
    fn number(&self, key: &str) -> Option<f64> {
        NUMBERS.iter().position(|(name, _)| *name == key).and_then(|index| self.numbers[index])
    }

    fn from_pairs<'a>(pairs: impl Iterator<Item = (&'a str, Value)>) -> std::result::Result<Self, String> {
        let mut kind = None;
        let mut numbers = [None; NUMBERS.len()];
        for (key, value) in pairs {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            if matches!(key, "type" | "rope_type") {
                let known = || KINDS.map(|(name, _)| name).join(", ");
                let found = KINDS.iter().find(|(name, _)| *name == text);
                let (_, found) = found.ok_or_else(|| format!("rope scaling: type = {text:?} is unknown; known are {}", known()))?;
                kind = Some(*found);
                continue;
            }
            let name = if key == ORIGINAL { "original" } else { key };
            let index = NUMBERS.iter().position(|(known, _)| *known == name).ok_or_else(|| {
                format!("rope scaling: key {key:?} is unknown; known are type, {}", NUMBERS.map(|(name, _)| name).join(", "))
            })?;
            let number = text.trim().parse::<f64>().ok().filter(|number| number.is_finite() && *number > 0.0);
            let number = number.ok_or_else(|| format!("rope scaling: {key} = {text} is no number above 0"))?;
            if numbers[index].replace(number).is_some() {
                return Err(format!("rope scaling: {key} is given twice"));
            }
        }
        let kind = kind.ok_or_else(|| "rope scaling: type is missing, as in type=yarn,factor=4".to_owned())?;
        let given = Self { kind, numbers };
        for (index, (name, kinds)) in NUMBERS.iter().enumerate() {
            if numbers[index].is_some() && !kinds.contains(&kind) {
                return Err(format!("rope scaling: type {} takes no {name}", given.kind_name()));
            }
        }
        let needs_factor = kind != Kind::Default;
        if needs_factor && given.number("factor").is_none() {
            return Err(format!("rope scaling: type {} needs a factor", given.kind_name()));
        }
        if kind == Kind::Llama3 && (given.number("low_freq_factor").is_none() || given.number("high_freq_factor").is_none()) {
            return Err("rope scaling: type llama3 needs low_freq_factor and high_freq_factor".to_owned());
        }
        Ok(given)
    }

    fn kind_name(&self) -> &'static str {
        KINDS.iter().find(|(_, kind)| *kind == self.kind).map_or("", |(name, _)| name)
    }

    /// The scaling for a model of this context, and the context it has then. What is not given is as in the model's own
    /// scaling where that is of the same kind; the error is a reason.
    fn resolve(&self, current: &RopeScaling, context_length: usize) -> std::result::Result<(RopeScaling, f64), &'static str> {
        let own_original = match current {
            RopeScaling::Yarn { original_context, .. }
            | RopeScaling::Llama3 { original_context, .. }
            | RopeScaling::LongRope { original_context, .. } => *original_context,
            RopeScaling::Dynamic { trained_context, .. } => *trained_context,
            _ => context_length as f64,
        };
        let original_context = self.number("original").unwrap_or(own_original);
        let factor = self.number("factor").unwrap_or(1.0);
        let scaling = match self.kind {
            Kind::Default => return Ok((RopeScaling::Default, own_original)),
            Kind::Linear => RopeScaling::Linear { factor },
            Kind::Dynamic => RopeScaling::Dynamic { factor, trained_context: original_context },
            Kind::Yarn => self.yarn(current, factor, original_context)?,
            Kind::Llama3 => RopeScaling::Llama3 {
                factor,
                low_freq_factor: self.number("low_freq_factor").unwrap_or(1.0),
                high_freq_factor: self.number("high_freq_factor").unwrap_or(4.0),
                original_context,
            },
        };
        Ok((scaling, factor * original_context))
    }

    fn yarn(&self, current: &RopeScaling, factor: f64, original_context: f64) -> std::result::Result<RopeScaling, &'static str> {
        let (own_fast, own_slow, truncate) = match *current {
            RopeScaling::Yarn { beta_fast, beta_slow, truncate, .. } => (beta_fast, beta_slow, truncate),
            _ => (32.0, 1.0, true),
        };
        let attention_factor = match self.number("attention_factor") {
            Some(given) => given,
            None => stretched_magnitude(current, factor)
                .ok_or("the model's attention_factor fits its own factor alone, so attention_factor must be given as well")?,
        };
        let beta_fast = self.number("beta_fast").unwrap_or(own_fast);
        let beta_slow = self.number("beta_slow").unwrap_or(own_slow);
        Ok(RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor, truncate })
    }
}

/// YaRN's factor on cos and sin for another stretch of a model: that of the method where the model's own is that or it has
/// none; the model's where it is 1, which no stretch changes. None where it is neither and the stretch is another.
fn stretched_magnitude(current: &RopeScaling, factor: f64) -> Option<f64> {
    let RopeScaling::Yarn { factor: own_factor, attention_factor, .. } = *current else { return Some(yarn_magnitude(factor, 1.0)) };
    // Files round what they store.
    let same = |one: f64, other: f64| (one - other).abs() <= 1e-6 * other;
    if same(attention_factor, yarn_magnitude(own_factor, 1.0)) {
        Some(yarn_magnitude(factor, 1.0))
    } else if same(own_factor, factor) || same(attention_factor, 1.0) {
        Some(attention_factor)
    } else {
        None
    }
}

impl FromStr for RopeScalingOverride {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let pair = |part: &str| match part.split_once('=') {
            Some((key, value)) => Ok((key.trim().to_owned(), Value::String(value.trim().to_owned()))),
            None => Err(format!("rope scaling: {part:?} is not KEY=VALUE, as in type=yarn,factor=4")),
        };
        let pairs = text.split(',').map(pair).collect::<std::result::Result<Vec<_>, _>>()?;
        Self::from_pairs(pairs.iter().map(|(key, value)| (key.as_str(), value.clone())))
    }
}

impl TryFrom<Value> for RopeScalingOverride {
    type Error = String;

    fn try_from(value: Value) -> std::result::Result<Self, String> {
        match value {
            Value::String(text) => text.parse(),
            Value::Object(map) => Self::from_map(&map),
            other => Err(format!("rope scaling: {other} is neither a text like type=yarn,factor=4 nor a map of these keys")),
        }
    }
}

impl RopeScalingOverride {
    fn from_map(map: &Map<String, Value>) -> std::result::Result<Self, String> {
        Self::from_pairs(map.iter().map(|(key, value)| (key.as_str(), value.clone())))
    }
}

impl fmt::Display for RopeScalingOverride {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "type={}", self.kind_name())?;
        NUMBERS
            .iter()
            .zip(self.numbers)
            .filter_map(|((name, _), number)| number.map(|number| (name, number)))
            .try_for_each(|(name, number)| write!(formatter, ",{name}={number}"))
    }
}

impl From<RopeScalingOverride> for String {
    fn from(scaling: RopeScalingOverride) -> String {
        scaling.to_string()
    }
}

impl Overrides {
    /// Changes an architecture as asked; the family has been chosen before.
    ///
    /// # Errors
    /// [`ModelError::Unsupported`] for what this model cannot take.
    pub(crate) fn apply(&self, mut architecture: Architecture) -> Result<Architecture> {
        if let Some(scaling) = &self.rope_scaling {
            scaling.apply(&mut architecture)?;
        }
        if let Some(window) = self.sliding_window {
            let windows = &mut architecture.attention.windows;
            let any = windows.iter().any(Option::is_some);
            windows.iter_mut().filter(|own| !any || own.is_some()).for_each(|own| *own = (window > 0).then_some(window));
        }
        architecture.validate("overrides")
    }
}

impl RopeScalingOverride {
    fn apply(&self, architecture: &mut Architecture) -> Result<()> {
        let refused = |reason: &str| ModelError::Option {
            option: "rope scaling",
            value: self.to_string(),
            reason: format!("family {} {reason}", architecture.family),
        };
        let PositionSpec::Rope(rope) = &architecture.position else {
            return Err(refused("has no rotary positions; leave the rope scaling out"));
        };
        if architecture.attention.latent.is_some() {
            return Err(refused(
                "has a factor on scores that follows from the scaling it was trained with; leave the rope scaling out: the model's own is in \
                 its configuration",
            ));
        }
        if rope.tables.iter().any(|table| !table.scaling.stored_divisors().is_empty()) {
            return Err(refused("has the divisors of its frequencies in this file; take the Hugging Face folder of this model"));
        }
        let windowed = |layer: usize| architecture.attention.windows.get(layer).copied().flatten().is_some();
        let full = |layer: &usize| !windowed(*layer);
        // A table of windowed layers alone never sees a long distance: families with two tables stretch the other.
        let any_full = (0..architecture.layers).any(|layer| full(&layer));
        let stretched: Vec<usize> =
            (0..architecture.layers).filter(|layer| !any_full || full(layer)).filter_map(|layer| rope.of_layer[layer]).collect();
        let context_length = architecture.context_length;
        let mut longest: f64 = 0.0;
        let PositionSpec::Rope(rope) = &mut architecture.position else { return Ok(()) };
        for (index, table) in rope.tables.iter_mut().enumerate().filter(|(index, _)| stretched.contains(index)) {
            debug_assert!(index < rope.of_layer.len());
            let (scaling, context) = self.resolve(&table.scaling, context_length).map_err(|reason| ModelError::Option {
                option: "rope scaling",
                value: self.to_string(),
                reason: reason.to_owned(),
            })?;
            table.scaling = scaling;
            longest = longest.max(context);
        }
        if longest > 0.0 {
            architecture.context_length = longest as usize;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::arch::hf::from_config_json;

    fn parse(text: &str) -> std::result::Result<RopeScalingOverride, String> {
        text.parse()
    }

    fn llama(changes: &[(&str, Value)]) -> Architecture {
        let mut config = json!({
            "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
            "vocab_size": 100, "max_position_embeddings": 4096
        });
        for (key, value) in changes {
            config[*key] = value.clone();
        }
        from_config_json(&config).unwrap()
    }

    fn scaled(text: &str, architecture: Architecture) -> Result<Architecture> {
        Overrides { rope_scaling: Some(parse(text).unwrap()), ..Overrides::default() }.apply(architecture)
    }

    fn table(architecture: &Architecture) -> &RopeScaling {
        let PositionSpec::Rope(rope) = &architecture.position else { panic!("llama rotates") };
        &rope.tables[0].scaling
    }

    #[test]
    fn texts_and_maps_mean_the_same_and_come_back_as_text() {
        let text = "type=yarn,factor=4,original=8192";
        let parsed = parse(text).unwrap();
        assert_eq!(parsed.to_string(), text);
        let map = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192 });
        assert_eq!(serde_json::from_value::<RopeScalingOverride>(map).unwrap(), parsed);
        assert_eq!(serde_json::from_value::<RopeScalingOverride>(json!(text)).unwrap(), parsed);
        assert_eq!(serde_json::to_value(&parsed).unwrap(), json!(text));
        assert_eq!(parse(" type = linear , factor = 2 ").unwrap().to_string(), "type=linear,factor=2");
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_key() {
        for (text, named) in [
            ("", "KEY=VALUE"),
            ("yarn", "KEY=VALUE"),
            ("factor=4", "type is missing"),
            ("type=longrope,factor=4", "longrope"),
            ("type=yarn", "needs a factor"),
            ("type=yarn,factor=0", "factor = 0"),
            ("type=yarn,factor=-1", "factor = -1"),
            ("type=yarn,factor=NaN", "factor = NaN"),
            ("type=yarn,factor=inf", "factor = inf"),
            ("type=yarn,factor=4,factor=5", "twice"),
            ("type=yarn,factor=4,beta=1", "beta"),
            ("type=linear,factor=4,original=10", "takes no original"),
            ("type=llama3,factor=4", "low_freq_factor"),
        ] {
            let message = parse(text).unwrap_err();
            assert!(message.contains(named), "{text}: {message}");
        }
        assert!(serde_json::from_value::<RopeScalingOverride>(json!(4)).is_err());
        assert!(serde_json::from_value::<Overrides>(json!({ "rope": "type=default" })).is_err());
    }

    #[test]
    fn a_scaling_stretches_the_context_it_is_given_for() {
        let yarn = scaled("type=yarn,factor=4", llama(&[])).unwrap();
        assert_eq!(yarn.context_length, 16384);
        assert!(matches!(table(&yarn), RopeScaling::Yarn { factor: 4.0, original_context: 4096.0, .. }));
        let own = llama(&[("rope_scaling", json!({ "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048 }))]);
        let again = scaled("type=yarn,factor=4", own.clone()).unwrap();
        assert!(matches!(table(&again), RopeScaling::Yarn { factor: 4.0, original_context: 2048.0, .. }));
        assert_eq!(again.context_length, 8192);
        let plain = scaled("type=default", own).unwrap();
        assert_eq!((table(&plain), plain.context_length), (&RopeScaling::Default, 2048));
        assert_eq!(scaled("type=linear,factor=1.5", llama(&[])).unwrap().context_length, 6144);
    }

    #[test]
    fn what_is_not_given_is_as_in_a_scaling_of_the_same_kind() {
        let yarn = |changes: Value| {
            let mut own = json!({
                "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048, "beta_fast": 16.0, "beta_slow": 2.0,
                "truncate": false
            });
            own.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            llama(&[("rope_scaling", own)])
        };
        let usual = scaled("type=yarn,factor=4,beta_slow=3", yarn(json!({}))).unwrap();
        let RopeScaling::Yarn { beta_fast, beta_slow, attention_factor, truncate, .. } = *table(&usual) else { panic!("it is YaRN") };
        assert_eq!((beta_fast, beta_slow, attention_factor, truncate), (16.0, 3.0, yarn_magnitude(4.0, 1.0), false));
        let factor = |text: &str, own: f64| {
            scaled(text, yarn(json!({ "attention_factor": own }))).map(|architecture| match *table(&architecture) {
                RopeScaling::Yarn { attention_factor, .. } => attention_factor,
                ref other => panic!("{other:?}"),
            })
        };
        assert_eq!(factor("type=yarn,factor=4", 1.0).unwrap(), 1.0);
        assert_eq!(factor("type=yarn,factor=2,original=1024", 1.25).unwrap(), 1.25);
        assert_eq!(factor("type=yarn,factor=4,attention_factor=1.5", 1.25).unwrap(), 1.5);
        assert!(factor("type=yarn,factor=4", 1.25).unwrap_err().to_string().contains("attention_factor must be given"));
    }

    #[test]
    fn another_kind_stretches_the_original_context_and_not_the_stretched_one() {
        let own = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024 });
        let linear = scaled("type=linear,factor=2", llama(&[("rope_scaling", own)])).unwrap();
        assert_eq!((table(&linear), linear.context_length), (&RopeScaling::Linear { factor: 2.0 }, 2048));
    }

    #[test]
    fn models_without_rotary_positions_take_no_scaling() {
        let gpt2 = json!({ "model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 50 });
        let refused = scaled("type=linear,factor=2", from_config_json(&gpt2).unwrap()).unwrap_err().to_string();
        assert!(refused.contains("type=linear,factor=2: family gpt2 has no rotary positions"), "{refused}");
    }

    #[test]
    fn a_window_is_set_where_the_model_has_one_else_everywhere() {
        let windows = |architecture, window| {
            Overrides { sliding_window: Some(window), ..Overrides::default() }.apply(architecture).unwrap().attention.windows
        };
        assert_eq!(windows(llama(&[]), 9), [Some(9), Some(9)]);
        let mut half = llama(&[]);
        half.attention.windows = vec![None, Some(4)];
        assert_eq!(windows(half.clone(), 9), [None, Some(9)]);
        assert_eq!(windows(half, 0), [None, None]);
    }
}
