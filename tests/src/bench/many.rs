//! A client of `programs/many.py`, a connection to each of its threads or processes, asked in turn; and of `volume_server.py`.

use std::{
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};

use super::Timeline;
use crate::netns::Netns;

const PATIENCE: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(1);

/// A client at work.
#[derive(Debug)]
pub struct Many {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<Timeline>>,
}

impl Many {
    /// Connects `number` times to `server`, and sends a line over one connection after the other, [`PAUSE`] after each answer.
    pub fn start(netns: &Netns, server: SocketAddr, number: usize) -> anyhow::Result<Self> {
        Self::with_pauses(netns, server, number, || thread::sleep(PAUSE))
    }

    /// The same over one connection, a line every [`PAUSE`] as long as the answers come in time.
    pub fn steady(netns: &Netns, server: SocketAddr) -> anyhow::Result<Self> {
        let mut next = Instant::now();
        Self::with_pauses(netns, server, 1, move || {
            next += PAUSE;
            // What could not be sent in its time is not made up for.
            next = next.max(Instant::now());
            thread::sleep(next.saturating_duration_since(Instant::now()));
        })
    }

    fn with_pauses(
        netns: &Netns,
        server: SocketAddr,
        number: usize,
        mut pause: impl FnMut() + Send + 'static,
    ) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = netns.spawn("many", move || {
            let connect = |_| -> anyhow::Result<_> {
                let stream = TcpStream::connect_timeout(&server, PATIENCE)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                Ok(BufReader::new(stream))
            };
            let mut connections = (0..number).map(connect).collect::<anyhow::Result<Vec<_>>>()?;
            let mut times = Timeline::default();
            for count in 0_usize.. {
                if stopped.load(Ordering::Acquire) {
                    break;
                }
                let connection = &mut connections[count % number];
                let line = format!("line {count}\n");
                connection.get_mut().write_all(line.as_bytes())?;
                let mut back = String::new();
                connection.read_line(&mut back).context("waiting for a line")?;
                ensure!(back == line, "{back:?} came back for {line:?}");
                times.note(1);
                pause();
            }
            Ok(times)
        })?;
        Ok(Self { stop, thread })
    }

    /// Ends it; an error is what it found wrong.
    pub fn finish(self) -> anyhow::Result<Timeline> {
        self.stop.store(true, Ordering::Release);
        self.thread.join().map_err(|_| anyhow::anyhow!("the client panicked"))?
    }
}
