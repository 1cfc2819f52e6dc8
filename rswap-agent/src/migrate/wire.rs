//! The frames of a migration. `docs/wire.md` has the table and the sequence.
//!
//! A frame is a tag (one byte), the payload's length (four bytes, little-endian) and the payload. Each tag
//! has a maximum: a longer frame is refused before anything is allocated for it.

use std::io::{self, Read, Write};

use bytes::{Buf, BufMut};
use serde::{Deserialize, Serialize};

use super::{
    codec::Encoding,
    journal::MigrationId,
    lanes::MAX_LANES,
    traits::{PAGE_SIZE, PageRange},
};

/// First bytes of a [`Hello`].
pub const MAGIC: u32 = u32::from_le_bytes(*b"RSWP");
/// The newest version that this build speaks, which is also the oldest.
pub const VERSION: u16 = 11;
/// Pages of a batch at most.
pub const BATCH_PAGES: usize = 64;

/// No user-space address is larger, five-level page tables included.
const ADDRESS_LIMIT: u64 = 1 << 56;
const KIB: usize = 1024;
const HEADER: usize = 5;
const PAGE_HEADER: usize = 4 + 8 + 1 + 2;

/// A frame's tag: explicit numbers, never used for anything else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Tag {
    /// [`Hello`], from both sides.
    Hello = 1,
    /// What the destination must be able to do; opaque to the wire.
    Offer = 2,
    /// The destination is ready: the migration's id, as it came.
    Accept = 3,
    /// The mappings, opaque to the wire.
    Layout = 4,
    /// Ranges without contents.
    Discard = 5,
    /// A batch of pages.
    Pages = 6,
    /// The round is complete.
    RoundEnd = 7,
    /// All of it was written and read back.
    RoundAck = 8,
    /// The task's image, opaque to the wire: nothing follows but the commit.
    Image = 9,
    /// The destination's digest: it is ready to run.
    Verified = 10,
    /// The source will never run again.
    Commit = 11,
    /// The destination runs.
    Activated = 12,
    /// This side has failed, and why.
    Abort = 13,
    /// An offer that is only a question: what would be refused. Nothing is made.
    Probe = 14,
    /// The answer to it: a list of objections.
    ProbeAnswer = 15,
    /// What changed in a volume, opaque to the wire.
    Volume = 16,
    /// Instead of an offer: what became of this migration?
    Inquire = 17,
    /// The answer: a [`Fate`](super::rules::Fate)'s number.
    Fate = 18,
    /// Nothing of this migration is in doubt at the source; from the destination: it has forgotten it.
    Settled = 19,
    // 20 to 24 are the first bytes of TLS records.
    /// Instead of an offer: this connection is a lane of a migration.
    Join = 25,
    /// How many lanes there are: what follows comes over them.
    Lanes = 26,
}

/// Bytes of a migration's id.
pub const ID_BYTES: usize = 16;

impl Tag {
    fn from_number(number: u8) -> Option<Self> {
        use Tag::*;
        [
            Hello,
            Offer,
            Accept,
            Layout,
            Discard,
            Pages,
            RoundEnd,
            RoundAck,
            Image,
            Verified,
            Commit,
            Activated,
            Abort,
            Probe,
            ProbeAnswer,
            Volume,
            Inquire,
            Fate,
            Settled,
            Join,
            Lanes,
        ]
        .into_iter()
        .find(|tag| *tag as u8 == number)
    }

    /// Bytes of payload at most.
    pub fn limit(self) -> usize {
        match self {
            Self::Hello => 64,
            // They come from anybody who reaches the port, before a place among the arrivals is taken.
            Self::Offer | Self::Probe => 4 * KIB * KIB,
            Self::Layout | Self::Image => 64 * KIB * KIB,
            Self::Discard | Self::ProbeAnswer | Self::Volume => KIB * KIB,
            Self::Pages => BATCH_PAGES * (PAGE_SIZE + PAGE_HEADER),
            Self::Verified => 16,
            Self::Accept | Self::Inquire | Self::Settled => ID_BYTES,
            Self::Join => ID_BYTES + 1,
            Self::Fate | Self::Lanes => 1,
            Self::Abort => 16 * KIB,
            Self::RoundEnd | Self::RoundAck | Self::Commit | Self::Activated => 0,
        }
    }
}

/// The first byte of a TLS record says what it is (RFC 8446, section 5.1); no tag of ours is one of these.
const TLS_ALERT: u8 = 21;
const TLS_HANDSHAKE: u8 = 22;

fn speaks_tls(tag: u8) -> &'static str {
    match tag {
        TLS_ALERT | TLS_HANDSHAKE => {
            ": it speaks TLS, and this host does not (set tls.ca, tls.certificate and tls.key)"
        }
        _ => "",
    }
}

/// Why bytes are not a frame.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The link failed or ended.
    #[error("the link")]
    Io(#[from] io::Error),
    /// There is no such tag.
    #[error("unknown tag {0}{hint}", hint = speaks_tls(*.0))]
    Tag(u8),
    /// The frame says that it is longer than its kind may be.
    #[error("a {tag:?} frame of {len} bytes, at most {limit} are allowed")]
    TooLong {
        /// Its kind.
        tag: Tag,
        /// Its length, in bytes.
        len: usize,
        /// The maximum, in bytes.
        limit: usize,
    },
    /// The payload isn't what its tag says.
    #[error("a malformed {0:?} frame")]
    Malformed(Tag),
}

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Its kind.
    pub tag: Tag,
    /// What it carries.
    pub payload: Vec<u8>,
}

/// The first frame of each side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`MAGIC`].
    pub magic: u32,
    /// Oldest and newest version spoken.
    pub versions: (u16, u16),
}

impl Hello {
    /// Ours.
    pub fn ours() -> Self {
        Self { magic: MAGIC, versions: (VERSION, VERSION) }
    }
}

/// The newest version that both speak, or why there is none.
pub fn negotiate(ours: &Hello, theirs: &Hello) -> Result<u16, String> {
    if theirs.magic != MAGIC {
        return Err("this is not an rswap peer".into());
    }
    let newest = ours.versions.1.min(theirs.versions.1);
    if newest < ours.versions.0.max(theirs.versions.0) {
        let (from, to) = theirs.versions;
        return Err(format!(
            "the peer speaks versions {from} to {to}, we {:?}: use the same release",
            ours.versions
        ));
    }
    Ok(newest)
}

/// Writes a frame.
pub fn write_frame(stream: &mut impl Write, tag: Tag, payload: &[u8]) -> Result<u64, WireError> {
    let limit = tag.limit();
    if payload.len() > limit {
        return Err(WireError::TooLong { tag, len: payload.len(), limit });
    }
    let mut header = [0; HEADER];
    header[0] = tag as u8;
    header[1..].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    stream.write_all(&header)?;
    stream.write_all(payload)?;
    Ok((HEADER + payload.len()) as u64)
}

/// Reads a frame.
pub fn read_frame(stream: &mut impl Read) -> Result<Frame, WireError> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header)?;
    let tag = Tag::from_number(header[0]).ok_or(WireError::Tag(header[0]))?;
    let len = (&header[1..]).get_u32_le() as usize;
    let limit = tag.limit();
    if len > limit {
        return Err(WireError::TooLong { tag, len, limit });
    }
    // Grows with what really comes: an announced length alone costs next to nothing.
    let mut payload = Vec::with_capacity(len.min(64 * KIB));
    let got = stream.by_ref().take(len as u64).read_to_end(&mut payload)?;
    if got < len {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(Frame { tag, payload })
}

/// The payload of an `Offer` frame: the migration's id, then what the instance needs.
pub fn write_offer(id: MigrationId, requirements: &[u8]) -> Vec<u8> {
    let mut payload = id.0.to_le_bytes().to_vec();
    payload.put_slice(requirements);
    payload
}

/// Reads the payload of an `Offer` frame.
pub fn parse_offer(payload: &[u8]) -> Result<(MigrationId, &[u8]), WireError> {
    let (id, requirements) = payload.split_first_chunk().ok_or(WireError::Malformed(Tag::Offer))?;
    Ok((MigrationId(u128::from_le_bytes(*id)), requirements))
}

/// Reads the payload of an `Inquire` or `Settled` frame.
pub fn parse_id(tag: Tag, payload: &[u8]) -> Result<MigrationId, WireError> {
    let id = payload.try_into().map_err(|_| WireError::Malformed(tag))?;
    Ok(MigrationId(u128::from_le_bytes(id)))
}

/// The payload of a `Join` frame: the migration's id, and which of its lanes this is.
pub fn write_join(id: MigrationId, number: u8) -> Vec<u8> {
    let mut payload = id.0.to_le_bytes().to_vec();
    payload.put_u8(number);
    payload
}

/// Reads the payload of a `Join` frame.
pub fn parse_join(payload: &[u8]) -> Result<(MigrationId, u8), WireError> {
    match payload.split_first_chunk() {
        Some((id, &[number])) => Ok((MigrationId(u128::from_le_bytes(*id)), number)),
        _ => Err(WireError::Malformed(Tag::Join)),
    }
}

/// Reads the payload of a `Lanes` frame: how many.
pub fn parse_lanes(payload: &[u8]) -> Result<u8, WireError> {
    match payload {
        &[lanes @ 1..=MAX_LANES] => Ok(lanes),
        _ => Err(WireError::Malformed(Tag::Lanes)),
    }
}

/// Adds a page to a batch.
pub fn push_page(batch: &mut Vec<u8>, space: u32, addr: u64, encoding: Encoding, data: &[u8]) {
    batch.put_u32_le(space);
    batch.put_u64_le(addr);
    batch.put_u8(encoding as u8);
    batch.put_u16_le(data.len() as u16);
    batch.put_slice(data);
}

/// A page in a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRecord<'a> {
    /// Address space.
    pub space: u32,
    /// Address.
    pub addr: u64,
    /// How it is written.
    pub encoding: Encoding,
    /// What is written.
    pub data: &'a [u8],
}

/// The pages of a batch.
pub fn parse_pages(mut payload: &[u8]) -> Result<Vec<PageRecord<'_>>, WireError> {
    let malformed = || WireError::Malformed(Tag::Pages);
    let mut pages = Vec::new();
    while !payload.is_empty() {
        if payload.len() < PAGE_HEADER || pages.len() == BATCH_PAGES {
            return Err(malformed());
        }
        let (space, addr) = (payload.get_u32_le(), payload.get_u64_le());
        let encoding = Encoding::from_number(payload.get_u8()).ok_or_else(malformed)?;
        let len = payload.get_u16_le() as usize;
        let page = addr.is_multiple_of(PAGE_SIZE as u64) && addr < ADDRESS_LIMIT;
        if len > payload.len() || len > PAGE_SIZE || !page {
            return Err(malformed());
        }
        let (data, rest) = payload.split_at(len);
        payload = rest;
        pages.push(PageRecord { space, addr, encoding, data });
    }
    Ok(pages)
}

/// Ranges per `Discard` frame at most.
pub const DISCARD_RANGES: usize = 32 * KIB;

/// The payload of a `Discard` frame.
pub fn write_ranges(ranges: &[PageRange]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(ranges.len() * 20);
    for range in ranges {
        payload.put_u32_le(range.space);
        payload.put_u64_le(range.start);
        payload.put_u64_le(range.pages);
    }
    payload
}

/// Reads the payload of a `Discard` frame.
pub fn parse_ranges(mut payload: &[u8]) -> Result<Vec<PageRange>, WireError> {
    if !payload.len().is_multiple_of(20) {
        return Err(WireError::Malformed(Tag::Discard));
    }
    let mut ranges = Vec::with_capacity(payload.len() / 20);
    while payload.has_remaining() {
        let (space, start, pages) = (payload.get_u32_le(), payload.get_u64_le(), payload.get_u64_le());
        let end = pages.checked_mul(PAGE_SIZE as u64).and_then(|len| start.checked_add(len));
        if end.is_none_or(|end| end > ADDRESS_LIMIT) || !start.is_multiple_of(PAGE_SIZE as u64) {
            return Err(WireError::Malformed(Tag::Discard));
        }
        ranges.push(PageRange { space, start, pages });
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic_nor_allocate_beyond_what_came(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(frame) = read_frame(&mut &bytes[..]) {
                prop_assert!(frame.payload.len() <= bytes.len());
            }
            let _ = parse_pages(&bytes);
            let _ = parse_ranges(&bytes);
            let _ = parse_offer(&bytes);
            let _ = parse_id(Tag::Inquire, &bytes);
            let _ = parse_join(&bytes);
            let _ = parse_lanes(&bytes);
        }

        #[test]
        fn a_batch_comes_back(pages in prop::collection::vec((any::<u32>(), 0_u64..1 << 40, 1_u8..4,
                prop::collection::vec(any::<u8>(), 0..100)), 0..BATCH_PAGES)) {
            let mut batch = Vec::new();
            for (space, page, encoding, data) in &pages {
                let encoding = Encoding::from_number(*encoding).expect("a valid number");
                push_page(&mut batch, *space, page << 12, encoding, data);
            }
            let parsed = parse_pages(&batch).expect("a valid batch");
            prop_assert_eq!(parsed.len(), pages.len());
            for (record, (space, page, _, data)) in parsed.iter().zip(&pages) {
                prop_assert_eq!((record.space, record.addr, record.data), (*space, page << 12, &data[..]));
            }
        }

        #[test]
        fn ranges_come_back(ranges in prop::collection::vec((any::<u32>(), 0_u64..1 << 36, 0_u64..1 << 20), 0..50)) {
            let ranges: Vec<PageRange> =
                ranges.into_iter().map(|(space, page, pages)| PageRange { space, start: page << 12, pages }).collect();
            prop_assert_eq!(parse_ranges(&write_ranges(&ranges)).expect("valid ranges"), ranges);
        }
    }

    #[test]
    fn a_frame_that_is_too_long_is_refused_before_it_is_read() {
        let mut bytes = vec![Tag::Verified as u8];
        bytes.extend(17_u32.to_le_bytes());
        assert!(matches!(read_frame(&mut &bytes[..]), Err(WireError::TooLong { len: 17, limit: 16, .. })));
    }

    #[test]
    fn a_truncated_frame_and_an_unknown_tag_are_refused() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, Tag::Abort, b"because").expect("writing to memory");
        assert!(matches!(read_frame(&mut &bytes[..bytes.len() - 1]), Err(WireError::Io(_))));
        bytes[0] = 99;
        assert!(matches!(read_frame(&mut &bytes[..]), Err(WireError::Tag(99))));
    }

    #[test]
    fn the_newest_common_version_wins_and_none_is_refused() {
        let peer = |from, to| Hello { magic: MAGIC, versions: (from, to) };
        assert_eq!(negotiate(&peer(1, 3), &peer(2, 5)), Ok(3));
        assert!(negotiate(&peer(1, 1), &peer(2, 5)).is_err());
        assert!(negotiate(&peer(1, 1), &Hello { magic: 7, versions: (1, 1) }).is_err());
    }
}
