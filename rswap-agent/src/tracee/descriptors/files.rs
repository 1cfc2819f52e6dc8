//! Files that are opened by their path: regular ones, directories, devices without state, and whatever `O_PATH` stands for.

use std::{
    fs::{self, File},
    os::{
        fd::RawFd,
        unix::fs::{FileTypeExt, MetadataExt},
    },
};

use serde::{Deserialize, Serialize};

use super::{
    super::{TraceeError, files as contents, image::DescriptorKind, remote::Remote, terminals},
    Look, deleted, fifos,
    info::{Info, Kind},
    signals,
};

/// Character devices without state: (major, minor).
const HARMLESS_DEVICES: [(u64, u64); 5] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)];

/// The device by which pairs of pseudo-terminals are made.
const PTMX: (u64, u64) = (5, 2);
/// `/dev/tty`.
const CONTROLLING: (u64, u64) = (5, 0);

const REMEDY: &str = "close the device or terminal, or start the instance with --detach";

/// Which file of this kernel something is, for what means nothing elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// Device and inode.
    pub inode: (u64, u64),
}

/// A descriptor with a path.
pub(super) fn describe(info: &Info, look: &Look<'_>) -> Result<Kind, TraceeError> {
    let metadata = match fs::metadata(format!("/proc/{}/fd/{}", look.pid, look.fd)) {
        Ok(metadata) => metadata,
        Err(error) => return Ok(Err((format!("{}: {error}", info.target), "make the file readable"))),
    };
    let file_type = metadata.file_type();
    let nameless = metadata.nlink() == 0;
    if nameless && (file_type.is_file() || info.flags & libc::O_PATH != 0) {
        return deleted::describe(info, look, &metadata);
    }
    let path = info.target.clone();
    if info.flags & libc::O_PATH != 0 {
        return Ok(Ok(DescriptorKind::File { path, position: 0, size: None, digest: None }));
    }
    let device = (libc::major(metadata.rdev()).into(), libc::minor(metadata.rdev()).into());
    if file_type.is_char_device() && device == PTMX {
        return master(look);
    }
    if file_type.is_char_device() && (136..=143).contains(&device.0) {
        let number = terminals::describe_slave(look.pid, &metadata, &path);
        return Ok(number.map(|number| DescriptorKind::Slave { number }));
    }
    if file_type.is_char_device() && device == CONTROLLING {
        // It is opened anew by a process whose controlling terminal is the same.
        return Ok(match look.around.has_own_terminal(look.pid)? {
            true => Ok(DescriptorKind::File { path, position: 0, size: None, digest: None }),
            false => Err(("/dev/tty of a terminal outside of the instance".into(), REMEDY)),
        });
    }
    if file_type.is_char_device() && !HARMLESS_DEVICES.contains(&device) {
        return Ok(Err((format!("device {path}"), REMEDY)));
    }
    if file_type.is_block_device() {
        return Ok(Err((format!("block device {path}"), "its contents are this host's: close it")));
    }
    if nameless {
        return Ok(Err((format!("deleted {path}"), "only regular files are carried without a name")));
    }
    if file_type.is_fifo() {
        return fifos::describe(info, look, metadata.ino());
    }
    if file_type.is_dir() && signals::describe(&look.ours()?, look.pid)?.is_some() {
        let remedy = "the kernel doesn't tell what F_NOTIFY watches, if it does: use inotify(7)";
        return Ok(Err((format!("directory {path} that sends signals (F_NOTIFY)"), remedy)));
    }
    if file_type.is_dir() && info.position != 0 {
        let place = Place { inode: (metadata.dev(), metadata.ino()) };
        return Ok(Ok(DescriptorKind::Directory { path, position: info.position, place }));
    }
    let size = file_type.is_file().then_some(metadata.len());
    Ok(Ok(DescriptorKind::File { path, position: info.position, size, digest: None }))
}

fn master(look: &Look<'_>) -> Result<Kind, TraceeError> {
    let found = terminals::describe_master(&look.ours()?, look.pid, look.contents)?;
    Ok(found.map(|(number, terminal)| DescriptorKind::Master { number, terminal: terminal.map(Box::new) }))
}

/// Opens it again in the stub. `size` and `digest`: what a regular file must be.
pub(super) fn open(
    remote: &mut Remote,
    path: &str,
    flags: i32,
    position: i64,
    (size, digest): (Option<u64>, Option<u128>),
) -> Result<RawFd, TraceeError> {
    // A log, which begins anew where there is none.
    let begins = size.is_none() && flags & libc::O_APPEND != 0 && flags & libc::O_PATH == 0;
    let made = open_or_make(remote, path, flags, begins)?;
    if let Some(size) = size {
        let ours = File::from(remote.share_descriptor(made)?);
        let here = ours.metadata().map_err(TraceeError::call("fstat", remote.tid()))?.len();
        if here != size {
            let text = format!("{path} has {here} bytes at the destination and {size} at the source");
            return Err(TraceeError::Unsupported(text));
        }
        if let Some(digest) = digest
            && contents::digest_of(&ours).map_err(TraceeError::proc(path))? != digest
        {
            let text = format!("{path} is another file at the destination than at the source");
            return Err(TraceeError::Unsupported(text));
        }
        if flags & libc::O_PATH == 0 && position != 0 {
            seek(remote, made, position)?;
        }
    }
    Ok(made)
}

/// Opens a directory of which some entries were read. How far is a number of its file system's own.
pub(super) fn open_directory(
    remote: &mut Remote,
    path: &str,
    flags: i32,
    position: i64,
    place: Place,
) -> Result<RawFd, TraceeError> {
    let made = open_path(remote, path, flags)?;
    let ours = File::from(remote.share_descriptor(made)?);
    let here = ours.metadata().map_err(TraceeError::call("fstat", remote.tid()))?;
    if (here.dev(), here.ino()) != place.inode {
        let text = format!(
            "{path} is being read, and is another directory at the destination: try again when it is read"
        );
        return Err(TraceeError::Unsupported(text));
    }
    seek(remote, made, position)?;
    Ok(made)
}

fn seek(remote: &mut Remote, made: RawFd, position: i64) -> Result<(), TraceeError> {
    let args = [made as u64, position as u64, libc::SEEK_SET as u64, 0, 0, 0];
    remote.call("lseek", libc::SYS_lseek, args).map(|_| ())
}

/// Opens a path in the stub, and makes nothing.
pub(super) fn open_path(remote: &mut Remote, path: &str, flags: i32) -> Result<RawFd, TraceeError> {
    open_or_make(remote, path, flags, false)
}

fn open_or_make(remote: &mut Remote, path: &str, flags: i32, make: bool) -> Result<RawFd, TraceeError> {
    let mut name = path.as_bytes().to_vec();
    name.push(0);
    let at = remote.put(0, &name)?;
    // A file that was opened by O_TMPFILE is opened by its name now.
    let made_so = flags & libc::O_TMPFILE == libc::O_TMPFILE;
    let flags = if made_so { flags & !libc::O_TMPFILE } else { flags };
    let flags = flags & !(libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC) | libc::O_NOCTTY;
    let flags = if make { flags | libc::O_CREAT } else { flags };
    let args = [libc::AT_FDCWD as u64, at, flags as u64, 0o640, 0, 0];
    match remote.call("openat", libc::SYS_openat, args) {
        Err(TraceeError::Remote { source, .. }) => {
            // Descriptors come before threads. Nobody keeps such a file open for long.
            let of_thread = path.starts_with("/proc/") && path.contains("/task/");
            let remedy = if of_thread { ": try again when the thread's file is closed" } else { "" };
            let text = format!("{path} can't be opened at the destination: {source}{remedy}");
            Err(TraceeError::Unsupported(text))
        }
        made => made.map(|made| made as RawFd),
    }
}
