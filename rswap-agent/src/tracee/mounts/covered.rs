//! Files that a program uses although their path leads elsewhere: something was mounted over them. Made again by their path,
//! they would be others.

use std::{fs, os::unix::fs::MetadataExt, path::Path};

use super::{
    super::{TraceeError, layout::Mapping, tables},
    Mounts,
    survey::seen_by,
};
use crate::sys::process::Common;

/// What of process `pid`, with these mappings, is hidden below a mount of `mounts`; `init`: that of the instance.
pub fn covered(
    init: i32,
    pid: i32,
    mappings: &[Mapping],
    mounts: &Mounts,
) -> Result<Vec<String>, TraceeError> {
    if mounts.is_empty() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    for mapping in mappings.iter().filter(|mapping| mapping.is_file() && !mapping.is_object()) {
        let (start, end) = (mapping.start, mapping.end);
        if leads_elsewhere(init, &mapping.name, &format!("/proc/{pid}/map_files/{start:x}-{end:x}")) {
            found.push(format!("mapping {start:#x}-{end:#x} {}", mapping.name));
        }
    }
    let names = ["cwd", "root", "exe"].map(str::to_owned);
    let mut all: Vec<(String, String)> =
        names.into_iter().map(|name| (name.clone(), format!("/proc/{pid}/{name}"))).collect();
    for holder in tables::holders(pid, Common::Descriptors)? {
        for entry in fs::read_dir(format!("/proc/{holder}/fd")).into_iter().flatten().flatten() {
            let number = entry.file_name().to_string_lossy().into_owned();
            all.push((format!("descriptor {number}"), format!("/proc/{holder}/fd/{number}")));
        }
    }
    for (item, link) in all {
        // One that was closed meanwhile is not used.
        let Ok(target) = fs::read_link(&link) else { continue };
        let target = target.to_string_lossy().into_owned();
        if target.starts_with('/') && leads_elsewhere(init, &target, &link) {
            found.push(format!("{item} {target}"));
        }
    }
    Ok(found)
}

/// Whether `path`, as the instance sees it, leads to another file than `link`, which is the kernel's way to it.
fn leads_elsewhere(init: i32, path: &str, link: &str) -> bool {
    let Ok(used) = fs::metadata(link) else { return false };
    let kind = used.file_type();
    // What has no name can't be found by it.
    if used.nlink() == 0 || !(kind.is_file() || kind.is_dir()) {
        return false;
    }
    let named = fs::metadata(seen_by(init, Path::new(path)));
    named.map_or(true, |named| (named.dev(), named.ino()) != (used.dev(), used.ino()))
}
