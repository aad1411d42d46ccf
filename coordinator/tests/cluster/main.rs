//! Three coordinators in one process, on loopback, with real certificates, and what is asked of them over the wire.

mod access;
mod backup;
mod bad_input;
mod certificates;
mod embedded;
mod group;
mod machine;
mod nodes;
mod support;
mod upgrade;
