//! What a file is that cannot be loaded, told by its content: so that the refusal names the conversion to use.
//!
//! Not a list of what is supported: whoever calls it has found that the file is not.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use crate::error::Result;
use crate::source::io_error;

/// Bytes that tell what a file is: up to the mark of a tar archive.
const START_BYTES: u64 = 512;

/// Kinds of files that hold weights we read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Gguf,
    Safetensors,
    /// A zip archive, which torch.save may have written.
    Zip,
    Other,
}

/// The first bytes of a file.
pub(super) fn first_bytes(path: &Path) -> Result<Vec<u8>> {
    let mut start = Vec::new();
    File::open(path).and_then(|file| file.take(START_BYTES).read_to_end(&mut start)).map_err(io_error(path))?;
    Ok(start)
}

/// What a file is that begins like this.
pub(super) fn kind(start: &[u8]) -> Kind {
    match start {
        [b'G', b'G', b'U', b'F', ..] | [b'F', b'U', b'G', b'G', ..] => Kind::Gguf,
        [b'P', b'K', 3, 4, ..] => Kind::Zip,
        // A length of under 4 GiB, then JSON.
        [_, _, _, _, 0, 0, 0, 0, b'{', ..] => Kind::Safetensors,
        _ => Kind::Other,
    }
}

const EXPORT: &str = "load it where it was made and save it as safetensors";
const UNPACK: &str = "unpack it and give the folder or file inside";

/// Beginnings of files, what they are, and what to do.
const BEGINNINGS: [(&[u8], &str, &str); 23] = [
    (b"lmgg", "a file of llama.cpp's first format (ggml)", OLD_GGML),
    (b"fmgg", "a file of llama.cpp's old format (ggmf)", OLD_GGML),
    (b"tjgg", "a file of llama.cpp's old format (ggjt)", OLD_GGML),
    (b"algg", "an adapter of llama.cpp's old format (ggla)", "convert the adapter again with a current llama.cpp"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file of TensorFlow or Keras", "load it with transformers (from_tf=True) and save it as safetensors"),
    (b"\x93NUMPY", "a NumPy array", EXPORT),
    (b"\x1f\x8b", "a gzip archive", UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (b"\xfd7zXZ\0", "an xz archive", UNPACK),
    (b"BZh", "a bzip2 archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, not the file it stands for",
        "run `git lfs pull` in its repository, or download the file itself",
    ),
    (b"<!DOCTYPE", "a web page", DOWNLOAD),
    (b"<!doctype", "a web page", DOWNLOAD),
    (b"<html", "a web page", DOWNLOAD),
    (b"<?xml", "an XML document, perhaps a server's error", DOWNLOAD),
    (b"{", "a JSON document", "give the folder it lies in, or the file with the weights"),
    (b"[", "a JSON document", "give the folder it lies in, or the file with the weights"),
    (b"%PDF", "a PDF document", "give the file with the weights"),
    (b"\x7fELF", "a program", "give the file with the weights"),
    (b"MZ", "a program", "give the file with the weights"),
    (b"#", "a text", "give the file with the weights"),
    (b"---", "a text", "give the file with the weights"),
];
const OLD_GGML: &str = "convert the original checkpoint with a current llama.cpp (convert_hf_to_gguf.py), or take a GGUF file";
const DOWNLOAD: &str = "the download went wrong: fetch the file again, with an account where the model needs one";

/// What a file that is no model seems to be, and what to do.
pub(super) fn describe(start: &[u8]) -> String {
    if start.is_empty() {
        return "the file is empty; download it again".to_owned();
    }
    let known = BEGINNINGS.iter().find(|(beginning, _, _)| start.starts_with(beginning)).map(|&(_, what, remedy)| (what, remedy));
    if let Some((what, remedy)) = known.or_else(|| by_structure(start)) {
        return format!("it is {what}; {remedy}");
    }
    let start = String::from_utf8_lossy(&start[..start.len().min(9)]);
    format!("it begins with {start:?}; a GGUF file begins with \"GGUF\", and a Hugging Face model is a folder with config.json")
}

/// Formats without a mark at their start.
fn by_structure(start: &[u8]) -> Option<(&'static str, &'static str)> {
    const PICKLE: (&str, &str) = ("a Python pickle (reading one with Python can run code)", EXPORT);
    match start {
        [0x80, 2..=5, ..] if start.windows(LEGACY_TORCH.len()).any(|window| window == LEGACY_TORCH) => Some((
            "a PyTorch file from before torch 1.6 (no zip archive, weights between pickles)",
            "load it with torch.load(weights_only=True) and save it again, best as safetensors",
        )),
        [0x80, 2..=5, ..] => Some(PICKLE),
        _ if start.get(257..262) == Some(b"ustar") => Some(("a tar archive (old PyTorch checkpoints are some)", UNPACK)),
        _ if start.get(4..8) == Some(b"TFL3") => Some(("a TensorFlow Lite model", EXPORT)),
        // ModelProto: ir_version, then the producer's name or version, the domain, the graph, or the operator sets.
        [0x08, 1..=20, 0x12 | 0x1a | 0x22 | 0x3a | 0x42, ..] => {
            Some(("an ONNX model", "take the checkpoint it was exported from, as safetensors or GGUF"))
        }
        // SavedModel: schema version 1, then a graph.
        [0x08, 1, ..] | [0x0a, ..] if start.windows(10).any(|window| window == b"saved_mode" || window == b"tensorflow") => {
            Some(("a TensorFlow SavedModel", "load it with transformers (from_tf=True) and save it as safetensors"))
        }
        // A map of texts: flax writes one whose first key is a module.
        [0x81..=0x8f | 0xde | 0xdf, rest @ ..] if rest.iter().take(5).any(|byte| (0xa1..=0xbf).contains(byte) || *byte == 0xd9) => {
            Some(("a msgpack file, as Flax writes its weights", "load it with transformers (from_flax=True) and save it as safetensors"))
        }
        _ => None,
    }
}

/// The number that files of torch before 1.6 begin with, as their first pickle holds it.
const LEGACY_TORCH: [u8; 12] = [0x8a, 0x0a, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_by_their_content() {
        let mut tar = vec![b'a'; 300];
        tar[257..262].copy_from_slice(b"ustar");
        let legacy = [&[0x80, 2][..], &LEGACY_TORCH, b".\x80\x02M\xe9\x03."].concat();
        for (start, what) in [
            (&b"lmgg\x01\0\0\0"[..], "ggml"),
            (b"tjgg\x03\0\0\0", "ggjt"),
            (b"\x89HDF\r\n\x1a\nrest", "from_tf=True"),
            (b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:", "ONNX"),
            (b"\x0a\x10saved_model_main", "SavedModel"),
            (b"\x81\xa6params\x82", "from_flax=True"),
            (b"\xde\x00\x10\xa3abc", "from_flax=True"),
            (&legacy, "before torch 1.6"),
            (b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x02os", "Python pickle"),
            (&tar, "tar archive"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
            (b"<!DOCTYPE html><html>", "web page"),
            (b"{\"a\": 1}", "JSON"),
            (b"", "empty"),
            (b"\x07\x07\x07\x07", "begins with"),
        ] {
            assert_eq!(kind(start), Kind::Other);
            assert!(describe(start).contains(what), "{what}: {}", describe(start));
        }
        assert_eq!(kind(b"GGUF\x03\0\0\0"), Kind::Gguf);
        assert_eq!(kind(b"PK\x03\x04rest"), Kind::Zip);
        assert_eq!(kind(b"\x10\x02\0\0\0\0\0\0{\"a\""), Kind::Safetensors);
    }
}
