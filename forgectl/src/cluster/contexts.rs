//! Contexts: the clusters this user knows, each with addresses and a certificate, under `FORGE_HOME/contexts`.
//!
//! Invariants: a context's folder is complete (`context.json`, `node.pem`, `ca.pem`) or is not there; no context takes the
//! place of another cluster's, whose certificate may be the only one; the names of `forgectl serve` belong to the processes
//! that hold their locks.

use std::fs::{self, File, TryLockError};
use std::io::Read;
use std::path::{Path, PathBuf};

use forge_cluster::config::ContextFile;
use forge_cluster::tls::{Credentials, check_name, write_private, write_public};
use forge_store::ForgeHome;
use serde::Serialize;

use crate::cli::cluster::{ContextArgs, ContextCommand};
use crate::failure::{Failure, Result};
use crate::output::{column, print_list, print_text, wide};

const FILE: &str = "context.json";
const CURRENT: &str = "current";
/// More than any context has.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The context of the `forgectl serve` of this machine that began first; others are `local-2` and so on.
pub const LOCAL_CONTEXT: &str = "local";
/// Most contexts of `forgectl serve` at once.
const MAX_LOCAL: u32 = 64;

/// A known cluster.
#[derive(Debug)]
pub struct KnownCluster {
    /// `host:port` of its coordinators.
    pub servers: Vec<String>,
    /// What to show it.
    pub credentials: Credentials,
}

/// The contexts of one home.
pub struct ContextStore {
    folder: PathBuf,
}

impl ContextStore {
    /// Of this user.
    ///
    /// # Errors
    /// If the home folder cannot be used.
    pub fn open() -> Result<Self> {
        Ok(ContextStore::at(ForgeHome::discover()?.root()))
    }

    /// Below a home folder.
    pub fn at(home: &Path) -> Self {
        ContextStore { folder: home.join("contexts") }
    }

    /// That a cluster that is made now can be remembered under this name.
    ///
    /// # Errors
    /// A name that is none, or is taken.
    pub fn check_new(&self, name: &str) -> Result<()> {
        check_name("context", name)?;
        check_not_local(name)?;
        if !self.has(name) {
            return Ok(());
        }
        let what = match self.get(name) {
            Ok(known) => format!("of cluster {:?} at {}", known.credentials.identity().cluster_id, known.servers.join(",")),
            Err(_) => "damaged".to_owned(),
        };
        Err(Failure::usage(format!("there is a context {name:?} already, {what}, with the certificate for it")).help(format!(
            "name the new cluster's context with --context OTHER, or forget the old one with `forgectl context remove {name}`"
        )))
    }

    /// Remembers a cluster; replaces one of the same name that is of the same CA. The first one becomes the current one.
    ///
    /// # Errors
    /// A name that is none, or is another cluster's; files that cannot be written.
    pub fn add(&self, name: &str, servers: &[String], credentials: &Credentials) -> Result<()> {
        check_name("context", name)?;
        check_not_local(name)?;
        if self.get(name).is_ok_and(|known| known.credentials.ca_digest() != credentials.ca_digest()) {
            self.check_new(name)?;
        }
        self.put(name, servers, credentials)?;
        if self.current()?.is_none() {
            self.set_current(name)?;
        }
        Ok(())
    }

    fn put(&self, name: &str, servers: &[String], credentials: &Credentials) -> Result<()> {
        credentials.save(&self.folder.join(name))?;
        self.write(name, servers)
    }

    /// Whether there is one of this name.
    pub fn has(&self, name: &str) -> bool {
        self.folder.join(name).join(FILE).is_file()
    }

    /// Remembers the cluster of this process, under the first of the names for such that no living process has.
    ///
    /// # Errors
    /// Files that cannot be written, a file system without locks.
    pub fn hold_local(&self, servers: &[String], credentials: &Credentials) -> Result<HeldContext> {
        let failed =
            |error: std::io::Error| Failure::of(&error).while_doing(&format!("cannot lock a context in {}", self.folder.display()));
        fs::create_dir_all(&self.folder).map_err(failed)?;
        for name in local_names() {
            let lock = File::create(self.lock(&name)).map_err(failed)?;
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => continue,
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
            self.put(&name, servers, credentials)?;
            return Ok(HeldContext { store: ContextStore { folder: self.folder.clone() }, name, _lock: lock });
        }
        Err(Failure::new(format!("{MAX_LOCAL} `forgectl serve` run with this FORGE_HOME already")).help("give this one another FORGE_HOME"))
    }

    /// The contexts of `forgectl serve` whose processes live, the first that began first.
    ///
    /// # Errors
    /// Locks that cannot be looked at.
    pub fn living_local(&self) -> Result<Vec<String>> {
        let mut living = Vec::new();
        for name in local_names().filter(|name| self.has(name)) {
            let is_held = match File::open(self.lock(&name)) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
                Err(error) => return Err(Failure::of(&error).while_doing(&format!("cannot read context {name:?}"))),
                Ok(lock) => match lock.try_lock_shared() {
                    Ok(()) => false,
                    Err(TryLockError::WouldBlock) => true,
                    Err(TryLockError::Error(error)) => {
                        return Err(Failure::of(&error).while_doing(&format!("cannot read context {name:?}")));
                    }
                },
            };
            if is_held {
                living.push(name);
            }
        }
        Ok(living)
    }

    /// Beside the folder, so that it outlives it. No context is called so.
    fn lock(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.lock"))
    }

    /// Keeps other addresses for a cluster; its certificate stays. Without any, what was there stays too.
    ///
    /// # Errors
    /// If there is no such cluster, or its file cannot be written.
    pub fn learn(&self, name: &str, servers: &[String]) -> Result<()> {
        let known = self.get(name)?;
        if servers.is_empty() || known.servers == servers {
            return Ok(());
        }
        self.write(name, servers)
    }

    /// Where a context's files lie.
    pub fn folder_of(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn write(&self, name: &str, servers: &[String]) -> Result<()> {
        let stored = ContextFile { servers: servers.to_vec() }.to_text().map_err(|error| Failure::of(&error))?;
        Ok(write_private(&self.folder.join(name).join(FILE), &stored)?)
    }

    /// The name of the current one.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn current(&self) -> Result<Option<String>> {
        match fs::read_to_string(self.folder.join(CURRENT)) {
            Ok(name) => Ok(Some(name.trim().to_owned())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Failure::of(&error).while_doing("cannot read the current context")),
        }
    }

    /// Makes one the current one.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn set_current(&self, name: &str) -> Result<()> {
        self.get(name)?;
        Ok(write_public(&self.folder.join(CURRENT), &format!("{name}\n"))?)
    }

    /// One by its name.
    ///
    /// # Errors
    /// If there is none, or its files are damaged.
    pub fn get(&self, name: &str) -> Result<KnownCluster> {
        check_name("context", name)?;
        let folder = self.folder.join(name);
        let text = read_bounded(&folder.join(FILE)).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                let known = self.names().unwrap_or_default().join(", ");
                let known = if known.is_empty() { "none yet".into() } else { known };
                Failure::usage(format!("there is no context {name:?}")).help(format!("known: {known}; `forgectl context add` makes one"))
            }
            _ => Failure::of(&error).while_doing(&format!("cannot read context {name:?}")),
        })?;
        let stored = ContextFile::parse(&text).map_err(|reason| {
            Failure::new(format!("context {name:?} is damaged"))
                .cause(reason)
                .help(format!("`forgectl context remove {name}` forgets it, `forgectl context add` writes it anew"))
        })?;
        Ok(KnownCluster { servers: stored.servers, credentials: Credentials::load(&folder)? })
    }

    /// All names, sorted.
    ///
    /// # Errors
    /// A folder that cannot be read.
    pub fn names(&self) -> Result<Vec<String>> {
        let entries = match fs::read_dir(&self.folder) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(Failure::of(&error).while_doing("cannot list the contexts")),
        };
        let mut names: Vec<String> = entries
            .filter_map(|entry| entry.ok())
            .filter(|entry| entry.path().join(FILE).is_file())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        Ok(names)
    }

    fn remove(&self, name: &str) -> Result<()> {
        // A damaged one can be removed too.
        if !self.has(name) {
            self.get(name)?;
        }
        let failed = |error: std::io::Error| Failure::of(&error).while_doing(&format!("cannot remove context {name:?}"));
        // The file that makes it a context goes first: what an interruption leaves is no context.
        fs::remove_file(self.folder.join(name).join(FILE)).map_err(failed)?;
        fs::remove_dir_all(self.folder.join(name)).map_err(failed)?;
        if self.current()?.as_deref() == Some(name) {
            fs::remove_file(self.folder.join(CURRENT)).map_err(failed)?;
        }
        Ok(())
    }
}

/// The context of this process's cluster; forgotten with this value, and known to be left when the process is gone.
pub struct HeldContext {
    store: ContextStore,
    name: String,
    _lock: File,
}

impl HeldContext {
    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for HeldContext {
    fn drop(&mut self) {
        // One that is left is held by nobody, which commands tell.
        if let Err(failure) = self.store.remove(&self.name) {
            tracing::debug!(%failure, "the context of this process is not removed");
        }
    }
}

/// The names for contexts of `forgectl serve`.
fn local_names() -> impl Iterator<Item = String> {
    (1..=MAX_LOCAL).map(|number| if number == 1 { LOCAL_CONTEXT.to_owned() } else { format!("{LOCAL_CONTEXT}-{number}") })
}

/// Whether a name is one of those for contexts of `forgectl serve`.
pub fn is_local(name: &str) -> bool {
    local_names().any(|local| local == name)
}

fn check_not_local(name: &str) -> Result<()> {
    if is_local(name) {
        return Err(Failure::usage(format!("context {name:?}: this name is for clusters of `forgectl serve`"))
            .help("choose another name: `cluster init` takes --context OTHER"));
    }
    Ok(())
}

fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Row {
    name: String,
    is_current: bool,
    servers: Vec<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    cluster: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    identity: String,
}

/// `forgectl context`.
///
/// # Errors
/// A context that is not known, files that cannot be used.
pub fn context(args: &ContextArgs) -> Result<()> {
    let store = ContextStore::open()?;
    match &args.command {
        ContextCommand::Add { name, server, credentials } => {
            let credentials = Credentials::load(credentials)?;
            store.add(name, server, &credentials)?;
            print_text(&format!("context {name}: {} as {}\n", server.join(","), credentials.identity()))
        }
        ContextCommand::Use { name } => {
            store.set_current(name)?;
            print_text(&format!("context {name} is the current one\n"))
        }
        ContextCommand::Remove { name } => {
            store.remove(name)?;
            print_text(&format!("context {name} is forgotten\n"))
        }
        ContextCommand::List(list) => {
            let current = store.current()?;
            let mut rows = Vec::new();
            for name in store.names()? {
                let (servers, identity) = match store.get(&name) {
                    Ok(known) => (known.servers, Some(known.credentials.identity().clone())),
                    // A damaged one is still listed: it can be removed or written anew.
                    Err(_) => (Vec::new(), None),
                };
                let cluster = identity.as_ref().map(|identity| identity.cluster_id.clone()).unwrap_or_default();
                let identity = identity.map_or("damaged".into(), |identity| format!("{}/{}", identity.role, identity.name));
                rows.push(Row { is_current: current.as_deref() == Some(&name), name, servers, cluster, identity });
            }
            let columns = [column("CURRENT"), column("NAME"), column("CLUSTER"), column("SERVERS"), wide("CERTIFICATE")];
            print_list(list.output, &rows, &columns, |row| {
                let mark = if row.is_current { "*" } else { "" };
                vec![mark.into(), row.name.clone(), row.cluster.clone(), row.servers.join(","), row.identity.clone()]
            })
        }
    }
}
