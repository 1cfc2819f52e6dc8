//! Numbers as bytes (postcard): most of them are small, and hardly ever looked at.

use serde::Serialize;

/// Room for nearly all that is packed in one window.
const MOST_BYTES: usize = 512;

/// Has what is done with the bytes of `value`: whoever keeps them allocates once, and just as much as they take.
pub(super) fn with_bytes<T>(value: &impl Serialize, kept: impl FnOnce(&[u8]) -> T) -> T {
    let mut room = [0; MOST_BYTES];
    if let Ok(bytes) = postcard::to_slice(value, &mut room) {
        return kept(bytes);
    }
    kept(&postcard::to_stdvec(value).expect("plain data of known lengths"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_room_is_packed_all_the_same() {
        for length in [0, 1, MOST_BYTES - 2, MOST_BYTES - 1, MOST_BYTES, 3 * MOST_BYTES] {
            let value = vec![7_u8; length];
            assert_eq!(with_bytes(&value, <[u8]>::to_vec), postcard::to_stdvec(&value).unwrap());
        }
    }
}
