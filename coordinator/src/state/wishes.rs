//! Earlier wishes of a service: what is kept of them, the way back, and rollouts that are stuck.
//!
//! Invariant: an earlier wish is there once, under its newest generation, and is never the present one; the number of
//! replicas and the strategy are no part of what is gone back to.

use forge_shared::cluster::command::CommandError;
use forge_shared::cluster::event::{Change, Object};
use forge_shared::cluster::service::{PastWish, ServiceRecord};
use forge_shared::ids::ServiceName;
use forge_shared::spec::ModelService;

use super::level::ROLLOUTS;
use super::notices::Weight;
use super::services::about;
use super::{ClusterState, Effect, MAX_HISTORY, MAX_REASON_BYTES, Step, changes_replicas, checks};

impl ClusterState {
    pub(super) fn undo_service(&mut self, name: &ServiceName, to: Option<u64>, step: &mut Step) -> Result<Effect, CommandError> {
        let known = self.living_service(name)?;
        if to == Some(known.generation) {
            return Ok(Effect::NONE);
        }
        let found = match to {
            None => known.history.last(),
            Some(generation) => known.history.iter().find(|past| past.generation == generation),
        };
        let Some(past) = found else {
            let there: Vec<String> = known.history.iter().map(|past| past.generation.to_string()).collect();
            let there = if there.is_empty() {
                "there is none before the present one".to_owned()
            } else {
                format!("there are {}", there.join(", "))
            };
            return checks::invalid("to", format!("no earlier wish of {name} to go back to: {there}"));
        };
        let wish = ModelService {
            spec: forge_shared::spec::ModelServiceSpec {
                replicas: known.service.spec.replicas,
                rollout: known.service.spec.rollout,
                ..past.service.spec.clone()
            },
            ..past.service.clone()
        };
        let from = past.generation;
        let applied = self.apply_service(&wish, step)?;
        let now = self.living_service(name)?.generation;
        let message = format!("service {name} went back to generation {from}, as generation {now}");
        self.notice(step, Weight::Normal, "ServiceUndone", about(name), message);
        Ok(applied)
    }

    /// Keeps the wish of a generation that ends.
    pub(super) fn remember_wish(&self, record: &mut ServiceRecord, next: &ModelService) {
        if self.level < ROLLOUTS {
            return;
        }
        let is_other = |wish: &ModelService| changes_replicas(wish, next) && changes_replicas(wish, &record.service);
        record.history.retain(|past| is_other(&past.service));
        let past = PastWish { generation: record.generation, service: record.service.clone(), changed_ms: record.changed_ms };
        record.history.push(past);
        let too_many = record.history.len().saturating_sub(MAX_HISTORY);
        record.history.drain(..too_many);
        record.changed_ms = Some(self.clock.latest_ms());
        record.stuck = None;
    }

    /// When a first wish came.
    pub(super) fn wish_time_ms(&self) -> Option<u64> {
        (self.level >= ROLLOUTS).then(|| self.clock.latest_ms())
    }

    pub(super) fn record_rollout(
        &mut self,
        name: &ServiceName,
        generation: u64,
        stuck: Option<&str>,
        step: &mut Step,
    ) -> Result<Effect, CommandError> {
        let known = self.living_service(name)?;
        let stuck = stuck.map(|reason| checks::cut(reason, MAX_REASON_BYTES));
        if known.generation != generation || known.stuck == stuck {
            return Ok(Effect::NONE);
        }
        let mut record = known.clone();
        record.stuck.clone_from(&stuck);
        // Placement does not depend on it.
        step.changes.push(Change::Put { object: Object::Service(Box::new(record.clone())) });
        self.services.insert(name.clone(), record);
        match stuck {
            Some(reason) => {
                self.notice(step, Weight::Warning, "RolloutStuck", about(name), format!("generation {generation} of {name}: {reason}"))
            }
            None => self.notice(step, Weight::Normal, "RolloutGoesOn", about(name), format!("generation {generation} of {name} goes on")),
        }
        Ok(Effect::CHANGED)
    }
}

#[cfg(test)]
mod tests {
    use forge_shared::cluster::command::Command;
    use forge_shared::rollout::{Portion, RolloutSpec};
    use forge_shared::spec::ModelServiceSpec;

    use super::super::test_support::World;
    use super::*;

    fn batch(max_batch_size: usize) -> ModelServiceSpec {
        ModelServiceSpec { max_batch_size, ..Default::default() }
    }

    fn demo(world: &World) -> &ServiceRecord {
        &world.state.services()[&ServiceName::from("demo")]
    }

    fn undo(world: &mut World, to: Option<u64>) -> Result<(), CommandError> {
        world.run(Command::UndoService { name: "demo".into(), to }).map(|_| ())
    }

    fn generations(world: &World) -> Vec<u64> {
        demo(world).history.iter().map(|past| past.generation).collect()
    }

    #[test]
    fn an_earlier_wish_comes_back_as_a_new_generation() {
        let mut world = World::new();
        world.apply("demo", batch(1)).expect("1");
        let refusal = undo(&mut world, None).expect_err("nothing before").to_string();
        assert!(refusal.contains("none before"), "{refusal}");
        world.apply("demo", batch(2)).expect("2");
        world.apply("demo", batch(3)).expect("3");
        assert_eq!(generations(&world), [1, 2]);
        // The number of copies and the strategy are those of now.
        world.run(Command::ScaleService { name: "demo".into(), replicas: 5 }).expect("scaled");
        let rollout = RolloutSpec { max_unavailable: Portion::Count(2), ..Default::default() };
        world.apply("demo", ModelServiceSpec { replicas: 5, rollout, ..batch(3) }).expect("no new generation");
        assert_eq!(demo(&world).generation, 3);
        undo(&mut world, None).expect("back");
        let wish = &demo(&world).service.spec;
        assert_eq!((demo(&world).generation, wish.max_batch_size, wish.replicas, wish.rollout), (4, 2, 5, rollout));
        assert_eq!(generations(&world), [1, 3]);
        undo(&mut world, Some(1)).expect("further back");
        assert_eq!((demo(&world).generation, demo(&world).service.spec.max_batch_size), (5, 1));
        assert_eq!(generations(&world), [3, 4]);
        let refusal = undo(&mut world, Some(2)).expect_err("it is 4 now").to_string();
        assert!(refusal.contains("there are 3, 4"), "{refusal}");
    }

    #[test]
    fn so_many_are_kept() {
        let mut world = World::new();
        for size in 1..40 {
            world.apply("demo", batch(size)).expect("changed");
        }
        assert_eq!(demo(&world).history.len(), MAX_HISTORY);
        assert_eq!(generations(&world).last(), Some(&38));
    }

    #[test]
    fn a_stuck_rollout_is_said_once_and_forgotten_with_the_next_wish() {
        let mut world = World::new();
        world.apply("demo", batch(1)).expect("1");
        let stuck =
            |generation, reason: Option<&str>| Command::RecordRollout { name: "demo".into(), generation, stuck: reason.map(str::to_owned) };
        assert!(!world.run(stuck(7, Some("x"))).expect("of another generation").changed);
        assert!(world.run(stuck(1, Some("no room"))).expect("stuck").changed);
        assert!(!world.run(stuck(1, Some("no room"))).expect("said").changed);
        assert_eq!(demo(&world).stuck.as_deref(), Some("no room"));
        let placement = world.state.placement_revision();
        assert!(world.run(stuck(1, None)).expect("goes on").changed);
        assert_eq!(world.state.placement_revision(), placement, "plans under way stay good");
        world.run(stuck(1, Some("no room"))).expect("stuck");
        world.apply("demo", batch(2)).expect("2");
        assert_eq!(demo(&world).stuck, None);
    }
}
