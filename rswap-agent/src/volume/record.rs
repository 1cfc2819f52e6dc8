//! What a pass sends: records, some to a frame. A frame is the volume's number (u16) and records one after the other.

use std::{
    fs::File,
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};

use super::{
    VolumeError,
    blocks::BLOCK,
    tree::{Attributes, DEPTH, DEVICES, Kind, PATH_BYTES},
};

/// Bytes of a frame at which it is sent; one more record may be behind them.
pub const FRAME_BYTES: usize = 256 << 10;
/// Bytes of a frame at most.
pub const FRAME_LIMIT: usize = 1 << 20;
/// The destination hears something at least so often.
const SILENCE: Duration = Duration::from_secs(1);
/// No file system has longer files.
pub const SIZE_LIMIT: u64 = 1 << 62;

/// One record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Record<'a> {
    /// A file has this length now; it is made if it is not there.
    File {
        /// Its number.
        inode: u64,
        /// Bytes.
        size: u64,
    },
    /// Contents.
    Data {
        /// Of which file.
        inode: u64,
        /// At which byte.
        offset: u64,
        /// How many bytes.
        length: u32,
        /// An LZ4 block of them, or, if that is no shorter, the bytes themselves.
        #[serde(with = "serde_bytes", borrow)]
        contents: &'a [u8],
    },
    /// No contents.
    Hole {
        /// Of which file.
        inode: u64,
        /// At which byte.
        offset: u64,
        /// How many bytes.
        length: u64,
    },
    /// A name goes.
    Remove {
        /// Which.
        #[serde(with = "serde_bytes", borrow)]
        path: &'a [u8],
    },
    /// A name comes, with attributes.
    Add {
        /// Which; the root is never added.
        #[serde(with = "serde_bytes", borrow)]
        path: &'a [u8],
        /// What it stands for.
        kind: Kind,
    },
    /// A name has these attributes now.
    Attributes {
        /// Which.
        #[serde(with = "serde_bytes", borrow)]
        path: &'a [u8],
        /// All of them.
        attributes: Attributes,
    },
    /// A file without a name: it is no longer needed.
    Forget {
        /// Which.
        inode: u64,
    },
    /// The pass is complete.
    End {
        /// Nothing follows: the instance is frozen.
        last: bool,
    },
}

/// Sends a frame.
pub type Sender<'a> = dyn FnMut(&[u8]) -> Result<(), Box<dyn std::error::Error + Send + Sync>> + 'a;

/// What became of a block that was to be [shared](Frames::share).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shared {
    /// The copy has it.
    Yes,
    /// It has to be sent.
    No,
    /// It has to be sent, and so has every other one.
    Never,
}

/// Has the copy share a block of a file: the file's number, the file, the block's number and its hash.
pub type Sharer<'a> = dyn FnMut(u64, &File, u64, u128) -> Result<Shared, VolumeError> + 'a;

/// Puts records into frames.
pub struct Frames<'a> {
    volume: u16,
    buffer: Vec<u8>,
    sent_at: Instant,
    packs: bool,
    /// Bytes of contents, unpacked, since the beginning.
    pub contents_bytes: u64,
    /// Bytes of contents that are shared, since the beginning.
    pub shared_bytes: u64,
    send: &'a mut Sender<'a>,
    sharer: Option<&'a mut Sharer<'a>>,
}

impl<'a> Frames<'a> {
    /// For the volume with this number.
    pub fn new(volume: u16, send: &'a mut Sender<'a>) -> Self {
        Self {
            volume,
            buffer: Vec::new(),
            sent_at: Instant::now(),
            packs: true,
            contents_bytes: 0,
            shared_bytes: 0,
            send,
            sharer: None,
        }
    }

    /// For a volume that stays on this host: nothing is packed.
    pub fn unpacked(send: &'a mut Sender<'a>) -> Self {
        Self { packs: false, ..Self::new(0, send) }
    }

    /// Blocks need not be sent where the copy can share them.
    pub fn with_sharer(self, sharer: &'a mut Sharer<'a>) -> Self {
        Self { sharer: Some(sharer), ..self }
    }

    /// Has the copy share block `number` of a file, which has this hash, instead of sending it. Says whether it does.
    pub fn share(&mut self, inode: u64, file: &File, number: u64, hash: u128) -> Result<bool, VolumeError> {
        if self.sharer.is_none() {
            return Ok(false);
        }
        // What the copy must know of the file.
        if !self.buffer.is_empty() {
            self.flush()?;
        }
        let shared = match &mut self.sharer {
            Some(sharer) => sharer(inode, file, number, hash)?,
            None => Shared::Never,
        };
        match shared {
            Shared::Yes => self.shared_bytes += BLOCK,
            Shared::No => {}
            Shared::Never => self.sharer = None,
        }
        Ok(shared == Shared::Yes)
    }

    /// Adds a record.
    pub fn put(&mut self, record: &Record<'_>) -> Result<(), VolumeError> {
        if self.buffer.is_empty() {
            self.buffer.extend(self.volume.to_le_bytes());
        }
        let bytes = postcard::to_stdvec(record).map_err(|error| VolumeError::Send(error.into()))?;
        self.buffer.extend(bytes);
        if self.buffer.len() >= FRAME_BYTES { self.flush() } else { Ok(()) }
    }

    /// Adds contents, packed if that pays.
    pub fn put_data(&mut self, inode: u64, offset: u64, contents: &[u8]) -> Result<(), VolumeError> {
        self.contents_bytes += contents.len() as u64;
        let packed = if self.packs { lz4_flex::block::compress(contents) } else { contents.to_vec() };
        let length = contents.len() as u32;
        let contents = if packed.len() < contents.len() { &packed } else { contents };
        self.put(&Record::Data { inode, offset, length, contents })
    }

    /// Lets the destination know, now and then, that the source is at work: reading what did not change sends nothing.
    pub fn say_alive(&mut self) -> Result<(), VolumeError> {
        if self.sent_at.elapsed() > SILENCE { self.flush() } else { Ok(()) }
    }

    /// Sends what waits.
    pub fn flush(&mut self) -> Result<(), VolumeError> {
        if self.buffer.is_empty() {
            self.buffer.extend(self.volume.to_le_bytes());
        }
        (self.send)(&self.buffer).map_err(VolumeError::Send)?;
        self.buffer.clear();
        self.sent_at = Instant::now();
        Ok(())
    }
}

/// The volume's number, and the frame's records.
pub fn parse(frame: &[u8]) -> Result<(u16, Vec<Record<'_>>), VolumeError> {
    let (number, mut rest) = frame.split_first_chunk().ok_or(VolumeError::Damaged("an empty frame"))?;
    let mut records = Vec::new();
    while !rest.is_empty() {
        let (record, after) =
            postcard::take_from_bytes(rest).map_err(|_| VolumeError::Damaged("it can't be read"))?;
        validate(&record)?;
        records.push(record);
        rest = after;
    }
    Ok((u16::from_le_bytes(*number), records))
}

/// The contents of a [`Record::Data`].
pub fn unpack(contents: &[u8], length: u32) -> Result<Vec<u8>, VolumeError> {
    if contents.len() == length as usize {
        return Ok(contents.to_vec());
    }
    // The length was checked, so the buffer is a block at most.
    let unpacked = lz4_flex::block::decompress(contents, length as usize);
    let unpacked = unpacked.map_err(|_| VolumeError::Damaged("contents that can't be unpacked"))?;
    match unpacked.len() == length as usize {
        true => Ok(unpacked),
        false => Err(VolumeError::Damaged("contents of another length")),
    }
}

fn validate(record: &Record<'_>) -> Result<(), VolumeError> {
    let fits = |offset: u64, length: u64| offset.checked_add(length).is_some_and(|end| end <= SIZE_LIMIT);
    let sound = match record {
        Record::File { size, .. } => *size <= SIZE_LIMIT,
        Record::Data { offset, length, contents, .. } => {
            let length = u64::from(*length);
            length <= BLOCK && contents.len() as u64 <= length && fits(*offset, length)
        }
        Record::Hole { offset, length, .. } => fits(*offset, *length),
        Record::Remove { path } | Record::Add { path, .. } => !path.is_empty() && is_below(path),
        Record::Attributes { path, attributes } => {
            is_below(path)
                && attributes.mode & !0o7777 == 0
                && attributes.xattrs.iter().all(|(n, _)| is_plain(n))
        }
        Record::Forget { .. } | Record::End { .. } => true,
    };
    let kind_sound = match record {
        Record::Add { kind: Kind::Symlink { target }, .. } => {
            !target.is_empty() && target.len() < PATH_BYTES && is_plain(target)
        }
        Record::Add { kind: Kind::Device { major, minor }, .. } => DEVICES.contains(&(*major, *minor)),
        _ => true,
    };
    if sound && kind_sound { Ok(()) } else { Err(VolumeError::Damaged("a record that no source sends")) }
}

fn is_plain(text: &[u8]) -> bool {
    !text.contains(&0)
}

/// Whether a path leads from the root downwards, and nowhere else.
fn is_below(path: &[u8]) -> bool {
    let part = |part: &[u8]| !matches!(part, b"" | b"." | b"..") && part.len() <= 255;
    path.is_empty()
        || (path.len() < PATH_BYTES
            && is_plain(path)
            && path.split(|byte| *byte == b'/').all(part)
            && path.iter().filter(|byte| **byte == b'/').count() <= DEPTH)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame_of(records: &[Record<'_>]) -> Vec<u8> {
        let mut sent = Vec::new();
        let mut send = |frame: &[u8]| -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
            sent.extend_from_slice(frame);
            Ok(())
        };
        let mut frames = Frames::new(3, &mut send);
        for record in records {
            frames.put(record).expect("put");
        }
        frames.flush().expect("flush");
        sent
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn a_damaged_frame_never_panics(at in 0_usize..60, to in any::<u8>()) {
            let path = b"base/1/1259";
            let attributes = Attributes { xattrs: vec![(b"user.a".to_vec(), b"b".to_vec())], ..Default::default() };
            let mut bytes = frame_of(&[
                Record::Add { path, kind: Kind::Symlink { target: b"../x".to_vec() } },
                Record::Attributes { path, attributes },
                Record::Data { inode: 1, offset: 0, length: 4, contents: b"1234" },
            ]);
            let at = at % bytes.len();
            bytes[at] = to;
            for record in parse(&bytes).map(|(_, records)| records).unwrap_or_default() {
                if let Record::Data { length, contents, .. } = record {
                    let _ = unpack(contents, length);
                }
            }
        }

        #[test]
        fn records_come_back(inode in any::<u64>(), offset in 0..SIZE_LIMIT / 2, contents in prop::collection::vec(any::<u8>(), 0..300)) {
            let length = contents.len() as u32;
            let records = [Record::File { inode, size: offset }, Record::Data { inode, offset, length, contents: &contents },
                Record::Hole { inode, offset, length: 7 }, Record::End { last: true }];
            let bytes = frame_of(&records);
            prop_assert_eq!(parse(&bytes).expect("sound"), (3, records.to_vec()));
        }

        #[test]
        fn no_path_leads_out(parts in prop::collection::vec("(\\.\\.|\\.|[a-z]{0,3}|/)", 0..6)) {
            let path = parts.join("/").into_bytes();
            let record = Record::Add { path: &path, kind: Kind::Fifo };
            if parse(&frame_of(&[record])).is_ok() {
                prop_assert!(!path.starts_with(b"/") && !path.is_empty());
                prop_assert!(path.split(|b| *b == b'/').all(|part| !part.is_empty() && part != b".." && part != b"."));
            }
        }
    }

    #[test]
    fn contents_longer_than_a_block_are_refused() {
        let huge = Record::Data { inode: 1, offset: 0, length: u32::MAX, contents: b"x" };
        assert!(parse(&frame_of(&[huge])).is_err());
        assert!(unpack(b"xx", 3).is_err());
    }
}
