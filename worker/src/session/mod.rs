//! `Session`: this node's tie to the coordinators. A shell around [`SessionCore`].
//!
//! It runs on a thread and a runtime of its own: nothing that a model does can hold up a heartbeat. It decides nothing:
//! assignments go to the node's actor, reports come from there.
//!
//! Invariant: it ends only when it is told to, or when the cluster refuses this node.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forge_cluster::api::{ClusterApi, ClusterError, Session as ClusterSession};
use forge_cluster::session::{SessionAction, SessionCore, SessionInput};
use forge_shared::cluster::node::{NodeLoad, NodeSpec};
use forge_shared::cluster::session::{NodeDown, NodeUp};
use forge_shared::plan::ModelFacts;
use forge_shared::spec::ModelService;
use forge_shared::telemetry::{Metrics, SessionLabel};
use futures::future::{BoxFuture, FutureExt, OptionFuture};
use ractor::ActorRef;
use tokio::sync::{mpsc, oneshot, watch};

use crate::WorkerError;
use crate::actors::NodeMessage;

/// For a connection and its hello: the first coordinator that is asked may take half of it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(6);
/// For the question whether the group lives.
const STATUS_TIMEOUT: Duration = Duration::from_secs(1);
/// Messages that wait for a connection with room; the oldest go first.
const PENDING_MAX: usize = 4096;
/// Models looked at together.
const INSPECTIONS_MAX: usize = 2;

/// Makes the way to the coordinators, on the session's own thread and runtime.
pub type ConnectCluster = Box<dyn FnOnce() -> Result<Arc<dyn ClusterApi>, ClusterError> + Send>;
/// Says what this node is doing; must not block.
pub type ReadLoad = Arc<dyn Fn() -> NodeLoad + Send + Sync>;
/// Looks at a service's model; blocking.
pub type InspectModel = Arc<dyn Fn(&ModelService) -> Result<ModelFacts, String> + Send + Sync>;

/// What a session is made of.
pub struct SessionOptions {
    /// Of the hello.
    pub spec: NodeSpec,
    /// The coordinators.
    pub connect: ConnectCluster,
    /// Who carries assignments out.
    pub node: ActorRef<NodeMessage>,
    /// For heartbeats.
    pub load: ReadLoad,
    /// For questions about models.
    pub inspect: InspectModel,
}

/// Where the tie to the coordinators stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum SessionState {
    /// Looking for a leader; what was assigned goes on.
    #[default]
    Connecting,
    /// A leader has this node.
    Welcome,
    /// The cluster has given this node up; it serves nothing until it is taken in again.
    Expired,
}

impl SessionState {
    /// Writes which one it is.
    pub fn observe(self, metrics: &Metrics) {
        for (state, name) in [(Self::Connecting, "connecting"), (Self::Welcome, "welcome"), (Self::Expired, "expired")] {
            metrics.session.get_or_create(&SessionLabel { state: name.to_owned() }).set(i64::from(state == self));
        }
    }
}

/// A running session.
pub struct Session {
    up: mpsc::UnboundedSender<NodeUp>,
    goodbye: oneshot::Sender<()>,
    ended: oneshot::Receiver<Result<(), WorkerError>>,
    state: watch::Receiver<SessionState>,
}

impl Session {
    /// Begins to connect, for ever.
    ///
    /// # Errors
    /// The system gives no thread.
    pub fn start(options: SessionOptions) -> Result<Self, WorkerError> {
        let (up, reports) = mpsc::unbounded_channel();
        let (goodbye, stop) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        let (state_sender, state) = watch::channel(SessionState::default());
        let failed = |error: std::io::Error| WorkerError::Actor { actor: "session", reason: error.to_string() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
        std::thread::Builder::new()
            .name("forge-session".into())
            .spawn(move || {
                let result = runtime.block_on(async {
                    let SessionOptions { spec, connect, node, load, inspect } = options;
                    let api = connect().map_err(|error| WorkerError::Cluster { reason: error.to_string() })?;
                    Shell::new(Parts { spec, api, node, load, inspect, state: state_sender }).run(reports, stop).await
                });
                // Nobody may be waiting.
                let _ = end.send(result);
            })
            .map_err(failed)?;
        Ok(Session { up, goodbye, ended, state })
    }

    /// A way to send reports to the leader; what no leader hears is said again when one does.
    pub fn reports(&self) -> mpsc::UnboundedSender<NodeUp> {
        self.up.clone()
    }

    /// Where it stands.
    pub fn state(&self) -> watch::Receiver<SessionState> {
        self.state.clone()
    }

    /// Waits for its end, which comes only where the cluster refuses this node.
    pub async fn refused(&mut self) -> WorkerError {
        match (&mut self.ended).await {
            Ok(Err(error)) => error,
            Ok(Ok(())) | Err(_) => WorkerError::Actor { actor: "session", reason: "it ended by itself".into() },
        }
    }

    /// Says good-bye, so that no lease needs to be waited for. Bounded by `timeout`.
    pub async fn goodbye(self, timeout: Duration) {
        // A session that has ended has nobody to say it to, and may have told its end already.
        if self.goodbye.send(()).is_ok() {
            let _ = tokio::time::timeout(timeout, self.ended).await;
        }
    }
}

struct Parts {
    spec: NodeSpec,
    api: Arc<dyn ClusterApi>,
    node: ActorRef<NodeMessage>,
    load: ReadLoad,
    inspect: InspectModel,
    state: watch::Sender<SessionState>,
}

struct Shell {
    parts: Parts,
    core: SessionCore,
    started: Instant,
    link: Option<ClusterSession>,
    connecting: Option<BoxFuture<'static, Result<ClusterSession, ClusterError>>>,
    asking: Option<BoxFuture<'static, bool>>,
    pending: VecDeque<NodeUp>,
    inspections: Arc<tokio::sync::Semaphore>,
    inspected: mpsc::UnboundedSender<NodeUp>,
    answers: mpsc::UnboundedReceiver<NodeUp>,
}

impl Shell {
    fn new(parts: Parts) -> Self {
        let (inspected, answers) = mpsc::unbounded_channel();
        // Different for each node, the same for each start.
        let jitter = parts.spec.id.0.bytes().fold(17_u64, |sum, byte| sum.wrapping_mul(31).wrapping_add(u64::from(byte)));
        Shell {
            parts,
            core: SessionCore::new(jitter),
            started: Instant::now(),
            link: None,
            connecting: None,
            asking: None,
            pending: VecDeque::new(),
            inspections: Arc::new(tokio::sync::Semaphore::new(INSPECTIONS_MAX)),
            inspected,
            answers,
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    async fn run(mut self, mut reports: mpsc::UnboundedReceiver<NodeUp>, mut stop: oneshot::Receiver<()>) -> Result<(), WorkerError> {
        loop {
            // Rounded up: a tick before its time would find nothing to do.
            let wait = Duration::from_millis(self.core.next_tick_ms().saturating_sub(self.now_ms()).saturating_add(1)).min(CONNECT_TIMEOUT);
            let input = tokio::select! {
                biased;
                _ = &mut stop => return self.leave().await,
                () = tokio::time::sleep(wait) => Some(SessionInput::Tick),
                Some(connected) = OptionFuture::from(self.connecting.as_mut()) => {
                    self.connecting = None;
                    Some(self.connected(connected))
                }
                Some(is_alive) = OptionFuture::from(self.asking.as_mut()) => {
                    self.asking = None;
                    Some(SessionInput::Group { is_alive })
                }
                Some(message) = OptionFuture::from(self.link.as_mut().map(|link| link.down.recv())) => self.heard(message),
                Some(report) = reports.recv() => self.keep(report),
                Some(answer) = self.answers.recv() => self.keep(answer),
            };
            if let Some(input) = input {
                let was_welcome = self.core.is_welcome();
                let actions = self.core.handle(self.now_ms(), input);
                if self.core.is_welcome() && !was_welcome {
                    self.parts.state.send_replace(SessionState::Welcome);
                    tracing::info!("the leader has this node");
                    self.tell(NodeMessage::Connected)?;
                }
                for action in actions {
                    self.act(action)?;
                }
                if was_welcome && !self.core.is_welcome() {
                    tracing::warn!("the session with the leader is lost; replicas go on while another is looked for");
                    self.parts.state.send_if_modified(|state| std::mem::replace(state, SessionState::Connecting) == SessionState::Welcome);
                }
            }
            self.flush();
        }
    }

    fn connected(&mut self, connected: Result<ClusterSession, ClusterError>) -> SessionInput {
        match connected {
            Ok(session) => {
                self.link = Some(session);
                self.pending.clear();
                SessionInput::Connected(true)
            }
            // Nothing changes by itself: a certificate or an address is wrong.
            Err(error @ ClusterError::Forbidden { .. }) => {
                tracing::warn!(%error, "the coordinators do not take this worker");
                SessionInput::Connected(false)
            }
            Err(error) => {
                tracing::info!(%error, "no session with a leader yet");
                SessionInput::Connected(false)
            }
        }
    }

    fn heard(&mut self, message: Option<NodeDown>) -> Option<SessionInput> {
        match message {
            None => {
                self.link = None;
                Some(SessionInput::Closed)
            }
            Some(NodeDown::Welcome { lease_ms, heartbeat_ms }) => Some(SessionInput::Welcome { lease_ms, heartbeat_ms }),
            Some(NodeDown::Refused { reason }) => Some(SessionInput::Refused { reason }),
            // Shares of keys are gateways' matter.
            Some(NodeDown::Ack { number, lease_ms, .. }) => Some(SessionInput::Ack { number, lease_ms }),
            Some(NodeDown::Assignments { history, revision, assignments }) => {
                // A node that is gone ends the process by other means.
                let _ = self.tell(NodeMessage::Assign { history, revision, assignments, reply: None });
                None
            }
            Some(NodeDown::Inspect { number, service }) => {
                self.inspect(number, *service);
                None
            }
            Some(NodeDown::Moved { leader }) => {
                tracing::info!(?leader, "the leader ends the session");
                self.link = None;
                Some(SessionInput::Closed)
            }
        }
    }

    fn inspect(&self, number: u64, service: ModelService) {
        let (inspect, inspected) = (self.parts.inspect.clone(), self.inspected.clone());
        let Ok(permit) = self.inspections.clone().try_acquire_owned() else {
            // The receiver is this session's own.
            let _ = inspected.send(NodeUp::Busy { number });
            return;
        };
        tokio::task::spawn_blocking(move || {
            let result = inspect(&service).map(Box::new);
            let _ = inspected.send(NodeUp::Inspected { number, result });
            drop(permit);
        });
    }

    fn act(&mut self, action: SessionAction) -> Result<(), WorkerError> {
        match action {
            SessionAction::Connect => {
                let (api, spec) = (self.parts.api.clone(), self.parts.spec.clone());
                self.connecting = Some(async move { api.session(spec, CONNECT_TIMEOUT).await }.boxed());
            }
            SessionAction::Disconnect => {
                self.link = None;
                self.connecting = None;
            }
            SessionAction::Heartbeat(number) => {
                let heartbeat = NodeUp::Heartbeat { number, load: (self.parts.load)(), usage: Vec::new() };
                if let Some(link) = &self.link {
                    // One that does not fit is not heard in time anyway.
                    let _ = link.up.try_send(heartbeat);
                }
            }
            SessionAction::AskGroup => {
                let api = self.parts.api.clone();
                let ask = async move { api.status(STATUS_TIMEOUT).await.is_ok_and(|status| status.leader_id != 0) };
                self.asking = Some(ask.boxed());
            }
            SessionAction::Expire => {
                tracing::error!("the cluster lives and has given this node up: it stops serving until it is taken in again");
                self.parts.state.send_replace(SessionState::Expired);
                self.tell(NodeMessage::Expired)?;
            }
            SessionAction::End { reason } => return Err(WorkerError::Cluster { reason }),
        }
        Ok(())
    }

    fn tell(&self, message: NodeMessage) -> Result<(), WorkerError> {
        self.parts.node.cast(message).map_err(|error| WorkerError::Actor { actor: "node", reason: error.to_string() })
    }

    fn keep(&mut self, message: NodeUp) -> Option<SessionInput> {
        if self.pending.len() == PENDING_MAX {
            self.pending.pop_front();
        }
        self.pending.push_back(message);
        None
    }

    /// Sends what fits.
    fn flush(&mut self) {
        let Some(link) = self.link.as_ref().filter(|_| self.core.is_welcome()) else { return };
        while let Some(message) = self.pending.pop_front() {
            match link.up.try_send(message) {
                Ok(()) => {}
                Err(mpsc::error::TrySendError::Full(message)) => return self.pending.push_front(message),
                // The other half says so too.
                Err(mpsc::error::TrySendError::Closed(_)) => return,
            }
        }
    }

    async fn leave(mut self) -> Result<(), WorkerError> {
        self.flush();
        if let Some(link) = self.link.take() {
            // A leader that does not hear it waits for the lease.
            let _ = tokio::time::timeout(STATUS_TIMEOUT, link.up.send(NodeUp::Goodbye)).await;
            drop(link.up);
            let mut down = link.down;
            // Until the stream has ended, the message may lie in a buffer of this process.
            let _ = tokio::time::timeout(STATUS_TIMEOUT, async { while down.recv().await.is_some() {} }).await;
        }
        Ok(())
    }
}
