//! What programs ask of a kernel beside its types, and the version of Linux that it came with: helpers by number, and instructions.
//!
//! Nothing tells whether a kernel has them but loading the programs, which is how the agent finds out. Vendors may have brought them to older kernels.

use std::collections::{BTreeMap, BTreeSet};

use aya_obj::{Object, generated as bpf};

use crate::profile::probes::OBJECT;

/// A version of Linux.
pub(super) type Version = (u32, u32);

/// Something that came with a version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Came {
    pub(super) what: &'static str,
    pub(super) with: Version,
}

const fn came(what: &'static str, with: Version) -> Came {
    Came { what, with }
}

/// 3ca1032ab7ab "bpf: Implement get_current_task_btf and RET_PTR_TO_BTF_ID".
const CURRENT_TASK: Came = came("bpf_get_current_task_btf", (5, 11));
/// 4f19cab76136 "bpf: Add a bpf_sock_from_file helper".
const SOCK_FROM_FILE: Came = came("bpf_sock_from_file", (5, 11));
/// 5ffa25502b5a "bpf: Add instructions for atomic_[cmp]xchg", and 5ca419f2864a for those that fetch.
const ATOMIC_FETCH: Came = came("atomic instructions that answer what was there", (5, 12));

/// All helpers that any of the programs calls, by their numbers (include/uapi/linux/bpf.h).
const HELPERS: [(i32, Came); 12] = [
    (1, came("bpf_map_lookup_elem", (3, 19))),
    (2, came("bpf_map_update_elem", (3, 19))),
    (3, came("bpf_map_delete_elem", (3, 19))),
    (5, came("bpf_ktime_get_ns", (4, 1))),
    (8, came("bpf_get_smp_processor_id", (4, 1))),
    // 6ae08ae3dea2.
    (113, came("bpf_probe_read_kernel", (5, 5))),
    // 457f44363a88, these four.
    (130, came("bpf_ringbuf_output", (5, 8))),
    (131, came("bpf_ringbuf_reserve", (5, 8))),
    (132, came("bpf_ringbuf_submit", (5, 8))),
    (133, came("bpf_ringbuf_discard", (5, 8))),
    (158, CURRENT_TASK),
    (162, SOCK_FROM_FILE),
];

/// The oldest kernel that is asked: what it has, all have. So it has the iterator over files of tasks (5.8, eaaacd23910f; of one process since 6.1,
/// f0d74c4da1f0, and over all before that), and lets the agent call programs of raw tracepoints (5.10, 1b4d60ec162f).
const OLDEST: Version = (5, 10);

/// What programs use that is newer, by the program. Those that are not named use nothing.
const NEWER: [(&str, &[Came]); 8] = [
    ("block_io_start", &[CURRENT_TASK]),
    ("inet_sock_set_state", &[ATOMIC_FETCH]),
    ("major_faults", &[CURRENT_TASK]),
    ("minor_faults", &[CURRENT_TASK]),
    ("page_fault_kernel", &[CURRENT_TASK]),
    ("page_fault_user", &[CURRENT_TASK]),
    ("tcp_connections", &[ATOMIC_FETCH]),
    ("tcp_sockets", &[SOCK_FROM_FILE]),
];

/// What a program uses that Linux of this version has not.
pub(super) fn lacking(program: &str, version: Version) -> impl Iterator<Item = Came> {
    let used = NEWER.iter().filter(move |(of, _)| *of == program).flat_map(|(_, used)| *used);
    used.copied().filter(move |of| of.with > version)
}

/// What an instruction uses.
fn used_by(instruction: &bpf::bpf_insn) -> Option<Came> {
    let code = u32::from(instruction.code);
    if code == bpf::BPF_JMP | bpf::BPF_CALL {
        match instruction.src_reg() {
            0 => {}
            // Of a function of the object itself, as the compiler's memset: it is looked into as well.
            1 => return None,
            kind => panic!(
                "a call of kind {kind}, of a function of the kernel's own: with which Linux did it come?"
            ),
        }
        let known = HELPERS.iter().find(|(number, _)| *number == instruction.imm);
        return Some(
            known.unwrap_or_else(|| panic!("with which Linux did helper {} come?", instruction.imm)).1,
        );
    }
    let is_atomic = code & 7 == bpf::BPF_STX && code & 0xe0 == bpf::BPF_ATOMIC;
    (is_atomic && instruction.imm as u32 & bpf::BPF_FETCH != 0).then_some(ATOMIC_FETCH)
}

#[test]
fn what_is_newer_is_what_the_programs_use() {
    let Some(object) = OBJECT else {
        eprintln!("not tested: built without eBPF programs");
        return;
    };
    let object = Object::parse(object).unwrap();
    let mut newer: BTreeMap<&str, BTreeSet<Came>> = BTreeMap::new();
    for (name, program) in &object.programs {
        let function = &object.functions[&program.function_key()];
        let used = function.instructions.iter().filter_map(used_by);
        newer.insert(name, used.filter(|of| of.with > OLDEST).collect());
    }
    let programs: BTreeSet<_> = object.programs.values().map(|program| program.function_key()).collect();
    for (key, function) in object.functions.iter().filter(|(key, _)| !programs.contains(key)) {
        let used = function.instructions.iter().filter_map(used_by).find(|of| of.with > OLDEST);
        assert_eq!(used, None, "{}, which no program is told of: {key:?}", function.name);
    }
    newer.retain(|_, used| !used.is_empty());
    let listed = NEWER.iter().map(|(name, used)| (*name, used.iter().copied().collect()));
    assert_eq!(newer, listed.collect::<BTreeMap<_, _>>());
}
