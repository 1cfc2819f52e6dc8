//! The volumes of an instance on its way: all of them together, as the engine sees them.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use xxhash_rust::xxh3::xxh3_128;

use super::traits::TaskError;
use crate::{
    instance::{Instance, launch::Place},
    tracee::layout::{self, Mapping},
    volume::{
        VolumeError,
        built::BuiltVolume,
        place,
        record::{self, Frames},
        source::SourceVolume,
    },
};

/// At the source.
#[derive(Debug, Default)]
pub struct SourceVolumes {
    /// Where the instance sees each.
    volumes: Vec<(PathBuf, SourceVolume)>,
}

impl SourceVolumes {
    /// Opens those of `instance`.
    pub fn open(place: &Place, instance: &Instance) -> Result<Self, VolumeError> {
        let open = |volume: &crate::instance::volume::Volume| {
            Ok((volume.path.clone(), SourceVolume::open(&place.volume(&instance.name, volume))?))
        };
        Ok(Self { volumes: instance.volumes.iter().map(open).collect::<Result<_, VolumeError>>()? })
    }

    /// Bytes on the disk and inodes that they take in all.
    pub fn need(&self) -> Result<(u64, u64), VolumeError> {
        let mut need = (0, 0);
        for (_, volume) in &self.volumes {
            let (bytes, inodes) = volume.need()?;
            need = (need.0 + bytes, need.1 + inodes);
        }
        Ok(need)
    }

    /// Whether a mapping's file goes along.
    pub fn hold(&self, mapping: &Mapping) -> bool {
        let lies = |path: &Path| Path::new(&mapping.name).starts_with(path);
        mapping.is_file() && self.volumes.iter().any(|(path, _)| lies(path))
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
            let inside = mapped.iter().filter(|mapping| Path::new(&mapping.name).starts_with(&*path));
            let inodes: BTreeSet<u64> = inside.map(|mapping| mapping.inode).collect();
            volume.pass(last, &inodes, &mut Frames::new(number as u16, send))?;
        }
        Ok(())
    }

    /// The digest of all that was sent.
    pub fn digest(&self) -> u128 {
        together(self.volumes.iter().map(|(_, volume)| volume.digest()))
    }
}

/// Takes a frame of an instance's volumes.
pub fn take(volumes: &mut [(BuiltVolume, PathBuf)], frame: &[u8]) -> Result<(), VolumeError> {
    let (number, records) = record::parse(frame)?;
    let (volume, _) =
        volumes.get_mut(usize::from(number)).ok_or(VolumeError::Damaged("there is no such volume"))?;
    records.into_iter().try_for_each(|record| volume.take(record))
}

/// The digest of all that has arrived; nothing comes any more.
pub fn complete(volumes: &mut [(BuiltVolume, PathBuf)]) -> Result<u128, VolumeError> {
    let mut digests = Vec::new();
    for (volume, _) in volumes {
        digests.push(volume.digest()?);
        volume.finish()?;
    }
    Ok(together(digests.into_iter()))
}

/// 0 for none.
fn together(digests: impl Iterator<Item = u128>) -> u128 {
    let bytes: Vec<u8> = digests.flat_map(u128::to_le_bytes).collect();
    if bytes.is_empty() { 0 } else { xxh3_128(&bytes) }
}

/// Puts volumes that were built to their places; those that are there already stay. Mounts follow them.
pub fn keep(moves: &[(PathBuf, PathBuf)]) -> std::io::Result<()> {
    for (built, place) in moves.iter().filter(|(built, _)| built.exists()) {
        if let Some(parent) = place.parent() {
            std::fs::create_dir_all(parent)?;
        }
        std::fs::rename(built, place)?;
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
