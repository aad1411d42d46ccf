//! The choice of experts against transformers' own routing modules (tests/fixtures/model/routing.json).

use forge_model::arch::{RouterGroups, RouterScore, RouterSpec};
use forge_model::routing::route;
use serde::Deserialize;

/// A case of the file: a rule, router logits, and what each token chose.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: String,
    experts: usize,
    per_token: usize,
    score: String,
    normalize: bool,
    scale: f32,
    jitter: Option<f32>,
    groups: Option<usize>,
    kept: Option<usize>,
    best_two: Option<bool>,
    correction: Option<Vec<f32>>,
    logits: Vec<Vec<f32>>,
    chosen: Vec<Vec<u32>>,
    weights: Vec<Vec<f32>>,
}

impl Case {
    fn spec(&self) -> RouterSpec {
        let score = match self.score.as_str() {
            "softmax" => RouterScore::Softmax,
            "sigmoid" => RouterScore::Sigmoid,
            "softmax_of_chosen" => RouterScore::SoftmaxOfChosen,
            "sparse_mixer" => RouterScore::SparseMixer { jitter: self.jitter.unwrap() },
            other => panic!("{}: {other}", self.name),
        };
        let groups = self.groups.map(|count| RouterGroups { count, kept: self.kept.unwrap(), best_two: self.best_two.unwrap() });
        RouterSpec {
            per_token: self.per_token,
            score,
            normalize: self.normalize,
            scale: self.scale,
            groups,
            bias: false,
            correction_bias: self.correction.is_some(),
        }
    }
}

#[test]
fn every_rule_chooses_as_transformers_does() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/model/routing.json");
    let cases: Vec<Case> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(cases.len(), 10);
    for case in &cases {
        let mut choice = Vec::new();
        for (token, logits) in case.logits.iter().enumerate() {
            assert_eq!(logits.len(), case.experts);
            choice.clear();
            route(&case.spec(), logits, case.correction.as_deref(), &mut choice);
            let what = format!("{}: token {token}", case.name);
            let experts: Vec<u32> = choice.iter().map(|&(expert, _)| expert).collect();
            assert_eq!(experts, case.chosen[token], "{what}");
            for (&(expert, weight), expected) in choice.iter().zip(&case.weights[token]) {
                assert!(
                    (weight - expected).abs() <= 1e-5 * expected.abs().max(0.1),
                    "{what}: expert {expert}: {weight} instead of {expected}"
                );
            }
        }
    }
}
