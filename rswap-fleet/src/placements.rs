//! Where each instance of the fleet is, found by its name in the fleet, by its host, by its name there, and by how long it is gone:
//! a fleet has a hundred thousand of them, and each report asks for those of one host.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
    sync::Arc,
};

use rswap_types::{InstanceName, UnixMillis};
use serde::{Deserialize, Serialize};

use crate::HostName;

/// Where an instance of the fleet is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Placed {
    /// On which host.
    pub host: HostName,
    /// Its name there.
    pub local: InstanceName,
    /// What it was last seen to be: its identity does not change when it moves.
    pub(crate) identity: String,
    /// Since when that host no longer has it; `None`: it has.
    pub(crate) gone: Option<UnixMillis>,
}

/// All of them. At one place is one instance.
#[derive(Clone, Debug, Default)]
pub(crate) struct Placements {
    placed: BTreeMap<InstanceName, Placed>,
    /// Names in the fleet, by host and the name there. They change seldom, and every plan looks at all of them.
    at: BTreeMap<HostName, Arc<BTreeMap<InstanceName, InstanceName>>>,
    /// Names in the fleet, by the name on whichever host, in order. Most are called like no other: a set's node would have room for eleven.
    called: BTreeMap<InstanceName, Vec<InstanceName>>,
    /// What is gone, the longest first.
    gone: BTreeSet<(UnixMillis, InstanceName)>,
}

impl Placements {
    /// Puts an instance somewhere; where it was before is handed back. Who was at that place under another name has left it.
    pub(crate) fn put(&mut self, name: InstanceName, placed: Placed) -> Option<Placed> {
        let before = self.remove(&name);
        let there = Arc::make_mut(self.at.entry(placed.host.clone()).or_default());
        if let Some(other) = there.insert(placed.local.clone(), name.clone()) {
            self.drop_others(&other);
        }
        let called = self.called.entry(placed.local.clone()).or_default();
        if let Err(at) = called.binary_search(&name) {
            called.reserve_exact(1);
            called.insert(at, name.clone());
        }
        self.gone.extend(placed.gone.map(|at| (at, name.clone())));
        self.placed.insert(name, placed);
        before
    }

    pub(crate) fn remove(&mut self, name: &InstanceName) -> Option<Placed> {
        let placed = self.drop_others(name)?;
        if let Some(there) = self.at.get_mut(&placed.host).map(Arc::make_mut) {
            there.remove(&placed.local);
            if there.is_empty() {
                self.at.remove(&placed.host);
            }
        }
        Some(placed)
    }

    /// Forgets it, but for the place.
    fn drop_others(&mut self, name: &InstanceName) -> Option<Placed> {
        let placed = self.placed.remove(name)?;
        if let Some(called) = self.called.get_mut(&placed.local) {
            called.retain(|other| other != name);
            if called.is_empty() {
                self.called.remove(&placed.local);
            }
        }
        if let Some(at) = placed.gone {
            self.gone.remove(&(at, name.clone()));
        }
        Some(placed)
    }

    /// Says since when it is gone, or that it is there; what was said before is handed back.
    pub(crate) fn set_gone(&mut self, name: &InstanceName, gone: Option<UnixMillis>) -> Option<UnixMillis> {
        let placed = self.placed.get_mut(name)?;
        let before = std::mem::replace(&mut placed.gone, gone);
        if let Some(at) = before {
            self.gone.remove(&(at, name.clone()));
        }
        self.gone.extend(gone.map(|at| (at, name.clone())));
        before
    }

    pub(crate) fn set_identity(&mut self, name: &InstanceName, identity: &str) {
        if let Some(placed) = self.placed.get_mut(name).filter(|placed| placed.identity != identity) {
            identity.clone_into(&mut placed.identity);
        }
    }

    pub(crate) fn get(&self, name: &InstanceName) -> Option<&Placed> {
        self.placed.get(name)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&InstanceName, &Placed)> {
        self.placed.iter()
    }

    /// Those whose names come after this one; all of them after none.
    pub(crate) fn after(
        &self,
        name: Option<&InstanceName>,
    ) -> impl Iterator<Item = (&InstanceName, &Placed)> {
        let from = name.map_or(Bound::Unbounded, Bound::Excluded);
        self.placed.range::<InstanceName, _>((from, Bound::Unbounded))
    }

    /// How many there are, without those that are gone.
    pub(crate) fn present(&self) -> usize {
        self.placed.len() - self.gone.len()
    }

    /// The names in the fleet of what is on a host, or was there last, with the names there.
    pub(crate) fn on(&self, host: &HostName) -> impl Iterator<Item = (&InstanceName, &InstanceName)> {
        self.at.get(host).into_iter().flat_map(|there| there.iter()).map(|(local, name)| (name, local))
    }

    /// The same, to be kept.
    pub(crate) fn names(&self, host: &HostName) -> Arc<BTreeMap<InstanceName, InstanceName>> {
        self.at.get(host).cloned().unwrap_or_default()
    }

    pub(crate) fn is_taken(&self, host: &HostName, local: &InstanceName) -> bool {
        self.at.get(host).is_some_and(|there| there.contains_key(local))
    }

    /// All that are called so on their hosts, by their names in the fleet.
    pub(crate) fn called(&self, local: &InstanceName) -> impl Iterator<Item = (&InstanceName, &Placed)> {
        let names = self.called.get(local).into_iter().flatten();
        names.filter_map(|name| self.placed.get_key_value(name))
    }

    /// What has been gone since `until` or longer.
    pub(crate) fn gone_until(&self, until: UnixMillis) -> Vec<InstanceName> {
        let over = self.gone.iter().take_while(|(at, _)| *at <= until);
        over.map(|(_, name)| name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found by any way is what is found by looking at all of them.
    fn assert_consistent(all: &Placements) {
        for (name, placed) in all.iter() {
            assert!(all.on(&placed.host).any(|found| found == (name, &placed.local)), "{name}");
            assert!(all.called(&placed.local).any(|(found, _)| found == name), "{name}");
            assert_eq!(placed.gone.is_some(), all.gone.iter().any(|(_, gone)| gone == name), "{name}");
            let at = all.gone.iter().find(|(_, gone)| gone == name).map(|(at, _)| *at);
            assert_eq!(at, placed.gone);
        }
        let count = all.iter().count();
        assert_eq!(all.at.values().map(|there| there.len()).sum::<usize>(), count);
        assert_eq!(all.called.values().map(Vec::len).sum::<usize>(), count);
        assert!(all.called.values().all(|names| names.is_sorted()));
        assert_eq!(all.present(), all.iter().filter(|(_, placed)| placed.gone.is_none()).count());
        assert!(all.at.values().all(|there| !there.is_empty()));
        assert!(all.called.values().all(|names| !names.is_empty()));
        assert_eq!(all.gone.len(), all.iter().filter(|(_, placed)| placed.gone.is_some()).count());
    }

    #[test]
    fn every_way_to_an_instance_leads_to_the_same() {
        let seed = fastrand::u64(..);
        println!("seed {seed}");
        let mut random = fastrand::Rng::with_seed(seed);
        let name = |random: &mut fastrand::Rng, of: &str| -> InstanceName {
            format!("{of}-{}", random.u8(..6)).parse().expect("a name")
        };
        let mut all = Placements::default();
        for step in 0..5_000u64 {
            let fleet = name(&mut random, "fleet");
            match random.u8(..6) {
                0 => drop(all.remove(&fleet)),
                1 => drop(all.set_gone(&fleet, random.bool().then_some(UnixMillis(step)))),
                2 => all.set_identity(&fleet, "other"),
                3 => {
                    let until = UnixMillis(step.saturating_sub(20));
                    let over = all.gone_until(until);
                    let looked = all.iter().filter(|(_, placed)| placed.gone.is_some_and(|at| at <= until));
                    let looked: BTreeSet<_> = looked.map(|(name, _)| name.clone()).collect();
                    assert_eq!(over.into_iter().collect::<BTreeSet<_>>(), looked);
                }
                _ => {
                    let placed = Placed {
                        host: format!("host-{}", random.u8(..3)).parse().expect("a name"),
                        local: name(&mut random, "local"),
                        identity: String::new(),
                        gone: random.bool().then_some(UnixMillis(step)),
                    };
                    all.put(fleet.clone(), placed.clone());
                    assert_eq!(all.get(&fleet), Some(&placed));
                    assert!(all.is_taken(&placed.host, &placed.local));
                }
            }
            assert_consistent(&all);
        }
    }
}
