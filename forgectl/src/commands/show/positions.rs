//! How a model's positions enter, and how far back its layers see, for `show`.
//!
//! It describes and decides nothing: what overrides change has been changed before.

use forge_model::Architecture;
use forge_model::arch::rope::RopeScaling;
use forge_model::arch::{PositionSpec, RopeSpec};
use serde::Serialize;

/// Positions of a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Positions {
    /// `rotary`, `learned` or `alibi`.
    kind: &'static str,
    /// Rotary tables with the number of layers that use each; most models have one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    rope: Vec<Rope>,
    /// Sliding windows with the number of layers that have each; the other layers see everything.
    windows: Vec<Window>,
    #[serde(skip)]
    layers: usize,
}

/// A rotary table.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Rope {
    layers: usize,
    theta: f64,
    /// Values of a head that are rotated, of `head_dim`.
    rotary_dim: usize,
    head_dim: usize,
    scaling: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    factor: Option<f64>,
    /// Positions before the extension.
    #[serde(skip_serializing_if = "Option::is_none")]
    original_context: Option<f64>,
}

/// A sliding window.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Window {
    layers: usize,
    /// Positions a layer sees, its own included.
    positions: u32,
}

impl Positions {
    /// Of an architecture.
    pub fn of(architecture: &Architecture) -> Self {
        let attention = &architecture.attention;
        let (kind, rope) = match &architecture.position {
            PositionSpec::Rope(rope) => {
                let layers = |index| rope.of_layer.iter().filter(|table| **table == Some(index)).count();
                let tables = rope.tables.iter().enumerate().map(|(index, table)| Rope::of(table, layers(index), attention.head_dim));
                ("rotary", tables.collect())
            }
            PositionSpec::Learned { .. } => ("learned", Vec::new()),
            PositionSpec::Alibi(_) => ("alibi", Vec::new()),
        };
        let mut windows: Vec<Window> = Vec::new();
        for positions in attention.windows.iter().flatten().copied() {
            match windows.iter_mut().find(|window| window.positions == positions) {
                Some(window) => window.layers += 1,
                None => windows.push(Window { layers: 1, positions }),
            }
        }
        Positions { kind, rope, windows, layers: architecture.layers }
    }

    /// The rows of a table.
    pub fn facts(&self) -> [(&'static str, String); 2] {
        let some = |layers: usize| if layers == self.layers { String::new() } else { format!(" in {layers} of {} layers", self.layers) };
        let positions = match self.kind {
            "rotary" => self.rope.iter().map(|rope| rope.sentence() + &some(rope.layers)).collect::<Vec<_>>().join("; "),
            "learned" => "none: a learned table of positions".to_owned(),
            _ => "none: linear biases (ALiBi)".to_owned(),
        };
        let window = |window: &Window| format!("{} positions{}", window.positions, some(window.layers));
        let windows = match self.windows.as_slice() {
            [] => "none: all layers see the whole context".to_owned(),
            windows => windows.iter().map(window).collect::<Vec<_>>().join("; "),
        };
        [("rope", positions), ("window", windows)]
    }
}

impl Rope {
    fn of(table: &RopeSpec, layers: usize, head_dim: usize) -> Self {
        let (factor, original_context) = match table.scaling {
            RopeScaling::Default | RopeScaling::Tensor => (None, None),
            RopeScaling::Linear { factor } => (Some(factor), None),
            RopeScaling::Dynamic { factor, trained_context } => (Some(factor), Some(trained_context)),
            RopeScaling::Llama3 { factor, original_context, .. } | RopeScaling::Yarn { factor, original_context, .. } => {
                (Some(factor), Some(original_context))
            }
            RopeScaling::LongRope { original_context, .. } => (None, Some(original_context)),
        };
        let (theta, rotary_dim, scaling) = (table.theta, table.rotary_dim, table.scaling.name());
        Rope { layers, theta, rotary_dim, head_dim, scaling, factor, original_context }
    }

    fn sentence(&self) -> String {
        let part = match self.rotary_dim == self.head_dim {
            true => format!("{} values of a head, all of them", self.rotary_dim),
            false => format!("{} of a head's {} values", self.rotary_dim, self.head_dim),
        };
        let factor = self.factor.map(|factor| format!(" by {factor}")).unwrap_or_default();
        let original = self.original_context.map(|context| format!(" beyond {context} positions")).unwrap_or_default();
        let scaling = match self.scaling {
            "default" => "no scaling".to_owned(),
            name => format!("scaling {name}{factor}{original}"),
        };
        format!("theta {}, {part}, {scaling}", self.theta)
    }
}

#[cfg(test)]
mod tests {
    use forge_model::{LoadMode, Model, Overrides};

    use super::*;

    fn facts(fixture: &str, overrides: &Overrides) -> [String; 2] {
        let path = format!("{}/../tests/fixtures/model/{fixture}", env!("CARGO_MANIFEST_DIR"));
        let model = Model::open_with(path, LoadMode::Mmap, overrides).expect("a fixture");
        Positions::of(model.architecture()).facts().map(|(_, text)| text)
    }

    #[test]
    fn bases_parts_scalings_and_windows_are_told() {
        let plain = Overrides::default();
        let [rope, window] = facts("llama", &plain);
        assert!(rope.starts_with("theta 10000, ") && rope.ends_with("all of them, no scaling"), "{rope}");
        assert!(window.starts_with("none"), "{window}");
        let yarn = Overrides { rope_scaling: Some("type=yarn,factor=2,original=32".parse().expect("valid")), ..plain.clone() };
        assert!(facts("llama", &yarn)[0].ends_with("scaling yarn by 2 beyond 32 positions"));
        let [rope, window] = facts("rows/gemma3", &plain);
        assert!(rope.contains("; theta ") && window.contains(" positions in "), "{rope} / {window}");
        assert!(facts("rows/phi", &plain)[0].contains(" of a head's "));
        assert!(facts("rows/bloom", &plain)[0].contains("ALiBi") && facts("gpt2", &plain)[0].contains("learned"));
    }
}
