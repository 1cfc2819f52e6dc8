//! What of an instance has to be known to describe one of its descriptors.

use std::{
    cell::{OnceCell, RefCell},
    collections::BTreeSet,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use super::super::{TraceeError, layout, tables, terminals, tree, unix::Peers};
use crate::sys::process::Common;

/// The processes around a descriptor.
#[derive(Debug)]
pub struct Around {
    /// Who is connected to whom by unix sockets.
    pub(super) peers: Peers,
    pids: Vec<i32>,
    mapped: OnceCell<BTreeSet<(u64, String)>>,
    /// Our duplicates of descriptors that wait in queues.
    in_flight: RefCell<Vec<OwnedFd>>,
}

/// Descriptors that wait in the queue of a unix socket have numbers from here on in the image, above all that a process
/// can have. They belong to the process that has the socket.
pub const IN_FLIGHT: RawFd = 1 << 29;

impl Around {
    /// Those of the processes `pids`, as the agent sees them.
    pub fn of(pids: &[i32]) -> Self {
        // Threads may have descriptors of their own.
        let holders =
            pids.iter().flat_map(|pid| tables::holders(*pid, Common::Descriptors).unwrap_or(vec![*pid]));
        let peers = Peers::of_processes(&holders.collect::<Vec<_>>());
        Self { peers, pids: pids.to_vec(), mapped: OnceCell::new(), in_flight: RefCell::default() }
    }

    /// Whether the terminal that controls process `pid` is in the instance.
    pub(super) fn has_own_terminal(&self, pid: i32) -> Result<bool, TraceeError> {
        let session = tree::session(pid)?;
        Ok(session != 0 && terminals::controlling(pid)?.is_some())
    }

    /// Keeps descriptors that were found in a queue; returns the numbers that they have in the image.
    pub(super) fn keep(&self, found: Vec<OwnedFd>) -> Vec<RawFd> {
        let mut kept = self.in_flight.borrow_mut();
        let first = IN_FLIGHT + kept.len() as RawFd;
        let numbers = (first..first + found.len() as RawFd).collect();
        kept.extend(found);
        numbers
    }

    /// The number that the next descriptor which is found in a queue gets.
    pub(super) fn next_in_flight(&self) -> RawFd {
        IN_FLIGHT + self.in_flight.borrow().len() as RawFd
    }

    /// Which process has descriptor `number` of process `pid`, as the agent sees it, and under which number: for one that
    /// waits in a queue, this agent.
    pub(super) fn location(&self, pid: i32, number: RawFd) -> (i32, RawFd) {
        let kept = self.in_flight.borrow();
        match usize::try_from(number - IN_FLIGHT).ok().and_then(|index| kept.get(index)) {
            Some(ours) => (std::process::id() as i32, ours.as_raw_fd()),
            None => (pid, number),
        }
    }

    /// Whether any of them has mapped, and shares, the file without a name that has this inode and target.
    pub(super) fn is_mapped(&self, inode: u64, name: &str) -> Result<bool, TraceeError> {
        if self.mapped.get().is_none() {
            let mut mapped = BTreeSet::new();
            for &pid in &self.pids {
                let mappings = match layout::read_mappings(pid) {
                    Err(_) if tree::has_ended(pid) => continue,
                    mappings => mappings?,
                };
                let shared = mappings.into_iter().filter(|mapping| mapping.shared && mapping.is_object());
                mapped.extend(shared.map(|mapping| (mapping.inode, mapping.name)));
            }
            // Nobody else can have set it meanwhile: the cell is this thread's.
            let _ = self.mapped.set(mapped);
        }
        Ok(self.mapped.get().is_some_and(|mapped| mapped.contains(&(inode, name.to_owned()))))
    }
}
