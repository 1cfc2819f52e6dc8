//! Work that asks a disk while an instance stands still. The disk may answer nothing, and nobody can end a thread that waits for it in the kernel.
//! So each piece of such work has a thread of its own, and whatever it needs goes with it: whoever has waited for long enough leaves it
//! behind, and the instance goes on without what it would have brought.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use super::StorageError;

/// All such work of one freeze. Dropped, it waits for what is still under way: nobody may stand still for that.
pub(super) struct Work {
    limit: Duration,
    deadline: Instant,
    given_up: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// What a piece of work will have brought.
pub(super) struct Pending<T>(mpsc::Receiver<T>);

impl Work {
    /// From here on all of it is waited for, for as long as this in all.
    pub(super) fn begin(limit: Duration) -> Self {
        let (deadline, given_up) = (Instant::now() + limit, Arc::default());
        Self { limit, deadline, given_up, threads: Vec::new() }
    }

    /// Begins a piece. It is told when nobody waits for anything any more; what it brings then is dropped by its thread.
    pub(super) fn start<T: Send + 'static>(
        &mut self,
        piece: impl FnOnce(&AtomicBool) -> T + Send + 'static,
    ) -> Pending<T> {
        let (tell, told) = mpsc::channel();
        let given_up = self.given_up.clone();
        let work = move || drop(tell.send(piece(&given_up)));
        match thread::Builder::new().name("disk".into()).spawn(work) {
            Ok(thread) => self.threads.push(thread),
            // Whoever waits for it hears that there is none: nothing may panic while an instance stands still.
            Err(error) => tracing::error!(%error, "no thread can be had for work on a disk"),
        }
        Pending(told)
    }

    /// What a piece has brought.
    pub(super) fn wait<T>(&self, pending: &Pending<T>) -> Result<T, StorageError> {
        match pending.0.recv_timeout(self.deadline.saturating_duration_since(Instant::now())) {
            Ok(brought) => Ok(brought),
            Err(RecvTimeoutError::Timeout) => {
                self.given_up.store(true, Ordering::Release);
                Err(StorageError::DiskHangs { waited_ms: self.limit.as_millis() })
            }
            Err(RecvTimeoutError::Disconnected) => Err(StorageError::Unfit(
                "a thread that was to work on the copy panicked, or could not be had: see the agent's log"
                    .into(),
            )),
        }
    }

    /// Does a piece, and waits for it.
    pub(super) fn call<T: Send + 'static>(
        &mut self,
        piece: impl FnOnce(&AtomicBool) -> T + Send + 'static,
    ) -> Result<T, StorageError> {
        let pending = self.start(piece);
        self.wait(&pending)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        self.given_up.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            // Of one that has panicked everybody was told.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(200);

    #[test]
    fn what_hangs_is_left_behind_with_all_that_it_has() {
        let (answer, answers) = mpsc::channel::<()>();
        let (told, tells) = mpsc::channel();
        let mut work = Work::begin(LIMIT);
        assert_eq!(work.call(|_| 5).expect("it does not hang"), 5);
        let began = Instant::now();
        let held = Arc::new(());
        let with_it = held.clone();
        let hung = work.call(move |given_up| {
            let _ = answers.recv();
            let _ = told.send(given_up.load(Ordering::Acquire));
            with_it
        });
        assert!(matches!(hung, Err(StorageError::DiskHangs { waited_ms: 200 })), "{hung:?}");
        // All of them have the same time: nothing is waited for any more.
        let later = work.call(|_| thread::sleep(LIMIT));
        assert!(matches!(later, Err(StorageError::DiskHangs { .. })), "{later:?}");
        assert!(began.elapsed() < 2 * LIMIT, "{:?}", began.elapsed());
        assert_eq!(Arc::strong_count(&held), 2, "its thread has it");
        // It is told so, and waited for by whoever drops the work.
        drop(answer);
        drop(work);
        assert!(tells.recv().expect("it has gone on"));
        assert_eq!(Arc::strong_count(&held), 1);
    }

    #[test]
    fn one_that_panics_is_not_waited_for() {
        let mut work = Work::begin(Duration::from_secs(60));
        let ended = work.call(|_| {
            if true {
                panic!("on purpose")
            }
        });
        assert!(matches!(ended, Err(StorageError::Unfit(_))), "{ended:?}");
    }
}
