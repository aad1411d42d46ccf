use proptest::prelude::*;

use super::*;

fn written(epoch: Epoch, frames: &[(Head, Vec<u8>)]) -> Vec<u8> {
    let mut writer = FrameWriter::new(epoch);
    frames.iter().flat_map(|(head, body)| [writer.head(*head, body.len()).unwrap().to_vec(), body.clone()].concat()).collect()
}

fn rows(rows: u32, width: u32) -> Head {
    Head { kind: Kind::AllReduce, dtype: WireDType::F32, rows, width }
}

fn read(reader: &mut FrameReader, bytes: &[u8]) -> Result<Vec<Frame>, FrameError> {
    let mut frames = Vec::new();
    reader.push(bytes, |frame| frames.push(frame)).map(|()| frames)
}

fn any_frame() -> impl Strategy<Value = (Head, Vec<u8>)> {
    let bytes = proptest::collection::vec(any::<u8>(), 0..300).prop_map(|body| (Head::bytes(Kind::Message), body));
    let values = (0u32..9, 0u32..9).prop_map(|(height, width)| (rows(height, width), vec![7; (height * width * 4) as usize]));
    prop_oneof![bytes, values]
}

proptest! {
    /// However the bytes are cut, the frames that were written come out; a prefix gives a prefix and says what is missing.
    #[test]
    fn frames_come_back_however_the_bytes_are_cut(
        frames in proptest::collection::vec(any_frame(), 0..6),
        cuts in proptest::collection::vec(1usize..90, 1..40),
        stop in any::<prop::sample::Index>(),
    ) {
        let bytes = written(Epoch(7), &frames);
        let (mut reader, mut found, mut rest, mut cuts) = (FrameReader::new(Epoch(7)), Vec::new(), bytes.as_slice(), cuts.iter().cycle());
        while !rest.is_empty() {
            let (part, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
            found.extend(read(&mut reader, part).unwrap());
            rest = later;
        }
        prop_assert_eq!(reader.end(), Ok(()));
        prop_assert_eq!(found.len(), frames.len());
        for (frame, (head, body)) in found.iter().zip(&frames) {
            prop_assert_eq!((frame.head, &frame.body, frame.epoch), (*head, body, Epoch(7)));
        }
        if !bytes.is_empty() {
            let stop = stop.index(bytes.len());
            let mut reader = FrameReader::new(Epoch(7));
            let some = read(&mut reader, &bytes[..stop]).unwrap();
            prop_assert!(some.len() <= frames.len());
            let whole = written(Epoch(7), &frames[..some.len()]).len();
            prop_assert_eq!(reader.end().is_ok(), whole == stop);
        }
    }

    /// Whatever comes: an error or frames, and no more memory than bytes that came.
    #[test]
    fn other_bytes_are_refused_within_bounds(bytes in proptest::collection::vec(any::<u8>(), 0..600), sound in 0usize..32) {
        let mut bytes = bytes;
        let head = FrameWriter::new(Epoch(1)).head(rows(1000, 1000), 4_000_000).unwrap();
        let sound = sound.min(bytes.len());
        bytes[..sound].copy_from_slice(&head[..sound]);
        let mut reader = FrameReader::opened_by_peer();
        let _ = read(&mut reader, &bytes);
        prop_assert!(reader.held_bytes() <= bytes.len());
    }
}

#[test]
fn every_field_is_checked_and_named() {
    let sound = written(Epoch(7), &[(rows(2, 3), vec![0; 24])]);
    let with = |at: usize, byte: u8| {
        let mut bytes = sound.clone();
        bytes[at] = byte;
        read(&mut FrameReader::new(Epoch(7)), &bytes).unwrap_err()
    };
    assert_eq!(with(0, 2), FrameError::Version { found: 2 });
    assert_eq!(with(1, 99), FrameError::Unknown { field: "kind", found: 99 });
    assert_eq!(with(2, 2), FrameError::Unknown { field: "dtype", found: 2 });
    assert_eq!(with(3, 1), FrameError::Unknown { field: "byte 3", found: 1 });
    assert_eq!(with(7, 0xff), FrameError::TooLong { found: 0xff00_0018, limit: MAX_BODY_BYTES });
    assert_eq!(with(4, 28), FrameError::Shape { body_bytes: 28, rows: 2, width: 3, dtype: 1 });
    assert_eq!(with(4, 23), FrameError::Shape { body_bytes: 23, rows: 2, width: 3, dtype: 1 });
    assert_eq!(with(2, 0), FrameError::Shape { body_bytes: 24, rows: 2, width: 3, dtype: 0 });
    assert_eq!(with(8, 6), FrameError::Epoch { found: Epoch(6), expected: Epoch(7) });
    assert_eq!(with(16, 1), FrameError::Number { found: 1, expected: 0 });
}

#[test]
fn a_frame_again_is_refused_and_so_is_a_gap() {
    let frames = written(Epoch(7), &[(rows(1, 1), vec![0; 4]), (rows(1, 1), vec![1; 4])]);
    let (first, second) = frames.split_at(frames.len() / 2);
    let replayed = [first, first].concat();
    assert_eq!(read(&mut FrameReader::new(Epoch(7)), &replayed), Err(FrameError::Number { found: 0, expected: 1 }));
    assert_eq!(read(&mut FrameReader::new(Epoch(7)), second), Err(FrameError::Number { found: 1, expected: 0 }));
}

#[test]
fn a_peers_first_frame_is_short_and_says_the_epoch() {
    let mut reader = FrameReader::opened_by_peer();
    let long = written(Epoch(3), &[(Head::bytes(Kind::Hello), vec![0; MAX_HELLO_BYTES + 1])]);
    assert_eq!(read(&mut reader, &long), Err(FrameError::TooLong { found: MAX_HELLO_BYTES + 1, limit: MAX_HELLO_BYTES }));
    let mut reader = FrameReader::opened_by_peer();
    let stream = written(Epoch(3), &[(Head::bytes(Kind::Hello), vec![0; 9]), (Head::bytes(Kind::Message), vec![0; 2 * MAX_HELLO_BYTES])]);
    let frames = read(&mut reader, &stream).unwrap();
    assert_eq!(frames.iter().map(|frame| (frame.epoch, frame.body.len())).collect::<Vec<_>>(), [(Epoch(3), 9), (Epoch(3), 8192)]);
}

#[test]
fn a_body_that_is_too_long_is_refused_before_it_is_sent() {
    let refused = FrameWriter::new(Epoch(0)).head(Head::bytes(Kind::Message), MAX_BODY_BYTES + 1);
    assert_eq!(refused, Err(FrameError::TooLong { found: MAX_BODY_BYTES + 1, limit: MAX_BODY_BYTES }));
}
