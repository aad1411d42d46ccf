//! Placement: a pure function from devices and a wish to a [`Plan`] or a [`Refusal`] that explains itself.
//!
//! Invariants (property-tested below): a plan never exceeds a device's free memory; every layer is placed
//! exactly once; the same input gives the same plan; a refusal's nearest plan is feasible.

use forge_shared::ids::{Epoch, ReplicaId};
use forge_shared::plan::{DeviceView, FailedConstraint, ModelFacts, Plan, RankMemory, RankPlan, Refusal};
use forge_shared::spec::{ByteSize, ModelServiceSpec};

/// KV memory when the operator names none: at most this share of what is free after weights …
const DEFAULT_KV_SHARE: f64 = 0.5;
/// … and at most this much, so that a laptop keeps breathing.
const DEFAULT_KV_BYTES_MAX: u64 = 4 << 30;
/// The shortest context worth serving; below it a wish is refused rather than shrunk.
const MIN_MODEL_LEN: usize = 16;

/// What is to be placed.
#[derive(Debug, Clone, Copy)]
pub struct Wish<'a> {
    /// Which copy.
    pub replica: &'a ReplicaId,
    /// The epoch of the plan to make.
    pub epoch: Epoch,
    /// The operator's settings.
    pub spec: &'a ModelServiceSpec,
    /// The model's own numbers.
    pub facts: &'a ModelFacts,
}

/// Places one replica on the device where it leaves the most memory free; ties go to the first.
///
/// # Errors
/// A [`Refusal`] that lists each failed constraint with numbers and settings that would fit.
pub fn plan(devices: &[DeviceView], wish: Wish<'_>) -> Result<Plan, Refusal> {
    let mut failed: Vec<FailedConstraint> = Vec::new();
    if wish.spec.layout.tensor != 1 || wish.spec.layout.pipeline != 1 {
        let constraint = format!(
            "layout tensor={} pipeline={} needs several workers, and this process is one",
            wish.spec.layout.tensor, wish.spec.layout.pipeline
        );
        failed.push(FailedConstraint { constraint, failed_devices: devices.len(), devices: devices.len() });
        return Err(refusal(wish, failed, vec![("layout.tensor".into(), "1".into()), ("layout.pipeline".into(), "1".into())]));
    }
    if let Some(len) = wish.spec.max_model_len
        && len > wish.facts.context_length
    {
        let constraint = format!("maxModelLen {len} is beyond the model's context of {} tokens", wish.facts.context_length);
        failed.push(FailedConstraint { constraint, failed_devices: devices.len(), devices: devices.len() });
        let spec = ModelServiceSpec { max_model_len: Some(wish.facts.context_length), ..wish.spec.clone() };
        let nearest = match plan(devices, Wish { spec: &spec, ..wish }) {
            Ok(plan) => vec![("maxModelLen".into(), plan.max_model_len.to_string())],
            Err(inner) => inner.nearest,
        };
        return Err(Refusal { wrong_setting: Some("maxModelLen".into()), ..refusal(wish, failed, nearest) });
    }
    let best = devices.iter().filter_map(|device| fit(device, wish).map(|budget| (device, budget))).max_by(|a, b| {
        let spare = |(device, budget): &(&DeviceView, Budget)| device.free_bytes.0 - budget.memory.total_bytes();
        // `max_by` keeps the last of equals; compare order of devices backwards so that the first wins.
        spare(a).cmp(&spare(b)).then_with(|| (&b.0.node, b.0.device).cmp(&(&a.0.node, a.0.device)))
    });
    if let Some((device, budget)) = best {
        return Ok(Plan {
            replica: wish.replica.clone(),
            epoch: wish.epoch,
            max_model_len: budget.max_model_len,
            block_size: wish.spec.block_size,
            kv_blocks: budget.kv_blocks,
            kv_cache_dtype: wish.spec.kv_cache_dtype,
            max_step_tokens: wish.spec.max_step_tokens,
            max_batch_size: wish.spec.max_batch_size,
            ranks: vec![RankPlan {
                node: device.node.clone(),
                device: device.device,
                tensor_rank: 0,
                tensor_size: 1,
                layers: 0..wish.facts.layers,
                threads: wish.spec.threads.unwrap_or(device.threads).max(1),
                memory: budget.memory,
            }],
        });
    }
    Err(explain(devices, wish, failed))
}

/// Memory of a rank and what it allows.
struct Budget {
    max_model_len: usize,
    kv_blocks: usize,
    memory: RankMemory,
}

fn fit(device: &DeviceView, wish: Wish<'_>) -> Option<Budget> {
    let facts = wish.facts;
    let fixed_bytes = facts.weights_bytes.checked_add(facts.workspace_bytes)?;
    let left_bytes = device.free_bytes.0.checked_sub(fixed_bytes)?;
    let block_bytes = facts.kv_slot_bytes.checked_mul(wish.spec.block_size as u64)?.max(1);
    let wanted_len = wish.spec.max_model_len.unwrap_or(facts.context_length);
    let full_batch_bytes =
        blocks_for(wanted_len, wish.spec.block_size).saturating_mul(wish.spec.max_batch_size as u64).saturating_mul(block_bytes);
    let default_bytes = ((left_bytes as f64 * DEFAULT_KV_SHARE) as u64).min(DEFAULT_KV_BYTES_MAX).min(full_batch_bytes);
    let kv_bytes = match wish.spec.kv_memory {
        Some(ByteSize(bytes)) => bytes,
        // One full context is worth more than the default's modesty.
        None => default_bytes.max(blocks_for(wanted_len, wish.spec.block_size).saturating_mul(block_bytes).min(left_bytes)),
    };
    if kv_bytes > left_bytes {
        return None;
    }
    let kv_blocks = kv_bytes / block_bytes;
    let longest = kv_blocks.saturating_mul(wish.spec.block_size as u64);
    let max_model_len = match wish.spec.max_model_len {
        Some(len) if len as u64 > longest => return None,
        Some(len) => len,
        None => wanted_len.min(usize::try_from(longest).unwrap_or(usize::MAX)),
    };
    if max_model_len < MIN_MODEL_LEN.min(wanted_len) {
        return None;
    }
    let memory =
        RankMemory { weights_bytes: facts.weights_bytes, kv_bytes: kv_blocks * block_bytes, workspace_bytes: facts.workspace_bytes };
    Some(Budget { max_model_len, kv_blocks: usize::try_from(kv_blocks).ok()?, memory })
}

fn blocks_for(tokens: usize, block_size: usize) -> u64 {
    tokens.div_ceil(block_size.max(1)) as u64
}

/// Says what failed where, and searches the longest context that fits the roomiest device.
fn explain(devices: &[DeviceView], wish: Wish<'_>, mut failed: Vec<FailedConstraint>) -> Refusal {
    let facts = wish.facts;
    let fixed_bytes = facts.weights_bytes.saturating_add(facts.workspace_bytes);
    let mut add = |constraint: String, fails: &dyn Fn(&DeviceView) -> bool| {
        let failed_devices = devices.iter().filter(|device| fails(device)).count();
        if failed_devices > 0 || devices.is_empty() {
            failed.push(FailedConstraint { constraint, failed_devices, devices: devices.len() });
        }
    };
    let free_max = devices.iter().map(|device| device.free_bytes.0).max().unwrap_or(0);
    add(
        format!(
            "weights {} and workspace {} must fit in free memory ({} at most)",
            ByteSize(facts.weights_bytes),
            ByteSize(facts.workspace_bytes),
            ByteSize(free_max)
        ),
        &|device| device.free_bytes.0 < fixed_bytes,
    );
    if let Some(kv_memory) = wish.spec.kv_memory {
        let left = ByteSize(free_max.saturating_sub(fixed_bytes));
        add(format!("kvMemory {kv_memory} must fit beside weights and workspace ({left} left)"), &|device| {
            device.free_bytes.0.saturating_sub(fixed_bytes) < kv_memory.0
        });
    }
    let wanted_len = wish.spec.max_model_len.unwrap_or(facts.context_length);
    let context_bytes = (wanted_len as u64).saturating_mul(facts.kv_slot_bytes);
    add(format!("one sequence of {wanted_len} tokens needs {} of KV memory", ByteSize(context_bytes)), &|device| {
        let left = device.free_bytes.0.saturating_sub(fixed_bytes);
        wish.spec.kv_memory.map_or(left, |kv_memory| kv_memory.0.min(left)) < context_bytes
    });
    let nearest = nearest(devices, wish);
    refusal(wish, failed, nearest)
}

/// The same wish with less: first without the operator's KV memory, then with the longest context that fits.
fn nearest(devices: &[DeviceView], wish: Wish<'_>) -> Vec<(String, String)> {
    let fits = |spec: &ModelServiceSpec| devices.iter().any(|device| fit(device, Wish { spec, ..wish }).is_some());
    let mut spec = wish.spec.clone();
    let mut changes = Vec::new();
    let wanted_len = wish.spec.max_model_len.unwrap_or(wish.facts.context_length);
    let (mut low, mut high) = (0, wanted_len);
    // The longest context under the operator's own KV memory, by bisection: fitting is monotone in it.
    while low < high {
        let middle = low + (high - low).div_ceil(2);
        spec.max_model_len = Some(middle);
        if fits(&spec) { low = middle } else { high = middle - 1 }
    }
    if low >= MIN_MODEL_LEN.min(wanted_len) && low > 0 {
        return vec![("maxModelLen".into(), low.to_string())];
    }
    if wish.spec.kv_memory.is_some() {
        spec = ModelServiceSpec { kv_memory: None, max_model_len: None, ..wish.spec.clone() };
        if let Some(budget) =
            devices.iter().filter_map(|device| fit(device, Wish { spec: &spec, ..wish })).max_by_key(|budget| budget.kv_blocks)
        {
            changes.push(("kvMemory".into(), ByteSize(budget.memory.kv_bytes).0.to_string()));
            changes.push(("maxModelLen".into(), budget.max_model_len.to_string()));
        }
    }
    changes
}

fn refusal(wish: Wish<'_>, constraints: Vec<FailedConstraint>, nearest: Vec<(String, String)>) -> Refusal {
    Refusal { replica: wish.replica.clone(), wrong_setting: None, constraints, nearest }
}

#[cfg(test)]
mod tests {
    use forge_shared::ids::{NodeId, ServiceName};
    use proptest::prelude::*;

    use super::*;

    fn replica() -> ReplicaId {
        ReplicaId { service: ServiceName::from("demo"), index: 0 }
    }

    fn facts(weights_mib: u64) -> ModelFacts {
        ModelFacts {
            layers: 30,
            context_length: 8192,
            weights_bytes: weights_mib << 20,
            kv_slot_bytes: 23_040,
            workspace_bytes: 64 << 20,
            weights_digest: String::new(),
            shape: Default::default(),
        }
    }

    fn device(number: u32, free_mib: u64) -> DeviceView {
        DeviceView { node: NodeId::from("n"), device: number, free_bytes: ByteSize(free_mib << 20), threads: 2 }
    }

    fn try_plan(devices: &[DeviceView], spec: &ModelServiceSpec, facts: &ModelFacts) -> Result<Plan, Refusal> {
        plan(devices, Wish { replica: &replica(), epoch: Epoch(1), spec, facts })
    }

    #[test]
    fn a_small_model_gets_its_whole_context() {
        let plan = try_plan(&[device(0, 16_000)], &ModelServiceSpec::default(), &facts(94)).expect("fits");
        assert_eq!(plan.max_model_len, 8192);
        assert!(plan.ranks[0].memory.kv_bytes <= DEFAULT_KV_BYTES_MAX);
        assert_eq!(plan.ranks[0].layers, 0..30);
    }

    #[test]
    fn short_memory_shortens_an_unstated_context_only() {
        let plan = try_plan(&[device(0, 300)], &ModelServiceSpec::default(), &facts(94)).expect("fits shorter");
        assert!(plan.max_model_len < 8192 && plan.max_model_len >= 1024, "{}", plan.max_model_len);
        let stated = ModelServiceSpec { max_model_len: Some(8192), ..Default::default() };
        let refusal = try_plan(&[device(0, 300)], &stated, &facts(94)).expect_err("too long");
        assert!(refusal.to_string().contains("maxModelLen=") && refusal.wrong_setting.is_none(), "{refusal}");
    }

    #[test]
    fn a_context_beyond_the_model_is_refused() {
        let spec = ModelServiceSpec { max_model_len: Some(9000), ..Default::default() };
        let refusal = try_plan(&[device(0, 16_000)], &spec, &facts(94)).expect_err("beyond");
        assert_eq!(refusal.nearest, vec![("maxModelLen".to_owned(), "8192".to_owned())]);
        assert_eq!(refusal.wrong_setting.as_deref(), Some("maxModelLen"), "no machine could");
    }

    #[test]
    fn weights_that_do_not_fit_are_refused_with_numbers() {
        let refusal = try_plan(&[device(0, 1000), device(1, 2000)], &ModelServiceSpec::default(), &facts(14_000)).expect_err("too big");
        let text = refusal.to_string();
        assert!(text.contains("13.7GiB") && text.contains("2 of 2") && text.contains("no smaller setting"), "{text}");
    }

    #[test]
    fn the_roomiest_device_wins_and_ties_go_to_the_first() {
        let spec = ModelServiceSpec { kv_memory: Some(ByteSize(256 << 20)), ..Default::default() };
        let chosen = |devices: &[DeviceView]| try_plan(devices, &spec, &facts(94)).expect("fits").ranks[0].device;
        assert_eq!(chosen(&[device(0, 4000), device(1, 8000)]), 1);
        assert_eq!(chosen(&[device(0, 8000), device(1, 8000)]), 0);
    }

    proptest! {
        #[test]
        fn plans_stay_in_memory_and_nearest_plans_are_feasible(
            free in proptest::collection::vec(1u64..40_000, 1..5),
            weights in 1u64..30_000,
            len in proptest::option::of(16usize..20_000),
            kv in proptest::option::of(1u64..8_000),
            block_size in 1usize..64,
        ) {
            let devices: Vec<DeviceView> = free.iter().enumerate().map(|(i, mib)| device(i as u32, *mib)).collect();
            let spec = ModelServiceSpec { max_model_len: len, kv_memory: kv.map(|mib| ByteSize(mib << 20)), block_size, ..Default::default() };
            let facts = facts(weights);
            match try_plan(&devices, &spec, &facts) {
                Ok(plan) => {
                    let rank = &plan.ranks[0];
                    prop_assert!(rank.memory.total_bytes() <= devices[rank.device as usize].free_bytes.0);
                    prop_assert!(plan.kv_blocks * plan.block_size >= plan.max_model_len);
                    prop_assert!(len.is_none_or(|len| plan.max_model_len == len));
                    prop_assert_eq!(&try_plan(&devices, &spec, &facts), &Ok(plan.clone()));
                }
                Err(refusal) => {
                    prop_assert!(!refusal.constraints.is_empty());
                    if !refusal.nearest.is_empty() {
                        let mut nearer = spec.clone();
                        for (key, value) in &refusal.nearest {
                            match key.as_str() {
                                "maxModelLen" => nearer.max_model_len = value.parse().ok(),
                                "kvMemory" => nearer.kv_memory = value.parse().ok(),
                                other => prop_assert!(false, "unexpected key {}", other),
                            }
                        }
                        prop_assert!(try_plan(&devices, &nearer, &facts).is_ok(), "{}", refusal);
                    }
                }
            }
        }
    }
}
