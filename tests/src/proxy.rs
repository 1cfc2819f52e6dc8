//! A TCP proxy between two agents that does damage at a chosen frame of a migration; the conversations after that one
//! it passes on as they are. It has the keys of both hosts: to each it is the other.

use std::{
    io::Write as _,
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::Duration,
};

use anyhow::Context;
use rswap_agent::migrate::wire::{Frame, Tag, parse_pages, read_frame, write_frame};

use crate::{Host, mangle::Mangler, tls::Secured};

const PATIENCE: Duration = Duration::from_secs(30);

/// What the proxy does, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing happens.
    None,
    /// One byte of the first page with contents arrives changed.
    DamagePage,
    /// The `nth` frame (from 0) of this kind is not passed on, nor is anything after it: the migration stands still at
    /// exactly this place until [`Proxy::cut`].
    HoldAt {
        /// Which kind.
        tag: Tag,
        /// Which of its frames.
        nth: usize,
    },
    /// As [`Fault::HoldAt`], but only until [`Proxy::go_on`].
    PauseAt {
        /// Which kind.
        tag: Tag,
        /// Which of its frames.
        nth: usize,
    },
    /// A frame, in either direction, is changed, cut, lengthened, repeated, exchanged or replaced, as the seed says.
    Mangle(u64),
    /// Of the last delta, which is sent while the instance is frozen, only the first half is passed on.
    HoldInLastDelta,
}

/// A proxy that has one [`Fault`], in the first conversation. Its threads end with the process.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    happened: Receiver<()>,
    streams: Arc<Mutex<Vec<TcpStream>>>,
    down: Arc<AtomicBool>,
    goes_on: Arc<AtomicBool>,
}

impl Proxy {
    /// Listens on loopback in the namespace of `from`, for migrations to `to`.
    pub fn start(from: &Host, to: &Host, fault: Fault) -> anyhow::Result<Self> {
        let destination: SocketAddr = to.migrate_address().parse()?;
        let (as_source, as_destination) = (from.files().clone(), to.files().clone());
        let streams = Arc::new(Mutex::new(Vec::new()));
        let down = Arc::new(AtomicBool::new(false));
        let goes_on = Arc::new(AtomicBool::new(false));
        let (opened, is_down, go) = (streams.clone(), down.clone(), goes_on.clone());
        let (happens, happened) = mpsc::channel();
        let (sender, receiver) = mpsc::channel();
        from.netns().spawn("proxy", move || -> anyhow::Result<()> {
            let listener = TcpListener::bind(("127.0.0.1", 0)).context("the proxy cannot listen")?;
            sender.send(listener.local_addr()?).context("nobody waits for the proxy")?;
            let mut fault = fault;
            loop {
                let (source, _) = listener.accept().context("the proxy had no caller")?;
                if is_down.load(Ordering::Acquire) {
                    continue;
                }
                // A destination that is down, its caller finds out by the closed connection.
                let Ok(onward) = TcpStream::connect(destination) else { continue };
                let fault = std::mem::replace(&mut fault, Fault::None);
                let all = [source.try_clone()?, onward.try_clone()?];
                opened.lock().unwrap_or_else(PoisonError::into_inner).extend(all);
                let (forth_happens, back_happens) = (happens.clone(), happens.clone());
                let (forth_go, back_go) = (go.clone(), go.clone());
                let (as_source, as_destination) = (as_source.clone(), as_destination.clone());
                thread::spawn(move || {
                    // One of both is gone: the other finds out by the closed connection.
                    let Ok(onward) = Secured::dialled(onward, &as_source) else { return };
                    let Ok(source) = Secured::accepted(source, &as_destination) else { return };
                    let (back_from, back_to) = (onward.other_hand(), source.other_hand());
                    thread::spawn(move || pass(back_from, back_to, fault, &back_happens, &back_go));
                    pass(source, onward, fault, &forth_happens, &forth_go);
                });
            }
        })?;
        let address = receiver.recv_timeout(PATIENCE).context("the proxy did not start")?;
        Ok(Self { address, happened, streams, down, goes_on })
    }

    /// Where the source finds it.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Waits until the fault has happened.
    pub fn wait_for_fault(&self) -> anyhow::Result<()> {
        self.happened.recv_timeout(PATIENCE).context("the migration did not come to the fault's place")
    }

    /// Passes on what was paused, and all that follows.
    pub fn go_on(&self) {
        self.goes_on.store(true, Ordering::Release);
    }

    /// From now on there is no way through, until [`Proxy::heal`].
    pub fn break_down(&self) {
        self.down.store(true, Ordering::Release);
        self.cut();
    }

    /// There is a way through again.
    pub fn heal(&self) {
        self.down.store(false, Ordering::Release);
    }

    /// Closes all connections.
    pub fn cut(&self) {
        // Closed with what nobody has read, not only shut down: who is about to write more hears of it at once.
        for stream in self.streams.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // One whose peer is gone is closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Passes frame by frame until either side ends, which ends the other side too.
fn pass(mut from: Secured, mut to: Secured, fault: Fault, happens: &Sender<()>, goes_on: &AtomicBool) {
    let mut seen = 0;
    let mut mangler = match fault {
        Fault::Mangle(seed) => Some(Mangler::new(seed)),
        _ => None,
    };
    let mut damaged = false;
    // What came since the last whole round: only the image tells that it is the last delta.
    let mut kept: Vec<Frame> = Vec::new();
    while let Ok(mut frame) = read_frame(&mut from) {
        match fault {
            Fault::HoldAt { tag, nth } if frame.tag == tag => {
                if seen == nth {
                    // The test may have given up: then nobody is told.
                    let _ = happens.send(());
                    return;
                }
                seen += 1;
            }
            Fault::PauseAt { tag, nth } if frame.tag == tag => {
                if seen == nth {
                    let _ = happens.send(());
                    while !goes_on.load(Ordering::Acquire) {
                        thread::sleep(Duration::from_millis(5));
                    }
                }
                seen += 1;
            }
            Fault::HoldInLastDelta if frame.tag == Tag::Image => {
                let mut delta = Vec::new();
                for frame in &kept {
                    // Writing to memory cannot fail, and the frames were within their limits.
                    let _ = write_frame(&mut delta, frame.tag, &frame.payload);
                }
                let _ = to.write_all(&delta[..delta.len() / 2]);
                let _ = happens.send(());
                return;
            }
            Fault::HoldInLastDelta if matches!(frame.tag, Tag::Layout | Tag::Discard | Tag::Pages) => {
                kept.push(frame);
                continue;
            }
            Fault::HoldInLastDelta => {
                let whole =
                    kept.drain(..).all(|frame| write_frame(&mut to, frame.tag, &frame.payload).is_ok());
                if !whole {
                    break;
                }
            }
            Fault::DamagePage if !damaged && damage(&mut frame) => {
                damaged = true;
                let _ = happens.send(());
            }
            Fault::Mangle(_) => {
                let Some(mangler) = &mut mangler else { break };
                let (bytes, mangled) = mangler.pass(&frame);
                if mangled {
                    let _ = happens.send(());
                }
                if to.write_all(&bytes).is_err() {
                    break;
                }
                continue;
            }
            _ => {}
        }
        if write_frame(&mut to, frame.tag, &frame.payload).is_err() {
            break;
        }
    }
    to.end();
}

/// Changes the last byte of a page's contents: the frame stays well-formed, and of a compressed page it is a literal,
/// so that only the page's contents can give the damage away.
fn damage(frame: &mut Frame) -> bool {
    let has_contents = frame.tag == Tag::Pages
        && parse_pages(&frame.payload)
            .is_ok_and(|pages| pages.last().is_some_and(|page| !page.data.is_empty()));
    match frame.payload.last_mut() {
        Some(last) if has_contents => {
            *last ^= 0x01;
            true
        }
        _ => false,
    }
}
