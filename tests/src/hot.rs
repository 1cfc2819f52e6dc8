//! A client that reads a part of a data set again and again, and looks at every value.

use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, ensure};

use crate::{
    bench::Timeline,
    client::{DataSet, PATIENT_TIMEOUT, VALUE_BYTES, connect, key, value},
    netns::Netns,
};

/// Keys of one question.
const AT_ONCE: u64 = 50;

/// The client at work.
#[derive(Debug)]
pub struct HotReader {
    stop: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    thread: JoinHandle<anyhow::Result<Timeline>>,
}

impl HotReader {
    /// Reads the first `share` of `set`, again and again, with a pause behind each fifty keys.
    pub fn start(netns: &Netns, set: DataSet, share: f64, pause: Duration) -> anyhow::Result<Self> {
        let hot = ((set.keys() as f64 * share) as u64).max(AT_ONCE);
        let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (stop.clone(), rounds.clone());
        let server: Ipv4Addr = set.server();
        let thread = netns.spawn("hot", move || {
            let mut connection = connect(server, PATIENT_TIMEOUT)?;
            // Once: computing them takes longer than the server takes to answer.
            let due: Vec<Vec<u8>> = (0..hot).map(|number| value("d", number, VALUE_BYTES)).collect();
            let mut times = Timeline::default();
            for at in 0_u64.. {
                if stopped.load(Ordering::Acquire) {
                    break;
                }
                let numbers = (0..AT_ONCE).map(|n| (at * AT_ONCE + n) % hot);
                let mut get = redis::cmd("MGET");
                for number in numbers.clone() {
                    get.arg(key("d", number));
                }
                let found: Vec<Option<Vec<u8>>> =
                    get.query(&mut connection).context("cannot read hot keys")?;
                times.note(1);
                for (number, found) in numbers.zip(found) {
                    ensure!(found.as_ref() == due.get(number as usize), "d:{number} is wrong");
                }
                counted.store((at + 1) * AT_ONCE / hot, Ordering::Release);
                thread::sleep(pause);
            }
            Ok(times)
        })?;
        Ok(Self { stop, rounds, thread })
    }

    /// How often all of them were read.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Acquire)
    }

    /// Ends it: when each answer came. An error is what it found wrong.
    pub fn finish(self) -> anyhow::Result<Timeline> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?
    }
}
