//! Builds tiny random checkpoints of any shape: GGUF files of every storage type, and Hugging Face folders.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use half::{bf16, f16};

/// A small deterministic generator (splitmix64).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    pub fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// Uniform in −1..1.
    pub fn signed(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// A metadata value of the writer.
#[derive(Clone, Debug)]
pub enum Entry {
    U32(u32),
    F32(f32),
    Text(String),
}

/// Number of a storage type in the file.
pub const F32: u32 = 0;
pub const F16: u32 = 1;
pub const Q4_0: u32 = 2;
pub const Q4_1: u32 = 3;
pub const Q8_0: u32 = 8;
pub const BF16: u32 = 30;

/// A tensor of the writer: shape slowest first, bytes as stored.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<u64>,
    pub kind: u32,
    pub bytes: Vec<u8>,
}

/// A GGUF file to be.
#[derive(Clone, Debug, Default)]
pub struct Gguf {
    pub entries: Vec<(String, Entry)>,
    pub tensors: Vec<Tensor>,
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

impl Gguf {
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.entries.len() as u64).to_le_bytes());
        for (key, value) in &self.entries {
            put_text(&mut out, key);
            match value {
                Entry::U32(number) => {
                    out.extend(4u32.to_le_bytes());
                    out.extend(number.to_le_bytes());
                }
                Entry::F32(number) => {
                    out.extend(6u32.to_le_bytes());
                    out.extend(number.to_le_bytes());
                }
                Entry::Text(text) => {
                    out.extend(8u32.to_le_bytes());
                    put_text(&mut out, text);
                }
            }
        }
        let mut offset = 0u64;
        for tensor in &self.tensors {
            put_text(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(tensor.kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += tensor.bytes.len().next_multiple_of(32) as u64;
        }
        for tensor in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(&tensor.bytes);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out
    }

    pub fn write(&self, path: &Path) {
        File::create(path).unwrap().write_all(&self.bytes()).unwrap();
    }

    pub fn tensor_mut(&mut self, name: &str) -> &mut Tensor {
        self.tensors.iter_mut().find(|tensor| tensor.name == name).unwrap()
    }
}

/// Sizes of a random model.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub family: &'static str,
    pub hidden: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub inner: usize,
    pub vocabulary: usize,
}

/// Random values in the given storage type; quantized blocks are random blocks.
fn random_bytes(random: &mut Random, kind: u32, count: usize, scale: f32, offset: f32) -> Vec<u8> {
    let mut value = || random.signed() * scale + offset;
    match kind {
        F32 => (0..count).flat_map(|_| value().to_le_bytes()).collect(),
        F16 => (0..count).flat_map(|_| f16::from_f32(value()).to_le_bytes()).collect(),
        BF16 => (0..count).flat_map(|_| bf16::from_f32(value()).to_le_bytes()).collect(),
        _ => {
            let (quants, levels) = if kind == Q8_0 { (32, 100.0) } else { (16, 8.0) };
            let mut out = Vec::new();
            for _ in 0..count / 32 {
                let d = (random.signed().abs() * 0.5 + 0.75) * scale / levels;
                out.extend(f16::from_f32(d).to_le_bytes());
                if kind == Q4_1 {
                    out.extend(f16::from_f32(-7.5 * d).to_le_bytes());
                }
                out.extend((0..quants).map(|_| random.next() as u8));
            }
            out
        }
    }
}

/// A random GGUF model of the family, matrices in storage type `kind`.
pub fn gguf(shape: &Shape, kind: u32, seed: u64) -> Gguf {
    let Shape { family, hidden, layers, heads, kv_heads, head_dim, inner, vocabulary } = *shape;
    let mut random = Random::new(seed);
    let mut file = Gguf::default();
    let mut entry = |key: &str, value: Entry| file.entries.push((key.replace("ARCH", family), value));
    entry("general.architecture", Entry::Text(family.to_owned()));
    for (key, size) in [
        ("ARCH.context_length", 64),
        ("ARCH.embedding_length", hidden),
        ("ARCH.block_count", layers),
        ("ARCH.attention.head_count", heads),
        ("ARCH.attention.head_count_kv", kv_heads),
        ("ARCH.attention.key_length", head_dim),
        ("ARCH.feed_forward_length", inner),
    ] {
        entry(key, Entry::U32(size as u32));
    }
    let gpt2 = family == "gpt2";
    entry(if gpt2 { "ARCH.attention.layer_norm_epsilon" } else { "ARCH.attention.layer_norm_rms_epsilon" }, Entry::F32(1e-5));
    let mut matrix = |name: String, rows: usize, columns: usize, scale: f32| {
        let bytes = random_bytes(&mut random, kind, rows * columns, scale, 0.0);
        Tensor { name, shape: vec![rows as u64, columns as u64], kind, bytes }
    };
    let mut tensors = vec![matrix("token_embd.weight".to_owned(), vocabulary, hidden, 1.0)];
    if gpt2 {
        tensors.push(matrix("position_embd.weight".to_owned(), 64, hidden, 0.5));
    } else {
        tensors.push(matrix("output.weight".to_owned(), vocabulary, hidden, 0.3));
    }
    let (q, kv) = (heads * head_dim, kv_heads * head_dim);
    for layer in 0..layers {
        let name = |base: &str| format!("blk.{layer}.{base}.weight");
        if gpt2 {
            tensors.push(matrix(name("attn_qkv"), q + 2 * kv, hidden, 0.3));
        } else {
            tensors.push(matrix(name("attn_q"), q, hidden, 0.3));
            tensors.push(matrix(name("attn_k"), kv, hidden, 0.3));
            tensors.push(matrix(name("attn_v"), kv, hidden, 0.3));
            tensors.push(matrix(name("ffn_gate"), inner, hidden, 0.3));
        }
        tensors.push(matrix(name("attn_output"), hidden, q, 0.3));
        tensors.push(matrix(name("ffn_up"), inner, hidden, 0.3));
        tensors.push(matrix(name("ffn_down"), hidden, inner, 0.3));
    }
    let mut vector = |name: String, length: usize, offset: f32| {
        let bytes = random_bytes(&mut random, F32, length, 0.3, offset);
        Tensor { name, shape: vec![length as u64], kind: F32, bytes }
    };
    let mut norm = |name: &str| {
        tensors.push(vector(format!("{name}.weight"), hidden, 1.0));
        if gpt2 {
            tensors.push(vector(format!("{name}.bias"), hidden, 0.0));
        }
    };
    norm("output_norm");
    for layer in 0..layers {
        norm(&format!("blk.{layer}.attn_norm"));
        norm(&format!("blk.{layer}.ffn_norm"));
    }
    for layer in 0..layers {
        let biases: &[(&str, usize)] = match family {
            "gpt2" => &[("attn_qkv", q + 2 * kv), ("attn_output", hidden), ("ffn_up", inner), ("ffn_down", hidden)],
            "qwen2" => &[("attn_q", q), ("attn_k", kv), ("attn_v", kv)],
            _ => &[],
        };
        for &(base, length) in biases {
            tensors.push(vector(format!("blk.{layer}.{base}.bias"), length, 0.0));
        }
    }
    file.tensors = tensors;
    file
}
