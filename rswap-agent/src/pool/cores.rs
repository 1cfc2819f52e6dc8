//! What the CPUs of core pools do: for whom, and what instances wait for that. Pure: counters come in.
//!
//! ```text
//!   /proc/stat, all of it ---less what instances ran there---> what others use
//!   waiting of instances while nobody ran that is theirs -----> the part of that which is taken from them: the least of some windows
//!   waiting of each instance while others than it ran --------> how much longer work takes, by load (rswap_pools::core_experience)
//! ```

use std::collections::{BTreeMap, VecDeque};

use rswap_pools::{
    CpuTime, Measure, Source,
    core_experience::{CoreExperience, Turns},
};

use super::{CpuSet, Inventory, Known, OTHERS_WINDOWS, Pool, PoolKind};
use crate::{
    instance::InstanceName,
    profile::{CpuProfile, Profile},
    units::UnixMillis,
};

const STAT: &str = "/proc/stat";
/// Instances that ran for less than this in a window, in seconds, need not be counted by the kernel for it to be known what was waited for.
const LEAST_SEEN_S: f64 = 0.001;
/// Together they say which part of the CPUs they waited for only if they wanted at least this share of the CPUs' time: of a few turns one wait is most, and
/// the next window none; and who is content with a hundredth of the cores does not tell what one would get who needs half of them.
const LEAST_SEEN_SHARE: f64 = 0.05;
/// ... or that share of so many CPUs, where the pool has more: a fifth of a core is enough to tell of any number.
const CPUS_TO_TELL: f64 = 4.0;
/// How long it is remembered which part instances waited for, in milliseconds.
const REMEMBERED_MS: u64 = 600_000;
/// ... as long as others don't use more than then by this share of the CPUs.
const AS_BEFORE: f64 = 0.1;

/// One window, as the cores are to see it.
pub struct CoresWindow<'w> {
    /// Its end.
    pub now: UnixMillis,
    /// What each CPU did since the kernel's start.
    pub times: BTreeMap<usize, CpuTime>,
    /// What instances did.
    pub profiles: &'w [Profile],
    /// The pool that an instance sits on; `None` if it may use every core.
    pub sits_on: &'w dyn Fn(&InstanceName) -> Option<&'w str>,
    /// Instances are being moved: what that takes is nobody's need.
    pub moving: bool,
}

/// What of a pool's CPUs was used in a window, in cores.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Use {
    /// By anybody.
    all: f64,
    /// By niced programs.
    nice: f64,
    /// Nobody's here: the hypervisor gave it to others.
    stolen: f64,
    /// By instances.
    instances: f64,
}

impl Use {
    /// By others than instances.
    fn others(self) -> f64 {
        (self.all - self.instances).max(self.stolen)
    }
}

/// Which part of the time in which instances would have run they waited for others than instances, when these used so much.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Waited {
    at: UnixMillis,
    others: f64,
    share: f64,
}

/// What others used in a window, and what of it they took, in cores.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Others {
    use_cores: f64,
    take_cores: f64,
}

/// One pool.
#[derive(Debug, Default)]
struct Of {
    /// Of other CPUs under the same name nothing is known.
    cpus: CpuSet,
    experience: CoreExperience,
    /// In the last windows; newest last.
    others: VecDeque<Others>,
    waited: Option<Waited>,
    /// Share of the CPUs that was taken in the last window.
    load: f64,
    /// When turns of instances were last counted.
    experienced_at: UnixMillis,
}

/// Follows the CPUs of all core pools, and of this host.
#[derive(Debug, Default)]
pub struct Cores {
    before: BTreeMap<usize, CpuTime>,
    of: BTreeMap<String, Of>,
}

/// Which CPUs a pool has.
fn cpus_of(pool: &Pool, all: &CpuSet) -> Option<CpuSet> {
    match &pool.kind {
        PoolKind::Cpu { cpus, .. } => Some(cpus.intersection(all).copied().collect()),
        PoolKind::ThisHost => Some(all.clone()),
        _ => None,
    }
}

/// What a pool may give is less than its CPUs where a limit is configured: the rest is there for others.
fn counted(take_cores: f64, cpus: usize, pool: &Pool) -> f64 {
    let spare = (cpus as f64 - pool.capacity.cores).max(0.0);
    (take_cores - spare).max(0.0)
}

/// Which part (0 to 1) of what an instance ran it ran on these CPUs: as it was counted, else as if it were everywhere alike.
fn part_on(cpus: &CpuSet, of: &CpuProfile, may_use: &CpuSet) -> f64 {
    let all: u64 = of.by_cpu.iter().map(|on| on.ran_ns).sum();
    if all > 0 {
        let here: u64 = of.by_cpu.iter().filter(|on| cpus.contains(&on.cpu)).map(|on| on.ran_ns).sum();
        return here as f64 / all as f64;
    }
    may_use.intersection(cpus).count() as f64 / may_use.len().max(1) as f64
}

impl Cores {
    /// Takes in a window.
    pub fn window(&mut self, pools: &[Pool], window: CoresWindow<'_>) {
        let all: CpuSet = window.times.keys().copied().collect();
        let by_pool: BTreeMap<&str, CpuSet> =
            pools.iter().filter_map(|pool| Some((pool.name.as_str(), cpus_of(pool, &all)?))).collect();
        self.of.retain(|name, _| by_pool.contains_key(name.as_str()));
        let may_use = |name: &InstanceName| -> &CpuSet {
            (window.sits_on)(name).and_then(|pool| by_pool.get(pool)).unwrap_or(&all)
        };
        for pool in pools {
            let Some(cpus) = by_pool.get(pool.name.as_str()) else { continue };
            let of = self.of.entry(pool.name.clone()).or_default();
            if of.cpus != *cpus {
                *of = Of { cpus: cpus.clone(), ..Of::default() };
            }
            let Some(mut used) = used(cpus, &self.before, &window.times) else {
                of.others.clear();
                continue;
            };
            let parts: Vec<(&Profile, f64)> = window
                .profiles
                .iter()
                .map(|profile| (profile, part_on(cpus, &profile.cpu, may_use(&profile.instance))))
                .filter(|(_, part)| *part > 0.0)
                .collect();
            used.instances = parts.iter().map(|(profile, part)| sound(profile.cpu.cores) * part).sum();
            if window.moving {
                continue;
            }
            let take_cores = of.take(window.now, used, &parts);
            match take_cores {
                // Where waiting is not counted, nobody knows.
                None => of.others.clear(),
                Some(take_cores) => {
                    if of.others.len() == OTHERS_WINDOWS {
                        of.others.pop_front();
                    }
                    of.others.push_back(Others { use_cores: used.others(), take_cores });
                }
            }
            let taken = used.instances + counted(take_cores.unwrap_or(0.0), cpus.len(), pool);
            of.load = taken / cpus.len().max(1) as f64;
            of.learn(window.now, &parts, &window);
        }
        self.before = window.times;
    }

    /// Tells plans what others take of cores, and how much longer work takes there.
    pub fn lay_over(&self, now: UnixMillis, pools: &mut [Pool]) {
        for pool in pools {
            let Some(of) = self.of.get(&pool.name) else { continue };
            pool.used.cores += of.least().map_or(0.0, |least| counted(least.take_cores, of.cpus.len(), pool));
            if let PoolKind::Cpu { slowdown, .. } = &mut pool.kind {
                *slowdown = of.experience.curve(now);
            }
        }
    }

    /// `inventory`, with what is known of its cores from experience.
    pub fn show(&self, now: UnixMillis, mut inventory: Inventory) -> Inventory {
        for pool in &mut inventory.pools {
            let speed = pool.relative_speed();
            let Some(of) = self.of.get(&pool.name).filter(|_| pool.kind.cpus().is_some()) else { continue };
            let mut tell = |what: &str, value: f64, source: Source| {
                let known = Known { value, source };
                pool.performance.push(Measure { what: what.to_owned(), known });
            };
            let experienced =
                |count: f64| Source::Experienced { at: of.experienced_at, requests: count as u64 };
            if let Some(least) = of.least() {
                tell("others_use_cores", least.use_cores, Source::found(STAT));
                tell("others_take_cores", least.take_cores, Source::found(STAT));
            }
            if let Some(waits) = of.experience.waits(now, of.load) {
                tell("run_queue_p50_us", waits.p50_us, experienced(waits.requests));
                tell("run_queue_p99_us", waits.p99_us, experienced(waits.requests));
                let slowdown = of.experience.curve(now).at(of.load).filter(|point| point.is_experienced());
                if let Some(point) = slowdown {
                    tell("slowdown", point.times, experienced(waits.requests));
                    if let Some(speed) = speed {
                        tell("loaded_speed", speed / point.times, experienced(waits.requests));
                    }
                }
            }
        }
        inventory
    }
}

impl Of {
    /// The least that others took in the last windows; `None` until there have been enough.
    fn least(&self) -> Option<Others> {
        let least = |a: Others, b: Others| Others {
            use_cores: a.use_cores.min(b.use_cores),
            take_cores: a.take_cores.min(b.take_cores),
        };
        self.others.iter().copied().reduce(least).filter(|_| self.others.len() == OTHERS_WINDOWS)
    }

    /// What others took from instances, in cores; `None` if nobody can tell.
    fn take(&mut self, now: UnixMillis, used: Use, parts: &[(&Profile, f64)]) -> Option<f64> {
        let (mut ran_s, mut waited_s, mut window_s) = (0.0, 0.0, 0.0_f64);
        for (profile, part) in parts {
            let all_s = profile.window_ms as f64 / 1e3;
            window_s = window_s.max(all_s);
            let here_s = sound(profile.cpu.cores) * part * all_s;
            if !profile.cpu.counted && here_s >= LEAST_SEEN_S {
                return None;
            }
            ran_s += here_s;
            let here = profile.cpu.by_cpu.iter().filter(|on| self.cpus.contains(&on.cpu));
            waited_s += here.map(|on| on.foreign_wait_ns).sum::<u64>() as f64 / 1e9;
        }
        let (others, cpus) = (used.others(), self.cpus.len() as f64);
        let wanted_s = ran_s + waited_s;
        if wanted_s > 0.0 && wanted_s >= LEAST_SEEN_SHARE * cpus.min(CPUS_TO_TELL) * window_s {
            self.waited = Some(Waited { at: now, others, share: waited_s / wanted_s });
        }
        let as_before = |waited: &Waited| {
            now.since(waited.at) <= REMEMBERED_MS && others <= waited.others + AS_BEFORE * cpus
        };
        let by_programs = (others - used.stolen).max(0.0);
        let taken = match self.waited.filter(as_before) {
            // No instance gets its cores for this part of the time; but others can't take more than they use.
            Some(waited) => by_programs.min(waited.share * cpus),
            // Nobody was there to wait, or too little to tell: what is niced gives way.
            None => (by_programs - used.nice).max(0.0),
        };
        Some(used.stolen + taken)
    }

    fn learn(&mut self, now: UnixMillis, parts: &[(&Profile, f64)], window: &CoresWindow<'_>) {
        let counted = || parts.iter().filter(|(profile, _)| profile.cpu.counted);
        let turns = |(profile, part): &(&Profile, f64)| {
            let here = profile.cpu.by_cpu.iter().filter(|on| self.cpus.contains(&on.cpu));
            Turns {
                ran_s: sound(profile.cpu.cores) * part * profile.window_ms as f64 / 1e3,
                waited_s: here.map(|on| on.others_wait_ns).sum::<u64>() as f64 / 1e9,
            }
        };
        let turns: Vec<Turns> = counted().map(turns).collect();
        // Each time is counted for all CPUs together: it is this pool's where all of them are.
        let waits: Vec<&[(u16, u64)]> = counted()
            .filter(|(_, part)| *part >= 1.0)
            .map(|(profile, _)| profile.cpu.run_queue_ns.buckets.as_slice())
            .collect();
        if self.experience.window(now, self.load, &turns, &waits) {
            self.experienced_at = window.now;
        }
    }
}

fn sound(cores: f64) -> f64 {
    if cores.is_finite() { cores.max(0.0) } else { 0.0 }
}

/// What of these CPUs was used between two readings; `None` where one of them is not counted.
fn used(cpus: &CpuSet, before: &BTreeMap<usize, CpuTime>, now: &BTreeMap<usize, CpuTime>) -> Option<Use> {
    let mut sum = Use::default();
    for cpu in cpus {
        let (before, now) = (before.get(cpu)?, now.get(cpu)?);
        let all = now.all.checked_sub(before.all).filter(|ticks| *ticks > 0)? as f64;
        // The kernel takes back parts of some counters now and then.
        let share = |now: u64, before: u64| (now.saturating_sub(before) as f64 / all).min(1.0);
        sum.all += share(now.used, before.used);
        sum.nice += share(now.nice, before.nice);
        sum.stolen += share(now.stolen, before.stolen);
    }
    (!cpus.is_empty()).then_some(sum)
}

#[cfg(test)]
mod tests;
