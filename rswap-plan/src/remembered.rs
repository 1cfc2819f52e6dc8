//! What a planner remembers, for the next one: so that a new start of its agent leads nobody around in a circle, repeats no failed
//! move too soon, and spends no hour's budget twice.

use std::collections::{BTreeMap, VecDeque};

use rswap_types::{InstanceName, UnixMillis};
use serde::{Deserialize, Serialize};

use crate::{PlanConfig, Planner, lead::Durations, memory::Memory};

/// Moves, failures and places of instances; speeds of links; what was spent of the last hour; how long moves took.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Remembered {
    memory: BTreeMap<InstanceName, Memory>,
    links: BTreeMap<String, f64>,
    hours: BTreeMap<String, VecDeque<UnixMillis>>,
    #[serde(default)]
    parts: BTreeMap<InstanceName, BTreeMap<String, Memory>>,
    #[serde(default)]
    durations: Durations,
}

impl Planner {
    /// All that it remembers.
    pub fn remembered(&self) -> Remembered {
        Remembered {
            memory: self.memory.clone(),
            links: self.links.clone(),
            hours: self.hours.clone(),
            parts: self.parts.clone(),
            durations: self.durations.clone(),
        }
    }

    /// A planner that goes on from what another one remembered, of the instances that are `present`. What was on its way then is not
    /// any more.
    pub fn with_memory(
        config: PlanConfig,
        remembered: Remembered,
        present: impl Fn(&InstanceName) -> bool,
    ) -> Self {
        let mut new = Self::new(config);
        new.memory = remembered.memory;
        new.memory.retain(|name, _| present(name));
        new.parts = remembered.parts;
        new.parts.retain(|name, _| present(name));
        new.hours = remembered.hours;
        new.durations = remembered.durations;
        for (host, bytes_per_s) in remembered.links {
            new.link_measured(&host, bytes_per_s);
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MoveKind;

    #[test]
    fn what_was_on_its_way_and_who_has_gone_are_forgotten() {
        let (stays, gone): (InstanceName, InstanceName) = ("a".parse().unwrap(), "z".parse().unwrap());
        let mut planner = Planner::new(PlanConfig::default());
        for name in [&stays, &gone] {
            planner.started(name, "b");
            planner.failed(name, MoveKind::Host, UnixMillis(1_000));
            planner.started(name, "b");
        }
        planner.link_measured("b", 5e6);
        let text = serde_json::to_string(&planner.remembered()).unwrap();
        let read = serde_json::from_str(&text).unwrap();
        let next = Planner::with_memory(PlanConfig::default(), read, |name| *name == stays);
        let memory = next.memory(&stays).unwrap();
        assert_eq!(
            (memory.failures, memory.last_failure, &memory.in_flight),
            (1, Some(UnixMillis(1_000)), &None)
        );
        assert!(next.memory(&gone).is_none());
        assert_eq!((next.links["b"], next.hours["b"].len()), (5e6, 2));
    }
}
