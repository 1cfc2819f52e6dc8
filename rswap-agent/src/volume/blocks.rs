//! A file's contents, block by block: which have data, and their hashes.

use std::{collections::BTreeMap, fs::File, io, ops::Range};

use xxhash_rust::xxh3::xxh3_128;

use crate::sys::file;

/// Bytes in a block: the unit of comparison. A changed byte costs the transfer of a block.
pub const BLOCK: u64 = 64 << 10;

/// The hash of each block that has data, by its number. A block that is missing is a hole.
pub type Blocks = BTreeMap<u64, u128>;

/// Where block `number` of a file of `size` bytes lies.
pub fn range(number: u64, size: u64) -> Range<u64> {
    let start = number * BLOCK;
    start..(start + BLOCK).min(size)
}

/// Reads block `number`; what lies behind the file's end is left out.
pub fn read(file: &File, number: u64, size: u64, buffer: &mut Vec<u8>) -> io::Result<()> {
    let range = range(number, size);
    buffer.resize(range.end.saturating_sub(range.start) as usize, 0);
    let got = file::read_at(file, buffer, range.start)?;
    buffer[got..].fill(0);
    Ok(())
}

/// The numbers of the blocks in which a file of `size` bytes has data.
pub fn with_data(data: &[Range<u64>], size: u64) -> Vec<u64> {
    let mut numbers: Vec<u64> = data
        .iter()
        .filter(|range| range.start < size)
        .flat_map(|range| range.start / BLOCK..range.end.min(size).div_ceil(BLOCK))
        .collect();
    numbers.dedup();
    numbers
}

/// The hash of a block's contents, with their length.
pub fn hash(contents: &[u8]) -> u128 {
    xxh3_128(contents)
}

/// Whether a block could be a hole just as well.
pub fn is_zero(contents: &[u8]) -> bool {
    contents.iter().all(|byte| *byte == 0)
}

/// The parts of `block` that lie in none of `data`.
pub fn holes(block: &Range<u64>, data: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut holes = Vec::new();
    let mut at = block.start;
    for range in data.iter().filter(|range| range.start < block.end && range.end > block.start) {
        if at < range.start {
            holes.push(at..range.start);
        }
        at = at.max(range.end);
    }
    if at < block.end {
        holes.push(at..block.end);
    }
    holes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_with_data_and_holes_cover_the_file() {
        let data = [10..20, BLOCK - 1..BLOCK + 1, 5 * BLOCK..5 * BLOCK + 100];
        assert_eq!(with_data(&data, 6 * BLOCK), [0, 1, 5]);
        assert_eq!(with_data(&data, BLOCK), [0]);
        assert_eq!(holes(&(0..BLOCK), &data), [0..10, 20..BLOCK - 1]);
        let (all, everywhere) = (2 * BLOCK..3 * BLOCK, 0..9 * BLOCK);
        assert_eq!(holes(&all, &data), std::slice::from_ref(&all));
        assert!(holes(&all, std::slice::from_ref(&everywhere)).is_empty());
    }
}
