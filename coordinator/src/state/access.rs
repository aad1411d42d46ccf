//! Who may come in: join tokens and API keys.
//!
//! Invariant: a secret is never here, only its hash; a token lets in as many nodes as it says, in its life, of its role.
//! A token that is used up stays known for its life, so that who was let in and did not hear it can ask again.

use forge_shared::cluster::command::{ApiKeyRecord, CommandError, JoinToken};
use forge_shared::cluster::event::{Change, Kind, Object};
use forge_shared::cluster::node::Role;
use serde::{Deserialize, Serialize};

use super::clock::Clock;
use super::notices::Weight;
use super::{ClusterState, Effect, MAX_KEYS, MAX_TOKEN_LIFE_MS, MAX_TOKEN_USES, MAX_TOKENS, Step, checks};

/// A token and the end of its life by the state's own count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct KeptToken {
    pub token: JoinToken,
    pub ends_elapsed_ms: u64,
}

impl KeptToken {
    pub fn is_over(&self, clock: &Clock) -> bool {
        clock.elapsed_ms() >= self.ends_elapsed_ms
    }
}

impl ClusterState {
    pub(super) fn put_token(&mut self, token: &JoinToken, step: &mut Step) -> Result<Effect, CommandError> {
        checks::label("token.id", &token.id)?;
        checks::hex("token.secretSha256", &token.secret_sha256, 64)?;
        if !(1..=MAX_TOKEN_USES).contains(&token.uses_left) {
            return checks::invalid("token.usesLeft", format!("must be between 1 and {MAX_TOKEN_USES}, got {}", token.uses_left));
        }
        // Both times are wall clocks: whose token is born dead has a clock that is behind the leader's.
        let life_ms = token.expires_ms.saturating_sub(self.clock.last_ms());
        if life_ms == 0 || life_ms > MAX_TOKEN_LIFE_MS {
            let days = MAX_TOKEN_LIFE_MS / 86_400_000;
            let reason = format!(
                "must lie within {days} days after the leader's clock ({} ms since 1970); compare the clocks",
                self.clock.last_ms()
            );
            return checks::invalid("token.expiresMs", reason);
        }
        // One that is used up is kept for those who ask again after an answer was lost, and makes room for others.
        if let Some(known) = self.tokens.get(&token.id).filter(|known| known.token.uses_left > 0) {
            if known.token == *token {
                return Ok(Effect::NONE);
            }
            let reason = "it exists already: choose another id, or remove it first".to_owned();
            return Err(CommandError::Conflict { kind: "join token".into(), name: token.id.clone(), reason });
        }
        let open = self.tokens.values().filter(|kept| kept.token.uses_left > 0 && !kept.is_over(&self.clock)).count();
        checks::bounded("join tokens", open, MAX_TOKENS)?;
        self.clear_tokens(step);
        if self.tokens.len() >= MAX_TOKENS && !self.tokens.contains_key(&token.id) {
            let used = self.tokens.iter().filter(|(_, kept)| kept.token.uses_left == 0);
            let soonest = used.min_by_key(|(_, kept)| kept.ends_elapsed_ms).map(|(id, _)| id.clone());
            if let Some(id) = soonest {
                self.tokens.remove(&id);
                step.changes.push(Change::Deleted { kind: Kind::Token, name: id });
            }
        }
        let kept = KeptToken { token: token.clone(), ends_elapsed_ms: self.clock.elapsed_ms().saturating_add(life_ms) };
        self.tokens.insert(token.id.clone(), kept);
        step.changes.push(Change::Put { object: Object::Token(token.clone()) });
        Ok(Effect::CHANGED)
    }

    pub(super) fn use_token(&mut self, id: &str, role: Role, node: &str, step: &mut Step) -> Result<Effect, CommandError> {
        checks::label("node", node)?;
        let refuse = |reason: String| Err(CommandError::Token { reason });
        let help = "make one with `forgectl cluster join-token`";
        let Some(kept) = self.tokens.get_mut(id) else {
            return refuse(format!("it is unknown or was taken back; {help}"));
        };
        if kept.is_over(&self.clock) {
            return refuse(format!("its time is over; {help}"));
        }
        if kept.token.role != role {
            return refuse(format!("it lets in a {}, not a {role}; {help} for that role", kept.token.role));
        }
        if kept.token.uses_left == 0 {
            return refuse(format!("it is used up; {help}"));
        }
        kept.token.uses_left -= 1;
        step.changes.push(Change::Put { object: Object::Token(kept.token.clone()) });
        self.clear_tokens(step);
        let message = format!("join token {id} let in the {role} {node}");
        self.notice(step, Weight::Normal, "TokenUsed", format!("node/{node}"), message);
        Ok(Effect::CHANGED)
    }

    pub(super) fn remove_token(&mut self, id: &str, step: &mut Step) -> Result<Effect, CommandError> {
        if self.tokens.remove(id).is_none() {
            return Err(checks::not_found("join token", id, self.tokens.keys().map(String::as_str)));
        }
        step.changes.push(Change::Deleted { kind: Kind::Token, name: id.to_owned() });
        Ok(Effect::CHANGED)
    }

    fn clear_tokens(&mut self, step: &mut Step) {
        let clock = &self.clock;
        self.tokens.retain(|id, kept| {
            let is_over = kept.is_over(clock);
            if is_over {
                step.changes.push(Change::Deleted { kind: Kind::Token, name: id.clone() });
            }
            !is_over
        });
    }

    pub(super) fn put_key(&mut self, key: &ApiKeyRecord, step: &mut Step) -> Result<Effect, CommandError> {
        checks::name("key.name", &key.name)?;
        checks::name("key.id", &key.id)?;
        checks::hex("key.salt", &key.salt, 32)?;
        checks::hex("key.hash", &key.hash, 64)?;
        if let Some(other) = self.keys.values().find(|other| other.id == key.id && other.name != key.name) {
            let reason = format!("it is the key {:?}; make a new key", other.name);
            return Err(CommandError::Conflict { kind: "key id".into(), name: key.id.clone(), reason });
        }
        match self.keys.get(&key.name) {
            Some(known) if known == key => return Ok(Effect::NONE),
            Some(known) if (&known.id, &known.salt, &known.hash) != (&key.id, &key.salt, &key.hash) => {
                let reason = "it exists already, with another secret; choose another name".to_owned();
                return Err(CommandError::Conflict { kind: "key".into(), name: key.name.clone(), reason });
            }
            Some(known) if known.revoked_s.is_some() && key.revoked_s.is_none() => {
                let reason = "it was revoked for good; make a new key".to_owned();
                return Err(CommandError::Conflict { kind: "key".into(), name: key.name.clone(), reason });
            }
            Some(_) => {}
            None => checks::bounded("keys", self.keys.len(), MAX_KEYS)?,
        }
        self.keys.insert(key.name.clone(), key.clone());
        step.changes.push(Change::Put { object: Object::Key(Box::new(key.clone())) });
        Ok(Effect::CHANGED)
    }

    pub(super) fn revoke_key(&mut self, name: &str, step: &mut Step) -> Result<Effect, CommandError> {
        let now_s = self.clock.latest_ms() / 1_000;
        if !self.keys.contains_key(name) {
            return Err(checks::not_found("key", name, self.keys.keys().map(String::as_str)));
        }
        let Some(key) = self.keys.get_mut(name).filter(|key| key.revoked_s.is_none()) else { return Ok(Effect::NONE) };
        key.revoked_s = Some(now_s);
        step.changes.push(Change::Put { object: Object::Key(Box::new(key.clone())) });
        self.notice(step, Weight::Normal, "KeyRevoked", format!("key/{name}"), format!("key {name} was revoked"));
        Ok(Effect::CHANGED)
    }
}
