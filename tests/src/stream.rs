//! A stream of bytes that can be compared at any place.

use xxhash_rust::xxh3::xxh3_64;

/// Bytes in a block that follows from its number.
const BLOCK: u64 = 8;

/// The stream, read or written from its beginning.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pattern {
    at: u64,
}

impl Pattern {
    fn byte(at: u64) -> u8 {
        xxh3_64(&(at / BLOCK).to_le_bytes()).to_le_bytes()[(at % BLOCK) as usize]
    }

    /// Fills `buffer` with what comes next.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        for byte in buffer {
            *byte = Self::byte(self.at);
            self.at += 1;
        }
    }

    /// Compares `got` with what is due; the error says where it differs.
    pub fn compare(&mut self, got: &[u8]) -> anyhow::Result<()> {
        for byte in got {
            anyhow::ensure!(*byte == Self::byte(self.at), "byte {} of the stream is wrong", self.at);
            self.at += 1;
        }
        Ok(())
    }

    /// How much has passed, in bytes.
    pub fn position(&self) -> u64 {
        self.at
    }
}
