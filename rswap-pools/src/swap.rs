//! Swap areas, compressed memory (zram) among them.

use std::path::PathBuf;

use crate::{
    Known, LocalKind, State,
    block::chosen,
    root::{Root, numbered, unescape},
};

const SWAPS: &str = "/proc/swaps";

/// A swap area in use: one line of /proc/swaps. `procfs` does not read this file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SwapArea {
    /// The file or device.
    pub path: PathBuf,
    /// It is a file.
    pub file: bool,
    /// All of it, in bytes.
    pub bytes: u64,
    /// What of that holds pages, in bytes.
    pub used_bytes: u64,
    /// Higher is used first.
    pub priority: i32,
}

impl SwapArea {
    /// What there is room for, in bytes.
    pub fn free_bytes(&self) -> u64 {
        self.bytes.saturating_sub(self.used_bytes)
    }
}

/// All swap areas in use, without what [`Inventory`](crate::Inventory) knows of them besides.
pub fn swap_areas(root: &Root<'_>) -> Vec<SwapArea> {
    lines(&root.text(SWAPS).unwrap_or_default())
}

/// A swap area as it was found.
pub(crate) struct Area {
    pub(crate) path: PathBuf,
    pub(crate) kind: LocalKind,
    pub(crate) capacity: Known,
    pub(crate) used: Known,
    pub(crate) free: Known,
    pub(crate) state: State,
}

/// All areas in use.
pub(crate) fn areas(root: &Root<'_>, full_below: f64) -> Vec<Area> {
    swap_areas(root).into_iter().map(|line| area(root, line, full_below)).collect()
}

fn area(root: &Root<'_>, line: SwapArea, full_below: f64) -> Area {
    let name = line.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let zram = numbered(name, "zram").map(|_| format!("/sys/block/{name}"));
    let what = match (&zram, line.file) {
        (Some(_), _) => "zram",
        (None, true) => "file",
        (None, false) => "partition",
    };
    // mm_stat: bytes stored, bytes after compression, bytes of memory that take, ...
    let stat = zram.as_ref().and_then(|dir| root.text(&format!("{dir}/mm_stat")));
    let memory_bytes = stat.and_then(|text| text.split_ascii_whitespace().nth(2)?.parse().ok());
    let compression = zram.and_then(|dir| chosen(&root.text(&format!("{dir}/comp_algorithm"))?));
    let free = line.free_bytes();
    let share = free as f64 / line.bytes.max(1) as f64;
    let state = if share < full_below {
        State::Full {
            reason: format!("{:.2} % of it is free, less than {:.2} %", share * 100.0, full_below * 100.0),
        }
    } else {
        State::Online
    };
    let kind = LocalKind::Swap {
        path: line.path.clone(),
        what: what.to_owned(),
        priority: Some(line.priority),
        compression,
        memory_bytes,
    };
    let known = |bytes: u64| Known::found(bytes as f64, SWAPS);
    Area {
        path: line.path,
        kind,
        capacity: known(line.bytes),
        used: known(line.used_bytes),
        free: known(free),
        state,
    }
}

fn lines(text: &str) -> Vec<SwapArea> {
    let line = |line: &str| {
        // From the right: a deleted file's name has a space in it.
        let mut words = line.split_ascii_whitespace().rev();
        let priority = words.next()?.parse().ok()?;
        let used: u64 = words.next()?.parse().ok()?;
        let size: u64 = words.next()?.parse().ok()?;
        let file = words.next()? == "file";
        let path = unescape(line.split_ascii_whitespace().next()?);
        // The columns are in KiB.
        let (bytes, used_bytes) = (size.checked_mul(1024)?, used.checked_mul(1024)?);
        Some(SwapArea { path: path.into(), file, bytes, used_bytes, priority })
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        let text = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n\
                    /dev/zram0                              partition\t4194300\t\t1024\t\t100\n\
                    /swap\\040file                          file\t\t8\t\t8\t\t-2\n";
        let found = lines(text);
        assert_eq!(found.len(), 2, "not the header");
        assert_eq!((found[0].bytes, found[0].used_bytes, found[0].priority), (4_194_300 << 10, 1 << 20, 100));
        assert_eq!((found[1].path.to_str(), found[1].file), (Some("/swap file"), true));
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in any::<String>()) {
            let _ = lines(&text);
        }

        #[test]
        fn what_is_written_is_read(size in 0u64..1 << 50, used in 0u64..1 << 50, priority in any::<i32>()) {
            let found = lines(&format!("/dev/sda2   partition\t{size}\t\t{used}\t\t{priority}\n"));
            let expected = SwapArea {
                path: "/dev/sda2".into(), file: false, bytes: size * 1024, used_bytes: used * 1024, priority,
            };
            prop_assert_eq!(found, vec![expected]);
        }
    }
}
