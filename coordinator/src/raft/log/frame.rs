//! Frames: how bytes lie in a file so that a torn last write is told from damage.
//!
//! `FRGE`, length (u32), sequence number (u64), CRC-32C of both and the payload (u32), payload; little-endian. Every frame
//! is synced before the next is written, so after a crash at most the last one is incomplete: it is short, or a sector of
//! it was never written and reads as zeros, and no whole frame follows.
//!
//! Invariant: [`read`] gives every frame that was synced, or refuses the file.

/// Before the payload.
pub const HEADER_BYTES: usize = 20;
/// The largest payload.
pub const MAX_PAYLOAD_BYTES: usize = 256 << 20;
const MAGIC: [u8; 4] = *b"FRGE";
const SECTOR_BYTES: usize = 512;

/// The frames of a file.
#[derive(Debug, PartialEq, Eq)]
pub struct Frames<'a> {
    /// Sequence numbers and payloads.
    pub frames: Vec<(u64, &'a [u8])>,
    /// Where the last whole frame ends.
    pub end: usize,
    /// Whether an incomplete frame follows.
    pub is_torn: bool,
}

/// Damage: where, and what is seen there.
#[derive(Debug, PartialEq, Eq)]
pub struct Damage {
    /// In the file.
    pub offset: usize,
    /// For the operator.
    pub why: String,
}

/// One frame.
#[must_use]
pub fn write(sequence: u64, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER_BYTES + payload.len());
    frame.extend_from_slice(&MAGIC);
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.extend_from_slice(&sequence.to_le_bytes());
    let crc = checksum(&frame[4..16], payload);
    frame.extend_from_slice(&crc.to_le_bytes());
    frame.extend_from_slice(payload);
    frame
}

fn checksum(header: &[u8], payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(header), payload)
}

/// The frame at the start of `bytes`, if it is whole.
fn whole(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (header, rest) = bytes.split_at_checked(HEADER_BYTES)?;
    let len = announced(header)?;
    let payload = rest.get(..len)?;
    let sequence = u64::from_le_bytes(header[8..16].try_into().ok()?);
    let crc = u32::from_le_bytes(header[16..20].try_into().ok()?);
    (crc == checksum(&header[4..16], payload)).then_some((sequence, payload))
}

/// The length that a header gives, if it is one.
fn announced(header: &[u8]) -> Option<usize> {
    if header.get(..4)? != MAGIC {
        return None;
    }
    let len = u32::from_le_bytes(header.get(4..8)?.try_into().ok()?) as usize;
    (len <= MAX_PAYLOAD_BYTES).then_some(len)
}

/// The first frame alone: the header of a file whose rest has another form.
#[must_use]
pub fn first(bytes: &[u8]) -> Option<(u64, &[u8], usize)> {
    whole(bytes).map(|(sequence, payload)| (sequence, payload, HEADER_BYTES + payload.len()))
}

/// All frames of a file, whose first has number `first_sequence`. `may_be_torn`: it is the file that was written last.
///
/// # Errors
/// [`Damage`] for everything that a crash while writing the last frame does not explain.
pub fn read(bytes: &[u8], first_sequence: u64, may_be_torn: bool) -> Result<Frames<'_>, Damage> {
    let mut frames = Vec::new();
    let (mut at, mut expected) = (0, first_sequence);
    while at < bytes.len() {
        match whole(&bytes[at..]) {
            Some((sequence, payload)) if sequence == expected => {
                frames.push((sequence, payload));
                at += HEADER_BYTES + payload.len();
                expected += 1;
            }
            Some((sequence, _)) => return Err(Damage { offset: at, why: format!("frame {sequence} where {expected} is expected") }),
            None => {
                if let Some((offset, sequence)) = next_whole(bytes, at + 1, expected) {
                    let why = format!("frame {expected} is damaged, and frame {sequence} follows at byte {offset}");
                    return Err(Damage { offset: at, why });
                }
                if !may_be_torn || !looks_torn(bytes, at) {
                    return Err(Damage {
                        offset: at,
                        why: format!("frame {expected} is damaged, and not as by a crash while it was written"),
                    });
                }
                return Ok(Frames { frames, end: at, is_torn: true });
            }
        }
    }
    Ok(Frames { frames, end: at, is_torn: false })
}

/// A whole frame behind a damaged one, as it can only be if the damaged one was once whole.
fn next_whole(bytes: &[u8], from: usize, least_sequence: u64) -> Option<(usize, u64)> {
    let mut at = from;
    while let Some(found) = bytes.get(at..)?.windows(MAGIC.len()).position(|window| window == MAGIC) {
        at += found;
        if let Some((sequence, _)) = whole(&bytes[at..])
            && sequence >= least_sequence
        {
            return Some((at, sequence));
        }
        at += 1;
    }
    None
}

fn looks_torn(bytes: &[u8], at: usize) -> bool {
    let rest = &bytes[at..];
    if rest.len() < HEADER_BYTES {
        return true;
    }
    let end = match announced(rest) {
        Some(len) if HEADER_BYTES + len > rest.len() => return true,
        Some(len) => at + HEADER_BYTES + len,
        None => bytes.len(),
    };
    // Sectors, as they lie in the file: those of the frame, its first and last in part.
    let mut from = at;
    while from < end {
        let to = ((from / SECTOR_BYTES + 1) * SECTOR_BYTES).min(end);
        if bytes[from..to].iter().all(|&byte| byte == 0) {
            return true;
        }
        from = to;
    }
    false
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn file(payloads: &[Vec<u8>]) -> Vec<u8> {
        payloads.iter().zip(7..).flat_map(|(payload, sequence)| write(sequence, payload)).collect()
    }

    fn payloads() -> impl Strategy<Value = Vec<Vec<u8>>> {
        prop::collection::vec(prop::collection::vec(1_u8.., 0..2000), 1..6)
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(payloads in payloads()) {
            let bytes = file(&payloads);
            let read = read(&bytes, 7, false).unwrap();
            prop_assert!(!read.is_torn && read.end == bytes.len());
            prop_assert!(read.frames.iter().map(|(_, payload)| payload.to_vec()).eq(payloads));
        }

        #[test]
        fn a_short_last_frame_is_torn(payloads in payloads(), cut in 1_usize..10_000) {
            let bytes = file(&payloads);
            let last = HEADER_BYTES + payloads.last().unwrap().len();
            let short = &bytes[..bytes.len() - 1 - cut % (last - 1)];
            let read = read(short, 7, true).unwrap();
            prop_assert!(read.is_torn && read.frames.len() == payloads.len() - 1 && read.end == bytes.len() - last);
        }

        #[test]
        fn a_flipped_bit_before_the_last_frame_is_damage(payloads in payloads(), at in any::<prop::sample::Index>(), bit in 0_u32..8) {
            let mut bytes = file(&payloads);
            let whole_frames = bytes.len() - HEADER_BYTES - payloads.last().unwrap().len();
            prop_assume!(whole_frames > 0);
            bytes[at.index(whole_frames)] ^= 1_u8 << bit;
            prop_assert!(read(&bytes, 7, true).is_err());
        }

        #[test]
        fn anything_is_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
            if let Ok(read) = read(&bytes, 7, true) {
                prop_assert!(read.end <= bytes.len());
            }
        }
    }

    #[test]
    fn a_sector_that_was_never_written_is_torn_and_a_flipped_bit_is_not() {
        let mut bytes = file(&[vec![1; 3000], vec![2; 3000]]);
        let second = HEADER_BYTES + 3000;
        let mut unwritten = bytes.clone();
        unwritten[4096..4608].fill(0);
        assert_eq!(read(&unwritten, 7, true).map(|read| (read.end, read.is_torn)), Ok((second, true)));
        assert!(read(&unwritten, 7, false).is_err());
        bytes[4200] ^= 1;
        assert!(read(&bytes, 7, true).is_err());
    }
}
