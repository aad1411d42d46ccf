//! Just enough of a GGUF reader for a test: the tokenizer's metadata of a trusted file. The real
//! reader is forge-model's, a layer above this crate.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use forge_text::GgufTokenizer;

enum Value {
    Number(u64),
    Text(String),
    Texts(Vec<String>),
    Numbers(Vec<u64>),
}

struct Reader(BufReader<File>);

impl Reader {
    fn number(&mut self, bytes: usize) -> u64 {
        let mut buffer = [0; 8];
        self.0.read_exact(&mut buffer[..bytes]).expect("a whole file");
        u64::from_le_bytes(buffer)
    }

    fn text(&mut self) -> String {
        let mut bytes = vec![0; self.number(8) as usize];
        self.0.read_exact(&mut bytes).expect("a whole file");
        String::from_utf8(bytes).expect("UTF-8")
    }

    fn value(&mut self, kind: u64) -> Value {
        match kind {
            0 | 1 | 7 => Value::Number(self.number(1)),
            2 | 3 => Value::Number(self.number(2)),
            4..=6 => Value::Number(self.number(4)),
            10..=12 => Value::Number(self.number(8)),
            8 => Value::Text(self.text()),
            9 => {
                let (kind, count) = (self.number(4), self.number(8));
                if kind == 8 {
                    return Value::Texts((0..count).map(|_| self.text()).collect());
                }
                let item = |reader: &mut Self| match reader.value(kind) {
                    Value::Number(number) => number,
                    _ => panic!("a list of lists"),
                };
                Value::Numbers((0..count).map(|_| item(self)).collect())
            }
            other => panic!("value type {other}"),
        }
    }
}

/// The tokenizer's metadata of a GGUF file.
pub fn tokenizer_metadata(path: &Path) -> GgufTokenizer {
    let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut reader = Reader(BufReader::new(file));
    assert_eq!(reader.number(4), u64::from(u32::from_le_bytes(*b"GGUF")));
    let _version = reader.number(4);
    let _tensors = reader.number(8);
    let entries = reader.number(8);
    let mut fields: HashMap<String, Value> = HashMap::new();
    for _ in 0..entries {
        let key = reader.text();
        let kind = reader.number(4);
        fields.insert(key, reader.value(kind));
    }
    let text = |key: &str| match fields.get(key) {
        Some(Value::Text(text)) => Some(text.clone()),
        _ => None,
    };
    let texts = |key: &str| match fields.get(key) {
        Some(Value::Texts(texts)) => texts.clone(),
        _ => Vec::new(),
    };
    let number = |key: &str| match fields.get(&format!("tokenizer.ggml.{key}")) {
        Some(Value::Number(number)) => Some(*number),
        _ => None,
    };
    let types = match fields.get("tokenizer.ggml.token_type") {
        Some(Value::Numbers(numbers)) => numbers.iter().map(|n| *n as i32).collect(),
        _ => Vec::new(),
    };
    GgufTokenizer {
        name: text("general.name"),
        model: text("tokenizer.ggml.model").expect("a tokenizer"),
        pre: text("tokenizer.ggml.pre").unwrap_or_default(),
        tokens: texts("tokenizer.ggml.tokens"),
        token_types: types,
        merges: texts("tokenizer.ggml.merges"),
        bos_id: number("bos_token_id").map(|id| id as u32),
        eos_id: number("eos_token_id").map(|id| id as u32),
        eot_id: number("eot_token_id").map(|id| id as u32),
        unknown_id: number("unknown_token_id").map(|id| id as u32),
        padding_id: number("padding_token_id").map(|id| id as u32),
        add_bos_token: number("add_bos_token").map(|flag| flag != 0),
        add_eos_token: number("add_eos_token").map(|flag| flag != 0),
        add_space_prefix: number("add_space_prefix").map(|flag| flag != 0),
        chat_template: text("tokenizer.chat_template"),
        ..GgufTokenizer::default()
    }
}
