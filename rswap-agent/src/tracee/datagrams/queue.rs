//! What waits in a UDP socket, without taking it out.
//!
//! An empty datagram can be looked at once only: the kernel marks it, and skips it whenever somebody looks from an offset again
//! (`__skb_try_recv_from_queue`). So what was found is kept, for the next look after a move that did not happen.

use std::{
    io,
    net::IpAddr,
    os::fd::OwnedFd,
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{
    Datagram, QUEUE_LIMIT,
    seen::{Seen, Store},
};
use crate::sys::{datagram, socket};

/// What waits, or what stands against it and what would help.
pub(super) type Peeked = Result<Vec<Datagram>, (String, &'static str)>;

/// Whether anybody may have read from the socket since the last look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Readers {
    Some,
    None,
}

static SEEN: Mutex<Store> = Mutex::new(Store::new());

fn seen() -> MutexGuard<'static, Store> {
    SEEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps what was found in files below `directory`, for agents to come; `boot` tells this run of the kernel from others.
pub fn keep_in(directory: &Path, boot: &str) -> io::Result<()> {
    *seen() = Store::open(directory, boot)?;
    Ok(())
}

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
    let cookie = socket::option_bytes(ours, libc::SOL_SOCKET, libc::SO_COOKIE, 8)?;
    let cookie = cookie.first_chunk().map_or(0, |cookie| u64::from_ne_bytes(*cookie));
    let memory_bytes = || -> io::Result<u32> {
        let memory = socket::option_bytes(ours, libc::SOL_SOCKET, libc::SO_MEMINFO, 64)?;
        Ok(memory.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes)))
    };
    if memory_bytes()? == 0 {
        seen().is_empty_now(cookie)?;
        return Ok(Ok(Vec::new()));
    }
    let Some(before) = seen().begin(cookie)? else {
        return refuse("a UDP socket with empty datagrams whose places were lost");
    };
    let mut shown = Vec::new();
    let stands_against = match look(ours, &mut shown)? {
        Ok(first) => {
            let memory_bytes = memory_bytes()?;
            let unchanged = before.as_ref().is_some_and(|seen| seen.memory_bytes == memory_bytes);
            let queue = before.as_ref().map_or(&[][..], |seen| &seen.queue);
            match resolve(queue, shown.clone(), first, unchanged, readers) {
                Some(queue) => {
                    let kept = Seen { queue: queue.clone(), memory_bytes };
                    seen().finish(cookie, Some(kept).filter(|kept| kept.queue.iter().any(is_empty)))?;
                    return Ok(Ok(queue));
                }
                None => "a UDP socket with empty datagrams that were looked at before",
            }
        }
        Err(what) => what,
    };
    // Empty ones that were shown now won't be again, and where they are among others may change before the next look.
    if !shown.iter().any(is_empty) {
        seen().finish(cookie, before)?;
    }
    refuse(stands_against)
}

/// Adds all datagrams that are shown to `shown`, and returns the first one, which is always shown, if it is looked for without
/// an offset; or why they can't be carried.
fn look(ours: &OwnedFd, shown: &mut Vec<Datagram>) -> io::Result<Result<Option<Datagram>, &'static str>> {
    let mut total = 0;
    loop {
        let datagram = match next(ours)? {
            Ok(Some(datagram)) => datagram,
            Ok(None) => break,
            Err(what) => return Ok(Err(what)),
        };
        total += datagram.data.len();
        shown.push(datagram);
        if total > QUEUE_LIMIT {
            return Ok(Err("a UDP socket with a very long queue"));
        }
    }
    socket::set_option(ours, libc::SOL_SOCKET, libc::SO_PEEK_OFF, -1)?;
    next(ours)
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
