//! The table of model families: one row each, names and differences as data.
//!
//! Adding a family is adding a row and a golden test; the readers ([`super::hf`], [`super::gguf`]), the name check
//! (`weights`) and the decoder follow the row. `docs/adding-a-family.md` goes through it. `row` is the vocabulary of
//! rows, `names` that of tensor names.
//!
//! Invariant: every row has its own name, and no two rows claim one `model_type`.

mod classic;
mod dense;
mod mixture;
pub(crate) mod names;
pub(crate) mod row;

use forge_kernels::NormKind;
use serde_json::Value;

pub(crate) use names::{ExpertNames, ExpertStorage, LatentNames, MlpNames, Names, QkvNames, TensorNames};
use row::{AttentionRow, BlockCase, EmbeddingRow, ExpertsRow, Fixed, GgufRow, HeadRow, MlpRow, NormRow, PositionRow, ScoreRow, SizeKeys};

use super::NormSpec;
use crate::checkpoint::Format;
use crate::error::{ModelError, Result};
use crate::gguf::Metadata;
use crate::json::Json;

/// A row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// Name of the row.
    pub name: &'static str,
    /// `model_type` values of config.json.
    pub model_types: &'static [&'static str],
    /// `general.architecture` values of GGUF metadata.
    pub gguf_architectures: &'static [&'static str],
    pub(crate) sizes: SizeKeys,
    pub(crate) embedding: EmbeddingRow,
    pub(crate) position: PositionRow,
    pub(crate) norm: NormRow,
    /// The first whose conditions hold.
    pub(crate) blocks: &'static [BlockCase],
    pub(crate) residual_scale: row::Number,
    pub(crate) attention: AttentionRow,
    pub(crate) mlp: MlpRow,
    pub(crate) experts: Option<ExpertsRow>,
    pub(crate) head: HeadRow,
    pub(crate) fixed: &'static [Fixed],
    pub(crate) hf: HfRow,
    pub(crate) gguf: GgufRow,
}

/// How a family is written in a Hugging Face folder.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HfRow {
    /// Prefixes of every name but the head's: the first with which the checkpoint has an embedding is meant.
    pub prefixes: &'static [&'static str],
    /// Matrices are stored [inputs, outputs] (GPT-2's Conv1D) and are transposed in memory at load.
    pub transposed: bool,
    pub names: TensorNames,
    /// Endings of names that hold no weights (masks, frequencies saved by old exporters).
    pub ignored: &'static [&'static str],
    /// Beginnings of names of what else a checkpoint holds beside the decoder (image towers).
    pub beside: &'static [&'static str],
    /// Layers beyond the last hold heads that predict further tokens (DeepSeek-V3), which serving leaves out.
    pub layers_beside: bool,
}

/// All rows.
pub static FAMILIES: [&Family; 33] = [
    &dense::LLAMA,
    &dense::MISTRAL,
    &mixture::MIXTRAL,
    &dense::QWEN2,
    &dense::QWEN3,
    &mixture::QWEN2_MOE,
    &mixture::QWEN3_MOE,
    &classic::PHI,
    &dense::PHI3,
    &mixture::PHIMOE,
    &dense::GEMMA,
    &dense::GEMMA2,
    &dense::GEMMA3,
    &classic::GPT2,
    &classic::GPT_NEO,
    &classic::GPT_NEOX,
    &classic::GPTJ,
    &classic::OPT,
    &classic::BLOOM,
    &classic::MPT,
    &classic::FALCON,
    &dense::STABLELM,
    &dense::STARCODER2,
    &dense::OLMO,
    &dense::OLMO2,
    &dense::OLMO3,
    &mixture::OLMOE,
    &dense::GRANITE,
    &dense::COHERE,
    &dense::GLM4,
    &mixture::DEEPSEEK_V2,
    &mixture::DEEPSEEK_V3,
    &mixture::GPT_OSS,
];

/// How a checkpoint of a family names its tensors.
pub(crate) struct Naming {
    pub names: &'static TensorNames,
    /// Before every name but the head's.
    pub prefix: &'static str,
    /// Matrices of layers are stored [inputs, outputs].
    pub transposed: bool,
}

impl Family {
    /// The norm of this family's residual stream.
    pub(crate) fn norm_spec(&self, eps: f32, weight_offset: f32) -> NormSpec {
        NormSpec { kind: self.norm.kind, eps, weight_offset, weight: self.norm.weight, bias: self.norm.bias }
    }

    /// The epsilon of GGUF metadata that this family's norm has.
    pub(crate) fn gguf_eps_keys(&self) -> [&'static str; 2] {
        const RMS: &str = "attention.layer_norm_rms_epsilon";
        const LAYER: &str = "attention.layer_norm_epsilon";
        // Phi-3.5-MoE has layer norms under the other key.
        if self.norm.kind == NormKind::Rms { [RMS, LAYER] } else { [LAYER, RMS] }
    }

    /// How a checkpoint names its tensors; `has` says whether it has one of a name.
    pub(crate) fn naming(&'static self, format: Format, has: impl Fn(&str) -> bool) -> Naming {
        match format {
            Format::Gguf => Naming { names: &self.gguf.names, prefix: "", transposed: false },
            Format::HuggingFace => {
                let embedded = |prefix: &&&str| self.hf.names.embedding.iter().any(|name| has(&format!("{prefix}{name}.weight")));
                let prefix = self.hf.prefixes.iter().find(embedded).or(self.hf.prefixes.first());
                Naming { names: &self.hf.names, prefix: prefix.copied().unwrap_or_default(), transposed: self.hf.transposed }
            }
        }
    }

    fn ignores(&self, tensor: &str, layers: Option<usize>) -> bool {
        let HfRow { ignored, beside, layers_beside, prefixes, names, .. } = &self.hf;
        let layer = || {
            let (before, _) = names.layer.split_once("{}")?;
            let rest = prefixes.iter().find_map(|prefix| tensor.strip_prefix(prefix)?.strip_prefix(before))?;
            rest.split_once('.')?.0.parse::<usize>().ok()
        };
        ignored.iter().any(|ending| tensor.ends_with(ending))
            || beside.iter().any(|beginning| tensor.starts_with(beginning))
            || (*layers_beside && layers.zip(layer()).is_some_and(|(layers, layer)| layer >= layers))
    }
}

/// Which tensors of a Hugging Face folder hold no weights of the decoder.
pub(crate) struct Ignored {
    families: Vec<&'static Family>,
    layers: Option<usize>,
}

impl Ignored {
    /// Of a family, or where none is chosen of the one that config.json names, or of any where that is unknown.
    pub fn new(family: Option<&'static Family>, config: &Value) -> Self {
        let family = family.or_else(|| by_model_type(config).ok());
        let layers =
            |family: &Family| text_config(config).first_size(family.sizes.layers.keys).ok().flatten().or(family.sizes.layers.absent);
        Ignored { layers: family.and_then(layers), families: family.map_or_else(|| FAMILIES.to_vec(), |family| vec![family]) }
    }

    /// Whether a tensor holds none.
    pub fn has(&self, tensor: &str) -> bool {
        self.families.iter().any(|family| family.ignores(tensor, self.layers))
    }
}

/// The part of a config.json that describes the decoder: all of it, or the text part of a model with more.
pub(crate) fn text_config(config: &Value) -> Json<'_> {
    let value = config.get("text_config").filter(|text| text.is_object()).unwrap_or(config);
    Json { file: "config.json", value }
}

/// The row with this name (that of [`super::Architecture::family`]).
pub fn by_name(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| family.name == name).copied()
}

/// The row that an operator names: by its own name, a `model_type` or a `general.architecture`.
///
/// # Errors
/// [`ModelError::UnknownFamily`].
pub fn named(found: &str) -> Result<&'static Family> {
    let by = |names: fn(&Family) -> &'static [&'static str]| FAMILIES.iter().find(|family| names(family).contains(&found)).copied();
    by_name(found)
        .or_else(|| by(|family| family.model_types))
        .or_else(|| by(|family| family.gguf_architectures))
        .ok_or_else(|| unknown(found))
}

/// The row for a config.json. A model with more than a decoder is known by its own `model_type` and by that of its text
/// part.
///
/// # Errors
/// [`ModelError::UnknownFamily`], or no `model_type`.
pub fn by_model_type(config: &Value) -> Result<&'static Family> {
    let file = Json { file: "config.json", value: config };
    let found = file.optional_str("model_type").ok().flatten().ok_or_else(|| file.error("model_type", "is missing or no string"))?;
    let of = |found: &str| FAMILIES.iter().find(|family| family.model_types.contains(&found)).copied().ok_or_else(|| unknown(found));
    let family = of(found)?;
    match text_config(config).optional_str("model_type")? {
        Some(text) if text != found => of(text),
        _ => Ok(family),
    }
}

/// The row for a GGUF file's `general.architecture`. Where several share one, whether there are experts, how their
/// router scores and whether there is a window decides.
///
/// # Errors
/// [`ModelError::UnknownFamily`], or no such key.
pub fn of_gguf(metadata: &Metadata) -> Result<&'static Family> {
    const SIGMOID: u32 = 2;
    let found = super::gguf::architecture_name(metadata)?;
    let number = |key: &str| metadata.optional_u32(&format!("{found}.{key}")).map(Option::unwrap_or_default);
    let (experts, sigmoid) = (number("expert_count")? > 0, number("expert_gating_func")? == SIGMOID);
    let window = number("attention.sliding_window")? > 0;
    let unfit = |family: &Family| {
        let by_experts = match family.experts {
            Some(row) => !experts || sigmoid != matches!(row.score, ScoreRow::Sigmoid),
            None => experts,
        };
        (by_experts, window != family.attention.windows.is_some())
    };
    let rows = FAMILIES.iter().filter(|family| family.gguf_architectures.contains(&found));
    rows.min_by_key(|family| unfit(family)).copied().ok_or_else(|| unknown(found))
}

fn unknown(found: &str) -> ModelError {
    let supported = FAMILIES.iter().map(|family| family.name).collect::<Vec<_>>().join(", ");
    ModelError::UnknownFamily { found: found.to_owned(), supported, nearest: String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_model_types_belong_to_one_row_each() {
        let unique = |values: Vec<&str>| {
            let mut sorted = values.clone();
            sorted.sort_unstable();
            sorted.dedup();
            assert_eq!(sorted.len(), values.len(), "{values:?}");
        };
        unique(FAMILIES.iter().map(|family| family.name).collect());
        unique(FAMILIES.iter().flat_map(|family| family.model_types).copied().collect());
    }

    #[test]
    fn rows_have_names_for_what_every_decoder_has() {
        for family in FAMILIES {
            for names in [&family.hf.names, &family.gguf.names] {
                assert!(!names.embedding.is_empty() && names.layer.contains("{}") && !names.qkv.is_empty(), "{}", family.name);
                assert!(!names.out.is_empty() && (!names.mlp.is_empty() || names.experts.is_some()), "{}", family.name);
            }
            assert!(!family.hf.prefixes.is_empty() && !family.blocks.is_empty(), "{}", family.name);
        }
    }

    const MANUAL: &str = include_str!("../../../../../docs/models.md");

    /// The cells of the manual's table that has this heading, without the heading and the line under it.
    fn manual_table(heading: &str) -> Vec<Vec<&'static str>> {
        let lines = MANUAL.lines().skip_while(|line| !line.starts_with(heading)).skip(2);
        let cells = |line: &'static str| line.trim_matches('|').split('|').map(str::trim).collect();
        lines.take_while(|line| line.starts_with('|')).map(cells).collect()
    }

    /// The names of the fixtures of a folder, sorted.
    fn fixtures(folder: &str, ending: &str) -> Vec<String> {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/model").join(folder);
        let names = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<String> = names.filter_map(|name| name.strip_suffix(ending).map(str::to_owned)).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn the_manual_lists_every_row() {
        for family in FAMILIES {
            for name in family.model_types.iter().chain(family.gguf_architectures) {
                assert!(MANUAL.contains(&format!("`{name}`")), "docs/models.md lacks `{name}` of family {}", family.name);
            }
        }
    }

    #[test]
    fn the_manual_lists_the_tests_of_every_row() {
        let (rows, tests) = (manual_table("| family | `model_type`"), manual_table("| family | variants"));
        assert_eq!(rows.len(), FAMILIES.len(), "one line for each family");
        let sorted = |mut names: Vec<&'static str>| {
            names.sort_unstable();
            names
        };
        let family = |table: &[Vec<&'static str>]| sorted(table.iter().map(|cells| cells[0]).collect());
        assert_eq!(family(&rows), family(&tests), "the same families in both tables");
        let listed =
            |column: usize| sorted(tests.iter().flat_map(|cells| cells[column].split(", ")).filter(|&name| name != "none").collect());
        assert_eq!(listed(1), fixtures("rows", ""), "folders of tests/fixtures/model/rows");
        assert_eq!(listed(2), fixtures("rows-gguf", ".gguf"), "files of tests/fixtures/model/rows-gguf");
        for row in &rows {
            let has_file = tests.iter().any(|cells| cells[0] == row[0] && cells[2] != "none");
            let says_none = row[2] == "none" || row[2].ends_with("(untested)");
            assert!(has_file != says_none, "{}: in GGUF {}, which its tests contradict", row[0], row[2]);
        }
    }
}
