//! What there is to sit on, as plans see it: core sets of this host, this host, other hosts. What there is on this host, with all
//! that is known of it, is an [`Inventory`], found by `rswap-pools` and followed on a thread of its own.

mod cores;
mod disks;
mod planned;
mod usage;
mod watch;

pub use cores::{Cores, CoresWindow};
pub use disks::{Disks, Done, OTHERS_WINDOWS, Window, disks_of, done_on};
pub use planned::{discover, planned};
pub use rswap_pools::{Inventory, Known, LocalKind, LocalPool, Source, State, cpu_list};
pub use rswap_types::{Capacity, CpuSet, Flow, Pool, PoolKind, PoolState, THIS_HOST, overlap};
pub use usage::with_usage;
pub use watch::{Watch, calibrations, kernel_release, look};
