//! What the kernel counts on CPUs, for those who make something of it.

use super::wiring::Wiring;
use crate::{
    pool::{CoresWindow, Pool},
    profile::Profile,
    units::UnixMillis,
};

impl Wiring {
    /// A window of the CPUs.
    pub(super) fn look_at_cores(&mut self, now: UnixMillis, profiles: &[Profile]) {
        // Without it nobody knows what others use.
        let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let moving = self.is_moving();
        let known = &self.known;
        let sits_on = |name: &_| known.get(name).and_then(|instance| instance.pool.as_deref());
        let times = rswap_pools::cpu_times(&stat);
        self.cores.window(&self.pools, CoresWindow { now, times, profiles, sits_on: &sits_on, moving });
    }

    /// Tells plans what it has seen.
    pub(super) fn tell_of_cores(&self, now: UnixMillis, pools: &mut [Pool]) {
        self.cores.lay_over(now, pools);
    }
}
