//! The tables. OpenAI's schema has 37 chat fields and 18 completion fields; vLLM's extra fields follow.

use serde_json::Value;

use super::{Endpoint, Field, Rule};

const fn honoured(name: &'static str, example: &'static str, meaning: &'static str) -> Field {
    Field { name, rule: Rule::Honoured(meaning), example }
}

const fn refused(name: &'static str, example: &'static str, why: &'static str) -> Field {
    Field { name, rule: Rule::Refused(why), example }
}

const fn only(name: &'static str, example: &'static str, values: &'static str, accepts: fn(&Value) -> bool, why: &'static str) -> Field {
    Field { name, rule: Rule::Only { values, why, accepts }, example }
}

fn is_false(value: &Value) -> bool {
    value == &Value::Bool(false)
}

fn is_true(value: &Value) -> bool {
    value == &Value::Bool(true)
}

fn is_empty_list(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty)
}

fn is_none_or_auto(value: &Value) -> bool {
    matches!(value.as_str(), Some("none" | "auto"))
}

const TOOLS_LATER: &str = "tool calling is not supported yet";
const STRUCTURE_LATER: &str = "structured output is not supported yet";

/// Fields of both generating routes.
static GENERATION: &[Field] = &[
    honoured("model", "\"forge\"", "Name of a served model, as in `/v1/models`; another is a 404. Left out: the default model."),
    honoured("stream", "true", "Answer as server-sent events."),
    honoured(
        "stream_options",
        "{\"include_usage\": true}",
        "`include_usage`: a last chunk with the usage. `include_obfuscation`: only false. Needs `stream: true`.",
    ),
    honoured("n", "2", "Answers per prompt, from 1; prompts × n at most `gateway.maxChoices` (128)."),
    honoured("seed", "7", "64-bit integer. Same request, same seed, same tokens. Left out: drawn at random."),
    honoured("temperature", "0.5", "0 to 2; 0 is greedy. Default: the model's own, else 1."),
    honoured("top_p", "0.9", "Above 0, to 1. Default: the model's own, else 1."),
    honoured("top_k", "40", "Keep the k most likely tokens; 0 or -1 keeps all. Default: the model's own, else all."),
    honoured("min_p", "0.05", "0 to 1: least probability relative to the most likely token."),
    honoured("repetition_penalty", "1.1", "0.01 to 100, over prompt and answer; 1 is off. Default: the model's own, else 1."),
    honoured("presence_penalty", "0.5", "-2 to 2, over the answer."),
    honoured("frequency_penalty", "0.5", "-2 to 2, per occurrence in the answer."),
    honoured("logit_bias", "{\"5\": -100}", "Token id (as a string) to bias, -100 to 100; at most 1024 entries."),
    honoured("stop", "[\"END\"]", "A string or a list of at most 16, each 1 to 1024 bytes. Never part of the text."),
    honoured("stop_token_ids", "[2]", "Token ids that end the answer beside the model's own; at most 1024."),
    honoured("min_tokens", "1", "Stop conditions are ignored before this many tokens."),
    honoured("ignore_eos", "true", "Do not stop at the model's end tokens."),
    honoured("skip_special_tokens", "false", "Keep special tokens out of the text. Default true."),
    honoured(
        "priority",
        "-1",
        "-1000 to 1000; as in vLLM, lower is served earlier. Default 0. Where keys are configured only 0: no key goes before another.",
    ),
    honoured("cache_salt", "\"room-4\"", "Shares cached prefixes only with requests of the same key and salt; 1 to 256 bytes."),
    honoured("return_token_ids", "true", "Adds `prompt_token_ids`, and `token_ids` to every answer (vLLM's shape)."),
    honoured("user", "\"u-17\"", "Written to the request's log line; at most 512 bytes."),
    only("include_stop_str_in_output", "false", "false", is_false, "a stop string is never part of the text"),
    only("spaces_between_special_tokens", "true", "true", is_true, "text is the tokens' own"),
    only("use_beam_search", "false", "false", is_false, "beam search is not supported"),
    refused("allowed_token_ids", "[1]", "use logit_bias"),
    refused("bad_words", "[\"x\"]", "use logit_bias"),
    refused("length_penalty", "1.0", "beam search is not supported"),
    refused("early_stopping", "true", "beam search is not supported"),
    refused("truncate_prompt_tokens", "10", "a prompt over the context is refused, not cut"),
    refused("prompt_logprobs", "1", "use /v1/completions with echo and logprobs"),
    refused("guided_json", "{}", STRUCTURE_LATER),
    refused("guided_regex", "\"a\"", STRUCTURE_LATER),
    refused("guided_choice", "[\"a\"]", STRUCTURE_LATER),
    refused("guided_grammar", "\"a\"", STRUCTURE_LATER),
    refused("structured_outputs", "{}", STRUCTURE_LATER),
    refused("logits_processors", "[]", "code is not taken from requests"),
    refused("request_id", "\"a\"", "send the header X-Request-Id"),
    refused("kv_transfer_params", "{}", "a matter between engines"),
    refused("vllm_xargs", "{}", "not known here"),
];

static CHAT_ONLY: &[Field] = &[
    honoured(
        "messages",
        "[{\"role\": \"user\", \"content\": \"Hi\"}]",
        "1 to 2048 objects with `role` (system, developer, user, assistant, tool), `content` (a string or text parts), \
         and optionally `name`; `tool_call_id` with role tool. Developer messages are system messages to the model. \
         Images, audio, files and tool calls are refused by name.",
    ),
    honoured("max_completion_tokens", "16", "Most tokens per answer, from 1. Default: what the context leaves."),
    honoured("max_tokens", "16", "The older name of `max_completion_tokens`; both only with one value."),
    honoured("logprobs", "true", "Log-probabilities of the answer's tokens."),
    honoured("top_logprobs", "2", "0 to 20 alternatives per token; needs `logprobs: true`."),
    honoured("prompt_cache_key", "\"room-4\"", "Requests of one key prefer one replica, where their prefix is cached; at most 256 bytes."),
    honoured("safety_identifier", "\"u-17\"", "Written to the request's log line; at most 512 bytes."),
    honoured("metadata", "{\"run\": \"7\"}", "At most 16 strings (keys 64, values 512 bytes); written to the request's log line."),
    honoured("add_generation_prompt", "true", "End the prompt with the start of an assistant message. Default true."),
    honoured(
        "continue_final_message",
        "true",
        "Go on inside the last message; needs `add_generation_prompt: false` and an assistant message at the end.",
    ),
    honoured("add_special_tokens", "true", "Add BOS/EOS around the rendered template. Default false: templates bring their own."),
    honoured("chat_template_kwargs", "{\"enable_thinking\": false}", "At most 16 variables for the template: strings, numbers, booleans."),
    only("store", "false", "false", is_false, "answers are not stored"),
    only("service_tier", "\"auto\"", "\"auto\" or \"default\"", |v| matches!(v.as_str(), Some("auto" | "default")), "there is one tier"),
    only("modalities", "[\"text\"]", "[\"text\"]", |v| v == &serde_json::json!(["text"]), "answers are text"),
    only("response_format", "{\"type\": \"text\"}", "{\"type\": \"text\"}", |v| v == &serde_json::json!({"type": "text"}), STRUCTURE_LATER),
    only("tools", "[]", "an empty list", is_empty_list, TOOLS_LATER),
    only("tool_choice", "\"auto\"", "\"none\" or \"auto\"", is_none_or_auto, TOOLS_LATER),
    only("parallel_tool_calls", "true", "true or false", Value::is_boolean, "without tools it changes nothing"),
    only("functions", "[]", "an empty list", is_empty_list, TOOLS_LATER),
    only("function_call", "\"none\"", "\"none\" or \"auto\"", is_none_or_auto, TOOLS_LATER),
    only("reasoning_effort", "\"none\"", "\"none\"", |v| v == "none", "reasoning is not controlled here; use chat_template_kwargs"),
    only("verbosity", "\"medium\"", "\"medium\"", |v| v == "medium", "verbosity is not controlled here"),
    only(
        "prompt_cache_retention",
        "\"in_memory\"",
        "\"in_memory\" or \"in-memory\"",
        |v| matches!(v.as_str(), Some("in_memory" | "in-memory")),
        "prefixes are cached in memory",
    ),
    only("echo", "false", "false", is_false, "use /v1/completions"),
    refused("audio", "{}", "answers are text"),
    refused("moderation", "{}", "there is no moderation model here"),
    refused("prediction", "{}", "predicted outputs are not supported"),
    refused("prompt_cache_options", "{}", "use prompt_cache_key and cache_salt"),
    refused("web_search_options", "{}", "there is no web search here"),
    refused("best_of", "2", "use n"),
    refused("chat_template", "\"a\"", "templates come with the model, not with the request"),
    refused("documents", "[]", "retrieval templates are not supported yet"),
    refused("mm_processor_kwargs", "{}", "messages are text"),
    refused("include_reasoning", "true", "reasoning is not separated from the answer"),
    refused("return_tokens_as_token_ids", "true", "use return_token_ids"),
];

static COMPLETION_ONLY: &[Field] = &[
    honoured(
        "prompt",
        "\"Once\"",
        "A string, a list of strings, a list of token ids, or a list of such lists; at most 128 prompts. Answers of \
         prompt i have the indices i × n to i × n + n - 1.",
    ),
    honoured("max_tokens", "16", "Most tokens per answer. Default 16. 0 only with `echo`."),
    honoured("echo", "true", "Begin every answer with its prompt; with `logprobs` also the prompt's."),
    honoured("logprobs", "2", "0 to 20: log-probabilities of tokens, with so many alternatives."),
    honoured("best_of", "1", "Only the value of `n`: answers are not ranked."),
    honoured("add_special_tokens", "false", "Add BOS/EOS as the model wants them around a text prompt. Default true."),
    only("suffix", "\"\"", "an empty string", |v| v == "", "filling in the middle is not supported"),
    only("response_format", "{\"type\": \"text\"}", "{\"type\": \"text\"}", |v| v == &serde_json::json!({"type": "text"}), STRUCTURE_LATER),
    refused("prompt_embeds", "\"a\"", "send text or token ids"),
    refused("return_tokens_as_token_ids", "true", "use return_token_ids"),
];

static TOKENIZE_FIELDS: &[Field] = &[
    honoured("model", "\"forge\"", "Name of a served model. Left out: the default model."),
    honoured("prompt", "\"Once\"", "Text to cut into tokens. Either this or `messages`."),
    honoured("messages", "[{\"role\": \"user\", \"content\": \"Hi\"}]", "A chat to render by the template and cut into tokens."),
    honoured("add_special_tokens", "false", "Add BOS/EOS. Default true for `prompt`, false for `messages`."),
    honoured("return_token_strs", "true", "Also the tokens as the vocabulary writes them."),
    honoured("add_generation_prompt", "true", "With `messages`: end with the start of an assistant message. Default true."),
    honoured("continue_final_message", "true", "With `messages`: go on inside the last message."),
    honoured("chat_template_kwargs", "{\"enable_thinking\": false}", "With `messages`: variables for the template."),
    only("tools", "[]", "an empty list", is_empty_list, TOOLS_LATER),
    refused("chat_template", "\"a\"", "templates come with the model, not with the request"),
    refused("mm_processor_kwargs", "{}", "messages are text"),
];

static DETOKENIZE_FIELDS: &[Field] =
    &[honoured("model", "\"forge\"", "Name of a served model. Left out: the default model."), honoured("tokens", "[1, 2]", "Token ids.")];

/// `POST /v1/chat/completions`.
pub static CHAT: Endpoint = Endpoint { route: "POST /v1/chat/completions", groups: &[CHAT_ONLY, GENERATION] };
/// `POST /v1/completions`.
pub static COMPLETION: Endpoint = Endpoint { route: "POST /v1/completions", groups: &[COMPLETION_ONLY, GENERATION] };
/// `POST /tokenize`.
pub static TOKENIZE: Endpoint = Endpoint { route: "POST /tokenize", groups: &[TOKENIZE_FIELDS] };
/// `POST /detokenize`.
pub static DETOKENIZE: Endpoint = Endpoint { route: "POST /detokenize", groups: &[DETOKENIZE_FIELDS] };
/// All of them.
pub static ENDPOINTS: &[&Endpoint] = &[&CHAT, &COMPLETION, &TOKENIZE, &DETOKENIZE];
