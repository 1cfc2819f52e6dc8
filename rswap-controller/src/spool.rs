//! Reports that the controller does not have yet: a file each, so that neither an agent's end nor a controller's costs any.
//!
//! Bounded: past that the oldest go, and are counted. What can't be read any more is set aside, and counted too; of what is over the bound it
//! goes first.

use std::{
    collections::{BTreeMap, hash_map::RandomState},
    fs,
    hash::{BuildHasher, Hasher},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use rswap_fleet::Report;
use serde::{Deserialize, Serialize};

/// What is known of the spool besides its reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    epoch: u64,
    /// Number of the next report.
    next: u64,
    /// Reports that went unsent.
    dropped: u64,
}

/// Reports on disk.
#[derive(Debug)]
pub struct Spool {
    directory: PathBuf,
    most_bytes: u64,
    head: Head,
    /// Sizes of the files, by number.
    waiting: BTreeMap<u64, u64>,
    /// The same, of those that are set aside.
    aside: BTreeMap<u64, u64>,
}

impl Spool {
    /// Opens the directory, or makes it, and goes on with what is there.
    ///
    /// # Errors
    ///
    /// If it can't be made, read or written.
    pub fn open(directory: &Path, most_bytes: u64) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let (mut waiting, mut aside) = (BTreeMap::new(), BTreeMap::new());
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some((number, kind)) = name.to_str().and_then(|name| name.split_once('.')) else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            let sizes = match kind {
                "report" => &mut waiting,
                "aside" => &mut aside,
                _ => continue,
            };
            sizes.insert(number, entry.metadata()?.len());
        }
        let path = directory.join("head");
        let after = waiting.last_key_value().map_or(1, |(last, _)| last + 1);
        let head = match fs::read(&path).map(|text| serde_json::from_slice::<Head>(&text)) {
            Ok(Ok(head)) => Head { next: head.next.max(after), ..head },
            // Lost: numbers that were given may not be given again, so another epoch begins. What waits keeps its own.
            Ok(Err(_)) | Err(_) => Head { epoch: random(), next: after, dropped: 0 },
        };
        let spool = Self { directory: directory.to_owned(), most_bytes, head, waiting, aside };
        spool.keep_head()?;
        Ok(spool)
    }

    /// Gives a report its number, and keeps it.
    ///
    /// # Errors
    ///
    /// If it can't be written: then it is lost, and its number with it, which counts as skipped.
    pub fn push(&mut self, mut report: Report) -> io::Result<()> {
        let number = self.head.next;
        // First the number: none is given twice.
        self.head.next += 1;
        self.keep_head()?;
        (report.epoch, report.sequence) = (self.head.epoch, number);
        let size = serde_json::to_vec(&report)?.len() as u64;
        while self.bytes() + size > self.most_bytes {
            if let Some((&oldest, _)) = self.aside.first_key_value() {
                remove(&self.path(oldest).with_extension("aside"))?;
                self.aside.remove(&oldest);
            } else if let Some((&oldest, _)) = self.waiting.first_key_value() {
                self.remove(oldest)?;
                self.head.dropped += 1;
            } else {
                break;
            }
        }
        report.dropped = self.head.dropped;
        let text = serde_json::to_vec(&report)?;
        let size = text.len() as u64;
        write(&self.path(number), &text)?;
        self.waiting.insert(number, size);
        Ok(())
    }

    /// The oldest reports, all of one epoch: at most so many, and of so many bytes unless the first has more.
    pub fn oldest(&mut self, most: usize, most_bytes: u64) -> Vec<Report> {
        let (mut reports, mut bytes) = (Vec::<Report>::new(), 0);
        let numbers: Vec<(u64, u64)> = self.waiting.iter().map(|(number, size)| (*number, *size)).collect();
        for (number, size) in numbers {
            if reports.len() == most || (bytes + size > most_bytes && !reports.is_empty()) {
                break;
            }
            match fs::read(self.path(number))
                .ok()
                .and_then(|text| serde_json::from_slice::<Report>(&text).ok())
            {
                Some(report) if reports.first().is_none_or(|first| first.epoch == report.epoch) => {
                    bytes += size;
                    reports.push(report);
                }
                Some(_) => break,
                None => self.set_aside(number),
            }
        }
        reports
    }

    /// The controller has all reports of this epoch up to this number.
    ///
    /// # Errors
    ///
    /// If a file can't be removed: its report is sent again then.
    pub fn acknowledge(&mut self, reports: &[Report], stored: u64) -> io::Result<()> {
        for report in reports.iter().filter(|report| report.sequence <= stored) {
            self.remove(report.sequence)?;
        }
        Ok(())
    }

    /// The controller will never take it: it is kept for a person to look at while there is room, and counts as dropped.
    pub fn set_aside(&mut self, number: u64) {
        let path = self.path(number);
        let moved = fs::rename(&path, path.with_extension("aside")).is_ok();
        tracing::warn!(path = %path.display(), moved, "a report is set aside: nobody can use it");
        let size = self.waiting.remove(&number).unwrap_or(0);
        if moved {
            self.aside.insert(number, size);
        }
        self.head.dropped += 1;
    }

    /// Reports that wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    fn bytes(&self) -> u64 {
        self.waiting.values().chain(self.aside.values()).sum()
    }

    fn remove(&mut self, number: u64) -> io::Result<()> {
        remove(&self.path(number))?;
        self.waiting.remove(&number);
        Ok(())
    }

    fn path(&self, number: u64) -> PathBuf {
        self.directory.join(format!("{number:020}.report"))
    }

    fn keep_head(&self) -> io::Result<()> {
        write(&self.directory.join("head"), &serde_json::to_vec(&self.head)?)
    }
}

/// Whole or not at all, also if the host loses its power.
pub(crate) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let half = path.with_extension("new");
    let mut to = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&half)?;
    to.write_all(bytes)?;
    to.sync_all()?;
    fs::rename(&half, path)?;
    // Its name is there again only if the directory is on the disk, too.
    match path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        Some(directory) => fs::File::open(directory)?.sync_all(),
        None => fs::File::open(".")?.sync_all(),
    }
}

/// Removes a file, if it is there.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The standard library's own source of randomness for its hash maps.
fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}

#[cfg(test)]
mod tests;
