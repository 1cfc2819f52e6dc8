//! One look at everything, with what the configuration says laid over it.

use std::collections::BTreeMap;

use procfs_core::DiskStat;
use rswap_types::{CpuSet, UnixMillis};

use crate::{
    Core, Inventory, Known, LocalKind, LocalPool, Measure, Member, Root, Settings, Source, State, Wanted,
    cores, cpu_list, inventory::Counters, link, memory, storage, swap,
};

/// Name of the measure that plans use: speed of one core, relative to the reference core; of storage, of a request.
pub const RELATIVE_SPEED: &str = "relative_speed";
/// Names of what the configuration says of storage.
pub(crate) const OPERATIONS_PER_S: &str = "operations_per_s";
pub(crate) const BYTES_PER_S: &str = "bytes_per_s";

/// All that is below `root`, and what `settings` name, at `now`. Rates, and what is gone, come by [`crate::follow`].
pub fn discover(root: &Root<'_>, settings: &Settings, now: UnixMillis) -> Inventory {
    discover_again(root, settings, now, &Inventory::default())
}

/// The same, of a machine that was looked at `before`, when all of its CPUs that were online had been so for a while: the kernel shows one's caches a little later than it
/// says that it is online. What can't have changed since is not read again.
pub fn discover_again(
    root: &Root<'_>,
    settings: &Settings,
    now: UnixMillis,
    before: &Inventory,
) -> Inventory {
    let devices = crate::block::devices(root);
    let mut pools = core_pools(root, settings, before);
    pools.extend(memory_pools(root, settings));
    pools.extend(swap_pools(root, settings));
    let file_systems = storage::file_systems(root, &devices, settings.full_below_share);
    pools.extend(storage_pools(file_systems, settings));
    pools.extend(link_pools(root, settings));
    Inventory { at: now, online: cores::online(root).0, counters: counters(root, &pools), devices, pools }
}

fn counters(root: &Root<'_>, pools: &[LocalPool]) -> Counters {
    let disks = root.text("/proc/diskstats").unwrap_or_default();
    let links = pools.iter().filter_map(|pool| match &pool.kind {
        LocalKind::Link { interface, .. } => Some((interface.clone(), link::bytes(root, interface)?)),
        _ => None,
    });
    Counters {
        cpus: cores::times(&root.text("/proc/stat").unwrap_or_default()),
        devices: disks
            .lines()
            .filter_map(|line| DiskStat::from_line(line).ok())
            .map(|disk| (disk.name, disk.time_in_progress))
            .collect(),
        links: links.collect(),
    }
}

fn core_pools(root: &Root<'_>, settings: &Settings, before: &Inventory) -> Vec<LocalPool> {
    let (online, file) = cores::online(root);
    let seen = before.pools.iter().filter(|_| before.online == online).filter_map(|pool| match &pool.kind {
        LocalKind::Cores { cores, .. } => Some(cores),
        _ => None,
    });
    // One that was offline told little.
    let seen: BTreeMap<usize, &Core> =
        seen.flatten().filter(|core| core.online).map(|core| (core.cpu, core)).collect();
    let wanted = settings.pools.iter().filter_map(|wanted| match &wanted.member {
        Member::Cpus(cpus) => Some((wanted, cpus)),
        _ => None,
    });
    let known = |cpus: &CpuSet| -> Vec<Core> {
        let core = |&cpu: &usize| cores::core(root, cpu, online.contains(&cpu), seen.get(&cpu).copied());
        cpus.iter().map(core).collect()
    };
    let mut pools: Vec<LocalPool> = wanted
        .map(|(wanted, cpus)| {
            let there = cpus.intersection(&online).count() as f64;
            // More than there are CPUs cannot be given, whatever is configured.
            let limit = wanted.capacity.filter(|&limit| limit < there);
            let capacity = match limit {
                Some(limit) => configured(limit, wanted, "capacity_cores"),
                None => Known::found(there, file.clone()),
            };
            let kind = LocalKind::Cores {
                cpus: cpus.clone(),
                cores: known(cpus),
                instance_cores: wanted
                    .instance_cores
                    .map(|value| configured(value, wanted, "instance_cores")),
                instance_weight: wanted
                    .instance_weight
                    .map(|value| configured(value, wanted, "instance_weight")),
            };
            let mut pool = named(wanted.name.clone(), kind, Some(capacity));
            pool.state = cores_state(cpus, &online);
            pool.cost_per_hour =
                Some(cost(Some(wanted), "cost_per_core_hour").unwrap_or(settings.cost_per_core_hour.clone()));
            let speed = wanted.performance.map(|value| configured(value, wanted, "performance"));
            pool.performance.push(speed_of(speed.unwrap_or(settings.performance.clone())));
            pool
        })
        .collect();
    if pools.is_empty() {
        let found = known(&online);
        pools.extend(cores::classes(&found).into_iter().map(|class| {
            let cores = found.iter().filter(|core| class.cpus.contains(&core.cpu)).cloned().collect();
            let capacity = Known::found(class.cpus.len() as f64, file.clone());
            let mut pool = named(
                class.name,
                LocalKind::Cores { cpus: class.cpus, cores, instance_cores: None, instance_weight: None },
                Some(capacity),
            );
            pool.cost_per_hour = Some(settings.cost_per_core_hour.clone());
            let host = &settings.performance;
            let speed = match class.speed {
                Some(share) => Known { value: host.value * share.value, source: share.source },
                None => host.clone(),
            };
            pool.performance.push(speed_of(speed));
            pool
        }));
    }
    pools
}

/// All of a set's CPUs are online, or some, or none.
pub(crate) fn cores_state(cpus: &CpuSet, online: &CpuSet) -> State {
    let missing: CpuSet = cpus.difference(online).copied().collect();
    let reason = format!("CPU {} is not online", cpu_list::format(&missing));
    match missing.len() {
        0 => State::Online,
        count if count == cpus.len() => State::Gone { reason, since: UnixMillis(0) },
        _ => State::Degraded { reason },
    }
}

fn memory_pools(root: &Root<'_>, settings: &Settings) -> Vec<LocalPool> {
    let nodes = memory::nodes(root);
    let mut taken = CpuSet::new();
    let mut pools = Vec::new();
    for wanted in &settings.pools {
        let Member::Nodes(numbers) = &wanted.member else { continue };
        let own: Vec<_> =
            nodes.iter().filter(|node| node.node.is_some_and(|n| numbers.contains(&n))).collect();
        taken.extend(numbers);
        let missing: CpuSet =
            numbers.iter().filter(|n| own.iter().all(|node| node.node != Some(**n))).copied().collect();
        let mut pool = memory_pool(wanted.name.clone(), &own, Some(wanted), settings);
        let reason = format!("memory node {} is not there", cpu_list::format(&missing));
        pool.state = match (missing.is_empty(), own.is_empty()) {
            (true, _) => State::Online,
            (false, false) => State::Degraded { reason },
            (false, true) => State::Gone { reason, since: UnixMillis(0) },
        };
        pools.push(pool);
    }
    for node in nodes.iter().filter(|node| node.node.is_none_or(|number| !taken.contains(&number))) {
        let name = node.node.map_or_else(|| "memory".to_owned(), |number| format!("memory-{number}"));
        pools.push(memory_pool(name, &[node], None, settings));
    }
    pools
}

fn memory_pool(
    name: String,
    nodes: &[&memory::Node],
    wanted: Option<&Wanted>,
    settings: &Settings,
) -> LocalPool {
    let sum = |value: fn(&memory::Node) -> Option<&Known>| {
        let parts: Option<Vec<&Known>> = nodes.iter().map(|node| value(node)).collect();
        let parts = parts.filter(|parts| !parts.is_empty())?;
        Some(Known { value: parts.iter().map(|part| part.value).sum(), source: parts[0].source.clone() })
    };
    let (bytes, free) = (sum(|node| node.bytes.as_ref()), sum(|node| node.free_bytes.as_ref()));
    let used = bytes.as_ref().zip(free.as_ref());
    let used =
        used.map(|(bytes, free)| Known { value: bytes.value - free.value, source: free.source.clone() });
    let mut pool = named(name, memory::kind(nodes), bytes);
    limit(&mut pool, used, free, wanted, "capacity_gib");
    pool.cost_per_hour =
        Some(cost(wanted, "cost_per_gib_hour").unwrap_or(settings.cost_per_gib_hour.clone()));
    pool
}

fn swap_pools(root: &Root<'_>, settings: &Settings) -> Vec<LocalPool> {
    let areas = swap::areas(root, settings.full_below_share);
    let wanted = |path: &std::path::Path| {
        settings.pools.iter().find(|wanted| matches!(&wanted.member, Member::Swap(own) if own == path))
    };
    let absent = settings.pools.iter().filter_map(|wanted| match &wanted.member {
        Member::Swap(path) if areas.iter().all(|area| area.path != *path) => {
            let kind = LocalKind::Swap {
                path: path.clone(),
                what: "unknown".to_owned(),
                priority: None,
                compression: None,
                memory_bytes: None,
            };
            Some(gone(wanted, kind, format!("{} is not in /proc/swaps", path.display()), "cost_per_gib_hour"))
        }
        _ => None,
    });
    let absent: Vec<_> = absent.collect();
    let found = areas.into_iter().map(|area| {
        let wanted = wanted(&area.path);
        let name =
            wanted.map_or_else(|| format!("swap:{}", area.path.display()), |wanted| wanted.name.clone());
        let mut pool = named(name, area.kind, Some(area.capacity));
        limit(&mut pool, Some(area.used), Some(area.free), wanted, "capacity_gib");
        (pool.cost_per_hour, pool.state) = (cost(wanted, "cost_per_gib_hour"), area.state);
        pool
    });
    found.chain(absent).collect()
}

fn storage_pools(file_systems: Vec<storage::FileSystem>, settings: &Settings) -> Vec<LocalPool> {
    let mut pools = Vec::new();
    let wanted: Vec<(&Wanted, &std::path::PathBuf)> = settings
        .pools
        .iter()
        .filter_map(|wanted| match &wanted.member {
            Member::Storage(path) => Some((wanted, path)),
            _ => None,
        })
        .collect();
    for &(wanted, path) in &wanted {
        if file_systems.iter().all(|found| !found.mount_points.contains(path)) {
            let kind = LocalKind::Storage {
                mount_points: vec![path.clone()],
                fs_type: "unknown".to_owned(),
                mounted: String::new(),
                devices: Vec::new(),
                remote: false,
            };
            let reason = format!("no file system of a device is mounted at {}", path.display());
            pools.push(gone(wanted, kind, reason, "cost_per_gib_hour"));
        }
    }
    for found in file_systems {
        let mut names: Vec<(String, Option<&Wanted>)> = wanted
            .iter()
            .filter(|(_, path)| found.mount_points.contains(path))
            .map(|&(wanted, _)| (wanted.name.clone(), Some(wanted)))
            .collect();
        if names.is_empty() {
            let at = found.mount_points.first().map(|path| path.display().to_string());
            names.push((format!("fs:{}", at.unwrap_or_default()), None));
        }
        for (name, wanted) in names {
            let mut pool = named(name, found.kind.clone(), found.capacity.clone());
            limit(&mut pool, found.used.clone(), found.free.clone(), wanted, "capacity_gib");
            if pool.state == State::Online || found.state != State::Online {
                pool.state = found.state.clone();
            }
            pool.cost_per_hour = cost(wanted, "cost_per_gib_hour");
            pool.performance.extend(wanted.iter().flat_map(|wanted| what_it_gives(wanted)));
            pools.push(pool);
        }
    }
    pools
}

/// What the configuration says that storage gives.
fn what_it_gives(wanted: &Wanted) -> impl Iterator<Item = Measure> + use<> {
    let said = [
        (OPERATIONS_PER_S, wanted.operations_per_s, "operations_per_s"),
        (BYTES_PER_S, wanted.bytes_per_s, "mbyte_per_s"),
        (RELATIVE_SPEED, wanted.performance, "performance"),
    ];
    let measures = said.map(|(what, value, key)| {
        Some(Measure { what: what.to_owned(), known: configured(value?, wanted, key) })
    });
    measures.into_iter().flatten()
}

fn link_pools(root: &Root<'_>, settings: &Settings) -> Vec<LocalPool> {
    let links = link::links(root);
    let mut pools = Vec::new();
    for wanted in &settings.pools {
        let Member::Link(interface) = &wanted.member else { continue };
        if links.iter().all(|link| link.interface != *interface) {
            let kind = LocalKind::Link {
                interface: interface.clone(),
                what: "unknown".to_owned(),
                members: Vec::new(),
                master: None,
                mtu: None,
                instance_rate: None,
            };
            pools.push(gone(
                wanted,
                kind,
                format!("there is no interface {interface}"),
                "cost_per_gbit_hour",
            ));
        }
    }
    for link in links {
        // Several, where there are classes of rates.
        let member = Member::Link(link.interface.clone());
        let wanted: Vec<&Wanted> = settings.pools.iter().filter(|wanted| wanted.member == member).collect();
        if wanted.is_empty() {
            pools.push(link_pool(&link, None));
        }
        pools.extend(wanted.into_iter().map(|wanted| link_pool(&link, Some(wanted))));
    }
    pools
}

fn link_pool(link: &link::Link, wanted: Option<&Wanted>) -> LocalPool {
    let name = wanted.map_or_else(|| format!("link:{}", link.interface), |wanted| wanted.name.clone());
    let mut pool = named(name, link.kind.clone(), link.capacity.clone());
    if let Some(wanted) = wanted {
        // A link's speed is often unknown: here the configuration may say more than was found, too.
        if let Some(value) = wanted.capacity {
            pool.capacity = Some(configured(value, wanted, "capacity_gbit_per_s"));
        }
        if let LocalKind::Link { instance_rate, .. } = &mut pool.kind {
            *instance_rate = wanted.instance_rate.map(|rate| configured(rate, wanted, "instance_mbit_per_s"));
        }
    }
    (pool.cost_per_hour, pool.state) = (cost(wanted, "cost_per_gbit_hour"), link.state.clone());
    pool
}

fn named(name: String, kind: LocalKind, capacity: Option<Known>) -> LocalPool {
    LocalPool {
        name,
        kind,
        capacity,
        used: None,
        free: None,
        cost_per_hour: None,
        busy: None,
        performance: Vec::new(),
        state: State::Online,
    }
}

/// Sets what is used and free, with the configured limit: what others use counts against it.
fn limit(pool: &mut LocalPool, used: Option<Known>, free: Option<Known>, wanted: Option<&Wanted>, key: &str) {
    (pool.used, pool.free) = (used, free);
    let Some((wanted, limit)) = wanted.and_then(|wanted| Some((wanted, wanted.capacity?))) else { return };
    if pool.capacity.as_ref().is_some_and(|found| found.value <= limit) {
        return;
    }
    pool.capacity = Some(configured(limit, wanted, key));
    let left = pool.used.as_ref().map_or(limit, |used| (limit - used.value).max(0.0));
    let left = pool.free.as_ref().map_or(left, |free| free.value.min(left));
    pool.free = Some(configured(left, wanted, key));
    if left == 0.0 {
        pool.state =
            State::Full { reason: format!("its configured limit ({}.{key}) is used up", wanted.key) };
    }
}

fn gone(wanted: &Wanted, kind: LocalKind, reason: String, cost_key: &str) -> LocalPool {
    let mut pool = named(wanted.name.clone(), kind, None);
    pool.state = State::Gone { reason, since: UnixMillis(0) };
    pool.cost_per_hour = cost(Some(wanted), cost_key);
    pool
}

fn configured(value: f64, wanted: &Wanted, key: &str) -> Known {
    Known { value, source: Source::configured(format!("{}.{key}", wanted.key)) }
}

fn cost(wanted: Option<&Wanted>, key: &str) -> Option<Known> {
    let wanted = wanted?;
    wanted.cost_per_hour.map(|value| configured(value, wanted, key))
}

fn speed_of(known: Known) -> Measure {
    Measure { what: RELATIVE_SPEED.to_owned(), known }
}

#[cfg(test)]
pub(crate) mod tests;
