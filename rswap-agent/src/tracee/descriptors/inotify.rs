//! inotify(7): what it watches, by the numbers that the program knows.
//!
//! The kernel tells the watched files by handles, which are looked up here. What happened to them and was not read yet can't
//! be put back: the program has to read it before the freeze.

use std::{
    fs,
    os::fd::{AsRawFd, RawFd},
};

use serde::{Deserialize, Serialize};

use super::{
    super::{TraceeError, remote::Remote},
    Look,
    info::Info,
};
use crate::sys::{handle, socket};

/// A watched file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// The program's number for it.
    pub number: i32,
    /// Its path.
    pub path: String,
    /// `IN_*`.
    pub mask: u32,
}

type Found = Result<Vec<Watch>, (String, &'static str)>;

/// More watches are not made one by one until their numbers come.
const NUMBER_LIMIT: i32 = 1 << 16;

/// What the descriptor that is looked at watches.
pub(super) fn describe(info: &Info, look: &Look<'_>) -> Result<Found, TraceeError> {
    let pid = look.pid;
    if look.contents {
        let waiting = socket::bytes_waiting(&look.ours()?).map_err(TraceeError::call("FIONREAD", pid))?;
        if waiting > 0 {
            let what = "an inotify with events to be read".to_owned();
            return Ok(Err((what, "try again when the program has read them")));
        }
    }
    let mut found = Vec::new();
    for line in info.text.lines().filter(|line| line.starts_with("inotify ")) {
        let refuse =
            || Ok(Err((format!("an inotify whose {line} can't be found"), "watch files that have a path")));
        let Some(told) = parse(line) else { return refuse() };
        let Some(path) = find(pid, &told) else { return refuse() };
        if told.number > NUMBER_LIMIT {
            let what = format!("an inotify that has made {} watches", told.number);
            return Ok(Err((what, "their numbers can't be reached: restart the program")));
        }
        found.push(Watch { number: told.number, path, mask: told.mask });
    }
    found.sort_by_key(|watch| watch.number);
    Ok(Ok(found))
}

/// A line of fdinfo: `inotify wd:1 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1
/// f_handle:7e9e0000640d1b6d`; numbers in hexadecimal.
#[derive(Debug, PartialEq, Eq)]
struct Told {
    number: i32,
    inode: u64,
    device: u64,
    mask: u32,
    handle_type: i32,
    handle: Vec<u8>,
}

fn parse(line: &str) -> Option<Told> {
    let text = |name: &str| line.split_whitespace().find_map(|word| word.strip_prefix(name));
    let hexadecimal = |name| u64::from_str_radix(text(name)?, 16).ok();
    let bytes = text("f_handle:")?;
    let pairs =
        bytes.as_bytes().chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
    Some(Told {
        number: i32::from_str_radix(text("wd:")?, 16).ok()?,
        inode: hexadecimal("ino:")?,
        device: hexadecimal("sdev:")?,
        mask: hexadecimal("mask:")? as u32,
        handle_type: hexadecimal("fhandle-type:")? as i32,
        handle: pairs.collect::<Option<_>>()?,
    })
}

/// The path of a watched file, through a mount of its file system that process `pid` sees.
fn find(pid: i32, told: &Told) -> Option<String> {
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).ok()?;
    // The kernel's own form of a device's number: 20 bits of minor.
    let device = format!("{}:{}", told.device >> 20, told.device & 0xf_ffff);
    for line in mounts.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.get(2) != Some(&device.as_str()) {
            continue;
        }
        let Some(mount) = words.get(4) else { continue };
        let Ok(root) = fs::File::open(format!("/proc/{pid}/root{mount}")) else { continue };
        let Ok(file) = handle::open(&root, told.handle_type, &told.handle) else { continue };
        let Ok(path) = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())) else { continue };
        let path = path.to_string_lossy().into_owned();
        let same = fs::symlink_metadata(format!("/proc/{pid}/root{path}"))
            .is_ok_and(|metadata| std::os::unix::fs::MetadataExt::ino(&metadata) == told.inode);
        if same {
            return Some(path);
        }
    }
    None
}

/// Makes it in the stub.
pub(super) fn make(remote: &mut Remote) -> Result<RawFd, TraceeError> {
    Ok(remote.call("inotify_init1", libc::SYS_inotify_init1, [0; 6])? as RawFd)
}

/// Lets it watch what it did, when nothing is made or opened any more. The kernel counts up: numbers in between are used and
/// given back.
pub(super) fn watch(remote: &mut Remote, inotify: RawFd, watches: &[Watch]) -> Result<(), TraceeError> {
    for watch in watches {
        let mut path = watch.path.as_bytes().to_vec();
        path.push(0);
        loop {
            let at = remote.put(0, &path)?;
            let args = [inotify as u64, at, watch.mask.into(), 0, 0, 0];
            let number = remote.call("inotify_add_watch", libc::SYS_inotify_add_watch, args)? as i32;
            if number == watch.number {
                break;
            }
            if number > watch.number {
                let text = format!("{} would be watched under another number", watch.path);
                return Err(TraceeError::Unsupported(text));
            }
            let args = [inotify as u64, number as u64, 0, 0, 0, 0];
            remote.call("inotify_rm_watch", libc::SYS_inotify_rm_watch, args)?;
        }
    }
    // Of a watch that is given back the kernel says so.
    let ours = remote.share_descriptor(inotify)?;
    let mut told = [0; 4096];
    while socket::bytes_waiting(&ours).map_err(TraceeError::call("FIONREAD", remote.tid()))? > 0 {
        nix::unistd::read(&ours, &mut told)
            .map_err(|error| TraceeError::call("reading an inotify", remote.tid())(error.into()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_watch_is_read() {
        let line = "inotify wd:1f ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e00006";
        let told = parse(line).expect("a watch");
        assert_eq!((told.number, told.inode, told.device, told.mask), (0x1f, 0x9e7e, 0x80_0013, 0x800_afce));
        assert_eq!(told.handle, [0x7e, 0x9e, 0, 0, 6]);
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "(\\PC| ){0,120}") {
            parse(&text);
        }
    }
}
