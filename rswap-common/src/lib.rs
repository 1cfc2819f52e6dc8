//! Words that the eBPF programs and the agent share: records, map layouts, histogram indexing, limits.
#![no_std]

pub mod globals;
pub mod histogram;
pub mod layout;
pub mod neighbours;
pub mod tables;
