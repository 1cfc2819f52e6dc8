//! What waits in a UDP socket, without taking it out.
//!
//! An empty datagram can be looked at once only: the kernel marks it, and skips it whenever somebody looks from an offset again
//! (`__skb_try_recv_from_queue`). So what was found is kept, for the next look after a move that did not happen.

use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    os::fd::OwnedFd,
    sync::{Mutex, PoisonError},
};

use super::{Datagram, QUEUE_LIMIT};
use crate::sys::{datagram, socket};

/// Queues that are kept at most: those of the oldest sockets are forgotten first.
const KEPT: usize = 10_000;

/// What waits, or what stands against it and what would help.
pub(super) type Peeked = Result<Vec<Datagram>, (String, &'static str)>;

/// Whether anybody may have read from the socket since the last look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Readers {
    Some,
    None,
}

/// A queue with an empty datagram in it, as it was found.
#[derive(Clone, Debug)]
struct Seen {
    queue: Vec<Datagram>,
    /// Memory that the kernel counts for it, in bytes.
    memory_bytes: u32,
}

/// By the sockets' cookies.
static SEEN: Mutex<BTreeMap<u64, Seen>> = Mutex::new(BTreeMap::new());

/// Copies what is queued, and leaves it there.
pub(super) fn peek(ours: &OwnedFd, domain: i32, readers: Readers) -> io::Result<Peeked> {
    let destination = match domain {
        libc::AF_INET => (libc::IPPROTO_IP, libc::IP_PKTINFO),
        _ => (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    };
    let temporary = [(libc::SOL_SOCKET, libc::SO_PEEK_OFF, 0), (destination.0, destination.1, 1)];
    let mut before = Vec::new();
    for (level, name, value) in temporary {
        before.push((level, name, socket::option(ours, level, name)?));
        socket::set_option(ours, level, name, value)?;
    }
    let peeked = all(ours, readers);
    for (level, name, value) in before {
        socket::set_option(ours, level, name, value)?;
    }
    peeked
}

fn all(ours: &OwnedFd, readers: Readers) -> io::Result<Peeked> {
    let refuse = |what: &str| Ok(Err((what.to_owned(), "try again when the program has read from it")));
    let mut shown = Vec::new();
    let mut total = 0;
    loop {
        let datagram = match next(ours)? {
            Ok(Some(datagram)) => datagram,
            Ok(None) => break,
            Err(what) => return refuse(what),
        };
        total += datagram.data.len();
        if total > QUEUE_LIMIT {
            return refuse("a UDP socket with a very long queue");
        }
        shown.push(datagram);
    }
    // The first one is shown always, if it is looked for without an offset.
    socket::set_option(ours, libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1)?;
    let first = match next(ours)? {
        Ok(first) => first,
        Err(what) => return refuse(what),
    };
    let cookie = socket::option_bytes(ours, libc::SOL_SOCKET, libc::SO_COOKIE, 8)?;
    let cookie = cookie.first_chunk().map_or(0, |cookie| u64::from_ne_bytes(*cookie));
    let memory = socket::option_bytes(ours, libc::SOL_SOCKET, libc::SO_MEMINFO, 64)?;
    let memory_bytes = memory.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
    let mut kept = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    let seen = kept.remove(&cookie);
    let unchanged = seen.as_ref().is_some_and(|seen| seen.memory_bytes == memory_bytes);
    let before = seen.as_ref().map_or(&[][..], |seen| &seen.queue);
    let Some(queue) = resolve(before, shown, first, unchanged, readers) else {
        kept.extend(seen.map(|seen| (cookie, seen)));
        return refuse("a UDP socket with empty datagrams that were looked at before");
    };
    if queue.iter().any(is_empty) {
        kept.insert(cookie, Seen { queue: queue.clone(), memory_bytes });
    }
    if kept.len() > KEPT {
        kept.pop_first();
    }
    Ok(Ok(queue))
}

/// What the next look shows, or why it can't be carried.
fn next(ours: &OwnedFd) -> io::Result<Result<Option<Datagram>, &'static str>> {
    let Some(datagram::Peeked { data, from, to }) = datagram::peek(ours)? else { return Ok(Ok(None)) };
    let (Some(from), Some(to)) = (from, to) else {
        return Ok(Err("a UDP socket with a datagram from nowhere"));
    };
    let broadcast = matches!(to, IpAddr::V4(to) if to.is_broadcast());
    if to.is_multicast() || broadcast {
        return Ok(Err("a UDP socket with datagrams to a group to be read"));
    }
    Ok(Ok(Some(Datagram { from, to, data })))
}

fn is_empty(datagram: &Datagram) -> bool {
    datagram.data.is_empty()
}

/// What is queued, if that is certain. `before` is what was queued at the look before, `shown` what this one shows, which leaves out
/// the empty ones that were looked at already, and `first` the first one, which is always shown.
fn resolve(
    before: &[Datagram],
    mut shown: Vec<Datagram>,
    first: Option<Datagram>,
    unchanged: bool,
    readers: Readers,
) -> Option<Vec<Datagram>> {
    let Some(first) = first else { return Some(Vec::new()) };
    let hidden = is_empty(&first) && shown.first() != Some(&first);
    let with_contents = |queue: &[Datagram]| -> Vec<Datagram> {
        queue.iter().filter(|datagram| !is_empty(datagram)).cloned().collect()
    };
    let (was, is) = (with_contents(before), with_contents(&shown));
    if !before.iter().any(is_empty) {
        // Somebody else, the program itself, has looked at it.
        if hidden {
            shown.insert(0, first);
        }
        return Some(shown);
    }
    if readers == Readers::None || unchanged && was == is {
        // All of it is still there; what came since is behind it.
        let mut left = was.len();
        shown.retain(|datagram| {
            let old = left > 0;
            left -= usize::from(old && !is_empty(datagram));
            !old
        });
        return is.starts_with(&was).then(|| [before, &shown].concat());
    }
    // Has all of it been read? Then none of its ends is the beginning of what is there.
    let some_is_left = (0..was.len()).any(|read| is.starts_with(&was[read..]));
    (!some_is_left && !hidden).then_some(shown)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(all: &[&str]) -> Vec<Datagram> {
        let from = "127.0.0.1:7".parse().expect("an address");
        let to = IpAddr::from([127, 0, 0, 1]);
        all.iter().map(|text| Datagram { from, to, data: text.as_bytes().to_vec() }).collect()
    }

    fn resolved(
        before: &[&str],
        shown: &[&str],
        first: &str,
        unchanged: bool,
        readers: Readers,
    ) -> Option<Vec<Datagram>> {
        resolve(&queue(before), queue(shown), queue(&[first]).pop(), unchanged, readers)
    }

    #[test]
    fn empty_datagrams_are_remembered_while_nobody_reads() {
        let there = Some(queue(&["a", "", "b"]));
        assert_eq!(resolved(&[], &["a", "", "b"], "a", false, Readers::Some), there);
        assert_eq!(resolved(&["a", "", "b"], &["a", "b"], "a", true, Readers::Some), there);
        // While they are put in, one after the other.
        assert_eq!(resolved(&["a", ""], &["a", "b"], "a", false, Readers::None), there);
        assert_eq!(
            resolved(&["", "a"], &["a", "", "b"], "", false, Readers::None),
            Some(queue(&["", "a", "", "b"]))
        );
        assert_eq!(resolved(&["a", ""], &["b"], "b", false, Readers::None), None);
    }

    #[test]
    fn what_the_program_has_looked_at_is_found() {
        assert_eq!(resolved(&[], &["a"], "", false, Readers::Some), Some(queue(&["", "a"])));
        assert_eq!(resolved(&[], &["", "a"], "", false, Readers::Some), Some(queue(&["", "a"])));
    }

    #[test]
    fn nothing_is_guessed() {
        // One more has come, or one was read: where the empty one is now can't be told.
        assert_eq!(resolved(&["a", "", "b"], &["a", "b"], "a", false, Readers::Some), None);
        assert_eq!(resolved(&["a", "", "b"], &["a", "b", "c"], "a", false, Readers::Some), None);
        assert_eq!(resolved(&["a", "", "b"], &["b"], "", false, Readers::Some), None);
        assert_eq!(resolved(&["a", "b", ""], &["c"], "", false, Readers::Some), None);
        // All was read.
        assert_eq!(resolved(&["a", "", "b"], &["c", ""], "c", false, Readers::Some), Some(queue(&["c", ""])));
        assert_eq!(resolve(&queue(&["a", ""]), Vec::new(), None, false, Readers::Some), Some(Vec::new()));
    }

    #[test]
    fn the_kernel_shows_an_empty_datagram_once_and_this_again() {
        use std::net::UdpSocket;
        let server = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let client = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let send = |all: &[&str]| {
            for text in all {
                client.send_to(text.as_bytes(), server.local_addr().expect("a name")).expect("send");
            }
        };
        let ours = OwnedFd::from(server.try_clone().expect("a duplicate"));
        let look = || peek(&ours, libc::AF_INET, Readers::Some).expect("a look");
        let texts =
            || look().map(|queue| queue.into_iter().map(|datagram| datagram.data).collect::<Vec<_>>());
        send(&["a", "", "b"]);
        for _ in 0..3 {
            assert_eq!(texts(), Ok(vec![b"a".to_vec(), vec![], b"b".to_vec()]));
        }
        let read = || server.recv(&mut [0; 10]).expect("read");
        read();
        assert!(look().is_err_and(|(what, _)| what.contains("looked at before")));
        read();
        read();
        assert_eq!(texts(), Ok(vec![]));
        send(&["", "c"]);
        for _ in 0..3 {
            assert_eq!(texts(), Ok(vec![vec![], b"c".to_vec()]));
        }
    }
}
