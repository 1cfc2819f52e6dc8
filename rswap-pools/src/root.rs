//! Reading below a root directory: `/` on a machine, a directory of files in a test.

use std::{
    fs, io,
    path::{Path, PathBuf},
    str::FromStr,
};

/// More than any file of the kernel that is read here has; what is longer is not read to its end.
const LONGEST_BYTES: u64 = 4 << 20;

/// How much room a file system has, as statvfs(3) says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// All of it, in bytes.
    pub size_bytes: u64,
    /// Not in use, in bytes, what is reserved for root included.
    pub free_bytes: u64,
    /// Not in use and not reserved, in bytes.
    pub available_bytes: u64,
    /// Files that there can be; 0 where there is no limit.
    pub files: u64,
    /// Files that can be made.
    pub files_available: u64,
}

/// The room of the file system that `path` is on, by statvfs(3).
pub fn room_of(path: &Path) -> io::Result<Room> {
    let found = rustix::fs::statvfs(path)?;
    let bytes = |blocks: u64| blocks.saturating_mul(found.f_frsize);
    Ok(Room {
        size_bytes: bytes(found.f_blocks),
        free_bytes: bytes(found.f_bfree),
        available_bytes: bytes(found.f_bavail),
        files: found.f_files,
        files_available: found.f_favail,
    })
}

/// Where the files are, and how room is asked for.
#[derive(Clone, Copy)]
pub struct Root<'a> {
    base: &'a Path,
    room: &'a dyn Fn(&Path) -> io::Result<Room>,
}

impl std::fmt::Debug for Root<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Root").field("base", &self.base).finish_non_exhaustive()
    }
}

impl Root<'static> {
    /// This machine.
    pub fn machine() -> Self {
        Self { base: Path::new("/"), room: &room_of }
    }
}

impl<'a> Root<'a> {
    /// A directory that stands for `/`; `room` answers for mount points, which are as mountinfo has them.
    pub fn at(base: &'a Path, room: &'a dyn Fn(&Path) -> io::Result<Room>) -> Self {
        Self { base, room }
    }

    fn path(&self, absolute: &str) -> PathBuf {
        self.base.join(absolute.trim_start_matches('/'))
    }

    /// The text of a file, without the white space around it; `None` if it can't be read.
    pub(crate) fn text(&self, absolute: &str) -> Option<String> {
        use io::Read;
        let mut bytes = Vec::new();
        fs::File::open(self.path(absolute)).ok()?.take(LONGEST_BYTES).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// The number that is all of a file.
    pub(crate) fn number<T: FromStr>(&self, absolute: &str) -> Option<T> {
        self.text(absolute)?.parse().ok()
    }

    /// The set that is all of a file, such as `0-3`.
    pub(crate) fn set(&self, absolute: &str) -> Option<rswap_types::CpuSet> {
        crate::cpu_list::parse(&self.text(absolute)?).ok()
    }

    /// Names in a directory, sorted; none if it is not there.
    pub(crate) fn names(&self, absolute: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path(absolute)) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
        names.sort_unstable();
        names
    }

    /// Whether it is there.
    pub(crate) fn has(&self, absolute: &str) -> bool {
        self.path(absolute).exists()
    }

    /// The last part of what a symbolic link leads to.
    pub(crate) fn link_name(&self, absolute: &str) -> Option<String> {
        fs::read_link(self.path(absolute)).ok()?.file_name()?.to_str().map(str::to_owned)
    }

    /// The directory above what a path leads to, by its name.
    pub(crate) fn parent_name(&self, absolute: &str) -> Option<String> {
        let real = fs::canonicalize(self.path(absolute)).ok()?;
        real.parent()?.file_name()?.to_str().map(str::to_owned)
    }

    pub(crate) fn room(&self, mount_point: &Path) -> io::Result<Room> {
        (self.room)(mount_point)
    }
}

/// `name` without its prefix, if the rest is a number: 3 for `node3`.
pub(crate) fn numbered(name: &str, prefix: &str) -> Option<usize> {
    let digits = name.strip_prefix(prefix)?;
    if digits.bytes().all(|byte| byte.is_ascii_digit()) { digits.parse().ok() } else { None }
}

/// Text of /proc in which the kernel wrote white space as `\040` and the like.
pub(crate) fn unescape(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut plain = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let octal = bytes.get(at + 1..at + 4).filter(|digits| bytes[at] == b'\\' && is_octal(digits));
        match octal {
            Some(digits) => {
                plain.push(digits.iter().fold(0u8, |value, digit| (value << 3) | (digit - b'0')));
                at += 4;
            }
            None => {
                plain.push(bytes[at]);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&plain).into_owned()
}

/// Three octal digits that fit into a byte.
fn is_octal(digits: &[u8]) -> bool {
    digits.iter().all(|digit| (b'0'..=b'7').contains(digit)) && digits[0] <= b'3'
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_escapes() {
        assert_eq!(unescape(r"/a\040b\134c"), r"/a b\c");
        assert_eq!(unescape(r"\9\0\777"), r"\9\0\777");
    }

    proptest! {
        #[test]
        fn what_the_kernel_escapes_is_read_back(text in "[ -~\t\n]{0,40}") {
            let escaped: String = text
                .chars()
                .map(|c| if " \t\n\\".contains(c) { format!("\\{:03o}", c as u32) } else { c.to_string() })
                .collect();
            prop_assert_eq!(unescape(&escaped), text);
        }

        #[test]
        fn any_text_is_read(text in any::<String>()) {
            let _ = unescape(&text);
        }
    }
}
