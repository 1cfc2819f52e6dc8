//! TCP connections: the kernel itself counts what goes over each. A program remembers those of instances by their sockets' addresses. Another one, which is at no event, takes over
//! what is new of those whose addresses the agent hands over, and a third, which the kernel calls for each file of a process, finds those that were there before.

use std::{cell::Cell, os::fd::AsFd};

use aya::{
    Btf, Ebpf,
    maps::{HashMap, MapData},
    programs::{Iter, ProgramFd, RawTracePoint, RawTracePointRunOptions, TestRun},
};
use rswap_common::{
    globals as g,
    layout::{CONNECTIONS_AT_ONCE, MAX_CONNECTIONS, map_names},
};

use super::{
    btf::KernelTypes,
    probes::{CGROUP_FIELDS, Link, Probe, chain},
};
use crate::sys::bpf_iter::Walk;

/// Sees connections begin and end.
pub(super) const SET_STATE: &str = "inet_sock_set_state";
/// Takes over what is new of those that are known.
pub(super) const KNOWN: &str = "tcp_connections";
/// Walks over the files of a process.
pub(super) const SOCKETS: &str = "tcp_sockets";

/// A socket's cgroup.
pub(super) const SOCK_CGROUP: (&str, &str, &str) = (g::SOCK_CGROUP, "sock", "sk_cgrp_data.cgroup");

const FIELDS: [(&str, &str, &str); 12] = [
    CGROUP_FIELDS[0],
    CGROUP_FIELDS[1],
    (g::SOCK_PROTOCOL, "sock", "sk_protocol"),
    (g::SOCK_TYPE, "sock", "sk_type"),
    (g::SOCK_STATE, "sock", "__sk_common.skc_state"),
    SOCK_CGROUP,
    (g::SOCK_FLAGS, "sock", "__sk_common.skc_flags"),
    (g::SOCKET_SK, "socket", "sk"),
    (g::TCP_SRTT_US, "tcp_sock", "srtt_us"),
    (g::TCP_BYTES_RECEIVED, "tcp_sock", "bytes_received"),
    (g::TCP_BYTES_SENT, "tcp_sock", "bytes_sent"),
    (g::TCP_BYTES_RETRANSMITTED, "tcp_sock", "bytes_retrans"),
];

/// Its programs.
pub(super) const CONNECTION_PROBES: [Probe; 3] = [
    Probe { tracepoint: SET_STATE, arguments: &["struct sock *", "int", "int"], fields: &FIELDS },
    Probe { tracepoint: KNOWN, arguments: &[], fields: &FIELDS },
    Probe { tracepoint: SOCKETS, arguments: &[], fields: &FIELDS },
];

/// By what a program is called that is at no tracepoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CalledBy {
    /// By the agent itself.
    Agent,
    /// By the kernel's iterator of this name.
    Iterator(&'static str),
}

/// What calls this one, if it is no tracepoint's.
pub(super) fn called_by(name: &str) -> Option<CalledBy> {
    match name {
        KNOWN => Some(CalledBy::Agent),
        SOCKETS => Some(CalledBy::Iterator("task_file")),
        _ => None,
    }
}

/// The connections that are known, by their sockets' addresses. What is remembered of each is the programs' own.
type Addresses = HashMap<MapData, u64, [u64; 5]>;

/// Connections of instances, as the programs know them.
pub(super) struct Connections {
    addresses: Addresses,
    /// How many there were when they were counted last.
    known: Cell<u64>,
}

impl Connections {
    pub(super) fn new(ebpf: &mut Ebpf) -> Result<Self, String> {
        let name = map_names::CONNECTIONS;
        let map = ebpf
            .take_map(name)
            .ok_or_else(|| format!("the eBPF object has no map {name}: build it again"))?;
        let addresses =
            Addresses::try_from(map).map_err(|error| format!("use the eBPF map {name}: {error}"))?;
        Ok(Self { addresses, known: Cell::new(0) })
    }

    /// How many there were when they were counted last.
    pub(super) fn known(&self) -> u64 {
        self.known.get()
    }

    /// Has the program take over what is new of them.
    pub(super) fn count(&self, ebpf: &Ebpf) -> Result<(), String> {
        let program = ebpf.program(KNOWN).ok_or("the eBPF object has no such program: build it again")?;
        let program: &RawTracePoint = program.try_into().map_err(|error| chain(&error))?;
        // Where one goes meanwhile that was to be followed by the next one, the kernel begins anew: they are met twice then.
        let addresses = self.addresses.keys().take(2 * MAX_CONNECTIONS as usize);
        let addresses: Result<Vec<u64>, _> = addresses.collect();
        let mut addresses =
            addresses.map_err(|error| format!("list the TCP connections: {}", chain(&error)))?;
        addresses.sort_unstable();
        addresses.dedup();
        for some in addresses.chunks(CONNECTIONS_AT_ONCE) {
            let mut args = [0; CONNECTIONS_AT_ONCE];
            args[..some.len()].copy_from_slice(some);
            let called = program.test_run(RawTracePointRunOptions { args, cpu: None });
            called.map_err(|error| format!("call {KNOWN}: {}", chain(&error)))?;
        }
        let known = addresses.len() as u64;
        self.known.set(known);
        Ok(())
    }
}

/// Makes a program ready to be called; with the kernel's types it is loaded first.
pub(super) fn attach(ebpf: &mut Ebpf, name: &str, by: CalledBy, load: Option<&Btf>) -> Result<Link, String> {
    let program = ebpf.program_mut(name).ok_or("the eBPF object has no such program: build it again")?;
    let refused = |error| format!("the kernel refuses the program: {}", chain(&error));
    match by {
        CalledBy::Agent => {
            let program: &mut RawTracePoint = program.try_into().map_err(|error| chain(&error))?;
            if load.is_some() {
                program.load().map_err(refused)?;
            }
            // Whether it can be called: with no address it does nothing.
            let called = program.test_run(RawTracePointRunOptions::new());
            called.map_err(|error| format!("call the program: {}", chain(&error)))?;
            Ok(Link::Called)
        }
        CalledBy::Iterator(over) => {
            let program: &mut Iter = program.try_into().map_err(|error| chain(&error))?;
            if let Some(btf) = load {
                program.load(over, btf).map_err(refused)?;
            }
            let program: &ProgramFd = program.fd().map_err(|error| chain(&error))?;
            let program = program.try_clone().map_err(|error| format!("keep the program: {error}"))?;
            // Whether it can be: it is put at each process for itself.
            let put = Walk::over_process(program.as_fd(), std::process::id() as i32);
            put.map(|_| Link::Sockets(program))
                .map_err(|error| format!("attach to the kernel's iterator {over}: {error}"))
        }
    }
}

/// The flag of a socket that says that the other side has sent its end.
pub(super) fn done_flag(types: &KernelTypes) -> u32 {
    // It has been the second one ever since there are names for them.
    1 << types.enumerator("sock_flags", "SOCK_DONE").filter(|bit| *bit < u32::BITS).unwrap_or(1)
}
