//! What `serve` prints when the model can answer: what runs, where, and a request to paste.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use forge_shared::link::ModelCard;
use forge_shared::plan::Plan;
use forge_shared::spec::KvCacheDtype;
use forge_worker::prepare::PreparedModel;
use indicatif::HumanBytes;

use crate::cluster::LOCAL_CONTEXT;
use crate::names::DEFAULT_NAME;
use crate::output::short_count;

/// Where it listens.
#[derive(Debug, Clone, Copy)]
pub struct Addresses {
    /// The API.
    pub api: SocketAddr,
    /// Metrics and probes.
    pub metrics: SocketAddr,
    /// Whether requests need a key.
    pub keys: bool,
}

/// What runs.
#[derive(Debug, Clone)]
pub struct Shown {
    /// As clients see it.
    pub card: Arc<ModelCard>,
    /// Whether chats can be had with it.
    pub has_chat: bool,
    /// Where a replica is, with how much memory.
    pub plan: Plan,
    /// How many there are.
    pub replicas: u32,
    /// What kind of model it is.
    pub facts: Facts,
    /// The context by which other commands find its cluster.
    pub context: String,
}

/// Facts of a model.
#[derive(Debug, Clone)]
pub struct Facts {
    /// Name of its family.
    pub family: &'static str,
    /// Parameters.
    pub parameters: u64,
    /// Type most of its weights have.
    pub quantization: String,
}

impl Facts {
    /// Of an opened model.
    pub fn of(model: &PreparedModel) -> Self {
        let summary = model.model.summary();
        Facts { family: summary.family, parameters: summary.parameters as u64, quantization: summary.quantization.main_type().to_owned() }
    }
}

/// The text.
pub fn banner(shown: &Shown, addresses: &Addresses) -> String {
    let Shown { card, has_chat, plan, replicas, facts, context } = shown;
    let kv_bytes = plan.ranks.iter().map(|rank| rank.memory.kv_bytes).sum::<u64>();
    let weights_bytes = plan.ranks.iter().map(|rank| rank.memory.weights_bytes).sum::<u64>();
    let dtype = match plan.kv_cache_dtype {
        KvCacheDtype::F32 => "f32",
        KvCacheDtype::F16 => "f16",
        KvCacheDtype::Bf16 => "bf16",
        KvCacheDtype::Int8 => "int8",
    };
    let each = if *replicas > 1 { format!(", each of {replicas} replicas") } else { String::new() };
    let rows = [
        ("model", format!("{} ({}, {} parameters, {})", card.name, facts.family, short_count(facts.parameters), facts.quantization)),
        ("names", card.names.join(", ")),
        ("context", format!("{} tokens", card.max_model_len)),
        ("weights", format!("{}{each}", HumanBytes(weights_bytes))),
        ("KV memory", format!("{} ({} tokens in {dtype}){each}", HumanBytes(kv_bytes), plan.kv_blocks * plan.block_size)),
        ("API", format!("{}/v1", url(addresses.api))),
        ("metrics", format!("{}/metrics", url(addresses.metrics))),
        ("keys", if addresses.keys { "needed" } else { "none configured: any key is accepted" }.to_owned()),
        ("cluster", cluster(context)),
    ];
    let mut text = String::from("Ready.\n");
    for (name, value) in rows {
        text.push_str(&format!("  {name:10} {value}\n"));
    }
    // The default model has a name that is quick to type.
    let name = card.names.iter().find(|name| *name == DEFAULT_NAME).unwrap_or(&card.name);
    text + "\nTry it:\n" + &curl(addresses, name, *has_chat) + "\nCtrl-C stops it.\n"
}

/// How other commands reach the cluster.
fn cluster(context: &str) -> String {
    let commands = "forgectl get, describe, apply, scale, logs, top from another terminal";
    if context == LOCAL_CONTEXT {
        return commands.to_owned();
    }
    format!("{commands}, with --context {context}: {LOCAL_CONTEXT} is another forgectl serve")
}

/// A request to paste into a shell.
fn curl(addresses: &Addresses, model: &str, chat: bool) -> String {
    let (path, body) = match chat {
        true => {
            let messages = serde_json::json!([{"role": "user", "content": "Why is the sky blue?"}]);
            ("chat/completions", serde_json::json!({"model": model, "messages": messages, "max_tokens": 100, "temperature": 0.2}))
        }
        false => ("completions", serde_json::json!({"model": model, "prompt": "The sky is blue because", "max_tokens": 40})),
    };
    let key = if addresses.keys { " -H \"authorization: Bearer $OPENAI_API_KEY\"" } else { "" };
    // Within single quotes a shell takes everything as it is but the quote itself.
    let body = body.to_string().replace('\'', "'\\''");
    format!("  curl {}/v1/{path} -H 'content-type: application/json'{key} \\\n    -d '{body}'\n", url(addresses.api))
}

/// An address as a client on this machine writes it.
fn url(address: SocketAddr) -> String {
    let host = match address.ip() {
        ip if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        ip => ip,
    };
    format!("http://{}", SocketAddr::new(host, address.port()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_can_be_pasted() {
        let addresses = Addresses { api: ([0, 0, 0, 0], 8000).into(), metrics: ([127, 0, 0, 1], 9000).into(), keys: true };
        let text = curl(&addresses, "it's", true);
        assert!(text.contains("http://127.0.0.1:8000/v1/chat/completions"), "{text}");
        assert!(text.contains("\"model\":\"it'\\''s\""), "{text}");
        assert!(text.contains("Bearer $OPENAI_API_KEY"), "{text}");
        assert!(curl(&addresses, "m", false).contains("/v1/completions"));
    }
}
