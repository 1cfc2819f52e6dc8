//! Hosts and machines, what each gets, and what that costs.

use super::{
    INTERVAL_S, OFFSET_S, Outcome,
    record::{HostRecord, VmRecord},
};

/// Hosts of the center.
pub const HOSTS: usize = 800;
/// Samples of its demand that a machine remembers.
pub(super) const HISTORY: usize = 30;
/// Share of its speed that a migration leaves to a machine at the source.
const LEFT: f64 = 0.9;
/// Share of its demand that the target has to give meanwhile.
const RESERVED: f64 = 0.1;

const PES: f64 = 2.0;
const HOST_RAM_MIB: f64 = 4096.0;
/// Mbit/s of a host and of a machine: machines ask for theirs at boot only.
const HOST_MBIT: f64 = 1000.0;
const VM_MBIT: f64 = 100.0;

/// MIPS of a processor, and watts at 0, 10, ... 100 %.
const KINDS: [(f64, [f64; 11]); 2] = [
    (1860.0, [86.0, 89.4, 92.6, 96.0, 99.5, 102.0, 106.0, 108.0, 112.0, 114.0, 117.0]),
    (2660.0, [93.7, 97.0, 101.0, 105.0, 110.0, 116.0, 121.0, 125.0, 129.0, 133.0, 135.0]),
];
/// MIPS and MiB of the four kinds of machines.
const VMS: [(f64, f64); 4] = [(2500.0, 870.0), (2000.0, 1740.0), (1000.0, 1740.0), (500.0, 613.0)];

/// A virtual machine.
#[derive(Clone, Debug)]
pub struct Vm {
    /// Speed that it may use, in MIPS.
    pub mips: f64,
    /// Memory, in MiB.
    pub ram_mib: f64,
    /// What it demands now, in MIPS.
    pub requested: f64,
    /// The host that it runs on; `None` once it is gone.
    pub host: Option<usize>,
    /// Shares of its speed that it demanded at the last ticks, newest first.
    pub history: Vec<f64>,
    pub(super) migrating: bool,
    demand: Vec<f64>,
    sampled_at: f64,
    record: VmRecord,
}

/// A machine on a host.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// Number of the machine.
    pub vm: usize,
    /// Whether it is on its way here.
    pub(super) arriving: bool,
    allocated: f64,
}

/// A host.
#[derive(Clone, Debug)]
pub struct Host {
    /// Speed of one of its processors, in MIPS: one machine can't use more.
    pub pe_mips: f64,
    /// Speed of both.
    pub total_mips: f64,
    /// Its machines, in the order in which they came.
    pub slots: Vec<Slot>,
    watts: [f64; 11],
    /// MIPS in use, when it was last looked at.
    used: f64,
    free_ram_mib: f64,
    free_mbit: f64,
    /// MIPS promised at boot.
    booted: f64,
    record: HostRecord,
}

impl Host {
    /// Share of its speed that was in use at the tick's beginning.
    pub fn utilization(&self) -> f64 {
        clamp(self.used / self.total_mips)
    }

    /// Watts at a share of its speed.
    pub fn watts(&self, utilization: f64) -> f64 {
        let (low, high) = ((utilization * 10.0).floor(), (utilization * 10.0).ceil());
        let at = |tenth: f64| self.watts[(tenth as usize).min(10)];
        at(low) + (at(high) - at(low)) * (utilization - low / 10.0) * 10.0
    }

    /// What each of these machines gets, given (demanded, leaving, arriving), and what is left.
    pub(super) fn allocate(&self, wanted: &[(f64, bool, bool)]) -> (Vec<f64>, f64) {
        let mut free = self.total_mips;
        let mut short = false;
        let mut sum = 0.0;
        for &(requested, _, arriving) in wanted {
            let capped = requested.min(self.pe_mips);
            let taken = if arriving { capped * RESERVED } else { capped };
            sum += taken;
            if free >= taken {
                free -= taken;
            } else {
                (short, free) = (true, 0.0);
            }
        }
        let scale = if short { self.total_mips / sum } else { 1.0 };
        let allocated = wanted.iter().map(|&(requested, leaving, arriving)| {
            let mut mips = requested.min(self.pe_mips);
            match (leaving, arriving) {
                (true, _) => mips = mips * scale * LEFT,
                (_, true) => mips = mips * RESERVED * scale,
                _ => mips *= scale,
            }
            if short { mips.floor() } else { mips }
        });
        (allocated.collect(), free)
    }

    fn can_boot(&self, vm: &Vm) -> bool {
        self.pe_mips >= vm.mips
            && self.total_mips - self.booted >= vm.mips
            && self.free_ram_mib >= vm.ram_mib
            && self.free_mbit >= VM_MBIT
    }
}

/// All hosts and machines, at a moment.
#[derive(Clone, Debug)]
pub struct Center {
    /// The hosts.
    pub hosts: Vec<Host>,
    /// The machines.
    pub vms: Vec<Vm>,
    now: f64,
    joules: f64,
    migrations: u64,
}

impl Center {
    pub(super) fn new(demand: &[Vec<f64>]) -> Self {
        let per_kind = demand.len().div_ceil(VMS.len()).max(1);
        let vms = demand.iter().enumerate().map(|(number, demand)| {
            let (mips, ram_mib) = VMS[number / per_kind];
            let mut demand = demand.clone();
            // The day's last sample goes on until its end.
            demand.extend(demand.last().copied());
            Vm {
                mips,
                ram_mib,
                requested: 0.0,
                host: None,
                history: Vec::with_capacity(HISTORY + 1),
                migrating: false,
                demand,
                sampled_at: 0.0,
                record: VmRecord::default(),
            }
        });
        let hosts = (0..HOSTS).map(|number| {
            let (pe_mips, watts) = KINDS[number % KINDS.len()];
            Host {
                pe_mips,
                total_mips: pe_mips * PES,
                slots: Vec::new(),
                watts,
                used: 0.0,
                free_ram_mib: HOST_RAM_MIB,
                free_mbit: HOST_MBIT,
                booted: 0.0,
                record: HostRecord::default(),
            }
        });
        Self { hosts: hosts.collect(), vms: vms.collect(), now: 0.0, joules: 0.0, migrations: 0 }
    }

    /// Seconds since the day's beginning.
    pub fn now(&self) -> f64 {
        self.now
    }

    /// Whether machine `vm` can be started on `host`, with all that it may use.
    pub fn can_boot(&self, vm: usize, host: usize) -> bool {
        self.hosts[host].can_boot(&self.vms[vm])
    }

    /// MIPS of `host` that are promised to machines that were started there.
    pub fn booted(&self, host: usize) -> f64 {
        self.hosts[host].booted
    }

    pub(super) fn boot(&mut self, vm: usize, host: usize) {
        self.vms[vm].host = Some(host);
        let (mips, ram_mib) = (self.vms[vm].mips, self.vms[vm].ram_mib);
        let host = &mut self.hosts[host];
        host.slots.push(Slot { vm, arriving: false, allocated: mips });
        host.booted += mips;
        host.free_ram_mib -= ram_mib;
        host.free_mbit -= VM_MBIT;
    }

    /// Goes on to `at`: demand, allocation, energy since the last time.
    pub(super) fn advance(&mut self, at: f64) {
        let elapsed = at - self.now;
        self.now = at;
        for number in 0..self.hosts.len() {
            let before = self.hosts[number].utilization();
            self.look(number);
            let host = &self.hosts[number];
            if before > 0.0 && elapsed > 0.0 {
                self.joules += (host.watts(before) + host.watts(host.utilization())) / 2.0 * elapsed;
            }
        }
    }

    /// Demand and allocation of one host, now.
    fn look(&mut self, number: usize) {
        let (now, host) = (self.now, &mut self.hosts[number]);
        for slot in &host.slots {
            self.vms[slot.vm].demand_at(now);
        }
        let wanted: Vec<_> = host
            .slots
            .iter()
            .map(|slot| {
                let vm = &self.vms[slot.vm];
                (vm.requested, vm.migrating && !slot.arriving, slot.arriving)
            })
            .collect();
        let (allocated, _) = host.allocate(&wanted);
        (host.used, _) = (0.0, ());
        let mut requested = 0.0;
        for (slot, mut allocated) in host.slots.iter_mut().zip(allocated) {
            slot.allocated = allocated;
            let vm = &mut self.vms[slot.vm];
            if !slot.arriving {
                vm.record.add(now, allocated, vm.requested, vm.migrating);
                if vm.migrating {
                    allocated /= LEFT;
                }
            }
            host.used += allocated;
            requested += vm.requested;
        }
        host.record.add(now, host.used, requested);
    }

    /// What demands nothing is taken for finished.
    pub(super) fn retire(&mut self) {
        for vm in 0..self.vms.len() {
            let done = self.vms[vm].requested == 0.0 && !self.vms[vm].migrating;
            if let Some(host) = self.vms[vm].host.filter(|_| done) {
                self.hosts[host].slots.retain(|slot| slot.vm != vm);
                self.vms[vm].host = None;
            }
        }
    }

    pub(super) fn begin(&mut self, vm: usize, host: usize) {
        self.migrations += 1;
        self.vms[vm].migrating = true;
        if !self.hosts[host].slots.iter().any(|slot| slot.vm == vm && slot.arriving) {
            self.hosts[host].slots.push(Slot { vm, arriving: true, allocated: 0.0 });
            self.look(host);
            if let Some(source) = self.vms[vm].host {
                self.look(source);
            }
        }
    }

    pub(super) fn end(&mut self, vm: usize, host: usize) {
        if let Some(source) = self.vms[vm].host {
            self.hosts[source].slots.retain(|slot| slot.vm != vm || slot.arriving);
        }
        self.hosts[host].slots.retain(|slot| slot.vm != vm);
        self.hosts[host].slots.push(Slot { vm, arriving: false, allocated: 0.0 });
        self.vms[vm].host = Some(host);
        self.vms[vm].migrating = false;
    }

    pub(super) fn outcome(&self) -> Outcome {
        Outcome::of(
            self.joules,
            self.migrations,
            self.hosts.iter().map(|host| &host.record),
            self.vms.iter().map(|vm| &vm.record),
        )
    }
}

impl Vm {
    fn demand_at(&mut self, now: f64) {
        if now == self.sampled_at {
            return;
        }
        self.sampled_at = now;
        let place = now / INTERVAL_S;
        let (before, after) = (self.demand[place.floor() as usize], self.demand[place.ceil() as usize]);
        let share = before + (after - before) * (place - place.floor());
        self.requested = share * self.mips;
        // The original asks whether the moment is a tick by this very remainder, and misses those that rounding hides.
        if (now - OFFSET_S) % INTERVAL_S == 0.0 {
            self.history.insert(0, share);
            self.history.truncate(HISTORY);
        }
    }
}

fn clamp(utilization: f64) -> f64 {
    if utilization > 1.0 { 1.0 } else { utilization }
}
