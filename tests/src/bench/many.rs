//! A client of `programs/many.py`: a connection to each of its threads or processes, asked in turn.

use std::{
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
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
    /// Connects `number` times to `server`, and sends a line over one connection after the other.
    pub fn start(netns: &Netns, server: SocketAddr, number: usize) -> anyhow::Result<Self> {
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
                thread::sleep(PAUSE);
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
