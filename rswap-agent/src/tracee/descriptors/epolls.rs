//! epoll(7): by level and by edge, one-shot, nested.
//!
//! One that was armed for one event and has had it is disarmed: the kernel keeps only its mode. Added anew it would be
//! armed, so it is added first of all, for any event, and let have one.

use std::os::fd::RawFd;

use serde::{Deserialize, Serialize};

use super::{
    super::{TraceeError, remote::Remote},
    Look,
    info::Info,
};
use crate::sys::process;

/// Something that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watched {
    /// The number that it was added under.
    pub number: RawFd,
    /// A number that it has now: the one above may be closed by now, or another's.
    pub now: RawFd,
    /// `EPOLL*`.
    pub events: u32,
    /// The program's own number for it.
    pub data: u64,
}

impl Watched {
    /// It was armed for one event, and has had it.
    fn is_disarmed(&self) -> bool {
        let modes = (libc::EPOLLWAKEUP | libc::EPOLLONESHOT | libc::EPOLLET | libc::EPOLLEXCLUSIVE) as u32;
        self.events & libc::EPOLLONESHOT as u32 != 0 && self.events & !modes == 0
    }
}

/// What fdinfo tells: `tfd: 5 events: 19 data: 5 pos:0 ino:61 sdev:8`, numbers but the first in hexadecimal.
fn parse(text: &str) -> Vec<(RawFd, u32, u64)> {
    let parse = |line: &str| {
        let mut words = line.strip_prefix("tfd:")?.split_whitespace();
        let fd = words.next()?.parse().ok()?;
        let events = u32::from_str_radix(words.nth(1)?, 16).ok()?;
        let data = u64::from_str_radix(words.nth(1)?, 16).ok()?;
        Some((fd, events, data))
    };
    text.lines().filter_map(parse).collect()
}

type Found = Result<Vec<Watched>, (String, &'static str)>;

/// What the epoll that is looked at watches; `all`: the descriptors of its process.
pub(super) fn watched(info: &Info, look: &Look<'_>, all: &[RawFd]) -> Result<Found, TraceeError> {
    let mut found: Vec<Watched> = Vec::new();
    for (number, events, data) in parse(&info.text) {
        // Under one number several may have been added, one after the other, of which the former live on.
        let before = found.iter().filter(|other| other.number == number).count() as u32;
        let is_it = |fd: RawFd| {
            process::is_watched_by(look.pid, fd, look.fd, number, before)
                .map_err(TraceeError::call("kcmp of an epoll", look.pid))
        };
        let mut now = None;
        for &fd in std::iter::once(&number).chain(all) {
            // One that is closed is none.
            if is_it(fd).unwrap_or(false) {
                now = Some(fd);
                break;
            }
        }
        match now {
            Some(now) => found.push(Watched { number, now, events, data }),
            // A program that runs closes and adds all the time.
            None if !look.contents => {}
            None => {
                let what =
                    format!("an epoll that watches what was descriptor {number}, and is open elsewhere only");
                return Ok(Err((what, "let the program remove it from the epoll before it closes it")));
            }
        }
    }
    Ok(Ok(found))
}

/// Lets `epoll` watch what it did; all of that is there already. `free`: a number that nobody uses.
pub(super) fn watch(
    remote: &mut Remote,
    epoll: RawFd,
    watched: &[Watched],
    free: RawFd,
) -> Result<(), TraceeError> {
    let (disarmed, armed): (Vec<&Watched>, Vec<&Watched>) = watched.iter().partition(|one| one.is_disarmed());
    for one in &disarmed {
        let any = (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLPRI) as u32;
        add(remote, epoll, one, one.events | any, free)?;
    }
    disarm(remote, epoll, &disarmed)?;
    for one in &armed {
        add(remote, epoll, one, one.events, free)?;
    }
    Ok(())
}

/// Lets each of `disarmed` have its event. One that has none to come can't be told from one that is disarmed, unless its
/// other end goes away before the program arms it again.
fn disarm(remote: &mut Remote, epoll: RawFd, disarmed: &[&Watched]) -> Result<(), TraceeError> {
    /// Of the scratch page, in `struct epoll_event`s.
    const AT_ONCE: usize = 256;
    let mut left = disarmed.len();
    while left > 0 {
        let at = remote.put(0, &[])?;
        let args = [epoll as u64, at, AT_ONCE as u64, 0, 0, 0];
        match remote.call("epoll_wait", libc::SYS_epoll_wait, args)? {
            0 => break,
            got => left = left.saturating_sub(got as usize),
        }
    }
    if left == 0 {
        return Ok(());
    }
    // Those that had no event are armed for errors and hang-ups alone, which the kernel can't be kept from reporting.
    let armed = remote_armed(remote, epoll)?;
    for one in disarmed.iter().filter(|one| armed.contains(&one.number)) {
        let at = event(remote, one.events, one.data)?;
        let args = [epoll as u64, libc::EPOLL_CTL_MOD as u64, one.now as u64, at, 0, 0];
        remote.call("epoll_ctl", libc::SYS_epoll_ctl, args)?;
    }
    Ok(())
}

/// The numbers of what is still armed.
fn remote_armed(remote: &Remote, epoll: RawFd) -> Result<Vec<RawFd>, TraceeError> {
    let text = super::super::read_proc(&format!("/proc/{}/fdinfo/{epoll}", remote.tid()))?;
    let events = (libc::EPOLLIN | libc::EPOLLOUT) as u32;
    Ok(parse(&text)
        .into_iter()
        .filter(|(_, told, _)| told & events != 0)
        .map(|(number, ..)| number)
        .collect())
}

fn event(remote: &mut Remote, events: u32, data: u64) -> Result<u64, TraceeError> {
    let mut event = [0; 12];
    event[..4].copy_from_slice(&events.to_ne_bytes());
    event[4..].copy_from_slice(&data.to_ne_bytes());
    remote.put(0, &event)
}

fn add(
    remote: &mut Remote,
    epoll: RawFd,
    one: &Watched,
    events: u32,
    free: RawFd,
) -> Result<(), TraceeError> {
    if one.number == one.now {
        let at = event(remote, events, one.data)?;
        let args = [epoll as u64, libc::EPOLL_CTL_ADD as u64, one.number as u64, at, 0, 0];
        return remote.call("epoll_ctl", libc::SYS_epoll_ctl, args).map(|_| ());
    }
    // It is known to the epoll under its old number, which is another's now, or nobody's.
    let dup = |remote: &mut Remote, from: RawFd, to: RawFd| {
        remote.call("dup3", libc::SYS_dup3, [from as u64, to as u64, libc::O_CLOEXEC as u64, 0, 0, 0])
    };
    let close =
        |remote: &mut Remote, fd: RawFd| remote.call("close", libc::SYS_close, [fd as u64, 0, 0, 0, 0, 0]);
    let path = format!("/proc/{}/fd/{}", remote.tid(), one.number);
    let taken = std::fs::symlink_metadata(path).is_ok();
    let closes = match taken {
        true => {
            let args = [one.number as u64, libc::F_GETFD as u64, 0, 0, 0, 0];
            let flags = remote.call("fcntl", libc::SYS_fcntl, args)?;
            dup(remote, one.number, free)?;
            flags
        }
        false => 0,
    };
    dup(remote, one.now, one.number)?;
    let at = event(remote, events, one.data)?;
    let args = [epoll as u64, libc::EPOLL_CTL_ADD as u64, one.number as u64, at, 0, 0];
    remote.call("epoll_ctl", libc::SYS_epoll_ctl, args)?;
    if !taken {
        return close(remote, one.number).map(|_| ());
    }
    dup(remote, free, one.number)?;
    let args = [one.number as u64, libc::F_SETFD as u64, closes, 0, 0, 0];
    remote.call("fcntl", libc::SYS_fcntl, args)?;
    close(remote, free).map(|_| ())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_watched_is_read() {
        let text = "pos:\t0\ntfd:        5 events:       19 data:                5  pos:0 ino:61 sdev:8\n";
        assert_eq!(parse(text), [(5, 0x19, 5)]);
    }

    #[test]
    fn one_that_had_its_event_is_told_from_one_that_waits() {
        let one = |events| Watched { number: 5, now: 5, events, data: 0 };
        assert!(one(libc::EPOLLONESHOT as u32).is_disarmed());
        assert!(!one((libc::EPOLLONESHOT | libc::EPOLLIN) as u32).is_disarmed());
        assert!(!one(libc::EPOLLET as u32).is_disarmed());
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "tfd:.{0,80}") {
            parse(&text);
        }
    }
}
