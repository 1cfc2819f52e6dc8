//! Whether the copy is of what is there: all that was not written since its last copy, by what is known, is read again.
//!
//! A write that nobody has told of leaves a block that is another than it was copied. Who looks at a running program also sees writes that
//! are told of: those that were told since the last pass, and those that are told while this goes on. A call that writes puts the contents into
//! the page first and tells then, so a block may be seen before it is told of: hence what is told is collected until it explains all that
//! was found, or for longer than any call is between the two.

use std::{
    collections::{BTreeMap, BTreeSet},
    thread,
    time::{Duration, Instant},
};

use rustix::fd::AsFd;

use super::{
    super::{
        VolumeError,
        blocks::{self, BLOCK},
        tree::{self, Found, Kind, Name},
    },
    Part, SourceVolume,
};
use crate::sys::file;

/// How long it may take until a write that was seen is told of.
const TELL_LIMIT: Duration = Duration::from_secs(5);
/// Between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Blocks of a file that are others than they were copied.
#[derive(Debug)]
struct Differing {
    path: Name,
    blocks: BTreeSet<u64>,
}

impl SourceVolume {
    /// Reads again all that the next pass would not read, and compares it with what was copied. The instance runs. `mapped` tells which files
    /// processes map for writing now, and `on_block` is called in between. Returns how many bytes were read.
    ///
    /// # Errors
    /// [`VolumeError::Missed`]: something has changed, and nothing told of it.
    pub fn compare(
        &mut self,
        mapped: &mut dyn FnMut() -> BTreeSet<u64>,
        on_block: &mut dyn FnMut() -> Result<(), VolumeError>,
    ) -> Result<u64, VolumeError> {
        self.collect(false);
        self.mapped.extend(mapped());
        let mut read = 0;
        let mut differing = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for (path, found) in &tree::scan(self.root.as_fd(), &self.tree)? {
            let Kind::File { inode } = found.kind else { continue };
            if !seen.insert(inode) {
                continue;
            }
            let blocks = self.differing(path, found, &mut read, on_block)?;
            if !blocks.is_empty() {
                differing.insert(inode, Differing { path: path.clone(), blocks });
            }
        }
        let began = Instant::now();
        loop {
            self.collect(false);
            self.mapped.extend(mapped());
            self.explain(&mut differing)?;
            let Some(unexplained) = differing.values().next() else { return Ok(read) };
            if began.elapsed() > TELL_LIMIT {
                let number = unexplained.blocks.first().copied().unwrap_or_default();
                return Err(VolumeError::missed(&unexplained.path, number * BLOCK));
            }
            thread::sleep(LOOK_EVERY);
            on_block()?;
        }
    }

    /// The blocks of a file that differ, but for those that the next pass reads anyway.
    fn differing(
        &self,
        path: &Name,
        found: &Found,
        read: &mut u64,
        on_block: &mut dyn FnMut() -> Result<(), VolumeError>,
    ) -> Result<BTreeSet<u64>, VolumeError> {
        let failed = || VolumeError::io::<std::io::Error>("reading", path);
        let mut differing = BTreeSet::new();
        let due = match self.part(found.inode, found, false) {
            Part::All => return Ok(differing),
            Part::Nothing => BTreeSet::new(),
            Part::Blocks(blocks) => blocks,
        };
        // By now it is another file, or none.
        let Some(file) = self.open_found(path, found, false)? else { return Ok(differing) };
        let size = self.files.get(&found.inode).map_or(0, |known| known.size);
        let data = file::data(&file).map_err(failed())?;
        let mut numbers = BTreeSet::from_iter(blocks::with_data(&data, size));
        // Those that are holes by now as well.
        numbers.extend(self.files.get(&found.inode).into_iter().flat_map(|known| known.blocks.keys()));
        let mut contents = Vec::new();
        for number in numbers.difference(&due).copied() {
            blocks::read(&file, number, size, &mut contents).map_err(failed())?;
            *read += contents.len() as u64;
            let copied = self.files.get(&found.inode).and_then(|known| known.blocks.get(&number));
            let is_same = match copied {
                Some(hash) => *hash == blocks::hash(&contents),
                None => blocks::is_zero(&contents),
            };
            if !is_same {
                differing.insert(number);
            }
            on_block()?;
        }
        Ok(differing)
    }

    /// Leaves of `differing` what the next pass would not read.
    fn explain(&self, differing: &mut BTreeMap<u64, Differing>) -> Result<(), VolumeError> {
        if differing.is_empty() {
            return Ok(());
        }
        let fresh = tree::scan(self.root.as_fd(), &self.tree)?;
        let by_inode: BTreeMap<u64, &Found> = fresh
            .values()
            .filter(|found| matches!(found.kind, Kind::File { .. }))
            .map(|found| (found.inode, found))
            .collect();
        differing.retain(|inode, one| {
            // One that was removed is not copied.
            let Some(found) = by_inode.get(inode) else { return false };
            let size = self.files.get(inode).map_or(0, |known| known.size);
            let part = self.part(*inode, found, false);
            one.blocks.retain(|number| !is_read(&part, *number, size, found.size));
            !one.blocks.is_empty()
        });
        Ok(())
    }
}

/// Whether a pass that reads `part` of a file reads block `number`, if the file had `before` bytes when it was copied and has `now`.
fn is_read(part: &Part, number: u64, before: u64, now: u64) -> bool {
    match part {
        Part::Nothing => false,
        Part::All => true,
        Part::Blocks(blocks) => {
            blocks.contains(&number) || (before != now && number >= before.min(now) / BLOCK)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, File},
        os::unix::fs::{FileExt, MetadataExt},
        sync::{Arc, Mutex},
    };

    use super::{
        super::{
            super::{
                built::BuiltVolume,
                record::{self, Frames},
            },
            Touched, WriteLog,
        },
        *,
    };

    #[test]
    fn only_what_is_told_of_explains_a_difference() {
        let blocks = Part::Blocks([3, 7].into());
        let cases = [
            (&Part::Nothing, 3, (10, 10), false),
            (&Part::All, 3, (10, 10), true),
            (&blocks, 3, (10, 10), true),
            (&blocks, 4, (10, 10), false),
            (&blocks, 9, (10, 10), false),
            // Where it ended and where it ends is read, too.
            (&blocks, 9, (9, 10), true),
            (&blocks, 9, (10, 9), true),
            (&blocks, 8, (10, 9), false),
            (&Part::Nothing, 9, (9, 10), false),
        ];
        for (part, number, (before, now), expected) in cases {
            let is = is_read(part, number, before * BLOCK, now * BLOCK);
            assert_eq!(is, expected, "block {number} of {part:?}, {before} blocks and then {now}");
        }
    }

    /// Tells what the test has put into it.
    #[derive(Clone, Debug, Default)]
    struct Told(Arc<Mutex<BTreeMap<u64, Touched>>>);

    impl Told {
        fn tell(&self, inode: u64, block: u64) {
            self.0.lock().expect("not poisoned").entry(inode).or_default().blocks.insert(block);
        }
    }

    impl WriteLog for Told {
        fn look(&mut self) {}

        fn take(&mut self, _all: bool) -> Option<BTreeMap<u64, Touched>> {
            Some(std::mem::take(&mut *self.0.lock().expect("not poisoned")))
        }
    }

    struct Scene {
        directory: tempfile::TempDir,
        file: File,
        inode: u64,
        told: Told,
        source: SourceVolume,
        built: BuiltVolume,
    }

    impl Scene {
        /// A file that was copied, of twenty blocks of which the last ones are a hole.
        fn copied() -> Self {
            let directory = tempfile::tempdir().expect("a temporary directory");
            let from = directory.path().join("from");
            fs::create_dir(&from).expect("make");
            let file = File::create_new(from.join("big")).expect("make");
            file.write_all_at(&vec![1; 10 * BLOCK as usize], 0).expect("write");
            file.set_len(20 * BLOCK).expect("resize");
            let inode = file.metadata().expect("stat").ino();
            let told = Told::default();
            let mut source = SourceVolume::open(&from).expect("open");
            source.follow(Box::new(told.clone()));
            let built = BuiltVolume::make(&directory.path().join("arriving")).expect("make");
            let mut scene = Self { directory, file, inode, told, source, built };
            scene.pass();
            assert!(scene.source.files.values().all(|known| known.followed), "it is not followed here");
            scene
        }

        fn pass(&mut self) {
            let built = &mut self.built;
            let mut send = |frame: &[u8]| {
                record::parse(frame)?.1.into_iter().try_for_each(|record| built.take(record))?;
                Ok(())
            };
            let mut frames = Frames::unpacked(&mut send);
            self.source.pass(false, &BTreeSet::new(), &mut frames).expect("a pass");
        }

        fn compare(&mut self) -> Result<u64, VolumeError> {
            self.source.compare(&mut BTreeSet::new, &mut || Ok(()))
        }
    }

    #[test]
    fn a_write_that_nobody_told_of_is_found_wherever_it_is() {
        for block in [3, 15] {
            let mut scene = Scene::copied();
            assert_eq!(scene.compare().expect("the same"), 10 * BLOCK);
            scene.file.write_all_at(b"told", 7 * BLOCK).expect("write");
            scene.told.tell(scene.inode, 7);
            scene.compare().expect("it was told of");
            scene.file.write_all_at(b"missed", block * BLOCK + 5).expect("write");
            let error = scene.compare().expect_err("it was not told of");
            assert!(
                matches!(&error, VolumeError::Missed { path, offset } if path == "big" && *offset == block * BLOCK),
                "{error}"
            );
            // The one that was told of before still is in the next pass.
            scene.told.tell(scene.inode, block);
            scene.pass();
            scene.compare().expect("all was copied");
            let there = fs::read(scene.built.root().join("big")).expect("read");
            assert_eq!(there, fs::read(scene.directory.path().join("from/big")).expect("read"));
        }
    }

    #[test]
    fn a_write_may_be_seen_before_it_is_told_of() {
        let mut scene = Scene::copied();
        scene.file.write_all_at(b"under way", 4 * BLOCK).expect("write");
        let (told, inode) = (scene.told.clone(), scene.inode);
        let tells = thread::spawn(move || {
            thread::sleep(4 * LOOK_EVERY);
            told.tell(inode, 4);
        });
        scene.compare().expect("it was told of in time");
        tells.join().expect("no panic");
        // A file that goes meanwhile is none of the copy's.
        scene.file.write_all_at(b"and removed", 5 * BLOCK).expect("write");
        fs::remove_file(scene.directory.path().join("from/big")).expect("remove");
        scene.compare().expect("it is gone");
    }
}
