//! The keys of a `ModelService` specification: path, type, flag and variable of each, in one table.
//!
//! Invariant (tested): the table and [`crate::spec::ModelServiceSpec`] have the same keys.

use serde_json::{Value, json};

use crate::rollout::Portion;
use crate::spec::ByteSize;

/// What a key's value may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    Text,
    /// A whole number from 0 to `max`.
    Whole {
        /// Largest value its type holds; the range that makes sense is checked by the service.
        max: u64,
    },
    /// true or false.
    Switch,
    /// Bytes, such as `512MiB`.
    Size,
    /// A number of replicas, or a percentage of them.
    Portion,
    /// One of these words.
    Choice(&'static [&'static str]),
    /// Texts; separated by commas where one text holds all.
    List,
}

/// What a key is about: headings of the help, and which commands take its flag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// Which model, under which name.
    Model,
    /// How it runs on this machine.
    Engine,
    /// Where and how the API listens.
    Api,
    /// How it is spread over a cluster; files and `--set` only.
    Cluster,
}

/// One key.
#[derive(Debug, PartialEq, Eq)]
pub struct Key {
    /// Dotted path below `spec`, in camelCase.
    pub path: &'static str,
    /// Type of its value.
    pub kind: Kind,
    /// Whether it may be absent (`null`).
    pub optional: bool,
    /// What it is about.
    pub group: Group,
    /// One line for help and manual.
    pub help: &'static str,
}

const fn key(path: &'static str, kind: Kind, group: Group, help: &'static str) -> Key {
    Key { path, kind, optional: false, group, help }
}

const fn optional(path: &'static str, kind: Kind, group: Group, help: &'static str) -> Key {
    Key { path, kind, optional: true, group, help }
}

const COUNT: Kind = Kind::Whole { max: u32::MAX as u64 };
const PORT: Kind = Kind::Whole { max: u16::MAX as u64 };

/// Every key there is, in the order of the help.
pub static KEYS: &[Key] = {
    use Group::{Api, Cluster, Engine, Model};
    use Kind::{Choice, List, Portion, Size, Switch, Text};
    &[
        key("model", Text, Model, "Catalogue alias, hub id, https URL, path or pypi:PACKAGE"),
        optional("modelName", Text, Model, "Name in the API; the model's own by default"),
        optional("chatTemplate", Text, Model, "A Jinja file that replaces the model's own chat template"),
        optional("arch", Text, Model, "Family of the model, where its files do not say or say wrong, such as llama"),
        optional(
            "ropeScaling",
            Text,
            Model,
            "Context extension instead of the model's own, such as type=yarn,factor=4; types: default, linear, dynamic, yarn, llama3",
        ),
        optional("slidingWindow", COUNT, Model, "Sliding window in positions instead of the model's own; 0 is none"),
        optional("maxModelLen", COUNT, Engine, "Longest sequence in tokens; the model's context by default, less where memory is short"),
        key("kvCacheDtype", Choice(&["f32", "f16", "bf16", "int8"]), Engine, "Storage type of keys and values"),
        optional("kvMemory", Size, Engine, "Memory for keys and values, such as 2GiB; a share of free memory by default"),
        key("blockSize", COUNT, Engine, "Tokens per block of keys and values"),
        key("maxBatchSize", COUNT, Engine, "Sequences running at once"),
        key("maxStepTokens", COUNT, Engine, "Tokens computed in one step"),
        key("maxWaiting", COUNT, Engine, "Requests that may wait before 429"),
        key("prefixCache", Switch, Engine, "Compute equal beginnings of prompts once"),
        optional("threads", COUNT, Engine, "Threads that compute; all cores by default"),
        key("load", Choice(&["mmap", "eager"]), Engine, "Map weights and read them when needed, or read them at start"),
        key("checkWeights", Switch, Engine, "Refuse weights that hold a NaN or an infinity"),
        key("gateway.host", Text, Api, "Address to listen on; beyond loopback needs API keys or --insecure"),
        key("gateway.port", PORT, Api, "Port of the API; 0 picks a free one"),
        key("gateway.metricsHost", Text, Api, "Address of metrics and probes, which need no key; in a container 0.0.0.0"),
        key("gateway.metricsPort", PORT, Api, "Port of metrics and probes; 0 picks a free one"),
        key("gateway.insecure", Switch, Api, "Listen beyond loopback without API keys"),
        key("gateway.corsOrigins", List, Api, "Origins whose pages may call the API, comma-separated; * for any"),
        key("gateway.maxBody", Size, Api, "Largest request body"),
        key("gateway.requestTimeoutS", COUNT, Api, "Time a request has in all, seconds"),
        key("gateway.drainTimeoutS", COUNT, Api, "Time running requests have after SIGTERM, seconds"),
        key("gateway.maxChoices", COUNT, Api, "Most answers (n) of one request"),
        key("replicas", COUNT, Cluster, "Copies of the model"),
        key("layout.tensor", COUNT, Cluster, "Tensor-parallel ranks of a copy"),
        key("layout.pipeline", COUNT, Cluster, "Pipeline stages of a copy"),
        key("layout.expert", COUNT, Cluster, "Ranks that the experts of a copy are divided over"),
        key("rollout.maxUnavailable", Portion, Cluster, "Copies that may be missing while a change rolls, such as 1 or 25%"),
        key("rollout.maxSurge", Portion, Cluster, "New copies that may be loading beside the old ones, such as 1 or 25%"),
        key("rollout.progressDeadlineS", COUNT, Cluster, "Time without progress after which a change is said to be stuck, seconds"),
    ]
};

impl Key {
    /// The key of a path, exactly.
    pub fn by_path(path: &str) -> Option<&'static Key> {
        KEYS.iter().find(|key| key.path == path)
    }

    /// The key of a path or a flag's name, in camelCase, kebab-case or snake_case, perhaps with `spec.` before it.
    pub fn by_name(name: &str) -> Option<&'static Key> {
        let name = name.strip_prefix("spec.").unwrap_or(name);
        let name = name.split('.').map(camel_case).collect::<Vec<_>>().join(".");
        KEYS.iter().find(|key| key.path == name || camel_case(&key.flag()) == name)
    }

    /// Name of its flag, without dashes before it: `gateway.metricsPort` is `metrics-port`.
    pub fn flag(&self) -> String {
        let short = self.path.strip_prefix("gateway.").unwrap_or(self.path);
        let mut flag = String::with_capacity(short.len() + 4);
        for letter in short.chars() {
            match letter {
                '.' => flag.push('-'),
                upper if upper.is_ascii_uppercase() => flag.extend(['-', upper.to_ascii_lowercase()]),
                other => flag.push(other),
            }
        }
        flag
    }

    /// Name of its environment variable: `gateway.metricsPort` is `FORGE_METRICS_PORT`.
    pub fn variable(&self) -> String {
        format!("FORGE_{}", self.flag().to_ascii_uppercase().replace('-', "_"))
    }

    /// First segment of its path.
    pub(super) fn pointer_head(&self) -> &'static str {
        self.path.split('.').next().unwrap_or(self.path)
    }

    /// The value a text stands for, as variables and `--set` give it. `null` unsets an optional key.
    ///
    /// # Errors
    /// What the key takes instead.
    pub fn parse(&self, text: &str) -> Result<Value, String> {
        if self.optional && text == "null" {
            return Ok(Value::Null);
        }
        match self.kind {
            Kind::Text => Ok(json!(text)),
            Kind::Whole { max } => {
                let number = text.trim().parse::<u64>().ok().filter(|number| *number <= max);
                number.map(Value::from).ok_or_else(|| self.expected(&format!("{text:?}")))
            }
            Kind::Switch => switch(text).map(Value::from).ok_or_else(|| self.expected(&format!("{text:?}"))),
            Kind::Size => text.parse::<ByteSize>().map(|size| json!(size)),
            Kind::Portion => text.parse::<Portion>().map(|portion| json!(portion)),
            Kind::Choice(_) => self.check(&json!(text.trim().to_ascii_lowercase())),
            Kind::List => Ok(text.split(',').map(str::trim).filter(|part| !part.is_empty()).map(Value::from).collect()),
        }
    }

    /// A value as a document gives it, in the one form the specification is read from.
    ///
    /// YAML has several ways to write a value that is not what it looks like: `yes` is a text and `8e3` a float to
    /// readers of version 1.2. Where only one meaning is possible for the key it is taken, else refused with the remedy.
    ///
    /// # Errors
    /// What the key takes instead.
    pub fn check(&self, value: &Value) -> Result<Value, String> {
        let expected = || Err(self.expected(&describe(value)));
        match (self.kind, value) {
            (_, Value::Null) if self.optional => Ok(Value::Null),
            (Kind::Text, Value::String(_)) => Ok(value.clone()),
            (Kind::Text, Value::Number(_) | Value::Bool(_)) => Err(format!("{value} is not text; put it in quotes: \"{value}\"")),
            (Kind::Whole { max }, _) => match whole(value).filter(|number| *number <= max) {
                Some(number) => Ok(json!(number)),
                None => expected(),
            },
            (Kind::Switch, Value::Bool(_)) => Ok(value.clone()),
            (Kind::Switch, Value::String(text)) => switch(text).map_or_else(expected, |on| Ok(json!(on))),
            (Kind::Size, Value::String(text)) => text.parse::<ByteSize>().map(|size| json!(size)),
            (Kind::Portion, Value::String(text)) => text.parse::<Portion>().map(|portion| json!(portion)),
            (Kind::Portion, _) => {
                whole(value).filter(|count| *count <= u64::from(u32::MAX)).map_or_else(expected, |count| Ok(json!(count)))
            }
            (Kind::Size, _) => whole(value).map_or_else(expected, |bytes| Ok(json!(bytes))),
            (Kind::Choice(words), Value::String(text)) if words.contains(&text.as_str()) => Ok(value.clone()),
            (Kind::List, Value::Array(items)) if items.iter().all(Value::is_string) => Ok(value.clone()),
            (Kind::List, Value::String(_)) => Ok(json!([value])),
            _ => expected(),
        }
    }

    fn expected(&self, found: &str) -> String {
        match self.kind {
            Kind::Text => format!("expected text, found {found}"),
            // The largest that the type holds says nothing to anybody.
            Kind::Whole { max } if max == u64::from(u32::MAX) => format!("expected a whole number, 0 or more, such as 4, found {found}"),
            Kind::Whole { max } => format!("expected a whole number from 0 to {max}, found {found}"),
            Kind::Switch => format!("expected true or false, found {found}"),
            Kind::Size => format!("expected a size such as 512MiB, found {found}"),
            Kind::Portion => format!("expected a number of replicas or a percentage such as 25%, found {found}"),
            Kind::Choice(words) => format!("expected one of {}, found {found}", words.join(", ")),
            Kind::List => format!("expected a list of texts, found {found}"),
        }
    }
}

/// A number without a fraction; floats count where they are exact (`2e9`).
fn whole(value: &Value) -> Option<u64> {
    const EXACT: f64 = (1u64 << 53) as f64;
    let float = value.as_f64().filter(|number| number.fract() == 0.0 && (0.0..=EXACT).contains(number));
    value.as_u64().or(float.map(|number| number as u64))
}

fn switch(text: &str) -> Option<bool> {
    match text.trim().to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Some(true),
        "false" | "no" | "off" | "0" => Some(false),
        _ => None,
    }
}

fn describe(value: &Value) -> String {
    match value {
        Value::Null => "nothing".into(),
        Value::String(text) => format!("the text {text:?}"),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "a group of keys".into(),
        other => other.to_string(),
    }
}

fn camel_case(name: &str) -> String {
    let mut camel = String::with_capacity(name.len());
    let mut raise = false;
    for letter in name.chars() {
        match letter {
            '-' | '_' if !camel.is_empty() => raise = true,
            letter if raise => {
                camel.push(letter.to_ascii_uppercase());
                raise = false;
            }
            letter => camel.push(letter),
        }
    }
    camel
}
