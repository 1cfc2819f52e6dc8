//! What the kernel counts on CPUs, for those who make something of it.

use rswap_pools::{Inventory, LocalKind};

use super::wiring::Wiring;
use crate::{
    pool::{CoresWindow, Pool},
    profile::{OnClass, Profile},
    units::UnixMillis,
};

/// Says on which pools of cores instances ran, where there are several.
pub(super) fn tell_classes(inventory: &Inventory, profiles: &mut [Profile]) {
    let classes = || {
        inventory.pools.iter().filter_map(|pool| match &pool.kind {
            LocalKind::Cores { cpus, .. } => Some((&pool.name, cpus)),
            _ => None,
        })
    };
    if classes().nth(1).is_none() {
        return;
    }
    for cpu in profiles.iter_mut().map(|profile| &mut profile.cpu) {
        let on = classes().map(|(name, cpus)| {
            let here = cpu.by_cpu.iter().filter(|on| cpus.contains(&on.cpu));
            OnClass { class: name.clone(), ran_ns: here.map(|on| on.ran_ns).sum() }
        });
        cpu.by_class = on.filter(|on| on.ran_ns > 0).collect();
    }
}

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::{CpuProfile, MemoryProfile, OnCpu, TcpProfile};

    fn inventory(pools: &[(&str, &[usize])]) -> Inventory {
        let pool = |(name, cpus): &(&str, &[usize])| serde_json::json!({ "name": name, "kind": "cores", "cpus": cpus, "cores": [], "performance": [], "state": "online" });
        let pools: Vec<_> = pools.iter().map(pool).collect();
        let json = serde_json::json!({ "at": 0, "online": [0, 1, 2, 3], "devices": [], "pools": pools });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn time_is_told_of_each_class_of_cores_where_there_are_several() {
        let on = |cpu, ran_ns| OnCpu { cpu, ran_ns, others_wait_ns: 0, foreign_wait_ns: 0 };
        let by_cpu = vec![on(0, 5), on(1, 7), on(2, 11), on(3, 0)];
        let (block, disk_neighbours) = Default::default();
        let mut profiles = [Profile {
            instance: "a".parse().unwrap(),
            at: UnixMillis(0),
            window_ms: 1000,
            cpu: CpuProfile { by_cpu, ..CpuProfile::default() },
            block,
            block_counted: false,
            disk_neighbours,
            io: Default::default(),
            tcp: TcpProfile::default(),
            tcp_counted: false,
            memory: MemoryProfile::default(),
        }];
        tell_classes(&inventory(&[("cores", &[0, 1, 2, 3])]), &mut profiles);
        assert!(profiles[0].cpu.by_class.is_empty());
        tell_classes(&inventory(&[("fast", &[0, 1]), ("slow", &[2]), ("idle", &[3])]), &mut profiles);
        let found: Vec<_> =
            profiles[0].cpu.by_class.iter().map(|on| (on.class.as_str(), on.ran_ns)).collect();
        assert_eq!(found, [("fast", 12), ("slow", 11)]);
    }
}
