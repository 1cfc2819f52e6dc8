//! Damage to one frame of a conversation, chosen by a seed.

use fastrand::Rng;
use rswap_agent::migrate::wire::{Frame, write_frame};

/// Frames of a small migration: the damaged one is among the first so many of its direction.
const FRAMES: u64 = 14;

/// Passes frames on, one of them damaged.
#[derive(Debug)]
pub struct Mangler {
    random: Rng,
    left: u64,
    /// Comes after the next one.
    late: Option<Frame>,
}

impl Mangler {
    /// The damage that follows from `seed`.
    pub fn new(seed: u64) -> Self {
        let mut random = Rng::with_seed(seed);
        let left = random.u64(..FRAMES);
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
        match self.random.u32(..8) {
            // One bit, wherever it is.
            0 | 1 => {
                let at = self.random.usize(..whole.len());
                whole[at] ^= 1 << self.random.u32(..8);
                whole
            }
            // Less than there was.
            2 => {
                let keep = self.random.usize(..frame.payload.len().max(1));
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
            6 => encoded(&Frame { tag: frame.tag, payload: bytes(&mut self.random, frame.payload.len()) }),
            _ => bytes(&mut self.random, whole.len()),
        }
    }
}

/// So many bytes.
pub fn bytes(random: &mut Rng, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    random.fill(&mut bytes);
    bytes
}

fn encoded(frame: &Frame) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Writing to memory cannot fail, and the frame was within its limit.
    let _ = write_frame(&mut bytes, frame.tag, &frame.payload);
    bytes
}
