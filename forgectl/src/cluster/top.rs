//! `forgectl top`: nodes and replicas with what they are doing, again and again.
//!
//! On a terminal the picture is redrawn; elsewhere every picture is a block of plain lines.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use forge_cluster::api::{ClusterApi, ClusterLoads};
use forge_shared::cluster::node::{NodeLoad, NodeSpec, Role};

use super::connect::with_cluster;
use super::rows::bytes;
use crate::cli::cluster::TopArgs;
use crate::failure::{Exit, Failure, Result};
use crate::output::{OutputFormat, column, print_list, print_text};

/// No picture for this long: the coordinators are away.
const SILENCE: Duration = Duration::from_secs(15);
const SHORTEST_INTERVAL_S: f64 = 0.2;

/// `forgectl top`.
///
/// # Errors
/// The coordinators fall silent.
pub fn top(args: &TopArgs) -> Result<()> {
    if !(SHORTEST_INTERVAL_S..=3600.0).contains(&args.interval) {
        return Err(Failure::usage(format!("--interval: {SHORTEST_INTERVAL_S} to 3600 seconds")));
    }
    let interval = Duration::from_secs_f64(args.interval);
    with_cluster(&args.server, |cluster| async move {
        let mut pictures = cluster.loads(interval);
        let mut rates = Rates::default();
        let mut shown = 0;
        while args.count.is_none_or(|count| shown < count) {
            let picture = tokio::time::timeout(SILENCE + interval, pictures.recv()).await;
            let Ok(Some(loads)) = picture else {
                return Err(Failure::new("the coordinators fell silent")
                    .exit(Exit::LostContact)
                    .help("`forgectl cluster status` says who answers"));
            };
            let rates = rates.update(&loads, Instant::now());
            if std::io::stdout().is_terminal() {
                print_text("\x1b[H\x1b[2J")?;
            }
            draw(&loads, &rates)?;
            shown += 1;
        }
        Ok(())
    })
}

/// Tokens per second from counters that only grow.
#[derive(Debug, Default)]
pub(super) struct Rates {
    last: HashMap<(String, String), (u64, Instant)>,
}

impl Rates {
    /// By node and replica. A counter that fell began anew: no rate yet.
    pub(super) fn update(&mut self, loads: &ClusterLoads, now: Instant) -> HashMap<(String, String), f64> {
        let mut rates = HashMap::new();
        let mut next = HashMap::new();
        for (spec, load, _) in &loads.nodes {
            for replica in &load.replicas {
                let key = (spec.id.0.clone(), replica.replica.clone());
                if let Some((tokens, then)) = self.last.get(&key)
                    && replica.generated_tokens >= *tokens
                    && now > *then
                {
                    let rate = (replica.generated_tokens - tokens) as f64 / (now - *then).as_secs_f64();
                    rates.insert(key.clone(), rate);
                }
                next.insert(key, (replica.generated_tokens, now));
            }
        }
        self.last = next;
        rates
    }
}

/// A node's row. Before its first heartbeat nothing is known of it, which is not nothing: a process has memory.
pub(super) fn node(spec: &NodeSpec, load: &NodeLoad, silent_ms: u64) -> Vec<String> {
    let requests = match spec.role {
        Role::Gateway => load.requests_in_progress,
        _ => load.replicas.iter().map(|replica| replica.running + replica.waiting).sum(),
    };
    let is_known = load.resident_bytes > 0;
    let known = |text: String| if is_known { text } else { "…".to_owned() };
    vec![
        spec.id.0.clone(),
        spec.role.to_string(),
        format!("{silent_ms} ms ago"),
        known(bytes(load.resident_bytes)),
        known(requests.to_string()),
    ]
}

fn draw(loads: &ClusterLoads, rates: &HashMap<(String, String), f64>) -> Result<()> {
    let columns = ["NODE", "ROLE", "HEARD", "MEMORY", "REQUESTS"].map(column);
    print_list(OutputFormat::Table, &loads.nodes, &columns, |(spec, load, silent_ms)| node(spec, load, *silent_ms))?;
    print_text("\n")?;
    let replicas: Vec<_> =
        loads.nodes.iter().flat_map(|(spec, load, _)| load.replicas.iter().map(move |replica| (spec.id.0.clone(), replica))).collect();
    let columns = ["REPLICA", "NODE", "RUNNING", "QUEUE", "TOKENS/S", "KV"].map(column);
    let rows: Vec<Vec<String>> = replicas
        .iter()
        .map(|(node, replica)| {
            let rate = rates.get(&(node.clone(), replica.replica.clone())).map_or("-".into(), |rate| format!("{rate:.1}"));
            let share = (replica.kv_blocks_used * 100).checked_div(replica.kv_blocks_total).unwrap_or(0);
            let kv = format!("{share}%");
            vec![replica.replica.clone(), node.clone(), replica.running.to_string(), replica.waiting.to_string(), rate, kv]
        })
        .collect();
    print_list(OutputFormat::Table, &rows, &columns, Clone::clone)?;
    print_text("\n")
}
