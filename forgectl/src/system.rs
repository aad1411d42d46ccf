//! The root of the gateway's actor, which it supervises.
//!
//! ```text
//! SystemActor ── GatewayActor ── owns ──> listeners and their tasks
//! ```
//!
//! A gateway that dies gets new listeners on the same ports, a few times; what cannot be kept up is told to the owner, who
//! ends the process with an error. Engines are restarted by the worker's node, which [`crate::embedded`] has.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use forge_gateway::{Gateway, GatewayConfig, GatewayError, Listeners};
use ractor::{Actor, ActorId, ActorProcessingErr, ActorRef, SupervisionEvent};
use tokio::sync::{mpsc, oneshot};

use crate::failure::{Failure, Result};

/// Deaths of the gateway within [`WINDOW`] that are forgiven.
const DEATHS_MAX: usize = 3;
const WINDOW: Duration = Duration::from_secs(60);

/// The running root. Dropping it does not end the actors; see [`System::stop`].
pub struct System {
    root: ActorRef<SystemMessage>,
    ends: mpsc::UnboundedReceiver<Result<()>>,
}

/// Messages of the root.
pub enum SystemMessage {
    /// Serve on these listeners.
    Serve(Box<Serve>),
    /// Finish requests under way, take no more, and end the gateway.
    Drain,
}

/// What the gateway's actor is made of.
pub struct Serve {
    gateway: Gateway,
    /// With the ports that are really bound, so that a restart gets the same ones.
    config: GatewayConfig,
    listeners: Listeners,
}

impl System {
    /// Starts the root.
    ///
    /// # Errors
    /// The actor system does not start.
    pub async fn start() -> Result<System> {
        let (sender, ends) = mpsc::unbounded_channel();
        let (root, _) = Actor::spawn(None, SystemActor, sender).await.map_err(|error| Failure::of(&error))?;
        Ok(System { root, ends })
    }

    /// Serves on the listeners from here on.
    ///
    /// # Errors
    /// The root is gone.
    pub fn serve(&self, gateway: Gateway, config: &GatewayConfig, listeners: Listeners) -> Result<()> {
        let mut config = config.clone();
        config.port = listeners.api().port();
        config.metrics_port = listeners.metrics().port();
        let serve = SystemMessage::Serve(Box::new(Serve { gateway, config, listeners }));
        self.root.cast(serve).map_err(|error| Failure::of(&error))
    }

    /// Lets the gateway finish requests under way within its own deadline; [`Self::ended`] tells when.
    pub fn drain(&self) {
        // A root that is gone has nothing to drain, and `ended` says so.
        let _ = self.root.cast(SystemMessage::Drain);
    }

    /// Waits for the end of the gateway: `Ok` after [`Self::drain`], else the reason why it cannot be kept up.
    ///
    /// # Errors
    /// A supervised actor died for good.
    pub async fn ended(&mut self) -> Result<()> {
        self.ends.recv().await.unwrap_or_else(|| Err(Failure::new("the root of the actors ended by itself")))
    }

    /// Ends the root and whatever it still supervises.
    pub fn stop(&self) {
        self.root.stop(None);
    }
}

struct SystemActor;

struct SystemState {
    ends: mpsc::UnboundedSender<Result<()>>,
    gateway: Option<SupervisedGateway>,
    deaths: VecDeque<Instant>,
}

struct SupervisedGateway {
    actor: ActorRef<GatewayMessage>,
    gateway: Gateway,
    config: GatewayConfig,
}

impl SystemState {
    fn tell(&self, end: Result<()>) {
        // An owner that is gone is ending the process.
        let _ = self.ends.send(end);
    }

    fn is_gateway(&self, id: ActorId) -> bool {
        self.gateway.as_ref().is_some_and(|supervised| supervised.actor.get_id() == id)
    }
}

impl Actor for SystemActor {
    type Msg = SystemMessage;
    type State = SystemState;
    type Arguments = mpsc::UnboundedSender<Result<()>>;

    async fn pre_start(
        &self,
        _myself: ActorRef<SystemMessage>,
        ends: Self::Arguments,
    ) -> std::result::Result<SystemState, ActorProcessingErr> {
        Ok(SystemState { ends, gateway: None, deaths: VecDeque::new() })
    }

    async fn handle(
        &self,
        myself: ActorRef<SystemMessage>,
        message: SystemMessage,
        state: &mut SystemState,
    ) -> std::result::Result<(), ActorProcessingErr> {
        match message {
            SystemMessage::Serve(serve) => {
                let Serve { gateway, config, listeners } = *serve;
                let actor = spawn_gateway(&myself, gateway.clone(), listeners).await?;
                state.gateway = Some(SupervisedGateway { actor, gateway, config });
            }
            SystemMessage::Drain => {
                let asked = state.gateway.as_ref().is_some_and(|supervised| supervised.actor.cast(GatewayMessage::Drain).is_ok());
                // One that is gone has nothing to drain; its end is told at once.
                if !asked {
                    state.tell(Ok(()));
                }
            }
        }
        Ok(())
    }

    async fn handle_supervisor_evt(
        &self,
        myself: ActorRef<SystemMessage>,
        event: SupervisionEvent,
        state: &mut SystemState,
    ) -> std::result::Result<(), ActorProcessingErr> {
        match event {
            SupervisionEvent::ActorTerminated(cell, _, _) if state.is_gateway(cell.get_id()) => state.tell(Ok(())),
            SupervisionEvent::ActorFailed(cell, error) if state.is_gateway(cell.get_id()) => revive(&myself, state, &error).await?,
            _ => {}
        }
        Ok(())
    }
}

/// Binds the same ports again and serves on them, unless the gateway has died too often.
async fn revive(
    myself: &ActorRef<SystemMessage>,
    state: &mut SystemState,
    error: &ActorProcessingErr,
) -> std::result::Result<(), ActorProcessingErr> {
    let now = Instant::now();
    state.deaths.retain(|death| now.duration_since(*death) < WINDOW);
    state.deaths.push_back(now);
    let give_up = |state: &SystemState, reason: String| state.tell(Err(Failure::new(reason).while_doing("the gateway died")));
    if state.deaths.len() > DEATHS_MAX {
        give_up(state, error.to_string());
        return Ok(());
    }
    let Some(supervised) = &mut state.gateway else { return Ok(()) };
    tracing::error!(%error, "the gateway died and is started again");
    match Listeners::bind(&supervised.config).await {
        Ok(listeners) => supervised.actor = spawn_gateway(myself, supervised.gateway.clone(), listeners).await?,
        Err(error) => give_up(state, error.to_string()),
    }
    Ok(())
}

async fn spawn_gateway(
    root: &ActorRef<SystemMessage>,
    gateway: Gateway,
    listeners: Listeners,
) -> std::result::Result<ActorRef<GatewayMessage>, ActorProcessingErr> {
    let (actor, _) = Actor::spawn_linked(None, GatewayActor, (gateway, listeners), root.get_cell()).await?;
    Ok(actor)
}

/// The gateway's shell: it owns the task that serves, and dies with it.
struct GatewayActor;

enum GatewayMessage {
    Drain,
    Ended(std::result::Result<(), GatewayDeath>),
}

/// How a gateway's task ended when it should not have.
#[derive(Debug, thiserror::Error)]
enum GatewayDeath {
    #[error(transparent)]
    Failed(#[from] GatewayError),
    #[error("the gateway's task died: {0}")]
    Task(#[from] tokio::task::JoinError),
    #[error("the gateway ended by itself")]
    Ended,
}

impl Actor for GatewayActor {
    type Msg = GatewayMessage;
    /// Asks the task to drain; taken when asked.
    type State = Option<oneshot::Sender<()>>;
    type Arguments = (Gateway, Listeners);

    async fn pre_start(
        &self,
        myself: ActorRef<GatewayMessage>,
        (gateway, listeners): Self::Arguments,
    ) -> std::result::Result<Self::State, ActorProcessingErr> {
        let (drain, drained) = oneshot::channel::<()>();
        let serving = tokio::spawn(async move {
            let shutdown = async {
                // A sender that is gone means the same as one that sent: the actor ended.
                let _ = drained.await;
            };
            gateway.serve(listeners, shutdown).await
        });
        tokio::spawn(async move {
            let end = match serving.await {
                Ok(served) => served.map_err(GatewayDeath::from),
                Err(death) => Err(death.into()),
            };
            // An actor that is gone was stopped with the process.
            let _ = myself.cast(GatewayMessage::Ended(end));
        });
        Ok(Some(drain))
    }

    async fn handle(
        &self,
        myself: ActorRef<GatewayMessage>,
        message: GatewayMessage,
        drain: &mut Self::State,
    ) -> std::result::Result<(), ActorProcessingErr> {
        match message {
            GatewayMessage::Drain => {
                // Dropping the sender asks.
                *drain = None;
                Ok(())
            }
            GatewayMessage::Ended(Ok(())) if drain.is_none() => {
                myself.stop(None);
                Ok(())
            }
            GatewayMessage::Ended(Ok(())) => Err(GatewayDeath::Ended.into()),
            GatewayMessage::Ended(Err(death)) => Err(death.into()),
        }
    }
}
