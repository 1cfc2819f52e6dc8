//! Page faults of an instance, and pages that came back which reclaim had taken.
//!
//! Where the memory controller is in cgroup v2, the cgroup counts them. Elsewhere they are added up over its processes: `/proc/PID/stat` has those of
//! a process, and those of its children that it has waited for. Of a process that ended since the last look, and was waited for by nobody of the
//! instance, what it did since then is not counted.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Page faults in a window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Faults {
    /// Served from memory: a page that is new, copied, or was there already.
    pub minor: u64,
    /// That waited for a disk or for swap.
    pub major: u64,
}

impl Faults {
    fn plus(self, other: Self) -> Self {
        Self { minor: self.minor + other.minor, major: self.major + other.major }
    }

    fn minus(self, other: Self) -> Self {
        Self { minor: self.minor.saturating_sub(other.minor), major: self.major.saturating_sub(other.major) }
    }

    fn covers(self, other: Self) -> bool {
        self.minor >= other.minor && self.major >= other.major
    }
}

/// Faults so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// As its cgroup counts them.
    OfCgroup {
        faults: Faults,
        /// Pages that reclaim had taken.
        refaults: Option<u64>,
    },
    /// Of each process, by pid.
    OfProcesses(BTreeMap<i32, Process>),
}

/// A process's faults so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    parent: i32,
    /// When it was started, in ticks: pids are used again.
    started: u64,
    own: Faults,
    /// Of those it has waited for.
    children: Faults,
}

impl Reading {
    /// `memory.stat` of a cgroup v2.
    pub(super) fn of_cgroup(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse::<u64>().ok();
            text.lines().find_map(value)
        };
        let all = field("pgfault")?;
        let major = field("pgmajfault")?;
        // Before Linux 5.9 there was one for both.
        let refaults = match (field("workingset_refault_anon"), field("workingset_refault_file")) {
            (Some(anon), Some(file)) => Some(anon + file),
            _ => field("workingset_refault"),
        };
        Some(Self::OfCgroup { faults: Faults { minor: all.saturating_sub(major), major }, refaults })
    }

    /// What there was since `before`; nothing, where it was counted otherwise then. Refaults only where the cgroup counts them.
    pub(super) fn since(&self, before: &Self) -> Option<(Faults, Option<u64>)> {
        match (self, before) {
            (
                Self::OfCgroup { faults, refaults },
                Self::OfCgroup { faults: faults_before, refaults: refaults_before },
            ) => {
                let refaults = refaults.zip(*refaults_before).map(|(now, before)| now.saturating_sub(before));
                Some((faults.minus(*faults_before), refaults))
            }
            (Self::OfProcesses(now), Self::OfProcesses(before)) => Some((of_processes(now, before), None)),
            _ => None,
        }
    }
}

fn of_processes(now: &BTreeMap<i32, Process>, before: &BTreeMap<i32, Process>) -> Faults {
    let mut sum = Faults::default();
    let same = |pid: &i32, process: &Process| {
        before.get(pid).copied().filter(|before| before.started == process.started)
    };
    for (pid, process) in now {
        let earlier = same(pid, process);
        let (own, children) =
            earlier.map_or_else(Default::default, |earlier| (earlier.own, earlier.children));
        sum = sum.plus(process.own.minus(own));
        // A child that was waited for brings all of its faults: those that were counted already while it ran are taken out. One that nobody
        // waits for (SIGCHLD ignored) brings none, and then there is nothing to take out.
        let gone = before.iter().filter(|(child, was)| {
            was.parent == *pid && now.get(child).is_none_or(|now| now.started != was.started)
        });
        let known = gone.fold(Faults::default(), |sum, (_, was)| sum.plus(was.own).plus(was.children));
        let brought = process.children.minus(children);
        sum = sum.plus(if brought.covers(known) { brought.minus(known) } else { brought });
    }
    sum
}

/// `/proc/PID/stat`, counted behind the name, which may hold spaces and parentheses.
pub(super) fn process(stat: &str) -> Option<Process> {
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let number = |place: usize| fields.get(place)?.parse::<u64>().ok();
    Some(Process {
        parent: fields.get(1)?.parse().ok()?,
        started: number(19)?,
        own: Faults { minor: number(7)?, major: number(9)? },
        children: Faults { minor: number(8)?, major: number(10)? },
    })
}

/// `memory.stat` of a cgroup v2 as Linux 6.12 writes it, with these values.
#[cfg(test)]
pub(super) fn memory_stat(values: &[(&str, u64)]) -> String {
    let line = |line: &str| {
        let name = line.split(' ').next().expect("a name");
        let value = values.iter().find(|(of, _)| *of == name);
        value.map_or_else(|| format!("{line}\n"), |(_, value)| format!("{name} {value}\n"))
    };
    include_str!("faults/memory.stat").lines().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(minor: u64, major: u64) -> Faults {
        Faults { minor, major }
    }

    fn run(parent: i32, own: Faults, children: Faults) -> Process {
        Process { parent, started: 5, own, children }
    }

    fn since(now: &[(i32, Process)], before: &[(i32, Process)]) -> Faults {
        of_processes(&now.iter().copied().collect(), &before.iter().copied().collect())
    }

    const NONE: Faults = Faults { minor: 0, major: 0 };

    #[test]
    fn faults_of_a_child_that_was_waited_for_count_once() {
        let before = [(1, run(0, of(10, 1), NONE)), (2, run(1, of(100, 2), NONE))];
        let now = [(1, run(0, of(12, 1), of(150, 5)))];
        assert_eq!(since(&now, &before), of(2 + 50, 3));
        // One that lived and died in between.
        let now = [(1, run(0, of(12, 1), of(7, 0))), (2, run(1, of(101, 2), NONE))];
        assert_eq!(since(&now, &before), of(2 + 7 + 1, 0));
    }

    #[test]
    fn a_process_that_nobody_waits_for_takes_nothing_away_and_a_pid_is_not_a_process() {
        let before = [(1, run(0, of(10, 0), NONE)), (2, run(1, of(100, 0), NONE))];
        assert_eq!(since(&[(1, run(0, of(15, 0), NONE))], &before), of(5, 0));
        let other = Process { started: 9, ..run(1, of(40, 0), NONE) };
        assert_eq!(since(&[(1, run(0, of(10, 0), NONE)), (2, other)], &before), of(40, 0));
        assert_eq!(since(&[], &before), NONE);
    }

    #[test]
    fn fields_are_found_behind_any_name() {
        let stat = "7 (a) b) S 3 7 7 0 -1 4194560 500 20 42 1 0 2 0 0 20 0 1 0 30578 313";
        let expected = Process { parent: 3, started: 30578, own: of(500, 42), children: of(20, 1) };
        assert_eq!(process(stat), Some(expected));
        assert_eq!(process("7 (a"), None);
    }

    #[test]
    fn a_cgroup_with_the_memory_controller_counts_by_itself() {
        let text =
            "anon 5\npgfault 100\npgmajfault 4\nworkingset_refault_anon 3\nworkingset_refault_file 8\n";
        let later = "pgfault 130\npgmajfault 5\nworkingset_refault_anon 3\nworkingset_refault_file 18\n";
        let (before, now) = (Reading::of_cgroup(text).unwrap(), Reading::of_cgroup(later).unwrap());
        assert_eq!(now.since(&before), Some((of(29, 1), Some(10))));
        let old = Reading::of_cgroup("pgfault 130\npgmajfault 5\nworkingset_refault 18\n").unwrap();
        assert_eq!(old.since(&before), Some((of(29, 1), Some(7))));
        assert_eq!(Reading::of_cgroup("anon 5\n"), None);
        assert_eq!(now.since(&Reading::OfProcesses(BTreeMap::new())), None);
    }
}
