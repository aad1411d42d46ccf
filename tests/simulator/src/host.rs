//! Names of the simulated processes.

/// A process of the simulated cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Host {
    /// By its raft id.
    Coordinator(u16),
    /// By its index.
    Worker(u16),
    /// By its index.
    Gateway(u16),
    /// By its index.
    Client(u16),
    /// Who asks gateways for answers, by its index.
    Caller(u16),
}

impl Host {
    /// A different number for each.
    pub fn number(self) -> u64 {
        match self {
            Host::Coordinator(index) => u64::from(index),
            Host::Worker(index) => 1 << 16 | u64::from(index),
            Host::Gateway(index) => 2 << 16 | u64::from(index),
            Host::Client(index) => 3 << 16 | u64::from(index),
            Host::Caller(index) => 4 << 16 | u64::from(index),
        }
    }

    /// Its address in the simulated network.
    pub fn address(self) -> String {
        format!("{self}:1")
    }

    /// The coordinator at an address.
    pub fn coordinator_at(address: &str) -> Option<Host> {
        address.strip_prefix('c')?.strip_suffix(":1")?.parse().ok().map(Host::Coordinator)
    }
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let text = match self {
            Host::Coordinator(index) => format!("c{index}"),
            Host::Worker(index) => format!("w{index}"),
            Host::Gateway(index) => format!("g{index}"),
            Host::Client(index) => format!("u{index}"),
            Host::Caller(index) => format!("a{index}"),
        };
        f.pad(&text)
    }
}
