//! What of TCP can't be carried: connections that nobody has accepted yet, and those that the program has closed while data
//! is still on its way, neither of which has a descriptor; and those that a program is making.
//!
//! All end by themselves, in a round trip as a rule. So before the freeze, while program and network go on, listening
//! sockets take no *new* connections for a moment (their peers try again a second later and find the destination), and
//! what is under way comes to its end. What is left when the time is up stops the migration: none of it is lost.

use std::{
    fs,
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use super::{TraceeError, read_proc, sockets::has_own_network, tables, tcp};
use crate::sys::{
    filter,
    process::{self, Common},
    socket, tcp as kernel,
};

const TCP_SYN_SENT: u8 = 2;
const TCP_SYN_RECV: u8 = 3;
const TCP_LISTEN: u8 = 10;
/// FIN_WAIT1, LAST_ACK and CLOSING: the peer has not acknowledged everything.
const ENDING: [u8; 3] = [4, 9, 11];
/// Between two looks.
const NAP: Duration = Duration::from_millis(2);

/// Keeps new connections away from a process until it is dropped.
#[derive(Debug)]
pub struct Settling {
    pid: i32,
    listeners: Vec<OwnedFd>,
}

/// What is not settled yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unsettled {
    /// Made, and not accepted by the program.
    pub waiting: u32,
    /// Being made by a peer.
    pub half_open: u32,
    /// Being made by the program.
    pub connecting: u32,
    /// Closed by the program, with data (or its end) not acknowledged.
    pub closing: u32,
}

impl Settling {
    /// Begins to keep new connections away from process `pid`.
    ///
    /// # Errors
    /// More is queued in its connections than can be carried.
    pub fn begin(pid: i32) -> Result<Self, TraceeError> {
        let mut settling = Self { pid, listeners: Vec::new() };
        if !has_own_network(pid)? {
            return Ok(settling);
        }
        let mut bytes = 0;
        for ours in sockets(pid)? {
            match socket::tcp_info(&ours).map_err(TraceeError::call("TCP_INFO", pid))?.state {
                TCP_LISTEN => {
                    filter::take_no_connections(&ours).map_err(TraceeError::call("SO_ATTACH_FILTER", pid))?;
                    settling.listeners.push(ours);
                }
                _ => {
                    let queued = kernel::queued(&ours).map_err(TraceeError::call("SIOCOUTQ", pid))?;
                    bytes += queued.received as usize + queued.unacknowledged as usize;
                }
            }
        }
        tcp::require_room(bytes)?;
        Ok(settling)
    }

    /// The process.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Waits until all is settled, `limit` at most. With `network`, also what is in the network's tables: processes that
    /// have one network in common need that only once, and it takes milliseconds.
    pub fn wait(&self, network: bool, limit: Duration) -> Result<Unsettled, TraceeError> {
        let deadline = Instant::now() + limit;
        loop {
            let left = self.look(network)?;
            if left == Unsettled::default() || Instant::now() > deadline {
                return Ok(left);
            }
            std::thread::sleep(NAP);
        }
    }

    fn look(&self, network: bool) -> Result<Unsettled, TraceeError> {
        let mut left = Unsettled::default();
        for listener in &self.listeners {
            left.waiting +=
                socket::tcp_info(listener).map_err(TraceeError::call("TCP_INFO", self.pid))?.waiting;
        }
        if network && has_own_network(self.pid)? {
            for table in ["tcp", "tcp6"] {
                count(&read_proc(&format!("/proc/{}/net/{table}", self.pid))?, &mut left);
            }
        }
        Ok(left)
    }

    /// Refuses to lose anything that a peer may rely on; the process is stopped and its port down. `network` is as for
    /// [`Self::wait`].
    ///
    /// A connection that is half open is nothing to rely on yet: its peer is refused, or tries again. One that the program is
    /// making has a descriptor, and is refused with it.
    pub fn require(&self, network: bool) -> Result<(), TraceeError> {
        let Unsettled { waiting, closing, .. } = self.look(network)?;
        if waiting == 0 && closing == 0 {
            return Ok(());
        }
        Err(TraceeError::Unsupported(format!(
            "{waiting} TCP connections wait to be accepted by the program, and {closing} that it has closed still have \
             data on the way: they can't be carried; try again"
        )))
    }
}

impl Drop for Settling {
    fn drop(&mut self) {
        if self.listeners.is_empty() {
            return;
        }
        // Not only the listeners: what they accepted meanwhile has the filter, too.
        match sockets(self.pid) {
            Ok(sockets) => lift_filters(&sockets),
            // The process may have ended.
            Err(error) => tracing::debug!(%error, "no filters are removed"),
        }
    }
}

/// Removes our filters from `sockets`.
fn lift_filters(sockets: &[OwnedFd]) {
    for ours in sockets.iter().filter(|ours| filter::takes_no_connections(ours)) {
        if let Err(error) = filter::detach(ours) {
            tracing::error!(%error, "a socket keeps the filter that keeps new connections away");
        }
    }
}

/// Undoes what an agent that was killed in a migration has left at the TCP sockets of process `pid`.
pub fn recover(pid: i32) -> Result<(), TraceeError> {
    let sockets = sockets(pid)?;
    lift_filters(&sockets);
    for ours in &sockets {
        if tcp::is_held(ours) {
            tcp::let_go(ours, 1);
        }
    }
    Ok(())
}

/// Duplicates of the TCP sockets of `pid`, those too that only a thread has.
fn sockets(pid: i32) -> Result<Vec<OwnedFd>, TraceeError> {
    let holders = tables::holders(pid, Common::Descriptors)?;
    let found: Result<Vec<_>, _> = holders.into_iter().map(sockets_in).collect();
    Ok(found?.into_iter().flatten().collect())
}

/// Those in the table of one process or thread.
fn sockets_in(pid: i32) -> Result<Vec<OwnedFd>, TraceeError> {
    let path = format!("/proc/{pid}/fd");
    let pidfd = process::pidfd_open(pid).map_err(TraceeError::call("pidfd_open", pid))?;
    let mut sockets = Vec::new();
    for entry in fs::read_dir(&path).map_err(TraceeError::proc(path.as_str()))? {
        let entry = entry.map_err(TraceeError::proc(path.as_str()))?;
        let is_socket =
            fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"));
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let Some(fd) = number.filter(|_| is_socket) else { continue };
        // The program runs, and may have closed it.
        let Ok(ours) = process::pidfd_getfd(&pidfd, fd) else { continue };
        if socket::option(&ours, libc::SOL_SOCKET, libc::SO_PROTOCOL).is_ok_and(|p| p == libc::IPPROTO_TCP) {
            sockets.push(ours);
        }
    }
    Ok(sockets)
}

/// Counts what is under way in a table like `/proc/net/tcp`.
fn count(table: &str, left: &mut Unsettled) {
    for line in table.lines().skip(1) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (Some(state), Some(queues), Some(inode)) = (words.get(3), words.get(4), words.get(9)) else {
            continue;
        };
        let state = u8::from_str_radix(state, 16).unwrap_or_default();
        let to_be_sent =
            queues.split(':').next().is_some_and(|bytes| bytes.bytes().any(|digit| digit != b'0'));
        // Without an inode it has no descriptor.
        if state == TCP_SYN_RECV {
            left.half_open += 1;
        } else if state == TCP_SYN_SENT {
            left.connecting += 1;
        } else if ENDING.contains(&state) && *inode == "0" && to_be_sent {
            left.closing += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TABLE: &str = "\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:18EB 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4242 1 0 100 0 0 10 0
   1: 0A00580A:18EB 6400580A:9C40 01 00000010:00000000 01:00000014 00000000     0        0 4243 1 0 20 4 30 10 -1
   2: 0A00580A:18EB 6400580A:9C41 03 00000000:00000000 01:00000014 00000000     0        0 0 1 0
   3: 0A00580A:18EB 6400580A:9C42 04 00000001:00000000 01:00000014 00000000     0        0 0 1 0
   4: 0A00580A:18EB 6400580A:9C43 04 00000001:00000000 01:00000014 00000000     0        0 4244 1 0
   5: 0A00580A:18EB 6400580A:9C44 05 00000000:00000000 01:00000014 00000000     0        0 0 1 0
   6: 0A00580A:9C45 6400580A:0050 02 00000001:00000000 01:00000014 00000000     0        0 4245 1 0
";

    #[test]
    fn what_is_under_way_is_counted() {
        let mut left = Unsettled::default();
        count(TABLE, &mut left);
        assert_eq!(left, Unsettled { waiting: 0, half_open: 1, connecting: 1, closing: 1 });
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in ".{0,300}") {
            count(&text, &mut Unsettled::default());
        }
    }
}
