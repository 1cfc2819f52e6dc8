//! A tmpfs that arrives: made without a place, and mounted by the instance's own processes when it is filled.

use std::io;

use rustix::{
    fd::OwnedFd,
    mount::{
        FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, fsconfig_create, fsconfig_reconfigure,
        fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, fspick,
    },
};

/// Bytes in a page: sizes are rounded to it.
const PAGE_BYTES: u64 = 4096;

/// A tmpfs that is mounted nowhere; it goes when the last descriptor of it does.
#[derive(Debug)]
pub struct Tmpfs {
    mount: OwnedFd,
    /// Bytes and inodes that it may hold in the end; 0 for any number.
    limits: (u64, u64),
    read_only: bool,
}

impl Tmpfs {
    /// Makes one with `options` as mount(8) has them. While it is filled it may hold twice as much: a file of which a new
    /// version has come is removed afterwards, and each has a second name.
    pub fn make(source: &str, options: &[(String, Option<String>)], read_only: bool) -> io::Result<Self> {
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "source", source)?;
        for (name, value) in options {
            match value {
                Some(value) => fsconfig_set_string(&context, name, value)?,
                None => fsconfig_set_flag(&context, name)?,
            }
        }
        fsconfig_create(&context)?;
        let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
        let holds = rustix::fs::fstatvfs(&mount)?;
        let limits = (holds.f_blocks.saturating_mul(holds.f_frsize), holds.f_files);
        let made = Self { mount, limits, read_only };
        let larger =
            |limit: u64, more: u64| if limit == 0 { 0 } else { limit.saturating_mul(2).saturating_add(more) };
        made.configure((larger(limits.0, 1 << 20), larger(limits.1, 64)), false)?;
        Ok(made)
    }

    /// Its root.
    pub fn mount(&self) -> &OwnedFd {
        &self.mount
    }

    /// It is filled, and holds from now on what its options say.
    pub fn limit(&self) -> io::Result<()> {
        self.configure(self.limits, self.read_only)
    }

    fn configure(&self, (bytes, inodes): (u64, u64), read_only: bool) -> io::Result<()> {
        let context = fspick(&self.mount, "", FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH)?;
        // What has no limit can't be given one, and needs none.
        for (name, limit) in [("size", bytes.next_multiple_of(PAGE_BYTES)), ("nr_inodes", inodes)] {
            if limit != 0 {
                fsconfig_set_string(&context, name, limit.to_string())?;
            }
        }
        fsconfig_set_flag(&context, if read_only { "ro" } else { "rw" })?;
        Ok(fsconfig_reconfigure(&context)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_wider_only_until_it_is_filled() {
        // Making one takes root.
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let options = [("size", "64k"), ("nr_inodes", "10")].map(|(n, v)| (n.to_owned(), Some(v.to_owned())));
        let made = Tmpfs::make("x", &options, false).expect("a tmpfs");
        let holds = || {
            let holds = rustix::fs::fstatvfs(made.mount()).expect("statvfs");
            (holds.f_blocks * holds.f_frsize, holds.f_files)
        };
        assert!(holds().0 >= 128 << 10 && holds().1 >= 20);
        made.limit().expect("limit");
        assert_eq!(holds(), (64 << 10, 10));
    }
}
