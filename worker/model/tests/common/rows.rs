//! What is asked of every row of the table of families, and of every storage type: logits as the reference has them, and
//! the promise P2 (batch, chunks, blocks, ranks, stages) bit for bit.

use forge_kernels::KvDType;
use forge_model::{DecoderOptions, LoadMode, Model};

use super::ranks::{one_thread, run_group, run_stages};
use super::{Golden, alone, assert_same_bits, backend, chunked, fixture, options, relative_difference, run, sequences, together};

/// Largest difference over largest reference value that float32 sums in different orders explain.
const TOLERANCE: f32 = 1e-4;
/// What rounding the inputs of products to 8 bits costs random weights.
const UNROUNDED: f32 = 1e-1;
/// How many of 100 rows of logits must be within [`TOLERANCE`] of the reference that rounds inputs as we do. Measured:
/// all 44 of a file, but 43 of llama-q2_k, llama-q5_k and qwen3moe-q4_k, and 42 of llama-q4_k.
const EQUAL_ROWS_PERCENT: usize = 95;

/// A checkpoint of tests/fixtures/model and its reference.
pub struct Row {
    /// Path of both below the fixtures, for messages the name.
    pub model: String,
    /// Empty where another test has the logits.
    pub golden: String,
}

impl Row {
    /// A folder of rows/.
    pub fn folder(name: &str) -> Row {
        Row { model: format!("rows/{name}"), golden: format!("rows/{name}/golden.safetensors") }
    }

    /// A file of rows-gguf/: it has its own reference where the format cannot say what the folder says.
    pub fn gguf(name: &str) -> Row {
        let own = format!("rows-gguf/{name}.golden.safetensors");
        let golden = if fixture(&own).exists() { own } else { format!("rows/{name}/golden.safetensors") };
        Row { model: format!("rows-gguf/{name}.gguf"), golden }
    }

    /// A file of quantized/.
    pub fn quantized(name: &str) -> Row {
        Row { model: format!("quantized/{name}.gguf"), golden: format!("quantized/{name}.golden.safetensors") }
    }

    /// A folder of quantized/.
    pub fn quantized_folder(name: &str) -> Row {
        Row { model: format!("quantized/{name}"), golden: format!("quantized/{name}/golden.safetensors") }
    }

    /// A folder of tests/fixtures/torch, at most 32 tokens long: its logits are tested with the files' formats.
    pub fn torch_folder(name: &str) -> Row {
        Row { model: format!("../torch/{name}"), golden: String::new() }
    }

    fn open(&self) -> Model {
        Model::open(fixture(&self.model), LoadMode::Mmap).unwrap_or_else(|error| panic!("{}: {error}", self.model))
    }

    /// Options for the length that the reference was made for: scalings that depend on it are fixed by it.
    fn options(&self) -> DecoderOptions {
        let longest = if self.golden.is_empty() { Some(32) } else { Golden::read(&self.golden).max_model_len };
        DecoderOptions { max_model_len: longest.unwrap_or(options().max_model_len), ..options() }
    }

    /// Prefill, decode, ragged batch, and chunks that end before, in and after every window.
    pub fn check_logits(&self) {
        let golden = Golden::read(&self.golden);
        let mut decoder = self.open().decoder(backend(), &self.options()).unwrap();
        let schedules = [
            ("prefill", alone(&golden.tokens)),
            ("token by token", chunked(&golden.tokens, 1)),
            ("ragged batch", together(&golden.tokens)),
            ("chunks of 5", chunked(&golden.tokens, 5)),
            ("chunks of 7", chunked(&golden.tokens, 7)),
        ];
        for (what, schedule) in schedules {
            let logits = run(&mut decoder, &golden.tokens, &schedule);
            for (sequence, (actual, reference)) in logits.iter().zip(&golden.logits).enumerate() {
                let difference = relative_difference(actual, reference);
                println!("{}: {what}: sequence {sequence}: {difference:.2e}", self.model);
                assert!(difference <= TOLERANCE, "{}: {what}: sequence {sequence}: {difference:e}", self.model);
            }
        }
    }

    /// As [`Row::check_logits`] for quantized weights. The reference rounds the inputs of products to 8 bits per 32 as
    /// ours are. A value on the edge between two roundings goes either way, moves its product by one part in 254 and
    /// with it what follows in its sequence: that happens to one or two rows of some files, which a build or machine
    /// does not change (P2), and a mistake in a format's arithmetic would happen to nearly all. So the tolerance is
    /// asked of [`EQUAL_ROWS_PERCENT`], and of all rows what 8 bits cost against unrounded inputs.
    pub fn check_rounded_logits(&self) {
        self.check_rounded_rows(EQUAL_ROWS_PERCENT);
    }

    /// As [`Row::check_rounded_logits`], for a file of which fewer rows stay clear of roundings' edges.
    pub fn check_rounded_rows(&self, equal_rows_percent: usize) {
        let golden = Golden::read(&self.golden);
        let mut decoder = self.open().decoder(backend(), &self.options()).unwrap();
        let vocabulary = decoder.architecture().vocab_size;
        for (what, schedule) in [("prefill", alone(&golden.tokens)), ("token by token", chunked(&golden.tokens, 1))] {
            let logits = run(&mut decoder, &golden.tokens, &schedule);
            let mut equal_rows = 0;
            for ((actual, rounded), exact) in logits.iter().zip(&golden.logits).zip(&golden.exact) {
                for (actual, rounded) in actual.chunks(vocabulary).zip(rounded.chunks(vocabulary)) {
                    equal_rows += usize::from(relative_difference(actual, rounded) <= TOLERANCE);
                }
                let difference = relative_difference(actual, exact);
                assert!(difference <= UNROUNDED, "{}: {what}: {difference:e} from unrounded inputs", self.model);
            }
            let rows: usize = golden.tokens.iter().map(Vec::len).sum();
            println!("{}: {what}: {equal_rows} of {rows} rows as the rounded reference", self.model);
            assert!(
                equal_rows * 100 >= rows * equal_rows_percent,
                "{}: {what}: only {equal_rows} of {rows} rows as the rounded reference",
                self.model
            );
        }
    }

    /// A sequence's logits alone, among others, in chunks and in other blocks, for every type of keys and values.
    pub fn check_batch(&self) {
        let model = self.open();
        for kv_dtype in [KvDType::F32, KvDType::F16, KvDType::BF16, KvDType::Int8] {
            let what = |name: &str| format!("{}: {kv_dtype}: {name}", self.model);
            let options = DecoderOptions { kv_dtype, ..self.options() };
            let tokens = sequences(41, 17, options.max_model_len.min(40), model.architecture().vocab_size);
            let mut decoder = model.decoder(backend(), &options).unwrap();
            let expected = run(&mut decoder, &tokens, &alone(&tokens));
            assert!(expected[0].iter().any(|value| *value != expected[0][0]), "{}", what("all logits are equal: nothing is tested"));
            let schedules = [("together", together(&tokens)), ("one by one", chunked(&tokens, 1)), ("in chunks of 7", chunked(&tokens, 7))];
            for (name, schedule) in schedules {
                assert_same_bits(&run(&mut decoder, &tokens, &schedule), &expected, &what(name));
            }
            let blocks = DecoderOptions { block_size: 5, kv_blocks: 512, ..options };
            let mut decoder = model.decoder(one_thread(), &blocks).unwrap();
            assert_same_bits(&run(&mut decoder, &tokens, &chunked(&tokens, 3)), &expected, &what("blocks of 5"));
        }
    }

    /// 2, 4 and 8 tensor-parallel ranks, and two stages cut at every layer.
    pub fn check_ranks(&self) {
        let (model, options) = (self.open(), self.options());
        let tokens = sequences(43, 5, options.max_model_len.min(30), model.architecture().vocab_size);
        let schedule = together(&tokens);
        let expected = run(&mut model.decoder(one_thread(), &options).unwrap(), &tokens, &schedule);
        for size in [2, 4, 8] {
            for (rank, logits) in run_group(&model, &options, size, &tokens, &schedule).iter().enumerate() {
                assert_same_bits(logits, &expected, &format!("{}: rank {rank} of {size}", self.model));
            }
        }
        for cut in 1..model.architecture().layers {
            let logits = run_stages(&model, &options, cut, &tokens, &schedule);
            assert_same_bits(&logits, &expected, &format!("{}: cut at layer {cut}", self.model));
        }
    }
}

/// Tests of a list of fixtures, `test name: file`: a module per check, in it a test per fixture.
#[macro_export]
macro_rules! checks {
    ($of:ident: $($module:ident = $check:ident),* => $names:tt) => {
        $($crate::checks!(@module $module, $of, $check, $names);)*
    };
    (@module $module:ident, $of:ident, $check:ident, { $($test:ident: $file:literal,)* }) => {
        mod $module {
            use $crate::common::rows::Row;
            $(
                #[test]
                fn $test() {
                    Row::$of($file).$check();
                }
            )*
        }
    };
}
