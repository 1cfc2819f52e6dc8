//! Mappings of files of a directory.

use std::{collections::BTreeMap, fs, io, os::unix::fs::MetadataExt, path::PathBuf};

use super::{super::Part, Look};
use crate::tracee::{TraceeError, layout, read_proc};

/// What the kernel adds to the name of a file that was deleted.
const SUFFIX: &str = " (deleted)";

/// Flags of a mapping in smaps that say nothing that would be lost: what may be done with it, and how it was used.
const PLAIN: [&str; 14] =
    ["rd", "wr", "ex", "sh", "mr", "mw", "me", "ms", "gd", "nr", "ac", "sd", "pf", "de"];
/// Those that madvise(2) makes again.
const ADVISED: [(&str, i32); 5] = [
    ("sr", libc::MADV_SEQUENTIAL),
    ("rr", libc::MADV_RANDOM),
    ("dd", libc::MADV_DONTDUMP),
    ("hg", libc::MADV_HUGEPAGE),
    ("nh", libc::MADV_NOHUGEPAGE),
];

impl Look<'_> {
    /// Takes in the mappings of a process.
    pub(super) fn mappings(&mut self, pid: i32) -> Result<(), TraceeError> {
        let mut advice: Option<BTreeMap<u64, Vec<String>>> = None;
        for mapping in layout::read_mappings(pid)? {
            if mapping.name.starts_with("/[aio]") {
                self.refuse(pid, "an io_setup(2) context", "what it works on can't be seen: not re-homed");
            }
            if !mapping.is_file() || !mapping.name.starts_with('/') {
                continue;
            }
            let path = PathBuf::from(mapping.name.strip_suffix(SUFFIX).unwrap_or(&mapping.name));
            let inside = path.starts_with(&self.subject.volume.path);
            if !inside && !self.inodes.contains_key(&mapping.inode) {
                continue;
            }
            let place = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end);
            let metadata = match fs::metadata(&place) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                metadata => metadata.map_err(TraceeError::proc(place.as_str()))?,
            };
            let item = format!("the mapping {:#x}-{:#x} of {}", mapping.start, mapping.end, mapping.name);
            if !inside || metadata.dev() != self.device {
                if metadata.dev() == self.device {
                    self.refuse(
                        pid,
                        item,
                        "a file of the volume, mapped by another way: open it by the volume",
                    );
                }
                continue;
            }
            let Some(target) = self.target(pid, &path, &place, &metadata, &item)? else { continue };
            if advice.is_none() {
                advice = Some(flags_of_mappings(pid)?);
            }
            let flags = advice.as_ref().and_then(|all| all.get(&mapping.start)).cloned().unwrap_or_default();
            let known = |flag: &String| {
                PLAIN.contains(&flag.as_str()) || ADVISED.iter().any(|(advised, _)| advised == flag)
            };
            if let Some(strange) = flags.iter().find(|flag| !known(flag)) {
                let item = format!("{item}, which has {strange} in smaps");
                self.refuse(
                    pid,
                    item,
                    "such a mapping can't be made again: let the program unlock or unmap it",
                );
                continue;
            }
            let given = ADVISED.iter().filter(|(flag, _)| flags.iter().any(|found| found == flag));
            self.plan.mappings.push(Part {
                pid,
                start: mapping.start,
                end: mapping.end,
                offset: mapping.offset,
                protection: mapping.protection,
                shared: mapping.shared,
                may_write: flags.iter().any(|flag| flag == "mw"),
                advice: given.map(|(_, advice)| *advice).collect(),
                target,
            });
        }
        Ok(())
    }
}

/// `VmFlags` of each mapping, by its first byte.
fn flags_of_mappings(pid: i32) -> Result<BTreeMap<u64, Vec<String>>, TraceeError> {
    let mut found = BTreeMap::new();
    let mut start = None;
    for line in read_proc(&format!("/proc/{pid}/smaps"))?.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(start) = start {
                found.insert(start, flags.split_whitespace().map(str::to_owned).collect());
            }
        } else if let Some(mapping) = layout::parse_line(line) {
            start = Some(mapping.start);
        }
    }
    Ok(found)
}
