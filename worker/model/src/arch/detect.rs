//! Which family a checkpoint may be of, from the names and shapes of its tensors alone.
//!
//! What it is: each row's names are held against the directory, and every guess says what fits and what does not. What
//! it is not: it never decides. Many families share all names (LLaMA, Mistral), so only the configuration, or an
//! operator, says which one is meant, and the strict check of tensors follows either.

use std::collections::{BTreeMap, BTreeSet};

use super::QkNormOver;
use super::families::row::{BlockCase, Flag, PositionRow};
use super::families::{ExpertStorage, FAMILIES, Family, MlpNames, Names, QkvNames};
use super::rope::{LONG_ROPE_TENSORS, ROPE_FREQS};
use crate::checkpoint::{Format, TensorEntry};

/// A family that a checkpoint may be of.
#[derive(Debug, Clone, PartialEq)]
pub struct Guess {
    /// Name of the row.
    pub family: &'static str,
    /// Whose names the checkpoint has.
    pub format: Format,
    /// Kinds of tensors that the row has a name for; those of all layers are one kind.
    pub matched: usize,
    /// Kinds of tensors in the checkpoint.
    pub of: usize,
    /// Kinds of tensors that the row needs and the checkpoint lacks.
    pub lacking: usize,
    /// What fits, and what does not, by name.
    pub reasons: Vec<String>,
}

/// Guesses that explain at least half of a checkpoint's tensors, best first.
pub fn detect(tensors: &BTreeMap<String, TensorEntry>) -> Vec<Guess> {
    let kinds: Kinds = tensors.iter().map(|(name, entry)| (pattern(name), entry.shape.as_slice())).collect();
    let formats = [Format::HuggingFace, Format::Gguf];
    let all = FAMILIES.iter().flat_map(|family| formats.map(|format| Trial::run(family, format, tensors, &kinds)));
    let mut guesses: Vec<Guess> = all.filter(|guess| guess.matched * 2 >= guess.of && guess.matched > 0).collect();
    guesses.sort_by_key(|guess| (guess.of - guess.matched + guess.lacking, guess.lacking));
    guesses
}

/// The guesses in one line, for an error about an unknown family.
pub(crate) fn nearest(tensors: &BTreeMap<String, TensorEntry>) -> String {
    const SHOWN: usize = 3;
    let describe = |guess: &Guess| format!("{} ({})", guess.family, guess.reasons.join("; "));
    let shown: Vec<String> = detect(tensors).iter().take(SHOWN).map(describe).collect();
    if shown.is_empty() { "none by the names of its tensors".to_owned() } else { shown.join(", ") }
}

/// Kinds of tensors with the shape of one of each.
type Kinds<'a> = BTreeMap<String, &'a [usize]>;

/// A name with its numbers as `{}`.
fn pattern(name: &str) -> String {
    let number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    name.split('.').map(|part| if number(part) { "{}" } else { part }).collect::<Vec<_>>().join(".")
}

/// What a shape must look like, beside the hidden size.
#[derive(Clone, Copy)]
enum Shape {
    Any,
    /// As long as the hidden size.
    Hidden,
    /// A matrix that reads the hidden size.
    FromHidden,
    /// Three-dimensional.
    Stacked,
    /// A query or key norm.
    QkNorm(QkNormOver),
}

/// A row held against a directory.
struct Trial<'a> {
    kinds: &'a Kinds<'a>,
    prefix: String,
    hidden: Option<usize>,
    transposed: bool,
    explained: BTreeSet<String>,
    lacking: Vec<String>,
    misshapen: Vec<String>,
}

impl Trial<'_> {
    fn run(family: &'static Family, format: Format, tensors: &BTreeMap<String, TensorEntry>, kinds: &Kinds<'_>) -> Guess {
        let naming = family.naming(format, |name| tensors.contains_key(name));
        let names = naming.names;
        let mut trial = Trial {
            kinds,
            prefix: naming.prefix.to_owned(),
            hidden: None,
            transposed: naming.transposed,
            explained: BTreeSet::new(),
            lacking: Vec::new(),
            misshapen: Vec::new(),
        };
        trial.stem(family, names.embedding);
        trial.layer(family, names);
        trial.prefix.clear();
        trial.expect(names.head, "weight", false, Shape::FromHidden);
        trial.biases(names.head, family.head.bias);
        let format_wide = [ROPE_FREQS, LONG_ROPE_TENSORS[0], LONG_ROPE_TENSORS[1]];
        trial.explained.extend(format_wide.iter().filter(|name| kinds.contains_key(**name)).map(|name| (*name).to_owned()));
        trial.finish(family.name, format)
    }

    /// What is before and after the layers.
    fn stem(&mut self, family: &'static Family, embedding: Names) {
        let names = if self.kinds.keys().any(|kind| kind.starts_with("blk.")) { &family.gguf.names } else { &family.hf.names };
        let table = self.expect(embedding, "weight", true, Shape::Any);
        self.hidden = table.and_then(|name| self.kinds.get(&name)).and_then(|shape| shape.get(1)).copied();
        if family.embedding.width.is_some() {
            // Where a projection leads in, the table has another width.
            if let Some(project) = self.expect(names.project_in, "weight", false, Shape::Any) {
                self.hidden = self.kinds[&project].first().copied();
                self.expect(names.project_out, "weight", true, Shape::Any);
            }
        }
        if matches!(family.position, PositionRow::Learned { .. }) {
            self.expect(names.positions, "weight", true, Shape::FromHidden);
        }
        let all_norms = family.norm.weight;
        if family.embedding.norm {
            self.norm(family, names.embedding_norm, true);
        }
        let final_norm = family.blocks.iter().all(|case| case.block.final_norm);
        self.norm(family, names.final_norm, final_norm && all_norms);
    }

    fn layer(&mut self, family: &'static Family, names: &super::families::TensorNames) {
        self.prefix.push_str(names.layer);
        let attention = &family.attention;
        let mut norm = |names: Names, there: fn(&BlockCase) -> bool| {
            let cases = family.blocks;
            if cases.iter().any(there) {
                self.norm(family, names, cases.iter().all(there));
            }
        };
        norm(names.attention_norm, |case| case.block.attention_pre_norm);
        norm(names.attention_post_norm, |case| case.block.attention_post_norm);
        norm(names.mlp_norm, |case| case.block.mlp_pre_norm);
        norm(names.mlp_post_norm, |case| case.block.mlp_post_norm);
        match (&attention.latent, &names.latent) {
            (Some(_), Some(latent)) => {
                for (name, needed) in [(latent.q, false), (latent.q_a, false), (latent.kv_a, true)] {
                    self.product(&[name], attention.qkv_bias, needed);
                }
                for (name, needed) in [(latent.q_a_norm, false), (latent.q_b, false), (latent.kv_a_norm, true), (latent.kv_b, true)] {
                    self.expect(&[name], "weight", needed, Shape::Any);
                }
            }
            _ => self.qkv(names.qkv, attention.qkv_bias),
        }
        self.expect(names.out, "weight", true, Shape::Any);
        self.biases(names.out, attention.out_bias);
        if let Some(row) = &attention.qk_norm {
            for names in [names.q_norm, names.k_norm] {
                self.expect(names, "weight", matches!(row.when, Flag::Always), Shape::QkNorm(row.over));
                self.biases(names, if row.bias { row.when } else { Flag::Never });
            }
        }
        if attention.sinks {
            self.expect_whole(names.sinks, true);
        }
        self.feed_forward(family, names);
    }

    fn feed_forward(&mut self, family: &'static Family, names: &super::families::TensorNames) {
        let fits = |way: &&MlpNames| family.mlp.gated != matches!(way, MlpNames::Plain { .. });
        let ways: Vec<MlpNames> = names.mlp.iter().filter(fits).copied().collect();
        self.mlp(&ways, family.mlp.bias, family.experts.is_none(), Shape::FromHidden);
        let (Some(row), Some(experts)) = (&family.experts, &names.experts) else { return };
        self.expect(&[experts.router], "weight", true, Shape::FromHidden);
        self.biases(&[experts.router], if row.router_bias { Flag::Always } else { Flag::Never });
        if row.correction_bias {
            self.expect_whole(experts.correction_bias, true);
        }
        self.mlp(experts.shared, Flag::Never, false, Shape::FromHidden);
        if !experts.shared_gate.is_empty() {
            self.expect(&[experts.shared_gate], "weight", false, Shape::Any);
        }
        let bias = if row.bias { Flag::Always } else { Flag::Never };
        let stored = |storage: &&ExpertStorage| match storage {
            ExpertStorage::PerExpert(way) | ExpertStorage::Stacked(way) => self.has(&format!("{}.weight", first_of(way))),
            ExpertStorage::TransposedByTurns { gate_up, .. } => self.has(gate_up),
        };
        match experts.storage.iter().find(stored).or(experts.storage.first()) {
            Some(ExpertStorage::PerExpert(way)) => self.mlp(&[*way], bias, true, Shape::FromHidden),
            Some(ExpertStorage::Stacked(way)) => self.mlp(&[*way], bias, true, Shape::Stacked),
            Some(ExpertStorage::TransposedByTurns { gate_up, down }) => {
                for name in [gate_up, down] {
                    self.expect_whole(&[name], true);
                    let bias = format!("{name}_bias");
                    self.expect_whole(&[bias.as_str()], row.bias);
                }
            }
            None => {}
        }
    }

    fn has(&self, name: &str) -> bool {
        self.kinds.contains_key(&format!("{}{name}", self.prefix))
    }

    fn qkv(&mut self, ways: &[QkvNames], bias: Flag) {
        let stored = |way: &&QkvNames| match way {
            QkvNames::Separate { q, .. } => self.has(&format!("{q}.weight")),
            QkvNames::Concat(qkv) | QkvNames::Grouped(qkv) => self.has(&format!("{qkv}.weight")),
        };
        match ways.iter().find(stored).or(ways.first()) {
            Some(QkvNames::Separate { q, k, v }) => [q, k, v].into_iter().for_each(|name| self.product(&[name], bias, true)),
            Some(QkvNames::Concat(qkv) | QkvNames::Grouped(qkv)) => self.product(&[qkv], bias, true),
            None => {}
        }
    }

    fn mlp(&mut self, ways: &[MlpNames], bias: Flag, needed: bool, shape: Shape) {
        let stored = |way: &&MlpNames| self.has(&format!("{}.weight", first_of(way)));
        let Some(way) = ways.iter().find(stored).or(ways.first()) else { return };
        let (inner, down): (Vec<&str>, &str) = match way {
            MlpNames::Separate { gate, up, down } => (vec![gate, up], down),
            MlpNames::GateUp { gate_up, down } => (vec![gate_up], down),
            MlpNames::Plain { up, down } => (vec![up], down),
        };
        for name in inner {
            self.expect(&[name], "weight", needed, shape);
            self.biases(&[name], bias);
        }
        self.expect(&[down], "weight", needed, if matches!(shape, Shape::Stacked) { shape } else { Shape::Any });
        self.biases(&[down], bias);
    }

    fn norm(&mut self, family: &Family, names: Names, needed: bool) {
        if family.norm.weight {
            self.expect(names, "weight", needed, Shape::Hidden);
        }
        if family.norm.bias {
            self.expect(names, "bias", needed, Shape::Hidden);
        }
    }

    fn product(&mut self, names: &[&str], bias: Flag, needed: bool) {
        self.expect(names, "weight", needed, Shape::FromHidden);
        self.biases(names, bias);
    }

    fn biases(&mut self, names: &[&str], flag: Flag) {
        match flag {
            Flag::Always => drop(self.expect(names, "bias", true, Shape::Any)),
            Flag::Key(..) => drop(self.expect(names, "bias", false, Shape::Any)),
            Flag::Never => {}
        }
    }

    fn expect_whole(&mut self, names: &[&str], needed: bool) {
        let names: Vec<String> = names.iter().map(|name| format!("{}{name}", self.prefix)).collect();
        self.expect_any(&names, needed, Shape::Any);
    }

    fn expect(&mut self, names: &[&str], ending: &str, needed: bool, shape: Shape) -> Option<String> {
        let names: Vec<String> = names.iter().map(|name| format!("{}{name}.{ending}", self.prefix)).collect();
        self.expect_any(&names, needed, shape)
    }

    /// The first of some names that is there.
    fn expect_any(&mut self, names: &[String], needed: bool, shape: Shape) -> Option<String> {
        let Some(found) = names.iter().find(|name| self.kinds.contains_key(*name)) else {
            self.lacking.extend(names.first().filter(|_| needed).cloned());
            return None;
        };
        if self.fits(self.kinds[found], shape) {
            self.explained.insert(found.clone());
        } else {
            self.misshapen.push(format!("{found} {:?}", self.kinds[found]));
        }
        Some(found.clone())
    }

    fn fits(&self, shape: &[usize], wanted: Shape) -> bool {
        let Some(hidden) = self.hidden else { return true };
        match (wanted, shape) {
            (Shape::Any, _) => true,
            (Shape::Hidden, [length]) => *length == hidden,
            (Shape::FromHidden, [rows, columns]) => *(if self.transposed { rows } else { columns }) == hidden || *columns == hidden,
            (Shape::Stacked, [_, _, _]) | (Shape::QkNorm(QkNormOver::EachHead), [_, _]) => true,
            (Shape::QkNorm(over), [length]) => {
                // A norm over all heads is as long as the values they make; with one KV head so is that of a key head.
                let rows_of = |parts: &[&str]| {
                    let mut rows = self.kinds.iter().filter(|(name, _)| parts.iter().any(|part| name.contains(part)));
                    rows.any(|(_, shape)| shape.first() == Some(length))
                };
                match over {
                    QkNormOver::Full => rows_of(&["q_proj.weight", "k_proj.weight", "attn_q.weight", "attn_k.weight"]),
                    QkNormOver::Head | QkNormOver::EachHead => !rows_of(&["q_proj.weight", "attn_q.weight"]),
                }
            }
            _ => false,
        }
    }

    fn finish(self, family: &'static str, format: Format) -> Guess {
        let (matched, of) = (self.explained.len(), self.kinds.len());
        let left: Vec<&String> = self
            .kinds
            .keys()
            .filter(|kind| !self.explained.contains(*kind) && !self.misshapen.iter().any(|bad| bad.starts_with(*kind)))
            .collect();
        let mut reasons = vec![format!("{matched} of {of} kinds of tensors have its names")];
        let mut listed = |what: &str, names: Vec<&String>| {
            if !names.is_empty() {
                reasons.push(format!("{what} {}", some(&names)));
            }
        };
        listed("it would need", self.lacking.iter().collect());
        listed("it has no", left);
        listed("other shapes:", self.misshapen.iter().collect());
        Guess { family, format, matched, of, lacking: self.lacking.len(), reasons }
    }
}

/// The first few names.
fn some(names: &[&String]) -> String {
    const SHOWN: usize = 3;
    let mut text = names.iter().take(SHOWN).map(|name| name.as_str()).collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text.push_str(&format!(" and {} more", names.len() - SHOWN));
    }
    text
}

/// The name by which a way to store an MLP is recognized.
fn first_of(way: &MlpNames) -> &'static str {
    match way {
        MlpNames::Separate { gate, .. } => gate,
        MlpNames::GateUp { gate_up, .. } => gate_up,
        MlpNames::Plain { up, .. } => up,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Checkpoint, LoadMode};

    fn fixture(name: &str) -> BTreeMap<String, TensorEntry> {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/model").join(name);
        Checkpoint::open(path, LoadMode::Mmap).unwrap().tensors().clone()
    }

    fn fits_wholly(guess: &Guess) -> bool {
        guess.matched == guess.of && guess.lacking == 0
    }

    /// Whether a family is among the guesses that explain everything, and how many there are.
    fn best(tensors: &BTreeMap<String, TensorEntry>) -> Vec<&'static str> {
        detect(tensors).iter().filter(|guess| fits_wholly(guess)).map(|guess| guess.family).collect()
    }

    #[test]
    fn every_reference_checkpoint_is_explained_by_its_own_row() {
        let rows = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/model/rows");
        for entry in std::fs::read_dir(rows).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            let config = std::fs::read(format!("../../tests/fixtures/model/rows/{name}/config.json")).unwrap();
            let Ok(family) = crate::arch::families::by_model_type(&serde_json::from_slice(&config).unwrap()) else { continue };
            let tensors = fixture(&format!("rows/{name}"));
            assert!(best(&tensors).contains(&family.name), "{name}: {:#?}", detect(&tensors).iter().take(4).collect::<Vec<_>>());
        }
    }

    #[test]
    fn names_of_one_family_alone_leave_one_guess() {
        for name in ["bloom", "gpt_oss", "mpt", "opt", "opt-350m", "gptj", "gpt_neox", "qwen2_moe", "stablelm-parallel", "deepseek_v3"] {
            let tensors = fixture(&format!("rows/{name}"));
            let found = best(&tensors);
            assert_eq!(found.len(), 1, "{name}: {found:?}");
            assert!(name.starts_with(found[0]), "{name}: {found:?}");
        }
    }

    #[test]
    fn shared_names_leave_the_question_open() {
        let tensors = fixture("rows/yi");
        let found = best(&tensors);
        assert!(found.contains(&"llama") && found.contains(&"mistral") && found.len() > 2, "{found:?}");
        let gguf = fixture("gguf/llama-q4_1.gguf");
        assert!(best(&gguf).contains(&"llama") && detect(&gguf)[0].format == Format::Gguf);
    }

    #[test]
    fn what_does_not_match_is_named() {
        let mut tensors = fixture("rows/yi");
        let entry = tensors["model.layers.0.self_attn.q_proj.weight"].clone();
        tensors.insert("model.layers.0.self_attn.rotor.weight".to_owned(), entry);
        tensors.retain(|name, _| !name.contains("post_attention_layernorm"));
        let text = nearest(&tensors);
        assert!(text.contains("llama (") && text.contains("it has no model.layers.{}.self_attn.rotor.weight"), "{text}");
        assert!(text.contains("it would need model.layers.{}.post_attention_layernorm.weight"), "{text}");
        assert_eq!(nearest(&BTreeMap::new()), "none by the names of its tensors");
        let gpt2 = detect(&fixture("gpt2"));
        assert_eq!(gpt2[0].family, "gpt2");
    }
}
