//! Commands that speak to a cluster, and those that make one.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::{ListArgs, SpecSources};
use crate::output::OutputFormat;

/// Which cluster is meant.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Cluster")]
pub struct ServerArgs {
    /// Coordinators to ask instead of the context's, as host:port[,host:port]
    #[arg(long, global = true, value_name = "ADDRESSES", env = "FORGE_SERVER", hide_env_values = true)]
    #[arg(value_delimiter = ',', value_parser = address)]
    pub server: Vec<String>,
    /// Context to use instead of the current one
    #[arg(long, global = true, value_name = "NAME", env = "FORGE_CONTEXT", hide_env_values = true)]
    pub context: Option<String>,
}

/// A coordinator's address on the command line.
fn address(text: &str) -> Result<String, String> {
    forge_cluster::config::check_host_port(text.trim()).map(|()| text.trim().to_owned())
}

/// `cluster`.
#[derive(Debug, Args)]
pub struct ClusterArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: ClusterCommand,
}

/// Commands of `cluster`.
#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Make a cluster: its CA, a first coordinator's certificate and configuration, and a context for you
    Init(InitArgs),
    /// Print a token that lets processes of one role join
    JoinToken(JoinTokenArgs),
    /// Make a certificate for another operator, with the CA's key
    Admin(AdminArgs),
    /// Show the coordinators: who leads, who answers, how far each is
    Status {
        #[command(flatten)]
        list: ListArgs,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Change the coordinators; new ones come by `forgectl cluster join-token --role coordinator`
    Members {
        /// What to do.
        #[command(subcommand)]
        command: MembersCommand,
    },
    /// Show certificates, take them back, change the CA that signs them
    Certs {
        /// What to do.
        #[command(subcommand)]
        command: CertsCommand,
    },
    /// Write the cluster's state to a file
    Backup {
        /// File to write; must not exist
        file: PathBuf,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Make a coordinator that does not run a new group of one from a backup; its data folder must be empty
    Restore(RestoreArgs),
}

/// `cluster restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// File that `cluster backup` wrote
    pub file: PathBuf,
    /// Folder of the coordinator, with its coordinator.yaml, as `cluster init` made it
    #[arg(long, value_name = "DIR", default_value = "forge-coordinator")]
    pub dir: PathBuf,
    /// Its configuration file, where it is elsewhere
    #[arg(long, value_name = "FILE", conflicts_with = "dir")]
    pub config: Option<PathBuf>,
    /// One key of the configuration, over the file
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub assignments: Vec<String>,
}

/// Commands of `cluster certs`.
#[derive(Debug, Subcommand)]
pub enum CertsCommand {
    /// List who has which certificate
    #[command(visible_alias = "ls")]
    List {
        /// Those too that have ended or were replaced by newer ones
        #[arg(short, long)]
        all: bool,
        #[command(flatten)]
        list: ListArgs,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Refuse a certificate from now on, and cut its connections
    Revoke {
        /// Its serial number or the beginning of it, or NAME or ROLE/NAME for all that this process or person has
        target: String,
        /// Even the last operator's, or that of a coordinator which votes
        #[arg(long)]
        force: bool,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Put a new CA in the place of the one that signs, step by step; goes on where it was stopped
    RotateCa(RotateCaArgs),
}

/// `cluster certs rotate-ca`.
#[derive(Debug, Args)]
pub struct RotateCaArgs {
    /// Longest wait at each step for all processes to follow, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    pub timeout: u64,
    /// After that wait, go on without those that have not followed: they must join anew
    #[arg(long)]
    pub force: bool,
    /// Take the new CA back, as long as it does not sign
    #[arg(long, conflicts_with = "force")]
    pub abandon: bool,
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Commands of `cluster members`.
#[derive(Debug, Subcommand)]
pub enum MembersCommand {
    /// Print a token with which a new coordinator joins
    Add {
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Take a coordinator out of the group
    Remove {
        /// Its name, or its number
        member: String,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Make another coordinator the leader
    TransferLeader {
        /// Its name, or its number
        member: String,
        #[command(flatten)]
        server: ServerArgs,
    },
}

/// `cluster init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// Folder to make the first coordinator in
    #[arg(long, value_name = "DIR", default_value = "forge-coordinator")]
    pub dir: PathBuf,
    /// Name of the cluster
    #[arg(long, value_name = "NAME", default_value = "forge")]
    pub cluster: String,
    /// Context to remember it by; must be a new one [default: --cluster]
    #[arg(long, value_name = "NAME")]
    pub context: Option<String>,
    /// Name of the coordinator
    #[arg(long, value_name = "NAME", default_value = "c1")]
    pub name: String,
    /// Address to listen on
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:7000")]
    pub listen: String,
    /// Address where other hosts reach it [default: --listen]
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Option<String>,
}

/// `cluster join-token`.
#[derive(Debug, Args)]
pub struct JoinTokenArgs {
    /// What it lets in: coordinator, worker or gateway
    #[arg(long)]
    pub role: forge_shared::cluster::node::Role,
    /// How long it is good, minutes
    #[arg(long, value_name = "MINUTES", default_value_t = 60)]
    pub minutes: u32,
    /// How many processes it lets in
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub uses: u32,
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `cluster admin`.
#[derive(Debug, Args)]
pub struct AdminArgs {
    /// Name of the person or program
    pub name: String,
    /// Folder with ca.pem and ca.key, as `cluster init` made it
    #[arg(long, value_name = "DIR")]
    pub ca: PathBuf,
    /// Folder to write node.pem and ca.pem to
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// How long it is good, days
    #[arg(long, value_name = "DAYS", default_value_t = 90)]
    pub days: u32,
}

/// `context`.
#[derive(Debug, Args)]
pub struct ContextArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: ContextCommand,
}

/// Commands of `context`.
#[derive(Debug, Subcommand)]
pub enum ContextCommand {
    /// Remember a cluster: its addresses, and a certificate for it
    Add {
        /// What to call it
        name: String,
        /// Coordinators, as host:port[,host:port]
        #[arg(long, value_name = "ADDRESSES", required = true, value_delimiter = ',', value_parser = address)]
        server: Vec<String>,
        /// Folder with node.pem and ca.pem, as `cluster admin` makes it
        #[arg(long, value_name = "DIR")]
        credentials: PathBuf,
    },
    /// Make a context the current one
    Use {
        /// Which
        name: String,
    },
    /// List all contexts
    #[command(visible_alias = "ls")]
    List(ListArgs),
    /// Forget a context and its certificate
    Remove {
        /// Which
        name: String,
    },
}

/// When `apply` and `delete` return.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum WaitFor {
    /// The cluster has taken the wish
    #[default]
    Submitted,
    /// Every replica answers, and every gateway sends requests to them
    Running,
}

/// `apply`.
#[derive(Debug, Args)]
pub struct ApplyArgs {
    #[command(flatten)]
    pub sources: SpecSources,
    /// Show what would be placed where, and stop
    #[arg(long)]
    pub dry_run: bool,
    /// When to return
    #[arg(long, value_enum, default_value_t)]
    pub wait: WaitFor,
    /// Longest wait, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub timeout: u64,
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Kinds that can be listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Listed {
    /// Workers and gateways
    #[value(alias = "node")]
    Nodes,
    /// Model services
    #[value(aliases = ["model", "services", "service"])]
    Models,
    /// Replicas of model services, rank by rank
    #[value(alias = "placement")]
    Placements,
    /// What happened
    #[value(alias = "event")]
    Events,
    /// API keys
    #[value(alias = "key")]
    Keys,
}

/// One thing of a kind: as [`Listed`], in the singular.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Described {
    /// A worker or gateway
    #[value(alias = "nodes")]
    Node,
    /// A model service
    #[value(aliases = ["models", "service", "services"])]
    Model,
    /// The replicas of a model service, rank by rank
    #[value(alias = "placements")]
    Placement,
    /// Something that happened, by its number
    #[value(alias = "events")]
    Event,
    /// An API key
    #[value(alias = "keys")]
    Key,
}

impl From<Described> for Listed {
    fn from(described: Described) -> Self {
        match described {
            Described::Node => Listed::Nodes,
            Described::Model => Listed::Models,
            Described::Placement => Listed::Placements,
            Described::Event => Listed::Events,
            Described::Key => Listed::Keys,
        }
    }
}

/// `get`.
#[derive(Debug, Args)]
pub struct GetArgs {
    /// What to list
    #[arg(value_enum)]
    pub kind: Listed,
    /// Only this one; of placements, those of this model
    pub name: Option<String>,
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    /// Go on with changes
    #[arg(short, long)]
    pub watch: bool,
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `describe`.
#[derive(Debug, Args)]
pub struct DescribeArgs {
    /// What it is
    #[arg(value_enum)]
    pub kind: Described,
    /// Which
    pub name: String,
    /// Form of the output
    #[arg(short, long, value_enum, default_value_t, value_name = "FORMAT")]
    pub output: OutputFormat,
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `logs`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Model, replica (model/index), or with --node a node
    pub target: String,
    /// The target is a node
    #[arg(long)]
    pub node: bool,
    /// Go on with new lines
    #[arg(short, long)]
    pub follow: bool,
    /// Lines to begin with
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub tail: u32,
    #[command(flatten)]
    pub server: ServerArgs,
}

/// Commands about one node.
#[derive(Debug, Args)]
pub struct NodeArgs {
    /// Which
    pub node: String,
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `drain`.
#[derive(Debug, Args)]
pub struct DrainArgs {
    /// Which
    pub node: String,
    /// End replicas that have room nowhere else, once their requests are finished
    #[arg(long)]
    pub force: bool,
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `scale`.
#[derive(Debug, Args)]
pub struct ScaleArgs {
    /// Which model service
    pub name: String,
    /// How many copies, at least 1; `forgectl delete` ends the last one
    #[arg(long, value_name = "N", value_parser = replicas, allow_hyphen_values = true)]
    pub replicas: u32,
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `delete`.
#[derive(Debug, Args)]
pub struct DeleteArgs {
    /// Which model service, or `node` or `model` and its name
    #[arg(value_name = "NAME", num_args = 1..=2, required = true)]
    pub target: Vec<String>,
    #[command(flatten)]
    pub server: ServerArgs,
}

/// `top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// Seconds between two pictures
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0)]
    pub interval: f64,
    /// Pictures before it ends [default: until Ctrl-C]
    #[arg(short = 'n', long, value_name = "N")]
    pub count: Option<u64>,
    #[command(flatten)]
    pub server: ServerArgs,
}

/// A number of replicas that a service may have.
fn replicas(text: &str) -> Result<u32, String> {
    match text.trim().parse::<i64>() {
        Ok(count) if (1..=i64::from(u32::MAX)).contains(&count) => u32::try_from(count).map_err(|error| error.to_string()),
        Ok(0) => Err("a service has at least 1 replica; `forgectl delete NAME` ends the last one".into()),
        Ok(_) => Err("a number of replicas is at least 1".into()),
        Err(_) => Err("write a number of replicas in digits, such as 2".into()),
    }
}
