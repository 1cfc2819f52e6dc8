//! What would load on kernels that don't run here: by the type information of Debian's, as far as the programs ask for it.
//!
//! `kernels/*.btf` were made of Debian's packages `linux-image-5.10.0-32-cloud-amd64-unsigned` (5.10.223-1),
//! `linux-image-6.1.0-57-cloud-amd64-unsigned` (6.1.192-3), `linux-image-6.12.117+deb13-cloud-amd64-unsigned` (6.12.117-1) and
//! `linux-binary-7.2.13+deb14-cloud-amd64` (7.2.13-1): the section `.BTF` of the kernel in `vmlinuz`, cut down by [`make_a_subset`].
//!
//! Types, and tracepoints' arguments, are in there. Whether a kernel has the helpers that a program calls, and its instructions, is not: that is known by
//! the version in which they came ([`beyond`]).

mod beyond;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
};

use super::{KernelTypes, subset::subset};
use crate::profile::{
    children::CHILD_PROBES,
    connections::{CONNECTION_PROBES, called_by},
    fault_latency::{FAULT_PROBES, MAJOR_FAULTS, MINOR_FAULTS},
    probes::{self, Probe},
    written,
};

const KERNELS: [(&str, &str); 4] = [
    ("5.10", "5.10.0-32-cloud-amd64"),
    ("6.1", "6.1.0-57-cloud-amd64"),
    ("6.12", "6.12.117-cloud-amd64"),
    ("7.2", "7.2.13-cloud-amd64"),
];

fn types_of(release: &str) -> KernelTypes {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/src/profile/btf/kernels");
    KernelTypes::parse(fs::read(format!("{directory}/{release}.btf")).unwrap()).unwrap()
}

fn all_probes() -> impl Iterator<Item = &'static Probe> {
    CHILD_PROBES
        .iter()
        .chain(&probes::PROBES)
        .chain(&CONNECTION_PROBES)
        .chain(&probes::EXACT_PROBES)
        .chain(&FAULT_PROBES)
        .chain(&written::TYPED)
}

/// What each program of the eBPF crate is attached to by its type, as its sources say.
fn attached_to() -> BTreeSet<String> {
    let sources = concat!(env!("CARGO_MANIFEST_DIR"), "/../rswap-ebpf/src");
    let mut found = BTreeSet::new();
    for source in fs::read_dir(sources).unwrap() {
        let text = fs::read_to_string(source.unwrap().path()).unwrap();
        let mut attribute = "";
        for line in text.lines().map(str::trim) {
            // A program is handed its context itself, what it calls a reference.
            let is_program =
                line.starts_with("fn ") && line.ends_with("Context) -> i32 {") && !line.contains('&');
            // Those at events of perf, and what the agent calls, have no types.
            if is_program && !["#[perf_event]", "#[raw_tracepoint]"].contains(&attribute) {
                let to = attribute.split('"').nth(1);
                found.insert(to.unwrap_or_else(|| panic!("what is it attached to? {line}")).to_owned());
            }
            attribute = line;
        }
    }
    found
}

/// Makes a file of `kernels/`: `RSWAP_BTF_FROM=vmlinux.btf RSWAP_BTF_TO=new.btf cargo test .. make_a_subset -- --ignored`.
#[test]
#[ignore = "a tool, not a test: it needs a kernel's type information in a file"]
fn make_a_subset() {
    let path = |name| std::env::var_os(name).unwrap_or_else(|| panic!("{name} is not set"));
    let types = KernelTypes::parse(fs::read(path("RSWAP_BTF_FROM")).unwrap()).unwrap();
    fs::write(path("RSWAP_BTF_TO"), cut(&types)).unwrap();
}

fn cut(types: &KernelTypes) -> Vec<u8> {
    let mut fields = Vec::new();
    for probe in all_probes() {
        fields.extend(probe.fields.iter().map(|(_, in_struct, field)| (*in_struct, *field)));
    }
    let tracepoints: Vec<&str> = all_probes().map(|probe| probe.tracepoint).collect();
    subset(types, &fields, &tracepoints, &["pageflags", "req_flag_bits", "sock_flags"])
}

/// A probe's offsets, or why it would not load.
type Outcome = Result<Vec<(&'static str, u64)>, String>;

/// What becomes of each probe.
fn outcomes(types: &KernelTypes) -> BTreeMap<&'static str, Outcome> {
    all_probes().map(|probe| (probe.tracepoint, probe.resolve(types))).collect()
}

#[test]
fn every_program_is_asked_for() {
    // Those of ext4 are raw: they need no types (and may be a module's).
    let at_tracepoints = all_probes().map(|probe| probe.tracepoint).filter(|name| called_by(name).is_none());
    let asked: BTreeSet<&str> = at_tracepoints.chain(written::OF_EXT4).collect();
    let programs = attached_to();
    assert_eq!(programs.iter().map(String::as_str).collect::<BTreeSet<_>>(), asked);
}

#[test]
fn a_subset_answers_as_the_whole_does() {
    let Ok(bytes) = fs::read(super::KERNEL_BTF) else {
        eprintln!("not tested: {} is not there", super::KERNEL_BTF);
        return;
    };
    let whole = KernelTypes::parse(bytes).unwrap();
    let part = KernelTypes::parse(cut(&whole)).unwrap();
    assert!(part.bytes.len() * 20 < whole.bytes.len(), "{} bytes", part.bytes.len());
    assert_eq!(outcomes(&part), outcomes(&whole));
    let flags =
        [("pageflags", "PG_head"), ("req_flag_bits", "__REQ_BACKGROUND"), ("sock_flags", "SOCK_DONE")];
    for (of, name) in flags {
        assert_eq!(part.enumerator(of, name), whole.enumerator(of, name));
    }
}

/// Programs that would not load, each with parts of why.
type Refused = &'static [(&'static str, &'static [&'static str])];

/// Why programs would not load: the first thing that is missing of types, and all that is beside.
fn refused(release: &str, version: beyond::Version) -> BTreeMap<&'static str, Vec<String>> {
    let found = outcomes(&types_of(release)).into_iter();
    let by_types = found.map(|(name, outcome)| (name, outcome.err()));
    // These ask for no types of their own.
    let at_events = [MAJOR_FAULTS, MINOR_FAULTS].map(|name| (name, None));
    let mut all = BTreeMap::new();
    for (name, reason) in by_types.chain(at_events) {
        let mut reasons: Vec<String> = reason.into_iter().collect();
        let lacking = beyond::lacking(name, version);
        reasons.extend(lacking.map(|of| format!("no {} ({}.{})", of.what, of.with.0, of.with.1)));
        if !reasons.is_empty() {
            all.insert(name, reasons);
        }
    }
    all
}

#[test]
fn what_would_load_on_other_kernels() {
    const NO_TASK: &str = "no bpf_get_current_task_btf (5.11)";
    const NO_FETCH: &str = "no atomic instructions that answer what was there (5.12)";
    const NO_FILE: &str = "no bpf_sock_from_file (5.11)";
    const NO_CGROUP: &str = "struct sock has no field sk_cgrp_data.cgroup";
    const NO_START: &str = "no tracepoint block_io_start";
    const NO_DIRECT: &str = "no tracepoint iomap_dio_rw_begin";
    // What is not listed would load.
    let expected: [(&str, beyond::Version, Refused); 4] = [
        (
            "5.10",
            (5, 10),
            &[
                ("block_io_start", &[NO_START, NO_TASK]),
                ("block_rq_complete", &["struct request_queue has no field disk"]),
                ("inet_sock_set_state", &[NO_CGROUP, NO_FETCH]),
                ("iomap_dio_rw_begin", &[NO_DIRECT]),
                ("major_faults", &[NO_TASK]),
                ("minor_faults", &[NO_TASK]),
                ("page_fault_kernel", &[NO_TASK]),
                ("page_fault_user", &[NO_TASK]),
                ("tcp_connections", &[NO_CGROUP, NO_FETCH]),
                ("tcp_retransmit_skb", &[NO_CGROUP]),
                ("tcp_sockets", &[NO_CGROUP, NO_FILE]),
                ("writeback_dirty_folio", &["no tracepoint writeback_dirty_folio"]),
            ],
        ),
        ("6.1", (6, 1), &[("block_io_start", &[NO_START]), ("iomap_dio_rw_begin", &[NO_DIRECT])]),
        ("6.12", (6, 12), &[]),
        ("7.2", (7, 2), &[]),
    ];
    for ((kernel, release), (of, version, expected)) in KERNELS.into_iter().zip(expected) {
        assert_eq!(kernel, of);
        let refused = refused(release, version);
        refused.iter().for_each(|(name, reasons)| println!("{kernel}: {name}: {}", reasons.join("; ")));
        let names: Vec<&str> = refused.keys().copied().collect();
        assert_eq!(names, expected.iter().map(|(name, _)| *name).collect::<Vec<_>>(), "{kernel}");
        for ((name, reasons), (_, expected)) in refused.iter().zip(expected) {
            let are_told = reasons.iter().zip(*expected).all(|(reason, part)| reason.contains(part));
            assert!(are_told && reasons.len() == expected.len(), "{kernel}: {name}: {reasons:?}");
        }
    }
}

#[test]
fn why_tasks_go_is_told_by_kernels_that_have_it() {
    let of = |kernel: usize| probes::switch_states(&types_of(KERNELS[kernel].1));
    let refused = of(0).unwrap_err();
    assert!(refused.contains("does not say in which state"), "{refused}");
    // As `pahole` counts the bits of `in_iowait`.
    let found = [1, 2, 3].map(|kernel| of(kernel).expect(KERNELS[kernel].0));
    println!("{found:?}");
    assert!(found.iter().all(|(byte, mask)| *byte > 0 && mask.is_power_of_two()), "{found:?}");
}

#[test]
fn flags_of_pages_and_requests_have_each_kernels_own_numbers() {
    let of_all =
        |of, name| KERNELS.map(|(_, release)| types_of(release).enumerator(of, name).expect("it has it"));
    // As `bpftool btf dump` shows them.
    assert_eq!(of_all("pageflags", "PG_head"), [16, 16, 6, 6]);
    assert_eq!(of_all("req_flag_bits", "__REQ_BACKGROUND"), [20; 4]);
    let done = [1, 2, 3].map(|kernel| types_of(KERNELS[kernel].1).enumerator("sock_flags", "SOCK_DONE"));
    assert_eq!(done, [Some(1); 3]);
}

#[test]
fn kernels_differ_in_whether_what_could_not_be_sent_again_is_told() {
    let told = KERNELS.map(|(_, release)| probes::retransmit_has_error(&types_of(release)));
    assert_eq!(told, [false, false, false, true]);
}

#[test]
fn offsets_are_each_kernels_own() {
    let of_all = |tracepoint, global| {
        KERNELS.map(|(_, release)| {
            let found = outcomes(&types_of(release)).remove(tracepoint).unwrap().unwrap();
            found.iter().find(|(name, _)| *name == global).unwrap().1
        })
    };
    // As `bpftool btf dump` shows them.
    assert_eq!(of_all("sched_switch", "TASK_LAST_QUEUED"), [1968, 2184, 2216, 2576]);
    assert_eq!(of_all("sched_switch", "TASK_CFS_RQ"), [464, 248, 288, 304]);
    assert_eq!(of_all("sched_switch", "RQ_CLOCK"), [2464, 2448, 2736, 3728]);
    assert_eq!(of_all("cgroup_mkdir", "CGROUP_ROOT"), [480, 656, 720, 808]);
    assert_eq!(of_all("cgroup_release", "ROOT_HIERARCHY_ID"), [12; 4]);
    let of_newer = |global| {
        [1, 2, 3].map(|kernel| {
            let found = outcomes(&types_of(KERNELS[kernel].1)).remove("tcp_connections").unwrap().unwrap();
            found.iter().find(|(name, _)| *name == global).unwrap().1
        })
    };
    assert_eq!(of_newer("TCP_BYTES_RECEIVED"), [1448, 1784, 1864]);
    assert_eq!(of_newer("TCP_BYTES_SENT"), [1488, 1608, 1616]);
    assert_eq!(of_newer("TCP_BYTES_RETRANSMITTED"), [2136, 2208, 2296]);
    assert_eq!((of_newer("SOCK_FLAGS"), of_newer("SOCKET_SK")), ([96; 3], [24; 3]));
}
