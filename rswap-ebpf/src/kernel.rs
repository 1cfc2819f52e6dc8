//! Reading the kernel's structures by offsets that the agent took from its type information.

use core::ffi::c_void;

use aya_ebpf::Global;

/// A pointer into the kernel, as the verifier tracks it.
pub type KernelPtr = *const c_void;

/// Declares globals that hold field offsets, in bytes.
macro_rules! offsets {
    ($($name:ident),* $(,)?) => {
        $(#[unsafe(no_mangle)]
        pub(crate) static $name: ::aya_ebpf::Global<u64> = ::aya_ebpf::Global::new(0);)*
    };
}
pub(crate) use offsets;

offsets!(CGROUP_KN, KERNFS_ID);

/// The field of type `T` at `offset` in the structure at `base`.
#[inline(always)]
pub fn field<T: Copy>(base: KernelPtr, offset: &Global<u64>) -> T {
    // SAFETY: raw kernel memory can be reached in no other way. The verifier checks the pointer's type, the
    // offset and the width against the kernel's type information, and a load that faults reads as 0.
    unsafe { core::ptr::read_volatile(base.byte_add(offset.load() as usize).cast::<T>()) }
}

/// A number that follows from a pointer: its bytes, swapped. The verifier lets nobody calculate with a pointer, but that is a number to it.
#[inline(always)]
pub fn number_of(pointer: KernelPtr) -> u64 {
    (pointer as u64).swap_bytes()
}

/// The kernfs id of a `struct cgroup`.
#[inline(always)]
pub fn cgroup_id(cgroup: KernelPtr) -> u64 {
    field(field(cgroup, &CGROUP_KN), &KERNFS_ID)
}
