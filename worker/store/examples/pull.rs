//! Pulls a model by name and prints every event: `cargo run -p forge-store --example pull -- NAME`.
//! Settings come from the environment (`FORGE_HOME`, `FORGE_OFFLINE`, `HF_ENDPOINT`, …).

use std::sync::Mutex;
use std::time::{Duration, Instant};

use forge_store::{ForgeHome, PullEvent, PullOptions, Store};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let name = std::env::args().nth(1);
    let store = Store::open(&ForgeHome::discover()?)?;
    let name = name.unwrap_or_else(|| store.catalogue().default_alias().to_owned());
    let start = Instant::now();
    let last = Mutex::new(Duration::ZERO);
    let print = |event: PullEvent| {
        let now = start.elapsed();
        let is_count = matches!(event, PullEvent::FileBytes { .. } | PullEvent::Verifying { .. } | PullEvent::Unpacking { .. });
        let mut last = last.lock().expect("printing does not panic");
        if !is_count || now.saturating_sub(*last) > Duration::from_millis(500) {
            println!("{:6.2} s  {event:?}", now.as_secs_f32());
            *last = now;
        }
    };
    let model = store.pull(&name, &PullOptions::from_environment()?, &print)?;
    println!("{} {}\n{}", model.name(), model.digest(), model.path().display());
    Ok(())
}
