//! A log of what is written that is read all the time, whatever else is done with the volume: what is told has room for some hundred milliseconds
//! only, and reading both copies again takes as long as their disks need.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use super::{Touched, WriteLog};

/// How often the log is read.
const LOOK_EVERY: Duration = Duration::from_millis(20);

type Shared = Arc<Mutex<Box<dyn WriteLog>>>;

/// A log, and the thread that reads it until this is dropped.
#[derive(Debug)]
pub(super) struct Followed {
    log: Shared,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Followed {
    pub(super) fn new(log: Box<dyn WriteLog>) -> Self {
        let log: Shared = Arc::new(Mutex::new(log));
        let over = Arc::new(AtomicBool::new(false));
        let (followed, is_over) = (log.clone(), over.clone());
        let follow = move || {
            while !is_over.load(Ordering::Acquire) {
                let Some(mut log) = locked(&followed) else { return };
                log.look();
                drop(log);
                thread::park_timeout(LOOK_EVERY);
            }
        };
        Self { log, over, thread: Some(thread::spawn(follow)) }
    }

    /// As [`WriteLog::take`].
    pub(super) fn take(&mut self, all: bool) -> Option<BTreeMap<u64, Touched>> {
        locked(&self.log)?.take(all)
    }
}

/// `None` where reading it has panicked: then nobody knows what was told.
fn locked(log: &Shared) -> Option<MutexGuard<'_, Box<dyn WriteLog>>> {
    log.lock().ok()
}

impl Drop for Followed {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::atomic::AtomicUsize, time::Instant};

    use super::*;

    /// Has room for what is told between two looks, if they are not far apart.
    #[derive(Debug, Default)]
    struct Ring {
        told: Arc<AtomicUsize>,
        seen: usize,
        lost: bool,
    }

    const ROOM: usize = 100;

    impl WriteLog for Ring {
        fn look(&mut self) {
            let told = self.told.swap(0, Ordering::AcqRel);
            self.seen += told;
            self.lost |= told > ROOM;
        }

        fn take(&mut self, _all: bool) -> Option<BTreeMap<u64, Touched>> {
            self.look();
            let blocks = (0..self.seen as u64).collect();
            (!self.lost).then(|| [(1, Touched { whole: false, blocks })].into())
        }
    }

    #[test]
    fn nothing_is_lost_while_nobody_asks() {
        let told = Arc::new(AtomicUsize::new(0));
        let mut followed = Followed::new(Box::new(Ring { told: told.clone(), ..Ring::default() }));
        // Several times the room, each once what was told before was seen.
        let began = Instant::now();
        for _ in 0..10 * ROOM / 50 {
            told.fetch_add(50, Ordering::AcqRel);
            while told.load(Ordering::Acquire) > 0 {
                assert!(began.elapsed() < Duration::from_secs(20), "nobody reads it");
                thread::sleep(Duration::from_millis(1));
            }
        }
        let found = followed.take(true).expect("nothing is lost");
        assert_eq!(found[&1].blocks.len(), 10 * ROOM);
        drop(followed);
        assert_eq!(Arc::strong_count(&told), 1, "it is read for ever");
    }

    #[test]
    fn of_one_whose_reading_panicked_nothing_is_believed() {
        #[derive(Debug)]
        struct Broken;
        impl WriteLog for Broken {
            fn look(&mut self) {
                panic!("a log that can't be read");
            }

            fn take(&mut self, _all: bool) -> Option<BTreeMap<u64, Touched>> {
                Some(BTreeMap::new())
            }
        }
        let mut followed = Followed::new(Box::new(Broken));
        let began = Instant::now();
        while followed.take(false).is_some() {
            assert!(began.elapsed() < Duration::from_secs(20), "it is believed");
            thread::sleep(Duration::from_millis(1));
        }
    }
}
