//! The network of a chaos test: joins network namespaces by tun devices, and spoils what passes as it is told.
//!
//! ```text
//! relay SEED HOST=NAMESPACE,ADDRESS…
//! ```
//!
//! In each namespace it makes the device `eth0`, which is gone when it ends; addresses and routes are the caller's. It prints
//! `ready`, takes the lines of `forge_tests::relay::Command` on standard input, answers each on standard output, and
//! ends with its input. It needs root. What it is not: a switch of frames; it carries IPv4 and drops the rest.

#[cfg(target_os = "linux")]
mod carrier;
#[cfg(target_os = "linux")]
mod system;

#[cfg(target_os = "linux")]
fn main() -> anyhow::Result<()> {
    carrier::carry(std::env::args().skip(1))
}

#[cfg(not(target_os = "linux"))]
fn main() -> anyhow::Result<()> {
    anyhow::bail!("relay needs Linux: network namespaces and tun devices")
}
