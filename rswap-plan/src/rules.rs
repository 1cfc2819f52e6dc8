//! What an instance's labels ask of the plan.
//!
//! | label | what it asks |
//! | --- | --- |
//! | `rswap.stay=true` | it is never moved by a plan |
//! | `rswap.pin=POOL[,POOL...]` | it sits on these pools only, of the kinds that they are of |
//! | `rswap.apart=GROUP` | no two of the group on one host |
//! | `rswap.together=GROUP` | all of the group where its first member (by name) is |
//!
//! Rules between instances hold among those that one planner sees: the agent of a host sees those of that host.

use std::collections::BTreeMap;

use rswap_types::{InstanceName, Pool};

use crate::{Dropped, InstanceView, MoveKind, compare};

/// `rswap.stay=true`: never moved by a plan.
pub const STAY: &str = "rswap.stay";
/// `rswap.pin=POOL[,POOL...]`: on these pools only.
pub const PIN: &str = "rswap.pin";
/// `rswap.apart=GROUP`: no two on one host.
pub const APART: &str = "rswap.apart";
/// `rswap.together=GROUP`: all on one host.
pub const TOGETHER: &str = "rswap.together";

/// Whether a label asks anything of a plan: no plan looks at the others.
pub fn is_rule(label: &str) -> bool {
    [STAY, PIN, APART, TOGETHER].contains(&label)
}

/// Whether a plan may move it at all.
pub(crate) fn stays(view: &InstanceView) -> bool {
    view.labels.get(STAY).is_some_and(|value| value == "true")
}

/// Why it must not be on `pool`, if its label names others of the same kind.
pub(crate) fn pinned<'p>(
    view: &InstanceView,
    pool: &str,
    of_kind: impl FnOnce() -> Vec<&'p str>,
) -> Option<Dropped> {
    let pin = view.labels.get(PIN)?;
    let named = |name: &str| pin.split(',').any(|pool| pool.trim() == name);
    let concerned = !named(pool) && of_kind().into_iter().any(named);
    concerned.then(|| Dropped::Pinned { to: pin.clone() })
}

/// Who of each group is on which host, or on its way there: (is apart, group) -> members by name.
#[derive(Clone, Debug, Default)]
pub(crate) struct Groups<'v>(BTreeMap<(bool, &'v str), BTreeMap<&'v InstanceName, usize>>);

impl<'v> Groups<'v> {
    /// The instance is on host number `host`, or goes there.
    pub(crate) fn set(&mut self, view: &'v InstanceView, host: usize) {
        for (apart, label) in [(true, APART), (false, TOGETHER)] {
            if let Some(group) = view.labels.get(label) {
                self.0.entry((apart, group)).or_default().insert(&view.instance, host);
            }
        }
    }

    /// Why the instance must not be on pool number `index`, if it must not.
    pub(crate) fn forbids(
        &self,
        view: &InstanceView,
        index: usize,
        pools: &[Pool],
        kind: MoveKind,
    ) -> Option<Dropped> {
        if view.labels.is_empty() {
            return None;
        }
        if let Some(pin) = view.labels.get(PIN) {
            let named = |name: &str| pin.split(',').any(|pool| pool.trim() == name);
            let concerned = pools.iter().any(|pool| named(&pool.name) && compare::is_of_kind(pool, kind));
            if concerned && !named(&pools[index].name) {
                return Some(Dropped::Pinned { to: pin.clone() });
            }
        }
        if kind == MoveKind::Cpu {
            return None;
        }
        let group = |apart: bool, label: &str| {
            let group = view.labels.get(label)?;
            Some((group, self.0.get(&(apart, group.as_str()))?))
        };
        if let Some((group, members)) = group(true, APART) {
            // Of those that are together already, the first one may stay.
            let with = members.iter().find(|(name, host)| ***name != view.instance && **host == index);
            let stays_first = members.get(&view.instance) == Some(&index)
                && members.iter().all(|(name, host)| *host != index || **name >= view.instance);
            if let Some((with, _)) = with.filter(|_| !stays_first) {
                return Some(Dropped::Apart { group: group.clone(), with: (*with).clone() });
            }
        }
        if let Some((group, members)) = group(false, TOGETHER)
            && let Some((first, &host)) = members.first_key_value()
            && **first != view.instance
            && host != index
        {
            return Some(Dropped::Together { group: group.clone(), with: (*first).clone() });
        }
        None
    }
}
