//! What there is to sit on: one view of core sets and hosts, with capacity, cost and performance.

pub mod cpu_list;
mod discover;
mod usage;

pub use discover::discover;
pub use rswap_types::{Capacity, CpuSet, Pool, PoolKind, PoolState, THIS_HOST, overlap};
pub use usage::with_usage;
