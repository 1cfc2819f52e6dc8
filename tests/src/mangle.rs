//! Damage to one frame of a conversation, chosen by a seed.

use rswap_agent::migrate::wire::{Frame, write_frame};

/// Frames of a small migration: the damaged one is among the first so many of its direction.
const FRAMES: u64 = 14;

/// Numbers that follow from a seed (splitmix64).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next one.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `0..limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        (self.draw() % limit.max(1) as u64) as usize
    }

    /// So many bytes.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.draw() as u8).collect()
    }
}

/// Passes frames on, one of them damaged.
#[derive(Debug)]
pub struct Mangler {
    random: Random,
    left: u64,
    /// Comes after the next one.
    late: Option<Frame>,
}

impl Mangler {
    /// The damage that follows from `seed`.
    pub fn new(seed: u64) -> Self {
        let mut random = Random(seed);
        let left = random.draw() % FRAMES;
        Self { random, left, late: None }
    }

    /// What goes on instead of `frame`, and whether that is damage.
    pub fn pass(&mut self, frame: &Frame) -> (Vec<u8>, bool) {
        let mut bytes = encoded(frame);
        let mangled = self.left == 0;
        self.left = self.left.wrapping_sub(1);
        if mangled {
            bytes = self.mangle(frame);
        }
        if !mangled && let Some(late) = self.late.take() {
            bytes.extend(encoded(&late));
        }
        (bytes, mangled)
    }

    fn mangle(&mut self, frame: &Frame) -> Vec<u8> {
        let mut whole = encoded(frame);
        match self.random.below(8) {
            // One bit, wherever it is.
            0 | 1 => {
                let at = self.random.below(whole.len());
                whole[at] ^= 1 << self.random.below(8);
                whole
            }
            // Less than there was.
            2 => {
                let keep = self.random.below(frame.payload.len());
                encoded(&Frame { tag: frame.tag, payload: frame.payload[..keep].to_vec() })
            }
            // It says that it is as long as can be said.
            3 => {
                whole[1..5].copy_from_slice(&u32::MAX.to_le_bytes());
                whole
            }
            // Twice.
            4 => [whole.clone(), whole].concat(),
            // After the next one.
            5 => {
                self.late = Some(frame.clone());
                Vec::new()
            }
            // The right length, and nothing else right.
            6 => encoded(&Frame { tag: frame.tag, payload: self.random.bytes(frame.payload.len()) }),
            _ => self.random.bytes(whole.len()),
        }
    }
}

fn encoded(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Writing to memory cannot fail, and the frame was within its limit.
    let _ = write_frame(&mut bytes, frame.tag, &frame.payload);
    bytes
}
