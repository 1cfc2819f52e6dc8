//! rswap's eBPF programs. Each counts the events of the tracked cgroups, and of no others, into histograms
//! that the agent maps into its memory; those of [`written`] are only loaded while a volume is copied. None of them changes
//! anything.
//!
//! Field offsets and the size of the maps are globals (see `rswap_common::globals`), set before loading.
#![no_std]
#![no_main]
#![allow(internal_features, reason = "atomic addition has no stable form on this target")]
#![feature(asm_experimental_arch, core_intrinsics)]

mod block;
mod cgroups;
mod disk_users;
mod empty;
mod faults;
mod kernel;
mod maps;
mod neighbours;
mod sched;
mod sets;
mod tcp;
mod written;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // The programs are built without reachable panics; the verifier would refuse this loop.
    loop {}
}

/// The kernel lets only programs under a GPL-compatible licence call some helpers.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
