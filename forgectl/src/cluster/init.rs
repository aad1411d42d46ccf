//! `forgectl cluster init` and `cluster admin`: certificates that are made here, before or without a coordinator.

use std::time::Duration;

use forge_cluster::config::{CoordinatorConfig, Membership};
use forge_cluster::tls::{ClusterCa, Credentials, Identity, NODE_LIFETIME, NodeKey, write_public};
use forge_shared::cluster::node::Role;
use forge_shared::config::ProcessConfig;

use super::contexts::ContextStore;
use crate::cli::cluster::{AdminArgs, InitArgs};
use crate::failure::{Exit, Failure, Result};
use crate::output::print_text;
use crate::time::Utc;

/// The coordinator's configuration in the folder that is made.
pub(super) const CONFIG_FILE: &str = "coordinator.yaml";

/// `forgectl cluster init`.
///
/// # Errors
/// A folder or a context that is in use, names and addresses that are none.
pub fn init(args: &InitArgs) -> Result<()> {
    init_with(args, &ContextStore::open()?)
}

pub(super) fn init_with(args: &InitArgs, contexts: &ContextStore) -> Result<()> {
    // Whole paths, so that the coordinator starts from any folder.
    let dir = std::path::absolute(&args.dir).map_err(|error| Failure::of(&error).while_doing("--dir").exit(Exit::Usage))?;
    let file = dir.join(CONFIG_FILE);
    if file.exists() {
        return Err(Failure::usage(format!("{} is there already", file.display()))
            .help("a cluster is made once; name another folder with --dir, or remove this one if its cluster is no longer wanted"));
    }
    let context = args.context.as_deref().unwrap_or(&args.cluster);
    contexts.check_new(context)?;
    let tls = dir.join("tls");
    let config = CoordinatorConfig {
        name: args.name.clone(),
        data_dir: dir.join("data"),
        listen: args.listen.clone(),
        advertise: args.advertise.clone(),
        metrics_listen: metrics_beside(&args.listen),
        membership: Membership { directory: tls.clone(), ..Membership::default() },
        ..CoordinatorConfig::default()
    };
    config.check().map_err(|(key, reason)| Failure::usage(format!("{key}: {reason}")))?;
    let now_s = Utc::now().0;
    let ca = ClusterCa::create(&args.cluster, now_s)?;
    ca.save(&tls)?;
    issue(&ca, Role::Coordinator, &args.name, NODE_LIFETIME)?.save(&tls)?;
    let admin = issue(&ca, Role::Admin, "admin", NODE_LIFETIME)?;
    contexts.add(context, &[config.address().to_owned()], &admin)?;
    contexts.set_current(context)?;
    write_public(&file, &document(&config)?)?;
    print_text(&format!(
        "made cluster {cluster} in {dir}; context {context} is the current one\n\
         start its first coordinator:  forge-coordinator --config {file} --bootstrap\n\
         then let others in:           forgectl cluster join-token --role worker\n\
         {dir}/tls/ca.key can make certificates of any role: keep it on coordinators only, and keep a copy offline\n",
        cluster = args.cluster,
        dir = dir.display(),
        file = file.display(),
    ))
}

/// Address of metrics and probes: the port after the one that is listened on, so that several coordinators share a host.
fn metrics_beside(listen: &str) -> String {
    let port = listen.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok()).filter(|port| *port > 0);
    port.map_or_else(
        || CoordinatorConfig::default().metrics_listen,
        |port| format!("127.0.0.1:{}", port.checked_add(1).unwrap_or(port - 1)),
    )
}

/// `forgectl cluster admin`.
///
/// # Errors
/// A CA that cannot be read, a name that is none.
pub fn admin(args: &AdminArgs) -> Result<()> {
    let ca = ClusterCa::load(&args.ca)?;
    let lifetime = Duration::from_secs(u64::from(args.days) * 24 * 3600);
    issue(&ca, Role::Admin, &args.name, lifetime)?.save(&args.out)?;
    print_text(&format!(
        "made a certificate for admin {} of cluster {}, good for {} days\n\
         on the other machine:  forgectl context add {} --server HOST:PORT --credentials {}\n",
        args.name,
        ca.cluster_id(),
        args.days,
        ca.cluster_id(),
        args.out.display(),
    ))
}

/// A new key with a certificate of this CA.
///
/// # Errors
/// A name that is none.
pub fn issue(ca: &ClusterCa, role: Role, name: &str, lifetime: Duration) -> Result<Credentials> {
    let key = NodeKey::generate()?;
    let identity = Identity::new(ca.cluster_id(), role, name)?;
    let certificate = ca.sign(&key.signing_request_der()?, &identity, lifetime, Utc::now().0)?;
    Ok(Credentials::from_pem(&certificate, &key.pem(), ca.certificate_pem())?)
}

/// The configuration as a document that loads back.
fn document(config: &CoordinatorConfig) -> Result<String> {
    let mut value = serde_json::to_value(config).map_err(|error| Failure::of(&error))?;
    drop_absent(&mut value);
    let body = serde_yaml_ng::to_string(&value).map_err(|error| Failure::of(&error))?;
    Ok(format!("apiVersion: forge/v1\nkind: {}\n{body}", CoordinatorConfig::KIND))
}

fn drop_absent(value: &mut serde_json::Value) {
    if let Some(group) = value.as_object_mut() {
        group.retain(|_, value| !value.is_null());
        group.values_mut().for_each(drop_absent);
    }
}
