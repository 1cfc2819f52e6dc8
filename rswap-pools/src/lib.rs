//! What a host has for instances to sit on: cores, memory and swap, file systems, network links.
//!
//! ```text
//! discover (files below a root) -> follow (rates, states: online, degraded, full, gone)
//!     -> calibrate::apply (what was measured before) -> Inventory
//! ```
//!
//! What requests really take, at which load, is an [`experience::Experience`] per pool: it corrects what was measured.
//! How much longer work really takes on cores is a [`core_experience::CoreExperience`].
//!
//! Everything may be missing: what a kernel or a virtual machine does not say is unknown, and each number carries its
//! source. The root is a parameter, so that a directory tree of a test stands for a machine.

mod block;
mod by_load;
pub mod calibrate;
pub mod core_experience;
mod cores;
pub mod cpu_list;
mod discover;
pub mod experience;
mod follow;
mod inventory;
mod link;
mod memory;
mod root;
mod settings;
mod storage;
mod swap;

pub use block::{Device, DeviceKind};
pub use cores::{Cache, Core, CpuTime, cpu_times};
pub use discover::{RELATIVE_SPEED, discover, discover_again};
pub use follow::{GONE_KEPT_MS, follow};
pub use inventory::{Inventory, Known, LocalKind, LocalPool, Measure, Source, State};
pub use root::{Room, Root, room_of};
pub use settings::{Member, Settings, Wanted};
pub use swap::{SwapArea, swap_areas};
