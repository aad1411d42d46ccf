//! QUIC: one connection per pair of processes, a stream per group, epoch and purpose.
//!
//! The protocol is quinn's core without I/O; the shell around it is ours, because a compute thread that waits for a message
//! does better to read the socket itself than to be woken through two other threads. A write encrypts and sends in the
//! thread that writes. One thread of the process sees to timers, and to the socket while nobody waits.
//!
//! Invariants: whoever connects has shown a certificate that names its node; locks are taken in the order connection,
//! then endpoint, and no lock is held while the layer above is called.

mod config;
mod connection;
mod driver;
mod socket;
mod wire;

pub(crate) use connection::Connection;
pub(crate) use driver::Driver;
pub(crate) use wire::Urgency;
