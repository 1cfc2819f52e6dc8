//! Cgroups that are made in an instance's count as the instance's from their first moment on, however short they live.
//!
//! The agent looks which cgroups an instance has once per window: what is made and removed in between it would never see.

use aya_ebpf::{macros::btf_tracepoint, programs::BtfTracePointContext};

use crate::{
    kernel::{KernelPtr, cgroup_id, field, offsets},
    maps::{forget_child, remember_child, slot_of},
};

offsets!(CGROUP_PARENT, CSS_CGROUP, CGROUP_ROOT, ROOT_HIERARCHY_ID);

/// `cgroup_mkdir(cgrp, path)`: it was made, and nothing is in it yet.
#[btf_tracepoint(function = "cgroup_mkdir")]
fn cgroup_mkdir(ctx: BtfTracePointContext) -> i32 {
    let cgroup: KernelPtr = ctx.arg(0);
    if is_of_v2(cgroup) {
        let parent: KernelPtr = field(field(cgroup, &CGROUP_PARENT), &CSS_CGROUP);
        if let Some(slot) = slot_of(cgroup_id(parent)) {
            remember_child(cgroup_id(cgroup), slot);
        }
    }
    0
}

/// `cgroup_release(cgrp, path)`: it was removed, and nothing has to do with it any more. When it is removed (`cgroup_rmdir`) its last tasks may not have left their
/// CPUs yet, and its I/O may be under way.
#[btf_tracepoint(function = "cgroup_release")]
fn cgroup_release(ctx: BtfTracePointContext) -> i32 {
    let cgroup: KernelPtr = ctx.arg(0);
    if is_of_v2(cgroup) {
        forget_child(cgroup_id(cgroup));
    }
    0
}

/// Each hierarchy numbers its cgroups by itself.
#[inline(always)]
fn is_of_v2(cgroup: KernelPtr) -> bool {
    let root: KernelPtr = field(cgroup, &CGROUP_ROOT);
    field::<i32>(root, &ROOT_HIERARCHY_ID) == 0
}
