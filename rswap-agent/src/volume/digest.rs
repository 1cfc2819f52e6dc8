//! One number for all that is in a volume: names, kinds, links, attributes, lengths and contents.

use std::collections::BTreeMap;

use xxhash_rust::xxh3::Xxh3Default;

use super::{
    blocks::{self, BLOCK, Blocks},
    tree::{Kind, Tree},
};

/// The digest of `tree`, whose files have the contents that `contents` tells by their inode number. Inode numbers are no part
/// of it, and neither are times of reading. A block of zeros counts as a hole.
pub fn of<'a>(tree: &Tree, contents: impl Fn(u64) -> Option<&'a Blocks>) -> u128 {
    let mut hash = Xxh3Default::new();
    let zeros = vec![0; BLOCK as usize];
    let whole = blocks::hash(&zeros);
    let mut first_names: BTreeMap<u64, u64> = BTreeMap::new();
    for (order, (path, found)) in tree.iter().enumerate() {
        let mut text = |bytes: &[u8]| {
            hash.update(&(bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        text(path);
        let attributes = &found.attributes;
        for (name, value) in &attributes.xattrs {
            text(name);
            text(value);
        }
        let mut numbers = vec![
            u64::from(attributes.mode),
            u64::from(attributes.uid),
            u64::from(attributes.gid),
            attributes.modified.0 as u64,
            u64::from(attributes.modified.1),
            attributes.xattrs.len() as u64,
        ];
        match &found.kind {
            Kind::Directory => numbers.push(1),
            Kind::Fifo => numbers.push(2),
            Kind::Socket => numbers.push(3),
            Kind::Device { major, minor } => numbers.extend([6, u64::from(*major), u64::from(*minor)]),
            Kind::Symlink { target } => {
                numbers.push(4);
                text(target);
            }
            Kind::File { inode } => {
                let first = *first_names.entry(*inode).or_insert(order as u64);
                numbers.extend([5, first, found.size]);
                let all = contents(*inode).filter(|_| first == order as u64);
                for (number, block) in all.into_iter().flatten() {
                    let range = blocks::range(*number, found.size);
                    let length = range.end.saturating_sub(range.start);
                    let zero = if length == BLOCK { whole } else { blocks::hash(&zeros[..length as usize]) };
                    if *block != zero {
                        numbers.extend([*number, *block as u64, (*block >> 64) as u64]);
                    }
                }
            }
        }
        numbers.iter().for_each(|number| hash.update(&number.to_le_bytes()));
    }
    hash.digest128()
}
