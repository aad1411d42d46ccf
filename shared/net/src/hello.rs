//! The first frame of a stream: which group it belongs to, and between which ranks.
//!
//! What it is not: a proof of who speaks; that is the connection's certificate, against which the group holds it.

use forge_shared::ids::Epoch;

use crate::frame::{FrameError, MAX_HELLO_BYTES};

/// Longest name of a group or of its purpose, bytes.
pub const MAX_NAME_BYTES: usize = 512;
/// Longest text that members must agree on, bytes.
pub const MAX_AGREEMENT_BYTES: usize = 1024;
/// Most ranks of a group.
pub const MAX_RANKS: usize = 1024;

/// Which group: one per replica or job, purpose and epoch.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupId {
    /// Whose ranks these are, for example a replica's id.
    pub name: String,
    /// What the group is for: one replica has several, for example `tensor` and `steps`.
    pub purpose: String,
    /// Of the plan.
    pub epoch: Epoch,
}

impl std::fmt::Display for GroupId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} of epoch {}", self.name, self.purpose, self.epoch)
    }
}

/// What a stream carries: what concerns the whole group, or two ranks of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Lane {
    /// Operations of the whole group.
    Group = 0,
    /// Sends and receives, messages.
    Pair = 1,
}

/// The first frame of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// The group.
    pub group: GroupId,
    /// Which of the streams between the two.
    pub lane: Lane,
    /// Rank that opened the stream.
    pub from: usize,
    /// Rank it means.
    pub to: usize,
    /// Ranks of the group.
    pub size: usize,
    /// What all members must bring alike, for example the digest of their weights.
    pub agreement: String,
}

impl Hello {
    /// As a body; the epoch is in the frame's head.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![self.lane as u8];
        for number in [self.from, self.to, self.size] {
            bytes.extend_from_slice(&(number as u16).to_le_bytes());
        }
        for text in [&self.group.name, &self.group.purpose, &self.agreement] {
            bytes.extend_from_slice(&(text.len() as u16).to_le_bytes());
            bytes.extend_from_slice(text.as_bytes());
        }
        debug_assert!(bytes.len() <= MAX_HELLO_BYTES);
        bytes
    }

    /// Reads a body.
    ///
    /// # Errors
    /// [`FrameError::Hello`] naming the part.
    pub fn decode(epoch: Epoch, body: &[u8]) -> Result<Self, FrameError> {
        let mut rest = body;
        let lane = match take(&mut rest, "lane", 1)? {
            [0] => Lane::Group,
            [1] => Lane::Pair,
            other => return Err(wrong("lane", format!("{other:?} stands for nothing"))),
        };
        let mut number = |field| take(&mut rest, field, 2).map(|bytes| usize::from(u16::from_le_bytes([bytes[0], bytes[1]])));
        let (from, to, size) = (number("from")?, number("to")?, number("size")?);
        if size > MAX_RANKS || from >= size || to >= size || from == to {
            return Err(wrong("ranks", format!("from {from} to {to} of {size}")));
        }
        let name = text(&mut rest, "name", MAX_NAME_BYTES)?;
        let purpose = text(&mut rest, "purpose", MAX_NAME_BYTES)?;
        let agreement = text(&mut rest, "agreement", MAX_AGREEMENT_BYTES)?;
        if !rest.is_empty() {
            return Err(wrong("end", format!("{} bytes too many", rest.len())));
        }
        Ok(Hello { group: GroupId { name, purpose, epoch }, lane, from, to, size, agreement })
    }
}

fn wrong(field: &'static str, reason: String) -> FrameError {
    FrameError::Hello { field, reason }
}

fn take<'a>(rest: &mut &'a [u8], field: &'static str, length: usize) -> Result<&'a [u8], FrameError> {
    let (part, later) = rest.split_at_checked(length).ok_or_else(|| wrong(field, "it is cut off".to_owned()))?;
    *rest = later;
    Ok(part)
}

fn text(rest: &mut &[u8], field: &'static str, limit: usize) -> Result<String, FrameError> {
    let length = take(rest, field, 2)?;
    let length = usize::from(u16::from_le_bytes([length[0], length[1]]));
    if length > limit {
        return Err(wrong(field, format!("{length} bytes; at most {limit} are allowed")));
    }
    let bytes = take(rest, field, length)?;
    String::from_utf8(bytes.to_vec()).map_err(|_| wrong(field, "it is not UTF-8".to_owned()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_hello_comes_back_and_every_prefix_of_it_is_refused(
            name in "[a-z0-9/äß-]{0,60}", purpose in "[a-z.]{0,20}", agreement in ".{0,80}",
            (size, from, to) in (2usize..MAX_RANKS, any::<prop::sample::Index>(), any::<prop::sample::Index>())
                .prop_map(|(size, from, to)| (size, from.index(size), to.index(size))),
            whole in any::<bool>(), epoch in any::<u64>(),
        ) {
            prop_assume!(from != to);
            let group = GroupId { name, purpose, epoch: Epoch(epoch) };
            let hello = Hello { group, lane: if whole { Lane::Group } else { Lane::Pair }, from, to, size, agreement };
            let body = hello.encode();
            for length in 0..body.len() {
                prop_assert!(Hello::decode(Epoch(epoch), &body[..length]).is_err());
            }
            prop_assert_eq!(Hello::decode(Epoch(epoch), &body), Ok(hello));
        }

        #[test]
        fn other_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(hello) = Hello::decode(Epoch(0), &bytes) {
                prop_assert_eq!(hello.encode(), bytes);
            }
        }
    }

    #[test]
    fn ranks_outside_and_long_texts_are_refused_by_name() {
        let group = GroupId { name: "m/0".into(), purpose: "tensor".into(), epoch: Epoch(1) };
        let hello = Hello { group, lane: Lane::Group, from: 0, to: 1, size: 2, agreement: String::new() };
        let refused = |hello: Hello| Hello::decode(Epoch(1), &hello.encode()).unwrap_err().to_string();
        assert!(refused(Hello { from: 2, ..hello.clone() }).starts_with("ranks"));
        assert!(refused(Hello { to: 0, ..hello.clone() }).starts_with("ranks"));
        assert!(refused(Hello { size: MAX_RANKS + 1, ..hello.clone() }).starts_with("ranks"));
        assert!(refused(Hello { agreement: "x".repeat(MAX_AGREEMENT_BYTES + 1), ..hello }).starts_with("agreement"));
    }
}
