//! Volumes of real files go from directory to directory, as they are.

use std::os::unix::{fs as unix, net::UnixListener};

use std::sync::{Arc, Mutex};

use super::*;
use crate::volume::{
    record::Frames,
    source::{SourceVolume, Touched, WriteLog},
};

type Sent = Vec<Vec<u8>>;

/// One pass of `source`.
fn pass(source: &mut SourceVolume, last: bool, mapped: &[u64]) -> Sent {
    let mut sent = Sent::new();
    let mut send = |frame: &[u8]| -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        sent.push(frame.to_vec());
        Ok(())
    };
    let mapped = mapped.iter().copied().collect();
    source.pass(last, &mapped, &mut Frames::new(0, &mut send)).expect("a pass");
    sent
}

fn apply(built: &mut BuiltVolume, frames: &Sent) -> Result<(), VolumeError> {
    for frame in frames {
        for record in record::parse(frame)?.1 {
            built.take(record)?;
        }
    }
    Ok(())
}

struct Scene {
    scratch: tempfile::TempDir,
    source: SourceVolume,
    built: BuiltVolume,
}

impl Scene {
    fn new() -> Self {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir(scratch.path().join("from")).expect("make");
        let source = SourceVolume::open(&scratch.path().join("from")).expect("open");
        let built = BuiltVolume::make(&scratch.path().join("arriving")).expect("make");
        Self { scratch, source, built }
    }

    fn from(&self, name: &str) -> PathBuf {
        self.scratch.path().join("from").join(name)
    }

    fn to(&self, name: &str) -> PathBuf {
        self.built.root().join(name)
    }

    fn pass(&mut self, last: bool) {
        let sent = pass(&mut self.source, last, &[]);
        apply(&mut self.built, &sent).expect("apply");
    }

    fn end(mut self) -> Self {
        self.pass(true);
        assert_eq!(self.source.digest(), self.built.digest().expect("complete"));
        self.built.finish().expect("finish");
        self
    }
}

#[test]
fn contents_that_are_not_what_was_read_are_found() {
    for damage in [None, Some(&b"X"[..])] {
        let mut scene = Scene::new();
        fs::write(scene.from("table"), b"what was written").expect("write");
        let inode = fs::metadata(scene.from("table")).expect("it").ino();
        scene.pass(false);
        if let Some(contents) = damage {
            scene.built.take(Record::Data { inode, offset: 0, length: 1, contents }).expect("sound");
        }
        scene.pass(true);
        let same = scene.source.digest() == scene.built.digest().expect("complete");
        assert_eq!(same, damage.is_none());
    }
}

#[test]
fn everything_arrives_as_it_was() {
    let scene = Scene::new();
    fs::create_dir_all(scene.from("base/1")).expect("make");
    fs::write(scene.from("base/1/table"), vec![7; 200_000]).expect("write");
    fs::hard_link(scene.from("base/1/table"), scene.from("linked")).expect("link");
    unix::symlink("/etc/passwd", scene.from("symlink")).expect("link");
    nix::unistd::mkfifo(&scene.from("fifo"), nix::sys::stat::Mode::S_IRUSR).expect("make");
    drop(UnixListener::bind(scene.from("socket")).expect("bind"));
    fs::set_permissions(scene.from("base/1/table"), Permissions::from_mode(0o2640)).expect("chmod");
    let sparse = File::create(scene.from("sparse")).expect("make");
    sparse.write_all_at(b"far", 40 << 20).expect("write");
    rustix::fs::setxattr(scene.from("linked"), "user.colour", b"blue", XattrFlags::empty()).ok();
    fs::File::open(scene.from("base/1/table"))
        .and_then(|file| file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000, 5)))
        .expect("utimes");
    let scene = scene.end();
    let table = fs::metadata(scene.to("base/1/table")).expect("there");
    assert_eq!(table.ino(), fs::metadata(scene.to("linked")).expect("there").ino());
    assert_eq!((table.nlink(), table.mode() & 0o7777), (2, 0o2640));
    assert_eq!((table.mtime(), table.mtime_nsec()), (1_000_000, 5));
    assert_eq!(fs::read(scene.to("linked")).expect("read"), vec![7; 200_000]);
    assert_eq!(fs::read_link(scene.to("symlink")).expect("there"), Path::new("/etc/passwd"));
    let sparse = fs::metadata(scene.to("sparse")).expect("there");
    assert_eq!(sparse.len(), (40 << 20) + 3);
    assert!(sparse.blocks() * 512 < 1 << 20, "the hole was filled");
    let xattr = |name: &str| rustix::fs::getxattr(scene.to(name), "user.colour", &mut [0; 64][..]).ok();
    let theirs = rustix::fs::getxattr(scene.from("linked"), "user.colour", &mut [0; 64][..]).ok();
    assert_eq!(xattr("linked"), theirs);
}

#[test]
fn what_changes_between_passes_arrives_too() {
    let mut scene = Scene::new();
    for name in ["grows", "shrinks", "renamed", "removed", "mapped", "becomes-a-directory"] {
        fs::write(scene.from(name), name.repeat(30_000)).expect("write");
    }
    fs::create_dir_all(scene.from("old/deep")).expect("make");
    fs::write(scene.from("old/deep/file"), "deep").expect("write");
    scene.pass(false);
    let append = File::options().append(true).open(scene.from("grows")).expect("open");
    std::io::Write::write_all(&mut &append, b"more").expect("write");
    File::options().write(true).open(scene.from("shrinks")).expect("open").set_len(70_000).expect("cut");
    fs::rename(scene.from("renamed"), scene.from("renamed.new")).expect("rename");
    fs::remove_file(scene.from("removed")).expect("remove");
    fs::remove_file(scene.from("becomes-a-directory")).expect("remove");
    fs::create_dir(scene.from("becomes-a-directory")).expect("make");
    fs::write(scene.from("becomes-a-directory/inside"), "in").expect("write");
    fs::rename(scene.from("old"), scene.from("new")).expect("rename");
    scene.pass(false);
    file::punch_hole(&File::options().write(true).open(scene.from("shrinks")).expect("open"), 0, 65536)
        .expect("hole");
    let scene = scene.end();
    for name in ["grows", "shrinks", "renamed.new", "becomes-a-directory/inside", "new/deep/file"] {
        assert_eq!(fs::read(scene.to(name)).expect(name), fs::read(scene.from(name)).expect(name), "{name}");
    }
    assert!(!scene.to("renamed").exists() && !scene.to("removed").exists() && !scene.to("old").exists());
}

#[test]
fn only_changed_blocks_are_sent_again() {
    let mut scene = Scene::new();
    let noise: Vec<u8> =
        (0..4_u64 << 20).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect();
    fs::write(scene.from("big"), &noise).expect("write");
    scene.pass(false);
    File::options()
        .write(true)
        .open(scene.from("big"))
        .expect("open")
        .write_all_at(b"x", 3 << 20)
        .expect("write");
    let sent = pass(&mut scene.source, false, &[]);
    apply(&mut scene.built, &sent).expect("apply");
    let bytes: usize = sent.iter().map(Vec::len).sum();
    assert!(bytes < 100_000, "{bytes} bytes for one changed block");
    scene.end();
}

/// A log that tells what the test has put into it.
#[derive(Clone, Debug, Default)]
struct Told(Arc<Mutex<Option<BTreeMap<u64, Touched>>>>);

impl Told {
    fn tell(&self, inode: u64, whole: bool, blocks: &[u64]) {
        let mut told = self.0.lock().expect("not poisoned");
        let touched = told.get_or_insert_default().entry(inode).or_default();
        touched.whole |= whole;
        touched.blocks.extend(blocks);
    }
}

impl WriteLog for Told {
    fn look(&mut self) {}

    fn take(&mut self, _all: bool) -> Option<BTreeMap<u64, Touched>> {
        self.0.lock().expect("not poisoned").as_mut().map(std::mem::take)
    }
}

#[test]
fn with_a_log_only_what_it_names_is_read_and_all_when_it_does_not_know() {
    let mut scene = Scene::new();
    let told = Told::default();
    *told.0.lock().expect("not poisoned") = Some(BTreeMap::new());
    scene.source.follow(Box::new(told.clone()));
    let mut expected = vec![1; 20 * BLOCK as usize];
    fs::write(scene.from("big"), &expected).expect("write");
    let file = File::options().write(true).open(scene.from("big")).expect("open");
    let inode = file.metadata().expect("stat").ino();
    scene.pass(false);
    // Written, and not told of: it is not looked at.
    file.write_all_at(b"unseen", 9 * BLOCK).expect("write");
    file.write_all_at(b"seen", 3 * BLOCK).expect("write");
    expected[3 * BLOCK as usize..][..4].copy_from_slice(b"seen");
    told.tell(inode, false, &[3]);
    scene.pass(false);
    assert!(fs::read(scene.to("big")).expect("read") == expected, "another part than the one told of");
    // It grows.
    expected[9 * BLOCK as usize..][..6].copy_from_slice(b"unseen");
    file.set_len(21 * BLOCK + 7).expect("resize");
    expected.resize(21 * BLOCK as usize + 7, 0);
    told.tell(inode, false, &[20, 400]);
    file.write_all_at(b"end", 21 * BLOCK).expect("write");
    expected[21 * BLOCK as usize..][..3].copy_from_slice(b"end");
    told.tell(inode, false, &[9]);
    scene.pass(false);
    assert!(fs::read(scene.to("big")).expect("read") == expected, "what has grown");
    // In a way that is not followed, from then on: times have to tell.
    told.tell(inode, true, &[]);
    file.write_all_at(b"direct", 5 * BLOCK).expect("write");
    expected[5 * BLOCK as usize..][..6].copy_from_slice(b"direct");
    scene.pass(false);
    file.write_all_at(b"again", 6 * BLOCK).expect("write");
    expected[6 * BLOCK as usize..][..5].copy_from_slice(b"again");
    scene.pass(false);
    assert!(fs::read(scene.to("big")).expect("read") == expected, "what the log can't follow");
    // It has lost something.
    let another = vec![2; 10 * BLOCK as usize];
    fs::write(scene.from("another"), &another).expect("write");
    scene.pass(false);
    *told.0.lock().expect("not poisoned") = None;
    File::options()
        .write(true)
        .open(scene.from("another"))
        .expect("open")
        .write_all_at(b"lost", 8 * BLOCK)
        .expect("write");
    let scene = scene.end();
    assert_eq!(fs::read(scene.to("another")).expect("read")[8 * BLOCK as usize..][..4], *b"lost");
}

#[test]
fn what_is_mapped_for_writing_is_read_again_though_its_times_say_nothing() {
    let mut scene = Scene::new();
    fs::write(scene.from("mapped"), "before").expect("write");
    let file = File::options().write(true).open(scene.from("mapped")).expect("open");
    let old = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1000);
    file.set_modified(old).expect("utimes");
    let inode = file.metadata().expect("stat").ino();
    let sent = pass(&mut scene.source, false, &[inode]);
    apply(&mut scene.built, &sent).expect("apply");
    file.write_all_at(b"AFTER", 0).expect("write");
    file.set_modified(old).expect("utimes");
    let scene = scene.end();
    assert_eq!(fs::read(scene.to("mapped")).expect("read"), b"AFTERe");
}

#[test]
fn a_peer_cannot_reach_out_of_the_volume() {
    let mut scene = Scene::new();
    let outside = scene.scratch.path().join("outside");
    fs::create_dir(&outside).expect("make");
    let target = outside.as_os_str().as_encoded_bytes().to_vec();
    let add = |path, kind| Record::Add { path, kind };
    scene.built.take(add(b"way", Kind::Symlink { target })).expect("a link is only a link");
    scene.built.take(Record::File { inode: 1, size: 4 }).expect("a file");
    let hostile = [
        add(b"way/evil", Kind::File { inode: 1 }),
        add(b"way/evil", Kind::Directory),
        add(b"way/evil", Kind::Fifo),
        add(b"missing/evil", Kind::Fifo),
        add(b"evil", Kind::File { inode: 2 }),
        Record::Remove { path: b"way/x" },
        Record::Attributes { path: b"way/x", attributes: Attributes::default() },
        Record::Data { inode: 1, offset: 1, length: 4, contents: b"1234" },
        Record::Data { inode: 9, offset: 0, length: 1, contents: b"1" },
        Record::Hole { inode: 1, offset: 4, length: u64::MAX },
        Record::Forget { inode: 9 },
    ];
    for record in hostile {
        assert!(scene.built.take(record.clone()).is_err(), "{record:?} was taken");
    }
    assert_eq!(fs::read_dir(&outside).expect("list").count(), 0);
}

#[test]
fn one_that_was_not_kept_is_gone_and_one_that_was_is_in_its_place() {
    let mut scene = Scene::new();
    fs::write(scene.from("file"), "contents").expect("write");
    scene.pass(false);
    let place = scene.scratch.path().join("volumes/web/data");
    let scene = scene.end();
    let arriving = scene.scratch.path().join("arriving");
    scene.built.keep(&place).expect("keep");
    assert_eq!(fs::read(place.join("file")).expect("read"), b"contents");
    assert!(!arriving.exists());
    drop(BuiltVolume::make(&arriving).expect("make"));
    assert!(!arriving.exists());
}
