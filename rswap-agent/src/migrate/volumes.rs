//! The volumes of an instance on its way, and its file systems in memory, which come after them: all of them together, as the
//! engine sees them.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use xxhash_rust::xxh3::xxh3_128;

use super::traits::TaskError;
use crate::{
    instance::{Instance, arrival::Arrival, launch::Place},
    tracee::{
        TraceeError,
        files::Places,
        layout::{self, Mapping},
        mounts::{self, Mounts},
    },
    volume::{
        VolumeError, place,
        record::{self, Frames},
        source::{Need, SourceVolume},
    },
};

/// At the source.
#[derive(Debug, Default)]
pub struct SourceVolumes {
    /// Where the instance sees each.
    volumes: Vec<(PathBuf, SourceVolume)>,
    mounts: Mounts,
    places: Places,
    memories: Vec<SourceVolume>,
}

impl SourceVolumes {
    /// Opens those of `instance`, which has made `mounts`.
    pub fn open(place: &Place, instance: &Instance, mounts: Mounts) -> Result<Self, TaskError> {
        let open = |volume: &crate::instance::volume::Volume| {
            Ok((volume.path.clone(), SourceVolume::open(&place.volume(&instance.name, volume))?))
        };
        let volumes = instance.volumes.iter().map(open).collect::<Result<_, VolumeError>>()?;
        let mut memories = Vec::with_capacity(mounts.memories.len());
        for number in 0..mounts.memories.len() as u32 {
            let init = instance.init_pid.ok_or(TraceeError::Gone(0))?;
            memories.push(SourceVolume::of_memory(&mounts::open_memory(init, &mounts, number)?)?);
        }
        let places = place.places_of(instance, &mounts);
        Ok(Self { volumes, mounts, places, memories })
    }

    /// The mounts that the instance had made when they were opened.
    pub fn mounts(&self) -> &Mounts {
        &self.mounts
    }

    /// Bytes on the disk and inodes that the volumes take in all.
    pub fn need(&self) -> Result<(u64, u64), VolumeError> {
        together_need(self.volumes.iter().map(|(_, volume)| volume))
    }

    /// Bytes that the file systems in memory hold in all.
    pub fn memory_need(&self) -> Result<u64, VolumeError> {
        together_need(self.memories.iter()).map(|(bytes, _)| bytes)
    }

    /// Whether a mapping's file is at its place only in the freeze: it goes along, or lies in a mount that is made then.
    pub fn hold(&self, mapping: &Mapping) -> bool {
        let lies = |path: &Path| Path::new(&mapping.name).starts_with(path);
        mapping.is_file()
            && (self.volumes.iter().any(|(path, _)| lies(path))
                || self.mounts.list.iter().any(|mount| lies(&mount.point)))
    }

    /// Sends what changed since the last pass; `pids`: the instance's living processes.
    pub fn pass(
        &mut self,
        last: bool,
        pids: &[i32],
        send: &mut dyn FnMut(&[u8]) -> Result<(), TaskError>,
    ) -> Result<(), VolumeError> {
        let mut mapped = Vec::new();
        for pid in pids.iter().filter(|_| !self.volumes.is_empty()) {
            // One that has ended maps nothing any more.
            let mappings = layout::read_mappings(*pid).unwrap_or_default();
            mapped.extend(mappings.into_iter().filter(|mapping| mapping.shared && self.hold(mapping)));
        }
        for (number, (path, volume)) in self.volumes.iter_mut().enumerate() {
            // A mount may show a part of it elsewhere.
            let lies = |mapping: &&Mapping| {
                let (as_named, at_home) = (Path::new(&mapping.name), self.places.on_host(&mapping.name));
                as_named.starts_with(&*path) || Path::new(&at_home).starts_with(&*path)
            };
            let inside = mapped.iter().filter(lies);
            let inodes: BTreeSet<u64> = inside.map(|mapping| mapping.inode).collect();
            volume.pass(last, &inodes, &mut Frames::new(number as u16, send))?;
        }
        for (number, memory) in self.memories.iter_mut().enumerate() {
            let number = self.volumes.len() + number;
            memory.pass(last, &BTreeSet::new(), &mut Frames::new(number as u16, send))?;
        }
        Ok(())
    }

    /// The digest of all that was sent.
    pub fn digest(&self) -> u128 {
        let volumes = self.volumes.iter().map(|(_, volume)| volume);
        together(volumes.chain(&self.memories).map(SourceVolume::digest))
    }
}

fn together_need<'a>(all: impl Iterator<Item = &'a SourceVolume>) -> Result<(u64, u64), VolumeError> {
    let mut need = (0, 0);
    for volume in all {
        let Need { bytes, inodes, .. } = volume.need()?;
        need = (need.0 + bytes, need.1 + inodes);
    }
    Ok(need)
}

/// Takes a frame of an instance's volumes, or of its file systems in memory.
pub fn take(arrival: &mut Arrival, frame: &[u8]) -> Result<(), VolumeError> {
    let (number, records) = record::parse(frame)?;
    let mut all = arrival.volumes.iter_mut().map(|(volume, _)| volume).chain(&mut arrival.memories);
    let volume = all.nth(usize::from(number)).ok_or(VolumeError::Damaged("there is no such volume"))?;
    records.into_iter().try_for_each(|record| volume.take(record))
}

/// The digest of all that has arrived; nothing comes any more.
pub fn complete(arrival: &mut Arrival) -> Result<u128, VolumeError> {
    let mut digests = Vec::new();
    for volume in arrival.volumes.iter_mut().map(|(volume, _)| volume).chain(&mut arrival.memories) {
        volume.finish()?;
        digests.push(volume.digest()?);
    }
    Ok(together(digests.into_iter()))
}

/// 0 for none.
fn together(digests: impl Iterator<Item = u128>) -> u128 {
    let bytes: Vec<u8> = digests.flat_map(u128::to_le_bytes).collect();
    if bytes.is_empty() { 0 } else { xxh3_128(&bytes) }
}

/// Puts volumes that were built to their places; those that are there already stay. Mounts follow them.
///
/// All are there on the disk, too, when this returns: afterwards the source removes its copy, and what a loss of power brings back to
/// where it was built is taken for what an arrival has left.
pub fn keep(moves: &[(PathBuf, PathBuf)]) -> std::io::Result<()> {
    let (mut entered, mut left) = (BTreeSet::<&Path>::new(), BTreeSet::<&Path>::new());
    for (built, place) in moves {
        let parent = place.parent().unwrap_or(Path::new("/"));
        if built.exists() {
            std::fs::create_dir_all(parent)?;
            std::fs::rename(built, place)?;
        }
        // Also of one that was there: whoever put it there may have been killed before it was synced. The instance's directory
        // may be new.
        entered.extend([Some(parent), parent.parent()].into_iter().flatten());
        left.extend(built.parent());
    }
    for directory in entered {
        std::fs::File::open(directory)?.sync_all()?;
    }
    for directory in left {
        match std::fs::File::open(directory) {
            // It was empty, and is gone.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            opened => opened?.sync_all()?,
        }
    }
    Ok(())
}

/// Takes the volumes of an instance away that has left.
pub fn remove(place: &Place, instance: &Instance) {
    for volume in &instance.volumes {
        let removed = place::remove(&place.volumes, instance.name.as_str(), volume.name.as_str());
        if let Err(error) = removed {
            // It runs at the other host with its own copy: this one only takes room.
            tracing::error!(instance = %instance.name, volume = %volume.name, %error, "a volume is left");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_that_are_at_their_places_stay() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let (built, place) = (directory.path().join(".arriving-1/tree"), directory.path().join("db/data"));
        std::fs::create_dir_all(&built).expect("create");
        std::fs::write(built.join("file"), "contents").expect("write");
        let moves = [(built.clone(), place.clone())];
        for _ in 0..2 {
            keep(&moves).expect("keep");
            assert!(place.join("file").exists() && !built.exists());
        }
        std::fs::remove_dir(directory.path().join(".arriving-1")).expect("remove");
        keep(&moves).expect("keep");
        assert!(place.join("file").exists());
    }
}
