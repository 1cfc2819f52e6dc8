//! Instances on swap pools: their pages are looked at by a thread of its own, so that no window waits for that.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
    time::{Duration, Instant},
};

use super::wiring::refused;
use crate::{
    config::MemoryConfig,
    forecast::Demand,
    instance::{Instance, InstanceName},
    status::ApiError,
    swap::memory::{self, Area, Held, InSwap, Lately, Looked, MemoryError, MemoryReport, Target, Wish},
    units::UnixMillis,
};

/// What comes back by one look, in bytes: a quarter of a second's work with zram.
const BACK_AT_ONCE_BYTES: u64 = 128 << 20;

/// An instance on a swap pool.
#[derive(Clone, Debug)]
pub(super) struct OnSwap {
    pub(super) instance: Instance,
    pub(super) pool: String,
    /// `None`: the pool is no swap of this host any more.
    pub(super) area: Option<Area>,
    pub(super) wish: Wish,
}

/// What an instance did in a window, in reference cores, and what is forecast of it.
pub(super) type Outlook<'a> = (f64, &'a Demand);

#[derive(Debug, Default)]
struct Shared {
    wanted: BTreeMap<InstanceName, OnSwap>,
    /// What a swap has learnt, until the thread takes it.
    learnt: BTreeMap<InstanceName, Held>,
    shown: BTreeMap<InstanceName, InSwap>,
    lately: BTreeMap<InstanceName, Lately>,
}

/// The thread's way to the wiring.
#[derive(Clone, Debug, Default)]
pub(super) struct Cold(Arc<Mutex<Shared>>);

impl Cold {
    /// Starts the thread, which ends with the process.
    pub(super) fn start(config: &MemoryConfig) -> Self {
        let cold = Self::default();
        let (shared, config) = (cold.clone(), config.clone());
        std::thread::spawn(move || {
            let mut held = BTreeMap::new();
            loop {
                let took = shared.round(&mut held, &config);
                std::thread::sleep(memory::pause(&config, took));
            }
        });
        cold
    }

    /// From now on these, and no others. Once per window.
    pub(super) fn want(
        &self,
        mut wanted: BTreeMap<InstanceName, OnSwap>,
        outlook: &BTreeMap<&InstanceName, Outlook<'_>>,
    ) {
        let mut shared = self.lock();
        shared.shown.retain(|name, _| wanted.contains_key(name));
        shared.lately.retain(|name, _| outlook.contains_key(name));
        for (name, (cores, demand)) in outlook {
            let shared = &mut *shared;
            let lately = shared.lately.entry((*name).clone()).or_default();
            lately.note(*cores);
            if let (Some(on), Some(shown)) = (wanted.get_mut(*name), shared.shown.get(*name)) {
                on.wish = memory::wish(lately, demand, shown.swapped_bytes);
            }
        }
        shared.wanted = wanted;
    }

    /// No longer this one, for now.
    pub(super) fn leave(&self, name: &InstanceName) {
        self.lock().wanted.remove(name);
    }

    /// Takes over what a swap has learnt of an instance's pages.
    pub(super) fn learn(&self, held: Held) {
        self.lock().learnt.insert(held.instance().name.clone(), held);
    }

    /// How they fare.
    pub(super) fn shown(&self) -> BTreeMap<InstanceName, InSwap> {
        self.lock().shown.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One look at each of them; answers how long all took.
    fn round(&self, held: &mut BTreeMap<InstanceName, Held>, config: &MemoryConfig) -> Duration {
        let began = Instant::now();
        let wanted = {
            let mut shared = self.lock();
            held.append(&mut shared.learnt);
            shared.wanted.clone()
        };
        held.retain(|name, held| {
            wanted.get(name).is_some_and(|on| on.instance.cgroup_id == held.instance().cgroup_id)
        });
        for (name, on) in wanted {
            let one = held.entry(name.clone()).or_insert_with(|| Held::new(&on.instance, config));
            let mut shown = self.lock().shown.get(&name).cloned().unwrap_or_else(|| nothing_seen(&on.pool));
            match look(one, &on) {
                Ok((looked, wish)) => show(&mut shown, looked, wish),
                Err(error) => {
                    let error = refused("look at its memory", &error);
                    show(&mut shown, Looked::default(), Wish::Hold { reason: error.to_string() });
                }
            }
            let mut shared = self.lock();
            if shared.wanted.contains_key(&name) {
                shared.shown.insert(name, shown);
            }
        }
        began.elapsed()
    }
}

/// Carries out what is wanted of one instance, as far as the pool lets.
fn look(held: &mut Held, on: &OnSwap) -> Result<(Looked, Wish), MemoryError> {
    let room = match &on.area {
        Some(area) => memory::room_in(area).map_err(|error| error.to_string()),
        None => Err(format!("{} is no swap of this host any more", on.pool)),
    };
    let now = UnixMillis::now();
    match (&on.wish, room) {
        (Wish::Back { reason }, _) => {
            let bytes = held.in_swap()?.min(BACK_AT_ONCE_BYTES);
            if let Err(error) = memory::room_for(bytes) {
                let reason = format!("{reason}, but {error}");
                return Ok((held.look(now, 0)?, Wish::Hold { reason }));
            }
            held.bring_back(bytes)?;
            Ok((held.look(now, 0)?, on.wish.clone()))
        }
        (Wish::Hold { .. }, _) => Ok((held.look(now, 0)?, on.wish.clone())),
        (Wish::Out, Ok(room)) => {
            let looked = held.look(now, room)?;
            let wish = match () {
                () if looked.pressure.share >= held.pressure_limit() => {
                    let (share, limit) = (looked.pressure.share * 100.0, held.pressure_limit() * 100.0);
                    Wish::Hold {
                        reason: format!(
                            "it waits for its memory {share:.2} % of the time, limit {limit:.2} %"
                        ),
                    }
                }
                () if room < memory::ages::REGION_BYTES => {
                    Wish::Hold { reason: format!("{} is full", on.pool) }
                }
                () => Wish::Out,
            };
            Ok((looked, wish))
        }
        (Wish::Out, Err(reason)) => Ok((held.look(now, 0)?, Wish::Hold { reason })),
    }
}

fn nothing_seen(pool: &str) -> InSwap {
    InSwap {
        pool: pool.to_owned(),
        doing: String::new(),
        reason: None,
        swapped_bytes: 0,
        present_bytes: 0,
        out_bytes: 0,
        returned_bytes: 0,
        pressure: Default::default(),
    }
}

fn show(shown: &mut InSwap, looked: Looked, wish: Wish) {
    (shown.swapped_bytes, shown.present_bytes) = (looked.swapped_bytes, looked.present_bytes);
    shown.out_bytes += looked.out_bytes;
    shown.returned_bytes += looked.returned_bytes;
    shown.pressure = looked.pressure;
    let (doing, reason) = match wish {
        Wish::Out => ("out", None),
        Wish::Hold { reason } => ("hold", Some(reason)),
        Wish::Back { reason } => ("back", Some(reason)),
    };
    (shown.doing, shown.reason) = (doing.to_owned(), reason);
}

/// Moves an instance's pages: what is cold to swap, or all back into memory. What was learnt of them comes along.
pub(super) fn swap(
    instance: &Instance,
    to: &Target,
    config: &MemoryConfig,
    stopping: &AtomicBool,
) -> Result<(MemoryReport, Option<Held>), ApiError> {
    let (attempted, done) = match to {
        Target::Swap(area) => (
            format!("move cold pages of {} to {}", instance.name, area.path.display()),
            memory::move_out(instance, area, config, stopping).map(|(report, held)| (report, Some(held))),
        ),
        Target::Memory { nodes, is_in_swap_pool } => (
            format!("move {} back into memory", instance.name),
            memory::move_back(instance, config, *nodes, *is_in_swap_pool).map(|report| (report, None)),
        ),
    };
    done.map_err(|error| refused(&attempted, &error))
}
