//! Replays demand in virtual time. Pure: no I/O, no clock, and the same result for the same input.
//!
//! [`replay`] plays recorded demand on described pools: what would have been done, and what it would have cost.
//! [`cloudsim`] is the field's common yardstick for placement policies, so that ours can be compared with published ones.

pub mod cloudsim;
pub mod replay;
pub mod traces;
