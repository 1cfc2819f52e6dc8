//! How long page faults take: what its programs need, and where they are attached.
//!
//! A tracepoint says that a fault begins. That it is over, the kernel says by its software events (perf), for each CPU by itself.

use std::mem::offset_of;

use aya::{
    Ebpf,
    programs::{
        PerfEvent, ProgramError,
        perf_event::{PerfEventConfig, PerfEventLink, PerfEventScope, SamplePolicy, SoftwareEvent},
    },
    util::online_cpus,
};
use rswap_common::{
    globals as g,
    layout::{FaultKind, FaultRecord, fault_index},
};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{
    histogram::Histogram,
    probes::{CGROUP_FIELDS, Maps, Probe, chain},
    slot_records::{FAULTS, Seen},
};

const FAULT_FIELDS: [(&str, &str, &str); 5] = [
    CGROUP_FIELDS[0],
    CGROUP_FIELDS[1],
    (g::TASK_PID, "task_struct", "pid"),
    (g::TASK_CGROUPS, "task_struct", "cgroups"),
    (g::CSS_SET_DFL_CGRP, "css_set", "dfl_cgrp"),
];

/// That of faults of programs.
pub(super) const PAGE_FAULT: &str = "page_fault_user";

/// Those that see a fault begin.
pub(super) const FAULT_PROBES: [Probe; 2] = [
    Probe { tracepoint: PAGE_FAULT, arguments: &[], fields: &FAULT_FIELDS },
    Probe { tracepoint: "page_fault_kernel", arguments: &[], fields: &FAULT_FIELDS },
];

/// The program that sees major faults end.
pub(super) const MAJOR_FAULTS: &str = "major_faults";
/// The program that sees minor faults end, where that is asked for.
pub(super) const MINOR_FAULTS: &str = "minor_faults";

/// Whether a program sits on an event of perf, and is called as here.
pub(super) fn at_event(name: &str) -> Option<&'static str> {
    [MAJOR_FAULTS, MINOR_FAULTS].into_iter().find(|event| *event == name)
}

/// Attaches a program to its event on every CPU that is online.
pub(super) fn attach(ebpf: &mut Ebpf, name: &str, load: bool) -> Result<Vec<PerfEventLink>, String> {
    let event =
        if name == MAJOR_FAULTS { SoftwareEvent::PageFaultsMaj } else { SoftwareEvent::PageFaultsMin };
    let program = ebpf.program_mut(name).ok_or("the eBPF object has no such program: build it again")?;
    let program: &mut PerfEvent = program.try_into().map_err(|error| chain(&error))?;
    if load {
        program.load().map_err(|error| format!("the kernel refuses the program: {}", chain(&error)))?;
    }
    let cpus = online_cpus().map_err(|(what, error)| format!("count the CPUs ({what}): {error}"))?;
    on_each(&cpus, |cpu| {
        let scope = PerfEventScope::AllProcessesOneCpu { cpu };
        let each = SamplePolicy::Period(1);
        let link = program.attach(PerfEventConfig::Software(event), scope, each, false)?;
        program.take_link(link)
    })
}

/// What `attach` gives for each of the CPUs that are there still, or why one of them refuses.
fn on_each<L>(
    cpus: &[u32],
    mut attach: impl FnMut(u32) -> Result<L, ProgramError>,
) -> Result<Vec<L>, String> {
    let mut links = Vec::with_capacity(cpus.len());
    for &cpu in cpus {
        match attach(cpu) {
            Ok(link) => links.push(link),
            // It went offline since they were counted, and has no faults.
            Err(ProgramError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENODEV) => {
                tracing::debug!(cpu, "no software event: the CPU went offline");
            }
            Err(error) => {
                return Err(format!("attach to the software event of CPU {cpu}: {}", chain(&error)));
            }
        }
    }
    if links.is_empty() { Err("no CPU has the software event".to_owned()) } else { Ok(links) }
}

/// How long page faults took that ended in a window.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct FaultLatency {
    /// Those that waited, in nanoseconds.
    pub major_ns: Histogram,
    /// Those served from memory, in nanoseconds; `None` unless `profile.minor_faults` is on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub minor_ns: Option<Histogram>,
    /// Faults that are in neither, as their beginning was not seen.
    pub not_timed: u64,
}

/// Faults of a slot at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct FaultCounts {
    major_ns: Seen,
    minor_ns: Option<Seen>,
    not_timed: u64,
}

impl FaultCounts {
    /// Whether this has changed says whether one has ended that waited.
    pub(super) fn ended(&self) -> u64 {
        self.major_ns.counts.count().wrapping_add(self.not_timed)
    }

    /// Reads them from the maps. Those of a kind of which none was counted since are those of `known`.
    pub(super) fn read(maps: &Maps, slots: u32, slot: u32, known: Option<&Self>) -> Self {
        let kinds = maps.fault_kinds;
        let records = |kind| (0..maps.cpus).map(move |cpu| fault_index(cpu, slot, slots, kind, kinds));
        let of = |kind, known| Seen::read(&maps.faults, records(kind), FAULTS, known);
        let all = [FaultKind::Major, FaultKind::Minor].into_iter().take(kinds as usize).flat_map(records);
        let not_timed =
            all.filter_map(|index| maps.faults.words(index, [offset_of!(FaultRecord, not_timed) / 8]));
        Self {
            not_timed: not_timed.fold(0, |sum, [count]| sum.wrapping_add(count)),
            major_ns: of(FaultKind::Major, known.map(|known| &known.major_ns)),
            minor_ns: (kinds > 1)
                .then(|| of(FaultKind::Minor, known.and_then(|known| known.minor_ns.as_ref()))),
        }
    }

    /// What there was since `earlier`.
    pub(super) fn since(&self, earlier: &Self) -> FaultLatency {
        let minor = earlier.minor_ns.as_ref().zip(self.minor_ns.as_ref());
        FaultLatency {
            major_ns: Histogram::between(&earlier.major_ns.counts, &self.major_ns.counts),
            minor_ns: minor.map(|(earlier, now)| Histogram::between(&earlier.counts, &now.counts)),
            not_timed: self.not_timed.wrapping_sub(earlier.not_timed),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use aya::sys::SyscallError;

    use super::*;
    use crate::profile::histogram::Counts;

    #[test]
    fn a_cpu_that_went_offline_is_passed_over_and_one_that_refuses_is_not() {
        let refused = |errno| {
            let io_error = io::Error::from_raw_os_error(errno);
            ProgramError::SyscallError(SyscallError { call: "perf_event_open", io_error })
        };
        let second_fails = |errno| {
            let mut asked = Vec::new();
            let links = on_each(&[0, 1, 4], |cpu| {
                asked.push(cpu);
                if cpu == 1 { Err(refused(errno)) } else { Ok(cpu * 10) }
            });
            (links, asked)
        };
        assert_eq!(second_fails(libc::ENODEV), (Ok(vec![0, 40]), vec![0, 1, 4]));
        let (links, asked) = second_fails(libc::EMFILE);
        let reason = links.expect_err("any other error is one");
        assert!(reason.starts_with("attach to the software event of CPU 1: "), "{reason}");
        assert_eq!(asked, [0, 1]);
        // All went: nothing would be counted.
        let none = on_each(&[0, 1], |_| Err::<u32, _>(refused(libc::ENODEV)));
        assert_eq!(none, Err("no CPU has the software event".to_owned()));
    }

    #[test]
    fn a_window_has_what_ended_in_it_and_minor_faults_where_they_are_timed() {
        let counts = |buckets: &[usize]| {
            let mut record = FaultRecord::EMPTY;
            buckets.iter().for_each(|bucket| record.ns.buckets[*bucket] += 1);
            Seen::of(Counts::of(&record.ns))
        };
        let none = FaultCounts::default;
        let begin = FaultCounts { major_ns: counts(&[40]), not_timed: u64::MAX, ..none() };
        let end = FaultCounts { major_ns: counts(&[40, 77, 77]), not_timed: 1, ..none() };
        let seen = end.since(&begin);
        assert_eq!((seen.major_ns.buckets, seen.minor_ns, seen.not_timed), (vec![(77, 2)], None, 2));
        let with = |buckets| FaultCounts { minor_ns: Some(counts(buckets)), ..none() };
        let seen = with(&[9, 9]).since(&with(&[9]));
        assert_eq!((seen.major_ns.count, seen.minor_ns.map(|minor| minor.buckets)), (0, Some(vec![(9, 1)])));
    }
}
