use std::time::Duration;

use super::*;
use crate::frame::{FrameWriter, Kind};

const EPOCH: Epoch = Epoch(7);

fn frame(writer: &mut FrameWriter, length: usize) -> Vec<u8> {
    [writer.head(Head::bytes(Kind::Message), length).unwrap().to_vec(), vec![1; length]].concat()
}

fn inbox() -> Arc<Inbox> {
    Inbox::new(FrameReader::new(EPOCH))
}

fn taken(inbox: &Inbox) -> Option<Result<usize, Failure>> {
    inbox.take().map(|taken| taken.map(|(frame, _)| frame.body.len()))
}

#[test]
fn what_came_before_a_peer_left_can_be_read_and_nothing_of_an_aborted_group() {
    let mut writer = FrameWriter::new(EPOCH);
    let left = inbox();
    left.push(&frame(&mut writer, 3)).unwrap();
    left.end();
    assert_eq!(taken(&left), Some(Ok(3)));
    assert_eq!(taken(&left), Some(Err(Failure::Left)));

    let aborted = inbox();
    aborted.push(&frame(&mut FrameWriter::new(EPOCH), 3)).unwrap();
    aborted.fail(Failure::Aborted("first".into()));
    aborted.fail(Failure::Lost("second".into()));
    assert_eq!(taken(&aborted), Some(Err(Failure::Aborted("first".into()))));
}

#[test]
fn frames_that_cannot_be_end_the_stream_with_their_reason() {
    let refused = |bytes: &[u8], expected: FrameError| {
        let inbox = inbox();
        assert_eq!(inbox.push(bytes), Err(expected.clone()));
        assert_eq!(taken(&inbox), Some(Err(Failure::Frame(expected))));
    };
    refused(&frame(&mut FrameWriter::new(Epoch(6)), 3), FrameError::Epoch { found: Epoch(6), expected: EPOCH });
    let mut writer = FrameWriter::new(EPOCH);
    frame(&mut writer, 0);
    refused(&frame(&mut writer, 3), FrameError::Number { found: 1, expected: 0 });

    let cut = inbox();
    let whole = frame(&mut FrameWriter::new(EPOCH), 9);
    cut.push(&whole[..whole.len() - 4]).unwrap();
    assert_eq!(taken(&cut), None);
    cut.end();
    assert_eq!(taken(&cut), Some(Err(Failure::Frame(FrameError::Truncated { missing: 4 }))));
}

#[test]
fn a_full_inbox_stops_its_transport_until_half_of_it_is_read() {
    let (inbox, mut writer) = (inbox(), FrameWriter::new(EPOCH));
    let mut frames = 0;
    while inbox.has_room() {
        inbox.push(&frame(&mut writer, 1 << 20)).unwrap();
        frames += 1;
    }
    assert_eq!(frames, INBOX_BYTES >> 20);
    let resumed: Vec<bool> = (0..frames).map(|_| inbox.take().unwrap().unwrap().1).collect();
    assert_eq!(resumed.iter().position(|resume| *resume), Some(frames / 2), "{resumed:?}");
    assert_eq!(resumed.iter().filter(|resume| **resume).count(), 1, "{resumed:?}");
}

#[test]
fn a_sender_of_this_process_waits_for_room_within_bounds() {
    let inbox = inbox();
    let deliver = |length| inbox.deliver(Head::bytes(Kind::Message), EPOCH, vec![0; length], Instant::now() + Duration::from_millis(20));
    deliver(INBOX_BYTES).unwrap();
    assert_eq!(deliver(1), Err(Failure::Timeout));
    assert_eq!(taken(&inbox), Some(Ok(INBOX_BYTES)));
    deliver(1).unwrap();
}
