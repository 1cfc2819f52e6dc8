//! Looks at this host's pools, again and again: cores go offline, devices and paths vanish, file systems fill up.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rswap_pools::{Inventory, Root, State, calibrate};

use crate::{
    config::{self, Config},
    units::UnixMillis,
};

/// One look, as what follows `before`.
pub fn look(config: &Config, before: Option<&Inventory>) -> Inventory {
    let nothing = Inventory::default();
    look_again(config, before.unwrap_or(&nothing), &nothing)
}

/// The same; what does not change while the same CPUs are online, of `known`.
fn look_again(config: &Config, before: &Inventory, known: &Inventory) -> Inventory {
    let settings = config::settings(config);
    let found = rswap_pools::discover_again(&Root::machine(), &settings, UnixMillis::now(), known);
    let mut now = rswap_pools::follow(before, found, &settings);
    let kept = calibrate::kept(&calibrations(config), &config.agent.host, &kernel_release());
    calibrate::apply(&mut now, &kept, &settings);
    now
}

/// Where what `rswap calibrate` measured is kept.
pub fn calibrations(config: &Config) -> PathBuf {
    config.agent.calibrations_dir.clone()
}

/// As `uname -r` shows it.
pub fn kernel_release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

/// The latest look. The looks are made on a thread of their own, which ends with the process: a file system that does not
/// answer must not keep the windows waiting.
#[derive(Clone, Debug)]
pub struct Watch(Arc<Mutex<Arc<Inventory>>>);

impl Watch {
    /// Looks once, and then every `pools.look_every_ms`.
    pub fn start(config: &Config) -> Self {
        let watch = Self(Arc::new(Mutex::new(Arc::new(look(config, None)))));
        let (config, shared) = (config.clone(), watch.clone());
        let every = Duration::from_millis(config.looks.look_every_ms);
        std::thread::spawn(move || {
            let (nothing, mut is_steady) = (Inventory::default(), false);
            loop {
                std::thread::sleep(every);
                let before = shared.latest();
                let now = look_again(&config, &before, if is_steady { &before } else { &nothing });
                is_steady = now.online == before.online;
                tell(&before, &now);
                *shared.0.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(now);
            }
        });
        watch
    }

    /// The latest look.
    pub fn latest(&self) -> Arc<Inventory> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Logs what became another state.
fn tell(before: &Inventory, now: &Inventory) {
    for pool in &now.pools {
        let previous = before.pool(&pool.name).map(|previous| previous.state.word());
        if previous == Some(pool.state.word()) {
            continue;
        }
        match &pool.state {
            State::Online => tracing::info!(pool = pool.name, "the pool is online"),
            state => tracing::warn!(
                pool = pool.name,
                state = state.word(),
                reason = state.reason().unwrap_or_default(),
                "the pool can't be used"
            ),
        }
    }
}
