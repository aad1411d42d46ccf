//! The program ends at once at a second signal.

#[path = "../../tests/support/second_signal.rs"]
mod second_signal;

use std::process::Command;

use forge_shared::cluster::node::Role;
use second_signal::{Place, ends_at_once};

#[test]
fn the_second_signal_ends_the_program_at_once() {
    let config = |place: &Place<'_>| {
        format!(
            "apiVersion: forge/v1\nkind: Gateway\nname: n1\ncoordinators: [127.0.0.1:1]\ngateway:\n  port: {}\n  metrics_port: {}\nmembership:\n  directory: {}\n",
            place.listen.port(),
            place.metrics.port(),
            place.tls.display()
        )
    };
    let program = &mut Command::new(env!("CARGO_BIN_EXE_forge-gateway"));
    ends_at_once(Role::Gateway, program, config, |place| place.listen);
}
