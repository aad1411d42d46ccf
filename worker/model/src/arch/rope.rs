//! Rotary frequencies and the ways to stretch a context, exactly as the models were trained with them.
//!
//! Formulas: the shared specification E.2 (after the transformers library). Computed in f64, rounded once to f32.
//!
//! Invariant: everything is fixed at load from the longest context that will be served; nothing depends on the
//! running length (P2).

use std::f64::consts::TAU;

use super::RopeSpec;

/// Context extension of rotary positions.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Positions divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// A larger base where more positions are served than the model was trained for (dynamic NTK).
    Dynamic {
        /// How fast the base grows with the length.
        factor: f64,
        /// Context the model was trained for: up to it nothing changes.
        trained_context: f64,
    },
    /// Llama 3.1: long waves divided by a factor, short ones kept, a smooth passage between.
    Llama3 {
        /// Divides the longest waves.
        factor: f64,
        /// Waves longer than original / this are divided.
        low_freq_factor: f64,
        /// Waves shorter than original / this are kept.
        high_freq_factor: f64,
        /// Context the model was first trained for.
        original_context: f64,
    },
    /// Long waves divided by a factor, short ones kept, a linear ramp over the index between, and a factor on
    /// cos and sin (YaRN).
    Yarn {
        /// Divides the longest waves.
        factor: f64,
        /// Context the model was first trained for.
        original_context: f64,
        /// Rotations within the original context above which a wave is kept.
        beta_fast: f64,
        /// Rotations below which it is divided.
        beta_slow: f64,
        /// Factor on cos and sin.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded outwards to whole indices.
        truncate: bool,
    },
    /// A divisor for each frequency: one list up to the original context, another for longer ones.
    LongRope {
        /// Context the model was first trained for.
        original_context: f64,
        /// For contexts up to it.
        short: LongRopeSide,
        /// For longer ones.
        long: LongRopeSide,
    },
    /// Divisors per frequency stored in the file as a tensor (GGUF's `rope_freqs.weight`).
    Tensor,
}

/// One half of [`RopeScaling::LongRope`].
#[derive(Debug, Clone, PartialEq)]
pub struct LongRopeSide {
    /// Per frequency; `None` where they are a tensor of the file ([`LONG_ROPE_TENSORS`]).
    pub divisors: Option<Vec<f64>>,
    /// Factor on cos and sin.
    pub attention_factor: f64,
}

/// GGUF tensor of divisors of [`RopeScaling::Tensor`].
pub const ROPE_FREQS: &str = "rope_freqs.weight";
/// GGUF tensors of divisors of [`RopeScaling::LongRope`]: short, long.
pub const LONG_ROPE_TENSORS: [&str; 2] = ["rope_factors_short.weight", "rope_factors_long.weight"];

impl RopeScaling {
    /// Name of the scaling, for `show`.
    pub fn name(&self) -> &'static str {
        match self {
            RopeScaling::Default => "default",
            RopeScaling::Linear { .. } => "linear",
            RopeScaling::Dynamic { .. } => "dynamic",
            RopeScaling::Llama3 { .. } => "llama3",
            RopeScaling::Yarn { .. } => "yarn",
            RopeScaling::LongRope { .. } => "longrope",
            RopeScaling::Tensor => "stored",
        }
    }

    /// Tensors of divisors that the file must hold, each of `rotary_dim` / 2 values.
    pub fn stored_divisors(&self) -> &'static [&'static str] {
        match self {
            RopeScaling::Tensor => &[ROPE_FREQS],
            RopeScaling::LongRope { short, .. } if short.divisors.is_none() => &LONG_ROPE_TENSORS,
            _ => &[],
        }
    }

    /// Which of [`RopeScaling::stored_divisors`] holds where at most `max_positions` are served.
    pub fn stored_choice(&self, max_positions: usize) -> Option<usize> {
        match self {
            RopeScaling::Tensor => Some(0),
            RopeScaling::LongRope { short, original_context, .. } if short.divisors.is_none() => {
                Some(usize::from(max_positions as f64 > *original_context))
            }
            _ => None,
        }
    }
}

impl RopeSpec {
    /// Refuses what cannot be computed with; the error is (key, reason).
    pub(crate) fn validate(&self, head_dim: usize) -> Result<(), (&'static str, String)> {
        if self.rotary_dim == 0 || !self.rotary_dim.is_multiple_of(2) || self.rotary_dim > head_dim {
            return Err(("rotary_dim", format!("is {}, must be even and at most the head's {head_dim}", self.rotary_dim)));
        }
        positive("rope_theta", self.theta)?;
        match &self.scaling {
            RopeScaling::Default | RopeScaling::Tensor => Ok(()),
            RopeScaling::Linear { factor } => positive("rope scaling factor", *factor),
            RopeScaling::Dynamic { factor, trained_context } => {
                positive("max_position_embeddings", *trained_context)?;
                if !(factor.is_finite() && *factor >= 1.0) {
                    return Err(("rope scaling factor", format!("is {factor}, must be at least 1 for dynamic scaling")));
                }
                if self.rotary_dim == 2 {
                    return Err(("rotary_dim", "is 2, dynamic scaling needs more than one frequency".to_owned()));
                }
                Ok(())
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                positive("rope scaling factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive("high_freq_factor", *high_freq_factor)?;
                positive("original_max_position_embeddings", *original_context)?;
                if low_freq_factor == high_freq_factor {
                    return Err(("high_freq_factor", "equals low_freq_factor".to_owned()));
                }
                Ok(())
            }
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor, .. } => {
                positive("rope scaling factor", *factor)?;
                positive("original_max_position_embeddings", *original_context)?;
                positive("beta_fast", *beta_fast)?;
                positive("beta_slow", *beta_slow)?;
                if self.theta == 1.0 {
                    return Err(("rope_theta", "is 1, YaRN divides by its logarithm".to_owned()));
                }
                positive("attention_factor", *attention_factor)
            }
            RopeScaling::LongRope { original_context, short, long } => {
                positive("original_max_position_embeddings", *original_context)?;
                self.validate_side("short_factor", short)?;
                self.validate_side("long_factor", long)
            }
        }
    }

    fn validate_side(&self, key: &'static str, side: &LongRopeSide) -> Result<(), (&'static str, String)> {
        positive("attention_factor", side.attention_factor)?;
        let Some(divisors) = &side.divisors else { return Ok(()) };
        if divisors.len() != self.rotary_dim / 2 {
            return Err((key, format!("has {} values, {} frequencies need as many", divisors.len(), self.rotary_dim / 2)));
        }
        divisors.iter().try_for_each(|&divisor| positive(key, divisor))
    }

    /// Factor on cos and sin where at most `max_positions` are served.
    pub fn attention_factor(&self, max_positions: usize) -> f32 {
        match &self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => *attention_factor as f32,
            RopeScaling::LongRope { original_context, short, long } => {
                let side = if max_positions as f64 > *original_context { long } else { short };
                side.attention_factor as f32
            }
            _ => 1.0,
        }
    }

    /// The scaling as it is computed where at most `max_positions` are served: part of the numerics id, since two
    /// lengths may give two sets of frequencies.
    pub fn numerics_name(&self, max_positions: usize) -> String {
        let name = self.scaling.name();
        match &self.scaling {
            RopeScaling::Dynamic { trained_context, .. } => format!("{name}@{}", (max_positions as f64).max(*trained_context)),
            RopeScaling::LongRope { original_context, .. } => {
                format!("{name}-{}", if max_positions as f64 > *original_context { "long" } else { "short" })
            }
            _ => name.to_owned(),
        }
    }

    /// Inverse frequencies, `rotary_dim` / 2 of them, where at most `max_positions` are served. `stored` are the values
    /// of the tensor that [`RopeScaling::stored_choice`] names.
    pub fn inverse_frequencies(&self, max_positions: usize, stored: Option<&[f32]>) -> Vec<f32> {
        (0..self.rotary_dim / 2).map(|index| self.inverse_frequency(index, max_positions as f64, stored) as f32).collect()
    }

    fn inverse_frequency(&self, index: usize, max_positions: f64, stored: Option<&[f32]>) -> f64 {
        let base = self.theta.powf(self.exponent(index));
        let stored = || stored.and_then(|values| values.get(index)).map_or(1.0, |&value| f64::from(value));
        match &self.scaling {
            RopeScaling::Default => base,
            RopeScaling::Linear { factor } => base / factor,
            RopeScaling::Dynamic { factor, trained_context } => {
                let stretch = factor * max_positions.max(*trained_context) / trained_context - (factor - 1.0);
                let dim = self.rotary_dim as f64;
                (self.theta * stretch.powf(dim / (dim - 2.0))).powf(self.exponent(index))
            }
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let wavelength = TAU / base;
                if wavelength < original_context / high_freq_factor {
                    base
                } else if wavelength > original_context / low_freq_factor {
                    base / factor
                } else {
                    let smooth = (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * base / factor + smooth * base
                }
            }
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, truncate, .. } => {
                let (low, high) = self.yarn_ramp(*original_context, *beta_fast, *beta_slow, *truncate);
                let ramp = ((index as f64 - low) / (high - low)).clamp(0.0, 1.0);
                base / factor * ramp + base * (1.0 - ramp)
            }
            RopeScaling::LongRope { original_context, short, long } => {
                let side = if max_positions > *original_context { long } else { short };
                base / side.divisors.as_ref().map_or_else(stored, |divisors| divisors[index])
            }
            RopeScaling::Tensor => base / stored(),
        }
    }

    fn exponent(&self, index: usize) -> f64 {
        -2.0 * index as f64 / self.rotary_dim as f64
    }

    /// Where YaRN's ramp begins and ends, as indices of frequencies.
    fn yarn_ramp(&self, original_context: f64, beta_fast: f64, beta_slow: f64, truncate: bool) -> (f64, f64) {
        let dim = self.rotary_dim as f64;
        let index_of = |rotations: f64| dim * (original_context / (rotations * TAU)).ln() / (2.0 * self.theta.ln());
        let (low, high) = (index_of(beta_fast), index_of(beta_slow));
        let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high { (low, high + 0.001) } else { (low, high) }
    }
}

/// YaRN's magnitude of a stretch by `factor`.
pub(crate) fn yarn_magnitude(factor: f64, scale: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * scale * factor.ln() + 1.0 }
}

fn positive(key: &'static str, value: f64) -> Result<(), (&'static str, String)> {
    if value.is_finite() && value > 0.0 { Ok(()) } else { Err((key, format!("is {value}, must be positive"))) }
}

#[cfg(test)]
#[path = "rope_tests.rs"]
mod tests;
