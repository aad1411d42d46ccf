//! SentencePiece model files (`tokenizer.model`): a protobuf message, read with hand-written
//! structs of the fields that matter here. Others are for training and are passed over.
//!
//! Lengths are checked by the protobuf library against the bytes that are there, so memory does
//! not grow with a lie.

use prost::Message;

use super::{Algorithm, Piece, PieceKind, SentencePieceModel};
use crate::vocabulary::check_size;
use crate::{Result, TextError};

/// The name that errors give the file.
pub(crate) const FILE: &str = "tokenizer.model";

#[derive(Message)]
struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<PieceProto>,
    #[prost(message, optional, tag = "2")]
    trainer_spec: Option<TrainerSpec>,
    #[prost(message, optional, tag = "3")]
    normalizer_spec: Option<NormalizerSpec>,
}

#[derive(Message)]
struct PieceProto {
    #[prost(string, optional, tag = "1")]
    piece: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Message)]
struct TrainerSpec {
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    treat_whitespace_as_suffix: Option<bool>,
    #[prost(bool, optional, tag = "35")]
    byte_fallback: Option<bool>,
    #[prost(int32, optional, tag = "40")]
    unk_id: Option<i32>,
    #[prost(int32, optional, tag = "41")]
    bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42")]
    eos_id: Option<i32>,
    #[prost(int32, optional, tag = "43")]
    pad_id: Option<i32>,
}

#[derive(Message)]
struct NormalizerSpec {
    #[prost(bytes = "vec", optional, tag = "2")]
    precompiled_charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    escape_whitespaces: Option<bool>,
}

/// Reads a model file.
pub(crate) fn parse(bytes: &[u8]) -> Result<SentencePieceModel> {
    let bad = |field: &str, reason: String| TextError::invalid(format!("{FILE}: {field}"), reason);
    let proto = ModelProto::decode(bytes).map_err(|error| TextError::invalid(FILE, format!("it is no SentencePiece model: {error}")))?;
    let trainer = proto.trainer_spec.unwrap_or_default();
    let normalizer = proto.normalizer_spec.unwrap_or_default();
    check_size(proto.pieces.len())?;
    let algorithm = match trainer.model_type.unwrap_or(1) {
        1 => Algorithm::Unigram,
        2 => Algorithm::Bpe,
        other => {
            return Err(TextError::Unsupported {
                field: "tokenizer.model: trainer_spec.model_type",
                value: other.to_string(),
                supported: "1 (unigram), 2 (BPE)".to_string(),
            });
        }
    };
    if normalizer.escape_whitespaces == Some(false) {
        return Err(bad("normalizer_spec.escape_whitespaces", "false is not supported".to_string()));
    }
    let pieces = (proto.pieces.into_iter().enumerate())
        .map(|(id, piece)| {
            let kind = piece.kind.unwrap_or(1);
            Ok(Piece {
                kind: PieceKind::of(kind).ok_or_else(|| bad("pieces", format!("piece {id} has type {kind}, expected 1 to 6")))?,
                text: piece.piece.unwrap_or_default(),
                score: piece.score.unwrap_or(0.0),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let id = |value: Option<i32>, default: i32| u32::try_from(value.unwrap_or(default)).ok();
    Ok(SentencePieceModel {
        algorithm,
        pieces,
        byte_fallback: trainer.byte_fallback.unwrap_or(false),
        suffix_spaces: trainer.treat_whitespace_as_suffix.unwrap_or(false),
        remove_extra_spaces: normalizer.remove_extra_whitespaces.unwrap_or(true),
        add_prefix_space: normalizer.add_dummy_prefix.unwrap_or(true),
        charsmap: normalizer.precompiled_charsmap.unwrap_or_default(),
        unknown_id: id(trainer.unk_id, 0),
        bos_id: id(trainer.bos_id, 1),
        eos_id: id(trainer.eos_id, 2),
        padding_id: id(trainer.pad_id, -1),
        source: FILE,
    })
}
