//! `forgectl serve`: a cluster in this process, and a gateway to it.

use std::net::{IpAddr, Ipv4Addr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use forge_gateway::clock::SystemClock;
use forge_gateway::cluster::{MemberParts, Shares};
use forge_gateway::{Gateway, GatewayConfig, KeyRing, Listeners, RequestLimits, Timeouts};
use forge_shared::cluster::node::{NodeSpec, Role};
use forge_shared::config::{self, Format};
use forge_shared::ids::NodeId;
use forge_shared::spec::{GatewaySpec, ModelService};
use forge_shared::telemetry::Metrics;
use forge_store::Silent;
use forge_worker::probe;
use forge_worker::service::LocalDialer;

use crate::banner;
use crate::cli::{DocumentFormat, ServeArgs};
use crate::cluster::ContextStore;
use crate::context::{self, Context};
use crate::embedded::{self, Beginning, EmbeddedCoordinator, ServedService, WorkerParts};
use crate::failure::{Failure, Result};
use crate::names::served_names;
use crate::output::print_text;
use crate::replica::{self, unless_stopped};
use crate::runtime;
use crate::support;
use crate::system::System;

/// For answers under way when the engine is dead for good: their errors must still go out.
const FATAL_DRAIN: Duration = Duration::from_secs(2);

/// Serves a model until a signal ends it.
///
/// # Errors
/// Anything that keeps it from starting, and an engine that died and cannot come back.
pub fn serve(args: &ServeArgs) -> Result<()> {
    let context = Context::open()?;
    let service = context.service(&args.sources, args.model.as_deref(), &args.keys.settings)?;
    let config = gateway_config(&service.spec.gateway)?;
    support::check(&context, &service.spec.model)?;
    if args.dry_run {
        match context.store.resolve(&service.spec.model, &Silent)? {
            Some(resolved) => {
                let prepared = runtime::start()?.block_on(replica::prepare(&service, &resolved))?;
                replica::check(&service, &prepared, &probe::cpu_alone())?;
            }
            None => eprintln!("note: {} is not here yet; its files and memory are checked when it is", service.spec.model),
        }
        return print_text(&config::render(&service, format(args.output))?);
    }
    runtime::start()?.block_on(serve_service(&context, &service, config))
}

fn format(format: DocumentFormat) -> Format {
    match format {
        DocumentFormat::Yaml => Format::Yaml,
        DocumentFormat::Toml => Format::Toml,
        DocumentFormat::Json => Format::Json,
    }
}

async fn serve_service(context: &Context, service: &ModelService, config: GatewayConfig) -> Result<()> {
    // What can be refused is refused before gigabytes are pulled.
    let shares = Arc::new(Shares::default());
    let keys = KeyRing::open(context.keys().path())?.and_told(shares.clone());
    config.check(keys.required())?;
    // Let go again: a port that accepts and does not answer would hang probes while a model is pulled.
    drop(Listeners::bind(&config).await?);
    let metrics = Metrics::new();
    let mut system = System::start().await?;
    // One listener for all waits: a signal between them must not be lost.
    let mut stop = pin!(runtime::stop_signal());
    let gateway = Gateway::empty(config.clone(), metrics.clone(), keys.clone(), Arc::new(SystemClock))?;
    let (mut served, listeners) = unless_stopped(stop.as_mut(), async {
        let model = context::pull(&service.spec.model, false).await?;
        let listeners = Listeners::bind(&config).await?;
        let names = served_names(context, service, &model)?;
        let (prepared, coordinator) = tokio::try_join!(replica::prepare(service, &model), EmbeddedCoordinator::start(&context.home))?;
        let device = probe::cpu_alone();
        replica::check(service, &prepared, &device)?;
        let parts = WorkerParts {
            device,
            model: prepared.clone(),
            names,
            service: service.clone(),
            home: context.home.clone(),
            metrics: metrics.clone(),
        };
        let cluster = coordinator.with_worker(parts, ContextStore::at(context.home.root())).await?;
        let dialer = LocalDialer::new(cluster.board());
        let texts = dialer.clone();
        let member = gateway.join(MemberParts {
            api: cluster.api(),
            dialer: Arc::new(dialer),
            built_texts: Some(Arc::new(move |target| texts.text(target))),
            spec: gateway_node(&listeners),
            keys: keys.clone(),
            shares,
        });
        let served = ServedService::begin(service, Beginning { cluster, member, prepared, model }).await?;
        Ok((served, listeners))
    })
    .await?;
    let addresses = banner::Addresses { api: listeners.api(), metrics: listeners.metrics(), keys: keys.required() };
    // From here on probes answer; readiness follows when the model is loaded.
    system.serve(gateway.clone(), &config, listeners)?;
    let ended = tokio::select! {
        ended = run_service(&mut served, &addresses, stop) => ended,
        ended = system.ended() => Err(ended.err().unwrap_or_else(|| Failure::new("the gateway ended by itself"))),
    };
    stop_at_next_signal();
    match &ended {
        Ok(()) => {
            let timeout_s = config.timeouts.drain_s;
            tracing::info!(in_flight = gateway.in_flight(), timeout_s, "draining; a second signal stops at once");
            system.drain();
            // The gateway keeps its own deadline.
            if let Err(error) = system.ended().await {
                tracing::warn!(%error, "the gateway did not end cleanly");
            }
        }
        Err(_) => {
            // Told first, so that its end is not taken for a death; the shorter deadline wins.
            system.drain();
            gateway.drain(FATAL_DRAIN).await;
        }
    }
    served.end(FATAL_DRAIN).await;
    system.stop();
    ended
}

/// The gateway as a node of the cluster.
fn gateway_node(listeners: &Listeners) -> NodeSpec {
    NodeSpec {
        id: NodeId::from(embedded::GATEWAY),
        role: Role::Gateway,
        incarnation: embedded::first_incarnation(),
        version: forge_shared::version::VERSION.to_owned(),
        level: forge_shared::version::LEVEL,
        address: listeners.api().to_string(),
        metrics_address: listeners.metrics().to_string(),
        data_plane: None,
        devices: Vec::new(),
    }
}

/// Loads, shows the banner, and waits for a signal (`Ok`) or for the end of the engine.
async fn run_service(
    served: &mut ServedService,
    addresses: &banner::Addresses,
    mut stop: Pin<&mut impl Future<Output = ()>>,
) -> Result<()> {
    tracing::info!("loading");
    tokio::select! {
        ready = served.ready() => ready?,
        () = stop.as_mut() => return Ok(()),
    }
    print_text(&banner::banner(&served.shown().await?, addresses))?;
    tokio::select! {
        failure = served.failed() => Err(failure),
        () = stop => Ok(()),
    }
}

fn stop_at_next_signal() {
    tokio::spawn(async {
        runtime::stop_signal().await;
        eprintln!("stopped");
        std::process::exit(1);
    });
}

fn address(text: &str, key: &'static str) -> Result<IpAddr> {
    match text {
        "localhost" => Ok(Ipv4Addr::LOCALHOST.into()),
        text => text.trim_matches(['[', ']']).parse().map_err(|_| {
            Failure::usage(format!("{key}: {text:?} is not an IP address"))
                .help("write 127.0.0.1 for this machine alone, 0.0.0.0 or :: for all addresses")
        }),
    }
}

fn gateway_config(spec: &GatewaySpec) -> Result<GatewayConfig> {
    let host = address(&spec.host, "--host (gateway.host)")?;
    let metrics_host = address(&spec.metrics_host, "--metrics-host (gateway.metricsHost)")?;
    let body_bytes = usize::try_from(spec.max_body.0).unwrap_or(usize::MAX);
    let limits = RequestLimits { body_bytes, choices: spec.max_choices as usize, ..Default::default() };
    let timeouts = Timeouts { request_s: spec.request_timeout_s, drain_s: spec.drain_timeout_s, ..Default::default() };
    Ok(GatewayConfig {
        host,
        port: spec.port,
        metrics_host,
        metrics_port: spec.metrics_port,
        insecure: spec.insecure,
        allowed_origins: spec.cors_origins.clone(),
        limits,
        timeouts,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_addresses() {
        for (host, expected) in [("localhost", "127.0.0.1"), ("0.0.0.0", "0.0.0.0"), ("[::1]", "::1"), ("::", "::")] {
            let spec = GatewaySpec { host: host.into(), ..Default::default() };
            assert_eq!(gateway_config(&spec).expect("an address").host.to_string(), expected);
        }
        let spec = GatewaySpec { host: "example.org".into(), ..Default::default() };
        assert!(gateway_config(&spec).expect_err("a name").to_string().contains("--host"));
    }

    #[test]
    fn metrics_stay_on_loopback_unless_told() {
        let open = GatewaySpec { host: "0.0.0.0".into(), ..Default::default() };
        assert!(gateway_config(&open).expect("addresses").metrics_host.is_loopback());
        let spec = GatewaySpec { metrics_host: "::".into(), ..Default::default() };
        let config = gateway_config(&spec).expect("addresses");
        assert!(config.metrics_host.is_unspecified() && config.host.is_loopback());
        let spec = GatewaySpec { metrics_host: "pod".into(), ..Default::default() };
        assert!(gateway_config(&spec).expect_err("a name").to_string().contains("--metrics-host"));
    }
}
