//! The relay's line protocol.
//!
//! ```text
//! fault NAME FROM TO [loss=0.3] [delay_ms=50] [jitter_ms=20] [reorder=0.2] [duplicate=0.01] [rate_kbps=500]
//! heal NAME      heal *
//! counts
//! ```
//!
//! FROM and TO are names of hosts, or `*`. Each line is answered by `ok`, a line of JSON, or `error: ` and why.

use anyhow::{Context, Result, bail, ensure};

use super::{Host, Relay, Rule};

/// A line, understood.
#[derive(Debug, Clone, PartialEq)]
pub enum Command {
    /// Add a rule to a fault.
    Fault {
        /// The fault.
        name: String,
        /// Sender, if one.
        from: Option<Host>,
        /// Receiver, if one.
        to: Option<Host>,
        /// What happens between them.
        rule: Rule,
    },
    /// End a fault, or all (`None`).
    Heal(Option<String>),
    /// Say what happened so far.
    Counts,
}

impl Command {
    /// Reads a line; `hosts` are the names in the relay's order.
    ///
    /// # Errors
    /// What is wrong with it, and what is expected.
    pub fn parse(line: &str, hosts: &[String]) -> Result<Command> {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["fault", name, from, to, settings @ ..] => {
                ensure!(*name != "*", "a fault is not called *, which means all of them");
                let rule = rule(settings)?;
                Ok(Command::Fault { name: (*name).to_owned(), from: host(from, hosts)?, to: host(to, hosts)?, rule })
            }
            ["heal", "*"] => Ok(Command::Heal(None)),
            ["heal", name] => Ok(Command::Heal(Some((*name).to_owned()))),
            ["counts"] => Ok(Command::Counts),
            _ => bail!("expected `fault NAME FROM TO KEY=VALUE…`, `heal NAME`, `heal *` or `counts`, not {line:?}"),
        }
    }

    /// Does it; what to answer.
    ///
    /// # Errors
    /// There is no such fault.
    pub fn apply(self, relay: &mut Relay) -> Result<String> {
        match self {
            Command::Fault { name, from, to, rule } => relay.begin(&name, from, to, rule),
            Command::Heal(None) => relay.heal_all(),
            Command::Heal(Some(name)) => ensure!(relay.heal(&name), "there is no fault {name:?}"),
            Command::Counts => return Ok(serde_json::to_string(&relay.counts())?),
        }
        Ok("ok".to_owned())
    }
}

fn host(name: &str, hosts: &[String]) -> Result<Option<Host>> {
    if name == "*" {
        return Ok(None);
    }
    let place = hosts.iter().position(|known| known == name);
    Ok(Some(place.with_context(|| format!("there is no host {name:?}; there are {}", hosts.join(", ")))?))
}

fn rule(settings: &[&str]) -> Result<Rule> {
    let mut rule = Rule::default();
    ensure!(!settings.is_empty(), "a fault needs at least one of loss, delay_ms, jitter_ms, reorder, duplicate, rate_kbps");
    for setting in settings {
        let (key, text) = setting.split_once('=').with_context(|| format!("{setting:?} is not KEY=VALUE"))?;
        let value: f64 = text.parse().with_context(|| format!("{key} is no number: {text:?}"))?;
        ensure!(value.is_finite() && value >= 0.0, "{key} is {text}; it must be 0 or more");
        let share = || -> Result<f64> {
            ensure!(value <= 1.0, "{key} is a share from 0 to 1, not {text}");
            Ok(value)
        };
        let micros = || -> Result<u64> {
            ensure!(value <= 60_000.0, "{key} is at most 60000, not {text}");
            Ok((value * 1000.0) as u64)
        };
        match key {
            "loss" => rule.loss = share()?,
            "reorder" => rule.reorder = share()?,
            "duplicate" => rule.duplicate = share()?,
            "delay_ms" => rule.delay_us = micros()?,
            "jitter_ms" => rule.jitter_us = micros()?,
            "rate_kbps" => {
                ensure!((1.0..=1e9).contains(&value), "rate_kbps is 1 to 1e9, not {text}");
                rule.rate_bytes = Some((value * 125.0) as u64);
            }
            _ => bail!("there is no setting {key:?}; there are loss, delay_ms, jitter_ms, reorder, duplicate and rate_kbps"),
        }
    }
    ensure!(rule.reorder == 0.0 || rule.delay_us > 0, "reorder needs delay_ms: packets overtake others that are held");
    Ok(rule)
}
