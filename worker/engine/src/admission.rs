//! Whether a request can be answered at all, decided before anything is computed. Pure.

use forge_model::StepModelInfo;
use forge_shared::generate::{AdmitError, GenerateRequest, InvalidParam};

/// Most answers of one request; far above what an API allows, so that a defect there cannot exhaust memory.
pub const MAX_CHOICES: usize = 1024;

/// Checks a request against the model: parameters, ids, context and KV memory.
///
/// # Errors
/// The first thing that is wrong; never [`AdmitError::Overloaded`] or [`AdmitError::Unavailable`].
pub fn check(info: &StepModelInfo, request: &GenerateRequest) -> Result<(), AdmitError> {
    request.params.check()?;
    check_shape(request)?;
    check_tokens(info, request)?;
    let prompt_tokens = request.prompt_tokens.len();
    let room = if request.params.max_tokens == 0 { 0 } else { 1 };
    if prompt_tokens + room > info.max_model_len {
        return Err(AdmitError::PromptTooLong { prompt_tokens, max_model_len: info.max_model_len });
    }
    // Answers can run one after the other, so the longest alone must fit. The last token is never computed.
    let longest = (prompt_tokens + request.params.max_tokens as usize).min(info.max_model_len);
    let needed_blocks = (longest - 1).div_ceil(info.block_size);
    if needed_blocks > info.kv_blocks {
        return Err(AdmitError::NeverFits { needed_blocks, total_blocks: info.kv_blocks });
    }
    Ok(())
}

fn check_shape(request: &GenerateRequest) -> Result<(), InvalidParam> {
    let invalid = |field, expected: String, actual: String| Err(InvalidParam { field, expected, actual });
    if request.prompt_tokens.is_empty() {
        return invalid("prompt", "at least one token".into(), "none".into());
    }
    let count = request.choices.len();
    if count == 0 || count > MAX_CHOICES {
        return invalid("n", format!("between 1 and {MAX_CHOICES}"), count.to_string());
    }
    let mut indices: Vec<u32> = request.choices.iter().map(|choice| choice.index).collect();
    indices.sort_unstable();
    if let Some(pair) = indices.windows(2).find(|pair| pair[0] == pair[1]) {
        return invalid("choices", "answers with different indices".into(), format!("index {} twice", pair[0]));
    }
    let max_tokens = request.params.max_tokens as usize;
    if let Some(choice) = request.choices.iter().find(|choice| choice.emitted_tokens.len() > max_tokens) {
        let actual = format!("{} for answer {}", choice.emitted_tokens.len(), choice.index);
        return invalid("emitted_tokens", format!("at most max_tokens ({max_tokens})"), actual);
    }
    Ok(())
}

fn check_tokens(info: &StepModelInfo, request: &GenerateRequest) -> Result<(), AdmitError> {
    let emitted = request.choices.iter().flat_map(|choice| &choice.emitted_tokens);
    let biased = request.params.logit_bias.iter().map(|(token, _)| token);
    let all = request.prompt_tokens.iter().chain(emitted).chain(&request.params.stop_token_ids).chain(biased);
    match all.copied().find(|&token| token as usize >= info.vocab_size) {
        Some(token) => Err(AdmitError::UnknownToken { token, vocab_size: info.vocab_size }),
        None => Ok(()),
    }
}
