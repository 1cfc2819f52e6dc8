//! A long way between two hosts: what one sends the other comes later. (The kernel has netem for this, where it is built in.)

use std::{
    io,
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::Context;
use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use tun_rs::{DeviceBuilder, SyncDevice};

use crate::{host::Host, netns::Netns};

/// Large, so that the one who carries the packets is not what bounds the rate.
const MTU: u16 = 60_000;
/// How long it may take until a thread sees that it is over.
const LOOK: Duration = Duration::from_millis(100);
/// What the kernel says when a packet finds no room, or nobody.
const LOST: [Errno; 3] = [Errno::ENOBUFS, Errno::EAGAIN, Errno::EIO];
/// Name of the interface at both ends.
const INTERFACE: &str = "way0";

/// The way between two hosts' agents, as long as it lives.
#[derive(Debug)]
pub struct LongWay {
    over: Arc<AtomicBool>,
    cut: Arc<AtomicBool>,
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl LongWay {
    /// Has what `a` and `b` send each other go over it, with so long a round trip.
    pub fn lay(a: &Host, b: &Host, round_trip: Duration) -> anyhow::Result<Self> {
        let ends = [end(a, b)?, end(b, a)?].map(Arc::new);
        let (over, cut) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let mut threads = Vec::new();
        for (from, to) in [(&ends[0], &ends[1]), (&ends[1], &ends[0])] {
            let (sender, packets) = mpsc::channel::<(Instant, Vec<u8>)>();
            let (from, to, over, cut) = (from.clone(), to.clone(), over.clone(), cut.clone());
            let one_way = round_trip / 2;
            threads.push(thread::spawn(move || take(&from, &over, one_way, &sender)));
            threads.push(thread::spawn(move || give(&to, &cut, &packets)));
        }
        Ok(Self { over, cut, threads })
    }

    /// Loses all that is under way, and all that comes; nobody is told.
    pub fn cut(&self) {
        self.cut.store(true, Ordering::Release);
    }
}

impl Drop for LongWay {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => eprintln!("the long way ended early: {error}"),
                Err(_) => eprintln!("the long way panicked"),
            }
        }
    }
}

/// The end at `here`, through which it sends to `there`.
fn end(here: &Host, there: &Host) -> anyhow::Result<SyncDevice> {
    let make = || {
        let device =
            DeviceBuilder::new().name(INTERFACE).mtu(MTU).build_sync().context("cannot make a TUN device")?;
        device.set_nonblocking(true)?;
        Ok(device)
    };
    let netns: &Netns = here.netns();
    let device = netns.spawn("long way", make)?.join().map_err(|_| anyhow::anyhow!("it panicked"))??;
    netns.ip(&["link", "set", INTERFACE, "up"])?;
    let (from, to) = (here.address().to_string(), format!("{}/32", there.address()));
    netns.ip(&["route", "add", &to, "dev", INTERFACE, "src", &from])?;
    Ok(device)
}

/// Takes what is sent into one end.
fn take(
    device: &SyncDevice,
    over: &AtomicBool,
    later: Duration,
    packets: &mpsc::Sender<(Instant, Vec<u8>)>,
) -> io::Result<()> {
    let mut packet = vec![0; usize::from(u16::MAX)];
    while !over.load(Ordering::Acquire) {
        match device.recv(&mut packet) {
            Ok(bytes) => {
                if packets.send((Instant::now() + later, packet[..bytes].to_vec())).is_err() {
                    break;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let timeout = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
                poll(&mut [PollFd::new(device.as_fd(), PollFlags::POLLIN)], timeout)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Gives it out at the other end, each packet at its time.
fn give(
    device: &SyncDevice,
    cut: &AtomicBool,
    packets: &mpsc::Receiver<(Instant, Vec<u8>)>,
) -> io::Result<()> {
    for (due, packet) in packets {
        thread::sleep(due.saturating_duration_since(Instant::now()));
        if cut.load(Ordering::Acquire) {
            continue;
        }
        match device.send(&packet) {
            // As with any link that has no room, or whose far end is gone, it is lost.
            Ok(_) => {}
            Err(error) if LOST.map(|lost| Some(lost as i32)).contains(&error.raw_os_error()) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
