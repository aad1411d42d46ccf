//! An f32 copy of a quantized GGUF file: what `tests/parity/dequantize.py` writes, without the tokenizer.
//!
//! On such a copy no engine rounds an activation, so parity can be asked for to the last digits.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Result, bail, ensure};
use forge_kernels::dequantize;
use forge_model::checkpoint::RawConfig;
use forge_model::gguf::{self, Array, Value};
use forge_model::{Checkpoint, LoadMode};
use tempfile::NamedTempFile;

const VERSION: u32 = 3;
const ALIGNMENT: usize = 32;
const TYPE_F32: u32 = 0;
/// Keys that the copy must not have: it has no tokenizer, and its types and alignment are its own.
const LEFT_OUT: [&str; 4] = ["tokenizer.", "general.file_type", "general.quantization_version", "general.alignment"];

/// Writes the copy into the system's folder for temporary files, from which it goes with the returned handle. Four bytes
/// per weight: the default model takes 540 MB.
///
/// # Errors
/// A source that is no GGUF file, a disk without room.
pub fn f32_copy(source: &Path) -> Result<NamedTempFile> {
    let checkpoint = Checkpoint::open(source, LoadMode::Mmap)?;
    let RawConfig::Gguf(metadata) = checkpoint.config() else { bail!("{} is no GGUF file", source.display()) };
    let kept: Vec<(&str, &Value)> = metadata.iter().filter(|(key, _)| !LEFT_OUT.iter().any(|left_out| key.starts_with(left_out))).collect();
    let mut head = Vec::new();
    head.extend_from_slice(&gguf::MAGIC);
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&(checkpoint.tensors().len() as u64).to_le_bytes());
    head.extend_from_slice(&(kept.len() as u64).to_le_bytes());
    for (key, value) in kept {
        put_text(&mut head, key);
        put_value(&mut head, value)?;
    }
    let mut offset = 0usize;
    for (name, tensor) in checkpoint.tensors() {
        put_text(&mut head, name);
        head.extend_from_slice(&(tensor.shape.len() as u32).to_le_bytes());
        for size in tensor.shape.iter().rev() {
            head.extend_from_slice(&(*size as u64).to_le_bytes());
        }
        head.extend_from_slice(&TYPE_F32.to_le_bytes());
        head.extend_from_slice(&(offset as u64).to_le_bytes());
        offset = (offset + tensor.elements() * size_of::<f32>()).next_multiple_of(ALIGNMENT);
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT), 0);

    let copy = NamedTempFile::new()?;
    let mut out = BufWriter::new(File::create(copy.path())?);
    out.write_all(&head)?;
    let mut values = Vec::new();
    for tensor in checkpoint.tensors().values() {
        values.resize(tensor.elements(), 0.0f32);
        dequantize(tensor.dtype, checkpoint.bytes(tensor), &mut values);
        for value in &values {
            out.write_all(&value.to_le_bytes())?;
        }
        let bytes = values.len() * size_of::<f32>();
        out.write_all(&vec![0; bytes.next_multiple_of(ALIGNMENT) - bytes])?;
    }
    out.flush()?;
    Ok(copy)
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) -> Result<()> {
    let mut put = |kind: u32, bytes: &[u8]| {
        out.extend_from_slice(&kind.to_le_bytes());
        out.extend_from_slice(bytes);
    };
    match value {
        Value::Unsigned(number) => put(10, &number.to_le_bytes()),
        Value::Signed(number) => put(11, &number.to_le_bytes()),
        Value::Float(number) => put(12, &number.to_le_bytes()),
        Value::Bool(value) => put(7, &[u8::from(*value)]),
        Value::String(text) => {
            put(8, &[]);
            put_text(out, text);
        }
        Value::Array(Array::String(texts)) => {
            ensure!(texts.len() < 1000, "only short lists are copied");
            put(9, &8u32.to_le_bytes());
            out.extend_from_slice(&(texts.len() as u64).to_le_bytes());
            texts.iter().for_each(|text| put_text(out, text));
        }
        Value::Array(_) => bail!("arrays of numbers are not copied"),
    }
    Ok(())
}
