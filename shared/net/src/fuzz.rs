//! Entry point for fuzzing: bytes of one stream as a peer may send them.

use crate::frame::{Frame, FrameReader, FrameWriter, HEAD_BYTES, Kind};
use crate::hello::Hello;

/// A stream that a peer opened: frames or a refusal, the same however the bytes are cut, and what was read is written back as
/// the same bytes.
///
/// # Panics
/// If any of that is not so.
pub fn frames(bytes: &[u8]) {
    let (whole, error) = read(bytes, bytes.len().max(1));
    let (pieces, other) = read(bytes, 7);
    assert_eq!((&whole, &error), (&pieces, &other), "the frames depend on how the bytes are cut");
    let mut written = Vec::new();
    if let Some(first) = whole.first() {
        let mut writer = FrameWriter::new(first.epoch);
        for frame in &whole {
            let head: [u8; HEAD_BYTES] = writer.head(frame.head, frame.body.len()).expect("a body that was read is not too long");
            written.extend_from_slice(&head);
            written.extend_from_slice(&frame.body);
        }
    }
    assert!(bytes.starts_with(&written), "frames changed on their way");
    for frame in whole.iter().filter(|frame| matches!(frame.head.kind, Kind::Hello | Kind::Abort)) {
        if let Ok(hello) = Hello::decode(frame.epoch, &frame.body) {
            assert_eq!(hello.encode(), frame.body, "a hello changed on its way");
        }
    }
}

fn read(bytes: &[u8], piece: usize) -> (Vec<Frame>, Option<String>) {
    let (mut reader, mut frames) = (FrameReader::opened_by_peer(), Vec::new());
    for bytes in bytes.chunks(piece) {
        if let Err(error) = reader.push(bytes, |frame| frames.push(frame)) {
            return (frames, Some(error.to_string()));
        }
    }
    let cut = reader.end().err().map(|error| error.to_string());
    (frames, cut)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use forge_shared::ids::Epoch;

    use super::*;
    use crate::frame::{Head, WireDType};
    use crate::hello::{GroupId, Lane};

    fn stream(kind: Kind, agreement: &str, then: &[(Head, usize)]) -> Vec<u8> {
        let group = GroupId { name: "chat/0".into(), purpose: "tensor".into(), epoch: Epoch(7) };
        let hello = Hello { group, lane: Lane::Group, from: 0, to: 1, size: 2, agreement: agreement.into() };
        let first = (Head::bytes(kind), hello.encode());
        let then = then.iter().map(|&(head, length)| (head, (0..length).map(|byte| byte as u8).collect()));
        let mut writer = FrameWriter::new(Epoch(7));
        std::iter::once(first)
            .chain(then)
            .flat_map(|(head, body)| [writer.head(head, body.len()).unwrap().to_vec(), body].concat())
            .collect()
    }

    fn seeds() -> Vec<(&'static str, Vec<u8>)> {
        let rows = |kind, rows, width| Head { kind, dtype: WireDType::F32, rows, width };
        let operations = [(rows(Kind::AllReduce, 2, 3), 24), (rows(Kind::Barrier, 0, 0), 0), (rows(Kind::Rows, 5, 4), 16)];
        let mut cut = stream(Kind::Hello, "", &[(Head::bytes(Kind::Message), 40)]);
        cut.truncate(cut.len() - 5);
        vec![
            ("hello", stream(Kind::Hello, "sha256:0123", &[])),
            ("abort", stream(Kind::Abort, "rank 1: device lost", &[])),
            ("operations", stream(Kind::Hello, "", &operations)),
            ("messages", stream(Kind::Hello, "", &[(Head::bytes(Kind::Message), 9), (Head::bytes(Kind::Message), 0)])),
            ("cut", cut),
        ]
    }

    /// `FORGE_TEST_WRITE_SEEDS=1` writes them.
    #[test]
    fn the_seeds_are_those_of_this_format() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/seeds/frames");
        for (name, bytes) in seeds() {
            frames(&bytes);
            let path = folder.join(name);
            if std::env::var_os("FORGE_TEST_WRITE_SEEDS").is_some() {
                std::fs::create_dir_all(&folder).unwrap();
                std::fs::write(&path, &bytes).unwrap();
            }
            assert_eq!(std::fs::read(&path).unwrap(), bytes, "{name}: write the seeds anew with FORGE_TEST_WRITE_SEEDS=1");
        }
    }
}
