//! The replicas a gateway has dialed, each looked after by a task: it fetches the model's text parts once the replica
//! can answer, and keeps the index of its cached prompt blocks.
//!
//! Which are dialed and served is the [`Roster`]'s decision; this dials and fetches.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use forge_cluster::engine::{EngineDialer, EngineTarget, ReplicaClient};
use forge_shared::ids::Epoch;
use forge_text::ModelText;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::Wanted;
use super::roster::{Dialed, Roster, version};
use crate::gateway::{ReplicaPrefixes, ServedModel, ServedReplica};

/// For fetching tokenizer and template, some megabytes.
const TEXT_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two tries to fetch them.
const TEXT_RETRY: Duration = Duration::from_millis(500);

/// See the module documentation.
pub(super) struct Replicas {
    roster: Roster<Watched>,
    dialing: Dialing,
}

/// What is needed to dial.
struct Dialing {
    dialer: Arc<dyn EngineDialer>,
    texts: Arc<Shared<ModelText>>,
    built: Option<FindText>,
    changed: Arc<Notify>,
}

/// Text parts that are built already, of replicas in this process.
pub type FindText = Arc<dyn Fn(&EngineTarget) -> Option<ModelText> + Send + Sync>;

/// Models' text parts by digest: replicas of one model share them, and with the last of these replicas they go.
struct Shared<T>(Mutex<HashMap<String, Weak<T>>>);

impl<T> Default for Shared<T> {
    fn default() -> Self {
        Shared(Mutex::default())
    }
}

impl<T> Shared<T> {
    fn get(&self, digest: &str) -> Option<Arc<T>> {
        self.0.lock().get(digest)?.upgrade()
    }

    fn keep(&self, digest: String, text: T) -> Arc<T> {
        let text = Arc::new(text);
        let mut kept = self.0.lock();
        kept.retain(|_, kept| kept.strong_count() > 0);
        kept.insert(digest, Arc::downgrade(&text));
        text
    }
}

/// A dialed replica and the task that looks after it.
struct Watched {
    served: Arc<Mutex<Option<ServedReplica>>>,
    task: JoinHandle<()>,
}

impl Dialed for Watched {
    fn served(&self) -> Option<ServedReplica> {
        self.served.lock().clone()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Replicas {
    /// None yet. `changed` is told whenever [`Replicas::served`] may have.
    pub(super) fn new(dialer: Arc<dyn EngineDialer>, built: Option<FindText>, changed: Arc<Notify>) -> Self {
        Replicas { roster: Roster::default(), dialing: Dialing { dialer, texts: Arc::default(), built, changed } }
    }

    /// Dials what is wanted and not dialed, and lets go of the rest.
    pub(super) fn reconcile(&mut self, wanted: &[Wanted]) {
        self.roster.reconcile(wanted, |Wanted { key, target }| {
            tracing::info!(replica = key, node = %target.node, address = target.address, epoch = target.epoch.0, "replica dialed");
            self.dialing.dial(key.clone(), target.clone())
        });
    }

    /// Replicas that can be served, by name.
    pub(super) fn served(&self) -> Vec<ServedReplica> {
        self.roster.served()
    }
}

impl Dialing {
    fn dial(&self, key: String, target: EngineTarget) -> Watched {
        let served = Arc::new(Mutex::new(None));
        let (texts, changed, slot) = (self.texts.clone(), self.changed.clone(), served.clone());
        let client = self.dialer.dial(target.clone());
        let name = Name { key, service: target.replica.service.0.clone(), epoch: target.epoch };
        let built = self.built.clone();
        let find = move || built.as_ref().and_then(|find| find(&target));
        let task = tokio::spawn(look_after(name, client, (texts, find), slot, changed));
        Watched { served, task }
    }
}

/// What a replica is called.
struct Name {
    key: String,
    service: String,
    epoch: Epoch,
}

async fn look_after(
    Name { key, service, epoch }: Name,
    client: Arc<dyn ReplicaClient>,
    (texts, built): (Arc<Shared<ModelText>>, impl Fn() -> Option<ModelText>),
    slot: Arc<Mutex<Option<ServedReplica>>>,
    changed: Arc<Notify>,
) {
    // Held as long as this task lives: what other replicas of this model share.
    let (text, version) = model_text(&key, &*client, &texts, built).await;
    let prefixes = ReplicaPrefixes::default();
    let model =
        ServedModel { link: client.clone(), tokenizer: text.tokenizer().clone(), chat_template: text.chat_template().ok().cloned() };
    *slot.lock() = Some(ServedReplica { model, service, key, version, epoch, prefixes: Some(prefixes.clone()) });
    changed.notify_one();
    loop {
        let mut updates = client.prefixes();
        while let Some(update) = updates.recv().await {
            prefixes.block_size.store(client.block_size(), Ordering::Relaxed);
            prefixes.index.lock().apply(&update);
        }
        tokio::time::sleep(TEXT_RETRY).await;
    }
}

/// The model's text parts, once the replica can answer, and their digest with what else makes two models differ.
async fn model_text(
    key: &str,
    client: &dyn ReplicaClient,
    texts: &Shared<ModelText>,
    built: impl Fn() -> Option<ModelText>,
) -> (Arc<ModelText>, String) {
    loop {
        while !client.status().ready {
            client.changed().await;
        }
        let card = client.card();
        match client.model_text(TEXT_TIMEOUT).await {
            Err(error) => tracing::warn!(replica = key, %error, "the model's tokenizer was not fetched; trying again"),
            Ok(bytes) => {
                let digest = hex::encode(Sha256::digest(&bytes));
                let version = version(&digest, &card);
                if let Some(text) = texts.get(&digest) {
                    return (text, version);
                }
                if let Some(text) = built() {
                    return (texts.keep(digest, text), version);
                }
                // Building a tokenizer takes tens of milliseconds and more.
                match tokio::task::spawn_blocking(move || ModelText::from_portable(&bytes)).await {
                    Ok(Ok(text)) => return (texts.keep(digest, text), version),
                    Ok(Err(error)) => tracing::error!(replica = key, %error, "the replica's tokenizer cannot be used"),
                    Err(error) => tracing::error!(replica = key, %error, "building the tokenizer died"),
                }
            }
        }
        tokio::time::sleep(TEXT_RETRY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_models_text_goes_with_its_last_replica() {
        let texts = Shared::default();
        let first = texts.keep("a".into(), "text");
        assert!(texts.get("a").is_some_and(|second| Arc::ptr_eq(&first, &second)));
        for number in 0..100 {
            texts.keep(number.to_string(), "of a replica that is gone");
        }
        assert!(texts.0.lock().len() <= 2, "what nobody serves is not kept");
        drop(first);
        assert!(texts.get("a").is_none());
    }
}
