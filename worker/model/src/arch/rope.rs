//! Rotary frequencies and the ways to stretch a context, exactly as the models were trained with them.
//!
//! Formulas: the shared specification E.2 (after the transformers library). Computed in f64, rounded once to f32.
//! Everything here is fixed at load: nothing depends on the running length (P2).

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
    /// Divisors per frequency stored in the file as a tensor (GGUF's `rope_freqs.weight`).
    Tensor,
}

impl RopeScaling {
    /// Name of the scaling, for the numerics id and `show`.
    pub fn name(&self) -> &'static str {
        match self {
            RopeScaling::Default => "default",
            RopeScaling::Linear { .. } => "linear",
            RopeScaling::Llama3 { .. } => "llama3",
            RopeScaling::Yarn { .. } => "yarn",
            RopeScaling::Tensor => "stored",
        }
    }
}

impl RopeSpec {
    /// Refuses what cannot be computed with; the error is (key, reason).
    pub(crate) fn validate(&self, head_dim: usize) -> Result<(), (&'static str, String)> {
        if self.rotary_dim == 0 || !self.rotary_dim.is_multiple_of(2) || self.rotary_dim > head_dim {
            return Err(("rotary_dim", format!("is {}, must be even and at most the head's {head_dim}", self.rotary_dim)));
        }
        if !(self.theta.is_finite() && self.theta > 0.0) {
            return Err(("rope_theta", format!("is {}, must be positive", self.theta)));
        }
        let positive = |key, value: f64| {
            if value.is_finite() && value > 0.0 { Ok(()) } else { Err((key, format!("is {value}, must be positive"))) }
        };
        match self.scaling {
            RopeScaling::Default | RopeScaling::Tensor => Ok(()),
            RopeScaling::Linear { factor } => positive("rope scaling factor", factor),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                positive("rope scaling factor", factor)?;
                positive("low_freq_factor", low_freq_factor)?;
                positive("high_freq_factor", high_freq_factor)?;
                positive("original_max_position_embeddings", original_context)?;
                if low_freq_factor == high_freq_factor {
                    return Err(("high_freq_factor", "equals low_freq_factor".to_owned()));
                }
                Ok(())
            }
            RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor, .. } => {
                positive("rope scaling factor", factor)?;
                positive("original_max_position_embeddings", original_context)?;
                positive("beta_fast", beta_fast)?;
                positive("beta_slow", beta_slow)?;
                positive("attention_factor", attention_factor)
            }
        }
    }

    /// Factor on cos and sin.
    pub fn attention_factor(&self) -> f32 {
        match self.scaling {
            RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
            _ => 1.0,
        }
    }

    /// Where YaRN's ramp begins and ends, as indices of frequencies.
    fn yarn_ramp(&self, original_context: f64, beta_fast: f64, beta_slow: f64, truncate: bool) -> (f64, f64) {
        let dim = self.rotary_dim as f64;
        let index_of = |rotations: f64| dim * (original_context / (rotations * std::f64::consts::TAU)).ln() / (2.0 * self.theta.ln());
        let (low, high) = (index_of(beta_fast), index_of(beta_slow));
        let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high { (low, high + 0.001) } else { (low, high) }
    }

    /// Inverse frequencies, `rotary_dim` / 2 of them. `divisors` are those of [`RopeScaling::Tensor`].
    pub fn inverse_frequencies(&self, divisors: Option<&[f32]>) -> Vec<f32> {
        let half = self.rotary_dim / 2;
        (0..half)
            .map(|index| {
                let base = self.theta.powf(-2.0 * index as f64 / self.rotary_dim as f64);
                let scaled = match &self.scaling {
                    RopeScaling::Default => base,
                    RopeScaling::Linear { factor } => base / factor,
                    RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                        let wavelength = std::f64::consts::TAU / base;
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
                    RopeScaling::Tensor => base / divisors.and_then(|values| values.get(index)).map_or(1.0, |&value| f64::from(value)),
                };
                scaled as f32
            })
            .collect()
    }
}
