//! Which slot the programs count a cgroup's events for: keeps the table that they look it up in.

use std::collections::HashMap;

use aya::maps::{Array, MapData, MapError};
use rswap_common::{
    layout::MAX_CGROUPS,
    tables::{CgroupSet, NO_CGROUPS, cgroup_of_word, cgroup_set, cgroup_word},
};

/// Why the programs can't be told about a cgroup.
#[derive(Debug, thiserror::Error)]
pub(super) enum CgroupTableError {
    /// As many are known as can be.
    #[error("{MAX_CGROUPS} cgroups are profiled, and more can't be")]
    Full,
    /// The cgroups that are looked for at one place of the table are too many for it: about one host in a hundred comes to this that profiles as
    /// many as it can.
    #[error("there is no place for it among the cgroups that are profiled")]
    NoPlace,
    /// The kernel refused the change.
    #[error(transparent)]
    Map(#[from] MapError),
}

/// The table, as the programs see it and as it is kept here.
pub(super) struct CgroupTable {
    map: Array<MapData, CgroupSet>,
    sets: Sets,
}

impl CgroupTable {
    /// Over a map in which nothing is yet.
    pub(super) fn new(map: Array<MapData, CgroupSet>) -> Self {
        Self { map, sets: Sets::default() }
    }

    /// From now on, events of the cgroup are counted for this slot.
    pub(super) fn insert(&mut self, id: u64, slot: u32) -> Result<(), CgroupTableError> {
        let set = self.sets.with(id, slot)?;
        self.map.set(cgroup_set(id), set, 0)?;
        self.sets.keep(id, set);
        Ok(())
    }

    /// How many are in it.
    pub(super) fn len(&self) -> u64 {
        self.sets.cgroups.into()
    }

    /// From now on, events of the cgroup are counted for nobody.
    pub(super) fn remove(&mut self, id: u64) {
        let set = self.sets.without(id);
        if let Err(error) = self.map.set(cgroup_set(id), set, 0) {
            // An array's element can't be missing; the cgroup has gone, so at worst its place is lost.
            tracing::warn!(%error, id, "the eBPF programs can't be told to forget a cgroup");
        }
        self.sets.keep(id, set);
    }
}

/// What is in the table. Sets without cgroups are left out.
#[derive(Debug, Default)]
struct Sets {
    sets: HashMap<u32, CgroupSet>,
    cgroups: u32,
}

impl Sets {
    fn set(&self, id: u64) -> CgroupSet {
        self.sets.get(&cgroup_set(id)).copied().unwrap_or(NO_CGROUPS)
    }

    /// The set that the cgroup belongs in, with it.
    fn with(&self, id: u64, slot: u32) -> Result<CgroupSet, CgroupTableError> {
        let mut set = self.set(id);
        let place = set.iter().position(|&word| cgroup_of_word(word) == id);
        if place.is_none() && self.cgroups >= MAX_CGROUPS {
            return Err(CgroupTableError::Full);
        }
        let place =
            place.or_else(|| set.iter().position(|&word| word == 0)).ok_or(CgroupTableError::NoPlace)?;
        set[place] = cgroup_word(id, slot);
        Ok(set)
    }

    /// The same without it. The last one takes its place: programs look no further than the first empty one.
    fn without(&self, id: u64) -> CgroupSet {
        let mut set = self.set(id);
        let used = set.iter().filter(|&&word| word != 0).count();
        if let Some(place) = set.iter().position(|&word| word != 0 && cgroup_of_word(word) == id) {
            set.swap(place, used - 1);
            set[used - 1] = 0;
        }
        set
    }

    fn keep(&mut self, id: u64, set: CgroupSet) {
        let used = |set: &CgroupSet| set.iter().filter(|&&word| word != 0).count() as u32;
        self.cgroups = self.cgroups + used(&set) - used(&self.set(id));
        if set == NO_CGROUPS {
            self.sets.remove(&cgroup_set(id));
        } else {
            self.sets.insert(cgroup_set(id), set);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use rswap_common::tables::slot_of_word;

    use super::*;

    /// As the programs look.
    fn slot_of(sets: &Sets, id: u64) -> Option<u32> {
        let set = sets.set(id);
        let used = set.iter().take_while(|&&word| word != 0);
        used.copied().find(|&word| cgroup_of_word(word) == id).map(slot_of_word)
    }

    fn insert(sets: &mut Sets, id: u64, slot: u32) -> Result<(), CgroupTableError> {
        let set = sets.with(id, slot)?;
        sets.keep(id, set);
        Ok(())
    }

    /// Ids that are looked for in the same set.
    fn of_one_set(count: usize) -> Vec<u64> {
        (1..u64::MAX).filter(|&id| cgroup_set(id) == 5).take(count).collect()
    }

    #[test]
    fn a_set_that_is_full_refuses_a_cgroup_and_keeps_the_others() {
        let mut sets = Sets::default();
        let ids = of_one_set(9);
        for (slot, &id) in ids[..8].iter().enumerate() {
            insert(&mut sets, id, slot as u32).unwrap();
        }
        assert!(matches!(insert(&mut sets, ids[8], 8), Err(CgroupTableError::NoPlace)));
        insert(&mut sets, ids[3], 33).expect("one that is known is given another slot");
        assert_eq!(slot_of(&sets, ids[3]), Some(33));
        let without = sets.without(ids[0]);
        sets.keep(ids[0], without);
        insert(&mut sets, ids[8], 8).unwrap();
        assert_eq!(
            (slot_of(&sets, ids[0]), slot_of(&sets, ids[8]), slot_of(&sets, ids[7])),
            (None, Some(8), Some(7))
        );
    }

    #[test]
    fn no_more_are_taken_than_there_may_be() {
        let mut sets = Sets { cgroups: MAX_CGROUPS - 1, ..Sets::default() };
        insert(&mut sets, 77, 1).unwrap();
        assert!(matches!(insert(&mut sets, 78, 1), Err(CgroupTableError::Full)));
        insert(&mut sets, 77, 2).unwrap();
    }

    proptest! {
        #[test]
        fn the_table_answers_as_a_map_does(steps in prop::collection::vec((0..24usize, prop::option::of(0..256u32)), 0..200)) {
            // Half of them in one set, so that it fills.
            let mut ids = of_one_set(12);
            ids.extend(1_000..1_012);
            let (mut sets, mut truth) = (Sets::default(), HashMap::new());
            for (which, slot) in steps {
                let id = ids[which];
                match slot {
                    Some(slot) => if insert(&mut sets, id, slot).is_ok() { _ = truth.insert(id, slot) },
                    None => { let set = sets.without(id); sets.keep(id, set); truth.remove(&id); }
                }
                prop_assert_eq!(sets.cgroups as usize, truth.len());
            }
            for id in ids {
                prop_assert_eq!(slot_of(&sets, id), truth.get(&id).copied());
            }
        }
    }
}
