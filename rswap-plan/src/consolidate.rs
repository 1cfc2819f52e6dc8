//! Fewer sites in use: many tenants on hosts whose price is mostly that of being on.
//!
//! A [`Planner`](crate::Planner) reserves for each instance the limit of its need: right where few share a pool, and far too much where
//! many do, since they don't all peak at once. Here, what a site needs is reckoned as of a sum: means add up, and so do
//! variances, and the limit is the mean and so many standard deviations of the sum ([`Moments`]).
//!
//! 1. A site whose limit exceeds what it has is relieved, by the move that frees enough with the least to send.
//! 2. Then sites are emptied, the least efficient and least used first, where all their tenants fit elsewhere.
//!
//! Taking asks for more room than staying ([`Limits`]): what was placed stays, also when the forecast wavers. Who arrived a while
//! ago stays as well, unless its site must be relieved; a site that gave or took in a round is not emptied in it.

use std::collections::BTreeSet;

use rswap_forecast::Moments;

/// What tenants sit on. All amounts are in one unit, such as reference cores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Site {
    /// What it can give.
    pub capacity: f64,
    /// What it can give to one tenant at most.
    pub most_each: f64,
    /// What it costs per unit of capacity when it is full: the dearest are emptied first, the cheapest filled first.
    pub cost: f64,
}

/// Who sits somewhere.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tenant {
    /// Number of its site.
    pub site: usize,
    /// What it is expected to need.
    pub need: Moments,
    /// What it uses now.
    pub now: f64,
    /// The most that it may ever use.
    pub most: f64,
    /// What moving it costs, in any unit: bytes, seconds.
    pub price: f64,
    /// It moved a while ago, and is not moved to empty a site.
    pub resting: bool,
}

/// How full sites may be, and how much may happen in a round.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Standard deviations above the mean that a site must be able to give to those on it: 1.28 is the 90th percentile.
    pub stay: f64,
    /// The same, for those that it would have with another one: 1.96 is the 97.5th percentile.
    pub take: f64,
    /// Share of a site that may be in use now, with another one.
    pub filled: f64,
    /// Sites that are emptied in a round.
    pub emptied: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { stay: 1.28, take: 1.96, filled: 0.95, emptied: 2 }
    }
}

/// Why a tenant is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Its site will not have enough.
    Relieve,
    /// Its site is emptied.
    Empty,
}

/// One move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Relocation {
    /// Number of the tenant.
    pub tenant: usize,
    /// Number of the site that it goes to.
    pub to: usize,
    /// Why.
    pub cause: Cause,
}

/// The moves of a round, in the order in which they may begin.
pub fn consolidate(sites: &[Site], tenants: &[Tenant], limits: &Limits) -> Vec<Relocation> {
    let mut round = Round::new(sites, tenants, limits);
    let mut moves = round.relieve_all();
    moves.extend(round.empty_some(&moves));
    moves
}

/// What a site carries.
#[derive(Clone, Debug, Default)]
struct Load {
    need: Moments,
    now: f64,
    tenants: Vec<usize>,
}

struct Round<'a> {
    sites: &'a [Site],
    tenants: &'a [Tenant],
    limits: &'a Limits,
    loads: Vec<Load>,
}

impl<'a> Round<'a> {
    fn new(sites: &'a [Site], tenants: &'a [Tenant], limits: &'a Limits) -> Self {
        let mut round = Self { sites, tenants, limits, loads: vec![Load::default(); sites.len()] };
        for (number, tenant) in tenants.iter().enumerate() {
            round.put(tenant.site, number);
        }
        round
    }

    fn put(&mut self, site: usize, tenant: usize) {
        let (load, one) = (&mut self.loads[site], &self.tenants[tenant]);
        load.need = load.need + one.need;
        load.now += one.now;
        load.tenants.push(tenant);
    }

    fn take(&mut self, site: usize, tenant: usize) {
        let (load, one) = (&mut self.loads[site], &self.tenants[tenant]);
        load.need = load.need - one.need;
        load.now -= one.now;
        load.tenants.retain(|&other| other != tenant);
    }

    /// By how much a site has too little; negative if it has enough.
    fn lack(&self, site: usize, without: Option<usize>) -> f64 {
        let (mut need, mut now) = (self.loads[site].need, self.loads[site].now);
        if let Some(tenant) = without {
            (need, now) = (need - self.tenants[tenant].need, now - self.tenants[tenant].now);
        }
        need.limit(self.limits.stay).max(now) - self.sites[site].capacity
    }

    /// The site on which `tenant` leaves least unused; one that is not in use only if `open` says so, and if nothing else fits.
    fn find(&self, tenant: usize, open: bool) -> Option<usize> {
        let one = &self.tenants[tenant];
        let mut best: Option<((bool, f64, f64), usize)> = None;
        for (number, (site, load)) in self.sites.iter().zip(&self.loads).enumerate() {
            let unused = load.tenants.is_empty();
            if number == one.site || (unused && !open) || site.most_each < one.most {
                continue;
            }
            let left = site.capacity - (load.need + one.need).limit(self.limits.take);
            if left < 0.0 || load.now + one.now > site.capacity * self.limits.filled {
                continue;
            }
            let order = (unused, if unused { site.cost } else { 0.0 }, left);
            if best.is_none_or(|(least, _)| order < least) {
                best = Some((order, number));
            }
        }
        best.map(|(_, number)| number)
    }

    fn relieve_all(&mut self) -> Vec<Relocation> {
        let mut moves = Vec::new();
        for site in 0..self.sites.len() {
            // The last one would take its need along.
            while self.loads[site].tenants.len() > 1 && self.lack(site, None) > 0.0 {
                let Some((tenant, to)) = self.relief(site) else { break };
                self.take(site, tenant);
                self.put(to, tenant);
                moves.push(Relocation { tenant, to, cause: Cause::Relieve });
            }
        }
        moves
    }

    /// Who goes, and where: the cheapest move that is enough, or else the one that helps most.
    fn relief(&self, site: usize) -> Option<(usize, usize)> {
        let mut order: Vec<(bool, f64, f64, usize)> = self.loads[site]
            .tenants
            .iter()
            // Who arrived in this round does not go on.
            .filter(|&&tenant| self.tenants[tenant].site == site)
            .map(|&tenant| {
                let lack = self.lack(site, Some(tenant));
                let price = if lack <= 0.0 { self.tenants[tenant].price } else { 0.0 };
                (lack > 0.0, price, lack.abs(), tenant)
            })
            .collect();
        order.sort_by(|a, b| a.partial_cmp(b).unwrap_or(std::cmp::Ordering::Equal));
        order.into_iter().find_map(|(.., tenant)| Some((tenant, self.find(tenant, true)?)))
    }

    fn empty_some(&mut self, before: &[Relocation]) -> Vec<Relocation> {
        let mut touched: BTreeSet<usize> = before.iter().map(|relocation| relocation.to).collect();
        touched.extend(before.iter().map(|relocation| self.tenants[relocation.tenant].site));
        let mut order: Vec<usize> =
            (0..self.sites.len()).filter(|&site| !self.loads[site].tenants.is_empty()).collect();
        let used = |site: usize| self.loads[site].need.limit(self.limits.take);
        let dear = |site: usize| self.sites[site].cost;
        order.sort_by(|&a, &b| dear(b).total_cmp(&dear(a)).then(used(a).total_cmp(&used(b))));
        let (mut moves, mut emptied) = (Vec::new(), 0);
        for site in order {
            if emptied == self.limits.emptied {
                break;
            }
            let resting = self.loads[site].tenants.iter().any(|&tenant| self.tenants[tenant].resting);
            if touched.contains(&site) || resting {
                continue;
            }
            if let Some(going) = self.empty(site) {
                emptied += 1;
                touched.extend(going.iter().map(|relocation| relocation.to));
                moves.extend(going);
            }
        }
        moves
    }

    /// Moves for all of a site's tenants, the biggest first, or none.
    fn empty(&mut self, site: usize) -> Option<Vec<Relocation>> {
        let mut leaving = self.loads[site].tenants.clone();
        let mean = |tenant: usize| self.tenants[tenant].need.mean;
        leaving.sort_by(|&a, &b| mean(b).total_cmp(&mean(a)));
        let mut moves: Vec<Relocation> = Vec::new();
        for tenant in leaving {
            let Some(to) = self.find(tenant, false) else {
                for Relocation { tenant, to, .. } in moves {
                    self.take(to, tenant);
                    self.put(site, tenant);
                }
                return None;
            };
            self.take(site, tenant);
            self.put(to, tenant);
            moves.push(Relocation { tenant, to, cause: Cause::Empty });
        }
        Some(moves)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn site(capacity: f64, cost: f64) -> Site {
        Site { capacity, most_each: capacity, cost }
    }

    fn tenant(site: usize, mean: f64, deviation: f64) -> Tenant {
        let need = Moments { mean, variance: deviation * deviation };
        Tenant { site, need, now: mean, most: mean, price: 1.0, resting: false }
    }

    #[test]
    fn the_dearest_site_is_emptied_where_all_fit_elsewhere() {
        let sites = [site(10.0, 1.0), site(10.0, 2.0), site(10.0, 1.0)];
        let tenants = [tenant(0, 3.0, 0.5), tenant(1, 2.0, 0.5), tenant(1, 1.0, 0.2)];
        let moves = consolidate(&sites, &tenants, &Limits::default());
        let to_first = |tenant| Relocation { tenant, to: 0, cause: Cause::Empty };
        assert_eq!(moves, [to_first(1), to_first(2)]);
    }

    #[test]
    fn deviations_of_many_are_not_added_up() {
        // Four of 2 +- 0.5: their limits are 2.82 each, 11.3 together; that of the sum is 9.64.
        let sites = [site(10.0, 1.0), site(10.0, 1.0)];
        let mut tenants = vec![tenant(0, 2.0, 0.5); 3];
        tenants.push(tenant(1, 2.0, 0.5));
        let moves = consolidate(&sites, &tenants, &Limits::default());
        assert_eq!(moves.iter().map(|relocation| relocation.tenant).collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn too_full_a_site_is_relieved_by_the_cheapest_move_that_is_enough() {
        let sites = [site(10.0, 1.0), site(10.0, 1.0)];
        let mut tenants =
            vec![tenant(0, 5.0, 0.1), tenant(0, 4.0, 0.1), tenant(0, 3.0, 0.1), tenant(0, 0.5, 0.0)];
        tenants[1].price = 0.5;
        let moves = consolidate(&sites, &tenants, &Limits { emptied: 0, ..Limits::default() });
        assert_eq!(moves, [Relocation { tenant: 1, to: 1, cause: Cause::Relieve }]);
    }

    #[test]
    fn who_rests_is_not_moved_to_save() {
        let sites = [site(10.0, 1.0), site(10.0, 1.0)];
        let mut tenants = [tenant(0, 2.0, 0.1), tenant(1, 2.0, 0.1)];
        tenants.iter_mut().for_each(|tenant| tenant.resting = true);
        assert_eq!(consolidate(&sites, &tenants, &Limits::default()), []);
    }

    proptest! {
        /// Whatever comes in: nobody moves twice in a round, nobody to where it is, and no target is filled over its limit.
        #[test]
        fn a_round_is_sound(
            sites in prop::collection::vec((1.0..20.0f64, 0.5..2.0f64), 1..8),
            tenants in prop::collection::vec((0usize..8, 0.0..5.0f64, 0.0..2.0f64, any::<bool>()), 0..30),
        ) {
            let sites: Vec<Site> = sites.into_iter().map(|(capacity, cost)| site(capacity, cost)).collect();
            let tenants: Vec<Tenant> = tenants.into_iter().map(|(at, mean, deviation, resting)| {
                Tenant { resting, ..tenant(at % sites.len(), mean, deviation) }
            }).collect();
            let limits = Limits::default();
            let moves = consolidate(&sites, &tenants, &limits);
            let mut on: Vec<usize> = tenants.iter().map(|tenant| tenant.site).collect();
            let mut moved = BTreeSet::new();
            for relocation in &moves {
                prop_assert!(moved.insert(relocation.tenant));
                prop_assert_ne!(on[relocation.tenant], relocation.to);
                prop_assert!(relocation.cause == Cause::Relieve || !tenants[relocation.tenant].resting);
                on[relocation.tenant] = relocation.to;
            }
            for site in moves.iter().map(|relocation| relocation.to) {
                let here = tenants.iter().zip(&on).filter(|(_, on)| **on == site);
                let need = here.fold(Moments::default(), |sum, (tenant, _)| sum + tenant.need);
                prop_assert!(need.limit(limits.take) <= sites[site].capacity + 1e-9);
            }
        }
    }
}
