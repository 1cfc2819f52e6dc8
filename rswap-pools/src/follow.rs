//! From one look to the next: rates, and what is no longer there.
//!
//! ```text
//!            some of it is missing, read-only, no carrier
//!   online <---------------------------------------------> degraded
//!     ^  ^
//!     |  +---- less than the share available / a quarter more than it again ----> full
//!     |
//!     +---- not found at all / found again ----> gone (forgotten after an hour, unless it is configured)
//! ```

use rswap_types::{CpuSet, UnixMillis};

use crate::{
    Inventory, Known, LocalKind, LocalPool, Settings, Source, State, discover::cores_state,
    inventory::Counters,
};

/// How long a pool that is gone, and that no configuration names, is remembered.
pub const GONE_KEPT_MS: u64 = 3_600_000;

/// A full pool is usable again at this multiple of the share below which it is full: it must not waver.
const FULL_UNTIL: f64 = 1.25;

/// What `found` is after `before`: with rates over the time between them, and with those pools that were there before.
pub fn follow(before: &Inventory, mut found: Inventory, settings: &Settings) -> Inventory {
    let elapsed_ms = found.at.since(before.at);
    for pool in &mut found.pools {
        let previous = before.pools.iter().find(|previous| previous.name == pool.name);
        if let Some(previous) = previous {
            keep_members(pool, previous, settings);
            stay_full(pool, previous, settings.full_below_share);
        }
        stamp(pool, previous, found.at);
        rates(pool, &before.counters, &found.counters, elapsed_ms);
    }
    for previous in &before.pools {
        if found.pool(&previous.name).is_none() {
            found.pools.extend(gone(previous, found.at));
        }
    }
    found
}

/// A found class of cores keeps those that went offline: it is degraded, not smaller.
fn keep_members(pool: &mut LocalPool, previous: &LocalPool, settings: &Settings) {
    if settings.pools.iter().any(|wanted| wanted.name == pool.name) {
        return;
    }
    let (
        LocalKind::Cores { cpus, cores, .. },
        LocalKind::Cores { cpus: cpus_before, cores: cores_before, .. },
    ) = (&mut pool.kind, &previous.kind)
    else {
        return;
    };
    let online = cpus.clone();
    for core in
        cores_before.iter().filter(|core| cpus_before.contains(&core.cpu) && !online.contains(&core.cpu))
    {
        cpus.insert(core.cpu);
        cores.push(crate::Core { online: false, ..core.clone() });
    }
    cores.sort_by_key(|core| core.cpu);
    pool.state = cores_state(cpus, &online);
}

fn stay_full(pool: &mut LocalPool, previous: &LocalPool, full_below: f64) {
    let (State::Full { reason }, State::Online) = (&previous.state, &pool.state) else { return };
    let share = pool.capacity.as_ref().zip(pool.free.as_ref());
    let share = share.map(|(capacity, free)| free.value / capacity.value.max(1.0));
    if share.is_some_and(|share| share < full_below * FULL_UNTIL) {
        pool.state = State::Full { reason: reason.clone() };
    }
}

/// Since when it is gone.
fn stamp(pool: &mut LocalPool, previous: Option<&LocalPool>, now: UnixMillis) {
    if let State::Gone { since, .. } = &mut pool.state {
        *since = match previous.map(|previous| &previous.state) {
            Some(State::Gone { since, .. }) => *since,
            _ => now,
        };
    }
}

/// A pool that was there before, as it is shown now.
fn gone(previous: &LocalPool, now: UnixMillis) -> Option<LocalPool> {
    let since = match previous.state {
        State::Gone { since, .. } => since,
        _ => now,
    };
    if now.since(since) > GONE_KEPT_MS {
        return None;
    }
    let mut pool = previous.clone();
    (pool.used, pool.free, pool.busy) = (None, None, None);
    let reason = match &pool.kind {
        LocalKind::Cores { .. } => "none of its CPUs is online".to_owned(),
        LocalKind::Storage { mount_points, .. } => {
            let at = mount_points.first().map(|path| path.display().to_string()).unwrap_or_default();
            format!("no file system of a device is mounted at {at}")
        }
        LocalKind::Swap { path, .. } => format!("{} is not in /proc/swaps", path.display()),
        LocalKind::Link { interface, .. } => format!("there is no interface {interface}"),
        LocalKind::Memory { .. } => "the memory node is not there".to_owned(),
    };
    pool.state = State::Gone { reason, since };
    Some(pool)
}

fn rates(pool: &mut LocalPool, before: &Counters, now: &Counters, elapsed_ms: u64) {
    match &pool.kind {
        LocalKind::Cores { cpus, .. } => {
            let shares: Vec<f64> = cpus.iter().filter_map(|cpu| cpu_share(before, now, *cpu)).collect();
            if shares.is_empty() {
                return;
            }
            let used: f64 = shares.iter().sum();
            pool.used = Some(Known::found(used, "/proc/stat"));
            pool.busy = Some(Known::found(used / shares.len() as f64, "/proc/stat"));
            // What it may give, less what anybody uses of it.
            pool.free = pool.capacity.as_ref().map(|capacity| Known {
                value: (capacity.value - used).max(0.0),
                source: Source::found("/proc/stat"),
            });
        }
        LocalKind::Memory { cpus, .. } => pool.busy = mean_share(before, now, cpus),
        LocalKind::Storage { devices, .. } => {
            let device = devices.first().filter(|_| elapsed_ms > 0);
            let busy_ms =
                device.and_then(|name| now.devices.get(name)?.checked_sub(*before.devices.get(name)?));
            pool.busy = busy_ms.map(|busy_ms| {
                Known::found((busy_ms as f64 / elapsed_ms as f64).min(1.0), "/proc/diskstats")
            });
        }
        LocalKind::Link { interface, .. } => {
            let counted =
                before.links.get(interface).zip(now.links.get(interface)).filter(|_| elapsed_ms > 0);
            let Some((&(rx_before, tx_before), &(rx, tx))) = counted else { return };
            let bytes = rx.saturating_sub(rx_before).max(tx.saturating_sub(tx_before));
            let file = format!("/sys/class/net/{interface}/statistics");
            let used = bytes as f64 * 8.0 / (elapsed_ms as f64 / 1e3);
            if let Some(capacity) = &pool.capacity {
                pool.free = Some(Known::found((capacity.value - used).max(0.0), file.clone()));
                pool.busy = Some(Known::found((used / capacity.value.max(1.0)).min(1.0), file.clone()));
            }
            pool.used = Some(Known::found(used, file));
        }
        LocalKind::Swap { .. } => {}
    }
}

fn cpu_share(before: &Counters, now: &Counters, cpu: usize) -> Option<f64> {
    let ((used_before, all_before), (used, all)) = (*before.cpus.get(&cpu)?, *now.cpus.get(&cpu)?);
    let elapsed = all.checked_sub(all_before).filter(|&ticks| ticks > 0)?;
    Some((used.saturating_sub(used_before) as f64 / elapsed as f64).min(1.0))
}

fn mean_share(before: &Counters, now: &Counters, cpus: &CpuSet) -> Option<Known> {
    let shares: Vec<f64> = cpus.iter().filter_map(|cpu| cpu_share(before, now, *cpu)).collect();
    (!shares.is_empty()).then(|| Known::found(shares.iter().sum::<f64>() / shares.len() as f64, "/proc/stat"))
}

#[cfg(test)]
mod tests;
