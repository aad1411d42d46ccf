//! Contexts: the clusters this user knows, each with addresses and a certificate, under `FORGE_HOME/contexts`.
//!
//! Invariant: a context's folder is complete (`context.json`, `node.pem`, `ca.pem`) or is not there.

use std::fs;
use std::path::{Path, PathBuf};

use forge_cluster::tls::{Credentials, check_name, write_private, write_public};
use forge_store::ForgeHome;
use serde::{Deserialize, Serialize};

use crate::cli::cluster::{ContextArgs, ContextCommand};
use crate::failure::{Failure, Result};
use crate::output::{column, print_list, print_text, wide};

const FILE: &str = "context.json";
const CURRENT: &str = "current";

/// What is stored of a context, beside its credentials.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Stored {
    servers: Vec<String>,
}

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

    /// Remembers a cluster; replaces one of the same name. The first one becomes the current one.
    ///
    /// # Errors
    /// A name that is none, or files that cannot be written.
    pub fn add(&self, name: &str, servers: &[String], credentials: &Credentials) -> Result<()> {
        self.put(name, servers, credentials)?;
        if self.current()?.is_none() {
            self.set_current(name)?;
        }
        Ok(())
    }

    /// Remembers a cluster; replaces one of the same name. Which one is current stays.
    ///
    /// # Errors
    /// As [`ContextStore::add`].
    pub fn put(&self, name: &str, servers: &[String], credentials: &Credentials) -> Result<()> {
        check_name("context", name)?;
        credentials.save(&self.folder.join(name))?;
        self.write(name, servers)
    }

    /// Whether there is one of this name.
    pub fn has(&self, name: &str) -> bool {
        self.folder.join(name).join(FILE).is_file()
    }

    /// Forgets a cluster if this is still its address.
    ///
    /// # Errors
    /// Files that cannot be removed.
    pub fn remove_if_at(&self, name: &str, server: &str) -> Result<()> {
        let is_there = self.has(name) && self.get(name)?.servers == [server];
        if is_there { self.remove(name) } else { Ok(()) }
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

    fn write(&self, name: &str, servers: &[String]) -> Result<()> {
        let stored = serde_json::to_string_pretty(&Stored { servers: servers.to_vec() }).map_err(|error| Failure::of(&error))?;
        Ok(write_private(&self.folder.join(name).join(FILE), &(stored + "\n"))?)
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
        let text = fs::read_to_string(folder.join(FILE)).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => {
                let known = self.names().unwrap_or_default().join(", ");
                let known = if known.is_empty() { "none yet".into() } else { known };
                Failure::usage(format!("there is no context {name:?}")).help(format!("known: {known}; `forgectl context add` makes one"))
            }
            _ => Failure::of(&error).while_doing(&format!("cannot read context {name:?}")),
        })?;
        let stored: Stored = serde_json::from_str(&text).map_err(|error| {
            Failure::of(&error).while_doing(&format!("context {name:?} is damaged")).help("`forgectl context add` writes it anew")
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
        self.get(name)?;
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
