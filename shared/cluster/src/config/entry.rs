//! A process's entry into the cluster: its certificate from disk, or by a token at its first start.

use std::time::Duration;

use forge_shared::cluster::node::Role;

use super::Membership;
use crate::tls::{Credentials, JoinTokenText, JoinWish, NODE_FILE, TlsError, is_of_another_cluster, join};

/// What a process has once it is in.
#[derive(Debug)]
pub struct Entry {
    /// Certificate, key and CA.
    pub credentials: Credentials,
    /// `host:port` of coordinators that joining told of; empty where the certificate was there already.
    pub coordinators: Vec<String>,
}

impl Membership {
    /// The process's certificate: from its folder, else by its join token, kept in the folder from then on. `configured` are
    /// the coordinators that its configuration names.
    ///
    /// # Errors
    /// In words: no certificate and no token, a certificate of another name or role, a token of another cluster than a
    /// configured coordinator, or why joining failed.
    pub async fn enter(&self, role: Role, name: &str, configured: &[String], timeout: Duration) -> Result<Entry, String> {
        let folder = self.directory.display();
        if self.directory.join(NODE_FILE).exists() {
            let credentials = Credentials::load(&self.directory).map_err(|error| error.to_string())?;
            let identity = credentials.identity();
            if (identity.role, identity.name.as_str()) != (role, name) {
                return Err(format!(
                    "the certificate in {folder} is of the {} {:?}, and this process is the {role} {name:?}: \
                     give each process a folder of its own (membership.directory)",
                    identity.role, identity.name
                ));
            }
            return Ok(Entry { credentials, coordinators: Vec::new() });
        }
        let Some(token) = self.read_token()? else {
            return Err(format!(
                "{folder} has no certificate: put a token of `forgectl cluster join-token --role {role}` into membership.token or tokenFile"
            ));
        };
        let token = JoinTokenText::parse(&token).map_err(|error| error.to_string())?;
        // Who is named in both belongs to the token's cluster; else the coordinator itself says.
        if !configured.iter().any(|address| token.addresses.contains(address)) {
            for address in configured {
                if is_of_another_cluster(address, &token).await {
                    return Err(format!(
                        "the join token is of another cluster than the coordinator {address} that `coordinators` names; the token's \
                         are {}: take a token of `forgectl cluster join-token --role {role}` in the cluster that is meant, or name \
                         that one's coordinators",
                        token.addresses.join(", ")
                    ));
                }
            }
        }
        let wish = JoinWish { role, name: name.to_owned(), address: String::new(), build: crate::build::of_this_process()? };
        let joined = join(&token, &wish, timeout).await.map_err(|error| format!("joining the cluster: {error}"))?;
        let save = |credentials: &Credentials| -> Result<(), TlsError> { credentials.save(&self.directory) };
        save(&joined.credentials).map_err(|error| error.to_string())?;
        let cluster = &joined.credentials.identity().cluster_id;
        ::tracing::info!(%cluster, coordinators = joined.coordinators.join(","), "joined the cluster with the token");
        Ok(Entry { credentials: joined.credentials, coordinators: joined.coordinators })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::{ClusterCa, Identity, NODE_LIFETIME, NodeKey};

    fn membership(folder: &std::path::Path) -> Membership {
        Membership { directory: folder.to_owned(), ..Membership::default() }
    }

    #[tokio::test]
    async fn a_certificate_on_disk_must_be_this_process_s() {
        let folder = tempfile::tempdir().unwrap();
        let enter = async |role, name| membership(folder.path()).enter(role, name, &[], Duration::from_secs(1)).await;
        let missing = enter(Role::Gateway, "g1").await.unwrap_err();
        assert!(missing.contains("join-token --role gateway"), "{missing}");

        let now_s = crate::tls::clock_s();
        let ca = ClusterCa::create("c", now_s).unwrap();
        let key = NodeKey::generate().unwrap();
        let identity = Identity::new("c", Role::Gateway, "g1").unwrap();
        let certificate = ca.sign(&key.signing_request_der().unwrap(), &identity, NODE_LIFETIME, now_s).unwrap();
        Credentials::from_pem(&certificate, &key.pem(), ca.certificate_pem()).unwrap().save(folder.path()).unwrap();
        assert!(enter(Role::Gateway, "g1").await.is_ok());
        for (role, name) in [(Role::Gateway, "g2"), (Role::Worker, "g1")] {
            let other = enter(role, name).await.unwrap_err();
            assert!(other.contains("is of the gateway \"g1\""), "{other}");
        }
    }
}
