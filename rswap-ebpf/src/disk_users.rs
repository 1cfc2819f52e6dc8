//! Who uses disks beside instances: by cgroup and device, how long the device worked for them.

use core::intrinsics::{AtomicOrdering, atomic_xadd};

use aya_ebpf::{bindings::BPF_NOEXIST, helpers::bpf_get_current_task_btf, macros::map, maps::HashMap};
use rswap_common::{
    layout::MAX_DEVICES,
    neighbours::{DISK_USERS as MOST, DiskUse, DiskUser, KERNEL_THREADS},
    tables::{KERNEL_SUBMITTER, submitter_of_cgroup},
};

use crate::{
    maps::{ROOT_CGROUP_ID, unowned_record},
    neighbours::is_kernel_thread,
    sched::task_cgroup_id,
};

/// A hash map, since nobody here knows who will come: requests of instances don't come here. The agent takes out who has done nothing for long.
#[map]
static DISK_USERS: HashMap<DiskUser, DiskUse> = HashMap::with_max_entries(MOST, 0);

/// Who makes a request now, as it is remembered with it.
#[inline(always)]
pub fn current_submitter() -> u32 {
    // SAFETY: a helper without arguments; unsafe only for being foreign.
    let current = unsafe { bpf_get_current_task_btf() }.cast_const().cast();
    let cgroup = task_cgroup_id(current);
    if cgroup == ROOT_CGROUP_ID && is_kernel_thread(current) {
        return KERNEL_SUBMITTER;
    }
    submitter_of_cgroup(cgroup)
}

/// The cgroup that was remembered so, or [`KERNEL_THREADS`]; 0: nobody knows.
#[inline(always)]
pub fn owner_of_submitter(submitter: u32) -> u64 {
    if submitter == KERNEL_SUBMITTER { KERNEL_THREADS } else { submitter.into() }
}

/// Counts a request of somebody's who is no instance, which the device has had for so long.
#[inline(always)]
pub fn count_disk_use(cgroup_id: u64, device: u32, device_ns: u64) {
    if cgroup_id != 0 {
        let user = DiskUser { cgroup_id, device: device.into() };
        if let Some(of) = DISK_USERS.get_ptr_mut(&user) {
            // SAFETY: the map gave the pointer, and every writer adds atomically.
            unsafe {
                atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*of).requests, 1);
                atomic_xadd::<u64, u64, { AtomicOrdering::Relaxed }>(&raw mut (*of).device_ns, device_ns);
            }
            return;
        }
        // Another CPU may have been faster, or there may be no room.
        if DISK_USERS.insert(&user, &DiskUse { requests: 1, device_ns }, u64::from(BPF_NOEXIST)).is_ok() {
            return;
        }
    }
    if let Some(record) = unowned_record()
        && device < MAX_DEVICES
    {
        // SAFETY: the map gave the pointer, only this program on this CPU writes there, and `device` was checked.
        unsafe {
            let unknown = (&raw mut (*record).unknown_ns).cast::<u64>().add(device as usize);
            *unknown = (*unknown).wrapping_add(device_ns);
        }
    }
}
