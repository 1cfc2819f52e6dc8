//! What a demo does when its user has seen enough: it cleans up as at its end.

use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread,
};

use nix::sys::signal::{SigSet, Signal};

/// Whether the user wants it to end.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<(Mutex<bool>, Condvar)>);

impl Stop {
    /// Set by SIGINT and SIGTERM from now on. To be called before other threads are made.
    ///
    /// # Errors
    ///
    /// If the signals can't be blocked.
    pub fn on_signals() -> anyhow::Result<Self> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGINT);
        signals.add(Signal::SIGTERM);
        signals.thread_block()?;
        let stop = Self::default();
        let to_set = stop.clone();
        thread::spawn(move || {
            if signals.wait().is_ok() {
                to_set.set();
            }
        });
        Ok(stop)
    }

    fn set(&self) {
        let (stopped, told) = &*self.0;
        *stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        told.notify_all();
    }

    /// Goes on if nobody wants it to end.
    ///
    /// # Errors
    ///
    /// If the user does.
    pub fn check(&self) -> anyhow::Result<()> {
        let stopped = *self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        anyhow::ensure!(!stopped, "stopped by the user");
        Ok(())
    }

    /// Waits until the user wants it to end.
    pub fn wait(&self) {
        let (stopped, told) = &*self.0;
        let guard = stopped.lock().unwrap_or_else(PoisonError::into_inner);
        drop(told.wait_while(guard, |stopped| !*stopped).unwrap_or_else(PoisonError::into_inner));
    }
}
