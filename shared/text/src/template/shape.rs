//! How long a template's expressions and `elif` chains may be.
//!
//! The engine parses, compiles and frees chains (`a + a + a`, `a | f | f`, `elif … elif`) by recursion without a bound; only
//! what stands in brackets or blocks of each other has one of its own. Invariant: no source is parsed whose syntax tree
//! could be deeper than the stack of [`compiling`] holds.

use minijinja::Error;
use minijinja::machinery::{Token, tokenize};
use minijinja::syntax::SyntaxConfig;

/// Most tokens between the brackets of one tag; published templates have at most some two hundred.
const MAX_TAG_TOKENS: usize = 2_000;
/// Most `elif` in a template.
const MAX_ELIFS: usize = 500;
/// Stack of the thread that parses: more than ten times what the deepest tree within the bounds takes without optimization.
const STACK_BYTES: usize = 64 << 20;

/// What of a template passes its bound.
///
/// # Errors
/// A source that is no sequence of tokens.
pub(super) fn too_long(source: &str, syntax: &SyntaxConfig) -> Result<Option<String>, Error> {
    let (mut tag_tokens, mut elifs, mut opens_tag) = (0, 0, false);
    for token in tokenize(source, false, syntax.clone()) {
        let (token, _) = token?;
        tag_tokens = match token {
            Token::BlockStart | Token::VariableStart | Token::TemplateData(_) => 0,
            _ => tag_tokens + 1,
        };
        elifs += usize::from(opens_tag && matches!(token, Token::Ident("elif")));
        opens_tag = matches!(token, Token::BlockStart);
        if tag_tokens > MAX_TAG_TOKENS {
            return Ok(Some(format!("one of its tags has more than {MAX_TAG_TOKENS} words and signs; make several of it")));
        }
        if elifs > MAX_ELIFS {
            return Ok(Some(format!("it has more than {MAX_ELIFS} `elif`")));
        }
    }
    Ok(None)
}

/// Runs what parses and compiles, on a stack that is deep enough. `None` where no thread can be made.
pub(super) fn compiling<T: Send>(work: impl FnOnce() -> T + Send) -> Option<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("template".to_string()).stack_size(STACK_BYTES).spawn_scoped(scope, work).ok()?;
        thread.join().ok()
    })
}
