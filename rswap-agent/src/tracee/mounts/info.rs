//! `/proc/PID/mountinfo`, as far as mounts are told apart and described by it.

use std::{collections::HashMap, ffi::OsString, os::unix::ffi::OsStringExt, path::PathBuf};

use nix::mount::MsFlags;
use procfs::process::{MountInfo, MountOptFields, Process};

use super::{super::TraceeError, Options};

/// Not among nix's (`MS_NOSYMFOLLOW`).
const NO_LINKS: u64 = 256;

/// One mount of a namespace.
#[derive(Clone, Debug)]
pub(super) struct Info {
    pub(super) id: i32,
    pub(super) parent: i32,
    pub(super) device: String,
    pub(super) root: PathBuf,
    pub(super) point: PathBuf,
    pub(super) kind: String,
    pub(super) source: String,
    pub(super) options: HashMap<String, Option<String>>,
    pub(super) super_options: HashMap<String, Option<String>>,
    pub(super) propagation: Vec<MountOptFields>,
}

impl Info {
    pub(super) fn of(mount: MountInfo) -> Self {
        Self {
            id: mount.mnt_id,
            parent: mount.pid,
            device: mount.majmin,
            root: unescaped(mount.root.as_bytes()),
            point: unescaped(mount.mount_point.as_os_str().as_encoded_bytes()),
            kind: mount.fs_type,
            source: mount.mount_source.unwrap_or_else(|| "none".to_owned()),
            options: mount.mount_options,
            super_options: mount.super_options,
            propagation: mount.opt_fields,
        }
    }

    /// Whether both are the same place of the same file system at the same point.
    pub(super) fn is_same(&self, other: &Self) -> bool {
        (&self.point, &self.root, &self.device) == (&other.point, &other.root, &other.device)
    }

    /// The mount's own flags, as mount(2) takes them.
    pub(super) fn flags(&self) -> u64 {
        let known = [
            ("ro", MsFlags::MS_RDONLY.bits()),
            ("nosuid", MsFlags::MS_NOSUID.bits()),
            ("nodev", MsFlags::MS_NODEV.bits()),
            ("noexec", MsFlags::MS_NOEXEC.bits()),
            ("noatime", MsFlags::MS_NOATIME.bits()),
            ("nodiratime", MsFlags::MS_NODIRATIME.bits()),
            ("relatime", MsFlags::MS_RELATIME.bits()),
            ("nosymfollow", NO_LINKS),
        ];
        let flags = known.into_iter().filter(|(name, _)| self.options.contains_key(*name));
        let flags = flags.fold(0, |flags, (_, flag)| flags | flag);
        let times = MsFlags::MS_NOATIME | MsFlags::MS_RELATIME;
        // Neither: every reading is noted.
        if flags & times.bits() == 0 { flags | MsFlags::MS_STRICTATIME.bits() } else { flags }
    }

    /// Options of the file system itself, in the order of their names.
    pub(super) fn own_options(&self) -> Options {
        let own =
            self.super_options.iter().filter(|(name, _)| !matches!(name.as_str(), "ro" | "rw" | "seclabel"));
        let mut own: Options = own.map(|(name, value)| (name.clone(), value.clone())).collect();
        own.sort();
        own
    }

    /// What is mounted on the host where it comes from appears in it, too.
    pub(super) fn follows(&self) -> bool {
        self.propagation.iter().any(|field| matches!(field, MountOptFields::Master(_)))
    }

    /// What is mounted in it appears elsewhere.
    pub(super) fn is_shared(&self) -> bool {
        self.propagation.iter().any(|field| matches!(field, MountOptFields::Shared(_)))
    }
}

/// Those of process `pid`'s namespace, in the kernel's order.
pub(super) fn read(pid: i32) -> Result<Vec<Info>, TraceeError> {
    let wrong = |error: procfs::ProcError| TraceeError::Proc {
        path: format!("/proc/{pid}/mountinfo"),
        problem: error.to_string(),
    };
    let all = Process::new(pid).and_then(|process| process.mountinfo()).map_err(wrong)?;
    Ok(all.into_iter().map(Info::of).collect())
}

/// The kernel writes blanks, tabs, newlines and backslashes as `\` and three octal digits.
fn unescaped(text: &[u8]) -> PathBuf {
    let mut found = Vec::with_capacity(text.len());
    let mut at = 0;
    while at < text.len() {
        let digits = text.get(at + 1..at + 4).filter(|_| text[at] == b'\\');
        let byte = digits.and_then(|digits| std::str::from_utf8(digits).ok());
        match byte.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                found.push(byte);
                at += 4;
            }
            None => {
                found.push(text[at]);
                at += 1;
            }
        }
    }
    OsString::from_vec(found).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_in_paths_are_read() {
        assert_eq!(unescaped(br"/a\040b\134\011c\9"), PathBuf::from("/a b\\\tc\\9"));
        assert_eq!(unescaped(br"/a\04"), PathBuf::from("/a\\04"));
    }
}
