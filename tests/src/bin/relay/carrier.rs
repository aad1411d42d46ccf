//! The loop that moves packets between devices and the core, and lines between the caller and the core.
//!
//! One thread, one poll; it never blocks on a device. What a device refuses (it is down, its queue is full) is lost.

use std::io::Write;
use std::net::Ipv4Addr;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use forge_tests::relay::{Command, Relay};

use crate::system::{Device, Input, poll};

/// As long as any packet of a tun device.
const PACKET_BYTES: usize = 65_536;
/// Packets read from one device before the others have their turn.
const TURN: usize = 64;
/// Without packets it looks so often whether anything is to be done.
const IDLE_US: u64 = 1_000_000;
/// A line longer than that is no command.
const LONGEST_LINE: usize = 4_096;

pub(crate) fn carry(mut arguments: impl Iterator<Item = String>) -> Result<()> {
    let usage = "usage: relay SEED HOST=NAMESPACE,ADDRESS…";
    let seed = arguments.next().context(usage)?.parse().context("SEED is no number")?;
    let (mut hosts, mut devices, mut addresses) = (Vec::new(), Vec::new(), Vec::new());
    for argument in arguments {
        let parts = argument.split_once('=').and_then(|(host, rest)| rest.split_once(',').map(|(name, address)| (host, name, address)));
        let (host, namespace, address) = parts.with_context(|| format!("{argument:?}; {usage}"))?;
        addresses.push(address.parse::<Ipv4Addr>().with_context(|| format!("{address:?} is no IPv4 address"))?);
        devices.push(Device::open(namespace, "eth0").with_context(|| format!("no device in namespace {namespace}"))?);
        hosts.push(host.to_owned());
    }
    ensure!(!hosts.is_empty(), usage);
    answer("ready")?;
    Carrier { relay: Relay::new(addresses, seed), hosts, devices, input: Input::new()?, line: Vec::new(), began: Instant::now() }.run()
}

struct Carrier {
    relay: Relay,
    hosts: Vec<String>,
    devices: Vec<Device>,
    input: Input,
    /// What came of a line that is not whole yet.
    line: Vec<u8>,
    began: Instant,
}

impl Carrier {
    fn run(mut self) -> Result<()> {
        let mut buffer = vec![0; PACKET_BYTES];
        loop {
            let wait_us = self.relay.next_us().map_or(IDLE_US, |next_us| next_us.saturating_sub(self.now_us()));
            let ready = poll(&self.input, &self.devices, wait_us).context("poll")?;
            if ready.input && !self.listen(&mut buffer)? {
                return Ok(());
            }
            for host in ready.devices {
                for _ in 0..TURN {
                    let Some(length) = self.devices[host].read(&mut buffer).with_context(|| format!("{}'s device", self.hosts[host]))?
                    else {
                        break;
                    };
                    let now_us = self.now_us();
                    self.relay.take(now_us, host, buffer[..length].to_vec());
                }
            }
            let now_us = self.now_us();
            while let Some((to, packet)) = self.relay.due(now_us) {
                self.devices[to].write(&packet);
            }
        }
    }

    fn now_us(&self) -> u64 {
        self.began.elapsed().as_micros() as u64
    }

    /// Reads lines and does them; false at the input's end.
    fn listen(&mut self, buffer: &mut [u8]) -> Result<bool> {
        let Some(length) = self.input.read(buffer).context("standard input")? else { return Ok(true) };
        if length == 0 {
            return Ok(false);
        }
        self.line.extend_from_slice(&buffer[..length]);
        while let Some(end) = self.line.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            let done = Command::parse(line.trim(), &self.hosts).and_then(|command| command.apply(&mut self.relay));
            answer(&done.unwrap_or_else(|error| format!("error: {error:#}")))?;
        }
        if self.line.len() > LONGEST_LINE {
            bail!("a line of more than {LONGEST_LINE} bytes");
        }
        Ok(true)
    }
}

fn answer(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).context("standard output")
}
