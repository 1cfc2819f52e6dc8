//! How lanes ([`lanes`](super::lanes)) are made, and where they meet the migration that they are of.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    io::{self, Read, Write},
    net::SocketAddr,
    panic::resume_unwind,
    sync::{
        Arc, Mutex, PoisonError,
        mpsc::{Receiver, SyncSender, sync_channel},
    },
    thread,
    time::Instant,
};

use rswap_trust::Name;

use super::{
    MigrateError,
    journal::MigrationId,
    lanes::{self, Gather, Gathered, MAX_LANES, Spread, Widen},
    link::{Link, SILENCE, left},
    links::Links,
    probe,
};
use crate::sys;

const _: () = assert!(MAX_LANES as u32 <= u8::BITS);

/// Bytes that a connection's buffer grows to, where the kernel doesn't say.
const USUAL_BUFFER_BYTES: u64 = 4 << 20;

/// A source's connection to the destination, which may become several.
#[derive(Debug)]
pub struct Departing<'a> {
    link: Link,
    links: &'a Links,
    to: SocketAddr,
    whose: Option<Name>,
    /// As configured; else as many as are worth while.
    wanted: Option<u8>,
    deadline: Instant,
    made: Vec<Link>,
    spread: Option<Spread>,
}

impl<'a> Departing<'a> {
    /// `link`, which `links` has made to `whose` at `to`. `wanted` lanes are made; as many as are worth while, if it is not set.
    pub fn new(
        link: Link,
        links: &'a Links,
        (to, whose): (SocketAddr, Option<Name>),
        wanted: Option<u8>,
        deadline: Instant,
    ) -> Self {
        Self { link, links, to, whose, wanted, deadline, made: Vec::new(), spread: None }
    }

    /// How many lanes there should be: the connection itself is one that need not be made.
    fn lanes(&self) -> u8 {
        let wanted = self.wanted.unwrap_or_else(|| {
            let Ok(round_trip) = sys::tcp::least_round_trip(self.link.socket()) else { return 1 };
            let buffer_bytes = sys::tcp::largest_send_buffer_bytes().unwrap_or(USUAL_BUFFER_BYTES);
            let wanted = lanes::worth_while(round_trip, buffer_bytes);
            tracing::debug!(?round_trip, buffer_bytes, wanted, "lanes");
            wanted
        });
        if wanted <= 1 { 0 } else { wanted.min(MAX_LANES) }
    }

    fn make_lane(&self, id: MigrationId, number: u8) -> Result<Link, MigrateError> {
        // The destination waits for the next frame on the first connection meanwhile, and takes silence for death.
        let until = self.deadline.min(Instant::now() + SILENCE / 2);
        let dialled = self.links.dial(self.to, self.whose.as_ref(), until);
        let (mut link, _) = dialled
            .map_err(|source| MigrateError::Link { doing: "connecting to the destination", source })?;
        probe::join(&mut link, id, number)?;
        link.set_deadline(self.deadline);
        Ok(link)
    }
}

impl Widen for Departing<'_> {
    fn make_lanes(&mut self, id: MigrationId) -> u8 {
        // At once: each takes some round trips, and these are long.
        let made: Vec<_> = thread::scope(|scope| {
            let this = &*self;
            let making: Vec<_> = (0..self.lanes())
                .map_while(|number| {
                    let make = move || this.make_lane(id, number);
                    thread::Builder::new().name("lane".into()).spawn_scoped(scope, make).ok()
                })
                .collect();
            making.into_iter().map(|lane| lane.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
        });
        for (lane, number) in made.into_iter().zip(0..) {
            match lane {
                Ok(link) => self.made.push(link),
                Err(error) => {
                    // Those behind it would be in another place than the destination has them.
                    tracing::warn!(%id, number, %error, "a lane could not be made: the migration goes on with fewer");
                    break;
                }
            }
        }
        if !self.made.is_empty() {
            tracing::info!(%id, lanes = self.made.len(), "sent over several connections");
        }
        // At most MAX_LANES.
        self.made.len() as u8
    }

    fn spread(&mut self) -> io::Result<()> {
        self.spread = Some(Spread::over(std::mem::take(&mut self.made))?);
        Ok(())
    }
}

impl Read for Departing<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.link.read(buf)
    }
}

impl Write for Departing<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match &mut self.spread {
            Some(spread) => spread.write(data),
            None => self.link.write(data),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match &mut self.spread {
            Some(spread) => spread.flush(),
            None => self.link.flush(),
        }
    }
}

/// The migrations that arrive here, for their lanes to find them.
#[derive(Clone, Debug, Default)]
pub struct Meeting(Arc<Mutex<HashMap<MigrationId, Expecting>>>);

/// One of them.
#[derive(Debug)]
struct Expecting {
    /// Who sends it, and so its lanes; nobody has shown who it is where links are in the clear.
    peer: Option<Name>,
    lanes: SyncSender<(u8, Link)>,
    /// Which of them have come, a bit each.
    come: u8,
}

impl Meeting {
    /// A migration whose lanes may come from now on, by `link`'s `peer` only. Nothing waits past `deadline`.
    pub fn arriving(&self, id: MigrationId, link: Link, peer: Option<Name>, deadline: Instant) -> Arriving {
        let (sender, lanes) = sync_channel(usize::from(MAX_LANES));
        let expecting = Expecting { peer, lanes: sender, come: 0 };
        // An id that is here already is refused by the ledger; the one that came first keeps its place.
        let fresh = match self.lock().entry(id) {
            Entry::Occupied(_) => false,
            Entry::Vacant(place) => {
                place.insert(expecting);
                true
            }
        };
        Arriving {
            link,
            lanes,
            gathered: None,
            deadline,
            place: fresh.then(|| Place { id, meeting: self.clone() }),
        }
    }

    /// Takes a lane to its migration: `answer` tells its source that it is expected.
    ///
    /// # Errors
    /// It is not, or `answer` failed.
    pub fn join(
        &self,
        id: MigrationId,
        number: u8,
        peer: Option<&Name>,
        mut link: Link,
        answer: impl FnOnce(&mut Link) -> Result<(), MigrateError>,
    ) -> Result<(), (Link, MigrateError)> {
        let refused =
            |reason: &str| MigrateError::Peer { doing: "joining a migration", reason: reason.into() };
        let sender = {
            let mut expected = self.lock();
            match expected.get_mut(&id) {
                // Who isn't its source learns no more than who guesses.
                Some(of) if of.peer.as_ref() == peer => {
                    let bit = 1_u8.checked_shl(number.into()).filter(|bit| of.come & bit == 0);
                    let Some(bit) = bit else {
                        return Err((link, refused("there is no such lane, or it has come")));
                    };
                    of.come |= bit;
                    of.lanes.clone()
                }
                _ => return Err((link, refused("no such migration arrives here"))),
            }
        };
        if let Err(error) = answer(&mut link) {
            return Err((link, error));
        }
        // There is room for all that are let in. Where the migration has ended, nobody needs the lane.
        let _ = sender.try_send((number, link));
        Ok(())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<MigrationId, Expecting>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A migration's place in the meeting.
#[derive(Debug)]
struct Place {
    id: MigrationId,
    meeting: Meeting,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.meeting.lock().remove(&self.id);
    }
}

/// A source's connection, as the destination has it, which may become several.
#[derive(Debug)]
pub struct Arriving {
    link: Link,
    lanes: Receiver<(u8, Link)>,
    gathered: Option<Gathered>,
    deadline: Instant,
    place: Option<Place>,
}

impl Arriving {
    /// Closes it so that the peer can read what was said last.
    pub fn linger(&mut self) {
        self.gathered = None;
        self.link.linger();
    }
}

impl Gather for Arriving {
    fn gather(&mut self, lanes: u8) -> io::Result<()> {
        // Each comes on a thread of its own, and more than are used may have been answered.
        let mut links = BTreeMap::new();
        while links.len() < usize::from(lanes) {
            match self.lanes.recv_timeout(left(self.deadline, SILENCE)?) {
                Ok((number, link)) if number < lanes => drop(links.insert(number, link)),
                Ok(_) => {}
                Err(_) => {
                    let text = format!("{lanes} lanes were said to be made, and {} came", links.len());
                    return Err(io::Error::new(io::ErrorKind::NotConnected, text));
                }
            }
        }
        // No more are let in.
        self.place = None;
        self.gathered = Some(Gathered::over(links.into_values().collect(), self.deadline)?);
        Ok(())
    }
}

impl Read for Arriving {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match &mut self.gathered {
            Some(gathered) => gathered.read(buf),
            None => self.link.read(buf),
        }
    }
}

impl Write for Arriving {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.link.write(data)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.link.flush()
    }
}

#[cfg(test)]
mod tests;
