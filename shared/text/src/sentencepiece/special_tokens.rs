//! Tokens that are found in text before it is cut: of those that begin first, the longest.

use aho_corasick::{AhoCorasick, MatchKind};

use crate::{Result, TextError};

/// One such token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SpecialToken {
    pub(crate) id: u32,
    pub(crate) text: String,
    /// Left out of text meant for people, and not found where special text is not to be parsed.
    pub(crate) special: bool,
    /// Takes the spaces before it.
    pub(crate) strip_left: bool,
    /// Takes the spaces behind it.
    pub(crate) strip_right: bool,
}

/// Finds them.
#[derive(Debug)]
pub(super) struct SpecialTokens {
    all: Finder,
    /// Those that are found even where special text is not to be parsed.
    plain: Finder,
}

#[derive(Debug)]
struct Finder {
    automaton: AhoCorasick,
    tokens: Vec<SpecialToken>,
}

/// A part of a text.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part<'a> {
    Text(&'a str),
    Token(u32),
}

impl SpecialTokens {
    pub(super) fn new(tokens: Vec<SpecialToken>) -> Result<Self> {
        let plain = tokens.iter().filter(|token| !token.special).cloned().collect();
        Ok(Self { all: Finder::new(tokens)?, plain: Finder::new(plain)? })
    }

    /// The text cut at the tokens in it, from its start to its end.
    pub(super) fn split<'a>(&self, text: &'a str, parse_special: bool) -> Vec<Part<'a>> {
        if parse_special { self.all.split(text) } else { self.plain.split(text) }
    }
}

impl Finder {
    fn new(mut tokens: Vec<SpecialToken>) -> Result<Self> {
        tokens.retain(|token| !token.text.is_empty());
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(tokens.iter().map(|token| &token.text))
            .map_err(|error| TextError::invalid("special tokens", error))?;
        Ok(Self { automaton, tokens })
    }

    fn split<'a>(&self, text: &'a str) -> Vec<Part<'a>> {
        let mut parts = Vec::new();
        let mut done = 0;
        for found in self.automaton.find_iter(text) {
            // What an earlier token took away cannot hold a later one: it is whitespace.
            if found.start() < done {
                continue;
            }
            let token = &self.tokens[found.pattern().as_usize()];
            let mut before = &text[done..found.start()];
            if token.strip_left {
                before = before.trim_end();
            }
            if !before.is_empty() {
                parts.push(Part::Text(before));
            }
            parts.push(Part::Token(token.id));
            done = found.end();
            if token.strip_right {
                done = text.len() - text[done..].trim_start().len();
            }
        }
        if done < text.len() {
            parts.push(Part::Text(&text[done..]));
        }
        parts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(id: u32, text: &str, special: bool) -> SpecialToken {
        SpecialToken { id, text: text.to_string(), special, strip_left: false, strip_right: false }
    }

    #[test]
    fn the_first_and_of_those_the_longest_is_found() {
        let tokens = SpecialTokens::new(vec![token(1, "<a>", true), token(2, "<a>b", false), token(3, "  ", false)]).unwrap();
        assert_eq!(tokens.split("x<a>b<a>", true), [Part::Text("x"), Part::Token(2), Part::Token(1)]);
        assert_eq!(tokens.split("<a>   y", false), [Part::Text("<a>"), Part::Token(3), Part::Text(" y")]);
        assert_eq!(tokens.split("", true), []);
    }

    #[test]
    fn tokens_take_the_spaces_around_them_where_they_say_so() {
        let strip = SpecialToken { strip_left: true, strip_right: true, ..token(7, "<m>", true) };
        let tokens = SpecialTokens::new(vec![strip]).unwrap();
        assert_eq!(tokens.split("a \n<m>\n b<m>", true), [Part::Text("a"), Part::Token(7), Part::Text("b"), Part::Token(7)]);
    }
}
