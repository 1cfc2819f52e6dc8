//! Words that cross rooms: instances' names, moments, pools. Data only; nothing here decides anything.

pub mod bounds;
mod instance;
mod latency;
mod pool;
mod slowdown;
mod units;

pub use instance::{InstanceName, NameError};
pub use latency::{LatencyCurve, LatencyPoint};
pub use pool::{Capacity, CpuSet, Flow, Pool, PoolKind, PoolState, THIS_HOST, overlap};
pub use slowdown::{SlowdownCurve, SlowdownPoint};
pub use units::UnixMillis;
