//! SentencePiece's byte-pair merging: of all neighbours that make a piece, the pair whose piece
//! has the highest score is joined first, of equal ones the leftmost.
//!
//! It differs from merging by a list of pairs in that only the result's score counts. A heap of
//! candidates keeps a text without any cut in n log n steps.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use super::Pieces;

/// No neighbour.
const NONE: u32 = u32::MAX;

/// A stretch of the text, linked to its neighbours; empty once it is joined to its left one.
struct Symbol {
    start: u32,
    end: u32,
    previous: u32,
    next: u32,
}

/// A pair that could be joined.
struct Candidate {
    score: f32,
    left: u32,
    right: u32,
    /// End of the right part when the candidate was found: another end means it is outdated.
    end: u32,
}

impl Ord for Candidate {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left)).then(other.end.cmp(&self.end))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

/// One text on its way to pieces.
struct Merging<'a> {
    text: &'a str,
    pieces: &'a Pieces,
    symbols: Vec<Symbol>,
    candidates: BinaryHeap<Candidate>,
    /// Where a joined piece that must not be used was joined from: its length in bytes on the left.
    unused: HashMap<(u32, u32), u32>,
    /// Pairs looked at, which bounds the time.
    looked_at: usize,
}

/// Cuts a text into pieces; what is given are byte ranges, in order, each a piece or a single
/// character that is none. Also the number of pairs looked at. The text has less than 4 GiB.
pub(super) fn merge(text: &str, pieces: &Pieces) -> (Vec<(usize, usize)>, usize) {
    let mut merging = Merging { text, pieces, symbols: symbols(text), candidates: BinaryHeap::new(), unused: HashMap::new(), looked_at: 0 };
    for right in 1..merging.symbols.len() as u32 {
        merging.consider(right - 1, right);
    }
    while let Some(candidate) = merging.candidates.pop() {
        merging.join(&candidate);
    }
    (merging.ranges(), merging.looked_at)
}

/// One symbol per character.
fn symbols(text: &str) -> Vec<Symbol> {
    let count = text.chars().count() as u32;
    (text.char_indices().zip(0u32..))
        .map(|((start, character), index)| Symbol {
            start: start as u32,
            end: (start + character.len_utf8()) as u32,
            previous: if index == 0 { NONE } else { index - 1 },
            next: if index + 1 == count { NONE } else { index + 1 },
        })
        .collect()
}

impl Merging<'_> {
    /// Adds the pair to the candidates where it makes a piece.
    fn consider(&mut self, left: u32, right: u32) {
        self.looked_at += 1;
        let (start, end) = (self.symbols[left as usize].start, self.symbols[right as usize].end);
        let Some(piece) = self.pieces.get(&self.text[start as usize..end as usize]) else {
            return;
        };
        if piece.unused {
            self.unused.insert((start, end), self.symbols[right as usize].start);
        }
        self.candidates.push(Candidate { score: piece.score, left, right, end });
    }

    /// Joins a pair unless one of its parts has changed since it was found.
    fn join(&mut self, candidate: &Candidate) {
        let Candidate { left, right, end, .. } = *candidate;
        let (first, second) = (&self.symbols[left as usize], &self.symbols[right as usize]);
        let is_whole = |symbol: &Symbol| symbol.start < symbol.end;
        if !is_whole(first) || !is_whole(second) || first.next != right || second.end != end {
            return;
        }
        let (previous, next) = (first.previous, second.next);
        self.symbols[right as usize].start = end;
        self.symbols[left as usize].end = end;
        self.symbols[left as usize].next = next;
        if next != NONE {
            self.symbols[next as usize].previous = left;
            self.consider(left, next);
        }
        if previous != NONE {
            self.consider(previous, left);
        }
    }

    /// The ranges of what is left; pieces that must not be used fall apart again.
    fn ranges(&self) -> Vec<(usize, usize)> {
        let mut ranges = Vec::new();
        let mut open = Vec::new();
        for symbol in self.symbols.iter().filter(|symbol| symbol.start < symbol.end) {
            open.push((symbol.start, symbol.end));
            while let Some((start, end)) = open.pop() {
                match self.unused.get(&(start, end)) {
                    Some(&middle) => open.extend([(middle, end), (start, middle)]),
                    None => ranges.push((start as usize, end as usize)),
                }
            }
        }
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Piece, PieceKind};
    use super::*;

    fn pieces(list: &[(&str, f32)], unused: &[&str]) -> Pieces {
        let piece = |(text, score): &(&str, f32)| Piece {
            text: (*text).to_string(),
            score: *score,
            kind: if unused.contains(text) { PieceKind::Unused } else { PieceKind::Normal },
        };
        Pieces::new(&list.iter().map(piece).collect::<Vec<_>>())
    }

    fn cut(text: &str, pieces: &Pieces) -> Vec<String> {
        merge(text, pieces).0.into_iter().map(|(start, end)| text[start..end].to_string()).collect()
    }

    #[test]
    fn the_highest_score_is_joined_first_and_of_equal_ones_the_leftmost() {
        let scored = pieces(&[("a", 0.0), ("b", 0.0), ("c", 0.0), ("ab", -2.0), ("bc", -1.0), ("aa", -3.0)], &[]);
        assert_eq!(cut("abc", &scored), ["a", "bc"]);
        assert_eq!(cut("aaa", &scored), ["aa", "a"]);
        assert_eq!(cut("xaby", &scored), ["x", "ab", "y"]);
        assert_eq!(cut("", &scored), Vec::<String>::new());
    }

    #[test]
    fn unused_pieces_lead_to_longer_ones_and_fall_apart_at_the_end() {
        let scored = pieces(&[("a", 0.0), ("b", 0.0), ("ab", -1.0), ("abc", -2.0)], &["ab"]);
        assert_eq!(cut("abc", &scored), ["abc"]);
        assert_eq!(cut("abd", &scored), ["a", "b", "d"]);
    }

    /// Each join looks at two new pairs, so a text of n characters needs at most 3n looks.
    #[test]
    fn the_work_grows_with_the_text_and_no_faster() {
        let mut list = vec![("a".to_string(), 0.0), ("é".to_string(), 0.0)];
        for power in 1..6 {
            list.push(("a".repeat(1 << power), -(power as f32)));
        }
        let list: Vec<(&str, f32)> = list.iter().map(|(text, score)| (text.as_str(), *score)).collect();
        let scored = pieces(&list, &[]);
        for text in ["a".repeat(1 << 20), "é".repeat(1 << 19), "ab".repeat(1 << 19)] {
            let characters = text.chars().count();
            let (ranges, looked_at) = merge(&text, &scored);
            assert!(looked_at < 3 * characters, "{looked_at} looks for {characters} characters");
            assert_eq!(ranges.iter().map(|(start, end)| end - start).sum::<usize>(), text.len());
        }
    }
}
