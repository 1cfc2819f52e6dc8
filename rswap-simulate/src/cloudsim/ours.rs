//! rswap's policy on this model: the production forecast of each machine, and the plan that empties hosts.

use rswap_forecast::{Moments, Series};
use rswap_plan::consolidate::{Limits, Site, Tenant, consolidate};

use super::{Center, Moves, Policy, SAMPLES};

/// Ticks ahead that are forecast: 5, 30 and 60 minutes.
const LEADS: [u64; 3] = [1, 6, 12];
/// Ticks in which what all machines do counts next to a machine's own forecast.
const STRANGERS: u64 = 24;
/// Ticks of its own that weigh as much as what all do.
const ALL_WEIGH: f64 = 6.0;
/// Ticks after a move in which a machine is not moved to save power.
const REST: u64 = 12;
/// Ticks at the beginning in which any number of hosts is emptied: machines are started spread out, by what they might use.
const SETTLING: u64 = 2;

/// rswap's policy.
#[derive(Clone, Debug)]
pub struct Ours {
    limits: Limits,
    series: Vec<Series>,
    moved: Vec<Option<u64>>,
    tick: u64,
}

impl Ours {
    /// For so many machines.
    pub fn new(vms: usize) -> Self {
        Self {
            limits: Limits::default(),
            series: vec![Series::new(&LEADS, SAMPLES as u64); vms],
            moved: vec![None; vms],
            tick: 0,
        }
    }

    /// What a machine needs in the next hour.
    fn need(&self, vm: usize, mips: f64, all: Moments) -> Moments {
        let leads: Vec<Moments> = self.series[vm].quantiles().map(|lead| Moments::of(&lead)).collect();
        let own = Moments::mean_of(&leads);
        if self.tick >= STRANGERS {
            return own;
        }
        let seen = self.tick as f64;
        let like_all = Moments { mean: all.mean * mips, variance: all.variance * mips * mips };
        own.weighed(seen / (seen + ALL_WEIGH), like_all)
    }
}

impl Policy for Ours {
    /// The fullest host on which it can be started.
    fn boot(&mut self, center: &Center, vm: usize) -> Option<usize> {
        let order =
            |host: usize| (center.booted(host) > 0.0, center.hosts[host].pe_mips, center.booted(host));
        let mut best: Option<usize> = None;
        for host in (0..center.hosts.len()).filter(|&host| center.can_boot(vm, host)) {
            if best.is_none_or(|best| order(host) > order(best)) {
                best = Some(host);
            }
        }
        best
    }

    fn tick(&mut self, center: &Center) -> Moves {
        self.tick += 1;
        let here: Vec<(usize, usize)> =
            center.vms.iter().enumerate().filter_map(|(number, vm)| Some((number, vm.host?))).collect();
        for &(vm, _) in &here {
            self.series[vm].observe(center.vms[vm].requested);
        }
        let shares: Vec<f64> =
            here.iter().map(|&(vm, _)| center.vms[vm].requested / center.vms[vm].mips).collect();
        let sites: Vec<Site> = center
            .hosts
            .iter()
            .map(|host| Site {
                capacity: host.total_mips,
                most_each: host.pe_mips,
                cost: host.watts(1.0) / host.total_mips,
            })
            .collect();
        let all = moments(&shares);
        let tenants: Vec<Tenant> = here
            .iter()
            .map(|&(number, site)| {
                let vm = &center.vms[number];
                let rested = self.moved[number].is_none_or(|at| self.tick - at >= REST);
                Tenant {
                    site,
                    need: self.need(number, vm.mips, all),
                    now: vm.requested,
                    most: vm.mips,
                    price: vm.ram_mib,
                    resting: !rested && self.tick > SETTLING,
                }
            })
            .collect();
        let emptied = if self.tick <= SETTLING { usize::MAX } else { self.limits.emptied };
        let moves = consolidate(&sites, &tenants, &Limits { emptied, ..self.limits });
        let moves: Moves = moves.iter().map(|one| (here[one.tenant].0, one.to)).collect();
        for &(vm, _) in &moves {
            self.moved[vm] = Some(self.tick);
        }
        moves
    }
}

fn moments(values: &[f64]) -> Moments {
    let n = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / n;
    Moments { mean, variance: values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / n }
}
