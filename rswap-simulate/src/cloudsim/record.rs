//! Energy and violations of a day.

use serde::{Deserialize, Serialize};

/// What a day came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Energy, in kWh.
    pub kwh: f64,
    /// Migrations that were begun.
    pub migrations: u64,
    /// Share of the hosts' active time in which they gave less than was demanded.
    pub slatah: f64,
    /// Share of all demand that was not met because its machine was migrating.
    pub pdm: f64,
    /// kwh x slatah x pdm.
    pub esv: f64,
}

impl Outcome {
    pub(super) fn of<'a>(
        joules: f64,
        migrations: u64,
        hosts: impl Iterator<Item = &'a HostRecord>,
        vms: impl Iterator<Item = &'a VmRecord>,
    ) -> Self {
        let (active, violated) =
            hosts.fold((0.0, 0.0), |sum, host| (sum.0 + host.active_s, sum.1 + host.violated_s));
        let (requested, missed) =
            vms.fold((0.0, 0.0), |sum, vm| (sum.0 + vm.requested, sum.1 + vm.missed_migrating));
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
        let (kwh, slatah, pdm) = (joules / 3.6e6, share(violated, active), share(missed, requested));
        Self { kwh, migrations, slatah, pdm, esv: kwh * slatah * pdm }
    }
}

/// The last look at a host, and sums up to it.
#[derive(Clone, Debug, Default)]
pub(super) struct HostRecord {
    last: Option<(f64, f64, f64)>,
    active_s: f64,
    violated_s: f64,
}

impl HostRecord {
    /// A second look at one moment replaces the first.
    pub(super) fn add(&mut self, now: f64, allocated: f64, requested: f64) {
        if let Some((at, allocated, requested)) = self.last.filter(|(at, ..)| *at != now)
            && allocated > 0.0
        {
            self.active_s += now - at;
            if allocated < requested {
                self.violated_s += now - at;
            }
        }
        self.last = Some((now, allocated, requested));
    }
}

/// The last look at a machine, and sums up to it, in MIPS x seconds.
#[derive(Clone, Debug, Default)]
pub(super) struct VmRecord {
    last: Option<(f64, f64, f64, bool)>,
    requested: f64,
    missed_migrating: f64,
}

impl VmRecord {
    pub(super) fn add(&mut self, now: f64, allocated: f64, requested: f64, migrating: bool) {
        if let Some((at, allocated, requested, migrating)) = self.last.filter(|(at, ..)| *at != now) {
            self.requested += requested * (now - at);
            if migrating && allocated < requested {
                self.missed_migrating += (requested - allocated) * (now - at);
            }
        }
        self.last = Some((now, allocated, requested, migrating));
    }
}
