//! Entry points for fuzzing what callers send: decoded and checked as the services do it, and applied to a state.
//!
//! Invariant kept by them: taken or refused as a status with words, never a panic; whatever is applied keeps the state's
//! rules; nobody speaks for another name than its certificate's.

use std::sync::LazyLock;

use forge_cluster::tls::{ClusterCa, Identity, NODE_LIFETIME};
use forge_proto::cluster::{ExecuteRequest, LogsRequest, PlanRequest, ReadRequest, WatchRequest};
use forge_proto::node::{JoinRequest, SessionUp};
use forge_shared::cluster::command::Command;
use forge_shared::cluster::node::Role;
use forge_shared::cluster::session::NodeUp;
use forge_shared::ids::NodeId;
use forge_shared::spec::ModelService;
use prost::Message;
use tonic::Status;

use super::admission::named_role;
use super::call::json;
use super::cluster::parse_kind;
use super::logs::named_replica;
use super::nodes::hello_of;
use crate::access;
use crate::control::{ShareTable, plan_service};
use crate::state::Fuzzed;

/// The start of a certificate authority is the costly part.
static CA: LazyLock<Option<ClusterCa>> = LazyLock::new(|| ClusterCa::create("fuzz", 1_700_000_000).ok());

/// A request of an operator, a program or a process that wants in: a letter that says which (`e`xecute, `r`ead, `w`atch,
/// `p`lan, `l`ogs, `j`oin), and the message's bytes.
///
/// # Panics
/// On a defect.
pub fn fuzz_request(bytes: &[u8]) {
    let Some((which, message)) = bytes.split_first() else { return };
    let taken = match which {
        b'e' => execute(message),
        b'r' => decode::<ReadRequest>(message).and_then(|request| parse_kind(&request.kind).map(drop)),
        b'w' => decode::<WatchRequest>(message).and_then(|request| request.kinds.iter().try_for_each(|kind| parse_kind(kind).map(drop))),
        b'p' => plan(message),
        b'l' => decode::<LogsRequest>(message).and_then(|request| named_replica(&request.target).map(drop).map_err(super::call::refuse)),
        b'j' => join(message),
        _ => return,
    };
    if let Err(status) = taken {
        assert!(!status.message().is_empty(), "a refusal without words: {status:?}");
    }
}

fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, Status> {
    // As the transport answers bytes that are no message.
    M::decode(bytes).map_err(|error| Status::internal(error.to_string()))
}

fn execute(bytes: &[u8]) -> Result<(), Status> {
    let ExecuteRequest { request_id, command_json } = decode(bytes)?;
    let command: Command = json("command_json", &command_json)?;
    let may = |role| access::may_execute(role, &command).is_ok();
    assert!(!may(Role::Worker) && !may(Role::Coordinator), "{command:?} is taken from everybody");
    if may(Role::Admin) || may(Role::Gateway) {
        Fuzzed::begin().apply(&request_id, command);
    }
    Ok(())
}

fn plan(bytes: &[u8]) -> Result<(), Status> {
    let request: PlanRequest = decode(bytes)?;
    let service: ModelService = json("service_json", &request.service_json)?;
    let fuzzed = Fuzzed::begin();
    // Either a plan or a refusal; both were made for a state that stands.
    drop(plan_service(fuzzed.state(), &service, &fuzzed.facts()));
    Ok(())
}

fn join(bytes: &[u8]) -> Result<(), Status> {
    let request: JoinRequest = decode(bytes)?;
    let role = named_role(&request).map_err(super::call::refuse)?;
    let wrong = |error: forge_cluster::tls::TlsError| Status::invalid_argument(error.to_string());
    let Some(ca) = CA.as_ref() else { return Ok(()) };
    let identity = Identity::new("fuzz", role, &request.name).map_err(wrong)?;
    let signed = ca.sign(&request.signing_request_der, &identity, NODE_LIFETIME, 1_700_000_000).map_err(wrong)?;
    assert_eq!(forge_cluster::tls::fuzz::identity_in(&signed), Some(identity), "a certificate for another");
    Ok(())
}

/// Lines of JSON: what the worker `w1` says in its session, the first of them its hello.
///
/// # Panics
/// On a defect.
pub fn fuzz_session(bytes: &[u8]) {
    let mut lines = bytes.split(|&byte| byte == b'\n').take(64);
    let Ok(caller) = Identity::new("fuzz", Role::Worker, "w1") else { return };
    let first = lines.next().map(|line| SessionUp { message_json: line.to_vec().into() });
    let Ok(hello) = hello_of(first, &caller) else { return };
    assert_eq!((hello.id.0.as_str(), hello.role), ("w1", Role::Worker), "it speaks for another");
    let (node, incarnation) = (hello.id.clone(), hello.incarnation);
    let mut fuzzed = Fuzzed::begin();
    if !fuzzed.apply("hello", Command::JoinNode { spec: Box::new(hello) }) {
        return;
    }
    let gateway = NodeId::from("g1");
    let mut shares = ShareTable::new();
    shares.begin(&gateway);
    for (number, line) in lines.enumerate() {
        let Ok(message) = json::<NodeUp>("message_json", line) else { continue };
        let id = format!("line-{number}");
        match message {
            NodeUp::Replica { report } => {
                fuzzed.apply(&id, Command::ReportReplica { node: node.clone(), incarnation, report: *report });
            }
            NodeUp::Inspected { result, .. } => {
                fuzzed.apply(&id, Command::RecordFacts { name: "demo".into(), generation: 1, facts: result });
            }
            NodeUp::Heartbeat { usage, .. } => {
                shares.heard(&gateway, &usage);
                drop(shares.grant(fuzzed.state(), &gateway));
            }
            NodeUp::Goodbye => {
                fuzzed.apply(&id, Command::LoseNode { node: node.clone(), incarnation, reason: "it said good-bye".into() });
            }
            // Says nothing that is written down.
            NodeUp::Busy { .. } => {}
            NodeUp::Hello { .. } => return,
        }
    }
}
