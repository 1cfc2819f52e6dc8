//! TCP connections: the kernel itself counts what goes over each. A program remembers those of instances with their sockets, and two others, which the kernel calls for each
//! when the agent asks for it, take over what is new, and find those that were there before.

use std::os::fd::AsFd;

use aya::{Btf, Ebpf, maps::Map, programs::Iter};
use rswap_common::{globals as g, layout::map_names::CONNECTIONS};

use super::{
    btf::KernelTypes,
    probes::{CGROUP_FIELDS, Link, Probe, chain},
};
use crate::sys::bpf_iter::Walk;

/// Sees connections begin and end.
pub(super) const SET_STATE: &str = "inet_sock_set_state";
/// Walks over those that are known.
pub(super) const KNOWN: &str = "tcp_connections";
/// Walks over the files of a process.
pub(super) const SOCKETS: &str = "tcp_sockets";

/// A socket's cgroup.
pub(super) const SOCK_CGROUP: (&str, &str, &str) = (g::SOCK_CGROUP, "sock", "sk_cgrp_data.cgroup");

const FIELDS: [(&str, &str, &str); 10] = [
    CGROUP_FIELDS[0],
    CGROUP_FIELDS[1],
    (g::SOCK_PROTOCOL, "sock", "sk_protocol"),
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

/// What the kernel walks over, where a program is called for that and not at a tracepoint.
pub(super) fn walks_over(name: &str) -> Option<&'static str> {
    match name {
        KNOWN => Some("bpf_sk_storage_map"),
        SOCKETS => Some("task_file"),
        _ => None,
    }
}

/// Puts a program at its iterator; with the kernel's types it is loaded first.
pub(super) fn attach(ebpf: &mut Ebpf, name: &str, over: &str, load: Option<&Btf>) -> Result<Link, String> {
    let program = ebpf.program_mut(name).ok_or("the eBPF object has no such program: build it again")?;
    let program: &mut Iter = program.try_into().map_err(|error| chain(&error))?;
    if let Some(btf) = load {
        program
            .load(over, btf)
            .map_err(|error| format!("the kernel refuses the program: {}", chain(&error)))?;
    }
    let program = program.fd().map_err(|error| chain(&error))?;
    let program = program.try_clone().map_err(|error| format!("keep the program: {error}"))?;
    let attached = if name == KNOWN {
        let Some(Map::SkStorage(map)) = ebpf.map(CONNECTIONS) else {
            return Err(format!("the eBPF object has no map {CONNECTIONS}: build it again"));
        };
        Walk::over_map(program.as_fd(), map.fd().as_fd()).map(Link::Connections)
    } else {
        // Whether it can be: it is put at each process for itself.
        Walk::over_process(program.as_fd(), std::process::id() as i32).map(|_| Link::Sockets(program))
    };
    attached.map_err(|error| format!("attach to the kernel's iterator {over}: {error}"))
}

/// The flag of a socket that says that the other side has sent its end.
pub(super) fn done_flag(types: &KernelTypes) -> u32 {
    // It has been the second one ever since there are names for them.
    1 << types.enumerator("sock_flags", "SOCK_DONE").filter(|bit| *bit < u32::BITS).unwrap_or(1)
}
