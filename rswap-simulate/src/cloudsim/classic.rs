//! The literature's policy: empty overloaded hosts by the machine that migrates fastest, place by the least increase of power,
//! then empty the least used hosts as long as all their machines fit elsewhere.

use super::{
    Center, Detector, Moves, Policy,
    center::{HISTORY, Host},
    detect::Load,
};

/// Power-aware best fit with minimum migration time, with one of the rules for overload.
#[derive(Clone, Debug)]
pub struct Classic {
    detector: Detector,
}

impl Classic {
    /// With this rule.
    pub fn new(detector: Detector) -> Self {
        Self { detector }
    }
}

impl Policy for Classic {
    fn boot(&mut self, center: &Center, vm: usize) -> Option<usize> {
        let mips = center.vms[vm].mips;
        let mut best: Option<(f64, usize)> = None;
        for (number, host) in center.hosts.iter().enumerate() {
            let booted = center.booted(number);
            // The others have no work yet: only the new machine counts against the rule.
            let load = Load { utilization: mips / host.total_mips, ..Load::default() };
            if !center.can_boot(vm, number) || (booted > 0.0 && self.detector.is_overloaded(&load)) {
                continue;
            }
            let increase = host.watts((booted + mips) / host.total_mips) - host.watts(0.0);
            if best.is_none_or(|(least, _)| increase < least) {
                best = Some((increase, number));
            }
        }
        best.map(|(_, number)| number)
    }

    fn tick(&mut self, center: &Center) -> Moves {
        let mut round = Round::new(self.detector, center);
        let overloaded: Vec<usize> =
            (0..center.hosts.len()).filter(|&host| round.is_overloaded(host, None)).collect();
        let off: Vec<bool> = center.hosts.iter().map(|host| host.utilization() == 0.0).collect();
        let mut evicted = Vec::new();
        for &host in &overloaded {
            while let Some(vm) = round.fastest(host) {
                round.take(host, vm);
                evicted.push(vm);
                if !round.is_overloaded(host, None) {
                    break;
                }
            }
        }
        let mut excluded = vec![false; center.hosts.len()];
        overloaded.iter().for_each(|&host| excluded[host] = true);
        let mut moves = Moves::new();
        round.by_demand(&mut evicted);
        for vm in evicted {
            if let Some(host) = round.find(vm, &excluded) {
                round.put(host, vm);
                moves.push((vm, host));
            }
        }

        // No longer to be emptied: overloaded, off, tried, or a target of this part.
        let mut settled: Vec<bool> = excluded.iter().zip(&off).map(|(a, b)| *a || *b).collect();
        excluded.clone_from(&settled);
        while let Some(host) = round.least_used(&settled) {
            settled[host] = true;
            excluded[host] = true;
            if let Some(emptied) = round.empty(host, &excluded) {
                emptied.iter().for_each(|&(_, target)| settled[target] = true);
                moves.extend(emptied);
            }
        }
        moves
    }
}

/// Where machines would be, while a tick is decided.
struct Round<'a> {
    detector: Detector,
    center: &'a Center,
    places: Vec<Place>,
}

/// One host in a round.
#[derive(Default)]
struct Place {
    vms: Vec<usize>,
    load: Load,
    allocated: f64,
    free: f64,
    /// Watts at the tick's beginning: what the original compares a placement with.
    watts: f64,
}

impl<'a> Round<'a> {
    fn new(detector: Detector, center: &'a Center) -> Self {
        let places = center.hosts.iter().map(|host| Place {
            vms: host.slots.iter().map(|slot| slot.vm).collect(),
            watts: host.watts(host.utilization()),
            ..Place::default()
        });
        let mut round = Self { detector, center, places: places.collect() };
        (0..round.places.len()).for_each(|host| round.reckon(host));
        round
    }

    fn reckon(&mut self, number: usize) {
        let (center, place) = (self.center, &mut self.places[number]);
        let host = &center.hosts[number];
        let wanted: Vec<_> = place.vms.iter().map(|&vm| (center.vms[vm].requested, false, false)).collect();
        let (allocated, free) = host.allocate(&wanted);
        place.allocated = allocated.iter().sum();
        place.free = free;
        place.load = Load::default();
        for &vm in &place.vms {
            add(&mut place.load, center, host, vm);
        }
    }

    fn is_overloaded(&self, host: usize, with: Option<usize>) -> bool {
        let mut load = self.places[host].load;
        if let Some(vm) = with {
            add(&mut load, self.center, &self.center.hosts[host], vm);
        }
        self.detector.is_overloaded(&load)
    }

    fn fastest(&self, host: usize) -> Option<usize> {
        let ram = |vm: &&usize| self.center.vms[**vm].ram_mib;
        self.places[host].vms.iter().min_by(|a, b| ram(a).total_cmp(&ram(b))).copied()
    }

    fn by_demand(&self, vms: &mut [usize]) {
        let requested = |vm: usize| self.center.vms[vm].requested;
        vms.sort_by(|&a, &b| requested(b).total_cmp(&requested(a)));
    }

    fn take(&mut self, host: usize, vm: usize) {
        self.places[host].vms.retain(|&other| other != vm);
        self.reckon(host);
    }

    fn put(&mut self, host: usize, vm: usize) {
        self.places[host].vms.push(vm);
        self.reckon(host);
    }

    /// The host whose power grows least, and that is not overloaded with it.
    fn find(&self, vm: usize, excluded: &[bool]) -> Option<usize> {
        let requested = self.center.vms[vm].requested;
        let mut best: Option<(f64, usize)> = None;
        for (number, host) in self.center.hosts.iter().enumerate() {
            let place = &self.places[number];
            if excluded[number] || host.pe_mips < requested || place.free < requested {
                continue;
            }
            let increase = host.watts((place.allocated + requested) / host.total_mips) - place.watts;
            if best.is_some_and(|(least, _)| increase >= least) {
                continue;
            }
            if place.allocated == 0.0 || !self.is_overloaded(number, Some(vm)) {
                best = Some((increase, number));
            }
        }
        best.map(|(_, number)| number)
    }

    fn least_used(&self, settled: &[bool]) -> Option<usize> {
        let mut least: Option<(f64, usize)> = None;
        for (number, host) in self.center.hosts.iter().enumerate() {
            let utilization = host.utilization();
            let open = !settled[number] && !self.places[number].vms.is_empty() && utilization > 0.0;
            if open && utilization < least.map_or(1.0, |(utilization, _)| utilization) {
                least = Some((utilization, number));
            }
        }
        least.map(|(_, number)| number)
    }

    /// Moves for all machines of the host, or none.
    fn empty(&mut self, host: usize, excluded: &[bool]) -> Option<Moves> {
        let mut vms = self.places[host].vms.clone();
        self.by_demand(&mut vms);
        let mut moves = Moves::new();
        for vm in vms {
            let Some(target) = self.find(vm, excluded) else {
                for (vm, target) in moves {
                    self.take(target, vm);
                }
                return None;
            };
            self.put(target, vm);
            moves.push((vm, target));
        }
        Some(moves)
    }
}

fn add(load: &mut Load, center: &Center, host: &Host, vm: usize) {
    let vm = &center.vms[vm];
    load.utilization += vm.requested / host.total_mips;
    load.largest_mib = load.largest_mib.max(vm.ram_mib);
    for (sum, share) in load.history[..HISTORY].iter_mut().zip(&vm.history) {
        *sum += share * vm.mips / host.total_mips;
    }
}
