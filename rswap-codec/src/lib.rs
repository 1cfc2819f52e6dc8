//! How a page is written: whichever is smallest of a marker, a delta, LZ4, and the page itself.
//!
//! A crate of its own, so that it is optimised where the rest is built for tests.

/// Bytes in a page.
pub const PAGE_SIZE: usize = 4096;

/// A page that compresses to more than this is sent as it is: decompressing costs the freeze time.
const WORTH_IT: usize = PAGE_SIZE - PAGE_SIZE / 8;

/// How a page's contents are written. The numbers are the wire's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// All zeros; no bytes follow.
    Zero = 0,
    /// As it is.
    Raw = 1,
    /// LZ4 block.
    Lz4 = 2,
    /// LZ4 block of the XOR with the page sent before.
    Delta = 3,
}

impl Encoding {
    /// The encoding with this number.
    pub fn from_number(number: u8) -> Option<Self> {
        [Self::Zero, Self::Raw, Self::Lz4, Self::Delta].into_iter().find(|e| *e as u8 == number)
    }
}

/// Why a page could not be decoded.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DecodeError {
    /// The bytes have the wrong length for their encoding, or are no LZ4 block of a page.
    #[error("{len} bytes are no page in encoding {encoding:?}")]
    Malformed {
        /// How they were said to be written.
        encoding: Encoding,
        /// How many they are.
        len: usize,
    },
}

/// Writes `page` into `out` (cleared first) in the encoding that is returned; `base` is the page as it was
/// sent before.
pub fn encode(page: &[u8], base: Option<&[u8]>, out: &mut Vec<u8>) -> Encoding {
    out.clear();
    if page.iter().all(|byte| *byte == 0) {
        return Encoding::Zero;
    }
    if let Some(base) = base {
        let mut difference = [0; PAGE_SIZE];
        xor(&mut difference, page, base);
        if compress(&difference, out) {
            return Encoding::Delta;
        }
    }
    if compress(page, out) {
        return Encoding::Lz4;
    }
    out.extend_from_slice(page);
    Encoding::Raw
}

/// Whether `page` became small enough to be worth it; then it is in `out`.
fn compress(page: &[u8], out: &mut Vec<u8>) -> bool {
    out.resize(lz4_flex::block::get_maximum_output_size(PAGE_SIZE), 0);
    match lz4_flex::block::compress_into(page, out) {
        Ok(len) if len <= WORTH_IT => {
            out.truncate(len);
            true
        }
        _ => {
            out.clear();
            false
        }
    }
}

/// Reads a page into `page`, which holds the page received before when the encoding is a delta.
pub fn decode(encoding: Encoding, data: &[u8], page: &mut [u8]) -> Result<(), DecodeError> {
    let malformed = || DecodeError::Malformed { encoding, len: data.len() };
    match encoding {
        Encoding::Zero if data.is_empty() => page.fill(0),
        Encoding::Raw if data.len() == PAGE_SIZE => page.copy_from_slice(data),
        Encoding::Lz4 => decompress(data, page).ok_or_else(malformed)?,
        Encoding::Delta => {
            let mut difference = [0; PAGE_SIZE];
            decompress(data, &mut difference).ok_or_else(malformed)?;
            let base = <[u8; PAGE_SIZE]>::try_from(&*page).map_err(|_| malformed())?;
            xor(page, &difference, &base);
        }
        _ => return Err(malformed()),
    }
    Ok(())
}

fn decompress(data: &[u8], page: &mut [u8]) -> Option<()> {
    let len = lz4_flex::block::decompress_into(data, page).ok()?;
    (len == PAGE_SIZE).then_some(())
}

fn xor(out: &mut [u8], a: &[u8], b: &[u8]) {
    for ((out, a), b) in out.iter_mut().zip(a).zip(b) {
        *out = a ^ b;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn page() -> impl Strategy<Value = Vec<u8>> {
        prop_oneof![
            any::<u8>().prop_map(|fill| vec![fill; PAGE_SIZE]),
            prop::collection::vec(any::<u8>(), PAGE_SIZE),
            prop::collection::vec(0_u8..4, PAGE_SIZE),
        ]
    }

    proptest! {
        #[test]
        fn every_page_comes_back(page in page(), base in prop::option::of(page())) {
            let mut data = Vec::new();
            let encoding = encode(&page, base.as_deref(), &mut data);
            let mut back = base.unwrap_or_else(|| vec![0xaa; PAGE_SIZE]);
            prop_assert_eq!(decode(encoding, &data, &mut back), Ok(()));
            prop_assert_eq!(back, page);
        }

        #[test]
        fn arbitrary_bytes_never_panic(number in 0_u8..4, data in prop::collection::vec(any::<u8>(), 0..5000)) {
            let encoding = Encoding::from_number(number).expect("one of the four");
            let _ = decode(encoding, &data, &mut [0; PAGE_SIZE]);
        }
    }

    #[test]
    fn a_page_that_changed_in_one_word_is_a_small_delta() {
        let base: Vec<u8> = (0..PAGE_SIZE).map(|n| (n * 31 % 251) as u8).collect();
        let mut page = base.clone();
        page[2000] ^= 1;
        let mut data = Vec::new();
        assert_eq!(encode(&page, Some(&base), &mut data), Encoding::Delta);
        assert!(data.len() < 64, "{} bytes for one word", data.len());
    }
}
