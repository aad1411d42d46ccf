use super::*;

/// A file of a few entries and two tensors, built by hand.
struct Builder {
    bytes: Vec<u8>,
}

impl Builder {
    fn new(version: u32, tensors: u64, entries: u64) -> Self {
        let mut builder = Builder { bytes: MAGIC.to_vec() };
        builder.u32(version).u64(tensors).u64(entries);
        builder
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.u64(text.len() as u64);
        self.bytes.extend(text.as_bytes());
        self
    }

    fn tensor(&mut self, name: &str, dimensions: &[u64], kind: u32, offset: u64) -> &mut Self {
        self.text(name).u32(dimensions.len() as u32);
        dimensions.iter().for_each(|&size| {
            self.u64(size);
        });
        self.u32(kind).u64(offset)
    }

    fn data(&mut self, length: usize) -> Vec<u8> {
        let start = self.bytes.len().next_multiple_of(32);
        self.bytes.resize(start + length, 0);
        std::mem::take(&mut self.bytes)
    }
}

/// Every kind of value, and tensors of two types.
fn sound() -> Vec<u8> {
    let mut file = Builder::new(3, 2, 6);
    file.text("general.architecture").u32(8).text("llama");
    file.text("count").u32(4).u32(7);
    file.text("negative").u32(5).u32(u32::MAX);
    file.text("big").u32(10).u64(u64::MAX);
    file.text("names").u32(9).u32(8).u64(2).text("a").text("bc");
    file.text("nested").u32(9).u32(9).u64(1).u32(5).u64(2).u32(1).u32(2);
    file.tensor("matrix", &[32, 3], 8, 0).tensor("vector", &[5], 0, 128);
    file.data(128 + 20)
}

fn refused(bytes: &[u8]) -> String {
    match parse(bytes) {
        Err(error) => error.to_string(),
        Ok(file) => panic!("accepted: {file:?}"),
    }
}

#[test]
fn reads_values_shapes_and_places() {
    let bytes = sound();
    let file = parse(&bytes).unwrap();
    assert_eq!(file.version, 3);
    assert_eq!(file.metadata.size("count").unwrap(), 7);
    assert_eq!(file.metadata.get("negative"), Some(&Value::Signed(-1)));
    assert_eq!(file.metadata.get("big"), Some(&Value::Unsigned(u64::MAX)));
    assert_eq!(file.metadata.optional_strings("names").unwrap().unwrap(), ["a", "bc"]);
    assert_eq!(file.metadata.get("nested"), Some(&Value::Array(Array::Nested(vec![Array::I32(vec![1, 2])]))));
    let matrix = &file.tensors["matrix"];
    assert_eq!((matrix.dtype, matrix.shape.as_slice(), matrix.bytes.len()), (DType::Q8_0, &[3, 32][..], 3 * 34));
    assert_eq!(file.tensors["vector"].bytes.end, bytes.len());
}

#[test]
fn getters_name_the_key_and_what_it_is() {
    let metadata = parse(&sound()).unwrap().metadata;
    let text = |error: ModelError| error.to_string();
    assert_eq!(text(metadata.size("absent").unwrap_err()), "GGUF metadata: absent: is missing");
    assert_eq!(text(metadata.optional_u32("names").unwrap_err()), "GGUF metadata: names: is an array, an integer is needed");
    assert!(metadata.optional_u32("negative").is_err() && metadata.optional_u32("big").is_err());
    assert!(metadata.optional_bool("count").is_err() && metadata.optional_string("count").is_err());
    assert!(metadata.optional_f32s("names").is_err() && metadata.optional_i32s("names").is_err());
}

#[test]
fn every_prefix_is_refused() {
    let bytes = sound();
    for length in 0..bytes.len() {
        assert!(matches!(parse(&bytes[..length]), Err(ModelError::Malformed { .. })), "{length}");
    }
}

#[test]
fn any_changed_byte_gives_a_file_or_an_error() {
    let bytes = sound();
    for at in 0..bytes.len() {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut changed = bytes.clone();
            changed[at] = value;
            if let Ok(file) = parse(&changed) {
                assert!(file.tensors.values().all(|tensor| tensor.bytes.end <= changed.len()));
            }
        }
    }
}

#[test]
fn other_versions_and_byte_orders_are_named() {
    assert!(refused(b"GGML\0\0\0\0").contains("begins with"));
    assert!(refused(&Builder::new(1, 1, 0).data(64)).contains("GGUF version 1"));
    assert!(refused(&Builder::new(4, 1, 0).data(64)).contains("GGUF version 4"));
    assert!(refused(&Builder::new(3 << 24, 1, 0).data(64)).contains("big-endian"));
    assert!(refused(b"FUGG\0\0\0\x03").contains("big-endian"));
}

#[test]
fn hostile_counts_and_lengths_are_refused_before_allocation() {
    for count in [1 << 20, 1 << 40, u64::MAX] {
        assert!(refused(&Builder::new(3, count, 0).data(64)).contains("tensors at byte"));
        assert!(refused(&Builder::new(3, 1, count).data(64)).contains("metadata entries"));
        let mut file = Builder::new(3, 1, 1);
        assert!(refused(&file.text("key").u32(9).u32(4).u64(count).data(64)).contains("array elements"));
        let mut file = Builder::new(3, 1, 1);
        assert!(refused(&file.u64(count).data(64)).contains(if count > 16 << 20 { "a string of" } else { "truncated" }));
    }
}

#[test]
fn deep_nesting_is_refused() {
    let mut file = Builder::new(3, 1, 1);
    file.text("key").u32(9);
    for _ in 0..100_000 {
        file.u32(9).u64(1);
    }
    assert!(refused(&file.data(64)).contains("nest deeper"));
}

#[test]
fn unknown_value_types_and_bad_values_are_refused() {
    let with = |build: fn(&mut Builder)| {
        let mut file = Builder::new(3, 1, 1);
        build(&mut file);
        refused(&file.data(64))
    };
    assert!(with(|file| _ = file.text("key").u32(13)).contains("value type 13"));
    assert!(with(|file| _ = file.text("key").u32(9).u32(77).u64(0)).contains("element type 77"));
    assert!(with(|file| _ = file.text("key").u32(7).u32(2)).contains("boolean"));
    assert!(with(|file| _ = file.u64(2).u32(0xffff_ffff)).contains("not UTF-8"));
    assert!(with(|file| _ = file.text("general.alignment").u32(4).u32(24)).contains("power of two"));
    assert!(with(|file| _ = file.text("general.alignment").u32(4).u32(0)).contains("power of two"));
    let mut twice = Builder::new(3, 1, 2);
    twice.text("key").u32(4).u32(1).text("key").u32(4).u32(1);
    assert!(refused(&twice.data(64)).contains("there twice"));
}

#[test]
fn tensors_that_cannot_be_are_refused() {
    let with = |dimensions: &[u64], kind: u32, offset: u64| {
        let mut file = Builder::new(3, 1, 0);
        refused(&file.tensor("w", dimensions, kind, offset).data(4096))
    };
    assert!(with(&[], 0, 0).contains("0 dimensions"));
    assert!(with(&[1; 5], 0, 0).contains("5 dimensions"));
    assert!(with(&[8, 0], 0, 0).contains("size 0"));
    assert!(with(&[33, 2], 2, 0).contains("whole number of Q4_0 blocks"));
    assert!(with(&[1 << 62, 1 << 62], 0, 0).contains("too large"));
    assert!(with(&[u64::MAX / 4, 2], 0, 0).contains("too large"));
    assert!(with(&[8], 0, 16).contains("alignment"));
    assert!(with(&[8], 0, u64::MAX - 31).contains("overflows"));
    assert!(with(&[2048], 0, 0).contains("truncated"));
    assert!(with(&[8], 0, 1 << 50).contains("truncated"));
    assert!(with(&[256], 15, 0).contains("tensor w has type Q8_K"));
    assert!(with(&[256], 77, 0).contains("number 77"));
    let mut twice = Builder::new(3, 2, 0);
    assert!(refused(&twice.tensor("w", &[8], 0, 0).tensor("w", &[8], 0, 32).data(4096)).contains("there twice"));
    let mut overlap = Builder::new(3, 2, 0);
    assert!(refused(&overlap.tensor("a", &[16], 0, 0).tensor("b", &[8], 0, 32).data(4096)).contains("overlap"));
    assert!(refused(&Builder::new(3, 0, 0).data(64)).contains("no tensors"));
}

#[test]
fn tokenizer_fields_come_out_as_they_are() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/model/gguf/llama-q4_1.gguf");
    let file = parse(&std::fs::read(path).unwrap()).unwrap();
    let tokenizer = GgufTokenizerData::from_metadata(&file.metadata).unwrap();
    assert_eq!((tokenizer.model.as_str(), tokenizer.pre.as_str()), ("gpt2", "gpt-2"));
    assert_eq!((tokenizer.tokens.len(), tokenizer.tokens[95].as_str(), tokenizer.token_types.len()), (96, "t95", 96));
    assert_eq!((tokenizer.bos_id, tokenizer.eos_id, tokenizer.padding_id), (Some(1), Some(2), None));
    assert_eq!((tokenizer.add_bos_token, tokenizer.add_eos_token), (Some(false), None));
    assert_eq!(tokenizer.chat_template.as_deref(), Some("{{ messages[0].content }}"));
    assert_eq!(tokenizer.merges, ["t 1"]);
    let missing = GgufTokenizerData::from_metadata(&Metadata::default()).unwrap_err();
    assert!(missing.to_string().contains("tokenizer.ggml.model"));
}
