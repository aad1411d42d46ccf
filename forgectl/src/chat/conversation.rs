//! What was said, and the prompt made of it.
//!
//! Invariant: a conversation ends with the model's answer between two calls; a message without one is taken back.

use forge_text::{ChatRender, ChatTemplate, Tokenizer};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Who said it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The person.
    User,
    /// The model.
    Assistant,
}

/// One message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who said it.
    pub role: Role,
    /// What.
    pub content: String,
}

/// The file of a saved conversation, and the conversation itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conversation {
    /// Model that was spoken to.
    pub model: String,
    /// Set before the first message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system: Option<String>,
    /// Messages, oldest first.
    pub messages: Vec<Message>,
}

impl Conversation {
    /// Adds what the person said.
    pub fn ask(&mut self, content: &str) {
        self.messages.push(Message { role: Role::User, content: content.to_owned() });
    }

    /// Adds the model's answer.
    pub fn answer(&mut self, content: &str) {
        self.messages.push(Message { role: Role::Assistant, content: content.to_owned() });
    }

    /// Takes a message back that got no answer.
    pub fn take_back(&mut self) {
        if self.messages.last().is_some_and(|message| message.role == Role::User) {
            self.messages.pop();
        }
    }

    /// Token ids of the prompt: by the model's chat template, or where it has none the last message as plain text to
    /// be continued. `now_unix_seconds` is the template's clock.
    ///
    /// # Errors
    /// The template's or the tokenizer's.
    pub fn prompt(&self, template: Option<&ChatTemplate>, tokenizer: &Tokenizer, now_unix_seconds: i64) -> forge_text::Result<Vec<u32>> {
        let Some(template) = template else {
            let text = self.messages.last().map_or("", |message| &message.content);
            return tokenizer.encode(text, true);
        };
        let messages = self.rendered();
        let request = ChatRender { messages: &messages, add_generation_prompt: true, now_unix_seconds, ..ChatRender::default() };
        tokenizer.encode(&template.render(&request)?, false)
    }

    fn rendered(&self) -> Vec<Value> {
        let system = self.system.iter().map(|text| json!({"role": "system", "content": text}));
        system.chain(self.messages.iter().map(|message| json!(message))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_render_in_order_after_the_system_message() {
        let mut conversation = Conversation { system: Some("Be brief.".into()), ..Default::default() };
        conversation.ask("Hi");
        conversation.answer("Hello");
        conversation.ask("Bye");
        let roles: Vec<String> = conversation.rendered().iter().map(|message| message["role"].to_string()).collect();
        assert_eq!(roles, ["\"system\"", "\"user\"", "\"assistant\"", "\"user\""]);
        conversation.take_back();
        conversation.take_back();
        assert_eq!(conversation.messages.len(), 2, "only a message without an answer is taken back");
    }

    #[test]
    fn a_saved_conversation_reads_back() {
        let mut conversation = Conversation { model: "m".into(), ..Default::default() };
        conversation.ask("Hi \"there\"\n\u{1F600}");
        let text = serde_json::to_string(&conversation).expect("plain data");
        assert_eq!(serde_json::from_str::<Conversation>(&text).expect("own output"), conversation);
        assert!(serde_json::from_str::<Conversation>("{\"model\":\"m\",\"messages\":[],\"x\":1}").is_err());
    }
}
