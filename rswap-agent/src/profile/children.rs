//! Which cgroups an instance has, and by whom each is told to the programs.
//!
//! What is made in an instance's cgroup, a program makes known in that moment, and unknown when it has gone: what lives for less than a window counts, too, and
//! costs the agent nothing. What lives for longer (`profile.short_lived_s`) the agent writes into the first table that is looked at. Where the kernel does not
//! take the programs, it does so with all, at the next window.

use std::{
    cell::Cell,
    collections::{BTreeMap, BTreeSet},
};

use aya::Ebpf;
use rswap_common::{
    globals as g,
    layout::{ChildCounts, map_names},
    tables::{CGROUP_SETS, CgroupSet, cgroup_of_word, slot_of_word},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::probes::{CGROUP_FIELDS, Probe, mapped, mapped_words};
use crate::{
    sys::bpf_mmap::{MappedArray, MappedWords},
    units::UnixMillis,
};

/// Its programs.
pub(super) const CHILD_PROBES: [Probe; 2] = [
    Probe {
        tracepoint: "cgroup_mkdir",
        arguments: &["struct cgroup *"],
        fields: &[
            CGROUP_FIELDS[0],
            CGROUP_FIELDS[1],
            (g::CGROUP_PARENT, "cgroup", "self.parent"),
            (g::CSS_CGROUP, "cgroup_subsys_state", "cgroup"),
            (g::CGROUP_ROOT, "cgroup", "root"),
            (g::ROOT_HIERARCHY_ID, "cgroup_root", "hierarchy_id"),
        ],
    },
    Probe {
        tracepoint: "cgroup_release",
        arguments: &["struct cgroup *"],
        fields: &[
            CGROUP_FIELDS[0],
            CGROUP_FIELDS[1],
            (g::CGROUP_ROOT, "cgroup", "root"),
            (g::ROOT_HIERARCHY_ID, "cgroup_root", "hierarchy_id"),
        ],
    },
];

/// Cgroups of instances, as the programs know them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CgroupsKnown {
    /// Written by the agent: instances' own, and those in them that live for long.
    pub known: u64,
    /// In instances', written by a program when they were made, and not gone yet; those that live for long are in both.
    pub children: u64,
    /// How many were made in instances' since the agent's start.
    pub children_made: u64,
    /// For which another one's place was taken: that one was not counted until it had lived for long.
    pub children_displaced: u64,
    /// For which there is no place: what is done in them is not counted.
    pub unplaced: u64,
    /// Instances that share the last slot, as there were no others left: what they do is counted for all of them together.
    pub instances_without_slot: u64,
}

/// What the programs know of cgroups that are made in instances'.
pub(super) struct Children {
    words: MappedWords,
    counts: MappedArray<ChildCounts>,
    /// How many there were, and the counts then: the table has some tens of thousands of places.
    present: Cell<Option<(ChildCounts, u64)>>,
}

impl Children {
    pub(super) fn new(ebpf: &Ebpf) -> Result<Self, String> {
        Ok(Self {
            words: mapped_words(ebpf, map_names::CHILDREN, CGROUP_SETS, size_of::<CgroupSet>())?,
            counts: mapped(ebpf, map_names::CHILD_COUNTS, 1)?,
            present: Cell::new(None),
        })
    }

    /// Forgets all of a slot, which is another instance's from then on.
    pub(super) fn forget(&self, slot: u32) {
        self.present.set(None);
        // A cgroup may be made in one of them meanwhile: until there is none left in which that could be.
        while self.words.clear(|word| word != 0 && slot_of_word(word) == slot) > 0 {}
    }

    /// Forgets these of a slot that is others', too; answers how many there were.
    pub(super) fn forget_these(&self, slot: u32, ids: &BTreeSet<u64>) -> u64 {
        self.present.set(None);
        self.words.clear(|word| slot_of_word(word) == slot && ids.contains(&cgroup_of_word(word)))
    }

    pub(super) fn present(&self) -> u64 {
        // First: what comes meanwhile is looked at again the next time.
        let counts = self.counts();
        if let Some((then, present)) = self.present.get()
            && then == counts
        {
            return present;
        }
        let present = self.words.count(|word| word != 0);
        self.present.set(Some((counts, present)));
        present
    }

    pub(super) fn counts(&self) -> ChildCounts {
        self.counts.read(0).unwrap_or_default()
    }
}

/// The cgroups of one instance.
#[derive(Debug, Default)]
pub(super) struct Members {
    registered: BTreeSet<u64>,
    /// When those were first seen that a program has made known.
    young: BTreeMap<u64, UnixMillis>,
    unplaced: BTreeSet<u64>,
}

/// What the programs are to be told.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Due {
    pub(super) forget: Vec<u64>,
    pub(super) insert: Vec<u64>,
}

impl Members {
    /// Takes in which there are now. Without a limit in milliseconds, none is young.
    pub(super) fn look(
        &mut self,
        present: &BTreeSet<u64>,
        now: UnixMillis,
        short_lived_ms: Option<u64>,
    ) -> Due {
        let forget: Vec<u64> = self.registered.difference(present).copied().collect();
        self.registered.retain(|id| present.contains(id));
        self.young.retain(|id, _| present.contains(id));
        let mut insert = Vec::new();
        for id in present.difference(&self.registered) {
            let since = *self.young.entry(*id).or_insert(now);
            if short_lived_ms.is_none_or(|limit| now.since(since) >= limit) {
                insert.push(*id);
            }
        }
        // Those that found none before are among the ones to be inserted.
        self.unplaced.clear();
        Due { forget, insert }
    }

    /// The programs were told, or there was no place.
    pub(super) fn told(&mut self, id: u64, placed: bool) {
        if placed {
            self.registered.insert(id);
            self.young.remove(&id);
        } else {
            self.unplaced.insert(id);
        }
    }

    /// Those that the agent told of.
    pub(super) fn registered(&self) -> &BTreeSet<u64> {
        &self.registered
    }

    /// All of them, whoever told of each.
    pub(super) fn all(&self) -> impl Iterator<Item = u64> {
        self.registered.iter().chain(self.young.keys()).chain(&self.unplaced).copied()
    }

    /// Whether some have to be looked at again soon: they are young, or found no place.
    pub(super) fn are_unsettled(&self) -> bool {
        !self.young.is_empty() || !self.unplaced.is_empty()
    }

    /// How many found no place.
    pub(super) fn unplaced(&self) -> u64 {
        self.unplaced.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(ids: &[u64]) -> BTreeSet<u64> {
        ids.iter().copied().collect()
    }

    fn told(members: &mut Members, due: &Due) {
        due.insert.iter().for_each(|id| members.told(*id, true));
    }

    #[test]
    fn what_lives_for_short_is_left_to_the_programs() {
        let mut members = Members::default();
        let due = members.look(&ids(&[1, 2]), UnixMillis(0), None);
        assert_eq!(due, Due { forget: vec![], insert: vec![1, 2] });
        told(&mut members, &due);
        assert_eq!(members.look(&ids(&[1, 2, 3, 4]), UnixMillis(1000), Some(2000)), Due::default());
        assert_eq!(members.all().collect::<BTreeSet<_>>(), ids(&[1, 2, 3, 4]), "young ones, too");
        let due = members.look(&ids(&[1, 4, 5]), UnixMillis(3000), Some(2000));
        assert_eq!(due, Due { forget: vec![2], insert: vec![4] });
        told(&mut members, &due);
        assert_eq!(*members.registered(), ids(&[1, 4]));
        // The same number again is another one.
        members.look(&ids(&[1, 4]), UnixMillis(4000), Some(2000));
        assert_eq!(members.look(&ids(&[1, 4, 5]), UnixMillis(5500), Some(2000)), Due::default());
        assert_eq!(members.look(&ids(&[]), UnixMillis(6000), None).forget, [1, 4]);
    }

    #[test]
    fn what_found_no_place_is_tried_again() {
        let mut members = Members::default();
        members.look(&ids(&[1, 2]), UnixMillis(0), None);
        members.told(1, true);
        members.told(2, false);
        assert!(members.unplaced() == 1 && members.all().any(|id| id == 2));
        assert_eq!(members.look(&ids(&[1, 2]), UnixMillis(1), None).insert, [2]);
        members.told(2, true);
        assert_eq!((members.unplaced(), members.registered().len()), (0, 2));
    }
}
