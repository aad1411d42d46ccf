//! Faults on demand, for tests of failover. Compiled out of release builds.
//!
//! `FORGE_FAULT=engine-panic-at-step:N` ends the engine's thread by a panic at the process's N-th step, once.
//! `FORGE_FAULT=engine-panic-every:N` does so at every N-th step of each engine, until its supervisor gives up.
//! `FORGE_FAULT=load-takes-ms:N` makes every load last N milliseconds longer.

use std::sync::atomic::{AtomicU64, Ordering};

use forge_model::{ModelError, StepModel, StepModelInfo, StepPlan};

use crate::WorkerError;

/// Steps of the whole process, over restarts.
static STEPS: AtomicU64 = AtomicU64::new(0);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    PanicAtStep(u64),
    PanicEvery(u64),
    LoadTakesMs(u64),
}

fn parse(text: &str) -> Result<Fault, WorkerError> {
    let wrong = || WorkerError::Setting {
        field: "FORGE_FAULT",
        reason: format!("{text:?} is not engine-panic-at-step:N, engine-panic-every:N or load-takes-ms:N"),
    };
    let (name, count) = text.split_once(':').ok_or_else(wrong)?;
    let count: u64 = count.parse().ok().filter(|count| *count > 0).ok_or_else(wrong)?;
    match name {
        "engine-panic-at-step" => Ok(Fault::PanicAtStep(count)),
        "engine-panic-every" => Ok(Fault::PanicEvery(count)),
        "load-takes-ms" => Ok(Fault::LoadTakesMs(count)),
        _ => Err(wrong()),
    }
}

/// Wraps a model with the fault that the environment asks for, if any.
pub fn inject(model: Box<dyn StepModel>) -> Result<Box<dyn StepModel>, WorkerError> {
    match std::env::var("FORGE_FAULT") {
        Err(_) => Ok(model),
        Ok(text) => match parse(&text)? {
            Fault::LoadTakesMs(milliseconds) => {
                std::thread::sleep(std::time::Duration::from_millis(milliseconds));
                Ok(model)
            }
            fault => Ok(Box::new(Faulty { model, fault, own_steps: 0 })),
        },
    }
}

struct Faulty {
    model: Box<dyn StepModel>,
    fault: Fault,
    own_steps: u64,
}

impl StepModel for Faulty {
    fn info(&self) -> &StepModelInfo {
        self.model.info()
    }

    fn step(&mut self, plan: &StepPlan, logits: &mut Vec<f32>) -> Result<(), ModelError> {
        let all_steps = STEPS.fetch_add(1, Ordering::Relaxed) + 1;
        self.own_steps += 1;
        match self.fault {
            Fault::PanicAtStep(step) if step == all_steps => panic!("injected fault at step {step}"),
            Fault::PanicEvery(steps) if self.own_steps.is_multiple_of(steps) => panic!("injected fault after {steps} steps"),
            _ => self.model.step(plan, logits),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_known_faults_are_taken() {
        assert_eq!(parse("engine-panic-at-step:3").ok(), Some(Fault::PanicAtStep(3)));
        assert_eq!(parse("engine-panic-every:7").ok(), Some(Fault::PanicEvery(7)));
        assert_eq!(parse("load-takes-ms:5").ok(), Some(Fault::LoadTakesMs(5)));
        for text in ["", "engine-panic-every", "engine-panic-every:0", "engine-panic-every:x", "flood:1"] {
            assert!(parse(text).is_err_and(|error| error.to_string().contains("FORGE_FAULT")), "{text}");
        }
    }
}
