//! The identity in a certificate: cluster, role and name.
//!
//! Invariant: what [`Identity::uri`] writes, [`Identity::from_uri`] reads back; names are DNS labels, so that the same
//! name stands in the URI, in the host name that clients check, and in file names.

use forge_shared::cluster::node::Role;

use super::TlsError;

/// Longest name: a DNS label.
const MAX_NAME_CHARS: usize = 63;
const SCHEME: &str = "forge://";

/// Who a process is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Of the cluster; all members of it have the same.
    pub cluster_id: String,
    /// What it may do.
    pub role: Role,
    /// Its name, unique within the role.
    pub name: String,
}

impl Identity {
    /// Checks both names.
    ///
    /// # Errors
    /// [`TlsError::Name`] for a name that is no DNS label.
    pub fn new(cluster_id: &str, role: Role, name: &str) -> Result<Self, TlsError> {
        check_name("cluster id", cluster_id)?;
        check_name("name", name)?;
        Ok(Identity { cluster_id: cluster_id.into(), role, name: name.into() })
    }

    /// `forge://CLUSTER_ID/ROLE/NAME`.
    pub fn uri(&self) -> String {
        format!("{SCHEME}{}/{}/{}", self.cluster_id, self.role, self.name)
    }

    /// Reads what [`Identity::uri`] wrote.
    ///
    /// # Errors
    /// [`TlsError::Certificate`] for anything else.
    pub fn from_uri(uri: &str) -> Result<Self, TlsError> {
        let wrong = || TlsError::Certificate { reason: format!("its identity {uri:?} is not of the form forge://CLUSTER/ROLE/NAME") };
        let mut parts = uri.strip_prefix(SCHEME).ok_or_else(wrong)?.split('/');
        let (Some(cluster_id), Some(role), Some(name), None) = (parts.next(), parts.next(), parts.next(), parts.next()) else {
            return Err(wrong());
        };
        Identity::new(cluster_id, role.parse().map_err(|_| wrong())?, name).map_err(|_| wrong())
    }

    /// The host names in its certificate: `NAME.ROLE.forge` and `ROLE.forge`.
    pub fn dns_names(&self) -> [String; 2] {
        [format!("{}.{}.forge", self.name, self.role), format!("{}.forge", self.role)]
    }
}

impl std::fmt::Display for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {} of cluster {}", self.role, self.name, self.cluster_id)
    }
}

/// Checks a name of a node, cluster or person: 1 to 63 of `a-z`, `0-9` and `-`, not beginning or ending with `-`.
///
/// # Errors
/// [`TlsError::Name`] saying what to write.
pub fn check_name(what: &'static str, name: &str) -> Result<(), TlsError> {
    let allowed = name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
    if allowed && (1..=MAX_NAME_CHARS).contains(&name.len()) && !name.starts_with('-') && !name.ends_with('-') {
        return Ok(());
    }
    Err(TlsError::Name { what, name: name.chars().take(80).collect() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_comes_back_from_its_uri() {
        for role in Role::ALL {
            let identity = Identity::new("c-1", role, "host-7").unwrap();
            assert_eq!(Identity::from_uri(&identity.uri()).unwrap(), identity);
        }
    }

    #[test]
    fn other_uris_are_refused_by_name() {
        for uri in ["", "forge://c/worker", "forge://c/worker/a/b", "http://c/worker/a", "forge://c/king/a", "forge://C/worker/a"] {
            let error = Identity::from_uri(uri).unwrap_err();
            assert!(error.to_string().contains(&format!("{uri:?}")), "{error}");
        }
    }

    #[test]
    fn names_that_are_no_dns_labels_are_refused() {
        for name in ["", "-a", "a-", "A", "a.b", "a/b", "ä", &"a".repeat(64)] {
            assert!(check_name("name", name).is_err(), "{name:?}");
        }
        assert!(check_name("name", &"a".repeat(63)).is_ok());
    }
}
