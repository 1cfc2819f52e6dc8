//! What is counted in a window, as far as probes are there for it: looked up once for all instances.

use super::{
    connections::SET_STATE,
    fault_latency::{FAULT_PROBES, MAJOR_FAULTS, PAGE_FAULT},
    probes::{EXACT, Probes, SCHED_MIGRATE, SWITCH_STATE},
    tiers::Tier,
};

/// Which figures of a profile are ones.
#[derive(Clone, Copy, Debug)]
pub(super) struct Counting {
    /// Tiers whose programs are in their places. What was counted until one was dropped is a part of the window only.
    pub(super) scheduler: bool,
    pub(super) block: bool,
    pub(super) tcp: bool,
    /// As the profile has them.
    pub(super) exact: bool,
    pub(super) turns: bool,
    pub(super) off_cpu: bool,
    pub(super) migrations: bool,
    pub(super) requests: bool,
    pub(super) bytes: bool,
    pub(super) retransmits: bool,
    pub(super) connections: bool,
    pub(super) fault_latency: bool,
    /// Whether every fault of a program is seen to begin.
    pub(super) faults_begun: bool,
}

impl Counting {
    /// `connections_counted`: what went over TCP connections was taken over at both ends of the window.
    pub(super) fn of(probes: &Probes, connections_counted: bool) -> Self {
        Self {
            scheduler: !probes.is_dropped(Tier::Scheduler),
            block: !probes.is_dropped(Tier::Block),
            tcp: !probes.is_dropped(Tier::Tcp),
            exact: probes.are_active(&EXACT),
            turns: probes.are_active(&["sched_switch"]),
            off_cpu: probes.are_active(&[SWITCH_STATE]),
            migrations: probes.are_active(&[SCHED_MIGRATE]),
            requests: probes.are_active(&["block_rq_complete"]),
            bytes: connections_counted && probes.are_active(&[SET_STATE]),
            retransmits: probes.are_active(&["tcp_retransmit_skb"]),
            connections: probes.are_active(&[SET_STATE]),
            fault_latency: probes.are_active(&[PAGE_FAULT, MAJOR_FAULTS]),
            faults_begun: probes.are_active(&FAULT_PROBES.map(|probe| probe.tracepoint)),
        }
    }
}
