//! A TCP proxy between two agents that damages one page on its way.

use std::{
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Context;
use rswap_agent::migrate::wire::{Tag, WireError, parse_pages, read_frame, write_frame};

use crate::netns::Netns;

const PATIENCE: Duration = Duration::from_secs(60);

/// A proxy that lets the first connection's first frame with pages arrive with one byte changed.
#[derive(Debug)]
pub struct DamagingProxy {
    address: SocketAddr,
    damaged: Arc<AtomicBool>,
}

impl DamagingProxy {
    /// Listens on loopback in the namespace of the source, and passes on to `destination`. It ends with the process.
    pub fn start(netns: &Netns, destination: SocketAddr) -> anyhow::Result<Self> {
        let damaged = Arc::new(AtomicBool::new(false));
        let done = damaged.clone();
        let (sender, receiver) = std::sync::mpsc::channel();
        netns.spawn("proxy", move || {
            let listener = TcpListener::bind(("127.0.0.1", 0)).context("the proxy cannot listen")?;
            sender.send(listener.local_addr()?).context("nobody waits for the proxy")?;
            for stream in listener.incoming() {
                if let Err(error) = pass(stream?, destination, &done) {
                    // A torn connection is what it is for.
                    eprintln!("proxy: {error:#}");
                }
            }
            Ok(())
        })?;
        let address = receiver.recv_timeout(PATIENCE).context("the proxy did not start")?;
        Ok(Self { address, damaged })
    }

    /// Where the source finds it.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whether it has changed its byte.
    pub fn has_damaged(&self) -> bool {
        self.damaged.load(Ordering::Acquire)
    }
}

fn pass(source: TcpStream, destination: SocketAddr, damaged: &Arc<AtomicBool>) -> anyhow::Result<()> {
    let onward = TcpStream::connect(destination).context("the proxy cannot reach the destination")?;
    for stream in [&source, &onward] {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
    }
    let (mut back_from, mut back_to) = (onward.try_clone()?, source.try_clone()?);
    let back = thread::spawn(move || {
        let copied = std::io::copy(&mut back_from, &mut back_to);
        // The other side must see the end too; it may be gone already.
        let _ = back_to.shutdown(Shutdown::Both);
        copied
    });
    let passed = pass_frames(&source, &onward, damaged);
    let _ = onward.shutdown(Shutdown::Write);
    back.join().map_err(|_| anyhow::anyhow!("the proxy's way back panicked"))??;
    passed
}

/// Passes frame by frame. The byte that is changed is the last one of a page's contents: the frame stays well-formed,
/// and of a compressed page it is a literal, so that only the page's contents can give the damage away.
fn pass_frames(mut from: &TcpStream, mut to: &TcpStream, damaged: &AtomicBool) -> anyhow::Result<()> {
    loop {
        let mut frame = match read_frame(&mut from) {
            Ok(frame) => frame,
            Err(WireError::Io(_)) => return Ok(()),
            Err(error) => return Err(error).context("the source sent no frame"),
        };
        if frame.tag == Tag::Pages && !damaged.load(Ordering::Acquire) {
            let has_contents = parse_pages(&frame.payload)?.last().is_some_and(|page| !page.data.is_empty());
            if let Some(last) = frame.payload.last_mut().filter(|_| has_contents) {
                *last ^= 0x01;
                damaged.store(true, Ordering::Release);
            }
        }
        write_frame(&mut to, frame.tag, &frame.payload)?;
    }
}
