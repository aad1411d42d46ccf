//! Events: what a watcher of the cluster sees, in the order of the log.

use serde::{Deserialize, Serialize};

use super::Revision;
use super::certificate::{CertificateRecord, Trust};
use super::command::{ApiKeyRecord, JoinToken, MemberRecord};
use super::node::NodeRecord;
use super::service::ServiceRecord;

/// Kind of an object that can be listed and watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// [`NodeRecord`].
    Node,
    /// [`ServiceRecord`].
    Service,
    /// [`ApiKeyRecord`].
    Key,
    /// [`MemberRecord`].
    Member,
    /// [`JoinToken`].
    Token,
    /// [`Notice`]: what happened, in words, for `forgectl get events`.
    Notice,
    /// [`CertificateRecord`].
    Certificate,
    /// [`Trust`]: there is one.
    Trust,
}

/// An object of the state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", tag = "kind", content = "object")]
pub enum Object {
    /// A node.
    Node(Box<NodeRecord>),
    /// A service with its replicas.
    Service(Box<ServiceRecord>),
    /// An API key.
    Key(Box<ApiKeyRecord>),
    /// A coordinator.
    Member(MemberRecord),
    /// A join token.
    Token(JoinToken),
    /// Something that happened.
    Notice(Notice),
    /// A certificate.
    Certificate(Box<CertificateRecord>),
    /// What every process believes.
    Trust(Box<Trust>),
}

impl Object {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Object::Node(_) => Kind::Node,
            Object::Service(_) => Kind::Service,
            Object::Key(_) => Kind::Key,
            Object::Member(_) => Kind::Member,
            Object::Token(_) => Kind::Token,
            Object::Notice(_) => Kind::Notice,
            Object::Certificate(_) => Kind::Certificate,
            Object::Trust(_) => Kind::Trust,
        }
    }

    /// Its name, unique within its kind.
    pub fn name(&self) -> String {
        match self {
            Object::Node(node) => node.spec.id.0.clone(),
            Object::Service(service) => service.service.metadata.name.clone(),
            Object::Key(key) => key.name.clone(),
            Object::Member(member) => member.name.clone(),
            Object::Token(token) => token.id.clone(),
            Object::Notice(notice) => notice.number.to_string(),
            Object::Certificate(certificate) => certificate.serial.clone(),
            Object::Trust(_) => Trust::NAME.to_owned(),
        }
    }
}

/// One change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase", tag = "change", deny_unknown_fields)]
#[expect(missing_docs, reason = "each variant is described; its fields' names and types say the rest")]
pub enum Change {
    /// The object is now so.
    Put { object: Object },
    /// It is gone.
    Deleted { kind: Kind, name: String },
}

/// A change and where in the history it stands. Several changes of one entry share a revision; a watcher that resumes
/// after a revision has seen all of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Event {
    /// When.
    pub revision: Revision,
    /// What.
    pub change: Change,
}

/// Something that happened, in words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Notice {
    /// Counts the cluster's notices; its name. The oldest are forgotten without an event.
    pub number: u64,
    /// When in the history.
    pub revision: Revision,
    /// The state's time, milliseconds since 1970.
    pub at_ms: u64,
    /// Whether an operator should look.
    pub is_warning: bool,
    /// One word for filters: `NodeLost`, `ReplicaPlaced`, `ReplicaReady`, `ReplicaFailed`, `NotPlaceable` …
    pub reason: String,
    /// Whom it is about, as `node/NAME`, `service/NAME`, `replica/NAME/INDEX`.
    pub about: String,
    /// A sentence.
    pub message: String,
}
