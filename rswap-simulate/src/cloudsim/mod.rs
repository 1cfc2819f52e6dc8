//! The model of CloudSim's power package (3.0.3), on which placement policies of the literature are compared: 800 hosts of two
//! kinds, virtual machines whose CPU demand was recorded every five minutes, and migrations that take a time in proportion to
//! their memory and a tenth of the machine's speed.
//!
//! ```text
//!   every 300 s:  demand -> allocation per host -> energy, violations -> policy -> migrations begin
//!   in between:   a migration ends -> demand, allocation, energy, violations
//! ```
//!
//! It is reproduced with its peculiarities, since published figures contain them: a machine that demands nothing at a tick is
//! taken for finished and leaves; a host's power before a placement is that of the tick's beginning; the target of a migration
//! gives a tenth of the demand, and so counts as violating it.

mod center;
mod classic;
mod detect;
mod ours;
mod record;

pub use center::{Center, HOSTS, Host, Vm};
pub use classic::Classic;
pub use detect::Detector;
pub use ours::Ours;
pub use record::Outcome;

/// Samples of a day.
pub const SAMPLES: usize = 288;
/// Seconds between two samples, and between two ticks.
pub const INTERVAL_S: f64 = 300.0;
/// When the simulation ends, in seconds.
const END_S: f64 = 86_400.0;
/// When the machines' work arrives: ticks are so much later than the samples.
const OFFSET_S: f64 = 0.1;
/// MiB per second of a migration: half of 1 Gbit/s.
const MIGRATION_MIB_PER_S: f64 = 62.5;

/// Moves of machine to host, in the order in which they begin.
pub type Moves = Vec<(usize, usize)>;

/// Decides where machines run.
pub trait Policy {
    /// The host for machine `vm` at boot, when its demand is unknown and it asks for all that it may use.
    fn boot(&mut self, center: &Center, vm: usize) -> Option<usize>;

    /// The moves that begin at this tick. No migration is under way.
    fn tick(&mut self, center: &Center) -> Moves;
}

/// Plays a day: `demand` has per machine its [`SAMPLES`] shares (0 to 1) of its own speed.
pub fn run(demand: &[Vec<f64>], policy: &mut dyn Policy) -> Outcome {
    let mut center = Center::new(demand);
    for vm in 0..demand.len() {
        if let Some(host) = policy.boot(&center, vm) {
            center.boot(vm, host);
        }
    }
    let mut now = OFFSET_S + INTERVAL_S;
    while now < END_S {
        center.advance(now);
        center.retire();
        let moves = policy.tick(&center);
        for &(vm, host) in &moves {
            center.begin(vm, host);
        }
        // In the order in which they end; those of one moment in the order in which they began.
        let mut ends: Vec<(f64, usize, usize)> = moves
            .iter()
            .map(|&(vm, host)| (now + center.vms[vm].ram_mib / MIGRATION_MIB_PER_S, vm, host))
            .collect();
        ends.sort_by(|a, b| a.0.total_cmp(&b.0));
        for batch in ends.chunk_by(|a, b| a.0 == b.0) {
            let at = batch[0].0;
            center.advance(at);
            batch.iter().for_each(|&(_, vm, host)| center.end(vm, host));
            center.advance(at);
        }
        now += INTERVAL_S;
    }
    center.outcome()
}

#[cfg(test)]
mod tests;
